"""How a scene of the world "shapes" is painted: ground, specks, things, bar and letters, each over what was before.

A picture is fp32 (3, h, w) in 0..255 until `photograph`. Masks hold the pixels that a layer covers at least half.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from jaxtyping import Bool, Float, UInt8

from vitrail.images.worlds.backgrounds import BACKGROUNDS
from vitrail.images.worlds.draws import Draws
from vitrail.images.worlds.factors import COLOURS, COPY_RADIUS, ORIENTATIONS, Copy, Factors
from vitrail.images.worlds.fills import FILLS
from vitrail.images.worlds.lettering import lettered
from vitrail.images.worlds.silhouettes import SILHOUETTES

Plane = Float[np.ndarray, "h w"]
Picture = Float[np.ndarray, "3 h w"]
Mask = Bool[np.ndarray, "h w"]

PAPER, INK, PENCIL = (250.0, 248.0, 240.0), (36.0, 36.0, 44.0), (168.0, 168.0, 168.0)
BAR_TONE = (104.0, 100.0, 96.0)
REACH = 1.3  # no outline reaches farther than this many radii


def ground(factors: Factors, draws: Draws, image_px: int, drawing: bool) -> Picture:
    background = BACKGROUNDS[factors.background]
    field = background.field(draws, image_px)
    picture = np.empty((3, *field.shape), dtype=np.float32)
    if drawing:
        picture[:] = np.array(PAPER, dtype=np.float32)[:, None, None]
        _blend(picture, _contour(field, image_px), PENCIL)
        return picture
    for channel, jitter in enumerate(factors.ground_jitter):
        dark, light = background.dark[channel], background.light[channel]
        picture[channel] = field * float(light - dark) + (dark + jitter)
    return picture


def _contour(field: Plane, image_px: int) -> Plane:
    """A line where the field passes one half, about one pixel of 64 wide: distance is height over steepness."""
    across, down = np.zeros_like(field), np.zeros_like(field)
    across[:, 1:-1] = np.abs(field[:, 2:] - field[:, :-2])
    down[1:-1] = np.abs(field[2:] - field[:-2])
    steepness = np.maximum(across, down) * (0.5 * image_px / 64.0) + 1e-6
    return np.clip(1.0 - np.abs(field - 0.5) / steepness, 0.0, 1.0)


def _blend(picture: Picture, share: Plane, tone: Sequence[float]) -> None:
    for channel in range(3):
        picture[channel] += share * (tone[channel] - picture[channel])


def specks(picture: Picture, draws: Draws, n: int, drawing: bool) -> Mask:
    """n small discs anywhere."""
    x, y = centres(picture.shape[1])
    mask = np.zeros(picture.shape[1:], dtype=bool)
    colours = list(COLOURS.values())
    for _ in range(n):
        centre_x, centre_y, size, colour = draws.uniform(4)
        across, down = x - 64.0 * centre_x, y - 64.0 * centre_y
        inside = across * across + down * down <= (1.2 + 1.8 * size) ** 2
        tone = INK if drawing else colours[int(colour * len(colours))][0]
        picture[:, inside] = np.array(tone, dtype=np.float32)[:, None]
        mask |= inside
    return mask


def thing(picture: Picture, factors: Factors, drawing: bool, copy: Copy | None = None) -> Mask:
    """Paints the thing, or a small copy of it, and returns the pixels that it covers at least half."""
    image_px = picture.shape[1]
    place_x, place_y, turn = copy or (factors.x, factors.y, factors.turn)
    radius = COPY_RADIUS if copy else factors.radius
    scale = 64.0 / image_px
    # Only a window about the thing is painted: elsewhere it covers exactly nothing.
    reach = REACH * radius + 2.0 * scale
    columns = slice(max(0, int((place_x - reach) / scale)), int((place_x + reach) / scale) + 1)
    rows = slice(max(0, int((place_y - reach) / scale)), int((place_y + reach) / scale) + 1)
    window = picture[:, rows, columns]
    x, y = centres(image_px)
    u, v = _turned(x[:, columns] - place_x, y[rows] - place_y, *_TURNS[round((turn + 1.0) * 32.0)])
    if factors.orientation is not None:
        quarter = ORIENTATIONS[factors.shape][factors.orientation]
        u, v = ((u, v), (v, -u), (-u, -v), (-v, u))[quarter]
    distance = SILHOUETTES[factors.shape](u * (1.0 / radius), v * (1.0 / radius))
    distance *= radius / scale  # in pixels of this image
    covered = np.clip(0.5 - distance, 0.0, 1.0)
    across, down = _turned(u, v, *_HALF_CIRCLE[int(factors.texture_turn * 64.0)])
    second = FILLS[factors.texture](across + factors.phase[0], down + factors.phase[1])
    if drawing:
        edges = np.clip(3.0 - 3.0 * np.abs(2.0 * second - 1.0), 0.0, 1.0)  # where the texture's two tones meet
        outline = np.clip(1.5 - np.abs(distance * scale + 0.75), 0.0, 1.0)
        _blend(window, covered, PAPER)
        _blend(window, covered * np.maximum(edges, outline), INK)
    else:
        first_tone, second_tone = COLOURS[factors.colour]
        for channel, jitter in enumerate(factors.tone_jitter):
            first, other = first_tone[channel] + jitter, second_tone[channel] + jitter
            tone = second * float(other - first) + float(first)
            window[channel] += covered * (tone - window[channel])
    mask = np.zeros(picture.shape[1:], dtype=bool)
    mask[rows, columns] = distance <= 0.0
    return mask


def bar(picture: Picture, factors: Factors, inside: Mask, drawing: bool) -> Mask:
    """A straight bar from edge to edge, as wide as it takes to hide the wanted share of the pixels `inside`."""
    assert factors.bar is not None
    share, place, turn = factors.bar
    n_hidden = round(share * int(inside.sum()))
    if n_hidden == 0:
        return np.zeros_like(inside)
    x, y = centres(picture.shape[1])
    # Odd steps of the half circle: no row, column or diagonal of pixels lies along the bar, so that pixels rarely tie.
    cos, sin = _HALF_CIRCLE[2 * int(turn * 32.0) + 1]
    along = x * cos + y * sin
    ranked = np.sort(along[inside])
    first = round(place * (len(ranked) - n_hidden))
    low, high = ranked[first], ranked[first + n_hidden - 1]
    mask = (along >= low) & (along <= high)
    if drawing:
        edge = np.minimum(np.abs(along - low), np.abs(along - high))
        _blend(picture, mask.astype(np.float32), PAPER)
        _blend(picture, mask * np.clip(1.5 - edge, 0.0, 1.0), INK)
    else:
        _blend(picture, mask.astype(np.float32), BAR_TONE)
    return mask


def letters(picture: Picture, factors: Factors) -> Mask:
    """The word, in black where most of what it covers is light and in white where most is dark."""
    assert factors.word is not None
    assert factors.font is not None
    word = lettered(factors.word, factors.font, factors.word_scale)
    mask = letter_mask(word, factors.word_x, factors.word_y, picture.shape[1])
    below = picture[:, mask]
    light = int((0.3 * below[0] + 0.6 * below[1] + 0.1 * below[2] > 120.0).sum())
    picture[:, mask] = 16.0 if 2 * light > below.shape[1] else 240.0
    return mask


def letter_mask(word: Bool[np.ndarray, "word_h word_w"], left: int, top: int, image_px: int) -> Mask:
    """Where the letters are. A letter's pixel is one pixel of a 64-pixel image, of larger images the nearest."""
    page = np.zeros((64, 64), dtype=bool)
    page[top : top + word.shape[0], left : left + word.shape[1]] = word
    if image_px == 64:
        return page
    nearest = (np.arange(image_px) * 2 + 1) * 32 // image_px
    return page[nearest[:, None], nearest[None, :]]


