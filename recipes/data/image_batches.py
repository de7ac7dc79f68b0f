"""Training batches of labelled images: augmented, normalised, mixed, all of it from (seed, sample number) alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from recipes.data.images import random_of

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training image and its label."""

    crop_padding: int = 0
    """pixels of grey put around an image before it is cut back to its size at a random place"""
    flip: bool = False
    """mirror half of the images"""
    mixup: float = 0.0
    """alpha of the Beta distribution of mixing weights (0: off)"""
    label_smoothing: float = 0.0
    """probability that is spread over all classes"""


class ImageBatches:
    """Samples of a map-style set by number: s is item s % len, and every random choice about it comes from (seed, s).

    mixup (Zhang et al. 2018): sample s is mixed with another item of the whole set, drawn from (seed, s) like the weight, and
    not with a neighbour in its batch, so that a process needs no sample that another one reads. `labels` are those of the
    image that has the larger weight.
    """

    def __init__(
        self,
        items: Any,
        numbers: np.ndarray,
        classes: int,
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.5,),
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        """`numbers` [length]: which items of the set belong to this one. `mean`, `std`: one for all channels, or one each."""
        self.items, self.numbers, self.classes, self.seed = items, numbers, classes, seed
        self.mean, self.std, self.augmentation = tuple(mean), tuple(std), augmentation

    def plain(self) -> ImageBatches:
        """The same images as they are."""
        return ImageBatches(self.items, self.numbers, self.classes, self.mean, self.std)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitems__(self, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        """Samples -> `images` fp32 [batch, channels, height, width], `labels` int64 [batch]; with an augmentation also
        `targets` fp32 [batch, classes], what the loss compares with.
        """
        import torch

        made = [self._sample(int(number)) for number in numbers]
        images = torch.stack([image for image, _, _ in made])
        mean, std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (self.mean, self.std))
        batch = {"images": (images - mean) / std, "labels": torch.tensor([label for _, label, _ in made])}
        if self.augmentation:
            batch["targets"] = torch.stack([target for _, _, target in made])
        return batch

    def _sample(self, number: int) -> tuple[torch.Tensor, int, Any]:
        """(image, label, target) of a sample."""
        import torch

        image, label = self.items[int(self.numbers[number % len(self)])]
        if not self.augmentation:
            return image, label, None
        a, random = self.augmentation, random_of(self.seed, "augmentation", number)
        image, weight = self._moved(image, random), 1.0
        target = torch.zeros(self.classes)
        target[label] = 1.0
        if a.mixup:
            weight = float(random.beta(a.mixup, a.mixup))
            other, other_label = self.items[int(self.numbers[random.randint(len(self))])]
            image = weight * image + (1.0 - weight) * self._moved(other, random)
            target *= weight
            target[other_label] += 1.0 - weight
            label = label if weight >= 0.5 else other_label
        return image, label, (1.0 - a.label_smoothing) * target + a.label_smoothing / self.classes

    def _moved(self, image: torch.Tensor, random: np.random.RandomState) -> torch.Tensor:
        """Cropped and mirrored at random."""
        import torch.nn.functional as F

        pad, (height, width) = self.augmentation.crop_padding, image.shape[1:]
        if pad:
            top, left = random.randint(0, 2 * pad + 1, size=2)
            grey = sum(self.mean) / len(self.mean)  # what normalising makes zero
            image = F.pad(image, (pad, pad, pad, pad), value=grey)[:, top : top + height, left : left + width]
        return image.flip(-1) if self.augmentation.flip and random.rand() < 0.5 else image
