"""Rows x latents on disk, sparse: every stored activation encoded once, for everything that comes after.

    CODES/manifest.json                   what was encoded with what; state "writing", then "complete"
    CODES/shards/shard-00000.safetensors  CSR: offsets int64 (n_rows + 1), indices int32, values fp16 (nnz)

Rows lie as in the store: image-major, so an image's patch map is one slice. Row r is token r % n_tokens of image
r // n_tokens. Code shards match store shards one to one; docs/formats.md is the norm.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.backbones.grid import Grid
from vitrail.coders.base import SparseCoder
from vitrail.coders.checkpoint import coder_metadata
from vitrail.coders.sparse import Codes
from vitrail.files import file_digest, json_digest, open_tensors, read_json, tensors_digest, write_json, write_tensors
from vitrail.memory import reused_memory
from vitrail.progress import SILENT, Progress
from vitrail.store.joined import Part, check_aligned, joined_images
from vitrail.store.read import Store

FORMAT = "vitrail-codes"
VERSION = 1
SMALLEST = 2.0**-24  # of fp16: a latent that fires faintly stays active when stored


@dataclass(frozen=True)
class CodeShard:
    name: str
    n_images: int
    nnz: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class CodesManifest:
    request: dict[str, Any]
    state: str
    store: str  # where the store lay when it was encoded; its identity is request["store_digest"]
    grid: Grid
    tokens: str
    n_tokens: int
    d_sae: int
    n_images: int
    coder: dict[str, Any] = field(default_factory=dict)
    shards: list[CodeShard] = field(default_factory=list)

    @property
    def digest(self) -> str:
        return json_digest({"request": self.request, "shards": [asdict(shard) for shard in self.shards]})

    def write(self, path: Path) -> None:
        write_json(path / "manifest.json", {"format": FORMAT, "version": VERSION, **asdict(self)})

    @classmethod
    def read(cls, path: Path) -> Self:
        value = read_json(path / "manifest.json", "codes manifest")
        if value.pop("format", None) != FORMAT or value.pop("version", None) != VERSION:
            raise ValueError(f"{path}/manifest.json is not a {FORMAT} manifest of version {VERSION}.")
        grid = value.pop("grid")
        value["grid"] = Grid(**{**grid, "image_px": tuple(grid["image_px"])})
        value["shards"] = [CodeShard(**shard) for shard in value["shards"]]
        return cls(**value)


class CodeStore:
    """Codes on disk. `CodeStore.open(path)`; `for first_image, codes in store.shards(): ...`."""

    def __init__(self, path: Path, manifest: CodesManifest) -> None:
        self.path, self.manifest = path, manifest
        self.n_images, self.n_tokens, self.d_sae = manifest.n_images, manifest.n_tokens, manifest.d_sae

    @classmethod
    def open(cls, path: str | Path) -> Self:
        path = Path(path)
        manifest = CodesManifest.read(path)
        if manifest.state != "complete":
            raise ValueError(f"{path} is unfinished. Run the same encode again; it goes on where it was.")
        for shard in manifest.shards:
            file = _shard_path(path, shard.name)
            found = file.stat().st_size if file.is_file() else 0
            if found != shard.bytes:
                raise ValueError(f"{file} is cut or missing: {found} bytes, not {shard.bytes}. Encode again.")
        return cls(path, manifest)

    def shards(self) -> Iterator[tuple[int, Codes]]:
        """(row of the first image, codes of all rows of the shard), in store order."""
        first = 0
        for shard in self.manifest.shards:
            with open_tensors(_shard_path(self.path, shard.name)) as stored:
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
            yield first, _codes(tensors, self.d_sae)
            first += shard.n_images

    def image(self, row: int) -> Codes:
        """The codes of one image's tokens, reading only them."""
        first = 0
        for shard in self.manifest.shards:
            if first <= row < first + shard.n_images:
                return self._image(shard, row - first)
            first += shard.n_images
        raise IndexError(f"image row must be in 0..{self.n_images - 1}, got {row}.")

    def _image(self, shard: CodeShard, local: int) -> Codes:
        with open_tensors(_shard_path(self.path, shard.name)) as stored:
            a, b = local * self.n_tokens, (local + 1) * self.n_tokens
            offsets = stored.get_slice("offsets")[a : b + 1]
            start, stop = int(offsets[0]), int(offsets[-1])
            tensors = {"offsets": offsets - start}
            tensors |= {name: stored.get_slice(name)[start:stop] for name in ("indices", "values")}
            tensors |= {n: stored.get_slice(n)[a:b] for n in ("shift", "scale") if n in stored.keys()}  # noqa: SIM118
        return _codes(tensors, self.d_sae)

    def patch_map(self, row: int, latent: int) -> Float[Tensor, "h w"]:
        """One latent's activation on every patch of one image. Raises ValueError if patches were not encoded."""
        grid, tokens = self.manifest.grid, self.manifest.tokens
        if tokens not in ("all", "spatial"):
            raise ValueError(f"{self.path} holds {tokens!r} tokens: there are no patches to map.")
        codes = self.image(row)
        column = torch.zeros(self.n_tokens)
        mine = codes.indices == latent
        column[codes.rows()[mine]] = codes.values[mine]
        patches = column[grid.tokens("spatial")] if self.n_tokens == grid.n_tokens else column
        return patches.reshape(grid.height, grid.width)

    def token_position(self, token: int) -> int:
        """The place in the model's sequence of the token-th stored row of an image."""
        grid = self.manifest.grid
        return token + (grid.n_special if self.manifest.tokens in ("spatial", "all") and self._is_patches else 0)

    @property
    def _is_patches(self) -> bool:
        """Whether an image's rows are its patches and nothing else (also `all` of hook_embed, before CLS is added)."""
        return self.n_tokens == self.manifest.grid.n_patches


