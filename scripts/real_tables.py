"""Prisma's and MSAE's tables on real photographs and real pretrained weights: what docs/real-tables.md reports.

    python scripts/real_tables.py OUT [deit] [clip]

Reads $VITRAIL_SHARED/data (default ../shared): DeiT-Tiny with its ImageNet head on held-out photographs, and the image
tower of OpenAI's CLIP ViT-B/16, zero-shot over 80 words on COCO pictures. Two layers of each. Every stage is kept in
OUT and found there again:

    OUT/NAME/store, coders/LAYER-TOKENS/CODER, LAYER-TOKENS.jsonl (rows of `vitrail eval`), pairs.json, stability.json,
    tables.md, figures/LAYER-TOKENS
"""

import itertools
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from real_first_look import CLIP_CONFIG, SHARED, coco_table, dequantised
from vitrail.backbones import Backbone, load
from vitrail.coders import SparseCoder, TopK, make_coder
from vitrail.files import replacing
from vitrail.images import ImageSource, open_images
from vitrail.metrics.groups import chosen
from vitrail.metrics.heads import Head, ZeroShotHead, own_head
from vitrail.metrics.linear_probe import LinearProbe, ProbeAgreement, fit_linear_probe
from vitrail.metrics.passing import Seen, Setting
from vitrail.metrics.stability import Stability
from vitrail.store import Store, extract
from vitrail.studies.figures import figures
from vitrail.studies.first_look import CoderPlan, coder_about, read_rows, request_of
from vitrail.studies.paper_tables import LAYOUTS, paper_table
from vitrail.studies.prisma_table import Row, prisma_table, with_pairs
from vitrail.training import TrainConfig, train

CONTROL_ROWS = 20_000
HELD_OUT = 0.06  # of the stored images: thresholds are estimated on them

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """`k` and `d_sae` of coders of all tokens and of patches; CLS coders, which have a row an image, are smaller.

    `groups`: coarse classes of the training labels, for a linear probe of the CLS token; `eval_groups` says whether the
    evaluation labels are of the same kind.
    """

    backbone: Backbone
    train_images: ImageSource
    eval_images: ImageSource
    head: Head | None
    points: tuple[str, ...]
    d_sae: int
    k: int
    config: TrainConfig
    l1: float | None = None
    d_sae_cls: int = 512
    k_cls: int = 16
    cls_config: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=60, lr=1e-3, warmup_steps=20))
    limit: int | None = None
    batch_size: int = 4096
    groups: Callable[[int], int] | None = None
    eval_groups: bool = False
    n_workers: int = 0
    seeds: int = 2  # of TopK at the last point
    controls: tuple[str, ...] = ("all", "cls", "spatial")  # kinds of tokens whose tables have them
    paper_levels: bool = True  # also train the Matryoshka with all of its paper's levels, the dearest of all


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    out, wanted = Path(sys.argv[1]), sys.argv[2:] or list(JOBS)
    if not SHARED.is_dir():
        sys.exit(f"{SHARED} is not here: set VITRAIL_SHARED.")
    for name in wanted:
        run(JOBS[name](out), out / name)
        print(out / name / "tables.md")


# --------------------------------------------------------------------------------------------------------- two models


def deit(out: Path) -> Job:
    backbone = load("timm/deit_tiny_patch16_224", weights=SHARED / "weights/deit_tiny_patch16_224_in1k.safetensors")
    photographs = f"{SHARED}/imagenet_1000/labels.csv"
    return Job(
        backbone=backbone,
        train_images=open_images(f"{photographs}@0:0.85"),
        eval_images=open_images(f"{photographs}@0.85:1"),
        head=own_head(backbone),
        points=("blocks.5.hook_resid_post", "blocks.9.hook_resid_post"),
        d_sae=1536,
        k=32,
        l1=1.5,
        config=TrainConfig(epochs=8, lr=1e-3, warmup_steps=30, dead_window_rows=150_000, compute_dtype="bfloat16"),
        groups=imagenet_group,
        eval_groups=True,
    )