def _pastel(picture: Picture) -> Picture:
    return picture * 0.6 + 100.0


def _grey(picture: Picture) -> Picture:
    grey = picture[0] * (77 / 256) + picture[1] * (150 / 256) + picture[2] * (29 / 256)
    return np.broadcast_to(grey, picture.shape)


PALETTES: dict[str, Callable[[Picture], Picture] | None] = {"plain": None, "pastel": _pastel, "grey": _grey}


def photograph(picture: Picture, brightness: float, draws: Draws, palette: str) -> UInt8[np.ndarray, "h w 3"]:
    """Brightness, tones and the camera's noise."""
    # The sum of two bytes is triangular noise: -8..8 grey levels, standard deviation 3.3.
    grain = draws.bytes(2, *picture.shape).astype(np.float32)
    toned = PALETTES[palette]
    if toned is not None:
        picture = toned(picture)
    picture = picture * brightness + (grain[0] + grain[1] - 255.0) * (1.0 / 32.0)
    return np.ascontiguousarray(np.rint(np.clip(picture, 0.0, 255.0)).astype(np.uint8).transpose(1, 2, 0))


def _cos_sin(degrees: float) -> tuple[float, float]:
    """Rounded to 1/4096: the last digits of cos and sin differ between platforms."""
    radians = math.radians(degrees)
    return round(math.cos(radians) * 4096) / 4096, round(math.sin(radians) * 4096) / 4096


_TURNS = [_cos_sin(15.0 * (step - 32) / 32) for step in range(65)]
_HALF_CIRCLE = [_cos_sin(180.0 * step / 64) for step in range(64)]


def _turned(
    u: Float[np.ndarray, "#h #w"], v: Float[np.ndarray, "#h #w"], cos: float, sin: float
) -> tuple[Plane, Plane]:
    return u * cos + v * sin, v * cos - u * sin


@cache
def centres(image_px: int) -> tuple[Float[np.ndarray, "1 w"], Float[np.ndarray, "h 1"]]:
    """x and y of the pixel centres, in pixels of a 64-pixel image."""
    middles = ((np.arange(image_px) * 2 + 1) * (32.0 / image_px)).astype(np.float32)
    return middles[None, :], middles[:, None]
