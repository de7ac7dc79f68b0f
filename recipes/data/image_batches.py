"""Batches of labelled images: augmented, normalised and mixed, as a function of (seed, sample number) alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

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


class ImageBatches:
    """Samples of a map-style set by number: s is item s % len, and every random choice about it comes from (seed, s).

    mixup (Zhang et al. 2018): sample s is mixed with another item of the whole set, drawn from (seed, s) like the weight, and
    not with one of its own batch, so that a process needs no sample that another one reads. `labels` are those of the image
    with the larger weight.
    """

    def __init__(
        self,
        part: tuple[Any, np.ndarray],
        classes: int,
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.5,),
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        """`part`: a map-style set, and the numbers [length] of the items that are used. `mean`, `std`: one number for all
        channels, or one for each.
        """
        self.items, self.numbers = part
        self.classes, self.seed = classes, seed
        self.mean, self.std, self.augmentation = tuple(mean), tuple(std), augmentation

    def without_augmentation(self) -> ImageBatches:
        """The same images, normalised only."""
        return ImageBatches((self.items, self.numbers), self.classes, self.mean, self.std)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitems__(self, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        """`images` fp32 [batch, channels, height, width] and `labels` int64 [batch]; with an augmentation also `targets` fp32
        [batch, classes], the probabilities that the loss compares with.
        """
        import torch

        images, labels, targets = zip(*(self._sample(int(number)) for number in numbers), strict=True)
        mean, std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (self.mean, self.std))
        batch = {"images": (torch.stack(images) - mean) / std, "labels": torch.tensor(labels)}
        if self.augmentation:
            batch["targets"] = torch.stack(targets)
        return batch

    def _sample(self, number: int) -> tuple[torch.Tensor, int, Any]:
        """(image, label, target) of a sample."""
        import torch

        image, label = self.items[int(self.numbers[number % len(self)])]
        if not self.augmentation:
            return image, label, None
        a, random = self.augmentation, generator_from(self.seed, "augmentation", number)
        image = self._crop_and_flip(image, a, random)
        target = torch.zeros(self.classes)
        target[label] = 1.0
        if a.mixup:
            weight = float(random.beta(a.mixup, a.mixup))
            other, other_label = self.items[int(self.numbers[random.randint(len(self))])]
            image = weight * image + (1.0 - weight) * self._crop_and_flip(other, a, random)
            target *= weight
            target[other_label] += 1.0 - weight
            label = label if weight >= 0.5 else other_label
        return image, label, (1.0 - a.label_smoothing) * target + a.label_smoothing / self.classes

    def _crop_and_flip(self, image: torch.Tensor, a: Augmentation, random: np.random.RandomState) -> torch.Tensor:
        import torch.nn.functional as F

        pad, (height, width) = a.crop_padding, image.shape[1:]
        if pad:
            top, left = random.randint(0, 2 * pad + 1, size=2)
            grey = sum(self.mean) / len(self.mean)  # zero once normalised
            image = F.pad(image, (pad, pad, pad, pad), value=grey)[:, top : top + height, left : left + width]
        return image.flip(-1) if a.flip and random.rand() < 0.5 else image
