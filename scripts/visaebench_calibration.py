"""The rows, the tables and the pictures of docs/calibration.md.

    python scripts/visaebench_calibration.py OUT --page docs/calibration.md

ViSAEBench's metrics under the dials of studies/visaebench_calibration.py: on planted codes, on a coder trained on a toy
backbone's patches, and M6 on another domain. What is in OUT already is not measured again.

    OUT/rows/SOURCE-SEED.jsonl  OUT/rows.csv  OUT/tables.md  OUT/calibration_SOURCE.png  OUT/coders/  OUT/store
"""

import csv
import json
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import torch
import tyro
from matplotlib import pyplot

from vitrail.backbones import load
from vitrail.coders import make_coder
from vitrail.files import replacing
from vitrail.images import open_images
from vitrail.progress import Terminal
from vitrail.store import extract
from vitrail.studies import visaebench_calibration as study
from vitrail.training import TrainConfig, train

COLOURS = ("#1b3a70", "#d99a00", "#2e7d5b", "#c0603b")
GROUND = {"yes": "#e3f1e4", "moved": "#fbe9c6", "turns": "#fbe9c6", "blind": "#f6d3cd", "backwards": "#f6d3cd"}
MARKS = ("<!-- tables -->", "<!-- /tables -->")
CAPTIONS = {
    "truth": "Planted codes, dials that spoil something. Lines: means over seeds; bands: intervals of all seeds.",
    "confounds": "Planted codes, dials that leave everything as true as it was.",
    "trained": "Codes of a trained coder.",
    "elsewhere": "M6 on another domain, of which home's coder knows nothing.",
}
WORST = ("backwards", "blind", "moved", "turns", "yes")
SHORT = {"cross_domain_": "", "monosemanticity": "M5", "preservation_mean_pool": "mean-pooled", "absorption_": ""}


@dataclass(frozen=True)
class Asked:
    out: tyro.conf.Positional[Path]
    page: Path | None = None
    """whose tables, between their marks, and pictures, in pictures/ beside it, are made anew"""
    sources: tuple[str, ...] = ("planted", "trained", "other")
    backbone: str = "toy/clip"
    point: str = "blocks.3.hook_resid_post"
    n_train: int = 1500
    n_images: int = 480
    seeds: int = 2
    d_sae: int = 256
    k: int = 8
    n_bootstrap: int = 500


