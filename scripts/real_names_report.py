"""Tables and the picture of docs/real-names.md, from what scripts/real_names.py found: OUT/names.md, OUT/*.png."""

import csv
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot

CELLS = ("clip-11", "clip-8", "clip-embed", "dinov2-11", "dinov2-8", "deit-11", "deit-8")
DRAWN = {
    "clip-11": "CLIP, last block",
    "clip-8": "CLIP, blocks.8",
}


def write_report(out: Path) -> None:
    found = {name: json.loads((out / f"{name}.json").read_text()) for name in CELLS if (out / f"{name}.json").is_file()}
    lines = [*detection_table(found), "", *check_table(found), ""]
    for name in found:
        lines += examples(name, found[name])
    (out / "names.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    sheets = {name: out / f"{name}-words-top_images.csv" for name in DRAWN}
    if all(sheet.is_file() for sheet in sheets.values()):
        draw(sheets, out / "real_names_mask_auc.png")
    print(out / "names.md")


def designs(found: dict[str, Any]):
    for cell, one in found.items():
        for design, methods in one["designs"].items():
            for method, said in methods.items():
                yield cell, design, method, said


def detection_table(found: dict[str, Any]) -> list[str]:
    lines = [
        "| cell | design | method | names | different | measured | AUC | random names | valid |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cell, design, method, said in designs(found):
        auc, random = said["detection_auc"], said["detection_random"]
        numbers = "| – | – |" if auc is None else f"| {auc:.3f} | {random:.3f} |"
        lines.append(
            f"| {cell} | {design} | {method} | {said['names']} | {said['different']} | {said['detection_measured']} "
            f"{numbers} {said['valid']} |"
        )
    return lines


def check_table(found: dict[str, Any]) -> list[str]:
    heads = ("cell", "design", "method", "of", "measured", "classes", "AUC", "dealt", "p", "best", "dealt", "lift")
    heads += ("IoU", "hold", "rho")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for cell, design, method, said in designs(found):
        for which in ("check", "check_of_valid"):
            one = said.get(which)
            if not one or not one["measured"]:
                continue
            down, up = one["dealt_interval"]
            interval = (
                ""
                if which == "check_of_valid" or one["interval"] is None
                else " [{:.3f}, {:.3f}]".format(*one["interval"])
            )
            best = f"{100 * one['best']:.1f} % | {100 * one['best_dealt']:.1f} %"
            rho = detection_against_masks(said["checked"]) if which == "check" else float("nan")
            lines.append(
                f"| {cell} | {design} | {method} | {'all' if which == 'check' else 'valid'} | {one['measured']} | "
                f"{one['classes_named']} of {one['n_classes']} | {one['auc']:.3f}{interval} | {one['dealt']:.3f} "
                f"[{down:.3f}, {up:.3f}] | {one['p']:.3f} | {best} "
                f"| {one['median_lift']:.2f} | {one['iou']:.3f} | {one['holds']} | {rho:.2f} |"
            )
    return lines


def detection_against_masks(rows: list[dict[str, Any]]) -> float:
    """Spearman's rho over latents of the two AUCs: does held-out detection say which names masks bear out?"""
    both = np.array([(row["detection_auc"], row["auc"]) for row in rows if row.get("detection_auc") is not None])
    if len(both) < 10:
        return float("nan")
    ranks = both.argsort(0).argsort(0)
    return float(np.asarray(np.corrcoef(ranks.T))[0, 1])


def examples(cell: str, found: dict[str, Any], n: int = 12) -> list[str]:
    """The best valid names by each design's masks, one a class, and the worst."""
    lines: list[str] = []
    for design, methods in found["designs"].items():
        for method, said in methods.items():
            rows = sorted((row for row in said.get("checked", []) if row["valid"]), key=lambda row: -row["auc"])
            if not rows:
                continue
            first = list({row["name"]: row for row in reversed(rows)}.values())
            first.sort(key=lambda row: -row["auc"])
            lines += [f"## {cell}, {design}, {method}: valid names", ""]
            for title, some in (("best, one a class", first[:n]), ("worst", rows[-n // 2 :])):
                lines.append(f"{title}:")
                lines += [f"    {example(row)}" for row in some]
            lines.append("")
    return lines


def example(row: dict[str, Any]) -> str:
    detection = "–" if row.get("detection_auc") is None else f"{row['detection_auc']:.3f}"
    best = f"rank {row['rank']} of {row['n_classes']} (best {row['best']} {row['best_auc']:.3f})"
    return (
        f"{row['latent']:5d} {row['name']:16s} AUC {row['auc']:.3f} [{row['low']:.3f}, {row['high']:.3f}] others to "
        f"{row['random_high']:.3f}, {best}, precision {row['precision']:.3f} lift {row['lift']:.1f} "
        f"IoU {row['iou']:.3f}; patches {row['n_patches']} in {row['n_pictures']} pictures; detection {detection}"
    )


def draw(sheets: dict[str, Path], path: Path) -> None:
    """Each latent's AUC for the class of its name, against what the names of other latents reach on it."""
    figure, axes = pyplot.subplots(1, len(DRAWN), figsize=(9, 4), sharey=True)
    for axis, (cell, title) in zip(axes, DRAWN.items(), strict=True):
        with sheets[cell].open(encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))[::-1]
        high, auc = (np.array([float(row[key]) for row in rows]) for key in ("random_high", "auc"))
        holds = np.array([row["holds"] == "True" for row in rows])
        axis.plot([0.45, 1], [0.45, 1], color="0.6", linewidth=0.8, zorder=1)
        axis.scatter(high[~holds], auc[~holds], s=4, color="0.45", label="does not hold", zorder=2)
        axis.scatter(high[holds], auc[holds], s=6, color="tab:red", label="holds", zorder=3)
        axis.set_title(f"{title}\n{len(rows)} latents, mean {auc.mean():.3f}, {int(holds.sum())} hold", fontsize=9)
        axis.set_xlabel("AUC that 97.5 % of the other names stay below", fontsize=8)
    axes[0].set_ylabel("AUC of its own name, patches of COCO", fontsize=8)
    axes[0].legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
