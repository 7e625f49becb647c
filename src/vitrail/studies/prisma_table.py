"""Prisma's table: how well a coder stands in for a hook point, every column of SPEC rows 39-47, beside its controls.

    SAE          at `point`
    transcoder   read at `point`, measured and put at `target_point`
    crosscoder   read at `points`, measured and put at all of them at once; then a row for each point alone
    {point: SAE} a set: a row for each at its own point; then all spliced in together, each reading what those before
                 it left of the run

All are measured on the same images in one pass: the clean and the zero-ablated model run once per batch, each row costs
one encode, one decode and the blocks after its first point. A set costs one more encode and decode of each. Controls
spend as many active latents per row as the coder they stand beside:

    random      unit directions drawn at random, one least-squares scale
    pca         the first k principal components of training activations: the best linear code of k numbers
    pca_all     the k largest of all principal coordinates, chosen row by row
    neurons     the k largest of the point's own coordinates
    kmeans      the k nearest of at most 512 centroids
    untrained   the same architecture and starting weights, its normalisation fitted

and, of the coder on a backbone that has learnt nothing (`random_backbone`),

    random backbone             the coder as it is, on the activations of the same model with random weights
    trained on random backbone  a coder of the same architecture, size, seed and steps, trained on those activations

Two rows of one pass are over the same images, so their difference has an interval of its own (`with_pairs`): of a coder
less each of its controls, and less each other coder at the same place.

Of several points, explained variance is over all their values side by side, in raw units: the point with the largest
activations rules it. The rows of single points say the rest.
"""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.backbones.base import Backbone
from vitrail.coders.base import SparseCoder
from vitrail.coders.crosscoder import MultiSource
from vitrail.coders.transcoder import Transcoder
from vitrail.files import tensors_digest
from vitrail.images.base import ImageSource
from vitrail.images.loader import load_batches
from vitrail.metrics.heads import Head
from vitrail.metrics.measured import Measured, all_paired
from vitrail.metrics.passing import Curve, finite
from vitrail.metrics.places import Place, place_of
from vitrail.metrics.substitution import RAW_NAMES, substitution_metrics
from vitrail.progress import SILENT, Progress
from vitrail.provenance import peak_memory_mb, provenance
from vitrail.studies.prisma_controls import RandomWeights, controls_of
from vitrail.studies.prisma_pass import Contender, MetricFactory, Sums, Table, Together
from vitrail.studies.random_training import RandomCoders

SUBSTITUTIONS = ("trained-tokens", "all-tokens")
Coders = Mapping[str, SparseCoder | Mapping[str, SparseCoder]]
Sample = Float[Tensor, "n d_row"] | Mapping[str, Tensor] | None


@dataclass(frozen=True)
class Row:
    """One line of the table. `control_of` names the coder a control stands beside, None for a coder.

    `paired`: of a coder, by the names of its controls and of the other coders at its place, its numbers less theirs.
    """

    name: str
    architecture: str
    control_of: str | None
    measured: dict[str, Measured]
    about: dict[str, Any]  # point, tokens, digests, sizes, cost, provenance
    curves: dict[str, Curve] = field(default_factory=dict)
    paired: dict[str, dict[str, Measured]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "architecture": self.architecture,
            "control_of": self.control_of,
            "measured": {name: value.to_json() for name, value in self.measured.items()},
            **self.about,
            **({"curves": finite(self.curves)} if self.curves else {}),
            **({"paired": pairs_to_json(self.paired)} if self.paired else {}),
        }


def pairs_to_json(pairs: Mapping[str, Mapping[str, Measured]]) -> dict[str, dict[str, Any]]:
    """Without definitions: they are those of the rows' own numbers."""
    kept = ("value", "low", "high", "n")
    return {
        other: {name: {key: one.to_json()[key] for key in kept} for name, one in differences.items()}
        for other, differences in pairs.items()
    }


