"""What a training run is asked to do, and the check that a resumed run is asked the same."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitrail.training.revive import REVIVERS
from vitrail.training.schedule import SCHEDULES


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
    grad_clip: float | None = 1.0
    """largest norm of the gradient; None: no limit"""
    revive: str = "auxk"
    """what is done about dead latents: auxk or none"""
    dead_window_rows: int = 200_000
    """a latent is dead that has not fired for this many rows"""
    calibration_rows: int = 16_384
    """rows on which inference thresholds are estimated, when no held-out rows are given"""
    checkpoint_every: int = 500
    """steps between checkpoints"""
    log_every: int = 50
    """steps between lines of log.jsonl"""
    seed: int = 0
    """of whatever is random in training; the coder's starting weights have their own"""

    def __post_init__(self) -> None:
        for name, table in (("schedule", SCHEDULES), ("revive", REVIVERS)):
            if getattr(self, name) not in table:
                raise ValueError(f"{name} must be one of {', '.join(table)}, got {getattr(self, name)!r}.")
        positive = ("n_rows", "epochs", "lr", "eps", "grad_clip")
        counts = ("dead_window_rows", "calibration_rows", "checkpoint_every", "log_every")
        for name in positive + counts:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}.")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {self.warmup_steps}.")

    def total_rows(self, rows_per_epoch: int | None) -> int:
        if self.n_rows is not None:
            return self.n_rows
        if rows_per_epoch is None:
            raise ValueError("this source does not know how many rows it has, so `epochs` means nothing. Set n_rows.")
        return max(1, round(self.epochs * rows_per_epoch))


def check_same_request(before: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    """Raise, naming every field that differs, if `out` holds a run that was asked something else."""
    was, wanted = _flat(before), _flat(now)
    differing = [name for name in sorted({*was, *wanted}) if was.get(name) != wanted.get(name)]
    if differing:
        lines = "; ".join(f"{name} was {was.get(name)!r}, now {wanted.get(name)!r}" for name in differing)
        raise ValueError(
            f"{out} holds another training run: {lines}. Ask for the same to continue it, or use a new folder."
        )


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        flat |= _flat(inner, f"{prefix}{name}.") if isinstance(inner, dict) else {f"{prefix}{name}": inner}
    return flat
