"""Rows of several training seeds, "NAME#0", "NAME#1", ..., put together: means, with t intervals over the seeds."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vitrail.metrics.measured import Measured

# Of Student's t with 1, 2, ... degrees of freedom, the 97.5 % quantile.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)


def over_seeds(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each name with several seeds ("topk#0", "topk#1"): means, and Student's t intervals over the seeds.

    The interval says how much another seed would change, on the same pictures; those of the single rows, over
    pictures, say what other pictures would. Raises ValueError where two of them are one coder (`check_seeds`).
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        name, marked, _ = row["name"].partition("#")
        if marked and row.get("kind", "coder") == "coder" and row.get("control_of") is None:
            groups.setdefault(name, []).append(row)
    out = []
    for name, group in groups.items():
        if len(group) > 1:
            check_seeds({row["name"]: row["coder_digest"] for row in group if "coder_digest" in row})
            own = ("config", "coder_digest", "cost", "curves", "paired")
            shared = {k: v for k, v in group[0].items() if k not in own}
            measures = [m for m in group[0]["measured"] if all(m in row["measured"] for row in group)]
            measured = {m: _over_seeds([row["measured"][m] for row in group]) for m in measures}
            seeds = [row["name"] for row in group]
            out.append({**shared, "name": name, "kind": "mean", "seeds": seeds, "measured": measured})
    return out


def check_seeds(digests: Mapping[str, str]) -> None:
    """Raises ValueError if two seeds of one name have the same weights: an interval over them would have no width."""
    first: dict[tuple[str, str], str] = {}
    for name, digest in digests.items():
        stem, marked, _ = name.partition("#")
        other = first.setdefault((stem, digest), name) if marked else name
        if other != name:
            raise ValueError(
                f"{other} and {name} are one coder, weight for weight, and no two seeds. A seed has starting weights "
                "and an order of rows of its own: vitrail train --coder-seed 1 --data-seed 1."
            )


def _over_seeds(values: Sequence[dict[str, Any]]) -> dict[str, Any]:
    numbers = np.array([value["value"] for value in values], dtype=float)
    half = t_quantile(len(numbers) - 1) * float(numbers.std(ddof=1)) / math.sqrt(len(numbers))
    mean, definition = float(numbers.mean()), f"{values[0]['definition']}; mean of {len(numbers)} seeds, t interval"
    return Measured(mean, definition, values[0]["n"], mean - half, mean + half).to_json()


def t_quantile(freedom: int) -> float:
    """97.5 % of Student's t, to 0.01."""
    if freedom < 1:
        raise ValueError(f"an interval over seeds needs at least 2 of them, got {freedom + 1}.")
    return T_QUANTILES[freedom - 1] if freedom <= len(T_QUANTILES) else 1.96 * (1 + 1.32 / freedom)
