"""Latents of a study that one can look at: which ones is a rule, and their top pictures are exact.

Of each backbone the widest main coder, of the largest k; of its latents the one whose Moran's I is nearest the mean,
and three of the top 5 % (its middle, its highest, its lowest). ViSAEBench appendix H, figure 5; SPEC row 91.

Pictures are ranked by their largest activation. A code is its pre-activation or 0, so that the pre-activations of the
picked latents alone, which cost next to nothing, bound every picture: only those that may be among the first are
encoded in full. Coders whose codes are something else (gated, matching pursuit) are encoded over the whole store.
"""

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from vitrail.coders import SparseCoder
from vitrail.coders.checkpoint import load_coder
from vitrail.images import open_images
from vitrail.images.base import ImageSource
from vitrail.metrics.latent_means import representatives
from vitrail.store import Store
from vitrail.studies.report import heat_map, thumbnail
from vitrail.studies.study_analyses import StudyRows, Table
from vitrail.tables import Columns

AT_ONCE = 32  # pictures encoded in full, between two looks at whether the next one can still be among the first


@dataclass(frozen=True, eq=False)
class TopImages:
    """`images`: rows of the store, largest activation first; fewer than asked for where it fires in fewer."""

    images: NDArray[np.int64]
    values: NDArray[np.float64]
    tokens: Float[Tensor, "n t"]  # the latent's activation at each token that was read


def audit(study: StudyRows, out: Path, *, n_images: int = 8) -> tuple[str, Table, list[str]]:
    """(HTML, a row for each picked latent and picture, a sentence for each backbone that could not be shown)."""
    parts, table, notes = [], [], []
    for backbone in study.backbones:
        row = widest(study, backbone)
        if row is None:
            notes.append(f"{backbone}: no coder of the family {study.family}.")
            continue
        folder = cell_folder(out, row)
        store = store_of(out, row)
        if folder is None or store is None:
            missing = "the coder and its latents.csv in cells" if folder is None else "its store of test images"
            notes.append(f"{backbone}: {missing} would be needed, and is not there.")
            continue
        picked = pick(read_latents(folder / "latents.csv"), min_images=_min_images(study))
        if not picked:
            notes.append(f"{backbone}: no latent of {row['coder']} fired in enough images for a Moran's I.")
            continue
        coder = load_coder(folder / "coder")
        tops = top_images(coder, store, row["point"], row["tokens"], [latent for latent, _, _ in picked], n_images)
        images, said = _open(study, store)
        notes += said
        columns = store.images()
        cards = []
        for (latent, why, moran), top in zip(picked, tops, strict=True):
            cards.append(_card(store, images, columns, row, latent, why, moran, top))
            table += [
                {
                    "backbone": backbone, "coder": row["coder"], "seed": row["seed"], "latent": latent, "picked": why,
                    "moran": moran, "place": place, "image": columns["id"][image], "activation": value,
                }
                for place, (image, value) in enumerate(zip(top.images.tolist(), top.values.tolist(), strict=True))
            ]  # fmt: skip
        head = f"{backbone}: {row['coder']}, seed {row['seed']}, {row['d_sae']} latents"
        parts.append(f"<h3>{escape(head)}</h3>{''.join(cards)}")
    return "".join(parts), table, list(dict.fromkeys(notes))


def widest(study: StudyRows, backbone: str) -> dict[str, Any] | None:
    """Its main row of most latents, then of the largest k, then of the smallest seed."""
    rows = [row for row in study.main if row["backbone"] == backbone]
    return min(rows, key=lambda row: (-(row["d_sae"] or 0), -(row["k"] or 0), row["seed"]), default=None)


def read_latents(path: Path) -> dict[str, NDArray[np.float64]]:
    """latents.csv by column; empty where it is not there."""
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    return {name: np.array([_value(row[name]) for row in rows]) for name in (rows[0] if rows else ())}


