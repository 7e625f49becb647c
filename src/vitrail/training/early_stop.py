"""When to give up on a run: Prisma's criteria.

    stop if L0 < stop_when_l0_below and explained variance < stop_when_explained_variance_below

With one threshold, that one decides; with both, both must hold (Prisma's code; SPEC row 33): a coder that explains much
with few latents is no failure. Read off the lines of the log, so `log_every` is how often it is looked at, and only
once `stop_from_share` of the run is behind it: every coder explains nothing at its start.
"""

from typing import Any

from vitrail.training.config import TrainConfig


def reason_to_stop(config: TrainConfig, line: dict[str, Any], share: float) -> str | None:
    """`line`: of the log. `share`: of the run that is done, in 0..1."""
    explained = None if line["fvu"] is None else 1 - line["fvu"]
    criteria = [
        ("L0", line["l0"], config.stop_when_l0_below),
        ("explained variance", explained, config.stop_when_explained_variance_below),
    ]
    asked = [criterion for criterion in criteria if criterion[2] is not None]
    met = [
        f"{name} {value:.4g} is below {threshold:g}"
        for name, value, threshold in asked
        if value is not None and value < threshold
    ]
    if not asked or len(met) < len(asked) or share < config.stop_from_share:
        return None
    return f"{' and '.join(met)} at step {line['step']}"
