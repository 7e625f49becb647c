"""A study from one file: backbones x coders x seeds, every cell trained and measured once.

    plan = read_plan("study.yaml")          or .json
    rows = run_study(plan, "OUT", measure=...)

    OUT/stores/MODEL/NAME           activations of each image set at all points of a model, extracted once
    OUT/cells/BACKBONE/CODER/SEED   the coder, and row.json: what was measured, with the digest of all that decides it
    OUT/rows.jsonl                  one row a cell, in the plan's order

Killed at any moment and run again, it goes on: extraction, training and finished cells are kept. A cell whose coder is
another (another dial, other pictures) is trained again, one that is only measured otherwise is measured again, and the
others stand. `only` runs some of the backbones, so that several processes or machines may share OUT; a run of all then
finds their cells finished. `estimate(plan)` (study_estimate.py) says what it will cost before anything starts.
"""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.backbones import Backbone
from vitrail.coders import SparseCoder, load_coder, make_coder
from vitrail.files import json_digest, read_json, replacing, tensors_digest, write_json
from vitrail.images import open_images
from vitrail.metrics.measured import Measured
from vitrail.metrics.passing import Curve, finite
from vitrail.progress import SILENT, Progress
from vitrail.provenance import VERSION, peak_memory_mb, provenance
from vitrail.store import Store, extract
from vitrail.studies.first_look import coder_about
from vitrail.studies.prisma_controls import controls_of
from vitrail.studies.study_plan import BackbonePlan, StudyCoder, StudyPlan, plan_to_json, store_folder, training_of
from vitrail.training import train

CONTROL_ROWS = 20_000
EMBEDDING = "hook_image_embed"
OF_THE_REPORT = ("hypotheses",)  # options that no cell depends on


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
    judges: Mapping[str, Store] = field(default_factory=dict)  # of evaluators in the plan: "test" with its embeddings
    folder: Path | None = None  # where a measure may leave tables of its own
    seconds: dict[str, float] = field(default_factory=dict)  # by metric, should the measure say

    def batches(self, name: str, *, n_images: int = 64) -> Iterator[tuple[int, Float[Tensor, "b t d_in"]]]:
        """(first row of the image table, activations) of an image set, in the store's order."""
        store = self.stores[name]
        tokens = store.kind(self.place.point, self.place.tokens)
        yield from store.image_batches(self.place.point, tokens, n_images=n_images)

    def labels(self, name: str) -> np.ndarray:
        """(n_images,), in the store's order. Raises ValueError where there are none."""
        table = self.stores[name].images()
        labels = table["label"][: self.stores[name].n_images]
        if any(label is None or label != label for label in labels.tolist()):  # NaN where a table has none at all
            raise ValueError(f"the images of {name!r} have no labels, which this measure needs.")
        return np.asarray(labels, dtype=np.int64)


CellMeasure = Callable[[Cell], tuple[dict[str, Measured], dict[str, Curve]]]


def run_study(
    plan: StudyPlan,
    out: str | Path,
    *,
    measure: CellMeasure,
    version: str,
    only: Sequence[str] = (),
    device: torch.device | str = "cpu",
    n_workers: int = 0,
    progress: Progress = SILENT,
) -> list[dict[str, Any]]:
    """The rows of OUT/rows.jsonl. `version`: of the measure; a cell measured by another is measured again.

    `only`: backbones, by label; rows.jsonl is then left alone. Raises ValueError for a label that there is not.
    """
    labels = [place.shown for place in plan.backbones]
    strange = next((label for label in only if label not in labels), None)
    if strange is not None:
        raise ValueError(f"there is no backbone {strange!r} in the plan. There are {', '.join(labels)}.")
    out, found = Path(out), {}
    write_json(out / "plan.json", plan_to_json(plan))
    wanted = [cell for cell in plan.cells() if not only or cell[0].shown in only]
    stores, judges = _extract_all(plan, {cell[0].shown for cell in wanted}, out, device, n_workers, progress)
    with progress.task("cells", len(wanted), "cells") as task:
        for places in plan.models():
            here = [cell for cell in wanted if cell[0] in places]
            if not here:
                continue
            backbone = places[0].loaded(device)
            shared: dict[str, dict[str, Any]] = {place.shown: {} for place in places}
            for place, coder_plan, seed in here:
                run = Run(plan, place, coder_plan, seed, backbone, stores[place.shown], judges, out)
                found[place.shown, coder_plan.name, seed] = run.row(measure, version, shared[place.shown], progress)
                task.advance(1)
    rows = [found[place.shown, coder.name, seed] for place, coder, seed in wanted]
    if not only:
        with replacing(out / "rows.jsonl") as temporary:
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            temporary.write_text("".join(lines), encoding="utf-8")
    return rows


