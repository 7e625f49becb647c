"""A contact sheet: many pictures of a source on one, each with what is known of it."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from vitrail.images.base import BadImage, ImageSource


def contact_sheet(
    source: ImageSource, positions: Sequence[int], *, columns: int = 8, tile_px: int = 128, captions: bool = True
) -> Image.Image:
    """Pictures of `source` at `positions`, row by row, with caption (or class) below. Bad pictures say why."""
    if not positions:
        raise ValueError("positions must name at least one picture.")
    font = ImageFont.load_default(size=10)
    text_px = 40 if captions else 0
    rows = -(-len(positions) // columns)
    sheet = Image.new("RGB", (columns * (tile_px + 6) + 6, rows * (tile_px + text_px + 6) + 6), "white")
    draw = ImageDraw.Draw(sheet)
    for place, i in enumerate(positions):
        row, column = divmod(place, columns)
        left, top = 6 + column * (tile_px + 6), 6 + row * (tile_px + text_px + 6)
        record = source.record(i)
        words = record.caption or record.class_name or record.id
        try:
            picture = source.load(i)
            nearest = max(picture.size) < tile_px  # small pictures are shown pixel by pixel
            picture = picture.resize(_fitted(picture.size, tile_px), Image.Resampling(0 if nearest else 1))
            sheet.paste(picture, (left, top))
        except BadImage as error:
            words = f"unreadable: {error}"
        if captions:
            draw.multiline_text((left, top + tile_px + 1), _wrapped(words, font, tile_px), "black", font, spacing=1)
    return sheet


def _fitted(size: tuple[int, int], tile_px: int) -> tuple[int, int]:
    scale = tile_px / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _wrapped(words: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int) -> str:
    lines = [""]
    for word in words.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width_px and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines[:3])
