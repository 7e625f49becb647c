"""What the printed digits of "Steering CLIP's vision transformer with sparse autoencoders" can and cannot say.

    sizes_that_fit    the n for which every printed percentage is 100 k / n, rounded, of some whole k
    of_printed        k, and Wilson's interval
    best_p, worst_p   McNemar's p if all changes went one way, and if as many as possible went both ways

Tables 1 and 5-8 print accuracies alone: neither n, nor intervals, nor which images changed. The digits of CelebA need
n = 720 (worst group 180), those of Waterbirds 5,794 (642, which are also the official counts). Without the images only
bounds of a paired test are known; where even `best_p` is large, nothing was shown. Test numbers are the best of up to
five coders a layer, and of twelve layers: a further reason to read them as an upper end. Table 1's Waterbirds rows of
layers 0 and 2 pair the overall accuracy of one coder with the worst group of another (SPEC, section N).
"""

from collections.abc import Iterable
from dataclasses import dataclass

from vitrail.steering.groups import mcnemar, wilson

# (n, n of the worst group, overall and worst group as they are), Table 1, row "Baseline".
CELEBA, WATERBIRDS = (720, 180, 92.78, 77.78), (5794, 642, 68.81, 22.43)

# Table 1, the SAE columns: (layer, overall, worst group).
TABLE_1: dict[str, tuple[tuple[int, float, float], ...]] = {
    "CelebA": (
        (0, 93.19, 79.44), (1, 92.92, 78.89), (2, 93.47, 79.44), (3, 93.06, 78.89), (4, 93.19, 80.00),
        (5, 93.19, 78.89), (6, 93.19, 80.00), (7, 93.61, 81.11), (8, 93.47, 81.11), (9, 93.06, 79.44),
        (10, 93.47, 80.00), (11, 93.33, 80.56),
    ),
    "Waterbirds": (
        (0, 69.42, 22.43), (1, 68.81, 22.43), (2, 71.95, 24.61), (3, 69.54, 24.14), (4, 68.93, 23.21),
        (5, 69.05, 22.74), (6, 68.81, 22.43), (7, 68.81, 22.43), (8, 68.81, 22.43), (9, 70.19, 22.74),
        (10, 68.81, 22.43), (11, 68.81, 22.43),
    ),
}  # fmt: skip
# The best worst groups of the relaxed choice: (table, where, layer, overall, worst group).
BEST_RELAXED = (
    ("Table 6", "CelebA", 9, 94.72, 86.67),
    ("Table 8", "Waterbirds", 5, 70.07, 36.60),
)
# Table 2: accuracy under attack, two digits. The sets' sizes are not printed.
TABLE_2: dict[str, tuple[float, float, float]] = {
    "No Defense": (0.66, 0.63, 0.54),
    "DP": (0.73, 0.66, 0.83),
    "SAE (Ours)": (0.72, 0.67, 0.79),
    "DP + Ours": (0.73, 0.67, 0.88),
}


def fits(printed: float, n: int, *, decimals: int = 2) -> bool:
    """Whether some whole number of n images is printed so; a half may have gone either way."""
    unit = 10.0**-decimals
    k = round(printed * n / 100)
    return any(abs(100 * one / n - printed) <= unit / 2 + 1e-9 for one in (k - 1, k, k + 1) if 0 <= one <= n)


def sizes_that_fit(printed: Iterable[float], *, n_max: int, decimals: int = 2) -> list[int]:
    """Raises ValueError for what is no percentage."""
    values = sorted(set(printed))
    if not values or not all(0 <= value <= 100 for value in values):
        raise ValueError(f"percentages are in 0..100, got {values or 'none'}.")
    return [n for n in range(1, n_max + 1) if all(fits(value, n, decimals=decimals) for value in values)]


@dataclass(frozen=True)
class Printed:
    """A printed percentage with what it was of. `low`, `high` in per cent."""

    value: float
    right: int
    n: int
    low: float
    high: float


def of_printed(value: float, n: int) -> Printed:
    """Raises ValueError where no whole number of n images is printed so."""
    if not fits(value, n):
        raise ValueError(f"no number of {n} images is {value} %: another n is meant.")
    right = round(value * n / 100)
    low, high = wilson(right, n)
    return Printed(value, right, n, 100 * low, 100 * high)


def best_p(before: int, after: int) -> float:
    """McNemar's p if no image went the other way: 2 ** (1 - |change|). No smaller one is possible."""
    return mcnemar(max(0, after - before), max(0, before - after))


def worst_p(before: int, after: int, n: int) -> float:
    """McNemar's p if as many images as possible changed both ways. No larger one is possible."""
    if not (0 <= before <= n and 0 <= after <= n):
        raise ValueError(f"of {n} images 0 to {n} can be right, got {before} and {after}.")
    lost = min(before, n - after)
    return mcnemar(lost + after - before, lost)


def what_it_says(where: str, overall: float, worst: float) -> dict[str, float | int]:
    """A row of the tables beside its baseline: counts, intervals, and the bounds of both paired tests."""
    known = {"CelebA": CELEBA, "Waterbirds": WATERBIRDS}
    if where not in known:
        raise ValueError(f"the tables are of {' and '.join(known)}, got {where!r}.")
    n, n_worst, overall_before, worst_before = known[where]
    row: dict[str, float | int] = {}
    for name, size, was, now in (("overall", n, overall_before, overall), ("worst", n_worst, worst_before, worst)):
        a, b = of_printed(was, size), of_printed(now, size)
        row |= {f"{name}": now, f"{name}_low": b.low, f"{name}_high": b.high, f"{name}_gain": b.right - a.right}
        row |= {f"{name}_best_p": best_p(a.right, b.right), f"{name}_worst_p": worst_p(a.right, b.right, size)}
    return row


def markdown() -> str:
    """Table 1's coder columns and the best of the relaxed choice, with what can be said of them."""
    lines = [
        "| table, data, layer | overall (95 %) | images gained | p at best | worst group (95 %) | images gained "
        "| p at best |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = [("Table 1", where, *row) for where, some in TABLE_1.items() for row in some]
    for table, where, layer, overall, worst in [*rows, *BEST_RELAXED]:
        told = what_it_says(where, overall, worst)
        cells = [
            f"{told[name]:.2f} ({told[f'{name}_low']:.1f} to {told[f'{name}_high']:.1f}) | {told[f'{name}_gain']:+d} | "
            f"{told[f'{name}_best_p']:.2g}"
            for name in ("overall", "worst")
        ]
        lines.append(f"| {table}, {where}, {layer} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
