"""A picture of a recovery: concepts down, latents across, F1 as ink.

A column for each latent that some concept chose, in the order of the concepts; where the truth was found, ink lies on
the diagonal and nowhere else. Concepts are grouped by family, the best recovered first.
"""

from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vitrail.files import replacing
from vitrail.metrics.recovery import Recovery

CELL, LABEL, HEADER, MARGIN, FOOT = 9, 190, 52, 16, 40
INK, FAINT, FIRST, LAST = "#22262e", "#d9dce2", (246, 247, 249), (27, 58, 112)
SCALE = 2  # pixels of the PNG per unit of the SVG
FAINTEST = 0.05  # below this a cell is left white


def recovery_picture(found: Recovery, path: str | Path, *, level: str = "image") -> list[Path]:
    """PATH.svg and PATH.png. Raises ValueError if no concept could be measured at this level."""
    if level not in found.levels:
        raise ValueError(f"level must be one of {', '.join(found.levels)}, got {level!r}.")
    rows = [row for row in found.rows(n_bootstrap=0) if row["level"] == level]
    if not rows:
        raise ValueError(f"no concept has positives and negatives in both splits at the {level} level.")
    order = {family: place for place, family in enumerate(dict.fromkeys(row["family"] for row in rows))}
    rows.sort(key=lambda row: (order[row["family"]], -row["f1"], row["concept"]))
    latents = list(dict.fromkeys(row["latent"] for row in rows))
    concepts = [found.concepts.index(row["concept"]) for row in rows]
    f1 = found.levels[level].f1[np.ix_(concepts, latents)]
    path = Path(path)
    marks = _marks(f1, [row["concept"] for row in rows], [row["family"] for row in rows], level)
    size = (LABEL + CELL * len(latents) + MARGIN, HEADER + CELL * len(rows) + FOOT)
    size = (max(size[0], LABEL + 330), size[1])
    svg, png = path.with_name(path.name + ".svg"), path.with_name(path.name + ".png")
    with replacing(svg) as temporary:
        temporary.write_text(_as_svg(marks, size), encoding="utf-8")
    with replacing(png) as temporary:
        _as_image(marks, size).save(temporary, "PNG")
    return [svg, png]


# ("box", x, y, width, height, colour) ("text", x, y, words, size, anchor)
Mark = tuple[Any, ...]


def _marks(f1: np.ndarray, concepts: list[str], families: list[str], level: str) -> list[Mark]:
    n_latents = f1.shape[1]
    title = f"F1 of {n_latents} latents with {len(concepts)} concepts, {level} level, scoring split"
    marks: list[Mark] = [("text", MARGIN, 24, title, 13, "start")]
    marks.append(("text", LABEL, HEADER - 6, "latents that a concept chose, in the concepts' order", 10, "start"))
    for r, concept in enumerate(concepts):
        y = HEADER + CELL * r
        if r and families[r] != families[r - 1]:
            marks.append(("box", MARGIN, y - 0.5, LABEL - MARGIN + CELL * n_latents, 1, FAINT))
        marks.append(("text", LABEL - 6, y + CELL - 1.5, concept, 8, "end"))
        for c in np.flatnonzero(f1[r] >= FAINTEST):
            marks.append(("box", LABEL + CELL * int(c) + 0.5, y + 0.5, CELL - 1, CELL - 1, colour(f1[r, c])))
    y = HEADER + CELL * len(concepts) + 14
    for step in range(11):
        marks.append(("box", LABEL + 14 * step, y, 13, 10, colour(step / 10)))
    marks += [("text", LABEL - 6, y + 9, "F1: 0", 10, "end"), ("text", LABEL + 160, y + 9, "1", 10, "start")]
    return marks


def colour(share: float) -> str:
    """From nearly white to dark blue, evenly in lightness."""
    mixed = [a + (b - a) * float(np.clip(share, 0, 1)) for a, b in zip(FIRST, LAST, strict=True)]
    return "#" + "".join(f"{round(value):02x}" for value in mixed)


def _as_svg(marks: list[Mark], size: tuple[int, int]) -> str:
    parts = []
    for kind, *rest in marks:
        if kind == "box":
            x, y, width, height, fill = rest
            parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}"/>')
        else:
            x, y, words, points, anchor = rest
            place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}"'
            parts.append(f'<text {place} font-size="{points}" fill="{INK}">{escape(words)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" font-family="sans-serif" '
        f'role="img"><rect width="{size[0]}" height="{size[1]}" fill="#ffffff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _as_image(marks: list[Mark], size: tuple[int, int]) -> Image.Image:
    image = Image.new("RGB", (size[0] * SCALE, size[1] * SCALE), "white")
    draw = ImageDraw.Draw(image)
    for kind, *rest in marks:
        if kind == "box":
            x, y, width, height, fill = rest
            corners = [round(SCALE * value) for value in (x, y, x + width, y + height)]
            draw.rectangle((corners[0], corners[1], corners[2] - 1, corners[3] - 1), fill)
        else:
            x, y, words, points, anchor = rest
            font, at = ImageFont.load_default(points * SCALE), {"start": "ls", "end": "rs"}[anchor]
            draw.text((SCALE * x, SCALE * y), words, INK, font, at)
    return image
