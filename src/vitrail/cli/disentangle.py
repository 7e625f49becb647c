"""vitrail disentangle run | coder | table | paper"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from vitrail.backbones import Backbone, load
from vitrail.cli.opened import open_coder_and_backbone
from vitrail.cli.options import pick_device, pick_workers
from vitrail.coders import coder_metadata
from vitrail.images import open_images
from vitrail.metrics.heads import Head, zero_shot_head
from vitrail.progress import Terminal
from vitrail.steering.disentangle import (
    CHOICES,
    RULES,
    SIDES,
    DisentangleOptions,
    disentangle,
    embeddings_of,
    linear_head,
)
from vitrail.steering.groups import GroupedImages, open_groups
from vitrail.steering.paper_tables import markdown
from vitrail.steering.selection import Site, latents_at
from vitrail.steering.task_coders import KINDS, train_task_coder


def run(arguments: Sequence[str]) -> None:
    tyro.extras.subcommand_cli_from_dict(
        {"run": run_verb, "coder": coder_verb, "table": table_verb, "paper": paper_verb},
        args=arguments,
        prog="vitrail disentangle",
        description="Latents of an attribute that a classifier leans on: chosen, ablated, and beside controls.",
    )


def run_verb(
    coders: tyro.conf.Positional[tuple[Path, ...]],
    images: str,
    spurious: str,
    out: Path,
    val: str | None = None,
    test: str | None = None,
    layout: str = "auto",
    label: str | None = None,
    attribute: str | None = None,
    label_column: str | None = None,
    group_columns: tuple[str, ...] = (),
    head: Literal["zero-shot", "linear"] = "zero-shot",
    prompts: tuple[str, ...] = (),
    rules: tuple[str, ...] = RULES,
    sides: tuple[str, ...] = SIDES,
    pool: Literal["mean", "max"] = "mean",
    draws: int = 20,
    drop: float = 4.0,
    backbone: str | None = None,
    weights: Path | None = None,
    image_px: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    workers: int | None = None,
    device: str = "auto",
) -> None:
    """Choose latents on train, thresholds on val, and tell accuracies by group on test.

    Args:
        coders: coders of one model that `vitrail train` wrote
        images: a folder as Waterbirds or CelebA, a CSV file, or a world; its splits train, val and test are used
        spurious: the attribute that latents are chosen for: "water", "Blond_Hair"
        out: a folder: disentangle.json, rows.parquet, rows.csv, report.html
        val: other images than the split "val" of `images`
        test: other images than its split "test"
        layout: world, waterbirds, celeba or table, where "auto" does not see it
        label: of a world a factor (home), of CelebA an attribute (Male): the class
        attribute: of a world a factor (ground), of CelebA an attribute (Blond_Hair)
        label_column: of a CSV file
        group_columns: of a CSV file; several make one attribute of all their values together
        head: zero-shot: classes in words; linear: fitted on the training images as they are
        prompts: the classes in words, in order; default "a photo of a CLASS"
        rules: pooled is the paper's; balanced and standardised compare within classes
        sides: with is the paper's; without, both
        pool: over tokens, before the mean over images
        draws: random sets beside each chosen one
        drop: percentage points that a non-target group may lose under the relaxed choice
    """
    model, sites = _open(coders, backbone=backbone, weights=weights, image_px=image_px, device=device)
    given = {"label": label, "attribute": attribute, "label_column": label_column}
    given |= {"group_columns": group_columns or None}
    options = {name: value for name, value in given.items() if value is not None}
    # A whole specification of its own may have a split in it, or none: a world takes val and test all the same.
    parts = {
        name: open_groups(
            other or images,
            layout=layout,
            split=name if other is None or other.startswith("world:") else None,
            **options,
        )
        for name, other in (("train", None), ("val", val), ("test", test))
    }
    n_workers = pick_workers(workers)
    told = disentangle(
        model,
        _head(model, parts["train"], head, prompts, batch_size, n_workers),
        parts["train"],
        parts["val"],
        parts["test"],
        sites,
        out,
        spurious=spurious,
        options=DisentangleOptions(
            rules=rules,
            sides=sides,
            pool=pool,
            n_random=draws,
            drop=drop / 100,
            batch_size=batch_size,
            seed=seed,
        ),
        said={"prompts": list(prompts), "coders": [str(path) for path in coders]},
        n_workers=n_workers,
        progress=Terminal(),
    )
    print(summary(told))
    print(f"the page: {out / 'report.html'}")


def coder_verb(
    backbone: tyro.conf.Positional[str],
    images: str,
    point: str,
    out: Path,
    tokens: Literal["all", "cls", "spatial", "pooled"] = "all",
    split: str | None = "train",
    copies: int = 1,
    augmentations: tuple[str, ...] = KINDS,
    d_sae: int | None = None,
    k: int = 64,
    weights: Path | None = None,
    image_px: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    workers: int | None = None,
    device: str = "auto",
) -> None:
    """A coder of the task's own pictures, with the paper's augmentations: OUT/store, OUT/coder.

    Args:
        backbone: "open_clip/NAME@TAG", "toy/clip"
        images: as `run` has them, or anything that `vitrail extract` opens
        point: "blocks.9.hook_resid_post"
        split: of the images; pass --split None for those without
        copies: augmented copies of each picture, beside the picture itself
        augmentations: rotation, crop, contrast, flip
        d_sae: default 64 times the width, as in the paper
        k: 64 or 128 in the paper
    """
    model = load(backbone, weights=weights, image_px=image_px, device=pick_device(device))
    try:
        source = open_groups(images, split=split).images
    except ValueError:  # no groups are known, and none are needed
        source = open_images(images, split=split)
    train_task_coder(
        model,
        source,
        out,
        point=point,
        tokens=tokens,
        copies=copies,
        kinds=augmentations,
        d_sae=d_sae,
        k=k,
        batch_size=batch_size,
        n_workers=pick_workers(workers),
        seed=seed,
        progress=Terminal(),
    )
    print(out / "coder")


def table_verb(images: tyro.conf.Positional[str], out: Path, layout: str = "auto", split: str | None = None) -> None:
    """The pictures of a layout as a CSV that every other verb opens: path, label, attribute, group, split.

    Args:
        images: a folder as Waterbirds or CelebA
        out: the CSV
    """
    found = open_groups(images, layout=layout, split=split)
    found.write_table(out)
    print(", ".join(f"{name}: {n}" for name, n in found.counts().items()))


def paper_verb() -> None:
    """The paper's Tables 1, 6 and 8 with what their digits can say: intervals, images gained, bounds of p."""
    print(markdown())


