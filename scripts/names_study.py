"""The study of docs/names-study.md: are names that pass validation true, are dealt ones rejected? names_study.py OUT

For each seed coders of its own, trained on a draw of the world of its own, named on pictures of its own, and judged by
the truth of further ones. Then the names of each method are dealt to its latents at random, and tried again.

    OUT/seed-S.json   every name with its evidence and truth; a seed whose file is there is not done again
    OUT/names.md      the tables        OUT/names_bar.png   share true against margin, by method, a dot a seed
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
import tyro
from matplotlib import pyplot
from torch.nn.functional import normalize

from vitrail.backbones import load
from vitrail.backbones.base import Backbone
from vitrail.coders import make_coder
from vitrail.coders.base import SparseCoder
from vitrail.concepts.detection import largest
from vitrail.concepts.effect import effect
from vitrail.concepts.naming import Named, captions, decoder_rows, decoder_text, labels, top_images, top_means
from vitrail.concepts.pictures import Pictures, read_pictures
from vitrail.concepts.study import NamingOptions, tried
from vitrail.concepts.validation import concept_said
from vitrail.concepts.vocabulary import Vocabulary, embed, read_words
from vitrail.files import replacing
from vitrail.images import open_images
from vitrail.metrics.recovery import recovery
from vitrail.metrics.truth import Firing, Truth
from vitrail.store import extract
from vitrail.studies.first_look import coder_about
from vitrail.toys.held_out import accuracy
from vitrail.training import TrainConfig, train

MARGINS = (0.0, 0.05, 0.1)
DEFAULT = 0.05
METHODS = ("decoder_text", "top_images", "effect", "captions", "labels")
# Seeds of the world: of training pictures, of those that name and try names, of those whose truth judges.
TRAINING, NAMING, JUDGING = 5100, 5200, 5300


@dataclass(frozen=True)
class Plan:
    """A coder of the study. `n_train` pictures, `epochs` over their rows."""

    architecture: str
    point: str
    d_sae: int
    k: int
    n_train: int
    epochs: float
    batch_size: int


PLANS = {
    "TopK, last block": Plan("topk", "blocks.3.hook_resid_post", 512, 16, 4000, 4.0, 4096),
    "BatchTopK, last block": Plan("batch_topk", "blocks.3.hook_resid_post", 512, 16, 4000, 4.0, 4096),
    "TopK, image embedding": Plan("topk", "hook_image_embed", 256, 8, 8000, 30.0, 512),
}


@dataclass(frozen=True)
class Asked:
    out: tyro.conf.Positional[Path]
    seeds: tuple[int, ...] = (0, 1, 2)
    n_naming: int = 1200
    """half of them name, half try the names"""
    n_judging: int = 1200
    """half of them choose each latent's concept, half score it"""
    backbone: str = "toy/clip"
    words: str = "shapes"


def main(asked: Asked) -> None:
    torch.set_num_threads(1)
    backbone = load(asked.backbone)
    assert backbone.text is not None
    vocabulary = embed(backbone.text, read_words(asked.words))
    every: list[dict[str, Any]] = []
    for seed in asked.seeds:
        path = asked.out / f"seed-{seed}.json"
        if not path.is_file():
            rows = [row for name in PLANS for row in of_coder(asked, backbone, vocabulary, name, seed)]
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(rows), encoding="utf-8")
        every += json.loads(path.read_text(encoding="utf-8"))
    text = tables(every)
    (asked.out / "names.md").write_text(text, encoding="utf-8")
    figure(every, asked.out / "names_bar.png")
    print(text)


# -- one coder


