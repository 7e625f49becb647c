"""Coders of images and coders of texts, each on both: MSAE's Table 2.

A coder meets the other modality with that modality's mean and scale (`coders.modality.for_modality`), as MSAE does;
its weights and thresholds stay. Rows of a dual encoder's final space: `hook_image_embed` and `text_rows`. Coders on the
same rows are compared row by row: "paired", as `vitrail eval` has it.

Zaigrajew et al. 2025, section 4.2 and table 2; SPEC row 36.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.backbones.base import Backbone
from vitrail.backbones.grid import Grid
from vitrail.coders import SparseCoder, make_coder
from vitrail.coders.modality import for_modality
from vitrail.images.base import ImageSource
from vitrail.images.loader import load_batches
from vitrail.metrics.groups import MetricFactory, chosen
from vitrail.metrics.measured import Measured, all_paired
from vitrail.metrics.passing import Curve, Metric, Seen, Setting, finite
from vitrail.progress import SILENT, Progress
from vitrail.provenance import provenance
from vitrail.statistics import ActivationStats
from vitrail.studies.prisma_pass import CountsLatents, Reconstructs
from vitrail.studies.prisma_table import pairs_to_json
from vitrail.studies.random_training import batch_size_of, config_of
from vitrail.training import TensorSource, train

METRICS = "msae_reconstruction,cknna,dead,progressive,orthogonality"
ROWS_AT_ONCE = 4096
POINT = "hook_image_embed"


def modality_table(
    coders: Mapping[str, SparseCoder],
    trained_on: Mapping[str, str],
    rows: Mapping[str, Float[Tensor, "n d"]],
    training_rows: Mapping[str, Float[Tensor, "m d"]],
    *,
    metrics: str = METRICS,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """A row for each coder and modality, as `vitrail eval` writes them, with "modality" and "trained_on" beside.

    `rows`: what is measured, by modality ("image", "text"), never rows that a coder learnt from; `training_rows`: of
    each modality those whose mean and scale coders are given there. Raises ValueError for a modality without rows.
    """
    for name, modality in trained_on.items():
        if modality not in rows:
            raise ValueError(f"coder {name} was trained on {modality!r}, and there are rows of {', '.join(rows)} only.")
    factories = [kind.make for kind in chosen(metrics).values()]
    stats = {modality: ActivationStats.of(training_rows[modality]) for modality in rows}
    out: list[dict[str, Any]] = []
    numbers: dict[str, dict[str, Measured]] = {}
    for name, coder in coders.items():
        for modality, x in rows.items():
            own = coder if trained_on[name] == modality else for_modality(coder, stats[modality])
            shift = training_rows[modality].double().mean(0)
            measured, curves = measure_rows(own, x, factories, shift=shift, n_bootstrap=n_bootstrap, seed=seed)
            numbers[f"{name} on {modality}s"] = measured
            out.append(
                {
                    "name": f"{name} on {modality}s",
                    "coder": name,
                    "control_of": None,
                    "architecture": coder.name,
                    "modality": modality,
                    "trained_on": trained_on[name],
                    "d_in": coder.d_in,
                    "d_sae": coder.d_sae,
                    "config": coder.config,
                    "measured": {key: value.to_json() for key, value in measured.items()},
                    "curves": finite(curves),
                    "provenance": provenance(),
                }
            )
    for row in out:
        others = [one["name"] for one in out if one["modality"] == row["modality"] and one is not row]
        row["paired"] = pairs_to_json({other: all_paired(numbers[row["name"]], numbers[other]) for other in others})
    return out


def image_rows(
    backbone: Backbone, images: ImageSource, *, batch_size: int = 64, n_workers: int = 0, progress: Progress = SILENT
) -> Float[Tensor, "n d_embed"]:
    """Image embeddings as they are, on the CPU; unreadable images are passed over."""
    device, parts = next(backbone.parameters()).device, []
    batches = load_batches(images, range(len(images)), backbone.preprocess, batch_size=batch_size, n_workers=n_workers)
    with progress.task("image embeddings", len(images), "images") as task, torch.inference_mode():
        for batch in batches:
            if batch.positions:
                parts.append(backbone.activations(batch.images.to(device), [POINT])[POINT].float().cpu())
            task.advance(len(batch.positions) + len(batch.skipped))
    if not parts:
        raise ValueError(f"none of the {len(images)} images of {images.spec} could be read.")
    return torch.cat(parts).clone()


def coder_of_texts(
    rows: Float[Tensor, "n d_embed"],
    like: Path,
    about: Mapping[str, Any],
    out: Path,
    *,
    metadata: Mapping[str, Any] | None = None,
    progress: Progress = SILENT,
) -> SparseCoder:
    """A coder of texts' rows, trained as the coder in the folder `like` was on images' (`about`, its metadata), and for
    as many passes over them. Raises ValueError where that does not say how it was trained.
    """
    if "training" not in about:
        raise ValueError(f"{like} does not say how it was trained: train a coder of texts, and name its folder.")
    training = about["training"]
    coder = make_coder(training["request"]["architecture"], **training["request"]["coder"])
    source: Any = TensorSource(rows, batch_size=min(len(rows), batch_size_of(like, training)))
    said = {"point": "text_embed", "tokens": "pooled", "trained_on": "text", **(metadata or {})}
    return train(coder, source, out, config=config_of(training), metadata=said, progress=progress).coder


def measure_rows(
    coder: SparseCoder,
    x: Float[Tensor, "n d"],
    factories: Sequence[MetricFactory] = (),
    *,
    shift: Float[Tensor, " d"],
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> tuple[dict[str, Measured], dict[str, Curve]]:
    """Metrics of rows in memory, one row an image (or a text): no model runs. `shift`: their rough mean."""
    one = Grid(height=1, width=1, patch_px=1, image_px=(1, 1), n_cls=0, n_registers=0)
    setting = Setting(
        coder=coder,
        n_tokens=1,
        tokens="pooled",
        grid=one,
        cls_token=None,
        patches=None,
        n_images=len(x),
        shift=shift,
        seed=seed,
    )
    metrics: list[Metric] = [Reconstructs(shift), CountsLatents(d_sae=coder.d_sae, n_tokens=1, cls_token=None)]
    metrics += [factory(setting) for factory in factories]
    with torch.inference_mode():
        for part in x.to(coder.W_dec).split(ROWS_AT_ONCE):
            codes = coder.encode_sparse(part)
            seen = Seen(x=part[:, None], target=part[:, None], codes=codes, x_hat=coder.decode_sparse(codes)[:, None])
            for metric in metrics:
                metric.update(seen)
    measured: dict[str, Measured] = {}
    curves: dict[str, Curve] = {}
    for metric in metrics:
        measured |= metric.compute(n_bootstrap=n_bootstrap, seed=seed)
        curves |= metric.curves()
    return measured, curves
