"""Why two images are alike, images of a concept in words, and what fires in a drawn patch.

    why          latents that fire in both; of each the part of the similarity it makes up:
                 min(q_i, x_i) / sum_j min(q_j, x_j)  for "l1" and "overlap",  q_i x_i / sum_j q_j x_j  for "cosine"
    by words     word -> latents by their names, or by the cosine of text embeddings -> images in which they fire most
    what fires   a box drawn on an image -> latents with their values, and images with the same latents

MSAE (Zaigrajew et al. 2025, arXiv:2502.20578), section 5.2, figure 21, shows the eight strongest latents of query and
hit side by side; the share of the similarity is ours.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from vitrail.backbones.text import TextTower
from vitrail.coders.sparse import Codes
from vitrail.codes import CodeStore
from vitrail.concepts.inverted import Neighbours, SparseIndex
from vitrail.concepts.table import names_of, read_concepts
from vitrail.files import read_json

Names = Mapping[int, str]


@dataclass(frozen=True)
class Shared:
    """A latent that fires in query and hit. `share` of their similarity, 0 to 1; all shares of a pair sum to 1."""

    latent: int
    name: str | None
    query: float
    hit: float
    share: float


@dataclass(frozen=True)
class Hit:
    """A row that was found. `value` is a distance for "l1", else a similarity; `why` begins with the largest share."""

    row: int
    value: float
    why: tuple[Shared, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"row": self.row, "value": self.value, "why": [asdict(shared) for shared in self.why]}


@dataclass(frozen=True)
class Fires:
    """A latent in a box: its largest and mean activation over the box's patches, and on how many of them it fires."""

    latent: int
    name: str | None
    max: float
    mean: float
    n_patches: int


def why(
    query: Codes, hit: Codes, metric: str = "l1", *, names: Names | None = None, top: int | None = 8
) -> tuple[Shared, ...]:
    """The latents that one query and one hit share, largest share first. Raises ValueError for more than one row."""
    if query.n != 1 or hit.n != 1:
        raise ValueError(f"one query is explained against one hit, got {query.n} and {hit.n} rows.")
    q, x = query.to_dense()[0].double(), hit.to_dense()[0].double()
    parts = q * x if metric == "cosine" else torch.minimum(q, x)
    order = torch.sort(parts, descending=True, stable=True).indices[: int((parts > 0).sum())]
    total = float(parts.sum())
    return tuple(
        Shared(i, (names or {}).get(i), float(q[i]), float(x[i]), float(parts[i]) / total)
        for i in order[: len(order) if top is None else top].tolist()
    )


def explained(
    index: SparseIndex,
    query: Codes,
    found: Neighbours,
    *,
    names: Names | None = None,
    top: int | None = 8,
) -> list[Hit]:
    """The hits of one query, each with its why. Hits found by dense embeddings are explained by their codes' cosine.

    Raises ValueError where `found` is of more than one query.
    """
    if len(found.rows) != 1:
        raise ValueError(f"the hits of one query are explained at a time, got {len(found.rows)}.")
    codes = index.rows(found.rows[0])
    metric = "overlap" if found.metric in ("l1", "overlap") else "cosine"
    return [
        Hit(row, value, why(query, codes.select_rows(slice(i, i + 1)), metric, names=names, top=top))
        for i, (row, value) in enumerate(zip(found.rows[0].tolist(), found.values[0].tolist(), strict=True))
    ]


# -- words


