"""Pictures of a study, each from a table of study_analyses.py: SVG for the page and PNG beside it.

matplotlib is optional: without it `Drawing.draw` says so once and returns None, and tables stand alone.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitrail.files import replacing
from vitrail.studies.figures import COLOURS, GREY
from vitrail.studies.study_analyses import Table, about

Paint = Callable[[Any], Any]  # of pyplot, a figure
SHADES = ("#1b3a70", "#3a8fb7", "#d99a00", "#7b4f9e", "#2e7d5b")
TERMS = {"residual": "#d5d9e0", "shared": "#f0f1f4"}


class Drawing:
    """Draws into FOLDER. Pictures of the same numbers are the same bytes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pyplot = _pyplot()
        if self._pyplot is None:
            warnings.warn(
                'no figures were drawn, which needs matplotlib: pip install "vitrail[figures]". Tables are there.',
                stacklevel=3,
            )

    @property
    def available(self) -> bool:
        return self._pyplot is not None

    def draw(self, name: str, paint: Paint) -> Path | None:
        """FOLDER/name.svg and .png; the path of the SVG."""
        pyplot = self._pyplot
        if pyplot is None:
            return None
        with pyplot.rc_context({"svg.hashsalt": name, "font.size": 8, "axes.titlesize": 8.5, "legend.fontsize": 7}):
            figure = paint(pyplot)
            try:
                figure.tight_layout()
                for form, about_file in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
                    with replacing(self.folder / f"{name}.{form}") as temporary:
                        figure.savefig(temporary, dpi=130, format=form, metadata=about_file, bbox_inches="tight")
            finally:
                pyplot.close(figure)
        return self.folder / f"{name}.svg"


def _pyplot() -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return None
    return pyplot


def plain(text: Any) -> str:
    """As matplotlib prints it, letter by letter: no formulas, and no name that a legend leaves out."""
    told = str(text).replace("$", r"\$")
    return f" {told}" if told.startswith("_") else told


def colours(backbones: Sequence[str]) -> dict[str, str]:
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(backbones)}


