"""Edits of a point that take written words out of what the rest of a model reads, from weakest assumption to strongest.

    Removal      x - s sum_{j in F} z_j n_j        latents (or neurons) of F to 0, the error kept
      gate       only at patches where the latents of a second set G add up to more than a threshold
    Blank        at such patches x becomes the mean of clean pictures at that patch
    Correction   x + (x - mu) B at patches         B of rank r takes attacked patches to their clean twins

Removal is the paper's ("Steering CLIP's vision transformer with sparse autoencoders", section 7.2; SPEC rows 118 and
126). The others are ours: a gate spares pictures without text, Blank takes all that a patch holds, and Correction, a
reduced-rank ridge regression (Izenman 1975) on pairs of one picture with and without words, needs no coder at all: it
says how much a coder leaves on the table.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vitrail.backbones.base import Backbone
from vitrail.backbones.points import Point
from vitrail.coders.base import SparseCoder
from vitrail.concepts.editing import columns_of
from vitrail.steering.ablation import FeatureSet, Rows
from vitrail.steering.interventions import Latents, marked_tokens
from vitrail.steering.selection import Site


class Defence(ABC):
    """A function of a point's tokens (b, t, d). Rows that it leaves alone stay as they are, bit for bit."""

    name: str
    point: str

    @abstractmethod
    def __call__(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]: ...

    @abstractmethod
    def to_json(self) -> dict[str, Any]: ...

    def hook(self, value: Tensor, _point: Point) -> Tensor:
        """For `backbone.hooks({defence.point: defence.hook})`."""
        return self(value)


@dataclass(frozen=True, eq=False)
class Gate:
    """Marks patches where `features` add up to more than `threshold`, in units of z: where there is text."""

    coder: SparseCoder
    features: Int[np.ndarray, " g"]
    threshold: float
    n_special: int

    def score(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b p"]:
        patches = x[:, self.n_special :]
        codes = self.coder.encode_sparse(patches.flatten(0, 1))
        return columns_of(codes, torch.from_numpy(self.features)).sum(1).view(patches.shape[:2])

    def __call__(self, x: Float[Tensor, "b t d"]) -> Bool[Tensor, "b p"]:
        return self.score(x) > self.threshold

    def to_json(self) -> dict[str, Any]:
        return {"features": self.features.tolist(), "threshold": self.threshold}


class Removal(Defence):
    """`features` to 0 on the site's tokens; with `gate`, at the patches that it marks alone.

    Raises IndexError for a feature that is not there.
    """

    def __init__(
        self,
        backbone: Backbone,
        site: Site,
        features: Sequence[int] | Int[np.ndarray, " m"],
        *,
        gate: Gate | None = None,
        name: str = "",
    ) -> None:
        self.site, self.point, self.gate = site, site.point, gate
        self.features = np.unique(np.asarray(features, dtype=np.int64))
        self.name = name or f"{len(self.features)} {site.basis.kind}"
        self._set = FeatureSet(self.name, site, self.features)
        self._marks = marked_tokens(backbone, site.point, site.where)[0]

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        marks = self._marks.to(x.device).expand(x.shape[:2])
        if self.gate is not None:
            allowed = torch.zeros_like(marks)
            allowed[:, self.gate.n_special :] = self.gate(x)
            marks = marks & allowed
        touched, changed = Rows(self.site.basis, x[marks]).changed(self._set)
        places, value = marks.nonzero()[touched], x.clone()
        value[places[:, 0], places[:, 1]] = changed
        return value

    def to_json(self) -> dict[str, Any]:
        told: dict[str, Any] = {"operation": "remove", "point": self.point, "where": self.site.where}
        told |= {"of": self.site.basis.kind, "features": self.features.tolist()}
        return told | ({} if self.gate is None else {"gate": self.gate.to_json()})


class Blank(Defence):
    """`mean`: (p, d), what clean pictures have at each patch on average."""

    def __init__(self, point: str, gate: Gate, mean: Float[Tensor, "p d"], *, name: str = "blank") -> None:
        self.point, self.gate, self.mean, self.name = point, gate, mean, name

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        value, first = x.clone(), self.gate.n_special
        value[:, first:] = torch.where(self.gate(x)[..., None], self.mean.to(x), x[:, first:])
        return value

    def to_json(self) -> dict[str, Any]:
        return {"operation": "blank", "point": self.point, "where": "spatial", "gate": self.gate.to_json()}


class Correction(Defence):
    """x + (x - centre) @ matrix at the patches. `tensors`: for saving."""

    def __init__(
        self,
        point: str,
        centre: Float[Tensor, " d"],
        matrix: Float[Tensor, "d d"],
        n_special: int,
        *,
        rank: int,
        name: str = "",
    ) -> None:
        self.point, self.centre, self.matrix, self.n_special = point, centre, matrix, n_special
        self.rank, self.name = rank, name or f"correction of rank {rank}"

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        value, patches = x.clone(), x[:, self.n_special :]
        value[:, self.n_special :] = patches + ((patches - self.centre) @ self.matrix).to(x.dtype)
        return value

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"centre": self.centre, "matrix": self.matrix}

    def to_json(self) -> dict[str, Any]:
        return {"operation": "correct", "point": self.point, "where": "spatial", "rank": self.rank}


