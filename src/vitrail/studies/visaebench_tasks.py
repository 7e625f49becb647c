"""What features are good for, in a study's cell: retrieval, naming classes, segmentation (ViSAEBench's tasks).

Each on raw features, on reconstructions and on codes, and `_lift`, codes over raw on the same pictures. Pictures are
max-pooled over patches, as M6 has them: raw and reconstructed rows less the home domain's mean, over its scale; codes
as they are. The classifiers are multinomial logistic regressions with C = 1 on four fifths of the pictures, scored on
the rest (metrics/downstream.py; SPEC rows 85 to 88). What is asked of raw features is worked out once for a backbone.

Segmentation: labels of patches are the class that covers most of a patch of the mask, cropped as the model sees the
picture; patches without a class count nowhere. A linear layer on patches of four fifths of the pictures, at most
`max_patches` of them; mean IoU over the patches of the others. Not pixels: SPEC row 87's upsampling would measure the
grid as well.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Shaped
from PIL import Image
from torch import Tensor

from vitrail.backbones.grid import Grid
from vitrail.backbones.preprocess import Preprocess
from vitrail.coders.sparse import Codes
from vitrail.metrics.cross_domain import Domain
from vitrail.metrics.downstream import Features, fit_logistic, lift, miou, retrieval
from vitrail.metrics.measured import Measured, over_images
from vitrail.metrics.sparse_probing import stratified_split
from vitrail.store.tokens import patch_slice
from vitrail.studies.study import Cell

TEST_SHARE, SPLIT_SEED = 0.2, 42
TOLERANCE = 1e-6  # the gradient of a fit, of the mean over rows
MAX_PATCHES = 8000


def retrieval_task(
    domain: Domain, shared: dict[str, Any], *, ks: Sequence[int] = (1, 5, 10), n_bootstrap: int = 1000, seed: int = 0
) -> dict[str, Measured]:
    """`retrieval_r@1_raw`, ..., `_recon`, `_codes`, `_lift`."""
    found: dict[str, dict[str, Measured]] = {}
    for name, features in _features(domain).items():
        if name == "raw" and "task/retrieval" in shared:
            found[name] = shared["task/retrieval"]
            continue
        found[name] = retrieval(features, domain.labels, ks=ks, n_bootstrap=n_bootstrap, seed=seed)
    shared["task/retrieval"] = found["raw"]
    out = {f"{key}_{name}": one for name, measured in found.items() for key, one in measured.items()}
    for key, one in found["codes"].items():
        raw = found["raw"][key].value
        out[f"{key}_lift"] = Measured(one.value / raw if raw else float("nan"), "codes over raw", one.n)
    return out


def linear_task(
    domain: Domain, shared: dict[str, Any], where: str, *, c: float = 1.0, tolerance: float = TOLERANCE, **drawn: int
) -> dict[str, Measured]:
    """`linear_accuracy_raw@WHERE`, `_recon`, `_codes`, `_lift`. Nothing where there is one class only."""
    if len(domain.labels.unique()) < 2:
        return {}
    rows = stratified_split(domain.labels.numpy(), TEST_SHARE, SPLIT_SEED)
    train, test = (torch.from_numpy(part) for part in rows)
    hits: dict[str, Tensor] = {}
    for name, features in _features(domain).items():
        key = f"task/linear/{where}"
        if name == "raw" and key in shared:
            hits[name] = shared[key]
            continue
        probe = fit_logistic(_taken(features, train), domain.labels[train], c=c, tol=tolerance)
        hits[name] = probe.predict(_taken(features, test)) == domain.labels[test]
        if name == "raw":
            shared[key] = hits[name]
    tag = f"max-pool, logistic C={c:g}"
    out = {}
    for name, right in hits.items():
        columns = {"hits": right.double().numpy(), "n": np.ones(len(right))}
        out[f"linear_accuracy_{name}@{where}"] = over_images(
            columns, lambda s: s["hits"] / s["n"], definition=tag, **drawn
        )
    out[f"linear_accuracy_lift@{where}"] = lift(hits["codes"], hits["raw"], **drawn)
    return out


def segmentation_task(
    cell: Cell,
    where: str,
    masks: str,
    *,
    c: float = 1.0,
    tolerance: float = TOLERANCE,
    max_patches: int = MAX_PATCHES,
    **drawn: int,
) -> dict[str, Measured]:
    """`segmentation_miou_raw@WHERE`, `_recon`, `_codes`, `_lift`; and `segmentation_accuracy_...`.

    Raises ValueError where the stored tokens are no patches, or a mask is missing.
    """
    key = f"task/segmentation/{where}"
    labels = cell.shared.get(f"{key}/labels")
    if labels is None:
        labels = cell.shared[f"{key}/labels"] = store_patch_labels(cell, where, masks)
    n_images, n_patches = labels.shape
    order = torch.randperm(n_images, generator=torch.Generator().manual_seed(SPLIT_SEED))
    n_test = max(1, round(TEST_SHARE * n_images))
    test, train = order[:n_test].sort().values, order[n_test:].sort().values
    classes, own = labels.unique(return_inverse=True)  # of patches; 0 is none
    own = own.reshape(labels.shape)
    if int((classes > 0).sum()) < 2:
        raise ValueError(
            f"the masks of {where!r} show {int((classes > 0).sum())} classes: segmentation tells two apart."
        )
    ignore = 0 if int(classes[0]) == 0 else None
    known = (labels[train] > 0).flatten().nonzero()[:, 0]
    picked = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(SPLIT_SEED))[:max_patches]]
    picked = picked.sort().values
    given = {"n_classes": len(classes), "ignore": ignore, **drawn}
    found: dict[str, dict[str, Measured]] = {}
    for name, features in _patch_features(cell, where).items():
        if name == "raw" and key in cell.shared:
            found[name] = cell.shared[key]
            continue
        at = (train[:, None] * n_patches + torch.arange(n_patches)).flatten()[picked]
        asked = (test[:, None] * n_patches + torch.arange(n_patches)).flatten()
        head = fit_logistic(_taken(features, at), own.flatten()[at], c=c, tol=tolerance, n_classes=len(classes))
        found[name] = miou(head.predict(_taken(features, asked)).reshape(-1, n_patches), own[test], **given)
    cell.shared[key] = found["raw"]
    out = {f"{metric}_{name}@{where}": one for name, some in found.items() for metric, one in some.items()}
    for metric, one in found["codes"].items():
        raw = found["raw"][metric].value
        lifted = Measured(one.value / raw if raw else float("nan"), "codes over raw", one.n)
        out[f"{metric}_lift@{where}"] = lifted
    return out


def store_patch_labels(cell: Cell, where: str, masks: str) -> Int[Tensor, "n_images n_patches"]:
    """Of the pictures of an image set, in the store's order."""
    store, folder = cell.stores[where], Path(masks)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing: it should hold the masks of {where!r}, a PNG a picture.")
    preprocess = Preprocess.from_json(store.manifest.request["preprocess"])
    out = []
    for picture in store.images()["id"][: store.n_images].tolist():
        path = folder / f"{Path(picture).stem}.png"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: {picture} of {where!r} has no mask.")
        with Image.open(path) as mask:
            out.append(patch_labels(np.asarray(mask), preprocess, store.manifest.grid))
    return torch.stack(out)


