"""The report of a study: a table of every setting, a profile of every backbone, and the numbers behind both.

OUT/report.md  OUT/profile.svg, .png, .csv  OUT/settings.csv
"""

import csv
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitrail.files import replacing
from vitrail.metrics import MEASURES
from vitrail.studies.figures import COLOURS
from vitrail.studies.study import by_setting

LEFT_OUT = ("_low", "_std", "_p")


def write_study_report(rows: Sequence[Mapping[str, Any]], out: str | Path, *, title: str) -> Path:
    """OUT/report.md. Raises ValueError for no rows."""
    if not rows:
        raise ValueError("a study without rows has nothing to report.")
    out = Path(out)
    measures = [name for name in rows[0]["measured"] if not name.endswith(LEFT_OUT)]
    settings = list(dict.fromkeys((row["backbone"], row["coder"]) for row in rows))
    found = {name: by_setting(rows, name) for name in measures}
    measures = [name for name in measures if found[name]]
    _write_settings(out / "settings.csv", settings, measures, found)
    lines = [f"# {title}", "", f"{len(rows)} cells; means over seeds.", ""]
    heads = [MEASURES[name].title if name in MEASURES else name for name in measures]
    lines += ["| backbone | coder | " + " | ".join(heads) + " |", "|---|---|" + "---:|" * len(measures)]
    for backbone, coder in settings:
        cells = [_shown(found[name].get((backbone, coder)), name) for name in measures]
        lines.append(f"| {backbone} | {coder} | {' | '.join(cells)} |")
    seconds = sum(sum(v for k, v in row["cost"].items() if k.endswith("seconds")) for row in rows)
    lines += ["", f"Training and measuring took {seconds:,.0f} s in all.", ""]
    profile = draw_profile(rows, found, out)
    if profile is not None:
        lines += [
            "![Profile: each measure from the worst backbone (0) to the best (1)](profile.png)",
            "",
            "Each measure from the worst backbone, 0, to the best, 1, of this study: ranks with distances, no score. "
            "They are never added up.",
            "",
        ]
    with replacing(out / "report.md") as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")
    return out / "report.md"


def _shown(value: float | None, name: str) -> str:
    return "–" if value is None else f"{value:.{MEASURES[name].digits if name in MEASURES else 3}f}"


def _write_settings(
    path: Path,
    settings: Sequence[tuple[str, str]],
    measures: Sequence[str],
    found: Mapping[str, Mapping[tuple[str, str], float]],
) -> None:
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(["backbone", "coder", *measures])
        for setting in settings:
            table.writerow([*setting, *(found[name].get(setting, "") for name in measures)])


def draw_profile(
    rows: Sequence[Mapping[str, Any]], found: Mapping[str, Mapping[tuple[str, str], float]], out: Path
) -> Path | None:
    """A radar of the measures that have a better side, for two backbones or more; None where there is nothing to draw.
    Warns where matplotlib is missing.
    """
    backbones = list(dict.fromkeys(row["backbone"] for row in rows))
    profile = profiles(backbones, found)
    if len(backbones) < 2 or len(profile) < 3:
        return None
    with replacing(out / "profile.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(["measure", *backbones])
        table.writerows([name, *values] for name, values in profile.items())
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        warnings.warn('no profile was drawn, which needs matplotlib: pip install "vitrail[figures]".', stacklevel=2)
        return None
    angles = np.linspace(0, 2 * np.pi, len(profile), endpoint=False)
    figure, axis = pyplot.subplots(figsize=(5.2, 4.6), subplot_kw={"projection": "polar"})
    for number, backbone in enumerate(backbones):
        values = [profile[name][number] for name in profile]
        closed = [*values, values[0]]
        axis.plot([*angles, angles[0]], closed, color=COLOURS[number % len(COLOURS)], lw=1.4, label=backbone)
    axis.set_xticks(angles, [MEASURES[name].title for name in profile], fontsize=7)
    axis.set_yticks([0, 0.5, 1], ["", "", ""])
    axis.legend(fontsize=7, frameon=False, loc="lower left", bbox_to_anchor=(-0.25, -0.12))
    figure.tight_layout()
    for form in ("svg", "png"):
        with replacing(out / f"profile.{form}") as temporary:
            figure.savefig(temporary, dpi=130, format=form)
    pyplot.close(figure)
    return out / "profile.png"


def profiles(backbones: Sequence[str], found: Mapping[str, Mapping[tuple[str, str], float]]) -> dict[str, list[float]]:
    """Measure -> for each backbone its mean over coders, from the worst of them (0) to the best (1). Only measures that
    have a better side, that every backbone has, and in which they differ."""
    out: dict[str, list[float]] = {}
    for name, values in found.items():
        if name not in MEASURES or not MEASURES[name].better:
            continue
        means = [[v for (of, _), v in values.items() if of == backbone] for backbone in backbones]
        if not all(means):
            continue
        level = np.array([float(np.mean(of)) for of in means])
        level = -level if MEASURES[name].better == "lower" else level
        if np.isfinite(level).all() and np.ptp(level) > 0:
            out[name] = ((level - level.min()) / np.ptp(level)).tolist()
    return out