def prisma_table(
    backbone: Backbone,
    images: ImageSource,
    coders: Coders,
    *,
    point: str,
    target_point: str | None = None,
    points: Sequence[str] = (),
    tokens: str,
    head: Head | None,
    control_sample: Sample,
    metrics: Sequence[MetricFactory] = (),
    random_backbone: str | RandomCoders | None = None,
    limit: int | None = None,
    substitution: str = "trained-tokens",
    batch_size: int = 64,
    n_workers: int = 0,
    n_bootstrap: int = 1000,
    seed: int = 0,
    progress: Progress = SILENT,
) -> list[Row]:
    """A row per coder, each followed by its controls (none if `control_sample` is None).

    `coders`: SAEs, transcoders (to `target_point`) and crosscoders (of `points`) by name; a set of SAEs is a mapping
    from points to them. `control_sample`: raw training rows as the coders' `fit` takes them, never the evaluation
    images', on which PCA and the normalisations are fitted; for a set, and where coders are of several kinds, a mapping
    from points to rows that are aligned. `head=None` leaves the cross-entropies out. `limit` measures a seeded sample
    of the images. `metrics`: what is measured beside reconstruction, latents and substitution in the same pass; the
    rows of sets and of single points of a crosscoder have only these three.

    `random_backbone="encode"` adds, for each coder, the same coder on the activations of the same model with random
    weights (`RandomWeights`): how much of its numbers comes from any activations of these widths. The coders of
    `train_on_random` add those, and also themselves: coders that were trained on such activations, by the names of the
    coders they stand beside (of a set, "NAME @ POINT"), and of the same `seed`.
    """
    if substitution not in SUBSTITUTIONS:
        raise ValueError(f"substitution must be one of {', '.join(SUBSTITUTIONS)}, got {substitution!r}.")
    if not isinstance(random_backbone, RandomCoders) and random_backbone not in (None, "encode"):
        raise ValueError(f"random_backbone must be 'encode', RandomCoders or None, got {random_backbone!r}.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}.")
    positions = list(range(len(images)))
    if limit is not None and limit < len(positions):
        positions = sorted(np.random.default_rng(seed).permutation(len(positions))[:limit].tolist())
    where = {"point": point, "target_point": target_point, "points": points}
    contenders, fit_seconds = contenders_of(coders, where, control_sample)
    options = {"tokens": tokens, "head": head, "substitution": substitution, "n_images": len(positions), "seed": seed}
    table = Table(backbone, contenders, metrics=metrics, **options)
    digest = backbone.digest  # before the weights change places
    tables: list[tuple[Table, RandomWeights | None]] = [(table, None)]
    if random_backbone is not None:
        again = on_random_backbone(contenders, random_backbone, seed)
        random_weights = RandomWeights.of(backbone, seed=seed)
        tables.append((Table(backbone, again, metrics=metrics, **options), random_weights))
    began = time.monotonic()
    n_skipped = run_images(tables, images, positions, batch_size, n_workers, progress)
    about = {
        "tokens": table.tokens,
        "backbone": backbone.name,
        "backbone_digest": digest,
        "images": images.spec,
        "images_fingerprint": images.fingerprint(),
        "n_images": table.n_images,
        "n_skipped": n_skipped,
        "head": None if head is None else {"kind": head.kind, "logit_scale": head.logit_scale},
        "seed": seed,
        "cost": {
            "seconds": round(time.monotonic() - began, 3),
            "rows_in_table": sum(len(one.measurements) + len(one.sets) for one, _ in tables),
            "peak_memory_mb": round(peak_memory_mb()),
            **({"control_fit_seconds": fit_seconds} if fit_seconds else {}),
        },
        "provenance": provenance(),
    }
    rows = [
        row
        for one, weights in tables
        for row in rows_of(
            one,
            about if weights is None else {**about, "random_backbone": weights.to_json()},
            n_bootstrap=n_bootstrap,
            seed=seed,
        )
    ]
    return with_pairs(in_order(rows, list(coders)))


def with_pairs(rows: Sequence[Row]) -> list[Row]:
    """Each coder's row with its numbers less those of its controls, and of the other coders of its place and tokens.

    The rows are over the same images in the same order: of one pass, or of several with the same images and seed.
    """
    return [
        replace(row, paired={other.name: all_paired(row.measured, other.measured) for other in beside(row, rows)})
        for row in rows
    ]


def beside(row: Row, rows: Sequence[Row]) -> list[Row]:
    """The rows that a coder is compared with; of a control, none."""
    if row.control_of is not None:
        return []
    coders = [one for one in rows if one.control_of is None and one is not row and _written(one) == _written(row)]
    return [*(one for one in rows if one.control_of == row.name), *coders]


def _written(row: Row) -> tuple[Any, ...]:
    """Where a row was measured: two rows' errors are of the same values only if this is the same."""
    point = row.about.get("target_point") or row.about.get("points") or row.about["point"]
    return str(point), row.about["tokens"], row.about["n_images"]


