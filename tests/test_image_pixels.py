"""Pictures of every mode that PIL has: the numbers of the same picture, or a refusal that names file and mode."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from recipes.data.image_pixels import from_0_to_1, reading, to_tensor

GREYS = np.array([[0.0, 0.25], [0.5, 1.0]])
SIXTEEN = (GREYS * 65535).astype(np.uint16)


def test_eight_bits_stay_eight_bits() -> None:
    kinds = {image.mode: to_tensor(image, (2, 2), 1).dtype for image in (Image.new("RGB", (3, 3)), Image.fromarray(SIXTEEN))}
    assert kinds == {"RGB": torch.uint8, "I;16": torch.float32}


def reread(image: Image.Image, kind: str, **how: Any) -> Image.Image:
    """As it comes out of a file."""
    file = io.BytesIO()
    image.save(file, kind, **how)
    file.seek(0)
    return Image.open(file)


def pixels(image: Image.Image, channels: int = 1, size: tuple[int, int] = (2, 2)) -> torch.Tensor:
    with reading("the_file"):
        return from_0_to_1(to_tensor(image, size, channels))


@pytest.mark.parametrize(
    "image",
    [
        reread(Image.fromarray((GREYS * 255).round().astype(np.uint8)), "PNG"),
        reread(Image.fromarray(SIXTEEN), "PNG"),
        reread(Image.fromarray(SIXTEEN), "TIFF"),
        reread(Image.fromarray(SIXTEEN.astype(">u2")), "TIFF"),
        reread(Image.fromarray(65535 - SIXTEEN), "TIFF", tiffinfo={262: 0}),  # white is zero
        reread(Image.fromarray(SIXTEEN), "PPM"),  # in 32 bits, for PIL
        reread(Image.fromarray(GREYS.astype(np.float32)), "TIFF"),
    ],
    ids=["8 bits", "16-bit PNG", "16-bit TIFF", "big-endian", "white is zero", "16-bit PGM", "float"],
)
def test_grey_of_any_depth(image: Image.Image) -> None:
    expected = torch.tensor(GREYS, dtype=torch.float32)
    torch.testing.assert_close(pixels(image)[0], expected, atol=3e-3, rtol=0)
    torch.testing.assert_close(pixels(image, 3)[2], expected, atol=3e-3, rtol=0)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("1", 1, (1, 1, 1)),
        ("CMYK", (255, 0, 0, 0), (0, 1, 1)),
        ("YCbCr", (76, 85, 255), (1, 0, 0)),
        ("HSV", (0, 255, 255), (1, 0, 0)),
        ("RGBX", (0, 255, 0, 0), (0, 1, 0)),
        ("RGBA", (255, 0, 0, 0), (1, 1, 1)),
        ("RGBA", (255, 0, 0, 128), (1, 0.5, 0.5)),
        ("RGBa", (128, 0, 0, 128), (1, 0.5, 0.5)),
        ("LA", (0, 128), (0.5, 0.5, 0.5)),
    ],
)
def test_colours_and_transparency_on_white(mode: str, colour: Any, expected: tuple[float, ...]) -> None:
    image = Image.new(mode, (2, 2), colour)
    assert pixels(image, 3).mean((1, 2)).tolist() == pytest.approx(expected, abs=5e-3)
    grey = np.dot(expected, (0.299, 0.587, 0.114))
    assert float(pixels(image).mean()) == pytest.approx(grey, abs=5e-3)


def test_a_colour_that_stands_for_transparent_is_white() -> None:
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    assert pixels(reread(palette, "PNG"), 3).mean((1, 2)).tolist() == [1, 0, 0]
    assert pixels(reread(palette, "PNG", transparency=0), 3).mean((1, 2)).tolist() == [1, 1, 1]
    deep = reread(Image.fromarray(SIXTEEN), "PNG", transparency=int(SIXTEEN[0, 1]))
    assert pixels(deep)[0].tolist() == [[0, 1], [pytest.approx(0.5, abs=1e-4), 1]]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_it_is_turned_upright(kind: str) -> None:
    dark_right = np.repeat([[255, 0]], 16, 0).repeat(16, 1).astype(np.uint8)
    upright = {3: [[0, 1], [0, 1]], 5: [[1, 1], [0, 0]], 6: [[1, 1], [0, 0]], 8: [[0, 0], [1, 1]]}
    for orientation, expected in upright.items():
        exif = Image.Exif()
        exif[274] = orientation
        image = reread(Image.fromarray(dark_right).convert("RGB"), kind, exif=exif)
        assert pixels(image).round()[0].tolist() == expected, orientation
    for broken in (b"Exif\0\0MM\0*\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\x09\0"):
        if kind == "JPEG":  # whose pixels are good
            assert pixels(reread(Image.fromarray(dark_right), kind, exif=broken)).round()[0].tolist() == [[1, 0], [1, 0]]


@pytest.mark.parametrize(
    ("image", "parts"),
    [
        (reread(Image.fromarray(GREYS.astype(np.float32) * 255), "TIFF"), ["mode F", "0 to 255"]),
        (reread(Image.fromarray(GREYS.astype(np.float32) * np.nan), "TIFF"), ["mode F", "nan"]),
        (reread(Image.fromarray(SIXTEEN.astype(np.int32)), "TIFF"), ["mode I", "32-bit"]),
        (Image.new("La", (2, 2)), ["La"]),
    ],
    ids=["floats to 255", "NaN", "32-bit integers", "La"],
)
def test_what_has_no_known_white_is_refused_by_name(image: Image.Image, parts: list[str]) -> None:
    with pytest.raises(OSError, match="the_file cannot be read as an image") as caught:
        pixels(image)
    for part in parts:
        assert part in str(caught.value)


def test_a_decompression_bomb_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(OSError, match=r"the_file cannot be read as an image .*bomb"), reading("the_file"):
        reread(Image.new("L", (5, 5)), "PNG")
