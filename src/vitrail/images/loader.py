"""Pictures in batches, in order, decoded by worker processes. Unreadable ones are left out and listed."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitrail.images.base import BadImage, ImageSource

Transform = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class ImageBatch:
    """`images[j]` is the picture at `positions[j]`; `skipped` has the others of the batch, each with its reason.

    If none could be read, `images` has shape (0, 3, 0, 0).
    """

    positions: list[int]
    images: Float[Tensor, "b 3 h w"]
    skipped: list[tuple[int, str]]


def load_batches(
    source: ImageSource, positions: Sequence[int], transform: Transform, *, batch_size: int, n_workers: int = 0
) -> Generator[ImageBatch, None, None]:
    """Batches of `batch_size` consecutive entries of `positions`; a bad picture makes its own batch smaller, no other.

    `n_workers`: processes that read and transform; 0 does it in this one. Each gets its own copy of `source` and
    `transform`. Whoever stops early closes the generator: that ends the workers at once.
    Raises IndexError for a position outside the source, RuntimeError if a worker is killed.
    """
    if batch_size < 1 or n_workers < 0:
        raise ValueError(f"batch_size must be at least 1 and n_workers at least 0, got {batch_size} and {n_workers}.")
    outside = [i for i in positions if not 0 <= i < len(source)]
    if outside:
        raise IndexError(f"positions must be in 0..{len(source) - 1}, got {outside[0]}.")
    pictures = _Pictures(source, list(positions), transform)
    return _batches(DataLoader(pictures, batch_size, num_workers=n_workers, collate_fn=_collate), n_workers)


def _batches(loader: DataLoader, n_workers: int) -> Generator[ImageBatch, None, None]:
    try:
        yield from loader
    except RuntimeError as error:
        if "exited unexpectedly" not in str(error) and "is killed by signal" not in str(error):
            raise
        raise RuntimeError(
            f"a worker that reads pictures was killed ({error}). Most often memory, or shared memory, ran out: use "
            f"fewer workers than {n_workers} (0 reads in this process) or smaller batches."
        ) from error


class _Pictures(Dataset):
    def __init__(self, source: ImageSource, positions: list[int], transform: Transform) -> None:
        self._source, self._positions, self._transform = source, positions, transform

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, place: int) -> tuple[int, Tensor | str]:
        i = self._positions[place]
        try:
            image = self._source.load(i)
        except BadImage as error:
            return i, str(error)
        return i, self._transform(image)


def _collate(items: list[tuple[int, Tensor | str]]) -> ImageBatch:
    read = [(i, image) for i, image in items if isinstance(image, Tensor)]
    shapes = {tuple(image.shape) for _, image in read}
    if len(shapes) > 1:
        raise ValueError(
            f"the transform must give pictures of one shape, got {' and '.join(map(str, sorted(shapes)))}."
        )
    return ImageBatch(
        positions=[i for i, _ in read],
        images=torch.stack([image for _, image in read]) if read else torch.zeros(0, 3, 0, 0),
        skipped=[(i, reason) for i, reason in items if isinstance(reason, str)],
    )
