"""Labelled images: the same at every access and in every process, split as configured; the structure of synthetic ones."""

from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from recipes.data import images
from recipes.data.images import Digits, SyntheticImageDataset, image_sets


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMECURVE_CACHE", str(tmp_path_factory.mktemp("cache")))


SIZES = {"img_size": 20, "patch_size": 4, "in_channels": 1, "num_classes": 8}


def sets(dataset: str, data_dir: Path | str | None = None, **changes: Any) -> images.ImageSets:
    given = {"img_size": (16, 16), "patch_size": 4, "in_channels": 3, "num_classes": None, "num_samples": None}
    given |= {"val_samples": None, "seed": 0, **changes}
    return image_sets(dataset, None if data_dir is None else str(data_dir), **given)


# ----------------------------------------------------------------------------------------------------------- synthetic


def test_an_item_is_the_same_at_every_access_and_depends_on_seed_and_number() -> None:
    one, two, other = (SyntheticImageDataset(30, **SIZES, seed=seed) for seed in (7, 7, 8))
    for i in (3, 0, 29, 3):
        assert torch.equal(one[i][0], two[i][0])
        assert one[i][1] == two[i][1]
    assert not torch.equal(one[3][0], one[4][0])
    assert not torch.equal(one[3][0], other[3][0])
    with pytest.raises(IndexError):
        one[30]


def test_a_dataloader_reads_it_in_any_number_of_workers() -> None:
    dataset = SyntheticImageDataset(num_samples=12, img_size=32, patch_size=16, in_channels=3, num_classes=8)
    batches = []
    for workers in (0, 2):
        loader = DataLoader(
            dataset, batch_size=5, num_workers=workers, multiprocessing_context="forkserver" if workers else None
        )
        batches.append([part for batch in loader for part in batch])
        assert batches[-1][0].shape == (5, 3, 32, 32)
        assert batches[-1][1].dtype == torch.int64
    assert all(torch.equal(one, two) for one, two in zip(*batches, strict=True))


def kinds(dataset: SyntheticImageDataset, image: torch.Tensor) -> np.ndarray:
    """Which pattern each patch has, by looking for the nearest: [rows, columns] of 0 (none), 1 (A), 2 (B)."""
    side, (rows, columns) = dataset.patch_size, dataset.grid
    cut = image.numpy().reshape(-1, rows, side, columns, side).transpose(1, 3, 0, 2, 4)[:, :, None]
    return np.abs(cut - dataset.patterns).sum((3, 4, 5)).argmin(2)


@pytest.mark.parametrize(("size", "classes", "pairs"), [(20, 8, 6), (12, 6, 2), (28, 10, 12), (8, 4, 1), ((4, 12), 2, 1)])
def test_every_a_has_a_b_at_the_offset_of_the_label_and_the_bag_is_always_the_same(
    size: int | tuple[int, int], classes: int, pairs: int
) -> None:
    dataset = SyntheticImageDataset(300, **{**SIZES, "img_size": size, "num_classes": classes})
    labels, everywhere = Counter(), np.zeros(dataset.grid)
    for i in range(300):
        image, label = dataset[i]
        patterns = kinds(dataset, image)
        a, b = np.argwhere(patterns == 1), {tuple(place) for place in np.argwhere(patterns == 2)}
        assert (len(a), len(b)) == (pairs, pairs)
        assert {tuple(place + dataset.offsets[label]) for place in a} == b
        labels[label] += 1
        everywhere += patterns > 0
    assert everywhere.min() > 0
    assert min(labels[k] for k in range(classes)) > 300 / classes * 0.5


def test_the_offsets_are_the_shortest() -> None:
    dataset = SyntheticImageDataset(1, **SIZES)
    assert dataset.offsets[:8].tolist() == [[-1, 0], [0, -1], [0, 1], [1, 0], [-1, -1], [-1, 1], [1, -1], [1, 1]]


@pytest.mark.parametrize(
    ("changes", "parts"), [({"num_classes": 81}, ["81", "80"]), ({"num_classes": 1}, ["1 "]), ({"img_size": 21}, ["21", "4"])]
)
def test_a_synthetic_set_that_cannot_be(changes: dict[str, int], parts: list[str]) -> None:
    with pytest.raises(ValueError, match=r"\S") as caught:
        SyntheticImageDataset(**{**SIZES, **changes})
    for part in parts:
        assert part in str(caught.value)


# -------------------------------------------------------------------------------------------------------------- splits


def test_synthetic_and_digits_splits_have_no_image_in_common() -> None:
    synthetic = sets("synthetic", img_size=(20, 20))
    assert (len(synthetic.train[1]), len(synthetic.validation[1]), len(synthetic.classes)) == (1000, 200, 10)
    digits = sets("digits", img_size=(8, 8), in_channels=1)
    assert (len(digits.train[1]), len(digits.validation[1])) == (1438, 359)
    for splits in (synthetic, digits):
        assert not set(splits.train[1]) & set(splits.validation[1])
        assert splits.train[0] is splits.validation[0]
    assert len(set(digits.train[0].labels[digits.validation[1]])) == 10


