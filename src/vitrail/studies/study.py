"""A study from one file: backbones x coders x seeds, every cell trained and measured once.

    plan = read_plan("study.yaml")          or .json
    rows = run_study(plan, "OUT", measure=...)

    OUT/stores/BACKBONE/NAME        activations of each image set, extracted once
    OUT/cells/BACKBONE/CODER/SEED   the coder, and row.json: what was measured, with the digest of all that decides it
    OUT/rows.jsonl                  one row a cell, in the plan's order

Killed at any moment and run again, it goes on: extraction, training and finished cells are kept. A cell whose coder is
another (another dial, other pictures) is trained again, one that is only measured otherwise is measured again, and the
others stand. `estimate(plan)` says what it will cost before anything starts.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.backbones import Backbone, load
from vitrail.coders import SparseCoder, make_coder
from vitrail.files import json_digest, read_json, replacing, tensors_digest, write_json
from vitrail.images import open_images
from vitrail.memory import reused_memory
from vitrail.metrics.measured import Measured
from vitrail.metrics.passing import Curve, finite
from vitrail.progress import SILENT, Progress
from vitrail.provenance import VERSION, peak_memory_mb, provenance
from vitrail.store import Store, extract
from vitrail.studies.first_look import coder_about
from vitrail.training import TrainConfig, train


@dataclass(frozen=True, kw_only=True)
class BackbonePlan:
    name: str  # as `load` takes it
    point: str
    tokens: str = "spatial"
    weights: str | None = None
    image_px: int | None = None
    evaluator: str | None = None  # another backbone, by name, whose embeddings judge this one's latents (M5)

    @property
    def folder(self) -> str:
        return self.name.replace("/", "-").replace("@", "-")


@dataclass(frozen=True, kw_only=True)
class StudyCoder:
    name: str
    architecture: str
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of the constructor, but d_in and seed
    lr: float | None = None


@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """`images`: sets by name; "train" is learnt from, "test" measured, others are other domains."""

    backbones: tuple[BackbonePlan, ...]
    coders: tuple[StudyCoder, ...]
    images: Mapping[str, str]
    seeds: tuple[int, ...] = (0,)
    title: str = ""
    batch_size: int = 4096
    training: Mapping[str, Any] = field(default_factory=dict)  # of TrainConfig
    options: Mapping[str, Any] = field(default_factory=dict)  # of the study's measures

    def __post_init__(self) -> None:
        for needed in ("train", "test"):
            if needed not in self.images:
                raise ValueError(f"images must have a {needed!r} set, got {', '.join(self.images) or 'none'}.")
        called = {"backbones": [one.name for one in self.backbones], "coders": [one.name for one in self.coders]}
        for what, names in called.items():
            if not names:
                raise ValueError(f"a study needs {what}: name at least one.")
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise ValueError(f"two {what} are called {twice!r}: give them different names.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different numbers, at least one, got {list(self.seeds)}.")
        self.config  # noqa: B018 (raises for what TrainConfig does not take)

    @property
    def config(self) -> TrainConfig:
        return _made(TrainConfig, self.training, "training")

    def cells(self) -> Iterator[tuple[BackbonePlan, StudyCoder, int]]:
        for backbone in self.backbones:
            for coder in self.coders:
                for seed in self.seeds:
                    yield backbone, coder, seed

    @property
    def n_cells(self) -> int:
        return len(self.backbones) * len(self.coders) * len(self.seeds)


def read_plan(path: str | Path) -> StudyPlan:
    """Raises ValueError for a key that there is not, naming those there are."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: it should say what to study.")
    text = path.read_text(encoding="utf-8")
    told = json.loads(text) if path.suffix == ".json" else _from_yaml(text, path)
    if not isinstance(told, Mapping):
        raise ValueError(f"{path} must hold names and values, as backbones: [...].")
    told = dict(told)
    for key, kind in (("backbones", BackbonePlan), ("coders", StudyCoder)):
        told[key] = tuple(_made(kind, one, f"{key} of {path.name}") for one in told.get(key) or ())
    told["seeds"] = tuple(told.get("seeds", (0,)))
    return _made(StudyPlan, told, path.name)


def _made(kind: Any, told: Mapping[str, Any], where: str) -> Any:
    known = {one.name for one in fields(kind)}
    strange = next((key for key in told if key not in known), None)
    if strange is not None:
        raise ValueError(f"{where} has no {strange!r}. Known: {', '.join(sorted(known))}.")
    try:
        return kind(**told)
    except TypeError as error:
        raise ValueError(f"{where}: {error}.") from error


def _from_yaml(text: str, path: Path) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError('a study in YAML needs pyyaml: pip install "vitrail[study]". JSON does not.') from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML that can be read: {error}.") from error


