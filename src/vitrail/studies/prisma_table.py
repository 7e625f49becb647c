"""Prisma's table: how well a coder stands in for a hook point, every column of SPEC rows 39-45, beside its controls.

All coders at a point are measured on the same images in one pass: the clean and the zero-ablated model run once per
batch, each coder costs one encode, one decode and the blocks after the point. Controls spend as many active latents per
row as the coder they stand beside:

    random      unit directions drawn at random, one least-squares scale
    pca         the first k principal components of training activations: the best linear code of k numbers
    pca_all     the k largest of all principal coordinates, chosen row by row
    neurons     the k largest of the point's own coordinates
    untrained   the same architecture and starting weights, its normalisation fitted
"""

import math
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.backbones.base import Backbone
from vitrail.coders.base import SparseCoder
from vitrail.coders.baselines import controls
from vitrail.coders.sparse import Codes
from vitrail.files import tensors_digest
from vitrail.images.base import ImageSource
from vitrail.images.loader import load_batches
from vitrail.metrics.heads import Head
from vitrail.metrics.measured import Measured
from vitrail.metrics.reconstruction import Reconstruction
from vitrail.metrics.sparsity import Sparsity
from vitrail.metrics.substitution import PerImage, Rerun, class_columns, image_cosine, substitution_metrics
from vitrail.progress import SILENT, Progress
from vitrail.provenance import peak_memory_mb, provenance
from vitrail.store.tokens import patch_slice, select_tokens, stored_kind

SUBSTITUTIONS = ("trained-tokens", "all-tokens")


@dataclass(frozen=True)
class Row:
    """One line of the table. `control_of` names the coder a control stands beside, None for a coder."""

    name: str
    architecture: str
    control_of: str | None
    measured: dict[str, Measured]
    about: dict[str, Any]  # point, tokens, digests, sizes, cost, provenance

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "architecture": self.architecture,
            "control_of": self.control_of,
            "measured": {name: value.to_json() for name, value in self.measured.items()},
            **self.about,
        }


class Measurement:
    """One coder's running sums."""

    def __init__(
        self, coder: SparseCoder, shift: Tensor, n_tokens: int, cls_token: int | None, at_most: int | None
    ) -> None:
        self.coder, self._at_most = coder.eval(), at_most
        self.reconstruction = Reconstruction(shift)
        self.sparsity = Sparsity(d_sae=coder.d_sae, n_tokens=n_tokens, cls_token=cls_token)
        self.substituted = PerImage()

    def encode(self, x: Float[Tensor, "n d_in"]) -> Codes:
        """The coder's codes; a control's, cut to the number of latents it may spend."""
        codes = self.coder.encode_sparse(x)
        return codes if self._at_most is None else codes.top(self._at_most)

    def update(self, x: Float[Tensor, "n t d_in"]) -> Float[Tensor, "n t d_in"]:
        """The reconstruction of whole images' rows."""
        codes = self.encode(x.flatten(0, 1))
        x_hat = self.coder.decode_sparse(codes).reshape(x.shape)
        self.reconstruction.update(x, x_hat)
        self.sparsity.update(codes)
        return x_hat


