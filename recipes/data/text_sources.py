"""Where text is: files, folders, patterns, saved data sets and those of the hub; and which split each is."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

JSON_ENDINGS = (".jsonl", ".ndjson")
ENDINGS = (".txt", ".text", ".tokens", ".raw", *JSON_ENDINGS, ".parquet")  # what is text in a folder
COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
NOT_TEXT = (".json", ".csv", ".tsv", ".zip", ".tar", ".tgz", ".ids", ".bin", ".npy", ".arrow", ".pdf", ".docx", ".html")
SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` of Hugging Face datasets leaves in a folder: a dict, a set
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {
    "train": ("train", "training", "trn"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing", "tst"),
}


@dataclass(frozen=True)
class Source:
    """A file; or a split of a data set of the hub (`owner/name` or `owner/name:configuration`), or of one that was saved."""

    name: str
    split: str | None = None

    @property
    def size_bytes(self) -> int | None:
        """Size of the file; None for a data set."""
        return None if self.split else Path(self.name).stat().st_size

    @property
    def is_plain(self) -> bool:
        """Whether it is a plain text file, without columns."""
        return self.split is None and self.kind == "text"

    @property
    def kind(self) -> Literal["text", "json", "parquet"]:
        """What the name says of the content of a file, in upper or lower case and behind a compression's ending."""
        plain = _uncompressed_name(self.name)
        return "json" if plain.endswith(JSON_ENDINGS) else "parquet" if plain.endswith(".parquet") else "text"


def _uncompressed_name(name: str) -> str:
    name = name.lower()
    return next((name.removesuffix(ending) for ending in COMPRESSED if name.endswith(ending)), name)


def find_sources(inputs: Iterable[str], hub_split: str = "train") -> list[Source]:
    """The files that paths and glob patterns match, and those of folders, in their order; or data sets of the hub.

    ValueError or FileNotFoundError, in one line, for what is not there.
    """
    sources: list[Source] = []
    for name in inputs:
        plain = str(Path(name).expanduser())
        paths = [plain] if Path(plain).exists() else sorted(glob.glob(plain, recursive=True))
        if (
            not paths
            and HUB_NAME.fullmatch(name)
            and _uncompressed_name(name).rpartition(".")[2] not in ("txt", "jsonl", "parquet")
        ):
            sources.append(Source(name, hub_split))
        elif not paths:
            raise FileNotFoundError(
                f"{name} does not exist; give a file, a folder, a pattern in quotes, or OWNER/NAME of the hub"
            )
        for path in map(Path, paths):
            sources += _in_folder(path, hub_split) if path.is_dir() else [Source(str(path))]
    for source in sources:
        if not source.split and _uncompressed_name(source.name).endswith(NOT_TEXT):
            raise ValueError(f"{source.name} is no text file; make it text, JSONL (a .jsonl) or parquet")
        if sources.count(source) > 1:
            raise ValueError(f"{source.name} is given twice; give each file once")
    return sources


def _in_folder(folder: Path, split: str | None) -> list[Source]:
    """The text files of a folder and below, in order; or of a data set that was saved there, `split` (None: every one)."""
    if any((folder / name).is_file() for name in SAVED):
        there = _saved_splits(folder)
        chosen = [name for name in there if split is None or split_named(name) == split or len(there) == 1]
        if not chosen:
            raise ValueError(f"{folder} holds a data set without a {split} split (it has {', '.join(there)}); give another")
        return [Source(str(folder), name) for name in chosen]
    below = [path for path in sorted(folder.rglob("*")) if not any(p.startswith(".") for p in path.relative_to(folder).parts)]
    found = [Source(str(path)) for path in below if path.is_file() and _uncompressed_name(path.name).endswith(ENDINGS)]
    if not found:
        raise ValueError(f"{folder} holds no text: none of its files ends in {', '.join(ENDINGS)}, compressed or not")
    return found


def _saved_splits(folder: Path) -> list[str]:
    """Names of the splits of a saved data set; one without splits has a single one, "all"."""
    index = folder / SAVED[0]
    return json.loads(index.read_text(encoding="utf-8"))["splits"] if index.is_file() else ["all"]


def split_named(name: str) -> str | None:
    """Which split a name tells, by the last of its words that names one: `wiki.valid.tokens`, `TinyStories-DEV.jsonl`."""
    words = re.findall(r"[a-z]+", name.lower())
    found = [split for word in words for split, names in SPLIT_NAMES.items() if word in names]
    return found[-1] if found else None


def find_splits(data: str) -> tuple[dict[str, list[Source]], list[str]]:
    """({split: its sources}, notes) of a file, a pattern, a folder or a data set, by the names; without any, all is train."""
    root = Path(data).expanduser()
    sources = _in_folder(root, None) if root.is_dir() else find_sources([data])
    if sources[0].split and not root.exists():
        raise FileNotFoundError(f"{data} does not exist; give a file, folder or pattern, or a data set of the hub by --dataset")
    splits: dict[str, list[Source]] = {}
    unnamed: list[str] = []
    for source in sources:
        split = _split_of(source)
        if split:
            splits.setdefault(split, []).append(source)
        else:
            unnamed.append(source.split or Path(source.name).name)
    if not splits or (len(splits) == 1 and not unnamed and not root.is_dir()):  # a file `dev.txt`, given as the whole text
        return {"train": sources}, []
    if "train" not in splits:
        raise FileNotFoundError(
            f"{data} has text for {' and '.join(splits)}, and none whose name says `train`; add or rename it"
        )
    left_out = ", ".join(unnamed[:3]) + (" ..." if len(unnamed) > 3 else "")
    return splits, [f"{data}: left out {len(unnamed)} whose names tell no split: {left_out}"] if unnamed else []


def _split_of(source: Source) -> str | None:
    """What the name of a source says, or else that of its folder, if it is a split's alone."""
    if source.split:
        return split_named(source.split)
    path = Path(source.name)
    folder = path.parent.name.lower()
    return split_named(path.name) or next((split for split, names in SPLIT_NAMES.items() if folder in names), None)
