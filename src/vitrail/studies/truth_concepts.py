"""A concept per latent: what a coder's latents stand for, where the truth is known; concepts.json (docs/formats.md)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vitrail.files import read_json, write_json
from vitrail.metrics.recovery import F1_THRESHOLDS, Recovery

FORMAT, VERSION = "vitrail-concepts", 1
NUMBERS = ("threshold", "f1", "precision", "recall", "iou", "auc")


def concept_of_latents(found: Recovery) -> list[dict[str, Any]]:
    """For each latent the picture concept it stands for, chosen on one split and scored on the other.

    The concept is the one with the largest (F1 - constant) / (1 - constant): how far on the way from "always" to
    perfect. By F1 alone, most latents would be named after what half of the pictures show. `concept` is None where no
    concept does better than "always". `patch`: the same concept's numbers over patches.
    """
    image = found.levels["image"]
    patch = found.levels.get("patch")
    constant = image.constant[:, None]
    choose = found.truths[0].images.mean(0)
    always = (2 * choose / (1 + choose))[:, None]
    lift = np.where(image.measured[:, None], (image.f1_choose - always) / np.maximum(1 - always, 1e-9), -np.inf)
    best = lift.argmax(0)
    out = []
    for latent, concept in enumerate(best.tolist()):
        if not lift[concept, latent] > 0:
            out.append({"latent": latent, "concept": None})
            continue
        row = {"latent": latent, "concept": found.concepts[concept]}
        row |= {name: float(getattr(image, name)[concept, latent]) for name in NUMBERS}
        row["constant"] = float(constant[concept, 0])
        if patch is not None and patch.measured[concept]:
            row["patch"] = {name: float(getattr(patch, name)[concept, latent]) for name in NUMBERS}
        out.append(row)
    return out


def is_recovered(row: Mapping[str, Any]) -> bool:
    """F1 of at least 0.5 on the scoring split, and more than "always" has."""
    return row["concept"] is not None and row["f1"] >= F1_THRESHOLDS[0] and row["f1"] > row["constant"]


def read_concepts(folder: str | Path) -> tuple[str, dict[int, dict[str, Any]]]:
    """(digest of the coder, latent -> its row) of FOLDER/concepts.json."""
    path = Path(folder) / "concepts.json"
    value = read_json(path, "table of a coder's concepts")
    if value.get("format") != FORMAT or value.get("version") != VERSION:
        raise ValueError(f"{path} is not a {FORMAT} file of version {VERSION}.")
    return value["coder_digest"], {row["latent"]: row for row in value["latents"]}


def write_concepts(folder: Path, found: Recovery, coder_digest: str, about: Mapping[str, Any]) -> None:
    """FOLDER/concepts.json; `about` says on what it was measured."""
    value = {"format": FORMAT, "version": VERSION, "coder_digest": coder_digest, **about}
    write_json(folder / "concepts.json", {**value, "latents": concept_of_latents(found)})
