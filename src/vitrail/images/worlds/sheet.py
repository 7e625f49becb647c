"""Sheets to look at: many pictures of a source on one, clips frame by frame, scenes beside their masks."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from vitrail.images.base import BadImage, ImageSource
from vitrail.images.worlds.base import Scene, World
from vitrail.images.worlds.moving import MovingWorld

# family of concepts -> tint of its pixels in `mask_sheet`; `position` is the thing without its copies
LAYER_TINTS = {
    "background": (70, 110, 230),
    "clutter": (240, 150, 30),
    "object": (230, 40, 200),
    "position": (40, 200, 60),
    "occluder": (30, 30, 30),
    "written": (250, 235, 40),
}
_TEXT_PX = 40


def contact_sheet(
    source: ImageSource, positions: Sequence[int], *, columns: int = 8, tile_px: int = 128, captions: bool = True
) -> Image.Image:
    """Pictures of `source` at `positions`, row by row, with caption (or class) below. Bad pictures say why."""
    if not positions:
        raise ValueError("positions must name at least one picture.")
    font = ImageFont.load_default(size=10)
    text_px = _TEXT_PX if captions else 0
    rows = -(-len(positions) // columns)
    sheet = Image.new("RGB", (columns * (tile_px + 6) + 6, rows * (tile_px + text_px + 6) + 6), "white")
    draw = ImageDraw.Draw(sheet)
    for place, i in enumerate(positions):
        row, column = divmod(place, columns)
        left, top = 6 + column * (tile_px + 6), 6 + row * (tile_px + text_px + 6)
        record = source.record(i)
        words = record.caption or record.class_name or record.id
        try:
            sheet.paste(_tile(source.load(i), tile_px), (left, top))
        except BadImage as error:
            words = f"unreadable: {error}"
        if captions:
            draw.multiline_text((left, top + tile_px + 1), _wrapped(words, font, tile_px), "black", font, spacing=1)
    return sheet


def clip_sheet(world: MovingWorld, clips: Sequence[int], *, tile_px: int = 96) -> Image.Image:
    """Clips of `world`, one a row: the frames across, the caption to their left."""
    if not clips:
        raise ValueError("clips must name at least one clip.")
    font = ImageFont.load_default(size=11)
    text_px, step = 130, tile_px + 4
    sheet = Image.new("RGB", (text_px + world.n_frames * step + 4, len(clips) * step + 4), "white")
    draw = ImageDraw.Draw(sheet)
    for row, j in enumerate(clips):
        clip, top = world.clip(j), 4 + row * step
        draw.multiline_text((4, top), _wrapped(clip.caption, font, text_px - 8, n_lines=6), "black", font, spacing=2)
        for column, frame in enumerate(clip.frames):
            sheet.paste(_tile(Image.fromarray(frame), tile_px), (text_px + column * step, top))
    return sheet


def mask_sheet(world: World, positions: Sequence[int], *, columns: int = 6, tile_px: int = 128) -> Image.Image:
    """Scenes at `positions`, each beside its masks: every pixel has the tint of the layer that it shows.

    The tints of `LAYER_TINTS` lie over the grey picture; pixels that no layer has, which should not be, are red.
    """
    if not positions:
        raise ValueError("positions must name at least one picture.")
    font = ImageFont.load_default(size=11)
    wide, high = 2 * tile_px + 12, tile_px + _TEXT_PX + 6
    rows = -(-len(positions) // columns)
    sheet = Image.new("RGB", (columns * wide + 6, 22 + rows * high), "white")
    draw = ImageDraw.Draw(sheet)
    left = 6
    for family, tint in LAYER_TINTS.items():
        name = {"object": "object (copies)", "position": "object (the thing)"}.get(family, family)
        draw.rectangle((left, 5, left + 12, 17), tint)
        draw.text((left + 16, 4), name, "black", font)
        left += 32 + int(font.getlength(name))
    for place, i in enumerate(positions):
        row, column = divmod(place, columns)
        scene, left, top = world.scene(i), 6 + column * wide, 22 + row * high
        sheet.paste(_tile(Image.fromarray(scene.image), tile_px), (left, top))
        sheet.paste(_tile(Image.fromarray(_tinted(scene)), tile_px), (left + tile_px + 2, top))
        words = _wrapped(scene.caption, font, 2 * tile_px)
        draw.multiline_text((left, top + tile_px + 1), words, "black", font, spacing=1)
    return sheet


def _tinted(scene: Scene) -> UInt8[np.ndarray, "h w 3"]:
    grey = scene.image.mean(axis=2, keepdims=True)
    tints = np.empty(scene.image.shape)
    tints[:] = (255, 0, 0)
    for family, tint in LAYER_TINTS.items():
        for concept, mask in scene.masks.items():
            if concept.partition(":")[0] == family:
                tints[mask] = tint
    return np.rint(0.35 * grey + 0.65 * tints).astype(np.uint8)


def _tile(picture: Image.Image, tile_px: int) -> Image.Image:
    nearest = max(picture.size) < tile_px  # small pictures are shown pixel by pixel
    return picture.resize(_fitted(picture.size, tile_px), Image.Resampling(0 if nearest else 1))


def _fitted(size: tuple[int, int], tile_px: int) -> tuple[int, int]:
    scale = tile_px / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _wrapped(words: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int, n_lines: int = 3) -> str:
    lines = [""]
    for word in words.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width_px and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines[:n_lines])