def patch_labels(mask: Shaped[np.ndarray, "..."], preprocess: Preprocess, grid: Grid) -> Int[Tensor, " n_patches"]:
    """The class that covers most of each patch, of equal ones the smaller number; row by row. Classes are 0..255."""
    if mask.ndim != 2 or mask.min() < 0 or mask.max() > 255:
        raise ValueError(
            f"a mask has a class of 0..255 for each pixel, got shape {mask.shape}, values to {mask.max()}."
        )
    grey = Image.fromarray(mask.astype(np.uint8), mode="L")
    seen = np.asarray(replace(preprocess, interpolation="nearest").crop(grey))[..., 0]
    rows, columns, px = grid.height, grid.width, grid.patch_px
    cells = seen[: rows * px, : columns * px].reshape(rows, px, columns, px).swapaxes(1, 2)
    flat = cells.reshape(rows * columns, px * px)
    counts = np.zeros((len(flat), 256), dtype=np.int32)
    np.add.at(counts, (np.arange(len(flat))[:, None], flat), 1)
    return torch.from_numpy(counts.argmax(1))


# -- helpers


def _features(domain: Domain) -> dict[str, Features]:
    return {"raw": domain.raw, "recon": domain.recon, "codes": domain.codes}


def _patch_features(cell: Cell, where: str) -> Mapping[str, Features]:
    """Rows of all patches of an image set, which should be small: raw, recon and codes."""
    store = cell.stores[where]
    n_tokens = store.tokens_per_image(cell.place.point, store.kind(cell.place.point, cell.place.tokens))
    patches = patch_slice(store.manifest.grid, n_tokens)
    if patches is None:
        raise ValueError(f"segmentation reads patches: {cell.place.shown} stores {cell.place.tokens} tokens.")
    raw, recon, codes = [], [], []
    with torch.inference_mode():
        for _, x in cell.batches(where):
            rows = x.to(cell.coder.W_dec)[:, patches].flatten(0, 1)
            found = cell.coder.encode_sparse(rows)
            raw.append(rows.cpu())
            recon.append(cell.coder.decode_sparse(found).cpu())
            codes.append(found.to("cpu") if found.device.type != "cpu" else found)
    x, x_hat = torch.cat(raw), torch.cat(recon)
    mean, scale = x.mean(0), x.std(0).square().mean().sqrt().clamp_min(1e-12)
    return {"raw": (x - mean) / scale, "recon": (x_hat - mean) / scale, "codes": Codes.cat(codes)}


def _taken(features: Features, rows: Int[Tensor, " m"]) -> Features:
    return features.select_rows(rows) if isinstance(features, Codes) else features[rows]