@reused_memory()
def encode(
    coder: SparseCoder,
    store: Store,
    out: str | Path,
    *,
    point: str | None = None,
    tokens: str | None = None,
    beside: Sequence[Part] = (),
    batch_images: int = 64,
    dtype: str = "float16",
    coder_path: str | Path | None = None,
    progress: Progress = SILENT,
) -> CodeStore:
    """Encode every row of `store` once, or finish what an earlier run began.

    `beside`: what a crosscoder reads beside `point`, in the order it was trained on. Raises ValueError where widths or
    images do not match.
    """
    out = Path(out)
    metadata = coder_metadata(Path(coder_path)) if coder_path is not None else {}
    point = store.default_point(point or metadata.get("point"))
    tokens = store.kind(point, tokens or metadata.get("tokens"))
    parts = [Part(store, point, tokens), *beside]
    if beside:
        check_aligned(parts)
    if coder.d_in != sum(part.width for part in parts):
        found = " beside ".join(f"{part.point} of {part.store.path} is {part.width} wide" for part in parts)
        raise ValueError(f"the coder takes d_in={coder.d_in}, but {found}.")
    request = {
        "store_digest": store.digest,
        "coder_digest": tensors_digest(coder.state_dict()),
        "coder_config": coder.config,
        "architecture": coder.name,
        "point": point,
        "tokens": tokens,
        "dtype": dtype,
    }
    if beside:
        request["beside"] = [[part.store.digest, part.point, part.kind] for part in beside]
    manifest = CodesManifest(
        request=request,
        state="writing",
        store=str(store.path.resolve()),
        grid=store.manifest.grid,
        tokens=tokens,
        n_tokens=store.tokens_per_image(point, tokens),
        d_sae=coder.d_sae,
        n_images=store.n_images,
        coder={"architecture": coder.name, "path": None if coder_path is None else str(coder_path)},
    )
    manifest = _begin(out, manifest)
    if manifest.state == "complete":
        return CodeStore.open(out)
    coder.eval()
    shards = _encode_shards(coder, parts, out, manifest, batch_images, progress)
    replace(manifest, state="complete", shards=shards).write(out)
    return CodeStore.open(out)


def _begin(out: Path, manifest: CodesManifest) -> CodesManifest:
    if not (out / "manifest.json").exists():
        manifest.write(out)
        return manifest
    found = CodesManifest.read(out)
    if found.request != manifest.request:
        differing = [key for key in manifest.request if found.request.get(key) != manifest.request[key]]
        raise ValueError(f"{out} holds other codes (different {', '.join(differing)}). Choose another folder.")
    return found


def _encode_shards(
    coder: SparseCoder,
    parts: Sequence[Part],
    out: Path,
    manifest: CodesManifest,
    batch_images: int,
    progress: Progress,
) -> list[CodeShard]:
    request, done, first = manifest.request, [], 0
    device = next(coder.parameters()).device
    with progress.task("encode", manifest.n_images, "images") as task:
        for shard in parts[0].store.manifest.shards:
            path = _shard_path(out, shard.name)
            if not path.exists():
                encoded = []
                for row, x in joined_images(parts, n_images=batch_images, start=first):
                    if row >= first + shard.n_images:
                        break
                    with torch.inference_mode():
                        encoded.append(coder.encode_sparse(x.flatten(0, 1).to(device)).to("cpu"))
                    task.advance(len(x))
                # A shard none of whose images could be read has no rows.
                codes = Codes.cat(encoded) if encoded else Codes.from_dense(torch.zeros(0, coder.d_sae))
                write_tensors(path, _tensors(codes, request["dtype"]))
            with open_tensors(path) as stored:
                nnz = stored.get_slice("indices").get_shape()[0]
            size, digest = path.stat().st_size, file_digest(path)
            done.append(CodeShard(name=shard.name, n_images=shard.n_images, nnz=nnz, bytes=size, sha256=digest))
            first += shard.n_images
    return done


def as_stored(codes: Codes, dtype: str) -> Codes:
    """The same codes as they are once written and read again: values rounded to `dtype`."""
    return _codes(_tensors(codes, dtype), codes.d_sae)


def _tensors(codes: Codes, dtype: str) -> dict[str, Tensor]:
    stored_dtype = getattr(torch, dtype)
    largest = float(codes.values.max()) if codes.nnz else 0.0
    if largest > torch.finfo(stored_dtype).max:
        raise ValueError(f"a latent fires at {largest:.6g}, more than {dtype} can hold. Encode with dtype='float32'.")
    tensors = {
        "offsets": codes.offsets.long(),
        "indices": codes.indices.int(),
        "values": codes.values.clamp_min(SMALLEST).to(stored_dtype),
    }
    if codes.shift is not None and codes.scale is not None:
        tensors |= {"shift": codes.shift.float(), "scale": codes.scale.float()}
    return tensors


def _codes(tensors: dict[str, Tensor], d_sae: int) -> Codes:
    return Codes(
        offsets=tensors["offsets"],
        indices=tensors["indices"].long(),
        values=tensors["values"].float(),
        d_sae=d_sae,
        shift=tensors.get("shift"),
        scale=tensors.get("scale"),
    )


def _shard_path(path: Path, name: str) -> Path:
    return path / "shards" / f"{name}.safetensors"
