"""The chart of docs/first-look.md: python scripts/first_look_chart.py OUT.png RUN/eval.jsonl [RUN/eval.jsonl ...]

For each run, explained variance and % CE recovered of every coder and its controls, with 95 % intervals.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

MEASURES = (("explained_variance", "explained variance"), ("ce_recovered", "% CE recovered"))
COLOURS = {"coder": "#d99a00", "control": "#b9c0cc"}


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    out, runs = Path(sys.argv[1]), [Path(path) for path in sys.argv[2:]]
    figure, axes = pyplot.subplots(len(MEASURES), len(runs), figsize=(3.6 * len(runs), 5.4), squeeze=False)
    for column, run in enumerate(runs):
        rows = [json.loads(line) for line in run.read_text().splitlines()]
        coders = [row for row in rows if row["control_of"] is None]
        # Controls at the same number of latents are the same for every coder: those of the first are shown.
        shown = coders + [row for row in rows if row["control_of"] == coders[0]["name"]]
        for line, (measure, title) in enumerate(MEASURES):
            axis = axes[line][column]
            for place, row in enumerate(reversed(shown)):
                measured = row["measured"][measure]
                colour = COLOURS["coder" if row["control_of"] is None else "control"]
                spread = [[measured["value"] - measured["low"]], [measured["high"] - measured["value"]]]
                axis.barh(place, measured["value"], color=colour, xerr=spread, ecolor="#444", error_kw={"lw": 1})
            axis.set_yticks(range(len(shown)), [row["name"].split(" / ")[-1] for row in reversed(shown)], fontsize=8)
            axis.tick_params(axis="x", labelsize=8)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_xlabel(title, fontsize=9)
        name = rows[0]["backbone"].split("/")[-1]
        axes[0][column].set_title(
            f"{name}\n{rows[0]['point']}, L0 {rows[0]['measured']['l0_tokens']['value']:.0f}", fontsize=9
        )
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
