"""Activations computed on the fly, behind the same face as a store's reader: for when the disk is too small.

Images are permuted per epoch; a window is a run of images whose rows are held in memory and mixed. Resuming recomputes
the current window, then gives the same rows in the same order. The statistics come from the first images of a seeded
sample, because there is no whole set to take them from.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from vitrail.backbones.base import Backbone
from vitrail.files import json_digest
from vitrail.images.base import ImageSource
from vitrail.images.loader import load_batches
from vitrail.statistics import ActivationStats
from vitrail.store.tokens import select_tokens, stored_kind
from vitrail.store.windows import WindowedSource, generator


class ActivationStream(WindowedSource):
    """Rows of one point, (batch_size, d_in) fp32, straight from the backbone. Unreadable images are passed over."""

    def __init__(
        self,
        backbone: Backbone,
        images: ImageSource,
        point: str,
        *,
        tokens: str = "all",
        batch_size: int = 4096,
        image_batch: int = 64,
        window_images: int = 1024,
        stats_images: int = 1024,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        prefetch: int = 2,
        n_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, shuffle=shuffle, seed=seed, drop_last=drop_last, prefetch=prefetch)
        if len(images) == 0:
            raise ValueError(f"{images.spec} holds no images to stream.")
        self.backbone, self.images, self.point = backbone, images, point
        self.tokens = stored_kind(tokens, has_tokens=backbone.point(point).has_tokens)
        self._image_batch, self._window_images, self._n_workers = image_batch, window_images, n_workers
        sample = generator(seed, 0, 0).permutation(len(images))[:stats_images].tolist()
        rows = self._rows(sample)
        self.stats = ActivationStats.of(rows)
        self.d_in = rows.shape[1]
        self.n_rows: int | None = len(images) * (len(rows) // len(sample))
        order = {"seed": seed, "shuffle": shuffle, "batch_size": batch_size, "window_images": window_images}
        fingerprint = images.fingerprint()
        self.identity = json_digest([backbone.digest, fingerprint, point, self.tokens, order, image_batch])

    def n_windows(self, epoch: int) -> int:
        return -(-len(self.images) // self._window_images)

    def window_rows(self, epoch: int, window: int) -> Float[Tensor, "n d_in"]:
        positions = list(range(len(self.images)))
        if self.shuffle:
            positions = generator(self.seed, epoch, 0).permutation(len(positions)).tolist()
        return self._rows(positions[window * self._window_images : (window + 1) * self._window_images])

    def _rows(self, positions: list[int]) -> Float[Tensor, "n d_in"]:
        device = next(self.backbone.parameters()).device
        parts = []
        batches = load_batches(
            self.images,
            positions,
            self.backbone.preprocess,
            batch_size=self._image_batch,
            n_workers=self._n_workers,
        )
        for batch in batches:
            if not batch.positions:
                continue
            with torch.inference_mode():
                x = self.backbone.activations(batch.images.to(device), [self.point])[self.point]
            parts.append(select_tokens(x, self.backbone.grid, self.tokens).flatten(0, 1).float().cpu())
        if not parts:
            raise ValueError(f"none of {len(positions)} images of {self.images.spec} could be read.")
        # .clone(): tensors made in inference mode may not take part in a later backward pass.
        return torch.cat(parts).clone()