def test_digits_are_the_real_ones_in_any_size() -> None:
    plain, large = Digits((8, 8), 1), Digits((16, 16), 3)
    image, label = plain[0]
    assert image.shape == (1, 8, 8)
    assert label == 0
    assert image.max() == 15 / 16
    assert large[0][0].shape == (3, 16, 16)
    assert large[0][0].mean() == pytest.approx(image.mean().item(), abs=0.02)
    assert isinstance(large[0][1], int)


def write(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (20, 10)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_a_folder_without_splits_is_split(tmp_path: Path) -> None:
    for i in range(10):
        write(tmp_path / "red" / f"{i}.png", (255, 0, 0))
        write(tmp_path / "blue" / f"{i}.jpg", (0, 0, 255))
    (tmp_path / "red" / "notes.txt").write_text("no image")
    splits = sets("folder", tmp_path)
    assert splits.classes == ["blue", "red"]
    assert (len(splits.train[1]), len(splits.validation[1]), splits.test) == (16, 4, None)
    items = splits.train[0]
    assert [items[i][1] for i in range(20)] == [0] * 10 + [1] * 10
    image, _ = items[15]
    assert image.shape == (3, 16, 16)
    assert image.float().mean((1, 2)).tolist() == [255, 0, 0]
    assert sets("folder", tmp_path, in_channels=1).train[0][0][0].shape == (1, 16, 16)
    write(tmp_path / "red" / "more.png", (0, 0, 0))
    assert sets("folder", tmp_path).fingerprint != splits.fingerprint


def test_a_folder_with_splits_keeps_them(tmp_path: Path) -> None:
    for split, number in (("train", 3), ("val", 2), ("test", 1)):
        for name in ("a", "b"):
            for i in range(number):
                write(tmp_path / split / name / f"{i}.png", (i, i, i))
    splits = sets("folder", tmp_path)
    assert splits.test is not None
    assert [len(part[1]) for part in (splits.train, splits.validation, splits.test)] == [6, 4, 2]
    assert not set(splits.train[0].files) & set(splits.validation[0].files)
    with pytest.raises(ValueError, match="validation split of its own"):
        sets("folder", tmp_path, val_samples=2)
    write(tmp_path / "val" / "c" / "0.png", (0, 0, 0))
    with pytest.raises(ValueError, match="'c' is not one of the training classes"):
        sets("folder", tmp_path)


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a" / "0.png", (0, 0, 0))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "bad.png").write_bytes(b"\x89PNG not really")
    splits = sets("folder", tmp_path)
    with pytest.raises(OSError, match=r"bad\.png"):
        splits.train[0][1]


def test_a_hub_set_of_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "bright"])})
    for split, number in (("train", 6), ("test", 4)):
        rows = {"img": [Image.new("L", (8, 8), 255 * (i % 2)) for i in range(number)], "label": [i % 2 for i in range(number)]}
        (tmp_path / "data").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "data" / f"{split}-00000.parquet")
    splits = sets(str(tmp_path / "data"), img_size=(4, 4))
    assert splits.classes == ["dark", "bright"]
    assert (len(splits.train[1]), len(splits.validation[1]), splits.test) == (6, 4, None)
    image, label = splits.train[0][1]
    assert image.shape == (3, 4, 4)
    assert (int(image.min()), label) == (255, 1)
    assert torch.equal(pickle.loads(pickle.dumps(splits.train[0]))[3][0], image)


@pytest.mark.parametrize(
    ("dataset", "data_dir", "changes", "parts"),
    [
        ("digts", None, {}, ["digts", "digits"]),
        ("folder", None, {}, ["--data_dir"]),
        ("digits", "somewhere", {}, ["--data_dir"]),
        ("folder", "nowhere", {}, ["nowhere"]),
        ("digits", None, {"num_samples": 5}, ["num_samples 5"]),
        ("digits", None, {"val_samples": 1797}, ["1797"]),
        ("digits", None, {"num_classes": 5}, ["num_classes 5", "10"]),
    ],
)
def test_what_is_refused(dataset: str, data_dir: str | None, changes: dict[str, int], parts: list[str]) -> None:
    with pytest.raises(ValueError, match=r"\S") as caught:
        sets(dataset, data_dir, **{"img_size": (8, 8), "in_channels": 1, **changes})
    for part in parts:
        assert part in str(caught.value)


def test_without_the_hub_the_ways_out_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(name: str) -> None:
        raise ConnectionError(f"Couldn't reach\n{name}")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"uoft-cs/cifar10.*--dataset digits"):
        sets("cifar10")
