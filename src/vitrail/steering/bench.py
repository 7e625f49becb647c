"""What a run of steering needs, made once: images at the point, the families of coordinates, the words."""

import warnings
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitrail.backbones.base import Backbone
from vitrail.coders.base import SparseCoder
from vitrail.concepts.vocabulary import Vocabulary
from vitrail.files import json_digest, tensors_digest
from vitrail.images.base import ImageSource
from vitrail.images.loader import load_batches
from vitrail.metrics.heads import ZeroShotHead
from vitrail.progress import SILENT, Progress
from vitrail.steering.interventions import (
    Basis,
    Dose,
    Latents,
    Neurons,
    Own,
    Reading,
    marked_tokens,
    random_directions,
)
from vitrail.steering.routes import Route, Seen, choose_route, look
from vitrail.steering.steerability import BETA, GAMMA, Tally, word_distances
from vitrail.store.tokens import stored_kind

AGAINST = ("neurons", "random")
AT_ONCE = 128  # coordinates whose directions go through the projection together
REFERENCE = 1024  # latents whose edits say how long an edit of equal length is


@dataclass(frozen=True, kw_only=True)
class SteerOptions:
    """`where` None: the tokens that the coder reads. `own`: a latent's own scale, of doses in it. `n_random` None: as
    many as there are neurons. `logit_scale` None: the text tower's, or 100 where there is none."""

    dose: Dose = field(default_factory=lambda: Dose("set", 150.0))
    where: str | None = None
    keep_error: bool = True
    own: Own = "max"
    against: tuple[str, ...] = ()
    against_dose: Literal["equal", "same"] = "equal"
    n_random: int | None = None
    logit_scale: float | None = None
    gamma: float = GAMMA
    beta: float = BETA
    n_curves: int = 6
    n_strengths: int = 24
    route: str = "auto"
    shard: int = 2048
    batch_size: int = 32
    n_bootstrap: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [name for name in self.against if name not in AGAINST]
        if unknown:
            raise ValueError(f"latents can be set against {' and '.join(AGAINST)}, not {unknown[0]!r}.")
        if self.against_dose not in ("equal", "same"):
            raise ValueError(f"against_dose must be equal or same, got {self.against_dose!r}.")
        for name in ("shard", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


@dataclass(frozen=True, eq=False)
class Family:
    """Coordinates of one kind: how they are moved, and by which route the answer is found."""

    name: str
    basis: Basis
    reading: Reading
    route: Route
    dose: Dose
    own: Tensor | None = None
    per_row: Tensor | None = None

    def steps(self, which: Int[Tensor, " m"], dose: Dose | None = None) -> Float[Tensor, "r m"]:
        return self.reading.steps(which, dose or self.dose, own=self.own, per_row=self.per_row)

    def directions(self, which: Int[Tensor, " m"]) -> Float[Tensor, "m d"]:
        return self.basis.directions(which).float()

    def tally(self, which: Int[Tensor, " m"], dose: Dose | None = None) -> Tally:
        tally = Tally(len(which), self.route.seen.probabilities)
        for coordinates, images, after in self.route.probabilities(self.directions(which), self.steps(which, dose)):
            tally.add(coordinates, images, after)
        return tally

    @property
    def has_limit(self) -> bool:
        """Whether more of the dose is a longer step in the same direction."""
        return self.dose.operation in ("set", "add") and self.dose.value > 0


@dataclass(frozen=True, eq=False)
class Bench:
    seen: Seen
    families: dict[str, Family]
    vocabulary: Vocabulary
    head: ZeroShotHead
    skipped: tuple[str, ...]
    settings: dict[str, Any]

    def before(self) -> dict[str, float]:
        """How peaked the answers are before, and s of an answer that is merely made flat: the part of s to discount."""
        p = self.seen.probabilities.double()
        ipr = float(p.square().sum(1).mean())
        return {"mean_largest": float(p.amax(1).mean()), "mean_ipr": ipr, "s_of_flattening": ipr - 1 / p.shape[1]}

    def replacing_alone(self) -> float:
        """s of the latents' route where no latent is changed: what leaving out the error does by itself; else 0."""
        route = self.families["latents"].route
        tally = Tally(1, self.seen.probabilities)
        rows = route.rows()
        for coordinates, images, after in route.probabilities(
            rows.new_zeros(1, rows.shape[1]).float(), rows.new_zeros(len(rows), 1).float()
        ):
            tally.add(coordinates, images, after)
        return float(tally.result(word_distances(self.head.classes)).s[0])


def prepare(
    backbone: Backbone,
    coder: SparseCoder,
    images: ImageSource,
    *,
    point: str,
    tokens: str,
    vocabulary: Vocabulary,
    chosen: Int[np.ndarray, " m"],
    options: SteerOptions,
    n_workers: int = 0,
    progress: Progress = SILENT,
) -> Bench:
    """Raises ValueError for a coder of another width than the point, or tokens, words or a route that do not fit."""
    known, device = backbone.point(point), next(backbone.parameters()).device
    if coder.d_in != known.width:
        raise ValueError(f"coder takes d_in={coder.d_in}, {point} of {backbone.name} is {known.width} wide.")
    where = (options.where or tokens) if known.has_tokens else "all"
    if known.has_tokens and where == "pooled":
        raise ValueError(f"a coder of {stored_kind(tokens, has_tokens=True)} rows has no tokens to steer: pass where.")
    marks = marked_tokens(backbone, point, where) if known.has_tokens else None
    latents = Latents(coder)
    latents.checked(torch.from_numpy(chosen))
    scale = options.logit_scale
    if scale is None:
        scale = 100.0 if backbone.text is None else backbone.text.logit_scale
    head = ZeroShotHead(vocabulary.embeddings.to(device), scale)
    batches, skipped = _read(images, backbone, options.batch_size, n_workers, progress)
    seen = look(backbone, batches, point, head)
    used = None if marks is None else marks.to(device).expand(seen.x.shape[:2])
    edited = seen.x if used is None else seen.x[used]
    base = None
    if not options.keep_error:
        x_hat = coder.decode_sparse(coder.encode_sparse(edited)).to(seen.x.dtype)
        base = x_hat if used is None else seen.x.clone().index_put_((used,), x_hat)
    route = choose_route(backbone, point, head, seen, marks, base=base, route=options.route)
    if route.used is not None and not bool(route.used.any()):
        warnings.warn(f"no edited token ({where}) of {point} reaches the answer: nothing will move.", stacklevel=3)
    # Own scales are of every edited token, whichever of them matter to the route.
    own = latents.own(edited, options.own) if options.dose.unit == "own" else None
    rows = route.rows().float()
    families = {"latents": Family("latents", latents, latents.read(rows), route, options.dose, own)}
    if options.against:
        per_row = _reference(families["latents"], chosen, options.seed)
        dose = Dose("add", 1.0, "norm") if options.against_dose == "equal" else options.dose
        plain = route if base is None else choose_route(backbone, point, head, seen, marks, route=options.route)
        for name in dict.fromkeys(options.against):
            n, seed = options.n_random or coder.d_in, options.seed
            basis = Neurons(coder.d_in, device=device)
            if name == "random":
                basis = random_directions(n, coder.d_in, seed=seed, device=device)
            scales = basis.own(edited, options.own) if dose.unit == "own" else None
            at_equal = per_row if dose.unit == "norm" and options.against_dose == "equal" else None
            families[name] = Family(name, basis, basis.read(rows), plain, dose, scales, at_equal)
    settings = {
        "backbone": backbone.name,
        "backbone_digest": backbone.digest,
        "coder_digest": tensors_digest(coder.state_dict()),
        "point": point,
        "where": where,
        "images": images.spec,
        "images_digest": json_digest([images.record(i).id for i in range(len(images))]),
        "words": {
            "source": vocabulary.source,
            "n": len(vocabulary.words),
            "digest": vocabulary.digest,
            "templates": list(vocabulary.templates),
        },
        "logit_scale": scale,
        "latents": {"n": len(chosen), "n_all": coder.d_sae, "digest": json_digest(chosen.tolist())},
        **{name: getattr(options, name) for name in ("keep_error", "own", "against_dose", "n_random", "shard", "seed")},
        "dose": asdict(options.dose),
        "route": route.name,
    }
    return Bench(seen, families, vocabulary, head, tuple(skipped), settings)


def _read(
    images: ImageSource, backbone: Backbone, batch_size: int, n_workers: int, progress: Progress
) -> tuple[list[Tensor], list[str]]:
    batches, skipped = [], []
    loaded = load_batches(images, range(len(images)), backbone.preprocess, batch_size=batch_size, n_workers=n_workers)
    with closing(loaded), progress.task("images", len(images), "images") as task:
        for batch in loaded:
            if batch.positions:
                batches.append(batch.images)
            skipped += [f"{images.record(i).id}: {reason}" for i, reason in batch.skipped]
            task.advance(len(batch.positions) + len(batch.skipped))
    if skipped:
        warnings.warn(f"{len(skipped)} images cannot be read and are left out: {skipped[0]}", stacklevel=4)
    return batches, skipped


def _reference(family: Family, chosen: Int[np.ndarray, " m"], seed: int) -> Float[Tensor, "r 1"]:
    """Each row's mean length of an edit, over the latents that are steered, or REFERENCE of them."""
    if len(chosen) > REFERENCE:
        chosen = np.random.default_rng(seed).choice(chosen, REFERENCE, replace=False)
    total = torch.zeros(len(family.route.rows()), device=family.basis.device)
    for at in chunks(chosen, AT_ONCE):
        which = torch.from_numpy(at).to(family.basis.device)
        total += family.steps(which).abs() @ torch.linalg.vector_norm(family.directions(which), dim=1)
    return (total / len(chosen))[:, None]


def chunks(numbers: Int[np.ndarray, " m"], size: int) -> Sequence[Int[np.ndarray, " k"]]:
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]
