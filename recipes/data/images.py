"""Labelled images by number: a synthetic set with something to learn, scikit-learn's digits, a folder, and the hub.

Each set is map-style: item i is `(image, label)`, an fp32 tensor [channels, height, width] of values about 0 to 1 and an int,
the same at every access. `recipes.data.image_batches` makes training batches of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

Item = tuple["torch.Tensor", int]

HUB_NAMES = {"cifar10": "uoft-cs/cifar10"}
ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
NOISE = 0.1  # standard deviation of the noise on the synthetic images


@dataclass(frozen=True)
class Usual:
    """What a set's images are, unless flags say otherwise: side in pixels, side of a patch, channels."""

    image_size: int
    patch_size: int
    channels: int = 3


USUAL = {"synthetic": Usual(112, 16), "digits": Usual(8, 2, 1), "cifar10": Usual(32, 4)}
OTHERS = Usual(224, 16)


def random_of(*parts: object) -> np.random.RandomState:
    """A generator of its own for each `parts`. RandomState, because its streams are frozen across numpy versions."""
    digest = hashlib.blake2b(",".join(map(str, parts)).encode(), digest_size=16).digest()
    return np.random.RandomState(np.frombuffer(digest, dtype="<u4"))


class SyntheticImageDataset:
    """Pairs of patches with the marks A and B on a grid of like patches; in every pair of an image B has the same offset from
    A, and the label is which of `num_classes` offsets. Over all lies noise.

    Item i is a pure function of (seed, i). Each label is as likely, and every image holds equally many A and B, so without
    positions the patches say nothing about the label: a model that does not know where its patches are cannot do better than
    1 / num_classes. The offsets are the shortest ones, of length 1, sqrt(2), 2 ...
    """

    def __init__(
        self,
        num_samples: int = 1000,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        num_classes: int = 10,
        seed: int = 0,
    ) -> None:
        """ValueError if the grid of patches is not whole, or has fewer offsets than classes."""
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if height % patch_size or width % patch_size:
            raise ValueError(f"img_size {height} x {width} is not a whole number of patches of patch_size {patch_size}")
        self.num_samples, self.patch_size, self.in_channels, self.seed = num_samples, patch_size, in_channels, seed
        self.num_classes, self.grid = num_classes, (height // patch_size, width // patch_size)
        down, across = np.mgrid[1 - self.grid[0] : self.grid[0], 1 - self.grid[1] : self.grid[1]].reshape(2, -1)
        length = down**2 + across**2
        self.offsets = np.stack([down, across], 1)[np.lexsort((across, down, length))][1:]  # without (0, 0)
        if not 1 < num_classes <= len(self.offsets):
            raise ValueError(
                f"num_classes {num_classes} must be from 2 to {len(self.offsets)}, the offsets between two of the "
                f"{self.grid[0]} x {self.grid[1]} patches"
            )
        # However its pairs are drawn, one rules out at most two others of an offset, so that a third always has room.
        starts = [(self.grid[0] - abs(down)) * (self.grid[1] - abs(across)) for down, across in self.offsets[:num_classes]]
        self.pairs = max(1, min(-(-min(starts) // 3), self.grid[0] * self.grid[1] // 4))
        # Of every patch, of A, of B. Not noise alone for the others: a norm layer would blow it up to the size of the marks.
        patterns = random_of("patterns", patch_size, in_channels).randint(0, 2, (3, in_channels, patch_size, patch_size))
        self.patterns = patterns.astype(np.float32)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, i: int) -> Item:
        import torch

        if not 0 <= i < self.num_samples:
            raise IndexError(f"item {i} of {self.num_samples}")
        random, (rows, columns), side = random_of(self.seed, "synthetic image", i), self.grid, self.patch_size
        label = random.randint(self.num_classes)
        image = np.tile(self.patterns[0], (1, rows, columns))
        for kind, places in enumerate(self._places(label, random), start=1):
            for row, column in places:
                image[:, row * side : (row + 1) * side, column * side : (column + 1) * side] = self.patterns[kind]
        noise = random.standard_normal(image.shape).astype(np.float32)
        return torch.from_numpy(image + np.float32(NOISE) * noise), int(label)

    def _places(self, label: int, random: np.random.RandomState) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """(row, column) of each A and of its B: pairs in a random order, each taken if its two places are free."""
        rows, columns = self.grid
        down, across = self.offsets[label]
        first, second = [], []
        taken = np.zeros(self.grid, dtype=bool)
        for place in random.permutation(rows * columns):
            a = divmod(int(place), columns)
            b = (a[0] + int(down), a[1] + int(across))
            on_grid = 0 <= b[0] < rows and 0 <= b[1] < columns
            if on_grid and not taken[a] and not taken[b] and len(first) < self.pairs:
                taken[a] = taken[b] = True
                first.append(a)
                second.append(b)
        return first, second


class Digits:
    """The 1,797 handwritten digits of scikit-learn, 8 x 8 pixels (Alpaydin & Kaynak 1998). They come with the package."""

    def __init__(self, img_size: tuple[int, int], in_channels: int) -> None:
        from sklearn.datasets import load_digits

        found = load_digits()
        self.pixels = (found.images / 16.0).astype(np.float32)
        self.labels, self.img_size, self.in_channels = found.target.astype(np.int64), img_size, in_channels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Item:
        import torch
        import torch.nn.functional as F

        image = torch.from_numpy(self.pixels[i])[None]
        if tuple(image.shape[1:]) != self.img_size:
            image = F.interpolate(image[None], self.img_size, mode="bilinear", align_corners=False)[0]
        return image.repeat(self.in_channels, 1, 1), int(self.labels[i])


class FolderImages:
    """Image files in one folder for each class: ROOT/CLASS/anything.png, in order of their names."""

    def __init__(self, root: Path, img_size: tuple[int, int], in_channels: int, classes: Sequence[str]) -> None:
        """ValueError naming the folder if it holds a class that is not one of `classes`, or no image."""
        unknown = sorted({path.name for path in root.iterdir() if path.is_dir()} - set(classes))
        if unknown:
            raise ValueError(f"{root}: class {unknown[0]!r} is not one of the training classes {', '.join(classes[:8])}")
        # Sorted parts, so that the order does not depend on the file system.
        self.files = [
            (path, label)
            for label, name in enumerate(classes)
            for path in sorted((root / name).rglob("*"))
            if path.suffix.lower() in ENDINGS
        ]
        if not self.files:
            raise ValueError(f"{root} holds no images ({', '.join(ENDINGS)}) in one folder for each class")
        self.img_size, self.in_channels = img_size, in_channels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Item:
        from PIL import Image

        path, label = self.files[i]
        try:
            with Image.open(path) as image:
                return _tensor(image, self.img_size, self.in_channels), label
        except OSError as error:
            raise OSError(f"{path} cannot be read as an image ({error}); remove or replace it") from error


class HubImages:
    """A split of a hub image set, by `datasets`: its first column of images and its first column of class labels."""

    def __init__(self, rows: Any, img_size: tuple[int, int], in_channels: int) -> None:
        from datasets import ClassLabel, Image

        kinds = {kind: [n for n, f in rows.features.items() if isinstance(f, kind)] for kind in (Image, ClassLabel)}
        if not all(kinds.values()):
            raise ValueError(f"the set has no column of images or none of class labels; it has {', '.join(rows.features)}")
        self.rows, self.image, self.label = rows, kinds[Image][0], kinds[ClassLabel][0]
        self.classes = rows.features[self.label].names
        self.img_size, self.in_channels = img_size, in_channels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Item:
        row = self.rows[int(i)]
        return _tensor(row[self.image], self.img_size, self.in_channels), int(row[self.label])


def _tensor(image: Image, size: tuple[int, int], channels: int) -> torch.Tensor:
    """A PIL image as fp32 [channels, height, width] in 0 to 1: scaled so that it covers `size`, the middle cut out."""
    import torch
    from PIL import Image, ImageOps

    if channels not in (1, 3):
        raise ValueError(f"in_channels {channels}: images have 1 (grey) or 3 (RGB)")
    fitted = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), (size[1], size[0]), Image.Resampling.BICUBIC)
    pixels = np.asarray(fitted, dtype=np.float32) / 255.0
    return torch.from_numpy(pixels.reshape(*size, channels).transpose(2, 0, 1).copy())


@dataclass
class ImageSets:
    """What `image_sets` gives: map-style sets, by split, and the items of each that belong to it."""

    classes: list[str]
    train: tuple[Any, np.ndarray]
    """(set, int64 numbers of its items)"""
    validation: tuple[Any, np.ndarray]
    test: tuple[Any, np.ndarray] | None
    fingerprint: str
    notes: list[str] = field(default_factory=list)


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
    """The splits of a data set. A set without a validation split of its own loses a fifth, or `val_samples`, to one.

    `num_samples` is the size of the synthetic training set. ValueError or OSError, in one line, for what a user can mend.
    """
    if dataset != "synthetic" and num_samples is not None:
        raise ValueError(f"num_samples {num_samples} is the size of the synthetic set; {dataset} has its own, leave it out")
    if (dataset == "folder") != (data_dir is not None):
        raise ValueError(f"--dataset folder and --data_dir FOLDER go together; found {dataset!r} and {data_dir!r}")
    if dataset == "synthetic":
        train = num_samples or 1000
        held_out = val_samples or max(1, train // 5)
        items = SyntheticImageDataset(train + held_out, img_size, patch_size, in_channels, num_classes or 10, seed)
        numbers = np.arange(train + held_out)
        names = [f"offset {down:+d} {across:+d}" for down, across in items.offsets[: items.num_classes]]
        facts = f"{train} {held_out} {img_size} {patch_size} {in_channels} {items.num_classes} {seed}"
        return ImageSets(names, (items, numbers[:train]), (items, numbers[train:]), None, _digest("synthetic", facts))
    if dataset == "digits":
        items = Digits(img_size, in_channels)
        found = ImageSets([str(digit) for digit in range(10)], *_split(items, val_samples), None, "")
        found.fingerprint = _digest(items.pixels.tobytes(), items.labels.tobytes(), len(found.validation[1]))
    elif dataset == "folder":
        found = _folder(Path(str(data_dir)), img_size, in_channels, val_samples)
    else:
        found = _hub(dataset, img_size, in_channels, val_samples)
    if num_classes not in (None, len(found.classes)):
        raise ValueError(f"num_classes {num_classes}: {dataset} has {len(found.classes)} classes; leave it out")
    return found


def _split(items: Any, val_samples: int | None) -> tuple[tuple[Any, np.ndarray], tuple[Any, np.ndarray]]:
    """Training and validation parts of a set: the same for every run, whatever its seed, so that their results compare."""
    held_out = val_samples or max(1, len(items) // 5)
    if held_out >= len(items):
        raise ValueError(f"val_samples {held_out} leaves nothing of {len(items)} images to train on; use fewer")
    order = random_of("validation split", len(items)).permutation(len(items))
    return (items, np.sort(order[held_out:])), (items, np.sort(order[:held_out]))


def _own_split(name: str, train: Any, validation: Any, val_samples: int | None) -> tuple[Any, Any]:
    if validation is None:
        return _split(train, val_samples)
    if val_samples is not None:
        raise ValueError(f"val_samples {val_samples}: {name} has a validation split of its own; leave it out")
    return (train, np.arange(len(train))), (validation, np.arange(len(validation)))


def _folder(root: Path, img_size: tuple[int, int], channels: int, val_samples: int | None) -> ImageSets:
    """ROOT/train/CLASS/..., with val (or validation) and test beside train if there are; or ROOT/CLASS/..."""
    top = root / "train" if (root / "train").is_dir() else root
    if not top.is_dir():
        raise ValueError(f"data_dir {root} is not a folder; give one that holds a folder of images for each class")
    classes = sorted(path.name for path in top.iterdir() if path.is_dir())
    if len(classes) < 2:
        raise ValueError(f"{top} holds {len(classes)} folders; a folder of images for each of at least 2 classes is needed")
    train = FolderImages(top, img_size, channels, classes)
    others: dict[str, Any] = {}
    for split, names in {"validation": ("val", "validation", "valid"), "test": ("test",)}.items():
        folder = next((root / name for name in names if top != root and (root / name).is_dir()), None)
        others[split] = folder and FolderImages(folder, img_size, channels, classes)
    parts = _own_split(str(root), train, others["validation"], val_samples)
    sets = [images for images in (train, *others.values()) if images]
    listed = [f"{path.relative_to(root)} {path.stat().st_size} {label}" for images in sets for path, label in images.files]
    test = others["test"] and (others["test"], np.arange(len(others["test"])))
    return ImageSets(classes, *parts, test, _digest("\n".join(listed), len(parts[1][1])))


def _hub(name: str, img_size: tuple[int, int], channels: int, val_samples: int | None) -> ImageSets:
    """CIFAR-10, or any image set that `datasets` finds. Without a validation split its test split is that."""
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
    made = {split: HubImages(rows, img_size, channels) for split, rows in splits.items()}
    validation = next((made[split] for split in ("validation", "valid", "val") if split in made), None)
    test = made.get("test") if validation else None
    parts = _own_split(name, made["train"], validation or made.get("test"), val_samples)
    prints = [f"{split} {len(rows)} {rows._fingerprint}" for split, rows in sorted(splits.items())]
    whole = test and (test, np.arange(len(test)))
    return ImageSets(made["train"].classes, *parts, whole, _digest(*prints, len(parts[1][1])))


def _digest(*parts: object) -> str:
    digest = hashlib.sha256()
    for part in parts:
        content = part if isinstance(part, bytes) else str(part).encode()
        digest.update(b"%d:" % len(content))
        digest.update(content)
    return digest.hexdigest()
