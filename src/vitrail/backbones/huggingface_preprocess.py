"""Hugging Face's image processors, read from their JSON: nothing of them is run, and torchvision is not needed."""

from typing import Any, Literal

from vitrail.backbones.preprocess import HALF, IMAGENET_MEAN, IMAGENET_STD, Preprocess

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

# By family, what its published processors say; for a model that comes without one.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "clip": {"mean": OPENAI_MEAN, "std": OPENAI_STD},
    "siglip": {"mean": HALF, "std": HALF, "resize": "squash"},
    "vit": {"mean": HALF, "std": HALF, "resize": "squash", "interpolation": "bilinear"},
    "dinov2": {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "crop_pct": 0.875},
}
_RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # Pillow's numbers, which the JSON uses


def preprocess_of(
    family: str, config: Any, *, source: str | None = None, image_px: tuple[int, int] | None = None
) -> Preprocess:
    """From preprocessor_config.json at `source` if there is one, else the family's default at the model's own size.

    An explicit `image_px` keeps the processor's ratio of resize to crop.
    """
    described = _described(source)
    if described is None:
        return Preprocess.of(image_px or _pair(config.image_size), **_DEFAULTS[family])
    crops = described.get("do_center_crop", False) and "crop_size" in described
    resize_px, resize = _resize(described["size"], crops=crops)
    crop_px = _pair(described["crop_size"]) if crops else resize_px
    if image_px is not None:
        resize_px = (round(resize_px[0] * image_px[0] / crop_px[0]), round(resize_px[1] * image_px[1] / crop_px[1]))
        crop_px = image_px
    return Preprocess(
        image_px=crop_px,
        resize_px=resize_px,
        resize=resize,
        interpolation=_RESAMPLE[described.get("resample", 3)],
        mean=tuple(described.get("image_mean", _DEFAULTS[family]["mean"])),
        std=tuple(described.get("image_std", _DEFAULTS[family]["std"])),
    )


def _described(source: str | None) -> dict[str, Any] | None:
    if source is None:
        return None
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        return ImageProcessingMixin.get_image_processor_dict(source)[0]
    except OSError:
        return None


def _resize(size: int | dict[str, int], *, crops: bool) -> tuple[tuple[int, int], Literal["shorter_side", "squash"]]:
    if isinstance(size, int):  # old files: what it means depends on whether a crop follows
        return (size, size), "shorter_side" if crops else "squash"
    if "height" in size:
        return (size["height"], size["width"]), "squash"
    if "shortest_edge" in size:
        return (size["shortest_edge"], size["shortest_edge"]), "shorter_side"
    raise ValueError(f"an image processor that resizes to {size} is not understood; pass preprocess= to wrap().")


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, dict):
        return (size["height"], size["width"])
    return (size, size) if isinstance(size, int) else (size[0], size[1])
