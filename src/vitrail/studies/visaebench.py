"""ViSAEBench's metrics of one cell of a study, from stored activations: one pass and one encoding of each image set.

    M1 spatial coherence   M2 FVU   M3 preservation   M4 sparse probing   M5 monosemanticity   M6 other domains
    M7 absorption          and what features are good for: visaebench_tasks.py

ViSAEBench (docs/visaebench.md); SPEC rows 63 to 87. M5 needs an `evaluator` in the plan's backbone (and the plan's
`common_evaluator` for a column in which all backbones are judged alike), M6 another labelled image set, M7 groups of
sibling classes: a world's, ImageNet's where classes are called by their wnids, or those of the option `wnids`. What a
cell cannot have is left out.
"""

import csv
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.files import replacing
from vitrail.images import open_images
from vitrail.images.loader import load_batches
from vitrail.metrics.absorption import Absorption
from vitrail.metrics.cross_domain import CrossDomain, Domain
from vitrail.metrics.dead import Dead
from vitrail.metrics.hierarchies import imagenet_groups
from vitrail.metrics.measured import Measured
from vitrail.metrics.monosemanticity import Monosemanticity
from vitrail.metrics.moran import RawCoherence, SpatialCoherence
from vitrail.metrics.passing import Curve, Metric, Seen, Setting
from vitrail.metrics.preservation import Preservation, Probes
from vitrail.metrics.sparse_probing import SparseProbing
from vitrail.store import Store
from vitrail.store.tokens import patch_slice
from vitrail.studies.prisma_pass import CountsLatents, Reconstructs
from vitrail.studies.study import EMBEDDING, Cell
from vitrail.studies.visaebench_tasks import linear_task, retrieval_task, segmentation_task

VERSION = "2"  # raised when a cell's numbers change though its coder and pictures do not
SHIFT_ROWS = 4096
COMMON = "monosemanticity_common"
Options = Mapping[str, Any]


def measure(cell: Cell) -> tuple[dict[str, Measured], dict[str, Curve]]:
    """Every metric that the cell's pictures and plan allow. Options: `n_bootstrap`, each metric's own under its name,
    `skip` (names of metrics and tasks), `wnids`."""
    asked = _Asked(cell)
    setting = setting_of(cell, "test")
    metrics = {name: made for name in METRICS if (made := asked.metric(name, setting)) is not None}
    home = CrossDomain(setting) if asked.wants("tasks", "cross_domain") and asked.labels("test") is not None else None
    seen_by = metrics | ({"domain": home} if home is not None else {})
    measured, curves = _pass(asked, "test", setting, seen_by, metrics)
    if isinstance(coherence := metrics.get("spatial_coherence"), SpatialCoherence) and cell.folder is not None:
        _write_latents(coherence, cell.folder / "latents.csv")
    if home is not None:
        at_home = home.domain()
        measured |= asked.tasks("test", at_home.standardized(at_home))
        for name in cell.plan.images:
            if name not in ("train", "test") and asked.labels(name) is not None:
                measured |= _elsewhere(asked, name, at_home)
    for name, masks in cell.plan.masks.items():
        if asked.wants("tasks", "segmentation"):
            with asked.timed("segmentation"):
                options = dict(asked.options.get("segmentation", {}))
                measured |= segmentation_task(cell, name, masks, **options, **asked.drawn)
    return measured, curves