def summary(told: dict[str, Any]) -> str:
    """Each method's choices in a line."""
    before = told["before"]["test"]
    lines = [
        f"as it is: overall {before['overall']['accuracy']:.2%}, worst group {before['worst']['accuracy']:.2%} "
        f"({before['worst']['group']}, n = {before['worst']['n']})"
    ]
    for choice in CHOICES:
        for row in told["test"]:
            if row["choice"] != choice or row["control"]:
                continue
            name = f"{choice}: {row['kind']} of {row['site']}, {row['rule']}, {row['side']}"
            if row["n_set"]:
                low, high = row["change_worst_low"], row["change_worst_high"]
                found = (
                    f"{row['n_set']} at tau {row['tau']:.3g}: overall {row['overall']:.2%}, worst {row['worst']:.2%}"
                )
                lines.append(f"{name}: {found} ({100 * low:+.1f} to {100 * high:+.1f} points)")
            else:
                lines.append(f"{name}: nothing beats the model as it is on validation images")
    return "\n".join(lines)


def _open(
    coders: Sequence[Path], *, backbone: str | None, weights: Path | None, image_px: int | None, device: str
) -> tuple[Backbone, dict[str, Site]]:
    model: Backbone | None = None
    sites: dict[str, Site] = {}
    for path in coders:
        if model is not None and coder_metadata(path).get("backbone_digest") != model.digest:
            raise ValueError(f"{path} was trained on another model than {coders[0]}: give coders of one model.")
        loaded, about, opened = open_coder_and_backbone(
            path, backbone=backbone, weights=weights, image_px=image_px, device=pick_device(device)
        )
        model = model or opened
        name = path.name if path.name not in sites and path.name != "coder" else str(path)
        sites[name] = latents_at(loaded, about["point"], about["tokens"])
    if model is None:
        raise ValueError("give at least one coder.")
    return model, sites


def _head(
    model: Backbone, train: GroupedImages, kind: str, prompts: Sequence[str], batch_size: int, n_workers: int
) -> Head:
    if kind == "linear":
        rows, positions = embeddings_of(
            model, train.images, batch_size=batch_size, n_workers=n_workers, progress=Terminal()
        )
        return linear_head(rows, torch.from_numpy(train.labels[positions]), train.classes)
    if prompts and len(prompts) != len(train.classes):
        raise ValueError(f"{len(train.classes)} classes ({', '.join(train.classes)}) need as many prompts.")
    return zero_shot_head(model, list(prompts or train.classes), ["{}"] if prompts else ["a photo of a {}"])
