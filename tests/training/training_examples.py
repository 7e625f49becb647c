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
# Transcoders read 7 of a row's 12 dimensions and write the other 5.
PAIR = {"d_in": 7, "d_out": 5}
ARGUMENTS = {
    "relu": {"l1": 0.2},
    "topk": {"k": 3},
    "batch_topk": {"k": 3},
    "matryoshka": {"ks": [1, 3, 9, D_SAE]},
    "matryoshka_prefix": {"k": 3, "prefixes": [10, 20, D_SAE]},
    "jump_relu": {"l0_coefficient": 0.1, "bandwidth": 0.3, "initial_threshold": 0.1},
    "gated": {"l1": 0.2},
    "relu_transcoder": {**PAIR, "l1": 0.2},
    "topk_transcoder": {**PAIR, "k": 3},
    "batch_topk_transcoder": {**PAIR, "k": 3},
    "crosscoder": {"widths": [5, 7], "l1": 0.2},
    "topk_crosscoder": {"widths": [5, 7], "k": 3},
    "batch_topk_crosscoder": {"widths": [5, 7], "k": 3},
    "matching_pursuit": {"k": 3},
    "archetypal_topk": {"k": 3, "n_candidates": 40},
    "archetypal_batch_topk": {"k": 3, "n_candidates": 40},
}


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
