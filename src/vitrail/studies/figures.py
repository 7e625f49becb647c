"""Curves of a table's rows, drawn: vector (SVG) and PNG, and beside each picture the numbers it shows (CSV).

    figures(rows, "OUT")      OUT/progressive.svg, .png, .csv, ... of whatever curves and numbers the rows have

Every picture has one line or panel a coder; controls are thin and grey. Needs matplotlib, of vitrail[figures].
"""

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitrail.files import replacing
from vitrail.metrics.l0_maps import cls_trajectory
from vitrail.metrics.measured import Measured
from vitrail.metrics.pareto import pareto_front
from vitrail.studies.paper_tables import row_name

Rows = Sequence[dict[str, Any]]
COLOURS = ("#1b3a70", "#d99a00", "#2e7d5b", "#c0603b", "#7b4f9e", "#3a8fb7", "#8a8a2a", "#b0457b")
GREY = "#b9c0cc"
FORMS = ("svg", "png")


def figures(rows: Rows, out: str | Path) -> list[Path]:
    """Draw what there is to draw; the pictures' paths. Raises ValueError where no row has a curve or a Pareto point."""
    drawn: list[Path] = []
    for name, draw in FIGURES.items():
        numbers, pictures = draw(rows, Path(out) / name)
        if numbers:
            _write_csv(Path(out) / f"{name}.csv", numbers)
            drawn += pictures
    if not drawn:
        raise ValueError("these rows have no curves to draw. Measure with `vitrail eval --metrics all`.")
    return drawn


# ---------------------------------------------------------------------------------------------------------- pictures


def progressive(rows: Rows, path: Path) -> tuple[list[dict[str, Any]], list[Path]]:
    """FVU, cosine and CKNNA of reconstructions from each row's k largest latents, over k."""
    having = _having(rows, "progressive")
    numbers = [{"name": row_name(row), **one} for row in having for one in row["curves"]["progressive"]]
    if not numbers:
        return [], []
    shown = [key for key in ("fvu", "cosine_normalized", "cknna") if any(one.get(key) is not None for one in numbers)]
    with _figure(path, len(shown), "progressive recovery") as (axes, made):
        for axis, key in zip(axes, shown, strict=True):
            for row, style in _styled(having):
                curve = [one for one in row["curves"]["progressive"] if one.get(key) is not None]
                axis.plot([one["k"] for one in curve], [one[key] for one in curve], marker="o", markersize=2.5, **style)
            axis.set_xscale("log", base=2)
            axis.set_xlabel("k largest latents of each row", fontsize=8)
            _limit(axis, key)
    return numbers, made


def histogram(curve: str, title: str, label: str) -> Callable[[Rows, Path], tuple[list[dict[str, Any]], list[Path]]]:
    """A drawing of one curve of bins in log10: a step line for each row."""

    def draw(rows: Rows, path: Path) -> tuple[list[dict[str, Any]], list[Path]]:
        having = _having(rows, curve)
        numbers = [{"name": row_name(row), **one} for row in having for one in row["curves"][curve]]
        if not numbers:
            return [], []
        with _figure(path, 1, title) as (axes, made):
            for row, style in _styled(having):
                bins = [one for one in row["curves"][curve] if one["log10_low"] is not None]
                axes[0].step([one["log10_low"] for one in bins], [one["share"] for one in bins], where="post", **style)
            filled = [one for one in numbers if one["log10_low"] is not None and one["share"]]
            if filled:
                axes[0].set_xlim(
                    min(one["log10_low"] for one in filled) - 0.2, max(one["log10_high"] for one in filled) + 0.2
                )
            axes[0].set_xlabel(label, fontsize=8)
            axes[0].set_ylabel("share", fontsize=8)
        return numbers, made

    return draw


def l0_maps(rows: Rows, path: Path) -> tuple[list[dict[str, Any]], list[Path]]:
    """Mean L0 at each patch, a panel a coder."""
    having = [row for row in _having(rows, "l0_map") if row.get("control_of") is None]
    numbers = [{"name": row_name(row), **one} for row in having for one in row["curves"]["l0_map"]]
    if not numbers:
        return [], []
    with _figure(path, len(having), "mean L0 at each patch", legend=False) as (axes, made):
        for axis, row in zip(axes, having, strict=True):
            cells = row["curves"]["l0_map"]
            width = 1 + max(one["column"] for one in cells)
            means = [one["mean"] for one in sorted(cells, key=lambda one: (one["row"], one["column"]))]
            grid = [means[start : start + width] for start in range(0, len(means), width)]
            shown = axis.imshow(grid, cmap="viridis")
            axis.figure.colorbar(shown, ax=axis, shrink=0.75).ax.tick_params(labelsize=6)
            axis.set_title(_wrapped(row_name(row)), fontsize=7)
            axis.set_xticks([])
            axis.set_yticks([])
    return numbers, made


