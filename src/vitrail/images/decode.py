"""Bytes to an upright RGB picture, or the reason why not.

Transparent pixels are shown on white. 16-bit grey is scaled to 8 bits (Pillow's own conversion would clip it to white).
EXIF orientation is applied. Of a moving picture the first frame is taken. A picture that is cut short is refused: the
grey that Pillow can fill in would be data that nobody took.
"""

import warnings
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vitrail.images.base import BadImage

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def decode_rgb(data: bytes) -> Image.Image:
    if not data:
        raise BadImage("the file is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # broken EXIF, palettes and the like, which do not change the picture
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(BytesIO(data)) as image:
                image.load()
                return _rgb(ImageOps.exif_transpose(image))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise BadImage(f"too many pixels ({error})") from error
    except UnidentifiedImageError as error:
        raise BadImage(f"not a picture that Pillow knows ({len(data)} bytes)") from error
    # Pillow's readers raise all of these on damaged files, SyntaxError for PNG included.
    except (OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, OverflowError, EOFError) as error:
        raise BadImage(f"cannot be decoded: {error}") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        image = _eight_bit(image)
    if image.mode == "F":
        raise BadImage("floating-point pixels have no agreed range; save it with 8 or 16 bits")
    if image.mode == "La" or image.mode == "RGBa" or image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, which older versions of Pillow open as 32."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise BadImage("32-bit integer pixels have no agreed range; save it with 8 or 16 bits")
    return Image.fromarray((values // 257).astype(np.uint8))
