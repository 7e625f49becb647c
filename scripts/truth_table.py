"""The table, the chart and the calibration picture of docs/truth.md: python scripts/truth_table.py OUT

TopK, BatchTopK and Matryoshka coders of several seeds and two widths, trained on a toy backbone's world, beside raw
neurons, PCA, k-means, random directions and an untrained coder; latents chosen on one split, scored on another.

    OUT/table.md  OUT/chart.png  OUT/calibration.png  OUT/recovery/  OUT/coders/NAME  OUT/store
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import tyro
from matplotlib import pyplot

from vitrail.backbones import load
from vitrail.coders import make_coder
from vitrail.images import open_images
from vitrail.metrics import MEASURES
from vitrail.progress import Terminal
from vitrail.store import extract
from vitrail.studies.calibration import calibrate, calibration_picture
from vitrail.studies.first_look import HeldOut, coder_about, control_sample
from vitrail.studies.table_text import print_recovery
from vitrail.studies.truth_recovery import best_of_variants, truth_recovery
from vitrail.studies.truth_splits import read_split
from vitrail.training import TrainConfig, train

TABLE = (
    "image_f1",
    "image_recovered_f1_0.5",
    "image_recovered_f1_0.7",
    "image_recovered_f1_0.9",
    "image_auc",
    "image_recovered_auc_0.9",
    "patch_f1",
    "patch_iou",
    "patch_auc",
)
CHART = ("image_recovered_f1_0.7", "image_f1", "image_recovered_auc_0.9", "patch_iou")
COLOURS = {"control": "#b9c0cc", "coder": "#d99a00"}


@dataclass(frozen=True)
class Asked:
    out: tyro.conf.Positional[Path]
    backbone: str = "toy/clip"
    point: str = "blocks.3.hook_resid_post"
    tokens: str = "all"
    world: str = "world:shapes"
    """with its dials: world:shapes?words=0.5"""
    n_train: int = 4000
    n_choose: int = 480
    n_score: int = 480
    n_calibrate: int = 240
    widths: tuple[int, ...] = (512, 1024)
    k: int = 16
    seeds: int = 3
    batch_size: int = 4096
    epochs: float = 4.0
    lr: float = 2e-3
    patches_per_image: int | None = 16
    n_bootstrap: int = 1000
    architectures: tuple[str, ...] = ("topk", "batch_topk", "matryoshka")


def main(asked: Asked) -> None:
    out, point, tokens, progress = asked.out, asked.point, asked.tokens, Terminal()
    backbone = load(asked.backbone)
    store = extract(
        backbone, pictures(asked, "train", asked.n_train), [point], out / "store", tokens=tokens, progress=progress
    )
    config = TrainConfig(
        epochs=asked.epochs,
        lr=asked.lr,
        warmup_steps=50,
        dead_window_rows=30_000,
        checkpoint_every=1000,
        log_every=10,
    )
    held_out = HeldOut(backbone, pictures(asked, "train", 300, seed=1), point, tokens, 0, 0)
    coders = {}
    for architecture in asked.architectures:
        for width in asked.widths:
            for seed in range(asked.seeds):
                name = f"{architecture}-{width}#{seed}"
                source = store.reader(point, batch_size=asked.batch_size, seed=seed)
                coder = make_coder(architecture, d_in=source.d_in, seed=seed, **arguments(architecture, width, asked.k))
                coders[name] = train(
                    coder,
                    source,
                    out / "coders" / name,
                    config=replace(config, seed=seed),
                    held_out=held_out,
                    metadata=coder_about(store, point, tokens),
                    progress=progress,
                ).coder
    choose, score = pictures(asked, "val", asked.n_choose), pictures(asked, "test", asked.n_score)
    rows = truth_recovery(
        backbone,
        choose,
        score,
        coders,
        out / "recovery",
        point=point,
        tokens=tokens,
        control_sample=control_sample(store, point, tokens, seed=0),
        patches_per_image=asked.patches_per_image,
        n_bootstrap=asked.n_bootstrap,
        replace_rows=True,
        progress=progress,
    )
    print_recovery(rows)
    best = best_of_variants(rows)
    (out / "table.md").write_text(markdown(best), encoding="utf-8")
    chart(best, out / "chart.png", f"{backbone.name}, {point}")
    print(markdown(best))
    if asked.n_calibrate:
        name, coder = next(iter(coders.items()))
        splits = [
            read_split(backbone, pictures(asked, split, asked.n_calibrate), point, tokens, progress=progress)
            for split in ("val", "test")
        ]
        curve = calibrate(coder, splits, patches_per_image=asked.patches_per_image, progress=progress)
        (out / "calibration.jsonl").write_text("".join(json.dumps(row) + "\n" for row in curve), encoding="utf-8")
        calibration_picture(curve, out / "calibration.png", title=f"{name} on {backbone.name}, {point}")
    print(
        out / "table.md",
        out / "chart.png",
        f"{sum(row.get('cost', {}).get('seconds', 0) for row in rows):.0f} s of recovery",
    )


def pictures(asked: Asked, split: str, n: int, seed: int = 0) -> Any:
    return open_images(f"{asked.world}{'&' if '?' in asked.world else '?'}n={n}&split={split}&seed={seed}")


def arguments(architecture: str, width: int, k: int) -> dict[str, Any]:
    """L0 is k for all. Matryoshka is trained at k/2, k, 2k, 4k and 8k, and used at k."""
    if architecture == "matryoshka":
        return {"d_sae": width, "ks": tuple(k * 2**i // 2 for i in range(5)), "inference_k": k, "weighting": "reverse"}
    return {"d_sae": width, "k": k}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Value and interval of each measure."""
    shown = [name for name in TABLE if any(name in row["measured"] for row in rows)]
    lines = ["| | L0 | " + " | ".join(MEASURES[name].title for name in shown) + " |", "|---" * (len(shown) + 2) + "|"]
    for row in rows:
        name = row["name"] if row["kind"] == "control" else f"**{row['name']}**"
        cells = [told(row["measured"].get(measure), MEASURES[measure].digits) for measure in shown]
        lines.append(f"| {name} | {row['measured']['l0_tokens']['value']:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def told(one: dict[str, Any] | None, digits: int) -> str:
    if one is None or one["value"] is None:
        return "–"
    interval = "" if one["low"] is None else f" ({one['low']:.{digits}f}–{one['high']:.{digits}f})"
    return f"{one['value']:.{digits}f}{interval}"


def chart(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Coders and controls, a panel for each measure, with intervals where there are any."""
    shown = [name for name in CHART if all(name in row["measured"] for row in rows)]
    figure, axes = pyplot.subplots(
        1, len(shown), figsize=(2.9 * len(shown) + 1, 0.28 * len(rows) + 1.2), squeeze=False, sharey=True
    )
    for axis, measure in zip(axes[0], shown, strict=True):
        for place, row in enumerate(reversed(rows)):
            one = row["measured"][measure]
            spread = None
            if one["low"] is not None:
                spread = [[max(0.0, one["value"] - one["low"])], [max(0.0, one["high"] - one["value"])]]
            colour = COLOURS["control" if row["kind"] == "control" else "coder"]
            axis.barh(place, one["value"], color=colour, xerr=spread, ecolor="#444", error_kw={"lw": 1})
        axis.set_yticks(range(len(rows)), [row["name"] for row in reversed(rows)], fontsize=8)
        axis.set_xlabel(MEASURES[measure].title, fontsize=9)
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Asked, description=__doc__))
