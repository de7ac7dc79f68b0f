"""What logistic regression knows of images, and what it refuses."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from recipes.baselines import images
from recipes.baselines.images import logistic_regression
from recipes.data.image_batches import ImageBatches
from recipes.data.images import image_sets


class Pictures:
    """Noise of 40 x 20 pixels, whose left half is brighter where the label is 1; or where a coin says so."""

    def __init__(self, by_label: bool) -> None:
        self.by_label = by_label

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        generator = torch.Generator().manual_seed(i)
        image, label = torch.rand(1, 40, 20, generator=generator), int(torch.randint(0, 2, (), generator=generator))
        image[:, :, :10] += 0.5 * (label if self.by_label else i % 2)
        return image, label


def parts(items: Any, *lengths: int, classes: int = 2) -> list[ImageBatches]:
    ends = itertools.pairwise(np.cumsum((0, *lengths)))
    return [ImageBatches((items, np.arange(first, end)), classes) for first, end in ends]


def test_it_knows_what_is_linear_in_the_pixels_and_nothing_of_coins() -> None:
    known = logistic_regression(*parts(Pictures(by_label=True), 300, 700))  # more than one batch
    assert known.accuracy == 1.0
    assert 0 < known.nats < 0.2
    unknown = logistic_regression(*parts(Pictures(by_label=False), 300, 700))
    assert 0.4 < unknown.accuracy < 0.6
    assert unknown.nats > math.log(2)  # sure of itself, for it has many pixels and few images


def test_of_digits_it_knows_most() -> None:
    sets = image_sets("digits", None, (8, 8), 2, 1, None, None, None, 0)
    known = logistic_regression(ImageBatches(sets.train, 10), ImageBatches(sets.validation, 10))
    assert known.accuracy == pytest.approx(0.969, abs=0.01)
    assert known.nats == pytest.approx(0.1155, abs=0.01)


def test_too_many_are_refused_before_one_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MOST_IMAGES", 9)
    with pytest.raises(ValueError, match="10 images of 2 classes are too many, it takes at most 9 of 100"):
        logistic_regression(*parts(None, 6, 4))
    with pytest.raises(ValueError, match="8 images of 101 classes are too many"):
        logistic_regression(*parts(None, 4, 4, classes=101))