def clip(out: Path) -> Job:
    folder = out / "clip-vit-base-patch16"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CLIP_CONFIG))
    dequantised("clip_vit_b16_vision", out, folder / "model.safetensors")
    classes = np.load(SHARED / "vocabulary/clip_vit_b16_coco80_text_embeddings.npy").astype(np.float32)
    return Job(
        backbone=load(f"hf/{folder}"),
        train_images=open_images(f"{SHARED}/imagenet_1000/labels.csv@0:0.7"),
        eval_images=open_images(str(coco_table(out))),
        head=ZeroShotHead(classes=torch.from_numpy(classes), logit_scale=100.0),
        points=("blocks.5.hook_resid_post", "blocks.9.hook_resid_post"),
        d_sae=3072,
        k=32,
        config=TrainConfig(epochs=3, lr=1e-3, warmup_steps=20, dead_window_rows=150_000, compute_dtype="bfloat16"),
        limit=72,
        groups=imagenet_group,
        seeds=1,
        controls=("all",),
        paper_levels=False,
    )


JOBS: dict[str, Callable[[Path], Job]] = {"deit": deit, "clip": clip}

# ImageNet's class numbers run through the animals first: (one past the last number, group).
GROUPS = (
    "fish and sharks",
    "birds",
    "reptiles, amphibians",
    "invertebrates",
    "dogs",
    "other mammals",
    "things",
    "rest",
)
_ENDS = (
    *((7, 0), (25, 1), (69, 2), (80, 3), (101, 1), (107, 5), (127, 3), (147, 1), (151, 5), (269, 4), (300, 5)),
    *((330, 3), (389, 5), (398, 0), (924, 6), (1000, 7)),
)


def imagenet_group(label: int) -> int:
    """One of GROUPS, by ranges of class numbers; "rest" is food, plants, places and people."""
    return next(group for end, group in _ENDS if label < end)


# ------------------------------------------------------------------------------------------------------------- stages


def run(job: Job, out: Path) -> list[dict[str, Any]]:
    """Every stage; the rows of all tables."""
    with told("extract"):
        store = extract(job.backbone, job.train_images, job.points, out / "store", n_workers=job.n_workers)
    rows: list[dict[str, Any]] = []
    pairs: dict[str, Any] = {}
    stability: dict[str, Any] = {}
    for point in job.points:
        tables = {"all": trained(job, store, point, "all", plans(job), out)}
        if point == job.points[-1]:
            tables["cls"] = trained(job, store, point, "cls", cls_plans(job), out)
            tables["spatial"] = trained(job, store, point, "spatial", {"topk": topk_plan(job.d_sae, job.k)}, out)
            again = trained(job, store, point, "all", second_plans(job), out)
            stability = {name: stability_of(tables["all"]["topk"], two) for name, two in again.items()}
            tables["all"] |= again
        tables["all"] |= without_ranking(tables["all"])
        for tokens, coders in tables.items():
            found, compared = measured(job, store, point, tokens, coders, out)
            rows += found
            pairs |= {f"{layer_of(point)}-{tokens}": compared} if compared else {}
    write_json(out / "pairs.json", pairs)
    write_json(out / "stability.json", stability)
    write_tables(rows, out)
    return rows


