"""Pictures with a wrong word written on them: a typographic attack on whatever source they come from.

    word      one of `words` that is not true of the picture
    font      the built-in one, one of bits, or a TrueType file
    place     a third of the height, then anywhere in it
    colour    one of eight, with an outline or without
    size      height of a line, in pixels of a picture whose shorter side is 224

All within the middle square, which a model's centre crop keeps.

Materzynska et al. and Azuma & Matsui wrote such words to fool CLIP; "Steering CLIP's vision transformer with sparse
autoencoders", section 7.2, writes one on each picture of ImageNet-100 and does not say how (SPEC row 125). What is
written on a picture depends on `seed` and on its id alone, each draw on its own: other fonts move no word.
"""

import csv
import hashlib
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from vitrail.files import file_digest, json_digest, replacing
from vitrail.images.base import ImageRecord, ImageSource
from vitrail.images.worlds.draws import Draws, pick
from vitrail.images.worlds.lettering import FONTS as BIT_FONTS
from vitrail.images.worlds.lettering import lettered

BUILT_IN = "built-in"
COLOURS: Mapping[str, tuple[int, int, int]] = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "red": (220, 30, 30),
    "green": (20, 150, 40),
    "blue": (30, 60, 220),
    "yellow": (250, 220, 30),
    "orange": (240, 130, 20),
    "purple": (130, 40, 160),
}
BANDS = ("top", "middle", "bottom")
REFERENCE_PX = 224
BIT_SHARE = 0.75  # of a line's height that a line of bits takes: about a capital's
_MASK_LEVEL = 64  # of 255: a pixel that shows at least a quarter of a stroke is the text's
_WORD, _FONT, _SIZE, _COLOUR, _BAND, _LEFT, _TOP, _SHARE, _OUTLINE = range(9)
COLUMNS = ("id", "path", "label", "class_name", "word", "font", "size_px", "colour", "outline", "left", "top")
COLUMNS += ("right", "bottom")


@dataclass(frozen=True)
class Attack:
    """What may be written. Raises ValueError for what cannot be.

    words    the words that are drawn from
    fonts    "built-in", fonts of bits (vitrail.images.worlds.lettering), TrueType files by path
    sizes    smallest and largest line, pixels of 224; a word that does not fit is broken into lines, then made smaller
    places   of "top", "middle", "bottom"
    outline  share of words with an outline in black or white, whichever stands out
    share    share of pictures that are written on
    """

    words: tuple[str, ...]
    fonts: tuple[str, ...] = (BUILT_IN,)
    sizes: tuple[int, int] = (20, 40)
    places: tuple[str, ...] = BANDS
    colours: tuple[str, ...] = tuple(COLOURS)
    outline: float = 0.5
    share: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("words", "fonts", "places", "colours"):
            given = getattr(self, name)
            if isinstance(given, str) or not given or len(set(given)) < len(given):
                raise ValueError(f"{name} must be a list of at least one, each once, got {given!r}.")
        for name, known in (("places", BANDS), ("colours", tuple(COLOURS))):
            for one in getattr(self, name):
                if one not in known:
                    raise ValueError(f"{name} are of {', '.join(known)}, got {one!r}.")
        if not 4 <= self.sizes[0] <= self.sizes[1] <= REFERENCE_PX:
            raise ValueError(f"sizes must be smallest, largest in 4..{REFERENCE_PX}, got {self.sizes}.")
        for name in ("outline", "share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share in 0..1, got {getattr(self, name)}.")
        for word in self.words:
            if not word.strip() or word != word.strip():
                raise ValueError(f"a word must not be empty, nor begin or end with a space, got {word!r}.")
        for font in self.fonts:
            _check_font(font, self.words)

    def to_json(self) -> dict[str, Any]:
        """Fonts from files with their digest: a path alone does not say what is drawn."""
        files = {font: file_digest(Path(font)) for font in self.fonts if font not in (BUILT_IN, *BIT_FONTS)}
        return {**asdict(self), **({"font_files": files} if files else {})}


