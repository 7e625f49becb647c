"""Truth recovery: coders beside their controls, on pictures of which everything is known (docs/truth.md).

    both splits through the backbone once -> their truth once -> per coder: codes, recovery, numbers

Controls are dense where coders are sparse, and a dense code may say more: each comes twice, with as many latents a
row as the coder that has most, and with no limit. `best_of_variants` takes the better of the two, number by number.

In memory: the activations of both splits, rows x d_in, and one coder's codes; of rows x d_sae no more than a batch.
Killed, the same call goes on with the next coder.

    OUT/recovery.jsonl        a row for each coder and control, and the means over seeds: "topk#0", "topk#1" -> "topk"
    OUT/NAME/found.jsonl      a row for each concept: its latent, F1, IoU, AUC
    OUT/NAME/concepts.json    for each latent the concept it stands for
    OUT/NAME/image.svg, .png  concepts x latents; patch.svg, .png where patches are known
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.backbones.base import Backbone
from vitrail.coders import PCA, KMeans, Neurons, RandomDirections, SparseCoder, untrained_like
from vitrail.coders.sparse import Codes
from vitrail.files import json_digest, replacing, tensors_digest
from vitrail.images.base import ImageSource
from vitrail.memory import reused_memory
from vitrail.metrics import MEASURES
from vitrail.metrics.measured import Measured
from vitrail.metrics.recovery import Recovery, recovery
from vitrail.metrics.recovery_picture import recovery_picture
from vitrail.metrics.truth import Firing, Pool
from vitrail.progress import SILENT, Progress
from vitrail.provenance import VERSION, peak_memory_mb, provenance
from vitrail.statistics import ActivationStats
from vitrail.studies.prisma_table import matched_l0
from vitrail.studies.seeds import check_seeds, over_seeds
from vitrail.studies.truth_concepts import write_concepts
from vitrail.studies.truth_splits import Split, read_split, sample_patches

ROWS_AT_ONCE = 4096
UNLIMITED = " (no limit)"


@dataclass(frozen=True)
class Contender:
    """What is measured. A control's `family` has it at each of its limits; `at_most` latents a row are kept."""

    coder: SparseCoder
    family: str | None = None
    at_most: int | None = None


# ------------------------------------------------------------------------------------------------------- the study


@reused_memory()
def truth_recovery(
    backbone: Backbone,
    choose: ImageSource,
    score: ImageSource,
    coders: Mapping[str, SparseCoder],
    out: str | Path,
    *,
    point: str,
    tokens: str,
    control_sample: Float[Tensor, "n d_in"] | None,
    pool: Pool = "max",
    coverage: float = 0.5,
    patches_per_image: int | None = None,
    min_fires: int = 10,
    batch_size: int = 64,
    n_workers: int = 0,
    n_bootstrap: int = 1000,
    seed: int = 0,
    replace_rows: bool = False,
    progress: Progress = SILENT,
) -> list[dict[str, Any]]:
    """The rows of OUT/recovery.jsonl; read back if they were measured on the same inputs before.

    Latents are chosen on `choose` and scored on `score`, which must be other pictures. `control_sample`: raw training
    activations on which controls are fitted, None for no controls. `patches_per_image` counts a seeded sample of the
    patches, the same for all; None counts all. Raises ValueError for pictures of which nothing is known.
    """
    if choose.fingerprint() == score.fingerprint():
        raise ValueError(f"latents must be chosen on other pictures than they are scored on; both are {choose.spec}.")
    check_seeds({name: tensors_digest(coder.state_dict()) for name, coder in coders.items()})
    out = Path(out)
    options = {
        "point": point,
        "tokens": tokens,
        "pool": pool,
        "coverage": coverage,
        "patches_per_image": patches_per_image,
        "min_fires": min_fires,
        "n_bootstrap": n_bootstrap,
        "seed": seed,
    }
    asked = request_of(backbone, choose, score, coders, control_sample, options)
    rows = read_recovery(out / "recovery.jsonl") if (out / "recovery.jsonl").is_file() else []
    mine = bool(rows) and all(row.get("request") == asked for row in rows)
    if mine and all((out / name / "concepts.json").is_file() for name in coders):
        return rows
    if rows and not mine and not replace_rows:
        raise ValueError(
            f"{out / 'recovery.jsonl'} holds rows of another recovery. Choose another folder, or delete it."
        )
    read = {"coverage": coverage, "batch_size": batch_size, "n_workers": n_workers, "progress": progress}
    splits = [read_split(backbone, images, point, tokens, **read) for images in (choose, score)]
    contenders = {name: Contender(coder) for name, coder in coders.items()}
    if control_sample is not None:
        contenders |= truth_controls(list(coders.values()), control_sample, seed=seed)
    about = {
        **options,
        "backbone": backbone.name,
        "backbone_digest": backbone.digest,
        "choose": choose.spec,
        "score": score.spec,
        "fingerprints": [choose.fingerprint(), score.fingerprint()],
        "n_images": [split.truth.n for split in splits],
        "request": asked,
        "provenance": provenance(),
    }
    unfinished = out / "unfinished.jsonl"
    done = read_recovery(unfinished) if unfinished.is_file() and not mine else []
    done = {row["name"]: row for row in done if row["request"] == asked}
    with progress.task("recovery", len(contenders), "coders", done=len(done)) as task:
        for name, contender in contenders.items():
            if name not in done:
                done[name] = {"name": name, **measure(contender, splits, out / name, about)}
                _write_lines(unfinished, list(done.values()))
                task.advance(1)
    rows = [done[name] for name in contenders]
    rows += over_seeds(rows)
    _write_lines(out / "recovery.jsonl", rows)
    unfinished.unlink(missing_ok=True)
    return rows