def _pass(
    asked: "_Asked", name: str, setting: Setting, shown: Mapping[str, Metric], computed: Mapping[str, Metric]
) -> tuple[dict[str, Measured], dict[str, Curve]]:
    cell, labels = asked.cell, asked.labels(name)
    with torch.inference_mode():
        batches = cell.batches(name)
        while True:
            with asked.timed("reading"):
                first, x = next(batches, (0, None))
            if x is None:
                break
            with asked.timed("encoding and decoding"):
                x = x.to(cell.coder.W_dec)
                codes = cell.coder.encode_sparse(x.flatten(0, 1))
                x_hat = cell.coder.decode_sparse(codes).reshape(x.shape)
            known = None if labels is None else torch.from_numpy(labels[first : first + len(x)])
            seen = Seen(x=x, target=x, codes=codes, x_hat=x_hat, labels=known)
            for metric_name, metric in shown.items():
                with asked.timed(metric_name):
                    metric.update(seen)
    measured: dict[str, Measured] = {}
    curves: dict[str, Curve] = {}
    for metric_name, metric in computed.items():
        with asked.timed(metric_name):
            found = metric.compute(**asked.drawn)
            measured |= _common(found) if metric_name == COMMON else found
            curves |= {} if metric_name == COMMON else metric.curves()
    return measured, curves


def _elsewhere(asked: "_Asked", name: str, home: Domain) -> dict[str, Measured]:
    """M6 and the tasks on another image set, names ending in @NAME."""
    measured: dict[str, Measured] = {}
    setting = setting_of(asked.cell, name)
    metric = CrossDomain(setting, home=home, **asked.options.get("cross_domain", {}))
    computed = {"cross_domain": metric} if asked.wants("cross_domain") else {}
    measured |= {
        f"{key}@{name}": one for key, one in _pass(asked, name, setting, {"cross_domain": metric}, computed)[0].items()
    }
    return measured | asked.tasks(name, metric.domain().standardized(home))


def _common(found: Mapping[str, Measured]) -> dict[str, Measured]:
    kept = ("monosemanticity", "monosemanticity_baseline", "monosemanticity_normalized")
    return {name.replace("monosemanticity", COMMON): one for name, one in found.items() if name in kept}


@dataclass(eq=False)
class _Asked:
    """A cell with the options of its plan."""

    cell: Cell
    _labels: dict[str, np.ndarray | None] = field(default_factory=dict)

    @property
    def options(self) -> Options:
        return self.cell.plan.options

    @property
    def drawn(self) -> dict[str, int]:
        return {"n_bootstrap": int(self.options.get("n_bootstrap", 1000)), "seed": 0}

    def wants(self, *names: str) -> bool:
        skipped = self.options.get("skip", ())
        return not any(name in skipped for name in names)

    def metric(self, name: str, setting: Setting) -> Metric | None:
        if not self.wants(name):
            return None
        with self.timed(name):
            return METRICS[name](self, setting, dict(self.options.get(name, {})))

    def labels(self, name: str) -> np.ndarray | None:
        """None where there are none, or of one class only."""
        if name not in self._labels:
            try:
                found = self.cell.labels(name)
            except ValueError:
                found = None
            self._labels[name] = found if found is not None and len(set(found.tolist())) > 1 else None
        return self._labels[name]

    def tasks(self, name: str, domain: Domain) -> dict[str, Measured]:
        found: dict[str, Measured] = {}
        if not self.wants("tasks"):
            return found
        if name == "test" and self.wants("retrieval"):
            with self.timed("retrieval"):
                given: dict[str, Any] = {**self.options.get("retrieval", {}), **self.drawn}
                found |= retrieval_task(domain, self.cell.shared, **given)
        if self.wants("linear"):
            with self.timed("linear"):
                options = dict(self.options.get("linear", {}))
                found |= linear_task(domain, self.cell.shared, name, **options, **self.drawn)
        return found

    def groups(self) -> Mapping[str, Any] | None:
        """Of siblings, by the labels of "test"."""
        images = open_images(self.cell.plan.images["test"])
        own = getattr(images, "groups", None)
        if own:
            return own
        told = self.options.get("wnids")
        wnids = read_wnids(told) if told is not None else list(images.classes)
        if told is None and not all(_is_wnid(name) for name in wnids):
            return None
        return imagenet_groups(wnids) or None

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            seconds = self.cell.seconds
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began