def of_coder(
    asked: Asked, backbone: Backbone, vocabulary: Vocabulary, name: str, seed: int
) -> Iterable[dict[str, Any]]:
    plan = PLANS[name]
    folder = asked.out / "work" / f"{seed}-{name.replace(', ', '-').replace(' ', '-')}"
    coder = trained(asked.backbone, plan, seed, folder)
    world = f"world:shapes?n={asked.n_naming}&split=test&seed={NAMING + seed}"
    other = f"world:shapes?n={asked.n_judging}&split=val&seed={JUDGING + seed}"
    seen, judging = (read_pictures(backbone, open_images(spec), coder, plan.point, "all") for spec in (world, other))
    naming, trying = seen.halves()
    named = named_by_all(backbone, coder, plan.point, world, naming, vocabulary)
    rng = np.random.default_rng(seed)
    dealt = {
        method: deal(one, rng, likeness(method, coder, naming, vocabulary), vocabulary) for method, one in named.items()
    }
    # Only labels name classes, which are conjunctions of the world's other concepts.
    truths = {True: truth_of(judging, classes=True), False: truth_of(judging, classes=False)}
    fires = trying.codes.fired().numpy().astype(float)  # how many, not which share
    own = {
        (method, latent): word
        for method, one in named.items()
        for latent, word in zip(one.latents, one.names, strict=True)
    }
    for is_dealt, those in ((False, named), (True, dealt)):
        # At margin 0 `valid` says of all that matter whether the rival is beaten; margins are applied afterwards.
        options = NamingOptions(margin=0.0)
        always = np.zeros(coder.d_sae)
        for row in tried(those, trying, vocabulary, backbone, always, options, fires, naming=naming):
            if is_dealt and row.name == own[row.method, row.latent]:
                continue
            best, f1, concepts = truths[row.method == "labels"]
            concept = best[row.latent]
            low, chance = row.detection_low, row.detection_random_high
            yield {
                "seed": seed,
                "coder": name,
                "method": row.method,
                "dealt": is_dealt,
                "latent": row.latent,
                "name": row.name,
                "truth": concept,
                "f1": f1[row.latent],
                "true": concept is not None and concept_said(row.name, concepts) == concept,
                "auc": row.detection_auc,
                "above": None if low is None or chance is None else low - max(chance, 0.5),
                "unrivalled": row.valid,
                "rules": None if row.cosine_ok is None else [row.cosine_ok, row.ratio_ok, row.unique_ok],
                "fires": int(row.fires or 0),
            }


def trained(name: str, plan: Plan, seed: int, folder: Path) -> SparseCoder:
    backbone, point = load(name), plan.point
    images = open_images(f"world:shapes?n={plan.n_train}&split=train&seed={TRAINING + seed}")
    store = extract(backbone, images, [point], folder.parent / f"{seed}-{point}", tokens="all")
    source = store.reader(point, batch_size=plan.batch_size, seed=seed)
    coder = make_coder(plan.architecture, d_in=source.d_in, seed=seed, d_sae=plan.d_sae, k=plan.k)
    config = TrainConfig(
        epochs=plan.epochs,
        lr=2e-3,
        warmup_steps=50,
        dead_window_rows=30_000,
        checkpoint_every=1000,
        log_every=50,
        seed=seed,
    )
    return train(coder, source, folder, config=config, metadata=coder_about(store, point, "all")).coder


def named_by_all(
    backbone: Backbone, coder: SparseCoder, point: str, world: str, naming: Pictures, vocabulary: Vocabulary
) -> dict[str, Named]:
    """By every method that applies, in the order of METHODS. Raises ValueError for a coder of another width."""
    highest, images = largest(naming.codes), open_images(world)
    shown = torch.stack([backbone.preprocess(images.load(int(i))) for i in naming.positions[:4]])
    live = np.flatnonzero(highest > 0)
    named = {
        "top_images": top_images(naming.codes, naming.embeddings, vocabulary),
        "effect": effect(backbone, coder, shown, point, "all", live, vocabulary, highest=highest),
        "captions": captions(naming.codes, naming.captions),
        "labels": labels(naming.codes, naming.labels, naming.classes),
    }
    if point == "hook_image_embed":
        named["decoder_text"] = decoder_text(coder, vocabulary)
    return {method: named[method] for method in METHODS if method in named}


