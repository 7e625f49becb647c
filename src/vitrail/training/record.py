"""What a line of the log says. Nothing in it depends on the clock: a resumed run writes the same lines.

step, rows        so far
loss, terms       as trained: weighted, penalties as far as they are warmed up; the terms sum to the loss
l0, fvu           of this batch; fvu about the batch's mean, null where the batch has no spread
dead, dead_share  latents that did not fire for the window, and their share of all
revived           latents resampled since the last line
density           since the last line: {"never": latents that did not fire, "counts": the others by log10 of the
                  share of rows in which they fired, in DENSITY_BINS bins from 10^-5 (or less) to 1}
lr, grad_norm     of this step; the norm before clipping
"""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from vitrail.coders.base import SparseCoder, Step
from vitrail.coders.sparse import decode

DENSITY_BINS = 20
LOWEST_DENSITY = -5.0  # log10; rarer ones share its bin


class Meter:
    """Counts since the last line: part of a checkpoint."""

    def __init__(self, d_sae: int, *, device: torch.device) -> None:
        self.fired: Int[Tensor, " d_sae"] = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.rows, self.revived = 0, 0

    def update(self, fired: Int[Tensor, " d_sae"], n_rows: int) -> None:
        self.fired += fired
        self.rows += n_rows

    def read(self) -> dict[str, Any]:
        """`density` and `revived`; counting begins again."""
        read = {"revived": self.revived, "density": density(self.fired, self.rows)}
        self.fired.zero_()
        self.rows, self.revived = 0, 0
        return read


def density(fired: Int[Tensor, " d_sae"], n_rows: int) -> dict[str, Any]:
    """How many latents fire how often, in equal bins of log10 of the share of rows."""
    share = fired[fired > 0].double() / n_rows
    place = ((share.log10() - LOWEST_DENSITY) * (DENSITY_BINS / -LOWEST_DENSITY)).floor()
    counts = torch.bincount(place.clamp(0, DENSITY_BINS - 1).long(), minlength=DENSITY_BINS)
    return {"never": int((fired == 0).sum()), "counts": counts.tolist()}


@torch.no_grad()
def measured(coder: SparseCoder, step: Step) -> dict[str, Any]:
    """loss, terms, l0 and fvu of one batch."""
    spread = (step.target - step.target.mean(0)).square().sum()
    # What these codes reconstruct, so that fvu and l0 speak of the same latents: a Matryoshka step's x_hat is that of
    # its largest level.
    error = step.target - decode(step.codes, coder.W_dec) - coder.output_bias()
    return {
        "loss": step.loss.item(),
        "terms": {name: term.item() for name, term in step.terms.items()},
        "l0": step.codes.nnz / step.codes.n,
        "fvu": error.square().sum().item() / spread.item() if spread > 0 else None,
    }


def note(line: dict[str, Any]) -> str:
    """A line in a few words, for the progress display."""
    fvu = "" if line["fvu"] is None else f" fvu {line['fvu']:.3f}"
    return f"loss {line['loss']:.4g}{fvu} l0 {line['l0']:.1f} dead {line['dead']}"