def contenders_of(
    coders: Coders, where: Mapping[str, Any], control_sample: Sample
) -> tuple[dict[str, Contender], dict[str, dict[str, float]]]:
    """Every coder with its controls after it, and the seconds that fitting these took."""
    found: dict[str, Contender] = {}
    seconds: dict[str, dict[str, float]] = {}
    for name, given in coders.items():
        if isinstance(given, SparseCoder):
            alone = {name: (given, place_of(given, name=name, **where))}
        else:
            if any(isinstance(coder, Transcoder | MultiSource) for coder in given.values()):
                raise ValueError(f"{name} is a set of coders to be put in together: SAEs, each at its own point.")
            alone = {f"{name} @ {at}": (coder, place_of(coder, point=at, name=name)) for at, coder in given.items()}
            if len(alone) < 2:
                raise ValueError(f"{name} is a set of {len(alone)} coders; give two points or more.")
        told: dict[str, Any] = {"given_as": name, "in_set": not isinstance(given, SparseCoder)}
        for of, (coder, place) in alone.items():
            sample = sample_of(coder, place, control_sample)
            if sample is None:
                found[of] = Contender(coder, place, **told)
                continue
            told["shift"] = sample.double().mean(0)[-coder.d_out :]
            found[of] = Contender(coder, place, **told)
            k = matched_l0(coder, sample[:, : coder.d_in])
            built, seconds[of] = controls_of(coder, sample, k=k)
            for control, beside in built.items():
                found[f"{of} / {control}"] = Contender(beside, place, control_of=of, at_most=k, control=control, **told)
    return found, seconds


def on_random_backbone(
    contenders: Mapping[str, Contender], wanted: str | RandomCoders, seed: int
) -> dict[str, Contender]:
    """The coders themselves, and those that were trained on activations of the random backbone."""
    found: dict[str, Contender] = {}
    for name, one in contenders.items():
        if one.control_of is not None:
            continue
        likes = {"random backbone": one.coder}
        if isinstance(wanted, RandomCoders):
            if name not in wanted or wanted.seed != seed:
                raise ValueError(
                    f"a coder trained on the random backbone of seed {seed} is needed for {name}; there are "
                    f"{', '.join(wanted) or 'none'}, of seed {wanted.seed}."
                )
            likes["trained on random backbone"] = wanted.coders[name]
        for control, coder in likes.items():
            found[f"{name} / {control}"] = replace(one, coder=coder, control_of=name, control=control)
    return found


def sample_of(coder: SparseCoder, place: Place, sample: Sample) -> Float[Tensor, "n d_row"] | None:
    """The rows of `sample` as this coder's `fit` takes them."""
    if sample is None:
        return None
    if not isinstance(sample, Tensor):
        points = place.reads if place.reads == place.writes else (*place.reads, *place.writes)
        if missing := [point for point in points if point not in sample]:
            raise ValueError(f"control_sample has no rows of {missing[0]}; it has those of {', '.join(sample)}.")
        sample = torch.cat([sample[point] for point in points], 1)
    if sample.shape[1] != coder.d_row:
        raise ValueError(
            f"control_sample has rows of {sample.shape[1]} values; a {coder.name} coder of {', '.join(place.reads)} "
            f"needs {coder.d_row}. Where coders differ, give a mapping from points to aligned rows."
        )
    return sample.to(coder.W_dec)


@torch.inference_mode()
def matched_l0(coder: SparseCoder, sample: Float[Tensor, "n d_in"]) -> int:
    """The whole number of latents per row that a control may spend: the coder's mean L0 on the sample, rounded up."""
    return max(1, math.ceil(float(coder.encode_sparse(sample).l0().double().mean())))


def run_images(
    tables: Sequence[tuple[Table, RandomWeights | None]],
    images: ImageSource,
    positions: Sequence[int],
    batch_size: int,
    n_workers: int,
    progress: Progress,
) -> int:
    """Feed the images through; how many could not be read. Raises ValueError if there are no usable labels."""
    table = tables[0][0]
    device = next(table.backbone.parameters()).device
    n_skipped = 0
    batches = load_batches(images, positions, table.backbone.preprocess, batch_size=batch_size, n_workers=n_workers)
    with closing(batches), progress.task("eval", len(positions), "images") as task, torch.inference_mode():
        for batch in batches:
            n_skipped += len(batch.skipped)
            if batch.positions:
                labels = None if table.head is None else labels_of(images, batch.positions, table.head)
                pixels = batch.images.to(device)
                for one, weights in tables:
                    with ExitStack() as stack:
                        if weights is not None:
                            stack.enter_context(weights.within(one.backbone))
                        one.update(pixels, labels, batch.positions)
            task.advance(len(batch.positions) + len(batch.skipped))
    if table.n_images == 0:
        raise ValueError(f"none of the {len(positions)} images of {images.spec} could be read.")
    return n_skipped


