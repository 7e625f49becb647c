"""From a coder and its features to a model that can be deployed: built, checked, saved, loaded, exported.

    OUT/repair.json         vitrail-repair, version 1: model and its digest, edits, what they were chosen for, overhead
    OUT/edit.safetensors    the edits' tensors, "0.W", "0.W_dec", ...: data, never code
    OUT/model.pt2           with export: the whole model, weights too, as torch.export wrote it; needs PyTorch alone

The model's own weights are not in the folder: `load_repaired` opens them as vitrail does and refuses others than those
it was repaired on. Loading needs no coder and none of vitrail's training.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.backbones import load
from vitrail.backbones.base import Backbone
from vitrail.files import file_digest, open_tensors, read_json, read_tensors, replacing, write_json, write_tensors
from vitrail.provenance import provenance
from vitrail.steering.repaired import IMAGE_EMBED, EditedLatents, InPlace, LinearCorrection, Repaired, edit_of

if TYPE_CHECKING:
    from vitrail.coders.base import SparseCoder

FORMAT, VERSION = "vitrail-repair", 1
SHARED = ("mean_std", "mean_norm", "msae_code")
TOLERANCE = 1e-4  # of the largest code, where a rule is checked against the coder itself


@dataclass(frozen=True, kw_only=True)
class Part:
    """Latents of one coder at one point. `tokens`: "all", "cls" or "spatial". `value`: of set, add and scale."""

    coder: "SparseCoder"
    point: str
    latents: Sequence[int]
    tokens: str = "all"
    operation: str = "ablate"
    value: float = 0.0


@dataclass(frozen=True, kw_only=True)
class CorrectionPart:
    """A linear map of tokens at a point between blocks: x + (x - centre) @ matrix (defences.py: fit_corrections)."""

    point: str
    centre: Float[Tensor, " d"]
    matrix: Float[Tensor, "d d"]
    tokens: str = "spatial"


def repair(backbone: Backbone, parts: Part | CorrectionPart | Sequence[Part | CorrectionPart]) -> Repaired:
    """The backbone with these latents edited, the error term kept, or tokens corrected, in every forward pass.

    Raises ValueError for coders that cannot be written down densely (several points, dictionaries that pursue), for
    points inside a block, tokens that are not there, and IndexError for latents that are not.
    """
    several = [parts] if isinstance(parts, Part | CorrectionPart) else list(parts)
    return Repaired(
        backbone,
        [
            (part.point, edited_latents(backbone, part) if isinstance(part, Part) else correction(backbone, part))
            for part in several
        ],
    )


def correction(backbone: Backbone, part: CorrectionPart) -> LinearCorrection:
    """One correction as a module, its matrix in two factors. Raises ValueError where widths or tokens do not fit."""
    known = backbone.point(part.point)
    if not known.has_tokens:
        raise ValueError(f"{part.point} has one row an image: a correction is of tokens between blocks.")
    if tuple(part.matrix.shape) != (known.width, known.width) or tuple(part.centre.shape) != (known.width,):
        raise ValueError(
            f"{part.point} of {backbone.name} is {known.width} wide, the correction's matrix is "
            f"{tuple(part.matrix.shape)} and its centre {tuple(part.centre.shape)}."
        )
    first, stop = _tokens(backbone, part.point, part.tokens, has_tokens=True)
    about = {"kind": "correction", "tokens": part.tokens, "first": first, "stop": stop}
    found = LinearCorrection.of_matrix(part.centre, part.matrix, about)
    return found.to(next(backbone.parameters()).device)


def read_correction(path: str | Path, *, tokens: str = "spatial") -> CorrectionPart:
    """correction.safetensors of `vitrail defend`. Raises ValueError for a file that is something else."""
    tensors = read_tensors(Path(path), "correction")
    with open_tensors(Path(path)) as stored:
        point = (stored.metadata() or {}).get("point")
    if set(tensors) != {"centre", "matrix"} or point is None:
        raise ValueError(f"{path} is no correction that `vitrail defend` wrote: it holds {', '.join(sorted(tensors))}.")
    return CorrectionPart(point=point, centre=tensors["centre"], matrix=tensors["matrix"], tokens=tokens)


@torch.no_grad()
def edited_latents(backbone: Backbone, part: Part) -> EditedLatents:
    """One part as a module of plain tensors, checked against the coder on random rows."""
    from vitrail.coders.crosscoder import MultiSource
    from vitrail.coders.transcoder import Transcoder

    coder, known = part.coder.eval(), backbone.point(part.point)
    if isinstance(coder, Transcoder | MultiSource):
        raise ValueError(f"a {coder.name} does not reconstruct one point from itself: its latents cannot edit it.")
    if coder.d_in != known.width:
        raise ValueError(f"the coder takes d_in={coder.d_in}, {part.point} of {backbone.name} is {known.width} wide.")
    chosen = sorted({int(latent) for latent in part.latents})
    if not chosen:
        raise ValueError("there is nothing to repair: name at least one latent.")
    if chosen[0] < 0 or chosen[-1] >= coder.d_sae:
        raise IndexError(f"latents are 0..{coder.d_sae - 1}, got {chosen[0] if chosen[0] < 0 else chosen[-1]}.")
    if part.operation in ("set", "scale") and part.value < 0:
        raise ValueError(f"codes are not negative, so {part.operation} {part.value} cannot be.")
    which = torch.tensor(chosen, device=coder.W_dec.device)
    rule, tensors, k = _rule(coder, which)
    tensors |= {"W_dec": coder.W_dec[which], "b_dec": coder.b_dec, "value": torch.full((len(chosen),), part.value)}
    normalization = coder.normalization
    if normalization in SHARED:
        shared = dict(coder.normalize.named_buffers())
        tensors |= {"mean": shared["mean"], "scale": shared["scale"]}
        normalization = "shared"
    first, stop = _tokens(backbone, part.point, part.tokens, has_tokens=known.has_tokens)
    about = {
        "kind": "latents",
        "rule": rule,
        "k": k,
        "normalization": normalization,
        "operation": part.operation,
        "tokens": part.tokens if known.has_tokens else "row",
        "first": first,
        "stop": stop,
        "latents": chosen,
        "architecture": coder.name,
        "d_sae": coder.d_sae,
    }
    tensors: dict[str, Tensor] = {
        name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
    }
    edit = EditedLatents(tensors, about)
    _check(edit, coder, which)
    return edit.to(next(backbone.parameters()).device)


def save_repaired(
    path: str | Path, repaired: Repaired, about: Mapping[str, Any] | None = None, *, weights: str | Path | None = None
) -> None:
    """Write the folder. `about`: what it was chosen for and what came of it. `weights`: where the model's lay."""
    folder, tensors, edits = Path(path), {}, []
    for i, (point, edit) in enumerate(zip(repaired.points, repaired.edits, strict=True)):
        assert isinstance(edit, EditedLatents | LinearCorrection)
        tensors |= {f"{i}.{name}": tensor.cpu() for name, tensor in edit.named_buffers()}
        edits.append({"point": point, **edit.about})
    write_tensors(folder / "edit.safetensors", tensors)
    told = {
        "format": FORMAT,
        "version": VERSION,
        "backbone": repaired.backbone.name,
        "backbone_digest": repaired.backbone.digest,
        "weights": None if weights is None else str(weights),
        "image_px": list(repaired.backbone.preprocess.image_px),
        "edits": edits,
        "edit_sha256": file_digest(folder / "edit.safetensors"),
        "overhead": repaired.overhead(),
        "about": dict(about or {}),
        "provenance": provenance(),
    }
    write_json(folder / "repair.json", told)  # last: a folder with a repair.json is whole