# ------------------------------------------------------------------------------------------------------------ running


@dataclass(frozen=True, eq=False)
class Cell:
    """What a measure is given: a trained coder, and the stores of every image set, all of one backbone."""

    plan: StudyPlan
    backbone: Backbone
    place: BackbonePlan
    coder_plan: StudyCoder
    seed: int
    coder: SparseCoder
    stores: Mapping[str, Store]
    shared: dict[str, Any]  # what measures of one backbone work out once: kept from cell to cell

    def batches(self, name: str, *, n_images: int = 64) -> Iterator[tuple[int, Float[Tensor, "b t d_in"]]]:
        """(first row of the image table, activations) of an image set, in the store's order."""
        store = self.stores[name]
        tokens = store.kind(self.place.point, self.place.tokens)
        yield from store.image_batches(self.place.point, tokens, n_images=n_images)

    def labels(self, name: str) -> np.ndarray:
        """(n_images,), in the store's order. Raises ValueError where there are none."""
        table = self.stores[name].images()
        labels = table["label"][: self.stores[name].n_images]
        if any(label is None for label in labels.tolist()):
            raise ValueError(f"the images of {name!r} have no labels, which this measure needs.")
        return np.asarray(labels, dtype=np.int64)


CellMeasure = Callable[[Cell], tuple[dict[str, Measured], dict[str, Curve]]]