class Table:
    """The pass over the images."""

    def __init__(
        self,
        backbone: Backbone,
        coders: Mapping[str, SparseCoder],
        *,
        at_most: Mapping[str, int | None],
        point: str,
        tokens: str,
        head: Head | None,
        substitution: str,
        shift: Float[Tensor, " d_in"],
    ) -> None:
        self.backbone, self.point, self.head = backbone, point, head
        self.tokens = stored_kind(tokens, has_tokens=backbone.point(point).has_tokens)
        self.whole = substitution == "all-tokens"
        if self.whole and self.tokens == "pooled":
            raise ValueError("pooled rows are one per image: there are no other tokens for substitution='all-tokens'.")
        self.clean, self.zeroed = PerImage(), PerImage()
        self.coders, self._at_most, self._shift = coders, at_most, shift
        self.measurements: dict[str, Measurement] = {}
        self.n_images = 0

    def update(self, images: Float[Tensor, "b 3 h w"], labels: Int[Tensor, " b"] | None) -> None:
        run = Rerun(self.backbone, self.point, images)
        self.n_images += len(images)
        rows = select_tokens(run.activation, self.backbone.grid, self.tokens).float()
        if not self.measurements:
            self._begin(rows)
        if self.head is not None and labels is not None:
            zeros = self._put(run.activation, torch.zeros_like(rows), None)
            self.clean.add(class_columns(self.head, run.output, labels))
            self.zeroed.add(class_columns(self.head, run.replaced(zeros)[0], labels))
        for measurement in self.measurements.values():
            value = self._put(run.activation, measurement.update(rows), measurement)
            output, embedding = run.replaced(value)
            measurement.substituted.add({"cosine": image_cosine(run.embedding, embedding)})
            if self.head is not None and labels is not None:
                measurement.substituted.add(class_columns(self.head, output, labels))

    def _begin(self, rows: Float[Tensor, "n t d_in"]) -> None:
        for name, coder in self.coders.items():
            if coder.d_in != rows.shape[2]:
                raise ValueError(
                    f"coder {name} takes d_in={coder.d_in}, but {self.point} of {self.backbone.name} is "
                    f"{rows.shape[2]} wide."
                )
        has_cls = self.backbone.grid.n_cls > 0 and self.tokens in ("all", "cls") and rows.shape[1] != 0
        cls_token = 0 if has_cls and rows.shape[1] in (1, self.backbone.grid.n_tokens) else None
        self.measurements = {
            name: Measurement(coder, self._shift, rows.shape[1], cls_token, self._at_most[name])
            for name, coder in self.coders.items()
        }

    def _put(self, activation: Tensor, rows: Float[Tensor, "n t d_in"], by: Measurement | None) -> Tensor:
        """The point's activation with `rows` in place of the measured tokens (or of all of them)."""
        if activation.ndim == 2:
            return rows[:, 0].to(activation)
        grid = self.backbone.grid
        if self.tokens == "pooled":
            # A pooled row stands for all patches: moving their mean moves each of them alike.
            where = patch_slice(grid, activation.shape[1])
            patches = activation[:, where]
            moved = activation.clone()
            moved[:, where] = patches + (rows.to(activation) - patches.mean(1, keepdim=True))
            return moved
        if self.whole:
            return torch.zeros_like(activation) if by is None else everywhere(by, activation)
        if rows.shape[1] == activation.shape[1]:
            return rows.to(activation)
        value = activation.clone()
        value[:, grid.tokens(self.tokens)] = rows.to(activation)
        return value


def everywhere(by: Measurement, activation: Float[Tensor, "n t d_in"]) -> Float[Tensor, "n t d_in"]:
    """Every position reconstructed, whatever the coder was trained on."""
    codes = by.encode(activation.flatten(0, 1).float())
    return by.coder.decode_sparse(codes).reshape(activation.shape).to(activation)