def pick(latents: Mapping[str, NDArray[np.float64]], *, min_images: int) -> list[tuple[int, str, float]]:
    """(latent, by which rule, Moran's I) of at most four; those of too few images do not count."""
    if not {"latent", "moran", "n_images"} <= set(latents):
        return []
    scores = latents["moran"]
    enough = latents["evaluable"] > 0 if "evaluable" in latents else latents["n_images"] >= min_images
    at = np.flatnonzero(enough & np.isfinite(scores))
    if not len(at):
        return []
    order = at[np.argsort(-scores[at], kind="stable")]
    top = order[: math.ceil(len(order) / 20)]
    chosen = representatives(scores, at)
    asked = {
        "nearest the mean Moran's I": chosen["mean"],
        "middle of the top 5 %": chosen["high"],
        "highest": int(top[0]),
        "last of the top 5 %": int(top[-1]),
    }
    out: dict[int, tuple[int, str, float]] = {}
    for why, place in asked.items():
        out.setdefault(place, (int(latents["latent"][place]), why, float(scores[place])))
    return list(out.values())


@torch.inference_mode()
def top_images(
    coder: SparseCoder, store: Store, point: str, tokens: str | None, latents: Sequence[int], n: int
) -> list[TopImages]:
    """The n pictures in which each latent is largest; equal ones in the store's order."""
    kind = store.kind(point, tokens)
    # Gated and Matryoshka coders change the values after the selection, matching pursuit has no pre-activations.
    bounded = type(coder).encode_sparse is SparseCoder.encode_sparse
    if not bounded:
        return [_first(found, n) for found in _all_of(coder, store, point, kind, latents)]
    bounds = _bounds(coder, store, point, kind, latents)  # (latents, images)
    known: dict[int, Float[Tensor, "t l"]] = {}
    out = []
    for place in range(len(latents)):
        order = np.argsort(-bounds[place], kind="stable")
        found: dict[int, Float[Tensor, " t"]] = {}
        for start in range(0, len(order), AT_ONCE):
            asked = order[start : start + AT_ONCE]
            values = sorted((float(one.max()) for one in found.values()), reverse=True)
            # Rounding: a product of all latents and one of a few differ in their last digits.
            if bounds[place][asked[0]] <= 0 or (len(values) >= n and values[n - 1] > bounds[place][asked[0]] * 1.0001):
                break
            new = [image for image in asked.tolist() if image not in known]
            known |= _codes_of(coder, store, point, kind, latents, new)
            found |= {image: known[image][:, place] for image in asked.tolist()}
        out.append(_first(found, n))
    return out


def cell_folder(out: Path, row: Mapping[str, Any]) -> Path | None:
    """Where the row's coder lies; None if it is not there."""
    for backbone in dict.fromkeys((row["backbone"].replace("/", "-").replace("@", "-"), row["backbone"])):
        folder = out / "cells" / backbone / row["coder"] / f"seed{row['seed']}"
        if (folder / "coder" / "coder.json").is_file() and (folder / "latents.csv").is_file():
            return folder
    return None


def store_of(out: Path, row: Mapping[str, Any]) -> Store | None:
    """The store of the test images that this row's backbone saw; None if it is not there or not whole."""
    for path in sorted((out / "stores").glob("*/test/manifest.json")):
        try:
            store = Store.open(path.parent)
            store.kind(row["point"], row.get("tokens"))
        except (ValueError, KeyError, FileNotFoundError):
            continue
        digest = store.manifest.request.get("backbone_digest")
        if digest == row.get("backbone_digest") or (digest is None and path.parts[-3].startswith(row["backbone"])):
            return store
    return None


# -- helpers


def _min_images(study: StudyRows) -> int:
    return int(((study.plan.get("options") or {}).get("spatial_coherence") or {}).get("min_images", 50))


def _value(text: str) -> float:
    if text in ("True", "False"):
        return float(text == "True")
    try:
        return float(text)
    except ValueError:
        return math.nan


def _open(study: StudyRows, store: Store) -> tuple[ImageSource | None, list[str]]:
    spec = (study.plan.get("images") or {}).get("test")
    if spec is None:
        return None, ["Pictures are left out: the plan does not say where test images are."]
    try:
        return open_images(spec), []
    except (ValueError, OSError) as error:
        return None, [f"Pictures are left out: {spec} cannot be opened ({error})."]


