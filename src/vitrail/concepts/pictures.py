"""Pictures through backbone and coder once: embeddings, what fired, labels, captions, and the truth where known."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from vitrail.backbones.base import Backbone
from vitrail.coders.base import SparseCoder
from vitrail.coders.sparse import Codes
from vitrail.images.base import ImageSource
from vitrail.images.loader import load_batches
from vitrail.metrics.truth import Firing, Pool, Scenes, Truth
from vitrail.progress import SILENT, Progress
from vitrail.store.tokens import select_tokens, stored_kind


@dataclass(frozen=True, eq=False)
class Pictures:
    """n pictures. `codes` has a row a picture; label -1 is none; `truth` None where nothing is known."""

    embeddings: Float[Tensor, "n d_embed"]  # unit rows of hook_image_embed
    codes: Codes
    labels: Int[np.ndarray, " n"]
    classes: tuple[str, ...]
    captions: tuple[str | None, ...]
    ids: tuple[str, ...]
    positions: Int[np.ndarray, " n"]
    truth: Truth | None

    @property
    def n(self) -> int:
        return len(self.ids)

    def select(self, rows: Int[np.ndarray, " m"]) -> "Pictures":
        """These pictures, in this order."""
        at = torch.from_numpy(np.asarray(rows))
        return replace(
            self,
            embeddings=self.embeddings[at],
            codes=self.codes.select_rows(at),
            labels=self.labels[rows],
            captions=tuple(self.captions[row] for row in rows),
            ids=tuple(self.ids[row] for row in rows),
            positions=self.positions[rows],
            truth=None if self.truth is None else self.truth.select(rows),
        )

    def halves(self, *, seed: int = 0) -> tuple["Pictures", "Pictures"]:
        """Two halves drawn at random: one to find names, one to try them. Raises ValueError for fewer than four."""
        if self.n < 4:
            raise ValueError(f"one half names, the other tries the names: give at least 4 pictures, got {self.n}.")
        order = np.random.default_rng(seed).permutation(self.n)
        return self.select(np.sort(order[: self.n // 2])), self.select(np.sort(order[self.n // 2 :]))


def read_pictures(
    backbone: Backbone,
    images: ImageSource,
    coder: SparseCoder,
    point: str,
    tokens: str,
    *,
    pool: Pool = "max",
    batch_size: int = 64,
    n_workers: int = 0,
    progress: Progress = SILENT,
) -> Pictures:
    """All pictures that can be read. CLS and registers are left out of the pooling where there are patches.

    Raises ValueError if the coder is of another width than the point, or no picture can be read.
    """
    width = backbone.point(point).width
    if coder.d_in != width:
        raise ValueError(f"the coder takes d_in={coder.d_in}, {point} of {backbone.name} is {width} wide.")
    kind = stored_kind(tokens, has_tokens=backbone.point(point).has_tokens)
    embeddings, codes, positions = [], [], []
    batches = load_batches(images, range(len(images)), backbone.preprocess, batch_size=batch_size, n_workers=n_workers)
    device = next(backbone.parameters()).device
    with closing(batches), progress.task("pictures", len(images), "images") as task, torch.inference_mode():
        for batch in batches:
            if batch.positions:
                points = list(dict.fromkeys([point, "hook_image_embed"]))
                seen = backbone.activations(batch.images.to(device), points)
                x = select_tokens(seen[point], backbone.grid, kind).float()
                n_tokens = x.shape[1]
                patches = None
                if kind in ("all", "spatial"):
                    every = n_tokens == backbone.grid.n_patches
                    patches = slice(None) if every else backbone.grid.tokens("spatial")
                z = coder.encode_sparse(x.flatten(0, 1))
                codes.append(Firing.of_codes(z, n_tokens, patches, pool=pool).images)
                embeddings.append(normalize(seen["hook_image_embed"].float(), dim=1).cpu())
                positions += batch.positions
            task.advance(len(batch.positions) + len(batch.skipped))
    if not positions:
        raise ValueError(f"none of the {len(images)} images of {images.spec} could be read.")
    records = [images.record(position) for position in positions]
    return Pictures(
        torch.cat(embeddings),
        Codes.cat(codes),
        np.array([-1 if record.label is None else record.label for record in records]),
        tuple(images.classes),
        tuple(record.caption for record in records),
        tuple(record.id for record in records),
        np.array(positions),
        picture_truth(images, positions),
    )


def picture_truth(images: Any, positions: Sequence[int]) -> Truth | None:
    """What is in each picture as a whole: of worlds and of pictures with factors; None for others."""
    if not _has_masks(images) and hasattr(images, "present"):
        return Truth.of_concepts(images.concepts, [images.present(i) for i in positions])
    if _has_masks(images):
        return Truth.of_world(images, positions, classes=False)
    return None


def _has_masks(images: Any) -> bool:
    return isinstance(images, Scenes) and bool(images.concepts) and bool(getattr(images, "has_masks", True))
