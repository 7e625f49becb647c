"""What a training run is asked to do, and the check that a resumed run is asked the same."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vitrail.training.revive import REVIVERS
from vitrail.training.schedule import SCHEDULES
from vitrail.training.watch import SINKS

COMPUTE_DTYPES = ("float32", "bfloat16")
# How a run is looked after, which changes no bit of what comes out of it: another value may continue it.
FREE_TO_CHANGE = ("checkpoint_every", "watch")


@dataclass(frozen=True)
class TrainConfig:
    """One row is one token's activation. How many rows make a batch is the source's affair."""

    n_rows: int | None = None
    """rows to train on; None: `epochs` times the source's rows"""
    epochs: float = 1.0
    """passes over the source, when n_rows is None"""
    lr: float = 5e-4
    """Adam's learning rate, the schedule's highest"""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's"""
    eps: float = 1e-8
    """Adam's"""
    warmup_steps: int = 200
    """steps over which the rate rises from 0; at most a tenth of the run"""
    schedule: str = "cosine"
    """constant, linear (falls over the last fifth) or cosine"""
    min_lr_share: float = 0.0
    """share of lr that the schedule falls to"""
    penalty_warmup_steps: int = 0
    """steps over which terms that buy sparsity (L1 and its like) rise from 0 to their weight"""
    grad_clip: float | None = 1.0
    """largest norm of the gradient; None: no limit"""
    accumulate: int = 1
    """micro-batches that a batch is cut into; for BatchTopK each is a batch"""
    compute_dtype: str = "float32"
    """of the product that finds the latents, and of every dense one where many fire: float32 or bfloat16; weights and
    gradients stay in their own"""
    average_decay: float | None = None
    """decay per step of the weights' running average, which is then what is saved; None: the last weights are"""
    revive: str = "auxk"
    """what is done about dead latents: none, auxk, ghost or resample"""
    dead_window_rows: int = 200_000
    """a latent is dead that has not fired for this many rows"""
    resample_every: int = 25_000
    """steps between resamplings of the dead, with revive resample"""
    stop_when_l0_below: float | None = None
    """give up when L0 is below this (and explained variance below its own threshold, if both are set)"""
    stop_when_explained_variance_below: float | None = None
    """give up when the batch's explained variance is below this (and L0 too, if both are set)"""
    stop_from_share: float = 0.1
    """share of the run before which nothing is given up"""
    calibration_rows: int = 16_384
    """rows on which inference thresholds are estimated, when no held-out rows are given"""
    checkpoint_every: int = 500
    """steps between checkpoints"""
    log_every: int = 50
    """steps between lines of log.jsonl"""
    seed: int = 0
    """of the draws made in training (resample); the coder's starting weights and the source's order have their own"""
    watch: tuple[str, ...] = ()
    """where to show the log besides its file: tensorboard, wandb, trackio"""

    def __post_init__(self) -> None:
        for name, table in (("schedule", SCHEDULES), ("revive", REVIVERS)):
            if getattr(self, name) not in table:
                raise ValueError(f"{name} must be one of {', '.join(table)}, got {getattr(self, name)!r}.")
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise ValueError(f"compute_dtype must be one of {', '.join(COMPUTE_DTYPES)}, got {self.compute_dtype!r}.")
        for name in self.watch:
            if name not in SINKS:
                raise ValueError(f"watch knows {', '.join(SINKS)}, got {name!r}.")
        positive = ("n_rows", "epochs", "lr", "eps", "grad_clip")
        counts = ("dead_window_rows", "calibration_rows", "checkpoint_every", "log_every", "accumulate")
        counts += ("resample_every",)
        for name in positive + counts:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}.")
        for name in ("warmup_steps", "penalty_warmup_steps", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        for name in ("min_lr_share", "stop_from_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in 0..1, got {getattr(self, name)}.")
        if self.average_decay is not None and not 0 < self.average_decay < 1:
            raise ValueError(f"average_decay must be between 0 and 1, or None for none, got {self.average_decay}.")

    @property
    def selection_dtype(self) -> torch.dtype | None:
        """For the coder: None is the weights' own."""
        return None if self.compute_dtype == "float32" else getattr(torch, self.compute_dtype)

    def total_rows(self, rows_per_epoch: int | None) -> int:
        if self.n_rows is not None:
            return self.n_rows
        if rows_per_epoch is None:
            raise ValueError("this source does not know how many rows it has, so `epochs` means nothing. Set n_rows.")
        return max(1, round(self.epochs * rows_per_epoch))


def check_same_request(before: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    """Raise, naming every field that differs, if `out` holds a run that was asked something else."""
    was, wanted = _flat(_shaping(before)), _flat(_shaping(now))
    differing = [name for name in sorted({*was, *wanted}) if was.get(name) != wanted.get(name)]
    if differing:
        lines = "; ".join(f"{name} was {was.get(name)!r}, now {wanted.get(name)!r}" for name in differing)
        raise ValueError(
            f"{out} holds another training run: {lines}. Ask for the same to continue it, or use a new folder."
        )


def _shaping(request: dict[str, Any]) -> dict[str, Any]:
    """What shapes the result. A request from before an option existed is one for its default."""
    config = {**json.loads(json.dumps(asdict(TrainConfig()))), **request["config"]}
    return {**request, "config": {name: value for name, value in config.items() if name not in FREE_TO_CHANGE}}


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        flat |= _flat(inner, f"{prefix}{name}.") if isinstance(inner, dict) else {f"{prefix}{name}": inner}
    return flat
