"""From a picture to numbers: every mode that PIL has becomes grey or RGB, or is refused by its name.

8-bit pixels stay uint8, from 0 to 255, until the network takes them: a quarter of the bytes. All others are fp32, from 0 to 1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recipes.data.hub import one_line

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

# Modes with more than 8 bits a pixel, which PIL's `convert` clips instead of scaling.
DEEP_GREY = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
SAVE_AGAIN = "save it with 8 or 16 bits a channel"
ORIENTATION, BITS_PER_SAMPLE, PHOTOMETRIC = 274, 258, 262  # tags of EXIF and TIFF
WHITE_IS_ZERO = 0


@contextlib.contextmanager
def reading(name: str | Path) -> Iterator[None]:
    """Turn whatever a decoder raises into OSError with the name of the picture: PIL's errors have no common class."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise OSError(f"{name} cannot be read as an image ({one_line(error)})") from error


def from_0_to_1(images: torch.Tensor) -> torch.Tensor:
    """Images as floats from 0 to 1: uint8 divided by 255, others as they are."""
    import torch

    return images / 255 if images.dtype == torch.uint8 else images


def to_tensor(image: Image, size: tuple[int, int], channels: int) -> torch.Tensor:
    """A PIL image as uint8 or fp32 [channels, height, width]: scaled so that it covers `size`, then cropped in the centre.

    It is turned as its EXIF data say, transparent parts become white, and of several frames the first is taken. ValueError
    for pixels whose values for black and white are not known.
    """
    import torch
    from PIL import ImageOps
    from PIL.Image import Resampling

    if channels not in (1, 3):
        raise ValueError(f"in_channels {channels}: images have 1 (grey) or 3 (RGB)")
    image.load()  # a PNG may have its EXIF data after its pixels; PIL turns a TIFF while loading it
    shown = _upright(_deep_grey(image) if image.mode in DEEP_GREY else _eight_bits(image, channels), _orientation(image))
    pixels = np.asarray(ImageOps.fit(shown, (size[1], size[0]), Resampling.BICUBIC))
    if shown.mode == "F":  # bicubic scaling overshoots; PIL clips that by itself where a pixel has 8 bits
        pixels = pixels.clip(0.0, 1.0)[..., None].repeat(channels, 2)
    return torch.from_numpy(pixels.reshape(*size, channels).transpose(2, 0, 1).copy())


def _eight_bits(image: Image, channels: int) -> Image:
    """The image in mode L or RGB, transparent parts white."""
    import PIL.Image

    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    if image.mode not in ("1", "L"):
        image = image.convert("RGB")  # not every mode can be made grey directly
    return image.convert("L" if channels == 1 else "RGB")


def _deep_grey(image: Image) -> Image:
    """The image in mode F, from 0 to 1. ValueError if its white is not known."""
    import PIL.Image

    values, tags = np.asarray(image).astype(np.float32), getattr(image, "tag_v2", {})
    if image.mode == "F":
        low, high = float(values.min()), float(values.max())
        if not (low >= 0.0 and high <= 1.0):  # also if they are NaN
            raise ValueError(f"mode F, floats, here from {low:g} to {high:g}: only 0 to 1 has a known white; {SAVE_AGAIN}")
        grey = values
    elif image.mode == "I" and image.format not in ("PNG", "PPM"):  # these two have 16 bits
        raise ValueError(f"mode I, 32-bit integers, has no known white; {SAVE_AGAIN}")
    else:
        grey = values / (2.0 ** tags.get(BITS_PER_SAMPLE, (16,))[0] - 1.0)
        if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:  # PIL minds that with 8 bits, not with 16
            grey = 1.0 - grey
    if "transparency" in image.info:
        grey = np.where(values == image.info["transparency"], np.float32(1.0), grey)
    return PIL.Image.fromarray(grey)


def _orientation(image: Image) -> Any:
    """The orientation in the EXIF data; None where there are none, or they are damaged."""
    try:
        return image.getexif().get(ORIENTATION)
    except Exception:  # the pixels are good all the same
        return None


def _upright(image: Image, orientation: Any) -> Image:
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image