@torch.no_grad()
def fit_corrections(
    point: str,
    clean: Float[Tensor, "n t d"],
    attacked: Float[Tensor, "n t d"],
    n_special: int,
    *,
    ranks: Sequence[int] = (1, 8, 64),
    ridge: float = 1e-3,
    clean_weight: float = 1.0,
) -> list[Correction]:
    """Least squares over patches: attacked ones are asked to become their clean twins, clean ones to stay.

    `ridge`: share of the mean variance that is added to each. `clean_weight`: of the clean patches.
    Raises ValueError where the two are not the same pictures in the same order, by their shape.
    """
    if clean.shape != attacked.shape:
        raise ValueError(f"pairs of one picture are needed, got {tuple(clean.shape)} and {tuple(attacked.shape)}.")
    d = clean.shape[2]
    centre = (clean[:, n_special:].double().mean((0, 1)) + attacked[:, n_special:].double().mean((0, 1))) / 2
    gram, cross = torch.zeros(2, d, d, dtype=torch.float64)
    for one, other in zip(clean.split(64), attacked.split(64), strict=True):
        here = (other[:, n_special:].double() - centre).flatten(0, 1)
        there = (one[:, n_special:].double() - centre).flatten(0, 1)
        gram += here.T @ here + clean_weight * there.T @ there
        cross += here.T @ (there - here)
    full = torch.linalg.solve(gram + ridge * gram.trace() / d * torch.eye(d, dtype=torch.float64), cross)
    # Of all matrices of rank r, the one whose fit is nearest to the full one's: its output's first r directions.
    _, directions = torch.linalg.eigh(full.T @ gram @ full)
    found = []
    for rank in ranks:
        basis = directions[:, -min(rank, d) :]
        matrix = full @ basis @ basis.T
        found.append(Correction(point, centre.float(), matrix.float(), n_special, rank=min(rank, d)))
    return found


@torch.no_grad()
def fit_gate(
    coder: SparseCoder,
    clean: Float[Tensor, "n t d"],
    attacked: Float[Tensor, "n t d"],
    text: Bool[Tensor, "n p"],
    n_special: int,
    *,
    precision: float = 0.9,
    false_alarms: float = 0.01,
) -> Gate | None:
    """The latents whose firing means text, and the sum that only `false_alarms` of the clean patches exceed.

    Means text: fires in at least 0.3 % of the patches under text, and at equal numbers of both kinds of patches,
    `precision` of its firings would be there. `text`: the patches with text of `attacked`. None where no latent does.
    """
    rates = [_rate(coder, attacked[:, n_special:][text]), _rate(coder, clean[:, n_special:].flatten(0, 1))]
    share = rates[0] / (rates[0] + rates[1]).clamp_min(1e-9)
    features = np.flatnonzero(((share >= precision) & (rates[0] >= 0.003)).numpy())
    if len(features) == 0:
        return None
    gate = Gate(coder, features, 0.0, n_special)
    scores = torch.cat([gate.score(part).flatten() for part in clean.split(16)])
    place = min(len(scores) - 1, int((1 - false_alarms) * len(scores)))
    return Gate(coder, features, float(scores.sort().values[place]), n_special)


def _rate(coder: SparseCoder, rows: Float[Tensor, "n d"]) -> Float[Tensor, " d_sae"]:
    fired = sum(coder.encode_sparse(part).fired().float() for part in rows.split(4096))
    assert isinstance(fired, Tensor)
    return fired / len(rows)


def is_of_latents(defence: Defence) -> bool:
    return isinstance(defence, Removal) and isinstance(defence.site.basis, Latents)
