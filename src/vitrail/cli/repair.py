"""vitrail repair"""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from vitrail.cli.edit import class_head
from vitrail.cli.opened import open_coder_and_backbone
from vitrail.cli.options import pick_device
from vitrail.cli.search import find_names
from vitrail.coders import SparseCoder
from vitrail.concepts.search import latents_named
from vitrail.files import read_json, tensors_digest
from vitrail.images import ImageSource, open_images
from vitrail.images.loader import load_batches
from vitrail.metrics.measured import Measured, over_images
from vitrail.steering.repair import Part, export_repaired, read_correction, repair, save_repaired, time_overhead
from vitrail.steering.repaired import Repaired


def run(arguments: Sequence[str]) -> None:
    tyro.cli(repair_verb, args=arguments, prog="vitrail repair")


def repair_verb(
    coder: Annotated[Path, tyro.conf.Positional],
    out: Path,
    latents: tuple[int, ...] = (),
    concept: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["-c"])] = (),
    features: Path | None = None,
    correction: Path | None = None,
    operation: Literal["ablate", "set", "add", "scale"] = "ablate",
    value: float = 0.0,
    where: Literal["all", "cls", "spatial"] | None = None,
    names: Path | None = None,
    images: str | None = None,
    split: str | None = None,
    limit: int = 256,
    templates: tuple[str, ...] = ("a photo of a {}.",),
    export: bool = False,
    batch: int | None = None,
    backbone: str | None = None,
    weights: Path | None = None,
    image_px: int | None = None,
    batch_size: int = 64,
    device: str = "auto",
) -> None:
    """A model with latents edited inside: one module, saved, and refused by other weights than its own.

    Args:
        coder: a coder that `vitrail train` wrote
        out: a folder: repair.json, edit.safetensors, with --export model.pt2
        latents: latents by number
        concept: latents by name, with --names
        features: a JSON with "features" (latents), as `vitrail defend` and `vitrail disentangle` write it
        correction: correction.safetensors of `vitrail defend`: a linear map of patches, in place of latents
        operation: ablate them, or set them to, add, or scale them by --value
        where: tokens that are edited (default: those the coder was trained on)
        names: concepts.parquet or a JSON of latent to name
        images: labelled pictures: accuracy of the plain and of the repaired model, and what changed
        limit: so many of them
        templates: texts around class names, where the backbone answers zero-shot
        export: also the whole model as torch.export writes it, for PyTorch without vitrail
        batch: with --export: a fixed batch, where the model cannot take any
    """
    loaded, about, model = open_coder_and_backbone(
        coder, backbone=backbone, weights=weights, image_px=image_px, device=pick_device(device)
    )
    chosen = [*latents, *(latent for one in concept for latent in _named(one, names, coder))]
    told: dict[str, Any] = {"coder": str(coder), "coder_digest": tensors_digest(loaded.state_dict())}
    if features is not None:
        listed = _features(features, loaded, about["point"], told["coder_digest"])
        chosen += listed["features"]
        where = where or listed.get("where")
        told["features"] = {"file": str(features), "format": listed.get("format")}
    if correction is not None:
        if chosen:
            raise ValueError("give latents or a --correction, not both: they are two defences of one point.")
        linear = read_correction(correction, tokens=where or "spatial")
        told = {"correction": str(correction)}
        repaired = repair(model, linear)
        print(f"{repaired.name}: a linear correction of {linear.point}, {linear.tokens} tokens", end="; ")
        return finish(repaired, told, images, split, limit, templates, batch_size, out, weights, batch, export=export)
    tokens = where or (about["tokens"] if about["tokens"] in ("all", "cls", "spatial") else "all")
    part = Part(coder=loaded, point=about["point"], latents=chosen, tokens=tokens, operation=operation, value=value)
    repaired = repair(model, part)
    print(f"{repaired.name}: {len(set(chosen))} latents of {about['point']} ({operation}) on {tokens} tokens", end="; ")
    return finish(repaired, told, images, split, limit, templates, batch_size, out, weights, batch, export=export)