def l0_boxes(rows: Rows, path: Path) -> tuple[list[dict[str, Any]], list[Path]]:
    """The spread of L0 over images: of the CLS token, and of the patches, row by row of the picture."""
    having = [row for row in _having(rows, "l0_positions") if row.get("control_of") is None]
    numbers = [{"name": row_name(row), **one} for row in having for one in row["curves"]["l0_positions"]]
    if not numbers:
        return [], []
    with _figure(path, len(having), "L0 over images, token by token", legend=False) as (axes, made):
        for axis, row in zip(axes, having, strict=True):
            tokens = row["curves"]["l0_positions"]
            at = [one["token"] for one in tokens]
            axis.fill_between(at, [t["low"] for t in tokens], [t["high"] for t in tokens], color="#dfe6f2", lw=0)
            axis.fill_between(at, [t["q1"] for t in tokens], [t["q3"] for t in tokens], color="#9db4d8", lw=0)
            axis.plot(at, [t["median"] for t in tokens], color=COLOURS[0], lw=0.9)
            for one in tokens:
                if one["kind"] != "patch":
                    axis.plot(one["token"], one["median"], "o", color=COLOURS[1], markersize=4)
            axis.set_title(_wrapped(row_name(row)), fontsize=7)
            axis.set_xlabel("token (CLS and registers: dots)", fontsize=8)
    return numbers, made


def pareto(rows: Rows, path: Path) -> tuple[list[dict[str, Any]], list[Path]]:
    """Explained variance, cosine and CKNNA against L0."""
    measures = ("explained_variance", "cosine_normalized", "cknna")
    shown = [name for name in measures if sum(_value(row, name) is not None for row in rows) > 1]
    numbers = [
        {"name": row_name(row), "l0": _value(row, "l0_tokens"), **{name: _value(row, name) for name in shown}}
        for row in rows
        if shown and _value(row, "l0_tokens") is not None
    ]
    if not numbers:
        return [], []
    for name in shown:
        placed = [one for one in numbers if one[name] is not None]
        front = pareto_front([(one["l0"], one[name]) for one in placed])
        for at, one in enumerate(placed):
            one[f"{name}_on_front"] = at in front
    with _figure(path, len(shown), "at what L0") as (axes, made):
        for axis, name in zip(axes, shown, strict=True):
            edge = sorted((one["l0"], one[name]) for one in numbers if one.get(f"{name}_on_front"))
            axis.plot(*zip(*edge, strict=True), color=GREY, lw=0.8, linestyle=":", zorder=0)
            for row, style in _styled(rows):
                x, y = _value(row, "l0_tokens"), _value(row, name)
                if x is not None and y is not None:
                    axis.plot([x], [y], marker="o", linestyle="", markersize=4, **style)
            l0s = [one["l0"] for one in numbers if one["l0"]]
            if l0s and max(l0s) > 3 * min(l0s):
                axis.set_xscale("log")
            axis.set_xlabel("L0", fontsize=8)
            _limit(axis, name)
    return numbers, made


def cls_by_layer(rows: Rows, path: Path) -> tuple[list[dict[str, Any]], list[Path]]:
    """L0 of the CLS token and of patches over the layers, a line for each coder's name; needs two layers."""
    by_name: dict[str, dict[int, dict[str, Measured]]] = {}
    for row in rows:
        layer = re.match(r"blocks\.(\d+)\.", row.get("point", ""))
        if layer and row.get("control_of") is None and _value(row, "l0_patches") is not None:
            found = {k: Measured(**row["measured"][k]) for k in ("l0_cls", "l0_patches") if k in row["measured"]}
            by_name.setdefault(row["name"], {})[int(layer[1])] = found
    curves = {name: cls_trajectory(layers) for name, layers in by_name.items() if len(layers) > 1}
    numbers = [{"name": name, **one} for name, curve in curves.items() for one in curve]
    if not numbers:
        return [], []
    with _figure(path, 1, "L0 by layer: CLS (full), patches (broken)") as (axes, made):
        for number, (name, curve) in enumerate(curves.items()):
            for key, style in (("l0_cls", "-"), ("l0_patches", "--")):
                known = [one for one in curve if one[key] is not None]
                layers, values = [one["layer"] for one in known], [one[key] for one in known]
                label = name if key == "l0_cls" else None
                axes[0].plot(layers, values, style, marker="o", markersize=3, color=COLOURS[number % 8], label=label)
        axes[0].set_xlabel("layer", fontsize=8)
        axes[0].set_ylabel("L0", fontsize=8)
    return numbers, made


