"""The table and the picture of docs/bias.md, planted biases: python scripts/planted_bias.py OUT

A classifier is fitted where class and ground (or class and colour) go together, by so much as a dial says, and asked on
pictures where they do not. Is what was planted the first of the latents it leans on, and does it move the answer?

    OUT/rows.jsonl  OUT/table.md  OUT/planted.png  OUT/KIND-BIAS-SEED/report.html
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import tyro
from matplotlib import pyplot

from vitrail.backbones import load
from vitrail.backbones.base import Backbone
from vitrail.coders import SparseCoder, load_coder, make_coder
from vitrail.concepts.bias_study import bias_study
from vitrail.images import open_images
from vitrail.progress import Terminal
from vitrail.store import extract
from vitrail.studies.first_look import coder_about
from vitrail.training import TrainConfig, train

BACKBONE, POINT, TOKENS = "toy/clip", "blocks.3.hook_resid_post", "cls"
DIALS = (0.0, 0.5, 0.9, 0.95, 1.0)


@dataclass(frozen=True)
class Planted:
    """`target` of the classifier; concepts that say what was planted begin with one of `means`."""

    dial: str
    target: str
    means: tuple[str, ...]


def planted_biases() -> dict[str, Planted]:
    """Thing at home on water, and water; the six classes whose own colour is red, and red."""
    own: Any = open_images("world:shapes?n=480&colour_bias=1")
    red = {own.classes[own.record(i).label] for i in range(len(own)) if own.scene(i).attributes["colour"] == "red"}
    return {
        "ground": Planted("background_bias", "home:water", ("ground:", "background:")),
        "colour": Planted("colour_bias", "label=" + "|".join(sorted(red)), ("colour:red",)),
    }


def coder_of(seed: int, out: Path, *, n_train: int = 3000, d_sae: int = 512, epochs: float = 60) -> SparseCoder:
    """A TopK coder of the last block's class tokens, trained on pictures without any bias."""
    folder = out / "coders" / f"{seed}"
    if (folder / "weights.safetensors").is_file():
        return load_coder(folder).eval()
    images = open_images(f"world:shapes?n={n_train}&split=train&seed={70 + seed}")
    store = extract(load(BACKBONE), images, [POINT], out / "stores" / f"{seed}", tokens=TOKENS, progress=Terminal())
    source = store.reader(POINT, batch_size=512, seed=seed)
    coder = make_coder("topk", d_in=source.d_in, d_sae=d_sae, k=16, seed=seed)
    config = TrainConfig(epochs=epochs, lr=2e-3, warmup_steps=50, dead_window_rows=30_000, log_every=50, seed=seed)
    about = coder_about(store, POINT, TOKENS)
    return train(coder, source, folder, config=config, metadata=about, progress=Terminal()).coder.eval()


def cell(
    backbone: Backbone,
    coder: SparseCoder,
    kind: str,
    bias: float,
    seed: int,
    out: Path,
    *,
    n_fitted: int = 1200,
    n_asked: int = 960,
    n_permutations: int = 1000,
) -> dict[str, Any]:
    """One classifier: where the planted concept stands, and what turning it up does. Ranks count from 1."""
    planted = planted_biases()[kind]
    # A dial of nearly nothing brings the concepts ("home:water") and leaves the pictures as they are.
    asked = open_images(f"world:shapes?n={n_asked}&split=test&seed={170 + seed}&{planted.dial}=0.000001")
    fit_on = open_images(
        f"world:shapes?n={n_fitted}&split=train&seed={270 + seed}&{planted.dial}={max(bias, 0.000001)}"
    )
    told = bias_study(
        backbone, coder, asked, out / f"{kind}-{bias:g}-{seed}", point=POINT, tokens=TOKENS, target=planted.target,
        fit_on=fit_on, n_shown=4, n_permutations=n_permutations, seed=seed, progress=Terminal(),
    )  # fmt: skip

    def says(row: dict[str, Any]) -> bool:
        return row["name"].startswith(planted.means)

    leanings, answers = told["leanings"], told["associations"]
    turned = [row for row in told["interventions"] if says(row)]
    return {
        "kind": kind,
        "bias": bias,
        "seed": seed,
        "accuracy": told["accuracy"],
        "rank_concept": next((i for i, row in enumerate(told["concepts"], 1) if says(row)), None),
        "rank_leaning": next((i for i, row in enumerate(leanings, 1) if says(row)), None),
        "rank_answer": next((i for i, row in enumerate(answers, 1) if says(row)), None),
        "first": leanings[0]["name"],
        "r_given": max((abs(row["r_given"]) for row in leanings if says(row)), default=0.0),
        "r_others": max((abs(row["r_given"]) for row in leanings if not says(row)), default=0.0),
        "p_family": min((row["p_family"] for row in leanings if says(row)), default=1.0),
        "n_of_first_ten": sum(says(row) for row in leanings[:10]),
        "turned": len(turned),
        "right_way": sum(row["way"] == "right" for row in turned),
        "wrong_way": sum(row["way"] == "wrong" for row in turned),
        "rank_of_dose": sum(abs(row["rank"]) for row in turned) / len(turned) if turned else None,
        "rise": sum(abs(row["rise"]) for row in turned) / len(turned) if turned else None,
    }


