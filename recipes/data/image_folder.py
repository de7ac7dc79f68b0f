"""Image files in one folder for each class: which files count, notes about them, and hashes of their contents."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.data.cache import CacheEntry, cache_folder, content_hash
from recipes.data.image_pixels import reading, to_tensor

if TYPE_CHECKING:
    import torch

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
MOST_NAMES = 20  # classes or files named in a line
READERS = 16  # threads: files may lie far away


def class_folders(root: Path) -> list[str]:
    """The names of the folders in `root`, sorted; hidden ones (.ipynb_checkpoints) are no classes.

    ValueError for a name that is not UTF-8: checkpoints could not hold it.
    """
    names = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{root}: the name of class {name!a} is not UTF-8; rename that folder") from None
    return names


class FolderImages:
    """Images of ROOT/CLASS/NAME.png, sorted by path; they may be at any depth below the class."""

    def __init__(self, root: Path, img_size: tuple[int, int], in_channels: int, classes: Sequence[str]) -> None:
        """ValueError, naming it, for a folder that is not one of `classes`, or is called like an image."""
        unknown = sorted(set(class_folders(root)) - set(classes))
        if unknown:
            raise ValueError(f"{root}: class {unknown[0]!r} is not one of the training classes {', '.join(classes[:8])}")
        self.root, self.classes, self.img_size, self.in_channels = root, classes, img_size, in_channels
        self.skipped: Counter[str] = Counter()
        """files that are not used, by ending, or `hidden`"""
        # Sorted, so that the order does not depend on the file system.
        self.files = [(path, label) for label, name in enumerate(classes) for path in sorted(self._images(root / name))]
        if not self.files:
            raise ValueError(f"{root} holds no images ({', '.join(ENDINGS)}) in one folder for each class")

    def _images(self, folder: Path) -> list[Path]:
        def fail(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):  # a validation set need not have every class
                raise ValueError(f"{folder}: {error}; let this user read it") from error

        if folder.suffix.lower() in ENDINGS:
            raise ValueError(f"{folder} has the name of an image but is a folder; remove or rename it")
        images = []
        for parent, folders, names in os.walk(folder, onerror=fail):
            hidden = [name for name in folders if name.startswith(".")]
            linked = [name for name in folders if name not in hidden and Path(parent, name).is_symlink()]
            self.skipped.update({"hidden": len(hidden), "link to a folder": len(linked)})
            folders[:] = [name for name in folders if name not in hidden]
            for path in (Path(parent, name) for name in [*names, *folders]):
                ending = path.suffix.lower()
                if path.name.startswith("."):
                    self.skipped["hidden"] += 1
                elif ending in ENDINGS and not path.is_file():
                    raise ValueError(f"{path} has the name of an image but is no file; remove or rename it")
                elif ending in ENDINGS:
                    images.append(path)
                elif path.name not in folders:
                    self.skipped[ending or "without ending"] += 1
        return images

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        from PIL import Image

        path, label = self.files[i]
        with reading(path), Image.open(path) as image:
            return to_tensor(image, self.img_size, self.in_channels), label

    def notes(self) -> list[str]:
        """A line on the number of images of each class, and one on skipped files if there are any."""
        labels = Counter(label for _, label in self.files)
        counts = [f"{name} {labels[label]:,}" for label, name in enumerate(self.classes)]
        lines = [f"{self.root}: {len(self.files):,} images in {len(self.classes)} classes: {_some(counts)}"]
        skipped = [f"{number:,} {kind}" for kind, number in sorted(self.skipped.items()) if number]
        if skipped:
            lines.append(f"{self.root}: skipped {', '.join(skipped)} (images are {', '.join(ENDINGS)})")
        return lines

    def empty_classes(self) -> list[str]:
        """Classes without an image."""
        labels = {label for _, label in self.files}
        return [name for label, name in enumerate(self.classes) if label not in labels]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST_NAMES]) + (f" and {len(names) - MOST_NAMES:,} more" if len(names) > MOST_NAMES else "")


def content_hashes(root: Path, files: Sequence[Path]) -> tuple[list[str], list[str]]:
    """(sha256 of each file, notes for the user).

    The cache remembers a file's hash by its size and times. It is kept with the other caches, not in `root`, which may be
    read-only or belong to somebody else; without a cache every start reads every file.
    """
    notes: list[str] = []
    entry, known = None, {}
    try:
        entry = CacheEntry(cache_folder() / f"images-{content_hash(str(root.resolve()))}")
        known = entry.read() or {}
    except ValueError as error:
        notes.append(f"WARNING: {error}; until then every start reads all {len(files):,} images")
    names = [str(path.relative_to(root)) for path in files]
    with ThreadPoolExecutor(READERS) as readers:
        facts = dict(zip(names, readers.map(lambda name: _facts(root / name, known.get(name)), names), strict=True))
    if entry is not None and facts != known:
        try:
            entry.write({}, facts)
        except ValueError as error:
            notes.append(f"WARNING: {error}; until then every start reads all {len(files):,} images")
    unreadable = [name for name in names if facts[name][-1] == 0]
    if unreadable:
        notes.append(f"WARNING: {root}: not readable as images: {_some(unreadable)}")
    moving = [name for name in names if facts[name][-1] > 1]
    if moving:
        notes.append(f"{root}: several frames, of which the first is used: {_some(moving)}")
    return [facts[name][-2] for name in names], notes


def _facts(path: Path, known: Any) -> list[Any]:
    """[size, mtime, ctime, sha256, frames (0: no image)] of a file; `known` if it has the same size and times."""
    found = path.stat()
    signature = [found.st_size, found.st_mtime_ns, found.st_ctime_ns]  # programs that restore mtime cannot set ctime
    if isinstance(known, list) and known[:-2] == signature:
        return known
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); let this user read it, or remove it") from error
    return [*signature, digest, _frames(path)]


def _frames(path: Path) -> int:
    from PIL import Image

    try:
        with Image.open(path) as image:
            # A second picture in a JPEG (MPO) is a preview or a depth map.
            return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    except Exception:  # a note at start names it, and it is an error where a sample needs it
        return 0