@reused_memory()
def run_study(
    plan: StudyPlan,
    out: str | Path,
    *,
    measure: CellMeasure,
    version: str,
    device: torch.device | str = "cpu",
    n_workers: int = 0,
    progress: Progress = SILENT,
) -> list[dict[str, Any]]:
    """The rows of OUT/rows.jsonl. `version`: of the measure; a cell measured by another is measured again."""
    out, rows = Path(out), []
    write_json(out / "plan.json", plan_to_json(plan))
    with progress.task("cells", plan.n_cells, "cells") as task:
        for place in plan.backbones:
            backbone = load(place.name, weights=place.weights, image_px=place.image_px, device=device)
            stores = {
                name: extract(
                    backbone,
                    open_images(spec),
                    [place.point],
                    out / "stores" / place.folder / name,
                    tokens=place.tokens,
                    n_workers=n_workers,
                    progress=progress,
                )
                for name, spec in plan.images.items()
            }
            shared: dict[str, Any] = {}
            for coder_plan in plan.coders:
                for seed in plan.seeds:
                    folder = out / "cells" / place.folder / coder_plan.name / f"seed{seed}"
                    digest = cell_digest(plan, place, coder_plan, seed, backbone, stores, version)
                    row = _kept(folder / "row.json", digest)
                    if row is None:
                        row = _run_cell(
                            plan, place, coder_plan, seed, folder, digest,
                            backbone=backbone, stores=stores, shared=shared, measure=measure, progress=progress,
                        )  # fmt: skip
                    rows.append(row)
                    task.advance(1)
    with replacing(out / "rows.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return rows


def cell_digest(
    plan: StudyPlan,
    place: BackbonePlan,
    coder_plan: StudyCoder,
    seed: int,
    backbone: Backbone,
    stores: Mapping[str, Store],
    version: str,
) -> str:
    """Of all that decides a cell's row."""
    return json_digest(
        {
            "coder": coder_digest(plan, place, coder_plan, seed, backbone, stores),
            "images": {name: store.digest for name, store in stores.items()},
            "evaluator": place.evaluator,
            "options": dict(plan.options),
            "measure": version,
        }
    )


def coder_digest(
    plan: StudyPlan,
    place: BackbonePlan,
    coder_plan: StudyCoder,
    seed: int,
    backbone: Backbone,
    stores: Mapping[str, Store],
) -> str:
    """Of all that decides a cell's coder."""
    return json_digest(
        {
            "backbone": [backbone.digest, place.point, place.tokens],
            "coder": [coder_plan.architecture, dict(coder_plan.arguments), coder_plan.lr, seed],
            "training": [dict(plan.training), plan.batch_size],
            "rows": stores["train"].digest,
            "vitrail": VERSION,
        }
    )


def _kept(path: Path, digest: str) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    row = read_json(path, "row of a study")
    return row if row.get("cell") == digest else None


def _run_cell(
    plan: StudyPlan,
    place: BackbonePlan,
    coder_plan: StudyCoder,
    seed: int,
    folder: Path,
    digest: str,
    *,
    backbone: Backbone,
    stores: Mapping[str, Store],
    shared: dict[str, Any],
    measure: CellMeasure,
    progress: Progress,
) -> dict[str, Any]:
    config = replace(plan.config, seed=seed)
    config = config if coder_plan.lr is None else replace(config, lr=coder_plan.lr)
    source = stores["train"].reader(place.point, tokens=place.tokens, batch_size=plan.batch_size, seed=seed)
    coder = make_coder(coder_plan.architecture, d_in=source.d_in, **{**coder_plan.arguments, "seed": seed})
    asked = coder_digest(plan, place, coder_plan, seed, backbone, stores)
    said = folder / "asked.json"
    if said.is_file() and read_json(said, "what a cell was asked") != asked:
        shutil.rmtree(folder)  # another coder was trained here: its checkpoints are of no use
    write_json(said, asked)
    began = time.monotonic()
    coder = train(
        coder.to(next(backbone.parameters()).device),
        source,
        folder / "coder",
        config=config,
        metadata=coder_about(stores["train"], place.point, place.tokens),
        progress=progress,
    ).coder
    trained = time.monotonic()
    cell = Cell(plan, backbone, place, coder_plan, seed, coder.eval(), stores, shared)
    measured, curves = measure(cell)
    row = {
        "name": f"{place.name} / {coder_plan.name}#{seed}",
        "control_of": None,
        "backbone": place.name,
        "backbone_digest": backbone.digest,
        "point": place.point,
        "tokens": place.tokens,
        "coder": coder_plan.name,
        "architecture": coder.name,
        "seed": seed,
        "d_in": coder.d_in,
        "d_sae": coder.d_sae,
        "config": coder.config,
        "coder_digest": tensors_digest(coder.state_dict()),
        "measured": {name: one.to_json() for name, one in measured.items()},
        "curves": finite(curves),
        "cost": {
            "train_seconds": round(trained - began, 2),
            "measure_seconds": round(time.monotonic() - trained, 2),
            "peak_memory_mb": round(peak_memory_mb()),
        },
        "provenance": provenance(),
        "cell": digest,
    }
    write_json(folder / "row.json", row)
    return row


def plan_to_json(plan: StudyPlan) -> dict[str, Any]:
    return {
        "title": plan.title,
        "backbones": [{one.name: getattr(place, one.name) for one in fields(place)} for place in plan.backbones],
        "coders": [
            {"name": c.name, "architecture": c.architecture, "arguments": dict(c.arguments), "lr": c.lr}
            for c in plan.coders
        ],
        "images": dict(plan.images),
        "seeds": list(plan.seeds),
        "batch_size": plan.batch_size,
        "training": dict(plan.training),
        "options": dict(plan.options),
    }


# ---------------------------------------------------------------------------------------------------------- estimates

# Products a second, of fp32 multiply-adds counted as two: a laptop's core, this many cores, one large card in bf16.
DEVICES = {"1 core": 8e10, "16 cores": 1e12, "1 GPU": 2e14}


def estimate(plan: StudyPlan) -> list[dict[str, Any]]:
    """A row for each backbone: images, tokens, bytes on disk, FLOPs of extraction and of training, hours by device.

    Backbones are built with random weights where the real ones would have to be fetched; nothing is extracted.
    """
    out = []
    n_images = {name: len(open_images(spec)) for name, spec in plan.images.items()}
    for place in plan.backbones:
        backbone = load(place.name, weights=place.weights, image_px=place.image_px)
        grid, width = backbone.grid, backbone.point(place.point).width
        kind = place.tokens if place.tokens in ("all", "spatial", "cls") else "cls"
        tokens = len(range(grid.n_tokens)[grid.tokens(kind)]) if backbone.point(place.point).has_tokens else 1
        weights = sum(weight.numel() for weight in backbone.parameters())
        total = sum(n_images.values())
        rows = plan.config.total_rows(n_images["train"] * tokens)
        forward = 2.0 * weights * grid.n_tokens * total
        training = sum(
            # encoder product forward and its two gradients where latents are found densely: about 6 d d_sae a row
            6.0 * width * int(coder.arguments.get("d_sae", 8 * width)) * rows * len(plan.seeds)
            for coder in plan.coders
        )
        out.append(
            {
                "backbone": place.name,
                "images": total,
                "tokens": total * tokens,
                "bytes": 2 * total * tokens * width,
                "extract_flops": forward,
                "train_flops": training,
                "hours": {name: (forward + training) / speed / 3600 for name, speed in DEVICES.items()},
            }
        )
    return out


def by_setting(rows: Sequence[Mapping[str, Any]], measure: str) -> dict[tuple[str, str], float]:
    """Mean over seeds of a measure, by (backbone, coder); cells without the number are left out."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        value = row["measured"].get(measure, {}).get("value")
        if value is not None:
            found.setdefault((row["backbone"], row["coder"]), []).append(value)
    return {key: float(np.mean(values)) for key, values in found.items()}
