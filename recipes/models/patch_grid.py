"""How the size of an image, of its patches, of the window and of the sequence follow from one another. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class PatchGrid:
    """An image cut into patches; the window of the relative position bias is the whole grid."""

    patch: int
    """pixels along a side of a patch"""
    window: tuple[int, int]
    """patches (down, across)"""

    @property
    def image(self) -> tuple[int, int]:
        """Height and width of the image in pixels."""
        return self.window[0] * self.patch, self.window[1] * self.patch


def patch_grid(
    patch: int,
    usual_image: int,
    image: int | None = None,
    window: tuple[int, int] | None = None,
    sequence_length: int | None = None,
) -> PatchGrid:
    """The grid that all given sizes agree on; what is None follows from the others, and at last from `usual_image`.

    `image` is the side of a square image, `sequence_length` the number of patches. ValueError naming both values where two
    of them contradict each other.
    """
    if window is None and image is None and sequence_length is not None:
        side = math.isqrt(sequence_length)
        if side * side != sequence_length:
            raise ValueError(f"sequence_length {sequence_length} is no square of patches; give a window_size too")
        window = (side, side)
    if image is not None or window is None:
        side, rest = divmod(image or usual_image, patch)
        if rest or not side:
            raise ValueError(f"image_size {image or usual_image} is not a whole number of patches of patch_size {patch}")
        if window not in (None, (side, side)):
            raise ValueError(
                f"window_size {window[0]} x {window[1]} is not the patch grid {side} x {side} that image_size {image} in "
                f"patches of {patch} gives; change one of them"
            )
        window = (side, side)
    if sequence_length not in (None, window[0] * window[1]):
        raise ValueError(
            f"sequence_length {sequence_length} is not the number of patches {window[0] * window[1]} of the window "
            f"{window[0]} x {window[1]}; leave one of them out"
        )
    return PatchGrid(patch, window)