def setting_of(cell: Cell, name: str) -> Setting:
    store = cell.stores[name]
    kind = store.kind(cell.place.point, cell.place.tokens)
    n_tokens, grid = store.tokens_per_image(cell.place.point, kind), store.manifest.grid
    has_cls = grid.n_cls > 0 and kind in ("all", "cls") and n_tokens in (1, grid.n_tokens)
    return Setting(
        coder=cell.coder,
        n_tokens=n_tokens,
        tokens=kind,
        grid=grid,
        cls_token=0 if has_cls else None,
        patches=patch_slice(grid, n_tokens) if kind in ("all", "spatial") else None,
        n_images=store.n_images,
        shift=_shift(cell),
        seed=0,
    )


def _shift(cell: Cell) -> Float[Tensor, " d_in"]:
    """A rough mean of training rows, the same for all coders of a backbone."""
    key = f"{cell.place.point}/shift"
    if key not in cell.shared:
        reader = cell.stores["train"].reader(
            cell.place.point, tokens=cell.place.tokens, batch_size=SHIFT_ROWS, prefetch=0
        )
        cell.shared[key] = next(iter(reader)).double().mean(0)
    return cell.shared[key]


def embeddings_of(cell: Cell, evaluator: str, *, batch_size: int = 64) -> Float[Tensor, "n_images d_embed"]:
    """What the evaluator makes of the pictures of "test", in the store's order: image embeddings, fp32.

    Those of a backbone of the plan were stored with its activations; another is run now, once for a backbone's cells.
    """
    key = f"embeddings/{evaluator}"
    if key in cell.shared:
        return cell.shared[key]
    store = cell.stores["test"]
    judge = cell.judges.get(evaluator)
    if judge is not None and _same_pictures(judge, store):
        parts = [part.flatten(1) for _, part in judge.image_batches(EMBEDDING, judge.kind(EMBEDDING, None))]
        cell.shared[key] = torch.cat(parts).float()
        return cell.shared[key]
    backbone, images = cell.plan.evaluator(evaluator), open_images(store.manifest.request["images"])
    positions = store.images()["position"][: store.n_images].tolist()
    parts = []
    with torch.inference_mode():
        for batch in load_batches(images, positions, backbone.preprocess, batch_size=batch_size):
            if batch.skipped:
                raise ValueError(f"{evaluator} could not read a picture that was stored: {batch.skipped[0]}.")
            parts.append(backbone.activations(batch.images, [EMBEDDING])[EMBEDDING].float())
    cell.shared[key] = torch.cat(parts)
    return cell.shared[key]


def _same_pictures(one: Store, other: Store) -> bool:
    """In the same order: a picture that one of the models could not read would shift them."""
    same = one.manifest.request["images_fingerprint"] == other.manifest.request["images_fingerprint"]
    positions = [store.images()["position"][: store.n_images].tolist() for store in (one, other)]
    return same and positions[0] == positions[1]


def read_wnids(told: Any) -> list[str]:
    """A list, or a file: a wnid a line, or JSON, a list of wnids or of objects with `label` and `wnid`."""
    if isinstance(told, str):
        path = Path(told)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: the option wnids names the file that says each label's wnid.")
        text = path.read_text(encoding="utf-8")
        told = json.loads(text) if path.suffix == ".json" else text.split()
    if told and isinstance(told[0], Mapping):
        told = [one["wnid"] for one in sorted(told, key=lambda one: int(one["label"]))]
    wrong = next((name for name in told if not _is_wnid(name)), None)
    if wrong is not None:
        raise ValueError(f"wnids look like n01440764, got {wrong!r}.")
    return list(told)


def _is_wnid(name: object) -> bool:
    return isinstance(name, str) and len(name) == 9 and name[0] == "n" and name[1:].isdigit()