def main(out: tyro.conf.Positional[Path], seeds: int = 3) -> None:
    """Every cell, the table and the picture. Cells that are there are not made again."""
    out.mkdir(parents=True, exist_ok=True)
    stored = out / "rows.jsonl"
    rows = [json.loads(line) for line in stored.read_text().splitlines()] if stored.is_file() else []
    done = {(row["kind"], row["bias"], row["seed"]) for row in rows}
    backbone = load(BACKBONE)
    for seed in range(seeds):
        coder = coder_of(seed, out)
        for kind in planted_biases():
            for bias in DIALS:
                if (kind, bias, seed) not in done:
                    rows.append(cell(backbone, coder, kind, bias, seed, out))
                    with stored.open("a") as stream:
                        stream.write(json.dumps(rows[-1]) + "\n")
    text = table(rows)
    (out / "table.md").write_text(text, encoding="utf-8")
    picture(rows, out / "planted.png")
    print(text)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| planted | bias | right | rank: concept, latent, by answers | r given class (best other) | p family | "
        "turned up: right way, wrong | mean rise of P | rho of dose |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for kind in planted_biases():
        for bias in DIALS:
            some = [row for row in rows if (row["kind"], row["bias"]) == (kind, bias)]
            if not some:
                continue

            def each(key: str, form: str = "", some: list[dict[str, Any]] = some) -> str:
                return ", ".join("–" if row[key] is None else format(row[key], form) for row in some)

            right, wrong, turned = (sum(row[key] for row in some) for key in ("right_way", "wrong_way", "turned"))
            lines.append(
                f"| {kind} | {bias:g} | {each('accuracy', '.3f')} | {each('rank_concept')}; {each('rank_leaning')}; "
                f"{each('rank_answer')} | "
                f"{each('r_given', '.2f')} ({each('r_others', '.2f')}) | {each('p_family', '.2g')} | "
                f"{right} of {turned}, {wrong} | {each('rise', '.2f')} | {each('rank_of_dose', '.2f')} |"
            )
    return "\n".join(lines) + "\n"


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """|r given class| of the planted concept and of the best other, against the dial; a dot a seed."""
    kinds = list(planted_biases())
    figure, axes = pyplot.subplots(1, len(kinds), figsize=(8, 3.2), sharey=True, layout="constrained")
    places = {bias: i for i, bias in enumerate(DIALS)}
    for axis, kind in zip(axes, kinds, strict=True):
        some = [row for row in rows if row["kind"] == kind]
        for key, colour, label in (
            ("r_given", "#d99a00", "what was planted"),
            ("r_others", "#b9c0cc", "best other concept"),
        ):
            axis.scatter(
                [places[row["bias"]] for row in some], [row[key] for row in some], color=colour, label=label, s=28
            )
            means = [[row[key] for row in some if row["bias"] == bias] for bias in DIALS]
            axis.plot(range(len(DIALS)), [sum(one) / len(one) if one else None for one in means], color=colour)
        axis.set_xticks(range(len(DIALS)), [f"{bias:g}" for bias in DIALS])
        axis.set_title(f"class and {kind}", fontsize=10)
        axis.set_xlabel("planted bias of the pictures it was fitted on")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("largest |r| with the log-odds,\ngiven the class")
    axes[0].set_ylim(0, None)
    axes[0].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    tyro.cli(main)
