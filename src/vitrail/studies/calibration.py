"""Does truth recovery fall when the truth is spoilt? A trained coder under the dials of metrics/truth.py.

    shuffled    labels of a share of the pictures change places, in both splits
    displaced   masks moved down by so many patches, in both splits
    mixed       latents paired with those that fire as often, each taking a share of its partner

At strength 0 nothing is changed: each curve starts from what was found. At the other end the labels say nothing of the
pictures, and what is left is luck and the share of positives.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from vitrail.coders import SparseCoder
from vitrail.files import replacing
from vitrail.metrics.recovery import recovery
from vitrail.metrics.truth import Firing, Truth, displaced, mixed, shuffled
from vitrail.progress import SILENT, Progress
from vitrail.studies.truth_recovery import Contender, encode_rows
from vitrail.studies.truth_splits import Split, sample_patches

STRENGTHS: dict[str, tuple[float, ...]] = {
    "shuffled": (0.0, 0.1, 0.25, 0.5, 0.75, 1.0),
    "displaced": (0, 1, 2, 3),
    "mixed": (0.0, 0.1, 0.2, 0.35, 0.5),
}
MEASURES = ("image_f1", "image_auc", "patch_f1", "patch_iou", "patch_auc")
X_LABELS = {"shuffled": "share of labels shuffled", "displaced": "masks moved, patches", "mixed": "share of a partner"}


def calibrate(
    coder: SparseCoder,
    splits: Sequence[Split],
    *,
    strengths: Mapping[str, Sequence[float]] = STRENGTHS,
    patches_per_image: int | None = None,
    seed: int = 0,
    progress: Progress = SILENT,
) -> list[dict[str, Any]]:
    """A row for each dial and strength: image_f1, image_auc, patch_f1, ... of latents chosen on the first split and
    scored on the second. Raises ValueError for a dial that there is not."""
    unknown = next((dial for dial in strengths if dial not in STRENGTHS), None)
    if unknown is not None:
        raise ValueError(f"dials are {', '.join(STRENGTHS)}, got {unknown!r}.")
    known = [
        (Firing.of_codes(encode_rows(Contender(coder), split.x), split.n_tokens, split.patches), split.truth)
        for split in splits
    ]
    order = known[0][0].frequency_order()  # both splits are of the same latents: the same pairs
    patches = all(truth.grid is not None and firing.patches is not None for firing, truth in known)
    asked = [(dial, value) for dial in strengths for value in strengths[dial] if dial != "displaced" or patches]
    out, plain = [], None
    with progress.task("calibration", len(asked), "strengths") as task:
        for dial, strength in asked:
            if strength == 0 and plain is not None:
                measured = plain
            else:
                turned = [_turned(*pair, dial, strength, seed + place, order) for place, pair in enumerate(known)]
                sampled = [sample_patches(*pair, patches_per_image, seed=seed) for pair in turned]
                (choose, choose_truth), (score, score_truth) = sampled
                summary = recovery(choose, choose_truth, score, score_truth).summary(n_bootstrap=0)
                measured = {name: summary[name].value for name in MEASURES if name in summary}
                plain = measured if strength == 0 else plain
            out.append({"dial": dial, "strength": strength, **measured})
            task.advance(1)
    return out


def _turned(
    firing: Firing, truth: Truth, dial: str, strength: float, seed: int, order: Int[np.ndarray, " d_sae"]
) -> tuple[Firing, Truth]:
    if dial == "shuffled":
        return firing, shuffled(truth, strength, seed=seed)
    if dial == "displaced":
        return firing, displaced(truth, int(strength))
    return mixed(firing, strength, order=order), truth


def calibration_picture(rows: Sequence[dict[str, Any]], path: str | Path, *, title: str = "") -> Path:
    """A panel for each dial, a line for each measure; PNG, SVG or what else the path's ending asks for."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError('the calibration picture needs matplotlib: pip install "vitrail[figures]".') from error
    dials = list(dict.fromkeys(row["dial"] for row in rows))
    measures = [name for name in MEASURES if any(name in row for row in rows)]
    colours: dict[str, str] = dict(zip(MEASURES, ("#1b3a70", "#d99a00", "#2e7d5b", "#7fb59a", "#c0603b"), strict=True))
    figure, axes = pyplot.subplots(1, len(dials), figsize=(3.4 * len(dials), 3.1), squeeze=False, sharey=True)
    for axis, dial in zip(axes[0], dials, strict=True):
        mine = [row for row in rows if row["dial"] == dial]
        for name in measures:
            x, y = [row["strength"] for row in mine], [row.get(name) for row in mine]
            axis.plot(x, y, marker="o", markersize=3, color=colours[name], label=name.replace("_", " "))
        axis.set_xlabel(X_LABELS[dial], fontsize=9)
        axis.set_title(dial, fontsize=10)
        axis.set_ylim(0, 1)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    axes[0][0].legend(fontsize=7, frameon=False)
    if title:
        figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    path = Path(path)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format=path.suffix.removeprefix("."))
    pyplot.close(figure)
    return path
