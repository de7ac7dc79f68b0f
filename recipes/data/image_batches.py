"""Batches of labelled images: cropped, flipped and paired for mixing, as a function of (seed, sample number) alone.

Mixing and normalising are left to the device of the network, so that 8-bit images are sent to it as 8 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from recipes.data.image_pixels import from_0_to_1
from recipes.data.synthetic_images import generator_from

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training image and its label."""

    crop_padding: int = 0
    """pixels of grey around an image before a random crop back to its size"""
    flip: bool = False
    """mirror half of the images"""
    mixup: float = 0.0
    """alpha of the Beta distribution of mixing weights (0: off)"""
    label_smoothing: float = 0.0
    """probability spread over all classes"""
    grey: float = 0.5
    """of the padding, from 0 to 1; rounded to 8 bits for 8-bit images"""


class ImageBatches:
    """Samples of a map-style set by number: s is item s % len, and every random choice about it comes from (seed, s).

    mixup (Zhang et al. 2018): sample s is mixed with an item of the whole set, drawn, like the weight, from (seed, s); not with
    one of its batch, which another process might read. `labels` are those of the image with the larger weight.
    """

    def __init__(
        self, part: tuple[Any, np.ndarray], classes: int, augmentation: Augmentation | None = None, seed: int = 0
    ) -> None:
        """`part`: a map-style set, and the numbers [length] of the items that are used."""
        self.items, self.numbers = part
        self.classes, self.augmentation, self.seed = classes, augmentation, seed

    def without_augmentation(self) -> ImageBatches:
        """The same images as they are."""
        return ImageBatches((self.items, self.numbers), self.classes)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitems__(self, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        """`images` uint8 or fp32 [batch, channels, height, width] and `labels` int64 [batch]; with an augmentation also
        `targets` fp32 [batch, classes], the target probabilities of the loss; with mixup also `others`, the images to mix with,
        and `weights` fp32 [batch], both for `mixed`.
        """
        samples = [self._sample(int(number)) for number in numbers]
        return {name: _stack([sample[name] for sample in samples]) for name in samples[0]}

    def _sample(self, number: int) -> dict[str, Any]:
        """Sample `number`, a row of a batch."""
        import torch

        image, label = self.items[int(self.numbers[number % len(self)])]
        if not self.augmentation:
            return {"images": image, "labels": label}
        a, random = self.augmentation, generator_from(self.seed, "augmentation", number)
        sample = {"images": _crop_and_flip(image, a, random)}
        target = torch.zeros(self.classes)
        target[label] = 1.0
        if a.mixup:
            weight = float(random.beta(a.mixup, a.mixup))
            other, other_label = self.items[int(self.numbers[random.randint(len(self))])]
            sample |= {"others": _crop_and_flip(other, a, random), "weights": torch.tensor(weight)}
            target *= weight
            target[other_label] += 1.0 - weight
            label = label if weight >= 0.5 else other_label
        return sample | {"labels": label, "targets": (1.0 - a.label_smoothing) * target + a.label_smoothing / self.classes}


def mixed(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The images of a batch [batch, channels, height, width], mixed with its `others` if it has any."""
    if "others" not in batch:
        return batch["images"]
    weights = batch["weights"].view(-1, 1, 1, 1)
    return weights * from_0_to_1(batch["images"]) + (1.0 - weights) * from_0_to_1(batch["others"])


def _crop_and_flip(image: torch.Tensor, a: Augmentation, random: np.random.RandomState) -> torch.Tensor:
    import torch
    import torch.nn.functional as F

    pad, (height, width) = a.crop_padding, image.shape[1:]
    if pad:
        top, left = random.randint(0, 2 * pad + 1, size=2)
        grey = round(255 * a.grey) if image.dtype == torch.uint8 else a.grey
        image = F.pad(image, (pad, pad, pad, pad), value=grey)[:, top : top + height, left : left + width]
    return image.flip(-1) if a.flip and random.rand() < 0.5 else image


def _stack(values: Sequence[Any]) -> torch.Tensor:
    import torch

    if isinstance(values[0], int):
        return torch.tensor(values)
    alike = len({value.dtype for value in values}) == 1  # a folder may hold images of 8 and of 16 bits
    return torch.stack(list(values) if alike else [from_0_to_1(value) for value in values])
