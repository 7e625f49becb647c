"""Decoder directions that are mixtures of data: a constraint for any architecture (archetypal.py).

    V = softmax(mixing) @ C + relaxation,   ||relaxation_i|| <= delta,   W_dec_i = V_i / ||V_i||

C (n_candidates, d_in): points of the data, y - b_dec, chosen once in `fit` and fixed. Where the normalisation does not
centre (none, layer_norm, row_norm) these nearly share one direction; then start b_dec at the "geometric_median".
Fel et al. 2025, Archetypal SAE, arXiv:2502.12892: directions pinned to the data come out alike from run to run.
delta = 0 is the archetypal SAE (A-SAE), delta > 0 the relaxed one (RA-SAE).

Where this differs. Rows of the mixing are softmaxes; the authors' library (Overcomplete 0.3) moves the weights
themselves and projects them back by a ReLU and a division. Adam moves each of n_candidates weights by about the
learning rate, so that one step at 1e-3 on 1,000 candidates puts up to half as much mass on strangers as the row has.
And directions have unit norm here, as every coder's: W_dec lies in the cone of the data, not in its hull, where the
library has one multiplier for all directions.

W_dec stays a parameter that everybody may read, sparse products, revival and metrics. It is not trained: its gradient
is passed on to `mixing` and `relaxation` the moment it arrives (a hook), and `constrain_weights`, which follows every
optimiser step, overwrites W_dec with what they say. One product with C each way, per step.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitrail.coders.base import SparseCoder
from vitrail.coders.select import Encoder, largest_of_rows
from vitrail.coders.sparse import decode
from vitrail.statistics import ActivationStats

CHOICES = ("kmeans", "subsample")
OWN_SHARE = 0.9  # of a mixture's weight, at the start, that its own candidate has


ROWS_FOR_SCALE = 1024


class Archetypal(SparseCoder):
    """To be mixed in before an architecture, whose constructor then calls `constrain_to_data`."""

    candidates: Tensor

    def constrain_to_data(self, *, n_candidates: int, candidates_from: str, delta: float) -> None:
        if n_candidates < 1:
            raise ValueError(f"n_candidates must be at least 1, got {n_candidates}.")
        if candidates_from not in CHOICES:
            raise ValueError(f"candidates_from must be one of {', '.join(CHOICES)}, got {candidates_from!r}.")
        if delta < 0:
            raise ValueError(f"delta must not be negative, got {delta}.")
        self.n_candidates, self.candidates_from, self.delta = n_candidates, candidates_from, delta
        self.mixing = nn.Parameter(initial_mixing(self.d_sae, n_candidates, seed=self.seed))
        self.relaxation = nn.Parameter(torch.zeros(self.d_sae, self.d_in)) if delta > 0 else None
        self.register_buffer("candidates", torch.zeros(n_candidates, self.d_in))
        self.fitted.fill_(False)  # until `fit` has found the candidates
        self._pass_gradients_on()

    @torch.no_grad()
    def fit(self, stats: ActivationStats, sample: Float[Tensor, "n d_in"]) -> None:
        """As everywhere; and the candidates, of which there must be no more than rows in the sample."""
        super().fit(stats, sample)
        y = self.normalized(sample) - self.b_dec
        if len(y) < self.n_candidates:
            raise ValueError(
                f"n_candidates={self.n_candidates} cannot be found among the {len(y)} rows of the sample. "
                f"Ask for fewer."
            )
        generator = torch.Generator().manual_seed(self.seed)
        if self.candidates_from == "kmeans":
            self.candidates.copy_(kmeans(y, self.n_candidates, generator=generator))
        else:
            self.candidates.copy_(y[torch.randperm(len(y), generator=generator)[: self.n_candidates].to(y.device)])
        self.constrain_weights()
        self.W_enc.copy_(self.W_dec.t())
        self._fit_encoder_scale(y[:ROWS_FOR_SCALE])

    def _fit_encoder_scale(self, y: Float[Tensor, "n d_in"]) -> None:
        """One least-squares factor on W_enc. Directions made of data lie close together: the k that fire say the same
        thing k times, and without it training starts at an error of a thousand times the variance."""
        encoder = Encoder(y, self.W_enc, self.b_enc)
        y_hat = decode(largest_of_rows(encoder, min(getattr(self, "k", self.d_sae), self.d_sae)), self.W_dec)
        energy = y_hat.square().sum()
        if energy > 0:
            self.W_enc.mul_(((y * y_hat).sum() / energy).clamp_min(1e-3))

    def mixtures(self) -> Float[Tensor, "d_sae d_in"]:
        """V, before it is given unit norm."""
        mixed = self.mixing.softmax(1) @ self.candidates
        return mixed if self.relaxation is None else mixed + self.relaxation

    @torch.no_grad()
    def constrain_weights(self) -> None:
        """The relaxation back into its ball, W_dec to what the mixtures are."""
        if self.relaxation is not None:
            norms = torch.linalg.vector_norm(self.relaxation, dim=1, keepdim=True)
            self.relaxation.mul_((self.delta / norms.clamp_min(1e-12)).clamp_max(1.0))
        self.W_dec.copy_(self.mixtures())
        super().constrain_weights()

    # -- gradients

    def _pass_gradients_on(self) -> None:
        if self.W_dec.requires_grad:
            self.W_dec.register_hook(self._pass_on)

    @torch.no_grad()
    def _pass_on(self, g: Tensor) -> None:
        """`g`: one backward pass's whole gradient at W_dec. Adds what it is at mixing and relaxation."""
        weights = self.mixing.softmax(1)
        mixed = weights @ self.candidates
        if self.relaxation is not None:
            mixed += self.relaxation
        norms = torch.linalg.vector_norm(mixed, dim=1, keepdim=True).clamp_min(torch.finfo(g.dtype).tiny)
        unit = mixed / norms
        at_mixtures = (g - unit * (g * unit).sum(1, keepdim=True)) / norms
        at_weights = at_mixtures @ self.candidates.t()
        _add_gradient(self.mixing, weights * (at_weights - (weights * at_weights).sum(1, keepdim=True)))
        if self.relaxation is not None:
            _add_gradient(self.relaxation, at_mixtures)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy's W_dec is a new tensor, which has not the hook."""
        super().__setstate__(state)
        self._pass_gradients_on()