@dataclass(frozen=True)
class Written:
    """What is written on a picture. `box`: left, top, right, bottom in its pixels; `size_px`: of a line, of 224."""

    word: str
    font: str
    size_px: float
    colour: str
    outline: bool
    box: tuple[int, int, int, int]


class AttackedImages(ImageSource):
    """`images` with a word on each, ids and labels as they were, so that pictures pair with the clean ones.

    `present`: by id, further names that are true of a picture and so are not written on it; its class, and a word that
    is part of its class's name ("star" of "striped star"), are not in any case. A picture of which all words are true
    is left as it is.
    """

    def __init__(
        self, images: ImageSource, attack: Attack, *, present: Mapping[str, Collection[str]] | None = None
    ) -> None:
        self.images, self.attack, self.present = images, attack, present or {}
        self.classes = images.classes

    @property
    def spec(self) -> str:
        """For the record: names the pictures and the attack, and is opened by nothing (save the pictures for that)."""
        return f"attacked:{self.images.spec}#{json_digest([self.attack.to_json(), self._said()])[:16]}"

    def __len__(self) -> int:
        return len(self.images)

    def record(self, i: int) -> ImageRecord:
        return self.images.record(i)

    def size_bytes(self, i: int) -> int:
        return self.images.size_bytes(i)

    def fingerprint(self) -> str:
        return json_digest([self.images.fingerprint(), self.attack.to_json(), self._said()])

    def load(self, i: int) -> Image.Image:
        picture = self.images.load(i)
        written = self.written(i, picture.size)
        return picture if written is None else drawn(picture, written)

    def written(self, i: int, size: tuple[int, int] | None = None) -> Written | None:
        """What is written on picture i; None: nothing. `size`: its width and height, where they are known."""
        record, attack = self.images.record(i), self.attack
        draws = _draws(attack.seed, record.id)
        true = {*self.present.get(record.id, ()), record.class_name}
        parts = set((record.class_name or "").split())
        words = [word for word in attack.words if word not in true and word not in parts]
        if not words or draws[_SHARE] >= attack.share:
            return None
        word, font = pick(words, draws[_WORD]), pick(attack.fonts, draws[_FONT])
        low, high = attack.sizes
        asked = low + draws[_SIZE] * (high - low)
        width, height = size or self.images.load(i).size
        side = min(width, height)
        text, px = fitting(word, font, asked * side / REFERENCE_PX, side)
        bits, band = glyphs(text, font, px), BANDS.index(pick(attack.places, draws[_BAND]))
        left, top = _corner(bits.shape, side, band, draws[_LEFT], draws[_TOP])
        left, top = left + (width - side) // 2, top + (height - side) // 2
        box = (left, top, left + bits.shape[1], top + bits.shape[0])
        colour, outline = pick(attack.colours, draws[_COLOUR]), draws[_OUTLINE] < attack.outline
        return Written(word, font, px * REFERENCE_PX / side, colour, outline, box)

    def mask(self, i: int) -> Bool[np.ndarray, "h w"]:
        """The text's pixels (its outline left out); all False where nothing is written."""
        width, height = size = self.images.load(i).size
        written = self.written(i, size)
        mask = np.zeros((height, width), dtype=bool)
        if written is not None:
            left, top, right, bottom = written.box
            mask[top:bottom, left:right] = _glyphs_of(written, size) >= _MASK_LEVEL
        return mask

    def _said(self) -> dict[str, list[str]]:
        return {one: sorted(names) for one, names in sorted(self.present.items())}