def main(asked: Asked) -> None:
    torch.set_num_threads(1)
    asked.out.mkdir(parents=True, exist_ok=True)
    makers = {"planted": planted, "trained": trained, "other": other}
    rows: list[study.Row] = []
    for source in asked.sources:
        for seed in range(asked.seeds):
            path = asked.out / "rows" / f"{source}-{seed}.jsonl"
            if not path.exists():
                text = "".join(json.dumps(row) + "\n" for row in makers[source](asked, seed))
                path.parent.mkdir(exist_ok=True)
                with replacing(path) as temporary:
                    temporary.write_text(text, encoding="utf-8")
            rows += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    with (asked.out / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    found = study.verdicts(rows)
    (asked.out / "tables.md").write_text(tables(found), encoding="utf-8")
    for name, some, metrics in (
        ("truth", lambda r: r["source"] == "planted" and r["spoils"], study.METRICS),
        ("confounds", lambda r: r["source"] == "planted" and not r["spoils"], study.METRICS),
        ("trained", lambda r: r["source"] == "trained", study.METRICS),
        ("elsewhere", lambda r: r["source"] == "other domain", study.ELSEWHERE),
    ):
        if mine := [row for row in rows if some(row)]:
            print(picture(mine, [row for row in found if some(row)], metrics, asked.out / f"calibration_{name}.png"))
    if asked.page is not None:
        links = ""
        for name, caption in CAPTIONS.items():
            if (path := asked.out / f"calibration_{name}.png").exists():
                shutil.copy(path, asked.page.parent / "pictures" / path.name)
                links += f"\n![{caption}](pictures/{path.name})\n\n*{caption}*\n"
        put_into(asked.page, tables(found) + links)
    print((asked.out / "tables.md").read_text(encoding="utf-8"))


def put_into(page: Path, text: str) -> None:
    """Between the marks. Raises ValueError for a page without them."""
    before, mark, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not mark or not end:
        raise ValueError(f"{page} has no {MARKS[0]} ... {MARKS[1]}: nothing says where its tables go.")
    page.write_text(f"{before}{MARKS[0]}\n\n{text}\n{MARKS[1]}{after}", encoding="utf-8")


def planted(asked: Asked, seed: int) -> list[study.Row]:
    return study.calibrate(
        lambda seed, **how: study.planted(seed, asked.n_images, **how),
        (seed,),
        source="planted",
        remade=study.REMADE,
        n_bootstrap=asked.n_bootstrap,
        progress=Terminal(),
    )


def other(asked: Asked, seed: int) -> list[study.Row]:
    return study.calibrate_elsewhere(
        lambda seed: study.planted(seed, asked.n_images),
        (seed,),
        n_bootstrap=asked.n_bootstrap,
        progress=Terminal(),
    )


def trained(asked: Asked, seed: int) -> list[study.Row]:
    """A BatchTopK coder a seed, on the same training pictures."""
    backbone = load(asked.backbone)
    images = open_images(f"world:shapes?n={asked.n_train}&split=train")
    store = extract(backbone, images, [asked.point], asked.out / "store", tokens="spatial", progress=Terminal())

    def make(seed: int) -> study.Case:
        source = store.reader(asked.point, batch_size=2048, seed=seed)
        coder = make_coder("batch_topk", d_in=source.d_in, d_sae=asked.d_sae, k=asked.k, seed=seed)
        config = TrainConfig(epochs=6.0, lr=2e-3, warmup_steps=20, dead_window_rows=20_000, seed=seed)
        fitted = train(coder, source, asked.out / "coders" / f"batch_topk#{seed}", config=config, progress=Terminal())
        return study.trained(fitted.coder, backbone, asked.point, seed, asked.n_images)

    dials = {name: dial for name, dial in study.DIALS.items() if not dial.planted_only}
    return study.calibrate(
        make,
        (seed,),
        source="trained",
        dials=dials,
        n_bootstrap=asked.n_bootstrap,
        progress=Terminal(),
    )


# -- tables


def tables(found: Sequence[study.Row]) -> str:
    """For each source: a metric's verdict, then a dial's effect on each metric."""
    parts = []
    for source in dict.fromkeys(row["source"] for row in found):
        mine = [row for row in found if row["source"] == source]
        metrics = list(dict.fromkeys(row["metric"] for row in mine))
        lines = [f"**{source}**", "", "| metric | follows | does not | moved as well by | verdict |", "|---" * 5 + "|"]
        for row in study.summary(mine):
            also = ", ".join(f"{dial} {change:+.2f}" for dial, change in row["also"])
            missed = ", ".join(row["missed"])
            lines.append(
                f"| `{row['metric']}` | {row['yes']} of {row['asked']} | {missed} | {also} | {row['word'] or '–'} |"
            )
        heads = " | ".join(f"`{metric}`" for metric in metrics)
        lines += ["", f"| dial | {heads} |", "|---" * (len(metrics) + 1) + "|"]
        for dial in dict.fromkeys(row["dial"] for row in mine):
            cells = [cell(row) for metric in metrics for row in mine if (row["dial"], row["metric"]) == (dial, metric)]
            lines.append(f"| {dial} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def cell(row: study.Row) -> str:
    change = "" if row["change"] is None else f"{row['change']:+.2f}"
    if row["verdict"] == "stays":
        return "·"
    if row["verdict"] == "not asked":
        return f"({change})"
    if row["verdict"] == "yes":
        return f"{change} ✓"
    return f"**{row['verdict']}** {change}"


# -- pictures


def picture(rows: Sequence[study.Row], found: Sequence[study.Row], metrics: Any, path: Path) -> Path:
    """A row of panels a metric, a column a dial: means over seeds, and a band from the lowest end of an interval to the
    highest. Panels are tinted by the worst verdict of their lines."""
    dials = list(dict.fromkeys(row["dial"] for row in rows))
    groups = {name: [key for key in keys if key in {row["metric"] for row in rows}] for name, keys in metrics.items()}
    size = (1.28 * len(dials) + 1.9, 1.12 * len(groups) + 0.8)
    figure, axes = pyplot.subplots(len(groups), len(dials), figsize=size, squeeze=False)
    for line, (group, keys) in enumerate(groups.items()):
        highest = max((row["high"] or row["value"] or 0 for row in rows if row["metric"] in keys), default=1)
        for column, dial in enumerate(dials):
            axis = axes[line][column]
            for colour, key in zip(COLOURS, keys, strict=False):
                curve(axis, [row for row in rows if (row["dial"], row["metric"]) == (dial, key)], colour)
            said = {row["verdict"] for row in found if row["dial"] == dial and row["metric"] in keys}
            axis.set_facecolor(next((GROUND[word] for word in WORST if word in said), "white"))
            axis.set_ylim(-0.05, max(1.05, min(highest, 4) * 1.05))
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=6.5, length=2)
            if column:
                axis.set_yticklabels([])
            if line < len(groups) - 1:
                axis.set_xticklabels([])
            else:
                about = next(row["about"] for row in rows if row["dial"] == dial)
                axis.set_xlabel(wrapped(about, 19), fontsize=6.5)
            if not line:
                axis.set_title(dial, fontsize=8.5, fontweight="bold")
        axes[line][0].set_ylabel(wrapped(group, 16), fontsize=7.5)
        handles = [pyplot.Line2D([], [], color=colour, lw=1.6) for colour, _ in zip(COLOURS, keys, strict=False)]
        axes[line][-1].legend(
            handles,
            [short(key) for key in keys],
            fontsize=6.5,
            frameon=False,
            loc="center left",
            bbox_to_anchor=(1, 0.5),
        )
    figure.tight_layout(h_pad=0.35, w_pad=0.25)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=105, format="png")
    pyplot.close(figure)
    return path


def curve(axis: Any, rows: Sequence[study.Row], colour: str) -> None:
    strengths = sorted({row["strength"] for row in rows})
    points = [[row for row in rows if row["strength"] == at and row["value"] is not None] for at in strengths]
    kept = [(at, those) for at, those in zip(strengths, points, strict=True) if those]
    x = [at for at, _ in kept]
    axis.plot(x, [sum(row["value"] for row in those) / len(those) for _, those in kept], color=colour, lw=1.3)
    ends = [
        [choose(row[end] if row[end] is not None else row["value"] for row in those) for _, those in kept]
        for end, choose in (("low", min), ("high", max))
    ]
    axis.fill_between(x, *ends, color=colour, alpha=0.2, lw=0)


def wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width))


def short(key: str) -> str:
    for long, less in SHORT.items():
        key = key.replace(long, less)
    return key.replace("_", " ")


if __name__ == "__main__":
    main(tyro.cli(Asked, description=__doc__))