def _extract_all(
    plan: StudyPlan,
    wanted: set[str],
    out: Path,
    device: torch.device | str,
    n_workers: int,
    progress: Progress,
) -> tuple[dict[str, dict[str, Store]], dict[str, Store]]:
    """(stores by backbone and image set, of evaluators in the plan that of "test" with their image embeddings)."""
    stores: dict[str, dict[str, Store]] = {}
    judges: dict[str, Store] = {}
    asked = {place.evaluator for place in plan.backbones if place.shown in wanted} | {plan.common_evaluator}
    for places in plan.models():
        labels = {place.shown for place in places}
        whole = bool(labels & wanted)
        if not whole and not labels & asked:
            continue
        backbone = places[0].loaded(device)
        points = list(dict.fromkeys(place.point for place in places))
        # Whatever is wanted now: another run of the same plan finds the same stores.
        judging = labels & ({place.evaluator for place in plan.backbones} | {plan.common_evaluator})
        found = {
            name: extract(
                backbone,
                open_images(spec),
                [*points, EMBEDDING] if judging and name == "test" and EMBEDDING not in points else points,
                out / "stores" / store_folder(places) / name,
                tokens=places[0].tokens,
                n_workers=n_workers,
                progress=progress,
            )
            for name, spec in plan.images.items()
            if whole or name == "test"
        }
        stores |= dict.fromkeys(labels & wanted, found)
        judges |= dict.fromkeys((label for label in judging if label), found["test"])
    return stores, judges