def likeness(method: str, coder: SparseCoder, naming: Pictures, vocabulary: Vocabulary) -> np.ndarray | None:
    """Cosine of every latent that the method names with every word, where its score is such a cosine."""
    if method == "decoder_text":
        return (decoder_rows(coder) @ vocabulary.centred.t()).numpy()
    if method == "top_images":
        means, _ = top_means(naming.codes, naming.embeddings, NamingOptions().n_top)
        return (normalize(means - naming.embeddings.mean(0), dim=1) @ vocabulary.centred.t()).numpy()
    return None


def deal(one: Named, rng: np.random.Generator, cosines: np.ndarray | None, vocabulary: Vocabulary) -> Named:
    """The same names, each to a latent drawn at random; for methods of cosines with the score that it has there."""
    names = tuple(one.names[place] for place in rng.permutation(len(one.names)))
    if cosines is None:
        return replace(one, names=names)
    at = np.arange(len(names)), np.array([vocabulary.place[name] for name in names])
    others = cosines.copy()
    others[at] = -np.inf
    runners_up = tuple(vocabulary.words[j] for j in others.argmax(1))
    return replace(one, names=names, scores=cosines[at], runners_up=runners_up, runner_up_scores=others.max(1))


def truth_of(pictures: Pictures, *, classes: bool) -> tuple[list[str | None], list[float], tuple[str, ...]]:
    """Of each latent its concept, as in best_concepts, chosen on the first half, and its F1 on the second."""
    truth = pictures.truth
    assert truth is not None
    if classes:
        own = np.eye(len(pictures.classes), dtype=bool)[pictures.labels]
        names = tuple(f"class:{one}" for one in pictures.classes)
        truth = Truth((*truth.concepts, *names), np.concatenate([truth.images, own], axis=1))
    half = np.arange(pictures.n // 2)
    first, second = half, half + pictures.n // 2
    firing = Firing(pictures.codes)
    pairs = recovery(firing.select(first), truth.select(first), firing.select(second), truth.select(second))
    found = pairs.levels["image"]
    shown = truth.images[first].mean(0)[:, None]
    always = 2 * shown / (1 + shown)
    lift = np.where(found.measured[:, None], found.f1_choose - always, -1) / np.maximum(1 - always, 1e-9)
    best, every = lift.argmax(0), np.arange(lift.shape[1])
    concepts = [truth.concepts[c] if lift[c, latent] > 0 else None for latent, c in enumerate(best.tolist())]
    f1 = np.where(found.f1 > found.constant[:, None], found.f1, 0.0)[best, every]
    return concepts, [0.0 if c is None else float(value) for c, value in zip(concepts, f1, strict=True)], truth.concepts


# -- what is told of them

Row = dict[str, Any]


def valid(row: Row, margin: float = DEFAULT, *, rivals: bool = True) -> bool:
    """Whether validation passes the name; without rivals the interval alone decides."""
    return row["above"] is not None and row["above"] > margin and (row["unrivalled"] or not rivals)


def share(hits: Sequence[bool]) -> str:
    """ "97 (93–99), n" in per cent, with Wilson's 95 % interval."""
    if not hits:
        return "–"
    one = accuracy(hits)
    low, high = max(0.0, 100 * one["low"]), min(100.0, 100 * one["high"])
    return f"{100 * one['accuracy']:.0f} ({low:.0f}–{high:.0f}), {one['n']}"


def tables(rows: Sequence[Row]) -> str:
    parts = [by_seed(rows), by_margin(rows), by_rules(rows), wrong(rows)]
    return "\n".join(parts)


def groups(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by coder and method."""
    found: dict[tuple[str, str], list[Row]] = {}
    for coder in PLANS:
        for method in METHODS:
            mine = [row for row in rows if row["coder"] == coder and row["method"] == method]
            if mine:
                found[coder, method] = mine
    return found


def best_names(rows: Sequence[Row], margin: float = DEFAULT) -> list[Row]:
    """Each latent's valid name with the largest AUC, as names_of picks it."""
    best: dict[tuple[int, str, int], Row] = {}
    for row in sorted(rows, key=lambda row: METHODS.index(row["method"])):
        key = row["seed"], row["coder"], row["latent"]
        if not row["dealt"] and valid(row, margin) and (key not in best or row["auc"] > best[key]["auc"]):
            best[key] = row
    return list(best.values())


def by_seed(rows: Sequence[Row]) -> str:
    lines = [
        "| coder, names by | seed | F1 ≥ 0.5: true | F1 ≥ 0.9: true | all valid: true | dealt: rejected | "
        "dealt to latents with a valid name: rejected | wrong, F1 ≥ 0.5: rejected |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def line(title: str, seed: int, real: list[Row], mine: list[Row]) -> str:
        """`real`: the valid names."""
        named = {row["latent"] for row in real}
        dealt = [row for row in mine if row["dealt"] and row["above"] is not None]
        wrong = [row for row in mine if not row["dealt"] and not row["true"] and row["f1"] >= 0.5]
        cells = [
            share([row["true"] for row in real if row["f1"] >= 0.5]),
            share([row["true"] for row in real if row["f1"] >= 0.9]),
            share([row["true"] for row in real]),
            share([not valid(row) for row in dealt]),
            share([not valid(row) for row in dealt if row["latent"] in named]),
            share([not valid(row) for row in wrong if row["above"] is not None]),
        ]
        return f"| {title} | {seed} | {' | '.join(cells)} |"

    seeds = sorted({row["seed"] for row in rows})
    for (coder, method), mine in groups(rows).items():
        for seed in seeds:
            here = [row for row in mine if row["seed"] == seed]
            lines.append(
                line(f"{coder}, {method}", seed, [row for row in here if not row["dealt"] and valid(row)], here)
            )
    for coder in PLANS:
        for seed in seeds:
            mine = [row for row in rows if row["coder"] == coder and row["seed"] == seed]
            lines.append(line(f"{coder}, best of all", seed, best_names(mine), []))
    return "\n".join(lines) + "\n"


def by_margin(rows: Sequence[Row]) -> str:
    """Seeds together: true of the valid names of recovered latents, how many they are; dealt names rejected."""
    lines = ["| coder, names by | valid by | " + " | ".join(f"margin {margin:g}" for margin in MARGINS) + " |"]
    lines.append("|---" * (2 + len(MARGINS)) + "|")
    for (coder, method), mine in groups(rows).items():
        dealt = [row for row in mine if row["dealt"] and row["above"] is not None]
        real = [row for row in mine if not row["dealt"] and row["f1"] >= 0.5]
        for rivals in (False, True):
            cells = []
            for margin in MARGINS:
                hits = [row["true"] for row in real if valid(row, margin, rivals=rivals)]
                rejected = np.mean([not valid(row, margin, rivals=rivals) for row in dealt])
                right = f"{100 * np.mean(hits):.0f} % of {len(hits)}" if hits else "–"
                cells.append(f"{right}; {100 * rejected:.1f} %")
            lines.append(f"| {coder}, {method} | {'interval, rival' if rivals else 'interval'} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def by_rules(rows: Sequence[Row]) -> str:
    """MSAE's rules in place of detection, seeds together."""
    lines = ["| coder, names by | rules | all that pass: true | F1 ≥ 0.5: true | dealt: rejected |", "|---" * 5 + "|"]
    asked: dict[str, Callable[[Row], bool]] = {
        "cosine": lambda row: row["rules"][0],
        "cosine and ratio": lambda row: row["rules"][0] and row["rules"][1],
        "all three": lambda row: all(row["rules"]),
    }
    for (coder, method), mine in groups(rows).items():
        for name, passes in asked.items() if mine[0]["rules"] is not None else ():
            real = [row for row in mine if not row["dealt"] and passes(row)]
            lines.append(
                f"| {coder}, {method} | {name} | {share([row['true'] for row in real])} | "
                f"{share([row['true'] for row in real if row['f1'] >= 0.5])} | "
                f"{share([not passes(row) for row in mine if row['dealt']])} |"
            )
    return "\n".join(lines) + "\n"


def wrong(rows: Sequence[Row]) -> str:
    """The names that are valid and not true, by what their latents are."""
    kinds: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["dealt"] or row["true"] or not valid(row):
            continue
        key = row["method"], kind_of(row)
        kinds[key] += 1
        about = f"{row['name']} ({row['truth']}, F1 {row['f1']:.2f}, AUC {row['auc']:.2f}, {row['fires']} fires)"
        examples.setdefault(key, []).append(about)
    lines = ["| names by | what the latent is | names | such as |", "|---" * 4 + "|"]
    for (method, kind), n in sorted(kinds.items(), key=lambda item: (METHODS.index(item[0][0]), -item[1])):
        lines.append(f"| {method} | {kind} | {n} | {'; '.join(examples[method, kind][:2])} |")
    return "\n".join(lines) + "\n"


def kind_of(row: Row) -> str:
    if row["fires"] < 20:
        return "fires in fewer than 20 of the pictures that try"
    if row["truth"] is None or row["f1"] < 0.5:
        return "recovers no concept (F1 < 0.5)"
    family, _, value = row["truth"].partition(":")
    if row["method"] == "labels" and value in row["name"].split():
        return f"recovers the {family} of the class"
    return f"recovers a {family}"


def figure(rows: Sequence[Row], path: Path) -> None:
    """Share true of the valid names against margin, a line a method, a dot a seed; dotted: without rivals."""
    margins = np.linspace(0, 0.15, 16)
    seeds = sorted({row["seed"] for row in rows})
    figure, axes = pyplot.subplots(2, len(PLANS), figsize=(11, 6), sharey=True, sharex=True, squeeze=False)
    for line, (least, what) in enumerate(((0.5, "latents of F1 ≥ 0.5"), (0.0, "all latents"))):
        for axis, coder in zip(axes[line], PLANS, strict=True):
            for place, method in enumerate(METHODS):
                mine = [row for row in rows if row["coder"] == coder and row["method"] == method and not row["dealt"]]
                mine = [row for row in mine if row["f1"] >= least]
                colour = f"C{place}"
                for rivals, style in ((True, "-"), (False, ":")):
                    shares = [true_share(mine, margin, rivals=rivals) for margin in margins]
                    axis.plot(margins, shares, style, color=colour, lw=1.5, label=method if rivals else None)
                for seed in seeds:
                    dots = [true_share([row for row in mine if row["seed"] == seed], margin) for margin in MARGINS]
                    beside = np.array(MARGINS) + 0.0015 * (place - 2)
                    axis.plot(beside, dots, "o", color=colour, ms=4, alpha=0.6, mew=0)
            axis.axhline(0.9, color="#888", lw=0.8)
            axis.axvline(DEFAULT, color="#888", lw=0.8)
            axis.set_ylim(-0.03, 1.04)
            axis.spines[["top", "right"]].set_visible(False)
        axes[line][0].set_ylabel(f"valid names that are true\n({what})")
    for axis, coder in zip(axes[0], PLANS, strict=True):
        axis.set_title(coder, fontsize=10)
    for axis in axes[1]:
        axis.set_xlabel("margin")
    figure.tight_layout(rect=(0, 0, 0.88, 1))
    figure.legend(*axes[0][-1].get_legend_handles_labels(), loc="center right", fontsize=9, frameon=False)
    figure.savefig(path, dpi=100)


def true_share(rows: Sequence[Row], margin: float, *, rivals: bool = True) -> float:
    """NaN where fewer than three names are valid."""
    hits = [row["true"] for row in rows if valid(row, margin, rivals=rivals)]
    return float(np.mean(hits)) if len(hits) >= 3 else float("nan")


if __name__ == "__main__":
    main(tyro.cli(Asked, description=__doc__))