def prisma_table(
    backbone: Backbone,
    images: ImageSource,
    coders: Mapping[str, SparseCoder],
    *,
    point: str,
    tokens: str,
    head: Head | None,
    control_sample: Float[Tensor, "n d_in"] | None,
    limit: int | None = None,
    substitution: str = "trained-tokens",
    batch_size: int = 64,
    n_workers: int = 0,
    n_bootstrap: int = 1000,
    seed: int = 0,
    progress: Progress = SILENT,
) -> list[Row]:
    """A row per coder, each followed by its controls (none if `control_sample` is None).

    `control_sample`: raw training activations, never the evaluation images', on which PCA and the normalisations are
    fitted. `head=None` leaves the cross-entropies out. `limit` measures a seeded sample of the images.
    """
    if substitution not in SUBSTITUTIONS:
        raise ValueError(f"substitution must be one of {', '.join(SUBSTITUTIONS)}, got {substitution!r}.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}.")
    everyone: dict[str, SparseCoder] = dict(coders)
    control_of: dict[str, str | None] = dict.fromkeys(coders)
    at_most: dict[str, int | None] = dict.fromkeys(coders)
    shift = torch.zeros(next(iter(coders.values())).d_in)
    if control_sample is not None:
        control_sample = control_sample.to(next(iter(coders.values())).W_dec)
        shift = control_sample.double().mean(0)
        everyone = {}
        for name, coder in coders.items():
            everyone[name] = coder
            k = matched_l0(coder, control_sample)
            for control, built in controls(coder, control_sample, k=k).items():
                full_name = f"{name} / {control}"
                everyone[full_name], control_of[full_name], at_most[full_name] = built, name, k
    table = Table(
        backbone,
        everyone,
        at_most=at_most,
        point=point,
        tokens=tokens,
        head=head,
        substitution=substitution,
        shift=shift,
    )
    began = time.monotonic()
    n_skipped = run_images(table, images, limit, batch_size, n_workers, seed, progress)
    about = {
        "point": point,
        "tokens": table.tokens,
        "backbone": backbone.name,
        "backbone_digest": backbone.digest,
        "images": images.spec,
        "images_fingerprint": images.fingerprint(),
        "n_images": table.n_images,
        "n_skipped": n_skipped,
        "head": None if head is None else {"kind": head.kind, "logit_scale": head.logit_scale},
        "seed": seed,
        "cost": {
            "seconds": round(time.monotonic() - began, 3),
            "rows_in_table": len(everyone),
            "peak_memory_mb": round(peak_memory_mb()),
        },
        "provenance": provenance(),
    }
    return [
        Row(
            name=name,
            architecture=measurement.coder.name,
            control_of=control_of[name],
            measured=finish(table, measurement, substitution, n_bootstrap, seed),
            about={
                "d_in": measurement.coder.d_in,
                "d_sae": measurement.coder.d_sae,
                "config": measurement.coder.config,
                "coder_digest": tensors_digest(measurement.coder.state_dict()),
                **about,
            },
        )
        for name, measurement in table.measurements.items()
    ]


@torch.inference_mode()
def matched_l0(coder: SparseCoder, sample: Float[Tensor, "n d_in"]) -> int:
    """The whole number of latents per row that a control may spend: the coder's mean L0 on the sample, rounded up."""
    return max(1, math.ceil(float(coder.encode_sparse(sample).l0().double().mean())))


def run_images(
    table: Table,
    images: ImageSource,
    limit: int | None,
    batch_size: int,
    n_workers: int,
    seed: int,
    progress: Progress,
) -> int:
    """Feed the images through; how many could not be read. Raises ValueError if there are no usable labels."""
    positions = list(range(len(images)))
    if limit is not None and limit < len(positions):
        positions = sorted(np.random.default_rng(seed).permutation(len(positions))[:limit].tolist())
    device = next(table.backbone.parameters()).device
    n_skipped = 0
    batches = load_batches(images, positions, table.backbone.preprocess, batch_size=batch_size, n_workers=n_workers)
    with closing(batches), progress.task("eval", len(positions), "images") as task, torch.inference_mode():
        for batch in batches:
            n_skipped += len(batch.skipped)
            if batch.positions:
                labels = None if table.head is None else labels_of(images, batch.positions, table.head)
                table.update(batch.images.to(device), labels)
            task.advance(len(batch.positions) + len(batch.skipped))
    if table.n_images == 0:
        raise ValueError(f"none of the {len(positions)} images of {images.spec} could be read.")
    return n_skipped


def labels_of(images: ImageSource, positions: list[int], head: Head) -> Int[Tensor, " b"]:
    labels = [images.record(position).label for position in positions]
    for position, label in zip(positions, labels, strict=True):
        if label is None:
            raise ValueError(
                f"image {images.record(position).id} has no label, which cross-entropy needs. Use --head none."
            )
        if not 0 <= label < head.n_classes:
            raise ValueError(
                f"image {images.record(position).id} has label {label}, but the head has {head.n_classes} classes "
                f"(0..{head.n_classes - 1})."
            )
    return torch.tensor(labels, dtype=torch.long)


def finish(
    table: Table, measurement: Measurement, substitution: str, n_bootstrap: int, seed: int
) -> dict[str, Measured]:
    measured = measurement.reconstruction.compute(n_bootstrap=n_bootstrap, seed=seed)
    measured |= measurement.sparsity.compute(n_bootstrap=n_bootstrap, seed=seed)
    measured |= substitution_metrics(
        table.clean,
        table.zeroed,
        measurement.substituted,
        definition=substitution,
        n_bootstrap=n_bootstrap,
        seed=seed,
    )
    return measured