def _bounds(
    coder: SparseCoder, store: Store, point: str, kind: str, latents: Sequence[int]
) -> Float[np.ndarray, "l n_images"]:
    """Of each latent and picture the largest pre-activation."""
    at = torch.tensor(list(latents))
    W_enc, b_enc = coder.W_enc[:, at], coder.b_enc[at]
    parts = []
    for _, x in store.image_batches(point, kind):
        y = coder.normalize(x.to(W_enc).flatten(0, 1)).y
        pre = (y - coder.b_dec) @ W_enc + b_enc
        parts.append(pre.reshape(len(x), -1, len(at)).amax(1))
    return torch.cat(parts).T.double().numpy()


def _codes_of(
    coder: SparseCoder, store: Store, point: str, kind: str, latents: Sequence[int], images: Sequence[int]
) -> dict[int, Float[Tensor, "t l"]]:
    if not images:
        return {}
    x = torch.cat([next(store.image_batches(point, kind, n_images=1, start=image))[1] for image in images])
    return dict(zip(images, _of_latents(coder, x, latents), strict=True))


def _of_latents(coder: SparseCoder, x: Float[Tensor, "b t d_in"], latents: Sequence[int]) -> Float[Tensor, "b t l"]:
    codes = coder.encode_sparse(x.to(coder.W_dec).flatten(0, 1))
    out = torch.zeros(codes.n, len(latents))
    rows = codes.rows()
    for place, latent in enumerate(latents):
        mine = codes.indices == latent
        out[rows[mine], place] = codes.values[mine].float()
    return out.reshape(len(x), -1, len(latents))


def _all_of(
    coder: SparseCoder, store: Store, point: str, kind: str, latents: Sequence[int]
) -> Iterator[dict[int, Float[Tensor, " t"]]]:
    found: list[dict[int, Tensor]] = [{} for _ in latents]
    for first, x in store.image_batches(point, kind, n_images=AT_ONCE):
        z = _of_latents(coder, x, latents)
        for image, place in torch.nonzero(z.amax(1) > 0).tolist():
            found[place][first + image] = z[image, :, place].clone()
    yield from found


def _first(found: Mapping[int, Float[Tensor, " t"]], n: int) -> TopImages:
    largest = {image: float(values.max()) for image, values in found.items()}
    images = sorted((image for image in found if largest[image] > 0), key=lambda image: (-largest[image], image))[:n]
    tokens = torch.stack([found[image] for image in images]) if images else torch.zeros(0, 1)
    return TopImages(np.array(images, dtype=np.int64), np.array([largest[image] for image in images]), tokens)


def _card(
    store: Store,
    images: ImageSource | None,
    table: Columns,
    row: Mapping[str, Any],
    latent: int,
    why: str,
    moran: float,
    top: TopImages,
) -> str:
    grid = store.manifest.grid
    shown = []
    for image, value, tokens in zip(top.images.tolist(), top.values.tolist(), top.tokens, strict=True):
        label = escape(str(table["class_name"][image] or table["id"][image]))
        thumb = None if images is None else thumbnail(store, images, int(table["position"][image]))
        caption = f"<figcaption>{label}<br>{value:.2f}</figcaption>"
        if thumb is None:
            shown.append(f'<figure class="bare">{caption}</figure>')
            continue
        heat, patches = "", tokens[grid.tokens("spatial")] if len(tokens) == grid.n_tokens else tokens
        if len(patches) == grid.n_patches:
            uri = heat_map(patches.reshape(grid.height, grid.width).numpy(), float(top.values[0]))
            heat = f'<img class="heat" alt="" src="{uri}">'
        picture = f'<div class="stack"><img alt="{label}" title="{label}" src="{thumb}">{heat}</div>'
        shown.append(f"<figure>{picture}{caption}</figure>")
    return (
        f'<article><header><h3>latent {latent}</h3><span class="why">{escape(why)}, I = {moran:.3f}</span></header>'
        f'<div class="pictures">{"".join(shown)}</div></article>'
    )