def read_names(path: str | Path) -> dict[int, str]:
    """Latent -> name, from a run's concepts.parquet (the best valid name of each latent) or a JSON {"17": "stripes"}.

    Raises FileNotFoundError, or ValueError where the file is neither.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        return names_of(read_concepts(path))
    value = read_json(path, "table of names")
    if not isinstance(value, dict) or not all(re.fullmatch(r"\d+", key) for key in value):
        raise ValueError(f'{path} must map latents to names, {{"17": "stripes"}}.')
    return {int(latent): str(name) for latent, name in value.items()}


def latents_named(query: str, names: Names) -> tuple[int, ...]:
    """Latents whose name is `query`; if there is none, those whose name has all words of it. Letter case is ignored.

    Raises KeyError where no name has them.
    """
    wanted = _words(query)
    exact = tuple(latent for latent, name in sorted(names.items()) if _words(name) == wanted)
    among = tuple(latent for latent, name in sorted(names.items()) if set(wanted) <= set(_words(name)))
    if not wanted or not among:
        known = sorted(set(names.values()))
        raise KeyError(
            f"no latent is named {query!r}. {len(known)} names: {', '.join(known[:12])}{' ...' if known[12:] else ''}."
        )
    return exact or among


def nearest_names(
    query: str, names: Names, text: TextTower, *, template: str = "a photo of a {}.", k: int = 3
) -> list[tuple[int, float]]:
    """(latent, cosine) of the k latents whose names' text embeddings are nearest to that of `query`.

    Compares texts with texts, in which no modality gap lies. Raises ValueError where there are no names.
    """
    if not names:
        raise ValueError("no latent has a name: run `vitrail name` first, or pass names.")
    distinct = sorted(set(names.values()))
    embedded = text.encode([template.format(name) for name in distinct])
    cosines = dict(zip(distinct, (embedded @ text.encode([template.format(query)])[0]).tolist(), strict=True))
    ranked = sorted(names, key=lambda latent: (-cosines[names[latent]], latent))
    return [(latent, cosines[names[latent]]) for latent in ranked[:k]]


def groups_of(query: str, names: Names, text: TextTower | None = None, *, k: int = 3) -> list[tuple[int, ...]]:
    """A query in words as groups of latents, for `images_firing`: words between commas make one group each.

    By names; where no name has the words and `text` is given, by the k nearest names. Raises KeyError otherwise.
    """
    groups = []
    for part in filter(None, (part.strip() for part in query.split(","))):
        try:
            groups.append(latents_named(part, names))
        except KeyError:
            if text is None:
                raise
            groups.append(tuple(latent for latent, _ in nearest_names(part, names, text, k=k)))
    return groups


def images_firing(
    index: SparseIndex, groups: Sequence[Sequence[int]], k: int = 10
) -> tuple[Int[Tensor, " k"], Float64[Tensor, " k"]]:
    """(rows, scores) of the images in which the asked latents fire most.

    One group of latents for each word of a query. score = mean over groups of max over the group's latents of
    z_i / max z_i over the collection: 0..1, and 1 where every word has a latent at its strongest. Rows with score 0 are
    left out, so there may be fewer than k. Raises ValueError where there is no group, or an empty one.
    """
    if not groups or not all(groups):
        raise ValueError(f"each word needs at least one latent, got {[list(group) for group in groups]}.")
    score = torch.zeros(index.n, dtype=torch.float64)
    for group in groups:
        best = torch.zeros(index.n, dtype=torch.float64)
        for latent in group:
            rows, values = index.column(latent)
            if len(rows):
                best[rows] = torch.maximum(best[rows], values.double() / float(values.max()))
        score += best / len(groups)
    order = torch.sort(score, descending=True, stable=True).indices[:k]
    order = order[score[order] > 0]
    return order, score[order]


# -- a drawn patch


def fires_here(
    codes: CodeStore, image: int | Codes, box_px: tuple[int, int, int, int], *, names: Names | None = None
) -> tuple[list[Fires], Codes]:
    """(latents that fire in the box, strongest first; their maxima as a query of one row).

    `image`: a row of the store, or the codes of a picture's tokens (query.py).
    `box_px`: (left, top, right, bottom) in pixels of the pre-processed image, right and bottom past the end, as
    Grid.box_px. Every patch that the box touches counts. Search the query with metric "overlap" for images with the
    same latents. Raises ValueError where patches were not encoded, or for a box outside the image.
    """
    grid = codes.manifest.grid
    if codes.manifest.tokens not in ("all", "spatial"):
        raise ValueError(f"{codes.path} holds {codes.manifest.tokens!r} tokens: there are no patches to draw on.")
    left, top, right, bottom = box_px
    height, width = grid.image_px
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ValueError(f"a box is (left, top, right, bottom) within {width} x {height} pixels, got {box_px}.")
    rows = torch.arange(top // grid.patch_px, min(-(-bottom // grid.patch_px), grid.height))
    columns = torch.arange(left // grid.patch_px, min(-(-right // grid.patch_px), grid.width))
    places = (rows[:, None] * grid.width + columns).reshape(-1)
    special = grid.n_special if codes.n_tokens == grid.n_tokens else 0
    tokens = image if isinstance(image, Codes) else codes.image(image)
    z = tokens.select_rows(places + special).with_row_terms(None, None).to_dense()
    strongest = z.max(0).values if len(z) else torch.zeros(codes.d_sae)
    query = Codes.from_dense(strongest[None])
    order = torch.sort(strongest, descending=True, stable=True).indices[: query.nnz].tolist()
    fires = [
        Fires(i, (names or {}).get(i), float(strongest[i]), float(z[:, i].mean()), int((z[:, i] > 0).sum()))
        for i in order
    ]
    return fires, query


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