def radar(profile: Mapping[str, Sequence[float]], backbones: Sequence[str]) -> Paint:
    def paint(pyplot: Any) -> Any:
        columns = min(len(backbones), 3)
        lines = -(-len(backbones) // columns)
        figure, grid = pyplot.subplots(
            lines, columns, figsize=(4.3 * columns, 3.1 * lines), subplot_kw={"projection": "polar"}, squeeze=False
        )
        angles = np.linspace(0, 2 * np.pi, len(profile), endpoint=False)
        for axis, (number, backbone) in zip(grid.flat, enumerate(backbones), strict=False):
            for other in range(len(backbones)):
                values = [profile[name][other] for name in profile]
                own = other == number
                style = {"color": COLOURS[number % 8], "lw": 1.8, "zorder": 3} if own else {"color": GREY, "lw": 0.6}
                axis.plot([*angles, angles[0]], [*values, values[0]], **style)
                if own:
                    axis.fill([*angles, angles[0]], [*values, values[0]], color=COLOURS[number % 8], alpha=0.15)
            axis.set_xticks(angles, [plain(about(name).title).replace(" @", "\n@") for name in profile], fontsize=6.5)
            for label, angle in zip(axis.get_xticklabels(), angles, strict=True):
                side = np.cos(angle)
                label.set_horizontalalignment("center" if abs(side) < 0.1 else "left" if side > 0 else "right")
            axis.tick_params(axis="x", pad=-2)
            axis.set_yticks([0, 0.5, 1], ["", "", ""])
            axis.set_ylim(-0.12, 1)
            axis.set_title(plain(backbone), pad=14)
        _hide(grid, len(backbones))
        return figure

    return paint


def histograms(
    rows: Table, raw: Table, marks: Mapping[str, Mapping[str, float | None]], backbones: Sequence[str]
) -> Paint:
    """Of each backbone its latents' Moran's I, behind it that of the raw dimensions; lines at means and null."""

    def paint(pyplot: Any) -> Any:
        figure, axes, grid = _panels(pyplot, len(backbones), 3.0, 2.5)
        for axis, backbone in zip(axes, backbones, strict=False):
            told = []
            for table, style in ((raw, {"color": GREY, "alpha": 0.8}), (rows, {"color": COLOURS[0], "alpha": 0.75})):
                bins = [one for one in table if one["backbone"] == backbone]
                if bins:
                    axis.bar(
                        [one["low"] for one in bins],
                        [one["share"] for one in bins],
                        width=[one["high"] - one["low"] for one in bins],
                        align="edge",
                        label="latents" if table is rows else "raw dimensions",
                        **style,
                    )
            for name, style in (
                ("moran", {"color": COLOURS[0], "ls": "-"}),
                ("raw_moran", {"color": "#7a828f", "ls": "--"}),
                ("moran_null", {"color": COLOURS[3], "ls": ":"}),
            ):
                at = marks.get(name, {}).get(backbone)
                if at is not None:
                    axis.axvline(at, lw=1.2, label=MARKS[name], **style)
                    told.append(f"{MARKS[name].removeprefix('mean of ')} {at:.3f}")
            filled = [one for one in [*rows, *raw] if one["share"] > 0]
            if filled:
                axis.set_xlim(
                    min(0.0, *(one["low"] for one in filled)) - 0.05, max(one["high"] for one in filled) + 0.05
                )
            axis.set_title(f"{plain(backbone)}\n{', '.join(told)}", fontsize=7)
            axis.set_xlabel("Moran's I")
            axis.set_ylabel("share")
        if axes:
            lines, names = axes[0].get_legend_handles_labels()
            figure.legend(lines, names, ncol=5, loc="upper left", bbox_to_anchor=(0.01, 0.0), frameon=False)
        _hide(grid, len(backbones))
        return figure

    return paint


MARKS = {"moran": "mean of latents", "raw_moran": "mean of raw dimensions", "moran_null": "null"}


def scatter(points: Table, x: str, y: str, backbones: Sequence[str]) -> Paint:
    def paint(pyplot: Any) -> Any:
        figure, axis = pyplot.subplots(figsize=(4.8, 3.6))
        for backbone, colour in colours(backbones).items():
            own = [one for one in points if one["backbone"] == backbone]
            if own:
                axis.scatter([o[x] for o in own], [o[y] for o in own], s=16, color=colour, label=plain(backbone))
                mean = (np.mean([one[x] for one in own]), np.mean([one[y] for one in own]))
                axis.scatter(*mean, s=70, marker="D", facecolor="none", edgecolor=colour, lw=1.3)
        axis.set_xlabel(plain(about(x).title))
        axis.set_ylabel(plain(about(y).title))
        axis.legend(frameon=False)
        _bare(axis)
        return figure

    return paint


def curves_by_k(rows: Table, backbones: Sequence[str]) -> Paint:
    def paint(pyplot: Any) -> Any:
        score = "ovr_auc" if any("ovr_auc" in one for one in rows) else "multi_acc"
        figure, axes, grid = _panels(pyplot, len(backbones), 3.1, 2.5)
        coders = list(dict.fromkeys(one["coder"] for one in rows if one["control_of"] is None))
        low = min((one[score] for one in rows if score in one), default=0.0)
        for axis, backbone in zip(axes, backbones, strict=False):
            told = False
            for coder in dict.fromkeys(one["coder"] for one in rows):
                own = sorted(
                    (o for o in rows if o["backbone"] == backbone and o["coder"] == coder and score in o),
                    key=lambda o: o["k"],
                )
                if not own:
                    continue
                style: dict[str, Any] = {"color": GREY, "lw": 0.8, "label": None if told else "controls"}
                if own[0]["control_of"] is None:
                    place = coders.index(coder)
                    line = ("-", "--", ":", "-.")[place // len(COLOURS) % 4]
                    style = {"color": COLOURS[place % 8], "lw": 1.2, "ls": line, "marker": "o", "markersize": 2.2}
                    style["label"] = plain(coder)
                else:
                    told = True
                axis.plot([one["k"] for one in own], [one[score] for one in own], **style)
            axis.set_xscale("log", base=2)
            axis.set_ylim(low - 0.02, 1.01)
            axis.set_title(plain(backbone))
            axis.set_xlabel("latents given to the probe")
            axis.set_ylabel("mean AUC" if score == "ovr_auc" else "accuracy")
        if axes:
            axes[0].legend(frameon=False, fontsize=5.5)
        _hide(grid, len(backbones))
        return figure

    return paint


def shares(rows: Table) -> Paint:
    """Stacked bars of eta^2, a panel a design."""

    def paint(pyplot: Any) -> Any:
        designs = list(dict.fromkeys(row["design"] for row in rows))
        metrics = list(dict.fromkeys(row["metric"] for row in rows))
        figure, grid = pyplot.subplots(
            1, len(designs), figsize=(4.6 * len(designs), 0.34 * len(metrics) + 1.3), squeeze=False, sharey=True
        )
        for axis, design in zip(grid.flat, designs, strict=True):
            terms = list(dict.fromkeys(row["term"] for row in rows if row["design"] == design))
            left = np.zeros(len(metrics))
            for number, term in enumerate(terms):
                of = {row["metric"]: row["eta2"] for row in rows if row["design"] == design and row["term"] == term}
                width = np.array([max(v, 0.0) if math.isfinite(v := of.get(m, 0.0)) else 0.0 for m in metrics])
                colour = TERMS.get(term, SHADES[number % len(SHADES)])
                axis.barh(range(len(metrics)), width, left=left, color=colour, label=plain(term), height=0.7)
                for place, value in enumerate(width):
                    if value > 0.08:
                        ink = "#1d2330" if term in TERMS or colour == "#d99a00" else "white"
                        at = left[place] + value / 2
                        axis.text(at, place, f"{value:.2f}", ha="center", va="center", fontsize=6.5, color=ink)
                left += width
            axis.set_yticks(range(len(metrics)), [plain(about(name).title) for name in metrics])
            axis.set_xlim(0, 1)
            axis.set_xlabel(r"$\eta^2$")
            axis.set_title(design, pad=20)
            axis.legend(frameon=False, ncol=len(terms), loc="lower left", bbox_to_anchor=(0, 1), fontsize=6.5)
            _bare(axis)
        grid.flat[0].invert_yaxis()
        return figure

    return paint


def heat_map(rows: Table) -> Paint:
    """rho of each metric and task, with p after Holm in brackets."""

    def paint(pyplot: Any) -> Any:
        metrics = list(dict.fromkeys(row["metric"] for row in rows))
        tasks = list(dict.fromkeys(row["task"] for row in rows))
        of = {(row["metric"], row["task"]): row for row in rows}
        values = np.array([[of[m, t]["rho"] for t in tasks] for m in metrics], dtype=float)
        size = (1.15 * len(tasks) + 2.6, 0.42 * len(metrics) + 1.9)
        figure, axis = pyplot.subplots(figsize=size)
        shown = axis.imshow(np.ma.masked_invalid(values), cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
        for i, metric in enumerate(metrics):
            for j, task in enumerate(tasks):
                one = of[metric, task]
                text = "–" if math.isnan(one["rho"]) else f"{one['rho']:+.2f}\n({one['p_holm']:.2g})"
                ink = "white" if abs(values[i, j]) > 0.65 else "#1d2330"
                axis.text(j, i, text, ha="center", va="center", fontsize=6.5, color=ink)
        names = [plain(about(name).title).replace(" @", "\n@") for name in tasks]
        axis.set_xticks(range(len(tasks)), names, rotation=35, ha="right", fontsize=7)
        axis.set_yticks(range(len(metrics)), [plain(about(name).title) for name in metrics])
        figure.colorbar(shown, ax=axis, shrink=0.8).set_label("Spearman's rho")
        return figure

    return paint


def rank_bars(rows: Table, backbones: Sequence[str]) -> Paint:
    def paint(pyplot: Any) -> Any:
        metrics = list(dict.fromkeys(row["metric"] for row in rows))
        figure, axes, grid = _panels(pyplot, len(metrics), 3.0, 0.22 * len(backbones) + 1.1)
        for axis, metric in zip(axes, metrics, strict=True):
            own = [row for row in rows if row["metric"] == metric]
            for place, row in enumerate(own):
                axis.plot([row["low"], row["high"]], [place, place], color=GREY, lw=3, solid_capstyle="round")
                axis.plot(row["rank"], place, "o", color=colours(backbones)[row["backbone"]], markersize=4.5)
            axis.set_yticks(range(len(own)), [plain(row["backbone"]) for row in own], fontsize=6.5)
            axis.set_xticks(range(1, len(own) + 1))
            axis.set_xlim(0.7, len(own) + 0.3)
            axis.invert_yaxis()
            axis.set_xlabel("rank")
            axis.set_title(plain(about(metric).title))
        _hide(grid, len(metrics))
        return figure

    return paint


def lifts(rows: Table, backbones: Sequence[str]) -> Paint:
    def paint(pyplot: Any) -> Any:
        tasks = list(dict.fromkeys(row["task"] for row in rows))
        figure, axes, grid = _panels(pyplot, len(tasks), 2.7, 2.3)
        for number, (axis, task) in enumerate(zip(axes, tasks, strict=True)):
            for row in (row for row in rows if row["task"] == task):
                bar = None if math.isnan(row["sd"]) else row["sd"]
                style = {"color": colours(backbones)[row["backbone"]], "label": plain(row["backbone"])}
                axis.errorbar(row["raw"], row["lift"], yerr=bar, fmt="o", markersize=4, capsize=2, lw=1, **style)
            axis.axhline(1, color=GREY, lw=0.8, ls=":")
            axis.set_title(plain(task))
            axis.set_xlabel("raw")
            axis.set_ylabel("codes / raw")
            if number == 0:
                axis.legend(frameon=False, fontsize=6)
        _hide(grid, len(tasks))
        return figure

    return paint


def stacked_seconds(rows: Table, backbones: Sequence[str]) -> Paint:
    def paint(pyplot: Any) -> Any:
        figure, axis = pyplot.subplots(figsize=(6.6, 0.34 * len(backbones) + 1.5))
        totals: dict[str, float] = {}
        for row in rows:
            totals[row["metric"]] = totals.get(row["metric"], 0.0) + row["seconds"]
        largest = sorted(totals, key=lambda name: -totals[name])
        kinds = largest if len(largest) <= 9 else [*largest[:8], "the others"]
        left = np.zeros(len(backbones))
        for number, kind in enumerate(kinds):
            names = set(largest[8:]) if kind == "the others" else {kind}
            width = np.array(
                [sum(r["seconds"] for r in rows if r["metric"] in names and r["backbone"] == b) for b in backbones]
            )
            colour = GREY if number >= 8 else COLOURS[number]
            axis.barh(range(len(backbones)), width, left=left, color=colour, label=plain(kind), height=0.7)
            left += width
        axis.set_yticks(range(len(backbones)), [plain(name) for name in backbones])
        axis.invert_yaxis()
        axis.set_xlabel("seconds, all cells")
        axis.legend(frameon=False, fontsize=6.5, loc="center left", bbox_to_anchor=(1, 0.5))
        _bare(axis)
        return figure

    return paint


# -- helpers


def _panels(pyplot: Any, n: int, width: float, height: float) -> tuple[Any, list[Any], Any]:
    columns = min(max(n, 1), 4)
    lines = max(-(-n // columns), 1)
    figure, grid = pyplot.subplots(lines, columns, figsize=(width * columns, height * lines), squeeze=False)
    for axis in grid.flat:
        _bare(axis)
    return figure, list(grid.flat)[:n], grid


def _hide(grid: Any, n: int) -> None:
    for axis in list(grid.flat)[n:]:
        axis.set_visible(False)


def _bare(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=7)