def plans(job: Job) -> dict[str, CoderPlan]:
    """Coders of all tokens. "matryoshka" has the levels of its paper, k and its doublings up to all positive latents;
    "matryoshka near k" has k / 2, k, 2 k and 4 k.
    """
    d_sae, k = job.d_sae, job.k
    levels = tuple(k * 2**i for i in range(32) if k * 2**i < d_sae)
    near = (k // 2, k, 2 * k, 4 * k)
    found = [
        topk_plan(d_sae, k),
        CoderPlan("batch_topk", "batch_topk", {"d_sae": d_sae, "k": k}),
        CoderPlan("matryoshka near k", "matryoshka", {"d_sae": d_sae, "ks": near, "inference_k": k, **SAME}),
    ]
    if job.paper_levels:
        every = {"d_sae": d_sae, "ks": (*levels, d_sae), "inference_k": k, **SAME}
        found.insert(2, CoderPlan("matryoshka", "matryoshka", every))
    if job.l1 is not None:
        found.append(CoderPlan("relu", "relu", {"d_sae": d_sae, "l1": job.l1}))
    return {plan.name: plan for plan in found}


SAME = {"normalization": "mean_std"}  # as the others have it: cosines in the coder's own space are then of one space


def topk_plan(d_sae: int, k: int) -> CoderPlan:
    return CoderPlan("topk", "topk", {"d_sae": d_sae, "k": k})


def cls_plans(job: Job) -> dict[str, CoderPlan]:
    d_sae, k = job.d_sae_cls, job.k_cls
    levels = tuple(k * 2**i for i in range(32) if k * 2**i < d_sae)
    matryoshka = {"d_sae": d_sae, "ks": (*levels, d_sae), "inference_k": k, **SAME}
    return {"topk": topk_plan(d_sae, k), "matryoshka": CoderPlan("matryoshka", "matryoshka", matryoshka)}


def second_plans(job: Job) -> dict[str, CoderPlan]:
    """TopK from other starting weights, on rows in another order."""
    return {
        f"topk seed {seed}": CoderPlan(
            f"topk seed {seed}", "topk", {**topk_plan(job.d_sae, job.k).arguments, "seed": seed}
        )
        for seed in range(1, job.seeds)
    }


def trained(
    job: Job, store: Store, point: str, tokens: str, wanted: Mapping[str, CoderPlan], out: Path
) -> dict[str, SparseCoder]:
    n_learn = learning_images(store)
    found: dict[str, SparseCoder] = {}
    for name, plan in wanted.items():
        seed = plan.arguments.get("seed", 0)
        batch_size = min(job.batch_size, 256) if tokens == "cls" else job.batch_size
        reader = {"tokens": tokens, "batch_size": batch_size, "seed": seed}
        source = store.reader(point, images=(0, n_learn), **reader)
        held_out = store.reader(point, images=(n_learn, store.n_images), prefetch=0, **reader)
        coder = make_coder(plan.architecture, d_in=source.d_in, **plan.arguments)
        with told(f"{layer_of(point)} {tokens} {name}"):
            result = train(
                coder,
                source,
                out / "coders" / f"{layer_of(point)}-{tokens}" / name.replace(" ", "-"),
                config=job.cls_config if tokens == "cls" else job.config,
                held_out=held_out,
                metadata=coder_about(store, point, tokens),
            )
        found[name] = result.coder
    return found


def learning_images(store: Store) -> int:
    return store.n_images - max(1, round(HELD_OUT * store.n_images))


def without_ranking(coders: Mapping[str, SparseCoder]) -> dict[str, SparseCoder]:
    """The same TopK and Matryoshka weights with every positive latent on, as MSAE's code and tables use both."""
    found: dict[str, SparseCoder] = {}
    for name in ("topk", "matryoshka"):
        if name not in coders:
            continue
        coder = coders[name]
        other = {"inference": "relu"} if isinstance(coder, TopK) else {"inference_k": None}
        again = make_coder(coder.name, **{**coder.config, **other})
        again.load_state_dict(coder.state_dict())
        found[f"{name}, all positive"] = again.eval()
    return found


def measured(
    job: Job, store: Store, point: str, tokens: str, coders: Mapping[str, SparseCoder], out: Path
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of every metric; and explained variance of each coder less that of the first, image by image.

    Controls stand beside the first coder: at one L0 and one d_sae the others have the same, but for "untrained".
    """
    path = out / f"{layer_of(point)}-{tokens}.jsonl"
    first = next(iter(coders))
    n_learn = learning_images(store)
    reader = store.reader(point, tokens=tokens, images=(0, n_learn), batch_size=CONTROL_ROWS, prefetch=0)
    options: dict[str, Any] = {"point": point, "tokens": tokens, "head": job.head, "limit": job.limit}
    asked = request_of(job.backbone, job.eval_images, coders, {**options, "metrics": ["all"]})
    if path.is_file():
        rows = read_rows(path)
        if rows and "paired" in rows[0] and all(row["request"] == asked for row in rows):
            return rows, compared_with(first, rows)
    metrics = [kind.make for kind in chosen("all").values()]
    if tokens == "cls" and job.groups is not None:
        with told(f"{layer_of(point)} linear probe"):
            probe = cls_probe(store, point, job.groups, n_learn)
        logger.info("probe: macro F1 %.3f on a tenth of its rows, %d epochs", probe.validation_f1, probe.n_epochs)
        groups = job.groups if job.eval_groups else None
        metrics.append(lambda setting: GroupProbe(setting, probe=probe, groups=groups))
    told_rows: list[Row] = []
    controlled_name = first if tokens in job.controls else None
    for controlled in (True, False):
        some = {name: coder for name, coder in coders.items() if (name == controlled_name) == controlled}
        if not some:
            continue
        with told(f"{layer_of(point)} {tokens} table of {', '.join(some)}{' and controls' if controlled else ''}"):
            told_rows += prisma_table(
                job.backbone,
                job.eval_images,
                some,
                control_sample=next(iter(reader)) if controlled else None,
                metrics=metrics,
                n_workers=job.n_workers,
                **options,
            )
    rows = [{**row.to_json(), "request": asked} for row in with_pairs(told_rows)]
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return rows, compared_with(first, rows)


def compared_with(first: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Explained variance of each coder less that of the first, over the same images."""
    return {row["name"]: row["paired"][first]["explained_variance"] for row in rows if first in row.get("paired", {})}


def cls_probe(store: Store, point: str, groups: Callable[[int], int], n_images: int) -> LinearProbe:
    """A probe of coarse classes on the CLS rows that the coders learn from."""
    x = torch.cat([rows[:, 0] for _, rows in store.image_batches(point, "cls")])[:n_images]
    labels = torch.tensor([groups(int(label)) for label in store.images()["label"][:n_images]])
    return fit_linear_probe(x, labels, n_classes=int(labels.max()) + 1, batch_size=64)


class GroupProbe(ProbeAgreement):
    """`groups`: what the images' labels are to the probe; None: nothing, and accuracies are left out."""

    def __init__(self, setting: Setting, *, probe: LinearProbe, groups: Callable[[int], int] | None) -> None:
        super().__init__(setting, probe=probe)
        self._groups = groups

    def update(self, seen: Seen) -> None:
        labels = seen.labels if self._groups is not None else None
        if labels is not None and self._groups is not None:
            labels = torch.tensor([self._groups(int(label)) for label in labels])
        super().update(replace(seen, labels=labels))


def stability_of(one: SparseCoder, two: SparseCoder) -> dict[str, Any]:
    return {name: value.to_json() for name, value in Stability([one, two]).compute().items()}


# --------------------------------------------------------------------------------------------------------- what is left


def write_tables(rows: list[dict[str, Any]], out: Path) -> None:
    text: list[str] = []
    for (point, tokens), group in itertools.groupby(rows, key=lambda row: (row["point"], row["tokens"])):
        table = [{key: value for key, value in row.items() if key != "point"} for row in group]  # shorter names
        one = table[0]
        text.append(f"## {one['backbone']}, {point}, {tokens} tokens, {one['n_images']} images\n")
        for layout in LAYOUTS:
            text.append(f"### {layout}\n\n{paper_table(table, layout, intervals=not layout.endswith('published'))}")
        figures(table, out / "figures" / f"{layer_of(point)}-{tokens}")
    with replacing(out / "tables.md") as temporary:
        temporary.write_text("\n".join(text), encoding="utf-8")


def layer_of(point: str) -> str:
    return ".".join(point.split(".")[:2])


def write_json(path: Path, found: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(found, indent=1))


@contextmanager
def told(what: str) -> Iterator[None]:
    began, cpu = time.perf_counter(), time.process_time()
    yield
    logger.info("%s: %.1f s, %.1f of CPU", what, time.perf_counter() - began, time.process_time() - cpu)


if __name__ == "__main__":
    main()