def _add_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    if parameter.requires_grad:
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def initial_mixing(d_sae: int, n_candidates: int, *, seed: int) -> Float[Tensor, "d_sae n_candidates"]:
    """Each mixture mostly one candidate, all candidates in turn; from the second turn on, two in equal parts."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n_candidates, generator=generator)
    own = order[torch.arange(d_sae) % n_candidates]
    partner = torch.randint(n_candidates, (d_sae,), generator=generator)
    partner[:n_candidates] = own[:n_candidates]
    weights = torch.full((d_sae, n_candidates), (1 - OWN_SHARE) / n_candidates)
    for chosen in (own, partner):
        weights.scatter_add_(1, chosen[:, None], torch.full((d_sae, 1), OWN_SHARE / 2))
    return weights.log()


def kmeans(
    y: Float[Tensor, "n d_in"], n_centres: int, *, generator: torch.Generator, n_iterations: int = 20
) -> Float[Tensor, "n_centres d_in"]:
    """Lloyd's iteration from random rows. A centre that loses all its rows stays where it was, so every centre is a
    mean of rows or a row: in the hull of the data."""
    centres = y[torch.randperm(len(y), generator=generator)[:n_centres].to(y.device)].clone()
    for _ in range(n_iterations):
        nearest = _nearest(y, centres)
        counts = torch.bincount(nearest, minlength=n_centres)
        sums = torch.zeros_like(centres).index_add_(0, nearest, y)
        moved = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


def _nearest(y: Tensor, centres: Tensor) -> Int[Tensor, " n"]:
    half_norms = centres.square().sum(1) / 2
    return torch.cat([(rows @ centres.t() - half_norms).argmax(1) for rows in y.split(4096)])
