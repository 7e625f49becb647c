"""vitrail eval"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro

from vitrail.backbones import Backbone, load
from vitrail.cli.options import pick_device, pick_workers
from vitrail.coders import SparseCoder, coder_metadata
from vitrail.images import ImageSource, open_images
from vitrail.metrics.heads import Head, ZeroShotHead, fit_linear_head, own_head, zero_shot_head
from vitrail.metrics.substitution import raw_name_head
from vitrail.progress import Terminal
from vitrail.store import Store
from vitrail.studies.first_look import (
    control_sample,
    evaluate,
    joined_sample,
    load_coders,
    load_set,
    probe_of,
    set_sample,
)
from vitrail.studies.prisma_table import Coders
from vitrail.studies.random_training import RandomCoders, train_on_random
from vitrail.studies.table_text import print_pairs, print_table


def run(arguments: Sequence[str]) -> None:
    tyro.cli(eval_verb, args=arguments, prog="vitrail eval")


def eval_verb(
    coders: Annotated[tuple[Path, ...], tyro.conf.Positional],
    images: str,
    out: Path,
    backbone: str | None = None,
    weights: Path | None = None,
    image_px: int | None = None,
    head: str = "auto",
    head_images: str | None = None,
    templates: tuple[str, ...] = ("a photo of a {}.",),
    logit_scale: float | None = None,
    substitution: Literal["trained-tokens", "all-tokens"] = "trained-tokens",
    store: Path | None = None,
    controls: bool = True,
    metrics: str = "",
    random_backbone: Literal["auto", "none", "encode", "train", "True", "False"] = "auto",
    together: bool = False,
    linear_probe: bool = False,
    faithfulness: int = 0,
    split: str | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    n_bootstrap: int = 1000,
    seed: int = 0,
    workers: int | None = None,
    device: str = "auto",
) -> None:
    """Prisma's table of SAEs, transcoders or crosscoders, and other metrics in the same pass: one JSON row per coder
    and per control, with definitions, intervals and provenance.

    Args:
        coders: coder folders, all of one hook point
        images: evaluation images, not those the coders were trained on
        out: the .jsonl file to write
        backbone: default: the one the coders were trained on
        weights: a local weights file for the backbone
        head: own, none, zero-shot (class names through the text tower), linear (fitted on --head-images), a .npy of
            class embeddings, or auto: own where there is one and images are labelled, else none
        head_images: labelled images to fit a linear head on
        templates: for zero-shot class names; "{}" alone is what Prisma's code compares with (tag "prisma")
        logit_scale: temperature of a zero-shot head (default: the model's own, or 100 for a .npy)
        substitution: on the tokens a coder was trained on, or on all, as Prisma's code does
        store: where controls are fitted (default: the store the first coder was trained on)
        metrics: beside Prisma's table, in the same pass: all, prisma, msae, or names (docs/metrics.md)
        random_backbone: a control more, on the same model with random weights: encode, the same coder as it is; train,
            also a coder trained there as this one was (kept in a folder beside `out`); none. auto: encode with controls
            and --metrics all, else none (True is encode, False none)
        together: the coders are SAEs of several points: each alone, then all put in at once
        linear_probe: fitted on the labelled images of the store, for MSAE's LP columns (one row an image: CLS, pooled)
        faithfulness: on so many images, does the answer hang on the latents that attribution names (needs a head)
    """
    loaded, about, several = loaded_coders(coders, together, pick_device(device))
    for needed in ("point", "tokens", "backbone"):
        if needed not in about and not (needed == "backbone" and backbone):
            raise ValueError(f"{coders[0]} does not say its {needed}: it was not trained by `vitrail train`.")
    model = load(backbone or about["backbone"], weights=weights, image_px=image_px, device=pick_device(device))
    if "backbone_digest" in about and model.digest != about["backbone_digest"]:
        raise ValueError(
            f"{model.name} has other weights than the coders were trained on ({model.digest[:12]}, not "
            f"{about['backbone_digest'][:12]}). Pass the --weights that `vitrail extract` had."
        )
    source = open_images(images, split=split)
    n_workers = pick_workers(workers)
    sample = None
    if controls:
        sample = sample_for(about, several, store, seed)
    random: str | RandomCoders | None = random_mode(random_backbone, controls, metrics)
    if random == "train":
        random = train_on_random(
            model,
            recipes(coders, loaded),
            out.with_name(f"{out.stem}.random"),
            store=store,
            seed=seed,
            n_workers=n_workers,
            progress=Terminal(),
        )
    rows = evaluate(
        out,
        model,
        source,
        loaded,
        point=about["point"],
        target_point=about.get("target_point"),
        points=about.get("points", ()),
        tokens=about["tokens"],
        head=pick_head(head, model, source, head_images, templates, logit_scale, n_workers),
        control_sample=sample,
        metrics=metrics,
        faithfulness=faithfulness,
        probe=probe_of(Store.open(store or about["store"]), about["point"], about["tokens"]) if linear_probe else None,
        metadata={path.resolve().name: coder_metadata(path) for path in coders},
        random_backbone=random,
        limit=limit,
        substitution=substitution,
        batch_size=batch_size,
        n_workers=n_workers,
        n_bootstrap=n_bootstrap,
        seed=seed,
        progress=Terminal(),
    )
    print_table(rows)
    print_pairs(rows)
    print(f"{len(rows)} rows in {out}")


def random_mode(asked: str, controls: bool, metrics: str) -> str | None:
    """ "encode", "train" or None."""
    if asked == "auto":
        return "encode" if controls and "all" in metrics.split(",") else None
    return {"True": "encode", "False": None, "none": None}.get(asked, asked)


def recipes(paths: Sequence[Path], loaded: Coders) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Folder and metadata of each coder, by its name in the table; of a set's members, with their points."""
    found = {path.resolve().name: (path, coder_metadata(path)) for path in paths}
    sets = {name for name, given in loaded.items() if not isinstance(given, SparseCoder)}
    if not sets:
        return found
    (name,) = sets
    return {f"{name} @ {about['point']}": (path, about) for path, about in found.values()}


def loaded_coders(
    paths: Sequence[Path], together: bool, device: torch.device
) -> tuple[Coders, dict[str, Any], list[dict[str, Any]]]:
    """Coders by name, what they share, and, of a set, what each says of itself."""
    if not together:
        return *load_coders(list(paths), device), []
    found, several = load_set(list(paths), device)
    return {" + ".join(path.resolve().name for path in paths): found}, several[0], several


def sample_for(
    about: dict[str, Any], several: list[dict[str, Any]], store: Path | None, seed: int
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Training rows on which controls are fitted: of one point, of the points of a coder, or of each of a set."""
    if several:
        return set_sample(several, seed=seed)
    fitted_on = Store.open(store or about["store"])
    if "parts" in about:
        return joined_sample(about, fitted_on, seed=seed)
    return control_sample(fitted_on, about["point"], about["tokens"], seed=seed)


def pick_head(
    head: str,
    backbone: Backbone,
    images: ImageSource,
    head_images: str | None,
    templates: Sequence[str],
    logit_scale: float | None,
    n_workers: int,
) -> Head | None:
    if head == "auto":
        labelled = len(images) > 0 and images.record(0).label is not None
        head = "own" if backbone.n_classes is not None and labelled else "none"
    if head == "none":
        return None
    if head == "own":
        own = own_head(backbone)
        check_classes(images.classes, backbone.class_names, f"the head of {backbone.name}")
        return own
    if head == "linear":
        if head_images is None:
            raise ValueError("--head linear needs --head-images: labelled images, not those that are evaluated.")
        fitted_on = open_images(head_images)
        check_classes(images.classes, fitted_on.classes, head_images)
        return fit_linear_head(backbone, fitted_on, n_workers=n_workers, progress=Terminal())
    if head == "zero-shot":
        raw = tuple(templates) == ("{}",)
        found = raw_name_head(backbone, images.classes) if raw else zero_shot_head(backbone, images.classes, templates)
        return found if logit_scale is None else replace(found, logit_scale=logit_scale)
    if head.endswith(".npy"):
        return ZeroShotHead(
            classes=read_class_embeddings(Path(head), backbone.d_embed), logit_scale=logit_scale or 100.0
        )
    raise ValueError(f"head must be auto, own, none, zero-shot, linear or a .npy file, got {head!r}.")


def check_classes(images: Sequence[str], head: Sequence[str], whose: str) -> None:
    """Labels meet classes by number. Raises ValueError where the numbers are plainly those of other classes: another
    count under other names. Where only the names differ (synonyms), says what is assumed.
    """
    if not images or not head or list(images) == list(head):
        return
    example = f"class 0 is {images[0]!r} here and {head[0]!r} there"
    if len(images) != len(head):
        raise ValueError(
            f"the pictures have {len(images)} classes and {whose} has {len(head)}: {example}. Use a CSV whose labels "
            "are that head's class numbers, all of its classes named or none; or another --head."
        )
    print(f"note: labels are taken as class numbers of {whose}; names differ: {example}.", file=sys.stderr)


def read_class_embeddings(path: Path, d_embed: int) -> torch.Tensor:
    """(n_classes, d_embed) from a .npy of that shape or its transpose. Never unpickled."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: it should hold class embeddings.")
    array = np.load(path, allow_pickle=False)
    if array.ndim == 2 and array.shape[1] != d_embed and array.shape[0] == d_embed:
        array = array.T
    if array.ndim != 2 or array.shape[1] != d_embed:
        raise ValueError(f"{path} has shape {array.shape}; the backbone's embeddings are {d_embed} wide.")
    return torch.from_numpy(array.astype(np.float32))
