"""From a picture to a model's input: resize, centre crop, scale to 0..1, normalise. Pillow and numpy only.

Sizes and offsets round as torchvision's and timm's transforms do, so that the same picture gives the same tensor.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

Triple = tuple[float, float, float]

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
HALF: Triple = (0.5, 0.5, 0.5)

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """Resize to `resize_px`, then crop the centre `image_px`; both (height, width).

    `resize`: "shorter_side" keeps the proportions and makes the picture just cover resize_px; "squash" makes it exactly
    resize_px. `mean` and `std` are per channel, of values in 0..1.
    """

    image_px: tuple[int, int]
    resize_px: tuple[int, int]
    resize: Literal["shorter_side", "squash"]
    interpolation: str
    mean: Triple
    std: Triple

    def __post_init__(self) -> None:
        if self.interpolation not in _FILTERS:
            raise ValueError(f"interpolation must be one of {', '.join(_FILTERS)}, got {self.interpolation!r}.")

    @classmethod
    def of(
        cls,
        image_px: tuple[int, int],
        *,
        mean: Triple = IMAGENET_MEAN,
        std: Triple = IMAGENET_STD,
        resize: Literal["shorter_side", "squash"] = "shorter_side",
        crop_pct: float = 1.0,
        interpolation: str = "bicubic",
    ) -> Self:
        """`crop_pct`: the share of the resized picture that the crop keeps, per side."""
        resize_px = (math.floor(image_px[0] / crop_pct), math.floor(image_px[1] / crop_pct))
        return cls(
            image_px=image_px, resize_px=resize_px, resize=resize, interpolation=interpolation, mean=mean, std=std
        )

    def __call__(self, image: Image.Image) -> Float[Tensor, "3 h w"]:
        pixels = np.asarray(self.crop(image), dtype=np.float32) / np.float32(255)
        normalised = (pixels - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return torch.from_numpy(np.ascontiguousarray(normalised.transpose(2, 0, 1)))

    def crop(self, image: Image.Image) -> Image.Image:
        """The RGB picture of image_px that the model sees: what a patch map is laid over."""
        image = image if image.mode == "RGB" else image.convert("RGB")
        height, width = self._resized(image.height, image.width)
        if (width, height) != image.size:
            image = image.resize((width, height), _FILTERS[self.interpolation])
        top, left = (round((have - want) / 2.0) for have, want in zip((height, width), self.image_px, strict=True))
        if (height, width) == self.image_px:
            return image
        return image.crop((left, top, left + self.image_px[1], top + self.image_px[0]))

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        to_height, to_width = self.resize_px
        if self.resize == "squash":
            return self.resize_px
        if to_height == to_width:  # torchvision's Resize(int): the longer side is rounded down
            short, long = min(height, width), max(height, width)
            longer = int(to_height * long / short)
            return (to_height, longer) if height <= width else (longer, to_height)
        ratio = min(height / to_height, width / to_width)  # timm's ResizeKeepRatio: rounded to nearest
        return (round(height / ratio), round(width / ratio))

    def to_json(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        arguments: dict[str, Any] = {
            key: tuple(kept) if isinstance(kept, list) else kept for key, kept in value.items()
        }
        return cls(**arguments)
