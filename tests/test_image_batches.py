"""Training batches: augmented and mixed from the number of a sample alone, in 8 bits where the images have them."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recipes.data.image_batches import Augmentation, ImageBatches, mixed
from trainer.command_line.sections import Run
from trainer.data.loader import close, read
from trainer.data.stream import TrainingOrder

SHAPE = (2, 6, 5)


class Ramps:
    """Item i: an image of the constant i / 100 whose left column is 1, with label i % 4."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image = torch.full(SHAPE, i / 100)
        image[:, :, 0] = 1.0
        return image, i % 4


class EightBits(Ramps):
    """The same images in 8 bits: those that a `deep` predicate picks are left as they are."""

    def __init__(self, deep: Callable[[int], bool] = lambda i: False) -> None:
        self.deep = deep

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image, label = super().__getitem__(i)
        return image if self.deep(i) else (image * 255).round().to(torch.uint8), label


def make_batches(items: Ramps | None = None, **what: Any) -> ImageBatches:
    return ImageBatches((items or Ramps(), np.arange(12)), 4, Augmentation(**what) if what else None, seed=3)


def test_without_augmentation_a_sample_is_its_item() -> None:
    batch = make_batches().__getitems__([5, 12 + 7])
    assert set(batch) == {"images", "labels"}
    assert batch["labels"].tolist() == [1, 3]
    assert torch.equal(batch["images"], torch.stack([Ramps()[5][0], Ramps()[7][0]]))


def test_eight_bits_travel_as_such_and_train_the_same() -> None:
    """Of the fp32 batch that was once made here, a quarter of the bytes: half with the images to mix with."""
    what = {"crop_padding": 1, "flip": True, "mixup": 0.4, "grey": 51 / 255}
    batch = make_batches(EightBits(), **what).__getitems__(range(24))
    assert {batch[name].dtype for name in ("images", "others")} == {torch.uint8}
    floats = make_batches(EightBits(deep=lambda i: i % 2 == 0), **what).__getitems__(range(24))
    assert floats["images"].dtype == torch.float32  # one that has more makes a batch of floats
    expected = make_batches(**what).__getitems__(range(24))
    torch.testing.assert_close(mixed(batch), mixed(expected), atol=0.5 / 255, rtol=0)
    torch.testing.assert_close(mixed(floats), mixed(expected), atol=0.5 / 255, rtol=0)
    assert torch.equal(batch["targets"], expected["targets"])


def test_only_the_items_that_belong_to_it() -> None:
    part = ImageBatches((Ramps(), np.array([9, 2])), 4)
    assert len(part) == 2
    assert part.__getitems__([0, 1, 2])["labels"].tolist() == [1, 2, 1]


def test_a_sample_is_the_same_alone_in_any_batch_and_in_another_process() -> None:
    batches = make_batches(crop_padding=2, flip=True, mixup=0.4, label_smoothing=0.1)
    whole = batches.__getitems__([3, 30, 17, 3])
    copy = pickle.loads(pickle.dumps(batches))
    for place, number in enumerate([3, 30, 17, 3]):
        for name, values in copy.__getitems__([number]).items():
            assert torch.equal(values[0], whole[name][place]), name


def test_two_processes_read_the_halves_of_what_one_reads_with_and_without_workers() -> None:
    cpu = torch.device("cpu")

    def first(rank: int, processes: int, workers: int) -> list[dict[str, Tensor]]:
        order = TrainingOrder(4, rank, processes, seed=5, length=12, first_micro_batch=2)
        reader = read(make_batches(crop_padding=1, flip=True, mixup=0.4), order, Run(num_workers=workers), cpu)
        try:
            return list(itertools.islice(reader, 3))
        finally:
            close(reader)

    whole = first(0, 1, workers=2)
    for parts in ([first(0, 1, 0)], [first(0, 2, 0), first(1, 2, 0)]):
        for step, batch in enumerate(whole):
            for name, values in batch.items():
                assert torch.equal(torch.cat([part[step][name] for part in parts]), values)


def test_every_epoch_augments_anew() -> None:
    batches = make_batches(crop_padding=2, flip=True)
    seen = {tuple(batches.__getitems__([5 + 12 * epoch])["images"].flatten().tolist()) for epoch in range(20)}
    assert len(seen) > 10


def test_flipping_mirrors_half_of_them() -> None:
    images = make_batches(flip=True).__getitems__(range(1200))["images"]
    left, right = (images[:, 0, 0, 0] == 1), (images[:, 0, 0, -1] == 1)
    assert bool((left ^ right).all())
    assert 0.45 < right.float().mean() < 0.55


def test_cropping_moves_by_at_most_the_padding_which_is_grey() -> None:
    images = make_batches(crop_padding=1, grey=0.25).__getitems__(range(300))["images"]
    columns = {int(row.argmax()) if row.max() == 1 else -1 for row in images[:, 0, 3]}
    assert columns == {-1, 0, 1}  # the bright column out of sight, where it was, one to the right
    assert 0.25 in images[:, 0, 0].unique()


def test_smoothing_spreads_probability_over_all_classes() -> None:
    targets = make_batches(label_smoothing=0.2).__getitems__([6])["targets"]
    torch.testing.assert_close(targets, torch.tensor([[0.05, 0.05, 0.85, 0.05]]))


def test_mixing_takes_another_item_with_the_weight_of_its_label() -> None:
    batches = make_batches(mixup=1.0)
    batch = batches.__getitems__(range(400))
    torch.testing.assert_close(batch["targets"].sum(1), torch.ones(400))
    of_two_labels = 0
    for number, (image, label, target) in enumerate(zip(mixed(batch), batch["labels"], batch["targets"], strict=True)):
        own = number % 12
        if target.count_nonzero() == 2:  # with an item of another label
            of_two_labels += 1
            weight, pixel = float(target[own % 4]), float(image[0, 0, 2])
            other = (pixel - weight * own / 100) / (1 - weight) * 100
            if weight < 0.95:
                assert abs(other - round(other)) < 1e-2
                assert float(target[round(other) % 4]) > 0
                assert label == (own % 4 if weight >= 0.5 else round(other) % 4)
    assert of_two_labels > 250


def test_without_augmentation_there_are_no_targets() -> None:
    assert set(make_batches(mixup=0.4).without_augmentation().__getitems__([0])) == {"images", "labels"}