def _write_latents(coherence: SpatialCoherence, path: Path) -> None:
    table = coherence.table()
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        rows = csv.writer(stream, lineterminator="\n")
        rows.writerow(table)
        rows.writerows(zip(*(column.tolist() for column in table.values()), strict=True))


# ------------------------------------------------------------------------------------------------------- the metrics


def _preservation(asked: _Asked, setting: Setting, options: dict[str, Any]) -> Metric | None:
    if asked.labels("test") is None:
        return None
    probes = asked.cell.shared.setdefault("probes", Probes())  # fitted on raw features once, for a backbone's coders
    return Preservation(setting, probes=probes, **options)


def _probing(asked: _Asked, setting: Setting, options: dict[str, Any]) -> Metric | None:
    return None if asked.labels("test") is None else SparseProbing(setting, **options)


def _absorption(asked: _Asked, setting: Setting, options: dict[str, Any]) -> Metric | None:
    groups = None if asked.labels("test") is None else asked.groups()
    return None if not groups else Absorption(setting, groups=groups, **options)


def _monosemanticity(asked: _Asked, setting: Setting, options: dict[str, Any]) -> Metric | None:
    evaluator = asked.cell.place.evaluator
    if evaluator is None:
        return None
    return Monosemanticity(setting, embeddings=embeddings_of(asked.cell, evaluator), **options)


def _common_monosemanticity(asked: _Asked, setting: Setting, options: dict[str, Any]) -> Metric | None:
    evaluator = asked.cell.plan.common_evaluator
    if evaluator is None:
        return None
    options = dict(asked.options.get("monosemanticity", {})) | options
    return Monosemanticity(setting, embeddings=embeddings_of(asked.cell, evaluator), **options)


def _raw_coherence(asked: _Asked, setting: Setting, options: dict[str, Any]) -> Metric | None:
    """The same for all coders at a place: worked out once."""
    key = "raw_coherence"
    if key not in asked.cell.shared:
        asked.cell.shared[key] = RawCoherence(setting, **options)
        return _Kept(asked.cell.shared[key], asked.cell.shared)
    found: tuple[Any, Any] | None = asked.cell.shared.get("raw_coherence/found")
    return None if found is None else _Found(*found)


@dataclass(eq=False)
class _Kept(Metric):
    """A metric whose numbers are kept for the cells that follow."""

    metric: Metric
    shared: dict[str, Any]

    def update(self, seen: Seen) -> None:
        self.metric.update(seen)

    def compute(self, *, n_bootstrap: int = 1000, seed: int = 0) -> dict[str, Measured]:
        found = self.metric.compute(n_bootstrap=n_bootstrap, seed=seed)
        self.shared["raw_coherence/found"] = (found, self.metric.curves())
        return found

    def curves(self) -> dict[str, Curve]:
        return self.metric.curves()


@dataclass(eq=False)
class _Found(Metric):
    measured: dict[str, Measured]
    drawn: dict[str, Curve]

    def update(self, seen: Seen) -> None:
        pass

    def compute(self, *, n_bootstrap: int = 1000, seed: int = 0) -> dict[str, Measured]:
        return self.measured

    def curves(self) -> dict[str, Curve]:
        return self.drawn


Make = Callable[[_Asked, Setting, dict[str, Any]], Metric | None]
METRICS: dict[str, Make] = {
    "reconstruction": lambda asked, setting, options: Reconstructs(setting.shift),
    "latents": lambda asked, setting, options: CountsLatents(
        d_sae=setting.d_sae, n_tokens=setting.n_tokens, cls_token=setting.cls_token
    ),
    "dead": lambda asked, setting, options: Dead(setting, **options),
    "preservation": _preservation,
    "spatial_coherence": lambda asked, setting, options: SpatialCoherence(setting, **options),
    "raw_coherence": _raw_coherence,
    "sparse_probing": _probing,
    "absorption": _absorption,
    "monosemanticity": _monosemanticity,
    COMMON: _common_monosemanticity,
}
