"""A run of steering, drawn: how steerable, how many words are reached, and what strength does.

    histogram     s of every coordinate, on a log scale, a line a family; and the share above each s
    coverage      distinct words reached among so many coordinates of a family (steerability.expected_distinct)
    curves        of a few latents, s and delta over strength, with the end of the curve; the largest word's probability

Needs matplotlib, of vitrail[figures].
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from vitrail.files import read_json, replacing
from vitrail.steering.steerability import expected_distinct
from vitrail.tables import read_table

COLOURS = {"latents": "#1b3a70", "neurons": "#d99a00", "random": "#8a8f99"}
LINES = ("#1b3a70", "#d99a00", "#2e7d5b", "#c0603b", "#7b4f9e", "#3a8fb7", "#8a8a2a", "#b0457b")
FORMS = ("svg", "png")
LEAST = 1e-8  # of s, on a log axis: smaller ones are drawn there


def figures(folder: str | Path) -> list[Path]:
    """Draw a folder of `vitrail steer` into itself; the pictures' paths. Raises FileNotFoundError where it is none."""
    folder = Path(folder)
    table, told = (
        read_table(folder / "steerability.parquet"),
        read_json(folder / "steerability.json", "run of steering"),
    )
    families = {
        name: {key: column[table["family"] == name] for key, column in table.items()} for name in told["families"]
    }
    latents, flat = told["families"]["latents"], told["before"]["s_of_flattening"]
    made = histogram(families, folder / "histogram", gamma=latents["gamma"], flattening=flat)
    made += coverage(families, folder / "coverage", beta=latents["beta"])
    if (folder / "curves.parquet").is_file():
        made += curves(read_table(folder / "curves.parquet"), folder / "curves")
    return made


def histogram(
    families: Mapping[str, Mapping[str, np.ndarray]], path: Path, *, gamma: float, flattening: float
) -> list[Path]:
    """`flattening`: s of answers that are made flat; what lies near it may be no more than that."""
    with _figure(path, 2, "steerability") as (axes, made):
        least = min(float(columns["s"].min()) for columns in families.values())
        edges = np.linspace(np.log10(np.clip(least, LEAST, 1e-2)), np.log10(2), 42)
        for name, columns in families.items():
            s = np.log10(np.maximum(columns["s"], LEAST))
            counts = np.histogram(s, edges)[0]
            style = {"color": COLOURS.get(name, LINES[2]), "lw": 1.4, "label": f"{name} ({len(s):,})"}
            axes[0].step(10**edges, np.append(counts, 0), where="post", **style)
            ordered = np.sort(columns["s"])[::-1]
            axes[1].step(
                np.maximum(ordered, LEAST), np.arange(1, len(ordered) + 1) / len(ordered), where="post", **style
            )
        for axis, label in zip(axes, ("coordinates", "share with a larger S"), strict=True):
            axis.axvline(gamma, color="#b9c0cc", lw=0.8, linestyle=":")
            axis.set_xscale("log")
            axis.set_xlabel("S", fontsize=8)
            axis.set_ylabel(label, fontsize=8)
            axis.set_ylim(bottom=0)
        axes[0].set_yscale("symlog", linthresh=1)
        if flattening > 0:
            axes[1].axvline(flattening, color="#c0603b", lw=0.8, linestyle=":", label="S of a flat answer")
            axes[1].legend(fontsize=6, frameon=False)
    return made


def coverage(families: Mapping[str, Mapping[str, np.ndarray]], path: Path, *, beta: float) -> list[Path]:
    """Words of coordinates with S, and with ipr, above beta."""
    with _figure(path, 2, "distinct words reached") as (axes, made):
        for axis, measure in zip(axes, ("s", "ipr"), strict=True):
            for name, columns in families.items():
                n, reached = len(columns["s"]), columns[measure] > beta
                labels = np.unique(columns["top"].astype(str), return_inverse=True)[1][reached]
                sizes = np.unique(np.geomspace(1, n, 40).astype(int))
                words = [expected_distinct(labels, n, int(m)) for m in sizes]
                axis.plot(sizes, words, color=COLOURS.get(name, LINES[2]), lw=1.4, label=name)
            axis.set_xscale("log")
            axis.set_xlabel("coordinates drawn", fontsize=8)
            axis.set_ylabel(f"words with {'S' if measure == 's' else 'ipr'} > {beta:g}", fontsize=8)
    return made


def curves(table: Mapping[str, np.ndarray], path: Path) -> list[Path]:
    """S (solid), delta (dotted) and, as a line at the right, S where the curve ends; then the largest word's p."""
    with _figure(path, 2, "over strength") as (axes, made):
        for at, number in enumerate(dict.fromkeys(table["number"].tolist())):
            mine = table["number"] == number
            finite = mine & np.isfinite(table["strength"])
            end = mine & ~np.isfinite(table["strength"])
            colour, word = LINES[at % len(LINES)], table["word_1"][np.flatnonzero(finite)[-1]]
            x, label = table["strength"][finite], f"{int(number)} {word}"
            axes[0].plot(x, table["s"][finite], color=colour, lw=1.4, label=label)
            axes[0].plot(x, table["delta_max"][finite], color=colour, lw=1.0, linestyle=":")
            axes[1].plot(x, table["p_1"][finite], color=colour, lw=1.4)
            for axis, name in zip(axes, ("s", "p_1"), strict=True):
                axis.plot([x[-1], 1.6 * x[-1]], [table[name][end][0]] * 2, color=colour, lw=0.8, linestyle="--")
        for axis, label in zip(axes, ("S, and delta (dotted)", "largest p"), strict=True):
            axis.set_xscale("log")
            axis.set_xlabel("strength; dashed: without end", fontsize=8)
            axis.set_ylabel(label, fontsize=8)
    return made


@contextmanager
def _figure(path: Path, n_panels: int, title: str) -> Iterator[tuple[Any, list[Path]]]:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError('figures need matplotlib: pip install "vitrail[figures]".') from error
    figure, grid = pyplot.subplots(1, n_panels, figsize=(3.6 * n_panels, 3.0), squeeze=False)
    axes, made = list(grid[0]), []
    try:
        yield axes, made
        for axis in axes:
            axis.tick_params(labelsize=7)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].legend(fontsize=6, frameon=False)
        figure.suptitle(title, fontsize=9)
        figure.tight_layout()
        for form in FORMS:
            made.append(path.with_name(f"{path.name}.{form}"))
            with replacing(made[-1]) as temporary:
                figure.savefig(temporary, dpi=130, format=form)
    finally:
        pyplot.close(figure)
