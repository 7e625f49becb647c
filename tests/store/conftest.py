from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from vitrail.backbones import Backbone
from vitrail.backbones.toy import ToyViT, wrap
from vitrail.images import ImageSource, open_images
from vitrail.images.base import BadImage


@pytest.fixture(scope="session")
def backbone() -> Backbone:
    """Random weights: 4 x 4 patches and a CLS token, three blocks, 24 wide."""
    torch.manual_seed(0)
    model = ToyViT(image_px=32, patch_px=8, d_model=24, n_layers=3, n_heads=2, d_mlp=32, n_classes=5)
    return wrap(model, name="toy/test")


@pytest.fixture(scope="session")
def pictures() -> ImageSource:
    return open_images("world:shapes?n=50&image_px=32")


class SomeBad(ImageSource):
    """The pictures of another source, of which some cannot be read."""

    def __init__(self, source: ImageSource, bad: set[int]) -> None:
        self.source, self.bad, self.classes = source, bad, source.classes

    @property
    def spec(self):
        return self.source.spec + "&bad"

    def __len__(self):
        return len(self.source)

    def record(self, i):
        return self.source.record(i)

    def size_bytes(self, i):
        return self.source.size_bytes(i)

    def load(self, i) -> Image.Image:
        if i in self.bad:
            raise BadImage("image file is truncated")
        return self.source.load(i)


@pytest.fixture
def some_bad() -> Callable[..., ImageSource]:
    return SomeBad


def bytes_of(store: Path) -> dict[str, bytes]:
    """Every file of a store but its cost."""
    files = sorted(path for path in store.rglob("*") if path.is_file() and path.name != "cost.json")
    return {str(path.relative_to(store)): path.read_bytes() for path in files}


@pytest.fixture
def file_bytes() -> Callable[[Path], dict[str, bytes]]:
    return bytes_of