def halves(names: Sequence[str], *, seed: int = 0) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(selection, unseen): half of the names each, by their spelling and the seed. Raises ValueError below two."""
    if len(set(names)) < 2:
        raise ValueError(f"two different names at least can be halved, got {list(names)}.")
    order = sorted(set(names), key=lambda name: hashlib.sha256(f"{seed}|{name}".encode()).digest())
    first = set(order[: (len(order) + 1) // 2])
    return tuple(name for name in names if name in first), tuple(name for name in names if name not in first)


@dataclass(frozen=True)
class AttackSplits:
    """Attacks to choose a defence on, and those that it has not seen: in one respect each, and in all of them."""

    selection: Attack
    unseen: Mapping[str, Attack]

    @classmethod
    def of(
        cls,
        words: Sequence[str],
        fonts: Sequence[str] = (BUILT_IN, "bold", "dejavu-serif", "regular", "dejavu-mono", "slanted"),
        *,
        seed: int = 0,
        outline: float = 0.5,
    ) -> "AttackSplits":
        """Words and fonts are halved; lines of 20 to 30 px at top and bottom are for choosing, 30 to 40 px in the
        middle unseen."""
        seen_words, new_words = halves(words, seed=seed)
        seen_fonts, new_fonts = tuple(fonts[: (len(fonts) + 1) // 2]), tuple(fonts[(len(fonts) + 1) // 2 :])
        if not new_fonts:
            raise ValueError(f"two fonts at least are needed, one of them unseen, got {list(fonts)}.")
        seen = Attack(seen_words, seen_fonts, (20, 30), ("top", "bottom"), outline=outline, seed=seed)
        other = replace(seen, seed=seed + 1_000_003)
        unseen = {
            "unseen fonts": replace(other, fonts=new_fonts),
            "unseen words": replace(other, words=new_words),
            "unseen places and sizes": replace(other, places=("middle",), sizes=(30, 40)),
        }
        everything = replace(other, fonts=new_fonts, words=new_words, places=("middle",), sizes=(30, 40))
        return cls(seen, unseen | {"all unseen": everything})


def save_attacked(source: AttackedImages, out: Path) -> list[dict[str, Any]]:
    """Writes `out`/pictures/*.png and `out`/attack.csv, which opens as a table of pictures; returns its rows."""
    rows = []
    for i in range(len(source)):
        record, picture = source.record(i), source.load(i)
        name = f"{i:05d}-{_plain(Path(record.id).stem)}.png"
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        with replacing(out / "pictures" / name) as temporary:
            temporary.write_bytes(buffer.getvalue())
        row: dict[str, Any] = {"id": record.id, "path": f"pictures/{name}", "label": record.label}
        row["class_name"] = record.class_name
        written = source.written(i, picture.size)
        if written is not None:
            row |= {name: getattr(written, name) for name in ("word", "font", "colour")}
            row |= {"size_px": round(written.size_px, 1), "outline": int(written.outline)}
            row |= dict(zip(("left", "top", "right", "bottom"), written.box, strict=True))
        rows.append(row)
    with replacing(out / "attack.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return rows


# ------------------------------------------------------------------------------------------------------------ letters


def drawn(picture: Image.Image, written: Written) -> Image.Image:
    """The picture with the word on it; `picture` is left as it is."""
    colour = COLOURS[written.colour]
    bits = Image.fromarray(_glyphs_of(written, picture.size))
    out = picture.copy()
    if written.outline:
        edge = max(1, round(bits.height / (written.word.count(" ") + 1) / 14))
        wide = Image.new("L", (bits.width + 2 * edge, bits.height + 2 * edge))
        wide.paste(bits, (edge, edge))
        wide = wide.filter(ImageFilter.MaxFilter(2 * edge + 1))
        light = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 127
        around = Image.new("RGB", wide.size, "black" if light else "white")
        out.paste(around, (written.box[0] - edge, written.box[1] - edge), wide)
    out.paste(Image.new("RGB", bits.size, colour), written.box[:2], bits)
    return out


def fitting(word: str, font: str, px: float, side: int) -> tuple[str, float]:
    """(the word, in lines where one is too long, height of a line) as large as asked or as fits a square of this side,
    with a small margin."""
    for _ in range(40):
        px = round(px, 2)
        for text in dict.fromkeys((word, word.replace(" ", "\n"))):
            shape = glyphs(text, font, px).shape
            if max(shape) <= 0.94 * side:
                return text, px
        px *= 0.92
    raise ValueError(f"{word!r} cannot be written on {side} x {side} pixels: it is too long.")


@lru_cache(maxsize=512)
def glyphs(text: str, font: str, px: float) -> UInt8[np.ndarray, "h w"]:
    """How much of each pixel the letters cover, 0 to 255, cut to the letters. `px`: height of a line."""
    if font in BIT_FONTS:
        bits = _bit_lines(text, font)
        n_lines = text.count("\n") + 1
        scale = BIT_SHARE * px * n_lines / bits.shape[0]
        size = (max(1, round(bits.shape[1] * scale)), max(1, round(bits.shape[0] * scale)))
        grown = Image.fromarray(bits.astype(np.uint8) * 255).resize(size, Image.Resampling.BOX)
        return np.asarray(grown)
    face = _face(font, max(4, round(px)))
    ruler = ImageDraw.Draw(Image.new("L", (1, 1)))
    left, top, right, bottom = (round(v) for v in ruler.multiline_textbbox((0, 0), text, face, align="center"))
    canvas = Image.new("L", (max(1, right - left), max(1, bottom - top)))
    ImageDraw.Draw(canvas).multiline_text((-left, -top), text, 255, face, align="center")
    return np.asarray(canvas)


def _bit_lines(text: str, font: str) -> Bool[np.ndarray, "rows w"]:
    """`lettered` puts a word to a line; words of one line stand beside each other here, a letter apart."""
    if "\n" in text:
        return lettered(text.lower().replace("\n", " "), font)
    parts = [lettered(word.lower(), font) for word in text.split(" ")]
    gap = np.zeros((len(parts[0]), 4), dtype=bool)
    return np.hstack([piece for part in parts for piece in (part, gap)][:-1])


@lru_cache(maxsize=64)
def _face(font: str, px: int) -> ImageFont.FreeTypeFont:
    if font != BUILT_IN:
        return ImageFont.truetype(font, px)
    face = ImageFont.load_default(px)
    if not isinstance(face, ImageFont.FreeTypeFont):
        raise ValueError("this Pillow has no FreeType and so no built-in font of any size: name a font of bits.")
    return face


def _check_font(font: str, words: Sequence[str]) -> None:
    if font in BIT_FONTS:
        for word in words:
            try:
                _bit_lines(word, font)
            except (KeyError, IndexError):
                raise ValueError(
                    f"letters of bits are a to z, 0 to 9 and hyphens: {font} cannot write {word!r}."
                ) from None
    elif font != BUILT_IN:
        try:
            ImageFont.truetype(font, 20)
        except OSError as error:
            known = f"{BUILT_IN}, {', '.join(BIT_FONTS)}, or the path of a TrueType file"
            raise ValueError(f"there is no font {font!r} ({error}). Give {known}.") from error


def _glyphs_of(written: Written, size: tuple[int, int]) -> UInt8[np.ndarray, "h w"]:
    px, (left, top, right, bottom) = written.size_px * min(size) / REFERENCE_PX, written.box
    for text in (written.word, written.word.replace(" ", "\n")):
        bits = glyphs(text, written.font, round(px, 2))
        if bits.shape == (bottom - top, right - left):
            return bits
    raise ValueError(f"what is written is of a picture of another size: {written}.")


def _corner(shape: tuple[int, ...], side: int, band: int, across: float, down: float) -> tuple[int, int]:
    """Left and top. The text's middle lies in the band; where the text is too high for that, as near as it can."""
    top = (band + down) * side / 3 - shape[0] / 2
    return round(across * (side - shape[1])), round(min(max(top, 0), side - shape[0]))


def _draws(seed: int, image_id: str) -> list[float]:
    digest = hashlib.sha256(f"{seed}|{image_id}".encode()).digest()
    key = (int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little"))
    return Draws(key, 0, 0).uniform(9)


def _plain(name: str) -> str:
    return "".join(sign if sign.isalnum() or sign in "-_" else "_" for sign in name)[:60]