@dataclass(frozen=True, eq=False)
class Run:
    """One cell, before and while it runs."""

    plan: StudyPlan
    place: BackbonePlan
    coder_plan: StudyCoder
    seed: int
    backbone: Backbone
    stores: Mapping[str, Store]
    judges: Mapping[str, Store]
    out: Path

    @property
    def folder(self) -> Path:
        return self._folder_of(self.coder_plan)

    def _folder_of(self, coder_plan: StudyCoder) -> Path:
        return self.out / "cells" / self.place.folder / coder_plan.name / f"seed{self.seed}"

    def row(
        self, measure: CellMeasure, version: str, shared: dict[str, Any], progress: Progress = SILENT
    ) -> dict[str, Any]:
        """That of OUT/cells/.../row.json, where its digest is this cell's; otherwise the cell is run."""
        digest, path = self.digest(version), self.folder / "row.json"
        if path.is_file() and (kept := read_json(path, "row of a study")).get("cell") == digest:
            return kept
        coder, train_seconds = self._coder(progress)
        cell = Cell(
            self.plan, self.backbone, self.place, self.coder_plan, self.seed,
            coder.eval(), self.stores, shared, self.judges, self.folder,
        )  # fmt: skip
        began = time.monotonic()
        measured, curves = measure(cell)
        cost = {
            "train_seconds": train_seconds,
            "measure_seconds": round(time.monotonic() - began, 2),
            "seconds_by_metric": {name: round(seconds, 3) for name, seconds in cell.seconds.items()},
            "peak_memory_mb": round(peak_memory_mb()),
        }
        row = self._described(coder) | {
            "measured": {name: one.to_json() for name, one in measured.items()},
            "curves": finite(curves),
            "cost": cost,
            "provenance": provenance(),
            "cell": digest,
        }
        write_json(path, row)
        return row

    def _described(self, coder: SparseCoder) -> dict[str, Any]:
        place, named = self.place, re.match(r"blocks\.(\d+)\.", self.place.point)
        control = self.coder_plan.control_of
        return {
            "name": f"{place.shown} / {self.coder_plan.name}#{self.seed}",
            "control_of": control,
            "role": "control" if control else place.role,
            "backbone": place.shown,
            "model": place.name if place.random is None else f"{place.name}, random weights of seed {place.random}",
            "backbone_digest": self.backbone.digest,
            "point": place.point,
            "layer": int(named[1]) if named else None,
            "tokens": place.tokens,
            "coder": self.coder_plan.name,
            "architecture": coder.name,
            "seed": self.seed,
            "d_in": coder.d_in,
            "d_sae": coder.d_sae,
            "expansion": coder.d_sae / coder.d_in,
            "k": self.coder_plan.k,
            "config": coder.config,
            "coder_digest": tensors_digest(coder.state_dict()),
        }

    def digest(self, version: str) -> str:
        """Of all that decides the row."""
        plan = self.plan
        seen_by = [self.place.evaluator, plan.common_evaluator]
        return json_digest(
            {
                "coder": self.coder_digest(),
                "images": {name: store.digest for name, store in self.stores.items()},
                "masks": dict(plan.masks),
                "evaluators": [[name, _weights_of(plan, name)] for name in seen_by],
                "options": {key: value for key, value in plan.options.items() if key not in OF_THE_REPORT},
                "measure": version,
            }
        )

    def coder_digest(self, coder_plan: StudyCoder | None = None) -> str:
        """Of all that decides the coder."""
        coder_plan = self.coder_plan if coder_plan is None else coder_plan
        said: dict[str, Any] = {
            "backbone": [self.backbone.digest, self.place.point, self.place.tokens],
            "coder": [coder_plan.architecture, dict(coder_plan.arguments), coder_plan.lr, self.seed],
            "training": [dict(self.plan.training), self.plan.batch_size],
            "rows": self.stores["train"].digest,
            "vitrail": VERSION,
        }
        if coder_plan.control_of is not None:
            said["control_of"] = self.coder_digest(self._reference)
        return json_digest(said)

    @property
    def _reference(self) -> StudyCoder:
        return next(one for one in self.plan.coders if one.name == self.coder_plan.control_of)

    def _coder(self, progress: Progress) -> tuple[SparseCoder, float]:
        """Trained, or found as it was trained before, with the seconds that it took then."""
        folder, said, asked = self.folder, self.folder / "asked.json", self.coder_digest()
        if said.is_file() and read_json(said, "what a cell was asked") != asked:
            shutil.rmtree(folder)  # another coder was trained here: its checkpoints are of no use
        write_json(said, asked)
        took = folder / "trained.json"
        before = float(read_json(took, "time of training")["seconds"]) if took.is_file() else None
        began = time.monotonic()
        coder = self._control() if self.coder_plan.control_of else self._trained(progress)
        seconds = round(time.monotonic() - began, 2) if before is None else before
        if before is None:
            write_json(took, {"seconds": seconds})
        return coder, seconds

    def _trained(self, progress: Progress) -> SparseCoder:
        plan, place = self.plan, self.place
        source = self.stores["train"].reader(
            place.point, tokens=place.tokens, batch_size=plan.batch_size, seed=self.seed
        )
        arguments = {**self.coder_plan.arguments_at(source.d_in), "seed": self.seed}
        coder = make_coder(self.coder_plan.architecture, d_in=source.d_in, **arguments)
        return train(
            coder.to(next(self.backbone.parameters()).device),
            source,
            self.folder / "coder",
            config=training_of(plan, self.coder_plan, self.seed),
            metadata=coder_about(self.stores["train"], place.point, place.tokens),
            progress=progress,
        ).coder

    def _control(self) -> SparseCoder:
        """Fitted anew each time, which takes seconds, at the L0 that the coder it stands beside was asked for, or has
        on the rows it is fitted on."""
        reference, place = self._reference, self.place
        path = self._folder_of(reference) / "coder"
        if not path.is_dir():
            raise FileNotFoundError(f"{self.coder_plan.name} stands beside {reference.name}, which is not in {path}.")
        coder = load_coder(path).to(next(self.backbone.parameters()).device).eval()
        reader = self.stores["train"].reader(
            place.point, tokens=place.tokens, batch_size=CONTROL_ROWS, prefetch=0, seed=self.seed
        )
        sample = next(iter(reader)).to(coder.W_dec)
        with torch.no_grad():
            k = reference.k or max(1, round(float(coder.encode_sparse(sample).l0().double().mean())))
        return controls_of(coder, sample, k=k)[0][self.coder_plan.architecture]


def _weights_of(plan: StudyPlan, evaluator: str | None) -> list[Any] | None:
    place = None if evaluator is None else plan.place(evaluator)
    return None if place is None else list(place.model)


def by_setting(rows: Sequence[Mapping[str, Any]], measure: str) -> dict[tuple[str, str], float]:
    """Mean over seeds of a measure, by (backbone, coder); cells without the number are left out."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        value = row["measured"].get(measure, {}).get("value")
        if value is not None:
            found.setdefault((row["backbone"], row["coder"]), []).append(value)
    return {key: float(np.mean(values)) for key, values in found.items()}
