"""vitrail compare"""

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from vitrail.metrics import MEASURES
from vitrail.metrics.pareto import Family, compare, hypervolume
from vitrail.studies.first_look import read_rows

AREA_TO = 1.5  # the reference's cost, in multiples of the largest that was measured


def run(arguments: Sequence[str]) -> None:
    tyro.cli(compare_verb, args=arguments, prog="vitrail compare")


def compare_verb(
    rows: Annotated[tuple[Path, ...], tyro.conf.Positional],
    a: str,
    b: str,
    measure: str = "explained_variance",
    at_equal: str = "l0_tokens",
) -> None:
    """Two families of coders at equal L0: a less b, interpolated in log L0, never extrapolated; and the area of each.

    Args:
        rows: eval.jsonl files, or run folders that hold one
        a: names of the one family, with * for anything: "topk*"; seeds NAME#0, NAME#1 of equal L0 are averaged
        b: names of the other
        measure: what is compared
        at_equal: at equal what: any measure that is positive
    """
    found = [row for path in rows for row in read_rows(path / "eval.jsonl" if path.is_dir() else path)]
    families = {name: family_of(found, name, measure, at_equal) for name in (a, b)}
    result = compare(families[a], families[b])
    digits = MEASURES[measure].digits if measure in MEASURES else 3
    print(f"{measure} of {a} less that of {b}, at equal {at_equal}:")
    for x, difference in zip(result.at, result.differences, strict=True):
        print(f"  {x:>10.4g}  {difference.value:+.{digits}f}")
    print(f"  mean over log {at_equal}  {result.mean.value:+.{digits}f}")
    most = AREA_TO * max(max(family.x) for family in families.values())
    lower = measure in MEASURES and MEASURES[measure].better == "lower"
    worst = (max if lower else min)(y for family in families.values() for y in family.y)
    for name, family in families.items():
        points = list(zip(family.x, family.y, strict=True))
        area = hypervolume(points, reference=(most, worst), better=("lower", "lower" if lower else "higher"))
        print(f"hypervolume of {name}, up to ({most:.4g}, {worst:.4g}): {area:.4g}")


def family_of(rows: Sequence[dict[str, Any]], pattern: str, measure: str, at_equal: str) -> Family:
    """The coders (and controls) whose names match, that have both numbers. Raises ValueError if there is none."""
    matching = [row for row in rows if fnmatch.fnmatchcase(row["name"], pattern)]
    points = [
        (found[at_equal]["value"], found[measure]["value"])
        for found in (row["measured"] for row in matching)
        if found.get(measure, {}).get("value") is not None and found.get(at_equal, {}).get("value") is not None
    ]
    if not points:
        raise ValueError(
            f"{len(matching)} of {len(rows)} rows are named {pattern!r}, and none has both {measure} and {at_equal}. "
            f"Names: {', '.join(sorted({row['name'] for row in rows if row['control_of'] is None}))}."
        )
    x, y = zip(*points, strict=True)
    return Family(list(x), list(y))