def finish(
    repaired: Repaired,
    told: dict[str, Any],
    images: str | None,
    split: str | None,
    limit: int,
    templates: tuple[str, ...],
    batch_size: int,
    out: Path,
    weights: Path | None,
    batch: int | None,
    *,
    export: bool,
) -> None:
    """Measured, saved, exported, and told."""
    overhead = repaired.overhead()
    print(f"{overhead['parameters']:,.0f} numbers more, {overhead['products_share']:.2%} more multiplications an image")
    if images is not None:
        told |= measured(repaired, open_images(images, split=split), limit, templates, batch_size)
    save_repaired(out, repaired, told, weights=weights)
    print(f"{out}: repair.json, edit.safetensors")
    if export:
        print(f"{export_repaired(out, repaired, batch=batch)}: the whole model, for torch.export.load")


def measured(
    repaired: Repaired, images: ImageSource, limit: int, templates: tuple[str, ...], batch_size: int
) -> dict[str, Any]:
    """Prints and returns accuracies of both models with intervals, how often they differ, and what the edit costs."""
    model = repaired.backbone
    head, _ = class_head(model, images, templates)
    device = next(model.parameters()).device
    positions = range(len(images))[:: max(1, len(images) // limit)][:limit]
    answers: dict[str, list[torch.Tensor]] = {"plain": [], "repaired": []}
    kept: list[int] = []
    last = torch.zeros(0)
    with closing(load_batches(images, positions, model.preprocess, batch_size=batch_size)) as batches:
        for batch in batches:
            last = batch.images.to(device)
            with torch.inference_mode():
                for name, one in (("plain", model), ("repaired", repaired)):
                    output = one(last)
                    answers[name].append((output if head is None else head(output)).argmax(1).cpu())
            kept += batch.positions
    plain, after = (torch.cat(answers[name]) for name in ("plain", "repaired"))
    cost = time_overhead(repaired, last)
    told: dict[str, Any] = {
        "images": images.spec,
        "n_images": len(kept),
        "changed": float((plain != after).double().mean()),
        "time": cost,
    }
    print(f"of {len(kept)} pictures {told['changed']:.1%} are answered otherwise", end="")
    print(f"; {cost['plain_ms']:.2f} ms a picture plain, {cost['repaired_ms']:.2f} repaired")
    labels = torch.tensor([-1 if images.record(i).label is None else int(images.record(i).label or 0) for i in kept])
    if head is not None and bool((labels >= 0).all()):
        for name, found in (("plain", plain), ("repaired", after)):
            right = _share((found == labels).double().numpy())
            told[f"accuracy_{name}"] = {"value": right.value, "low": right.low, "high": right.high}
            print(f"  {name}: right in {right.value:.1%} ({right.low:.1%} to {right.high:.1%})")
    return told


def _share(right: Any) -> Measured:
    sums = {"right": right, "n": right * 0 + 1}
    return over_images(sums, lambda s: s["right"] / s["n"], definition="top-1", n_bootstrap=1000, seed=0)


def _named(concept: str, names: Path | None, coder: Path) -> tuple[int, ...]:
    if concept.isdigit():
        return (int(concept),)
    run_folder = coder.parents[1] if coder.parent.name == "coders" else None
    known = find_names(names, run_folder, coder.name)
    if not known:
        raise ValueError(f"{concept!r} is a name, and no names are known: run `vitrail name`, or pass --names.")
    return latents_named(concept, known)


def _features(path: Path, coder: SparseCoder, point: str, digest: str) -> dict[str, Any]:
    """Raises ValueError for a list that is of another coder or point, or holds no latents."""
    listed = read_json(path, "list of features")
    if not isinstance(listed, dict) or not isinstance(listed.get("features"), list):
        raise ValueError(f'{path} holds no list of latents: {{"features": [3, 17]}} is what is read.')
    if any(not isinstance(one, int) for one in listed["features"]):
        raise ValueError(f"{path}: features are numbers of latents, got {listed['features'][:3]}.")
    if listed.get("coder_digest", digest) != digest:
        raise ValueError(f"{path} lists latents of another coder than this {coder.name} of {coder.d_sae} latents.")
    if listed.get("point", point) != point:
        raise ValueError(f"{path} lists latents of {listed['point']}, the coder reads {point}.")
    return listed
