"""Image size, patch size, window and sequence length: each follows from the others. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

YAML_SECTIONS = {
    "project": {"name": "run_name", "seed": "seed", "device": "device"},
    "input": {"batch_size": "batch_size", "sequence_length": "sequence_length", "embed_dim": "d_model"},
    "attention": {"num_heads": "num_heads", "head_dim": "head_dim", "dropout": "dropout", "scale": "attention_scale"},
    "relative_position_bias": {name: name for name in ("window_size", "init_std")}
    | {"enabled": "relative_position", "type": "bias_type", "learnable": "learnable_bias"},
    "training": None,
}
"""{section of a YAML file: {its key: flag}}; None: the section may hold any flag"""


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
    default_image: int,
    image: int | None = None,
    window: tuple[int, int] | None = None,
    sequence_length: int | None = None,
) -> PatchGrid:
    """The grid that all given sizes agree on; what is None follows from the others, or from `default_image` if all are None.

    `image` is the side of a square image, `sequence_length` the number of patches. ValueError naming both values where two
    of them contradict each other.
    """
    if window is None and image is None and sequence_length is not None:
        side = math.isqrt(sequence_length)
        if side * side != sequence_length:
            raise ValueError(f"sequence_length {sequence_length} is not a square number of patches; give a window_size too")
        window = (side, side)
    if image is not None or window is None:
        side, rest = divmod(image or default_image, patch)
        if rest or not side:
            raise ValueError(f"image_size {image or default_image} is not a whole number of patches of patch_size {patch}")
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


def resolve_sizes(m: Any, d: Any) -> tuple[PatchGrid, int]:
    """(patch grid, channels) from the flags of model and data, and from the defaults of the data set where they are None.

    ValueError, naming both values, where two flags contradict each other.
    """
    from recipes.data.images import DEFAULTS, ImageDefaults

    defaults = DEFAULTS.get(d.dataset, ImageDefaults())
    channels = defaults.channels if d.in_channels is None else d.in_channels
    if m.head_dim is None and m.d_model % m.num_heads:
        raise ValueError(f"d_model {m.d_model} does not divide into num_heads {m.num_heads}; change one, or give --head_dim")
    if channels not in (1, 3):
        raise ValueError(f"in_channels {channels}: images have 1 (grey) or 3 (RGB)")
    for name, values in (("image_mean", d.image_mean), ("image_std", d.image_std)):
        if len(values) not in (1, channels):
            raise ValueError(f"{name} has {len(values)} numbers for {channels} channels; give one, or one for each")
    patch_size = m.patch_size or defaults.patch_size
    return patch_grid(patch_size, defaults.image_size, d.image_size, m.window_size, m.sequence_length), channels