FIGURES: dict[str, Callable[[Rows, Path], tuple[list[dict[str, Any]], list[Path]]]] = {
    "pareto": pareto,
    "progressive": progressive,
    "activations": histogram("activation_histogram", "activations", "log10 activation"),
    "maxima": histogram("maximum_histogram", "largest activation of each row", "log10 activation"),
    "frequency": histogram("firing_histogram", "how often latents fire", "log10 share of rows"),
    "l0_map": l0_maps,
    "l0_boxes": l0_boxes,
    "cls_by_layer": cls_by_layer,
}


# ----------------------------------------------------------------------------------------------------------- helpers


# What lies beyond is not drawn: one control whose FVU is 700 would flatten all else.
LIMITS = {"fvu": (0.0, 1.1), "explained_variance": (-0.1, 1.02)}


def _limit(axis: Any, name: str) -> None:
    low, high = axis.get_ylim()
    least, most = LIMITS.get(name, (low, high))
    cut = low < least or high > most
    axis.set_ylim(max(low, least), min(high, most))
    axis.set_ylabel(name.replace("_", " ") + (" (beyond: not drawn)" if cut else ""), fontsize=8)


TITLE_LETTERS = 40  # at size 7 narrower than a panel


def _wrapped(title: str) -> str:
    """In lines of at most TITLE_LETTERS, broken at spaces or, within a long name, at its dots and underscores."""
    lines = [""]
    for part in re.findall(r"[^\s._]*[\s._]*", title):
        if lines[-1] and len(lines[-1]) + len(part.rstrip()) > TITLE_LETTERS:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.strip() for line in lines)


def _having(rows: Rows, curve: str) -> list[dict[str, Any]]:
    return [row for row in rows if row.get("curves", {}).get(curve)]


def _value(row: dict[str, Any], measure: str) -> float | None:
    return row["measured"].get(measure, {}).get("value")


def _styled(rows: Rows) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Coders in colours, controls thin and grey; only one control carries the legend's word for them."""
    n_coders, told = 0, False
    for row in rows:
        if row.get("control_of") is None:
            yield row, {"color": COLOURS[n_coders % len(COLOURS)], "lw": 1.4, "label": row_name(row), "zorder": 3}
            n_coders += 1
        else:
            yield row, {"color": GREY, "lw": 0.8, "label": None if told else "controls", "zorder": 1}
            told = True


@contextmanager
def _figure(path: Path, n_panels: int, title: str, *, legend: bool = True) -> Iterator[tuple[Any, list[Path]]]:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError('figures need matplotlib: pip install "vitrail[figures]".') from error
    columns = min(n_panels, 4)
    lines = -(-n_panels // columns)
    figure, grid = pyplot.subplots(lines, columns, figsize=(3.3 * columns, 2.7 * lines + 0.3), squeeze=False)
    axes = [axis for line in grid for axis in line]
    made: list[Path] = []
    try:
        yield axes[:n_panels], made
        for axis in axes[n_panels:]:
            axis.set_visible(False)
        for axis in axes[:n_panels]:
            axis.tick_params(labelsize=7)
            axis.spines[["top", "right"]].set_visible(False)
        if legend:
            axes[0].legend(fontsize=6, frameon=False)
        figure.suptitle(title, fontsize=9)
        figure.tight_layout(h_pad=1.8)  # titles of two lines
        for form in FORMS:
            made.append(path.with_name(f"{path.name}.{form}"))
            with replacing(made[-1]) as temporary:
                figure.savefig(temporary, dpi=130, format=form)
    finally:
        pyplot.close(figure)


def _write_csv(path: Path, numbers: Sequence[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(key for one in numbers for key in one))
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, names, lineterminator="\n")
        table.writeheader()
        table.writerows(numbers)