def labels_of(images: ImageSource, positions: Sequence[int], head: Head) -> Int[Tensor, " b"]:
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


def rows_of(table: Table, about: dict[str, Any], *, n_bootstrap: int, seed: int) -> list[tuple[str, Row]]:
    """Each with the name under which its coder was given."""
    rows: list[tuple[str, Row]] = []

    def finish(
        name: str,
        contender: Contender,
        control_of: str | None,
        sums: Sums,
        of: dict[str, Any],
        also: dict[str, Measured],
    ) -> dict[str, Measured]:
        """`also`: numbers of the whole coder, for a row of one of its points."""
        measured, curves = sums.compute(n_bootstrap=n_bootstrap, seed=seed)
        measured |= also
        measured |= substitution_metrics(
            table.clean,
            table.zeroed[sums.place.writes],
            sums.substituted,
            definition=sums.definition,
            unscaled_definition=prisma_definition(table, sums),
            n_bootstrap=n_bootstrap,
            seed=seed,
        )
        cost = {**about["cost"], "metrics": {key: round(value, 4) for key, value in sums.seconds.items()}}
        told = {key: value for key, value in of.items() if key != "architecture"}
        told |= {**sums.place.to_json(), **about, "cost": cost}
        rows.append((contender.given_as, Row(name, of["architecture"], control_of, measured, told, curves)))
        return measured

    for name, measurement in table.measurements.items():
        of, contender = about_coder(measurement.coder), table.contenders[name]
        measured = finish(name, contender, contender.control_of, measurement.sums, of, {})
        latents = {key: value for key, value in measured.items() if key.startswith("l0_") or key == "alive"}
        for point, (_, sums) in measurement.parts.items():
            beside = contender.control_of and f"{contender.control_of} @ {point}"
            at_point = f"{name} @ {point}" if beside is None else f"{beside} / {contender.control}"
            finish(at_point, contender, beside, sums, of, latents)
    for name, together in table.sets.items():
        beside = None if together.first.control is None else together.first.given_as
        finish(name, together.first, beside, together.sums, about_set(together), {})
    return rows


def about_coder(coder: SparseCoder) -> dict[str, Any]:
    return {
        "architecture": coder.name,
        "d_in": coder.d_in,
        "d_sae": coder.d_sae,
        "config": coder.config,
        "coder_digest": tensors_digest(coder.state_dict()),
    }


def about_set(together: Together) -> dict[str, Any]:
    coders = {point: member.coder for point, member in together.members.items()}
    names = sorted({coder.name for coder in coders.values()})
    state = {f"{point}/{key}": value for point, coder in coders.items() for key, value in coder.state_dict().items()}
    return {
        "architecture": names[0] if len(names) == 1 else "several",
        "d_in": sum(coder.d_in for coder in coders.values()),
        "d_sae": sum(coder.d_sae for coder in coders.values()),
        "config": {point: coder.config for point, coder in coders.items()},
        "coder_digest": tensors_digest(state),
    }


def prisma_definition(table: Table, sums: Sums) -> str | None:
    """ "prisma" where the unscaled numbers are Prisma's: raw class names, one point, every token replaced."""
    every = table.put_tokens.kind == "all"
    raw = table.head is not None and table.head.kind == RAW_NAMES
    return "prisma" if every and raw and len(sums.place.writes) == 1 else None


def in_order(rows: Sequence[tuple[str, Row]], given: Sequence[str]) -> list[Row]:
    """As given, what stands for all points before single points, each coder followed by its controls."""
    found = []
    for name in given:
        own = [row for given_as, row in rows if given_as == name]
        coders = sorted((row for row in own if row.control_of is None), key=lambda row: row.name != name)
        found += [one for coder in coders for one in (coder, *(row for row in own if row.control_of == coder.name))]
    return found
