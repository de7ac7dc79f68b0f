"""Sets of labelled images: synthetic ones, scikit-learn's digits, a folder, and the hub; and their splits.

Each set is map-style: item i is `(image, label)`, the same at every access: a tensor [channels, height, width], uint8 or fp32
from about 0 to 1, and an int. `recipes.data.image_batches` makes training batches of them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recipes.data.image_folder import ENDINGS, FolderImages, class_folders, content_hashes
from recipes.data.image_pixels import reading, to_tensor
from recipes.data.synthetic_images import SyntheticImageDataset, generator_from

if TYPE_CHECKING:
    import torch

Item = tuple["torch.Tensor", int]

HUB_NAMES = {"cifar10": "uoft-cs/cifar10"}


@dataclass(frozen=True)
class ImageDefaults:
    """Sizes for a set where no flag gives them: side of an image and of a patch in pixels, channels."""

    image_size: int = 224
    patch_size: int = 16
    channels: int = 3


DEFAULTS = {"synthetic": ImageDefaults(112, 16), "digits": ImageDefaults(8, 2, 1), "cifar10": ImageDefaults(32, 4)}


class Digits:
    """The 1,797 handwritten digits of scikit-learn, 8 x 8 pixels (Alpaydin & Kaynak 1998). They come with the package."""

    def __init__(self, img_size: tuple[int, int], in_channels: int) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.pixels = (digits.images / 16.0).astype(np.float32)
        self.labels, self.img_size, self.in_channels = digits.target.astype(np.int64), img_size, in_channels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Item:
        import torch
        import torch.nn.functional as F

        image = torch.from_numpy(self.pixels[i])[None]
        if tuple(image.shape[1:]) != self.img_size:
            image = F.interpolate(image[None], self.img_size, mode="bilinear", align_corners=False)[0]
        return image.repeat(self.in_channels, 1, 1), int(self.labels[i])


class HubImages:
    """A split of a hub image set, loaded by `datasets`: its first column of images and its first column of class labels."""

    def __init__(self, rows: Any, img_size: tuple[int, int], in_channels: int) -> None:
        from datasets import ClassLabel, Image

        images = [name for name, feature in rows.features.items() if isinstance(feature, Image)]
        labels = [name for name, feature in rows.features.items() if isinstance(feature, ClassLabel)]
        if not images or not labels:
            raise ValueError(f"the set has no column of images or none of class labels; it has {', '.join(rows.features)}")
        self.rows, self.image_column, self.label_column = rows, images[0], labels[0]
        self.classes = rows.features[self.label_column].names
        self.img_size, self.in_channels = img_size, in_channels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Item:
        with reading(f"row {i} of {self.rows.info.dataset_name or 'the set'}, {self.rows.split},"):
            row = self.rows[int(i)]
            return to_tensor(row[self.image_column], self.img_size, self.in_channels), int(row[self.label_column])


@dataclass
class ImageSets:
    """The splits of a data set: each is a map-style set with the numbers of the items that belong to the split."""

    classes: list[str]
    train: tuple[Any, np.ndarray]
    """(set, int64 item numbers)"""
    validation: tuple[Any, np.ndarray]
    test: tuple[Any, np.ndarray] | None
    fingerprint: str
    notes: list[str] = field(default_factory=list)
    """for the user"""


def image_sets(
    dataset: str,
    data_dir: str | None,
    img_size: tuple[int, int],
    patch_size: int,
    in_channels: int,
    num_classes: int | None,
    num_samples: int | None,
    val_samples: int | None,
    seed: int,
) -> ImageSets:
    """The splits of a data set. Without a validation split of its own, `val_samples` (default: a fifth) are held out for one.

    `num_samples` is the size of the synthetic training set. ValueError or OSError, in one line, for what a user can correct.
    """
    if dataset != "synthetic" and num_samples is not None:
        raise ValueError(f"num_samples {num_samples} is the size of the synthetic set; {dataset} has its own, leave it out")
    if (dataset == "folder") != (data_dir is not None):
        raise ValueError(
            f"--dataset folder and --data_dir FOLDER go together, not dataset {dataset!r} and data_dir {data_dir!r}"
        )
    if dataset == "synthetic":
        train_size = num_samples or 1000
        val_size = val_samples or max(1, train_size // 5)
        items = SyntheticImageDataset(train_size + val_size, img_size, patch_size, in_channels, num_classes or 10, seed)
        train, validation = (items, np.arange(train_size)), (items, np.arange(train_size, train_size + val_size))
        names = [f"offset {down:+d} {across:+d}" for down, across in items.offsets[: items.num_classes]]
        settings = f"{train_size} {val_size} {img_size} {patch_size} {in_channels} {items.num_classes} {seed}"
        return ImageSets(names, train, validation, None, _digest("synthetic", settings))
    if dataset == "digits":
        digits = Digits(img_size, in_channels)
        train, validation = _hold_out(digits, val_samples)
        fingerprint = _digest(digits.pixels.tobytes(), digits.labels.tobytes(), len(validation[1]))
        sets = ImageSets([str(digit) for digit in range(10)], train, validation, None, fingerprint)
    elif dataset == "folder":
        sets = _folder(Path(str(data_dir)), img_size, in_channels, val_samples)
    else:
        sets = _hub(dataset, img_size, in_channels, val_samples)
    if num_classes not in (None, len(sets.classes)):
        raise ValueError(f"num_classes {num_classes}: {dataset} has {len(sets.classes)} classes; leave it out")
    return sets


def _hold_out(items: Any, val_samples: int | None) -> tuple[tuple[Any, np.ndarray], tuple[Any, np.ndarray]]:
    """Training and validation parts of a set. They do not depend on the run's seed, so that results can be compared."""
    held_out = val_samples or max(1, len(items) // 5)
    if held_out >= len(items):
        raise ValueError(f"val_samples {held_out} leaves nothing of {len(items)} images to train on; use fewer")
    order = generator_from("validation split", len(items)).permutation(len(items))
    return (items, np.sort(order[held_out:])), (items, np.sort(order[:held_out]))


def _train_and_validation(name: str, train: Any, validation: Any, val_samples: int | None) -> tuple[Any, Any]:
    if validation is None:
        return _hold_out(train, val_samples)
    if val_samples is not None:
        raise ValueError(f"val_samples {val_samples}: {name} has a validation split of its own; leave it out")
    return _whole(train), _whole(validation)


def _whole(items: Any) -> tuple[Any, np.ndarray]:
    return items, np.arange(len(items))


def _folder(root: Path, img_size: tuple[int, int], channels: int, val_samples: int | None) -> ImageSets:
    """ROOT/train/CLASS/NAME.png, perhaps with val (or validation) and test beside train; or ROOT/CLASS/NAME.png."""
    top = root / "train" if (root / "train").is_dir() else root
    if not top.is_dir():
        raise ValueError(f"data_dir {root} is not a folder; give one that holds a folder of images for each class")
    classes = class_folders(top)
    if len(classes) < 2:
        raise ValueError(f"{top} holds {len(classes)} folders; a folder of images for each of at least 2 classes is needed")
    train = FolderImages(top, img_size, channels, classes)
    empty = train.empty_classes()
    if empty:
        raise ValueError(f"{top / empty[0]} holds no image ({', '.join(ENDINGS)}); put some there, or remove the folder")

    def split(*names: str) -> FolderImages | None:
        folder = next((root / name for name in names if top != root and (root / name).is_dir()), None)
        return FolderImages(folder, img_size, channels, classes) if folder else None

    validation, test = split("val", "validation", "valid"), split("test")
    parts = _train_and_validation(str(root), train, validation, val_samples)
    folders = [images for images in (train, validation, test) if images]
    files = [entry for images in folders for entry in images.files]
    hashes, notes = content_hashes(root, [path for path, _ in files])
    contents = zip(files, hashes, strict=True)
    listing = "\n".join(f"{path.relative_to(root)} {digest} {label}" for (path, label), digest in contents)
    notes = [note for images in folders for note in images.notes()] + notes
    return ImageSets(classes, *parts, _whole(test) if test else None, _digest(listing, len(parts[1][1])), notes)


def _hub(name: str, img_size: tuple[int, int], channels: int, val_samples: int | None) -> ImageSets:
    """CIFAR-10, or any image set that `datasets` finds. Where there is no validation split, the test split takes its place."""
    if name not in HUB_NAMES and "/" not in name:
        known = ", ".join(["synthetic", "digits", "folder", *HUB_NAMES])
        raise ValueError(f"unknown dataset {name!r}; there are {known}, and OWNER/NAME of the hub")
    from datasets import load_dataset

    try:
        splits = load_dataset(HUB_NAMES.get(name, name))
    except Exception as error:  # what `datasets` and the hub raise has no common class
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"the hub gives no {name} ({type(error).__name__}: {reason}); is there a network? `--dataset digits` and "
            "`synthetic` need none, `--dataset folder` reads files"
        ) from error
    if "train" not in splits:
        raise ValueError(f"{name} has no train split; it has {', '.join(splits)}")
    images = {split: HubImages(rows, img_size, channels) for split, rows in splits.items()}
    validation = next((images[split] for split in ("validation", "valid", "val") if split in images), None)
    test = images.get("test") if validation else None
    parts = _train_and_validation(name, images["train"], validation or images.get("test"), val_samples)
    contents = [f"{split} {len(rows)} {rows._fingerprint}" for split, rows in sorted(splits.items())]
    return ImageSets(images["train"].classes, *parts, _whole(test) if test else None, _digest(*contents, len(parts[1][1])))


def _digest(*parts: object) -> str:
    digest = hashlib.sha256()
    for part in parts:
        # Names of files need not be UTF-8.
        content = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogateescape")
        digest.update(b"%d:" % len(content))
        digest.update(content)
    return digest.hexdigest()
