"""A short training run that finishes in a blink, and ways to interrupt it."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from vitrail.coders import SparseCoder, make_coder
from vitrail.training import TensorSource, TrainConfig

D_IN, D_SAE, N_STEPS, BATCH = 12, 30, 23, 32
READ_BY_FIT = 10  # batches a fresh run reads first, for the coder's starting point: one epoch of 300 rows
CONFIG = TrainConfig(
    n_rows=N_STEPS * BATCH - 5,  # the last batch is cut
    lr=3e-3,
    warmup_steps=4,
    dead_window_rows=4 * BATCH,
    checkpoint_every=5,
    log_every=3,
    calibration_rows=100,
)
ARGUMENTS = {"relu": {"l1": 0.2}, "topk": {"k": 3}, "batch_topk": {"k": 3}, "matryoshka": {"ks": [1, 3, 9, D_SAE]}}


class Killed(Exception):
    pass


class InterruptedSource(TensorSource):
    """Gives out `survives` batches, then raises: a kill between two steps."""

    survives: float = float("inf")

    def __iter__(self):
        for x in super().__iter__():
            if self.survives == 0:
                raise Killed
            self.survives -= 1
            yield x


def rows(n: int = 300, d_in: int = D_IN) -> Tensor:
    """300 rows are not a multiple of the batch: epochs end in a short one."""
    generator = torch.Generator().manual_seed(4)
    z = torch.rand(n, 40, generator=generator) * (torch.rand(n, 40, generator=generator) < 0.1)
    return z @ torch.randn(40, d_in, generator=generator) + 3


def source(survives: float = float("inf"), batch_size: int = BATCH) -> InterruptedSource:
    made = InterruptedSource(rows(), batch_size=batch_size, seed=2)
    made.survives = survives
    return made


def coder(name: str = "topk", **changes) -> SparseCoder:
    return make_coder(name, **{"d_in": D_IN, "d_sae": D_SAE, **ARGUMENTS[name], **changes})


def config(**changes) -> TrainConfig:
    return replace(CONFIG, **changes)


def weights(folder: Path) -> bytes:
    return (folder / "weights.safetensors").read_bytes()