def measure(contender: Contender, splits: Sequence[Split], folder: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """One row, as it is in the file; of a coder, no control, also what belongs into its folder."""
    began, drawn = time.monotonic(), {"n_bootstrap": about["n_bootstrap"], "seed": about["seed"]}
    found, l0 = found_by(
        contender,
        splits,
        pool=about["pool"],
        patches_per_image=about["patches_per_image"],
        seed=about["seed"],
    )
    measured = {"l0_tokens": Measured(l0, "mean-over-rows", found.n)}
    measured |= summary_of(found, min_fires=about["min_fires"], **drawn)
    row = {
        "kind": "coder" if contender.family is None else "control",
        "family": contender.family,
        "at_most": contender.at_most,
        "architecture": contender.coder.name,
        "d_sae": contender.coder.d_sae,
        "config": contender.coder.config,
        "coder_digest": tensors_digest(contender.coder.state_dict()),
        "measured": {name: one.to_json() for name, one in measured.items()},
    }
    if contender.family is None:
        write_found(folder, found, row, about, **drawn)
    cost = {"seconds": round(time.monotonic() - began, 3), "peak_memory_mb": round(peak_memory_mb())}
    return {**row, **about, "cost": cost}


def truth_controls(
    coders: Sequence[SparseCoder], sample: Float[Tensor, "n d_in"], *, seed: int = 0
) -> dict[str, Contender]:
    """Controls for all of these coders at once, fitted on the sample: as many latents as the widest coder has, where a
    control can choose; at most k a row, the largest L0 of any coder, and again with no limit.

    Neurons and principal components are signed: each direction and its opposite are two latents.
    """
    like = max(coders, key=lambda coder: coder.d_sae)
    sample = sample.to(like.W_dec)
    k = max(matched_l0(coder, sample) for coder in coders)
    d_in, d_sae, stats = like.d_in, like.d_sae, ActivationStats.of(sample)
    shared = {"d_in": d_in, "normalization": like.normalization, "seed": seed}
    every: dict[str, SparseCoder] = {
        "neurons": Neurons(k=d_in, **shared),
        "pca": PCA(k=d_in, n_components=d_in, **shared),
        "kmeans": KMeans(d_sae=min(d_sae, len(sample)), k=min(d_sae, len(sample)), **shared),
        "random": RandomDirections(d_sae=d_sae, k=d_sae, **shared),
    }
    for control in every.values():
        control.to(like.W_dec).fit(stats, sample)
    limited = {family: Contender(control.eval(), family, k) for family, control in every.items()}
    out = limited | {family + UNLIMITED: Contender(control, family) for family, control in every.items()}
    # Without a limit the untrained coder would be the random directions over again: both start from the same draw.
    out["untrained"] = Contender(untrained_like(like, sample), "untrained", k)
    return out


def found_by(
    contender: Contender, splits: Sequence[Split], *, pool: Pool = "max", patches_per_image: int | None = None,
    seed: int = 0,
) -> tuple[Recovery, float]:  # fmt: skip
    """What it recovers, chosen on the first split and scored on the second; and its mean L0 on the second's rows."""
    firings, truths, l0 = [], [], 0.0
    for split in splits:
        codes = encode_rows(contender, split.x)
        l0 = codes.nnz / max(codes.n, 1)
        firing = Firing.of_codes(codes, split.n_tokens, split.patches, pool=pool)
        firing, truth = sample_patches(firing, split.truth, patches_per_image, seed=seed)
        firings.append(firing)
        truths.append(truth)
    return recovery(firings[0], truths[0], firings[1], truths[1]), l0


def encode_rows(contender: Contender, x: Float[Tensor, "rows d_in"]) -> Codes:
    coder, parts = contender.coder.eval(), []
    with torch.inference_mode():
        for rows in x.split(ROWS_AT_ONCE):
            codes = coder.encode_sparse(rows.to(coder.W_dec.device)).with_row_terms(None, None)
            parts.append((codes if contender.at_most is None else codes.top(contender.at_most)).to("cpu"))
    return Codes.cat(parts)


# ------------------------------------------------------------------------------------------------------------ numbers


def summary_of(found: Recovery, *, n_bootstrap: int = 1000, seed: int = 0, min_fires: int = 10) -> dict[str, Measured]:
    """`Recovery.summary` and the means of splitting and absorption, which have no interval."""
    out = found.summary(n_bootstrap=n_bootstrap, seed=seed)
    for level in found.levels:
        parts = [row["n_latents"] for row in found.splitting(level=level, min_fires=min_fires)]
        reached = [n for n in parts if n is not None]
        if parts:
            out[f"{level}_covered"] = Measured(len(reached) / len(parts), "share-of-concepts-covered-0.9", found.n)
        if reached:
            out[f"{level}_splitting"] = Measured(float(np.mean(reached)), "latents-to-cover-0.9", found.n)
    pairs = found.absorption()
    for name in ("absorbed", "missed", "elsewhere"):
        values = [row[name] for row in pairs if row[name] is not None]
        if values:
            shown = name if name == "absorbed" else f"absorption_{name}"
            out[shown] = Measured(float(np.mean(values)), "mean-over-pairs-of-parent-and-child", found.n)
    return out


def best_of_variants(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Controls with each number that of their better variant: at the coders' L0 or with no limit, on the scoring
    split, which is more than fair to them. Coders of which there is a mean over seeds are left out.
    """
    seeds = {name for row in rows if row["kind"] == "mean" for name in row["seeds"]}
    out, families = [row for row in rows if row["kind"] != "control" and row["name"] not in seeds], {}
    out.sort(key=lambda row: row["d_sae"])
    for row in rows:
        if row["kind"] == "control":
            families.setdefault(row["family"], []).append(row)
    for family, variants in families.items():
        measured = {}
        for measure in dict.fromkeys(m for row in variants for m in row["measured"]):
            found = [row["measured"][measure] for row in variants if measure in row["measured"]]
            sign = -1 if measure in MEASURES and MEASURES[measure].better == "lower" else 1
            measured[measure] = max(found, key=lambda one: sign * one["value"])
        measured["l0_tokens"] = variants[0]["measured"]["l0_tokens"]
        out.append({**variants[0], "name": family, "measured": measured})
    return out


def write_found(
    folder: Path, found: Recovery, row: dict[str, Any], about: Mapping[str, Any], *, n_bootstrap: int, seed: int
) -> None:
    """found.jsonl, the pictures, then concepts.json."""
    _write_lines(folder / "found.jsonl", found.rows(n_bootstrap=n_bootstrap, seed=seed))
    for level, pairs in found.levels.items():
        if pairs.measured.any():
            recovery_picture(found, folder / level, level=level)
    names = ("choose", "score", "n_images", "fingerprints", "backbone_digest", "point", "request")
    write_concepts(folder, found, row["coder_digest"], {name: about[name] for name in names})


# -------------------------------------------------------------------------------------------------------------- files


def request_of(
    backbone: Backbone,
    choose: ImageSource,
    score: ImageSource,
    coders: Mapping[str, SparseCoder],
    control_sample: Tensor | None,
    options: Mapping[str, Any],
) -> str:
    """A digest of everything that decides the numbers."""
    return json_digest(
        {
            **options,
            "backbone": [backbone.digest, backbone.preprocess.to_json()],
            "images": [choose.fingerprint(), score.fingerprint()],
            "coders": {n: [c.name, c.config, tensors_digest(c.state_dict())] for n, c in coders.items()},
            "control_sample": None if control_sample is None else tensors_digest({"x": control_sample}),
            "vitrail": VERSION,
        }
    )


def read_recovery(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run `vitrail recover` first.")
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a table that `vitrail recover` wrote: {error}.") from error


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with replacing(path) as temporary:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        temporary.write_text("".join(lines), encoding="utf-8")
