"""Learning-rate schedules: a factor on the configured rate, from the share of the training done.

    constant   1
    linear     1, then falling to 0 over the last fifth             MSAE's code
    cosine     (1 + cos(pi share)) / 2                              Prisma

With a floor m the factor is m + (1 - m) * that. Each is multiplied by a linear warm-up over the first steps, or over
the first tenth of the run if that is shorter: a short run would otherwise end before its rate had risen. The penalty's
own warm-up is as long as it was asked to be.
"""

import math
from collections.abc import Callable

DECAY_FROM = 0.8  # of the training, for "linear"
LONGEST_WARMUP = 0.1  # of the training

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda share: 1.0,
    "linear": lambda share: min(1.0, (1.0 - share) / (1.0 - DECAY_FROM)),
    "cosine": lambda share: (1.0 + math.cos(math.pi * share)) / 2.0,
}


def learning_rate(
    base: float, schedule: str, *, share: float, step: int, warmup_steps: int, min_lr_share: float = 0.0
) -> float:
    """The rate of the step numbered `step` (from 1). `share`: of the rows already trained on, in 0..1."""
    warmup = min(1.0, max(step / warmup_steps, share / LONGEST_WARMUP)) if warmup_steps else 1.0
    decay = SCHEDULES[schedule](share)
    if min_lr_share:
        decay = min_lr_share + (1.0 - min_lr_share) * decay
    return base * warmup * decay


def penalty_factor(step: int, warmup_steps: int) -> float:
    """f of the step numbered `step` (from 1): its share of the warm-up, 1 from the last step of it on."""
    return min(1.0, step / warmup_steps) if warmup_steps else 1.0
