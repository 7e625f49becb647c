"""Every mode of picture comes out as the RGB that a person would see; damaged ones say what is wrong."""

import contextlib
import io

import numpy as np
import pytest
from image_examples import encoded
from PIL import Image

from vitrail.images import BadImage
from vitrail.images.decode import decode_rgb


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixel(data: bytes) -> tuple[int, int, int]:
    image = decode_rgb(data)
    assert image.mode == "RGB"
    value = image.getpixel((0, 0))
    assert isinstance(value, tuple)
    return value


def test_grey_is_spread_over_three_channels():
    assert pixel(saved(Image.new("L", (4, 4), 77))) == (77, 77, 77)
    assert pixel(saved(Image.new("1", (4, 4), 1))) == (255, 255, 255)


def test_transparent_pixels_are_shown_on_white():
    # 128/255 opaque red on white: 255 stays, 0 becomes 255 - 128 = 127.
    assert pixel(saved(Image.new("RGBA", (4, 4), (255, 0, 0, 128)))) == (255, 127, 127)
    assert pixel(saved(Image.new("RGBA", (4, 4), (9, 9, 9, 0)))) == (255, 255, 255)
    assert pixel(saved(Image.new("LA", (4, 4), (0, 0)))) == (255, 255, 255)


def test_palettes_are_looked_up_with_and_without_transparency():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    assert pixel(saved(image)) == (10, 200, 30)
    assert pixel(saved(image, transparency=1)) == (255, 255, 255)


def test_sixteen_bit_grey_is_scaled_not_clipped():
    # 25800 / 257 = 100.4. Pillow's own conversion would clip it to 255; its low byte is 200, its high byte 100.
    grey = Image.fromarray(np.full((4, 4), 25800, dtype=np.uint16))
    assert pixel(saved(grey)) == (100, 100, 100)
    assert pixel(saved(grey, "TIFF")) == (100, 100, 100)
    assert pixel(saved(Image.fromarray(np.full((4, 4), 65535, dtype=np.uint16)))) == (255, 255, 255)


def test_cmyk_jpeg_is_converted():
    red, green, blue = pixel(saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    assert red > 240
    assert max(green, blue) < 20


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (8, 4), "black")
    exif = image.getexif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    assert decode_rgb(saved(image, "JPEG", exif=exif)).size == (4, 8)


def test_ranges_nobody_agreed_on_are_refused():
    with pytest.raises(BadImage, match="floating-point"):
        decode_rgb(saved(Image.new("F", (4, 4), 0.5), "TIFF"))
    with pytest.raises(BadImage, match="32-bit integer"):
        decode_rgb(saved(Image.new("I", (4, 4), 1_000_000), "TIFF"))


def test_damaged_files_say_what_is_wrong():
    jpeg = saved(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), "JPEG")
    for data, reason in (
        (b"", "empty"),
        (b"hello, I am a text", "not a picture"),
        (jpeg[: len(jpeg) // 2], "cannot be decoded.*truncated"),
        (encoded(0)[:-30], "cannot be decoded"),
    ):
        with pytest.raises(BadImage, match=reason):
            decode_rgb(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_no_damage_whatever_raises_anything_but_bad_image(kind):
    good = encoded(1, kind)
    generator = np.random.default_rng(0)
    for _ in range(150):
        data = bytearray(good)
        for at in generator.integers(0, len(data), 4):
            data[at] = generator.integers(256)
        with contextlib.suppress(BadImage):
            assert decode_rgb(bytes(data[: generator.integers(1, len(data) + 1)])).mode == "RGB"


def test_too_many_pixels_are_refused_before_they_fill_the_memory(monkeypatch):
    data = saved(Image.new("L", (200, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15_000)  # Pillow warns above this ...
    with pytest.raises(BadImage, match="too many pixels"):
        decode_rgb(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000)  # ... and refuses above twice this
    with pytest.raises(BadImage, match="too many pixels"):
        decode_rgb(data)