def load_repaired(
    path: str | Path,
    backbone: Backbone | None = None,
    *,
    weights: str | Path | None = None,
    device: torch.device | str = "cpu",
) -> Repaired:
    """The repaired model. `backbone`: one that is open; else that of repair.json is opened, with `weights` where given.

    Raises ValueError where the folder is not whole or was altered, or the backbone has other weights.
    """
    folder = Path(path)
    told = read_json(folder / "repair.json", "repaired model")
    if not isinstance(told, dict) or told.get("format") != FORMAT or told.get("version") != VERSION:
        raise ValueError(f"{folder / 'repair.json'} does not describe a {FORMAT} of version {VERSION}.")
    file = folder / "edit.safetensors"
    tensors = read_tensors(file, "edits")
    if file_digest(file) != told["edit_sha256"]:
        raise ValueError(f"{file} is not the file that repair.json describes: it was altered. Copy the folder again.")
    if backbone is None:
        found = weights or told["weights"]
        backbone = load(told["backbone"], weights=None if found is None else Path(found), device=torch.device(device))
    if backbone.digest != told["backbone_digest"]:
        raise ValueError(
            f"{backbone.name} has other weights (digest {backbone.digest[:12]}) than the model that was repaired "
            f"({told['backbone']}, {told['backbone_digest'][:12]}): the edits would change something else. Pass the "
            "--weights it was repaired with."
        )
    edits: list[tuple[str, InPlace]] = []
    for i, about in enumerate(told["edits"]):
        mine = {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{i}.")}
        edits.append((about["point"], edit_of(mine, about).to(device)))
    return Repaired(backbone, edits)


def repair_metadata(path: str | Path) -> dict[str, Any]:
    """repair.json."""
    return read_json(Path(path) / "repair.json", "repaired model")


def export_repaired(path: str | Path, repaired: Repaired, *, batch: int | None = None) -> Path:
    """OUT/model.pt2: the whole model for `torch.export.load`, images (b, 3, h, w) to what the plain model gives.

    The batch may have any size, or `batch` where the model's code needs a fixed one. Checked: what was written gives
    what the model gives. Raises RuntimeError where PyTorch cannot export this model, with its reason's first line.
    """
    target = Path(path) / "model.pt2"
    height, width = repaired.preprocess.image_px
    weight = next(repaired.parameters())
    images = torch.randn(batch or 2, 3, height, width, generator=torch.Generator().manual_seed(0))
    images = images.to(weight.device, weight.dtype)
    shapes = None if batch is not None else ({0: torch.export.Dim("batch", min=1, max=4096)},)
    try:
        with torch.no_grad():
            program = torch.export.export(repaired, (images,), dynamic_shapes=shapes)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RuntimeError(f"torch.export cannot take {repaired.name}: {reason}") from error
    with torch.no_grad():
        apart = float((program.module()(images) - repaired(images)).abs().max())
        largest = float(repaired(images).abs().max())
    if not apart <= 1e-4 * max(1.0, largest):
        raise RuntimeError(f"the exported {repaired.name} gives other numbers, by up to {apart:.3g}: nothing was kept.")
    with replacing(target) as temporary, temporary.open("wb") as stream:
        torch.export.save(program, stream)
    return target


@torch.inference_mode()
def time_overhead(repaired: Repaired, images: Float[Tensor, "b 3 h w"], *, repeats: int = 5) -> dict[str, float]:
    """Milliseconds an image of the plain and of the repaired model, the medians of `repeats` turns, and their ratio."""
    seconds: dict[str, list[float]] = {"plain": [], "repaired": []}
    models = {"plain": repaired.backbone, "repaired": repaired}
    for _ in range(repeats + 1):
        for name, model in models.items():
            begun = time.perf_counter()
            model(images)
            if images.is_cuda:
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - begun)
    middle = {name: sorted(values[1:])[len(values) // 2 - 1] for name, values in seconds.items()}
    per_image = {f"{name}_ms": 1000 * value / len(images) for name, value in middle.items()}
    return {**per_image, "ratio": middle["repaired"] / middle["plain"]}


# ------------------------------------------------------------------------------------------------------------ details


def _rule(coder: "SparseCoder", which: Tensor) -> tuple[str, dict[str, Tensor], int | None]:
    """How a coder's latents fire, in tensors. Raises ValueError for one that none of the three rules says."""
    from vitrail.coders.gated import Gated
    from vitrail.coders.jump_relu import JumpReLU
    from vitrail.coders.relu import ReLU

    W, b = coder.W_enc, coder.b_enc
    few = {"W": W[:, which], "b": b[which]}
    k = _largest(coder)
    if k is not None:
        return "largest", {"W": W, "b": b, "latents": which}, k
    if isinstance(coder, Gated):
        return "gate", {**few, "log_ratio": coder.r_mag[which], "b_mag": coder.b_mag[which]}, None
    if isinstance(coder, JumpReLU):
        return "threshold", {**few, "floor": coder.log_threshold.exp()[which]}, None
    threshold = getattr(coder, "threshold", None)
    if isinstance(threshold, Tensor):
        return "threshold", {**few, "floor": threshold.expand(len(which))}, None
    plain = isinstance(coder, ReLU) or hasattr(coder, "inference") or hasattr(coder, "inference_k")
    if plain and getattr(coder, "soft_cap", None) is None:
        return "threshold", {**few, "floor": torch.zeros_like(few["b"])}, None
    raise ValueError(
        f"a {coder.name} coder cannot be written into a model: no rule of vitrail-repair says how it fires."
    )


def _largest(coder: "SparseCoder") -> int | None:
    """k, where a latent fires if it is among the k largest of its row."""
    if getattr(coder, "soft_cap", None) is not None:
        return None
    if getattr(coder, "inference", None) == "topk":
        return int(coder.k)  # pyright: ignore[reportArgumentType]
    k = getattr(coder, "inference_k", None)
    return None if k is None else int(k)


def _tokens(backbone: Backbone, point: str, tokens: str, *, has_tokens: bool) -> tuple[int | None, int | None]:
    """(first, stop) of the tokens to edit; None, None: all."""
    if tokens not in ("all", "cls", "spatial"):
        raise ValueError(f"tokens must be all, cls or spatial, got {tokens!r}.")
    if not has_tokens or tokens == "all":
        return None, None
    grid = backbone.grid
    if tokens == "cls" and not grid.n_cls:
        raise ValueError(f"{point} of {backbone.name} has no CLS token.")
    part = grid.tokens(tokens)
    return part.start or 0, part.stop


def _check(edit: EditedLatents, coder: "SparseCoder", which: Tensor) -> None:
    """The rule against the coder's own codes. Raises ValueError where they differ."""
    rows = torch.randn(64, coder.d_in, generator=torch.Generator().manual_seed(0)).to(coder.W_dec)
    if edit.normalization == "shared":
        rows = rows * edit.scale + edit.mean
    z = coder.encode_sparse(rows).to_dense()[:, which].float()
    mine = edit._codes(edit._normalized(rows.float())[0])
    if not torch.allclose(z, mine, atol=TOLERANCE * max(1.0, float(z.max())), rtol=TOLERANCE):
        raise ValueError(
            f"a {coder.name} coder cannot be written into a model: its codes and those of the rule {edit.rule!r} "
            f"differ by up to {float((z - mine).abs().max()):.3g}."
        )


__all__ = [
    "IMAGE_EMBED",
    "CorrectionPart",
    "Part",
    "correction",
    "edited_latents",
    "export_repaired",
    "load_repaired",
    "read_correction",
    "repair",
    "repair_metadata",
    "save_repaired",
    "time_overhead",
]
