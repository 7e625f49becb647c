"""ViSAEBench's metrics of one cell of a study, from stored activations: one pass, one encoding.

    M1 spatial coherence   M2 FVU   M3 preservation   M4 sparse probing   M5 monosemanticity   M6 other domains
    M7 absorption

ViSAEBench (docs/visaebench.md); SPEC rows 63 to 80. M5 needs an `evaluator` in the plan's backbone, M7 a world, whose
classes have groups of siblings: without them they are left out. M6 (metrics/cross_domain.py) is not measured here yet.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.backbones import load
from vitrail.images import open_images
from vitrail.images.loader import load_batches
from vitrail.metrics.absorption import Absorption
from vitrail.metrics.dead import Dead
from vitrail.metrics.measured import Measured
from vitrail.metrics.monosemanticity import Monosemanticity
from vitrail.metrics.moran import SpatialCoherence
from vitrail.metrics.passing import Curve, Metric, Seen, Setting
from vitrail.metrics.preservation import Preservation, Probes
from vitrail.metrics.sparse_probing import SparseProbing
from vitrail.store import Store
from vitrail.store.tokens import patch_slice
from vitrail.studies.prisma_pass import CountsLatents, Reconstructs
from vitrail.studies.study import Cell

VERSION = "1"  # raised when a cell's numbers change though its coder and pictures do not
SHIFT_ROWS = 4096


def measure(cell: Cell) -> tuple[dict[str, Measured], dict[str, Curve]]:
    """Every metric that the cell's pictures and plan allow; the options are `n_bootstrap` and each metric's own."""
    options = dict(cell.plan.options)
    setting = setting_of(cell, "test")
    metrics: dict[str, Metric] = {}
    for name, make in METRICS.items():
        made = make(cell, setting, options.get(name, {}))
        if made is not None:
            metrics[name] = made
    labels = _labels(cell)
    with torch.inference_mode():
        for first, x in cell.batches("test"):
            x = x.to(cell.coder.W_dec)
            codes = cell.coder.encode_sparse(x.flatten(0, 1))
            x_hat = cell.coder.decode_sparse(codes).reshape(x.shape)
            known = None if labels is None else torch.from_numpy(labels[first : first + len(x)])
            seen = Seen(x=x, target=x, codes=codes, x_hat=x_hat, labels=known)
            for metric in metrics.values():
                metric.update(seen)
    measured: dict[str, Measured] = {}
    curves: dict[str, Curve] = {}
    drawn = {"n_bootstrap": int(options.get("n_bootstrap", 1000)), "seed": 0}
    for metric in metrics.values():
        measured |= metric.compute(**drawn)
        curves |= metric.curves()
    return measured, curves


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


def _labels(cell: Cell) -> np.ndarray | None:
    try:
        return cell.labels("test")
    except ValueError:
        return None


def embeddings_of(name: str, store: Store, *, batch_size: int = 64) -> Float[Tensor, "n_images d_embed"]:
    """What the backbone `name` makes of a store's pictures, in the store's order: the image embeddings, fp32."""
    backbone, images = load(name), open_images(store.manifest.request["images"])
    positions = store.images()["position"][: store.n_images].tolist()
    parts = []
    with torch.inference_mode():
        for batch in load_batches(images, positions, backbone.preprocess, batch_size=batch_size):
            if batch.skipped:
                raise ValueError(f"{name} could not read a picture that was stored: {batch.skipped[0]}.")
            parts.append(backbone.activations(batch.images, ["hook_image_embed"])["hook_image_embed"].float())
    return torch.cat(parts)


def _monosemanticity(cell: Cell, setting: Setting, options: dict[str, Any]) -> Metric | None:
    if cell.place.evaluator is None:
        return None
    key = f"embeddings/{cell.place.evaluator}"
    if key not in cell.shared:
        cell.shared[key] = embeddings_of(cell.place.evaluator, cell.stores["test"])
    return Monosemanticity(setting, embeddings=cell.shared[key], **options)


def _preservation(cell: Cell, setting: Setting, options: dict[str, Any]) -> Metric | None:
    if _labels(cell) is None:
        return None
    probes = cell.shared.setdefault("probes", Probes())  # fitted on raw features once, for all coders of a backbone
    return Preservation(setting, probes=probes, **options)


def _probing(cell: Cell, setting: Setting, options: dict[str, Any]) -> Metric | None:
    return None if _labels(cell) is None else SparseProbing(setting, **options)


def _absorption(cell: Cell, setting: Setting, options: dict[str, Any]) -> Metric | None:
    groups = getattr(open_images(cell.plan.images["test"]), "groups", None)
    return None if not groups or _labels(cell) is None else Absorption(setting, groups=groups, **options)


Make = Callable[[Cell, Setting, dict[str, Any]], Metric | None]
METRICS: dict[str, Make] = {
    "reconstruction": lambda cell, setting, options: Reconstructs(setting.shift),
    "latents": lambda cell, setting, options: CountsLatents(
        d_sae=setting.d_sae, n_tokens=setting.n_tokens, cls_token=setting.cls_token
    ),
    "dead": lambda cell, setting, options: Dead(setting, **options),
    "preservation": _preservation,
    "spatial_coherence": lambda cell, setting, options: SpatialCoherence(setting, **options),
    "sparse_probing": _probing,
    "absorption": _absorption,
    "monosemanticity": _monosemanticity,
}


def metric_names() -> Sequence[str]:
    return tuple(METRICS)
