"""vitrail search"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from vitrail.backbones import load
from vitrail.cli.opened import open_coder_and_backbone
from vitrail.coders import coder_metadata
from vitrail.coders.sparse import Codes
from vitrail.codes import CodeStore
from vitrail.concepts.dense import EmbeddingIndex
from vitrail.concepts.inverted import Neighbours, SparseIndex, build_search, pooled_image
from vitrail.concepts.query import PictureQuery, picture_query
from vitrail.concepts.search import (
    Hit,
    Names,
    explained,
    fires_here,
    groups_of,
    images_firing,
    read_names,
)
from vitrail.files import write_json
from vitrail.images.base import BadImage
from vitrail.images.decode import decode_rgb
from vitrail.progress import Terminal
from vitrail.store import Store

EMBEDDING = "hook_image_embed"


def run(arguments: Sequence[str]) -> None:
    tyro.cli(search_verb, args=arguments, prog="vitrail search")


def search_verb(
    run_or_codes: Annotated[Path, tyro.conf.Positional],
    image: int | None = None,
    picture: Path | None = None,
    text: str | None = None,
    box: tuple[int, int, int, int] | None = None,
    metric: Literal["l1", "cosine", "overlap", "embedding"] | None = None,
    pool: str = "max",
    k: int = 10,
    why: int = 8,
    coder: str | None = None,
    names: Path | None = None,
    by_meaning: bool = False,
    embeddings: Path | None = None,
    exact: bool | None = None,
    index: Path | None = None,
    weights: Path | None = None,
    out: Path | None = None,
) -> None:
    """Images like an image, images of a concept, what fires in a box; and why.

    Args:
        run_or_codes: a run folder (its codes/NAME), or a folder of codes
        image: a row of the store: images like this one
        picture: a file: images like this picture, which need not be in the store
        text: images in which the concepts of these words fire; commas part the concepts
        box: with --image or --picture: LEFT TOP RIGHT BOTTOM in pixels: what fires there, and images with the same
            latents
        metric: l1 (default), cosine or overlap of codes; embedding: cosine of image embeddings
        pool: an image's codes: max or mean over its patches, cls, or the number of a token
        k: how many images
        why: how many shared latents to show for each
        coder: which of a run's coders
        names: concepts.parquet or a JSON of latent to name (default: the run's, where there is one)
        by_meaning: words that are no name find the nearest names, by the backbone's text tower
        embeddings: a store of hook_image_embed of the same images (default: the one the codes were made from)
        exact: embeddings compared one by one, or through usearch (default: exact up to 100,000)
        index: where the search index is kept (default: RUN/search/NAME-POOL)
        weights: with --picture: the backbone's weights, where `vitrail extract` had --weights
        out: also write what was found, as JSON
    """
    if sum(asked is not None for asked in (image, picture, text)) != 1:
        raise ValueError("ask for one of --image, --picture and --text.")
    if box is not None and text is not None:
        raise ValueError("--box is drawn on an image: give --image or --picture.")
    path, run_folder = find_codes(run_or_codes, coder)
    codes = CodeStore.open(path)
    known = find_names(names, run_folder, path.name)
    at = index or (
        run_folder / "search" / f"{path.name}-{pool}" if run_folder else path.parent / f"{path.name}-{pool}.search"
    )
    searched = build_search(codes, at, pool=int(pool) if pool.isdigit() else pool, progress=Terminal())
    told: dict[str, Any] = {"codes": str(path), "pool": pool, "image": image, "text": text, "box": box}
    if text is not None:
        hits, extra = by_text(searched, codes, text, known, k, by_meaning)
    else:
        query = Query.of_file(codes, picture, weights) if picture is not None else Query(image)
        told["picture"] = None if picture is None else str(picture)
        if box is not None:
            hits, extra = by_box(searched, codes, query, box, metric or "overlap", known, k, why)
        else:
            at_token = int(pool) if pool.isdigit() else pool
            hits, extra = by_image(searched, codes, query, metric or "l1", known, k, why, embeddings, exact, at_token)
    told |= {**extra, "hits": [hit.to_json() for hit in hits]}
    show(hits, image_ids(codes), distance=extra.get("metric") == "l1")
    if out is not None:
        write_json(out, told)
        print(f"also in {out}")


def find_codes(path: Path, coder: str | None) -> tuple[Path, Path | None]:
    """(folder of codes, run folder or None). Raises FileNotFoundError, or ValueError where several coders are there."""
    if (path / "manifest.json").is_file():
        return path, path.parents[1] if path.parent.name == "codes" else None
    found = sorted(folder.parent.name for folder in (path / "codes").glob("*/manifest.json"))
    if not found:
        raise FileNotFoundError(f"{path} is neither a folder of codes nor a run with codes/NAME.")
    if coder is None and len(found) > 1:
        raise ValueError(f"{path} holds codes of {', '.join(found)}: choose one with --coder.")
    if coder is not None and coder not in found:
        raise ValueError(f"{path} holds codes of {', '.join(found)}, not of {coder!r}.")
    return path / "codes" / (coder or found[0]), path


def find_names(names: Path | None, run_folder: Path | None, coder: str) -> dict[int, str] | None:
    if names is not None:
        return read_names(names)
    if run_folder is not None:
        for path in (run_folder / "concepts" / coder / "concepts.parquet", run_folder / "concepts.parquet"):
            if path.is_file():
                return read_names(path)
    return None


def by_text(
    index: SparseIndex, codes: CodeStore, text: str, names: Names | None, k: int, by_meaning: bool
) -> tuple[list[Hit], dict[str, Any]]:
    if not names:
        raise ValueError("words find latents by their names, and there are none: run `vitrail name`, or pass --names.")
    tower = None
    if by_meaning:
        about = coder_metadata(Path(codes.manifest.coder["path"]))
        tower = load(about["backbone"]).text
        if tower is None:
            raise ValueError(f"{about['backbone']} has no text tower: ask without --by-meaning.")
    groups = groups_of(text, names, tower)
    for group in groups:
        print("concepts: " + ", ".join(f"{names[latent]} (latent {latent})" for latent in group))
    rows, scores = images_firing(index, groups, k)
    latents = {latent for group in groups for latent in group}
    return [Hit(row, score) for row, score in zip(rows.tolist(), scores.tolist(), strict=True)], {
        "metric": "concepts",
        "latents": sorted(latents),
    }


@dataclass(frozen=True)
class Query:
    """A row of the store, or a picture that is elsewhere."""

    image: int | None
    picture: PictureQuery | None = None

    @classmethod
    def of_file(cls, codes: CodeStore, path: Path, weights: Path | None) -> "Query":
        """Raises FileNotFoundError and ValueError for no file, no picture, and codes that do not name their coder."""
        coder = codes.manifest.coder.get("path")
        if coder is None or not Path(coder).is_dir():
            raise ValueError(f"{codes.path} were made by a coder at {coder}, which is not there: a picture needs it.")
        try:
            picture = decode_rgb(path.read_bytes())
        except BadImage as error:
            raise ValueError(f"{path}: {error}") from error
        loaded, _, backbone = open_coder_and_backbone(
            Path(coder), backbone=None, weights=weights, image_px=None, device=torch.device("cpu")
        )
        return cls(None, picture_query(backbone, loaded, codes, picture))

    def tokens(self, codes: CodeStore) -> Codes:
        if self.picture is not None:
            return self.picture.tokens
        assert self.image is not None
        return codes.image(self.image)

    def others(self, find: Callable[[int], Neighbours], k: int, n: int) -> Neighbours:
        """The k nearest, without the image itself where it is one of the store."""
        if self.image is None:
            return find(min(k, n))
        return find(min(k + 1, n)).without(torch.tensor([self.image]))


def by_box(
    index: SparseIndex,
    codes: CodeStore,
    query: Query,
    box: tuple[int, int, int, int],
    metric: str,
    names: Names | None,
    k: int,
    why: int,
) -> tuple[list[Hit], dict[str, Any]]:
    fires, row = fires_here(codes, query.tokens(codes), box, names=names)
    print(f"in the box {len(fires)} latents fire:")
    for one in fires[:why]:
        print(f"  {_label(one.latent, one.name):<28} max {one.max:.3g}, mean {one.mean:.3g}, {one.n_patches} patches")
    found = query.others(lambda n: index.nearest(row, n, metric), k, index.n)
    told = {"metric": metric, "fires": [vars(one) for one in fires]}
    return explained(index, row, found, names=names, top=why), told


def by_image(
    index: SparseIndex,
    codes: CodeStore,
    query: Query,
    metric: str,
    names: Names | None,
    k: int,
    why: int,
    embeddings: Path | None,
    exact: bool | None,
    pool: str | int,
) -> tuple[list[Hit], dict[str, Any]]:
    extra: dict[str, Any] = {}
    row = index.rows(torch.tensor([query.image])) if query.image is not None else None
    if row is None:
        row = pooled_image(codes, query.tokens(codes), pool)
    if metric == "embedding":
        dense = EmbeddingIndex(image_embeddings(embeddings or Path(codes.manifest.store)), exact=exact)
        if dense.n != index.n:
            raise ValueError(f"{embeddings} holds {dense.n} images, the codes {index.n}: extract the same images.")
        own = dense.embeddings[query.image][None].float() if query.picture is None else query.picture.embedding
        found = query.others(lambda n: dense.nearest(own, n), k, dense.n)
        if not dense.is_exact:
            extra = {"recall": dense.recall(min(k, dense.n))}
            print(f"through usearch, which finds {extra['recall']:.1%} of the exact neighbours here")
    else:
        found = query.others(lambda n: index.nearest(row, n, metric), k, index.n)
    return explained(index, row, found, names=names, top=why), {"metric": metric, **extra}


def image_embeddings(store: Path) -> torch.Tensor:
    """Every image's embedding. Raises KeyError where the store does not hold them."""
    opened = Store.open(store)
    if EMBEDDING not in opened.points:
        raise KeyError(
            f"{store} holds {', '.join(opened.points)}, not {EMBEDDING}: extract it from the same images and pass "
            "that store with --embeddings."
        )
    kind = opened.kind(EMBEDDING, None)
    return torch.cat([x[:, 0] for _, x in opened.image_batches(EMBEDDING, kind)])


def image_ids(codes: CodeStore) -> list[str] | None:
    """Names of the store's images in row order; None where the store is elsewhere now."""
    try:
        table = Store.open(codes.manifest.store).images()
    except (OSError, ValueError) as error:
        print(f"note: images have no names here, only rows: {error}", file=sys.stderr)
        return None
    return [
        f"{name} ({about})" if about else str(name)
        for name, about in zip(table["id"], table["class_name"], strict=True)
    ]


def show(hits: Sequence[Hit], ids: list[str] | None, *, distance: bool) -> None:
    print(f"{'row':>8}  {'distance' if distance else 'similarity':>10}  image")
    for hit in hits:
        print(f"{hit.row:>8}  {hit.value:>10.4g}  {ids[hit.row] if ids else ''}")
        if hit.why:
            parts = [f"{_label(one.latent, one.name)} {one.share:.0%}" for one in hit.why]
            print(f"{'':>20}  shares {json.dumps(', '.join(parts), ensure_ascii=False)[1:-1]}")


def _label(latent: int, name: str | None) -> str:
    return f"latent {latent}" if name is None else f"{name} ({latent})"
