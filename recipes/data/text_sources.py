"""Where text is: files, folders, patterns, saved data sets and those of the hub; and which split each is."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from recipes.data.hub import one_line

JSON_ENDINGS = (".jsonl", ".ndjson")
ENDINGS = (".txt", ".text", ".tokens", ".raw", *JSON_ENDINGS, ".parquet")  # what is text in a folder
COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
NOT_TEXT = (".json", ".csv", ".tsv", ".zip", ".tar", ".tgz", ".ids", ".bin", ".npy", ".arrow", ".pdf", ".docx", ".html")
TABLES = (".json", ".csv", ".tsv")  # those of them that the user may take for text
SAVED = ("dataset_dict.json", "dataset_info.json", "state.json")  # of `save_to_disk` of datasets: of a dict; both of one set
ALL = "all"  # the split of a saved data set that has no splits
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {
    "train": ("train", "training", "trn"),
    "validation": ("validation", "valid", "val", "dev", "eval", "validate", "evaluation", "heldout"),
    "test": ("test", "tests", "testing", "tst"),
}


@dataclass(frozen=True)
class Source:
    """A file, or a split of a data set: of a saved one, or of the hub's (`owner/name` or `owner/name:configuration`)."""

    name: str
    split: str | None = None

    @property
    def size_bytes(self) -> int | None:
        """Size of the file; None for a data set."""
        return None if self.split else Path(self.name).stat().st_size

    @property
    def files(self) -> list[Path]:
        """The file; the Arrow files of a saved data set; empty for one of the hub."""
        return sorted(Path(self.name).rglob("*.arrow")) if self.split else [Path(self.name)]

    @property
    def identity(self) -> tuple[Path, str | None]:
        """(resolved path without a compression's ending, split): equal for sources with the same text."""
        path = Path(self.name).resolve()
        return (path.with_suffix("") if path.suffix.lower() in COMPRESSED else path), self.split

    @property
    def is_plain(self) -> bool:
        """Whether it is a plain text file, without columns."""
        return self.split is None and self.kind == "text"

    @property
    def kind(self) -> Literal["text", "json", "parquet"]:
        """The form of a file's content, by the ending of its name, whatever its case and compression."""
        plain = _uncompressed_name(self.name)
        return "json" if plain.endswith(JSON_ENDINGS) else "parquet" if plain.endswith(".parquet") else "text"


def _uncompressed_name(name: str) -> str:
    name = name.lower()
    return next((name.removesuffix(ending) for ending in COMPRESSED if name.endswith(ending)), name)


def find_sources(inputs: Iterable[str], split: str | None = "train") -> list[Source]:
    """The sources of paths, glob patterns, folders, and names of data sets of the hub, in their order.

    `split`: of data sets (None: all splits of saved ones, and train of the hub's). ValueError or FileNotFoundError, in one
    line, for a name that is nothing of these.
    """
    sources: list[Source] = []
    for name in inputs:
        paths = _matched(name)
        if not paths and is_hub_name(name):
            sources.append(Source(name, split or "train"))
        elif not paths:
            raise FileNotFoundError(
                f"{name} does not exist; give a file, a folder, a pattern in quotes, or OWNER/NAME of the hub"
            )
        for path in paths:
            sources += _in_folder(path, split) if path.is_dir() else [Source(str(path))]
    seen: dict[tuple[Path, str | None], str] = {}
    for source in sources:
        if not source.split and _uncompressed_name(source.name).endswith(NOT_TEXT):
            raise ValueError(f"{source.name} is no text file; make it text, JSONL (a .jsonl) or parquet")
        if (first := seen.get(source.identity)) is not None:
            twice = "is given twice" if first == source.name else f"is {first} again, by its path or its name"
            raise ValueError(f"{source.name} {twice}; leave one of them out")
        seen[source.identity] = source.name
    return sources


def is_hub_name(name: str) -> bool:
    """Whether a name is OWNER/NAME[:CONFIGURATION], not the path of a file that is missing."""
    wrong = (*ENDINGS, *NOT_TEXT)
    return bool(HUB_NAME.fullmatch(name)) and not _uncompressed_name(name).endswith(wrong) and not Path(name).parent.exists()


def is_text(name: str) -> bool:
    """Whether a name is of text: a path or pattern of text files or of a saved data set, by their names; or one of the hub."""
    found = _matched(name)
    below = [path for root in found for path in (root.rglob("*") if root.is_dir() else [root])]
    if not below or any(path.suffix == ".ids" for path in below):
        return not found and is_hub_name(name)
    return any(path.name in SAVED or _uncompressed_name(path.name).endswith(ENDINGS) for path in below)


def _matched(name: str) -> list[Path]:
    """The path of that name if it exists; otherwise the paths that match it as a pattern, sorted."""
    path = Path(name).expanduser()
    return [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))


def _in_folder(folder: Path, split: str | None) -> list[Source]:
    """The text files in a folder and below, in order, and `split` (None: every one) of data sets that were saved there."""
    found = _below(folder, split)
    if not found:
        raise ValueError(f"{folder} holds no text: none of its files ends in {', '.join(ENDINGS)}, compressed or not")
    return found


def _below(folder: Path, split: str | None) -> list[Source]:
    if (folder / SAVED[0]).is_file() or all((folder / name).is_file() for name in SAVED[1:]):
        there = _saved_splits(folder)
        chosen = [name for name in there if split is None or split_named(name) == split or len(there) == 1]
        if not chosen:
            raise ValueError(f"{folder} holds a data set without a {split} split (it has {', '.join(there)}); give another")
        return [Source(str(folder), name) for name in chosen]
    found: list[Source] = []
    for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        if path.is_dir() and not path.is_symlink():
            found += _below(path, split)
        elif path.is_file() and _uncompressed_name(path.name).endswith(ENDINGS):
            found.append(Source(str(path)))
    return found


def _saved_splits(folder: Path) -> list[str]:
    """Names of the splits of a saved data set; one without splits has a single one, ALL."""
    index = folder / SAVED[0]
    try:
        return list(map(str, json.loads(index.read_bytes())["splits"])) if index.is_file() else [ALL]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{index} is damaged ({one_line(error)}); save the data set again") from None


def split_named(name: str) -> str | None:
    """The split in a name, by the last of its words that is one: `wiki.valid.tokens`, `StoriesDEV.jsonl`, `myTest`. Or None."""
    words = re.findall(r"(?i:held[\W_]?out)|[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    return next((split for word in reversed(words) if (split := _split_called(word))), None)


def _split_called(word: str) -> str | None:
    plain = re.sub(r"[\W_]", "", word.lower()).removesuffix("set")
    return next((split for split, names in SPLIT_NAMES.items() if plain in names), None)


def find_splits(
    inputs: Sequence[str], validation: Sequence[str] = (), test: bool = True
) -> tuple[dict[str, list[Source]], list[str]]:
    """({split: its sources}, notes) of files, patterns, folders and data sets, by the names of files and folders.

    If no name tells a split, all is training text. `validation` replaces the sources that names call so; `test` False leaves
    out those of test. ValueError or FileNotFoundError, in one line.
    """
    sources = find_sources(inputs, None)
    paths = [path.absolute() for name in inputs for path in _matched(name)]
    folders = [path if path.is_dir() else path.parent for path in paths]
    name, root = few(inputs), Path(os.path.commonpath(folders)) if folders else Path()
    splits: dict[str, list[Source]] = {}
    unnamed: list[Source] = []
    given = {str(Path(name).expanduser()) for name in inputs}
    for source in sources:
        if split := split_of(source, root):
            splits.setdefault(split, []).append(source)
        elif source.name in given:
            splits.setdefault("train", []).append(source)
        else:
            unnamed.append(source)
    # No name tells a split; or the only one is that of a file, such as `dev.txt`, which was given as the whole text.
    if not splits or (len(splits) == 1 and not unnamed and not any(path.is_dir() for path in paths)):
        splits, unnamed = {"train": sources}, []
    if "train" not in splits:
        raise FileNotFoundError(
            f"{name} has text for {' and '.join(splits)}, and none whose name says `train`; add or rename it"
        )
    found = "; ".join(f"{split} is {_first_of(splits[split], root)}" for split in SPLITS if split in splits)
    notes = [f"{name}: {found}"] if len(sources) > 1 else []
    if not test:
        unnamed += splits.pop("test", [])
    if validation:
        replaced = splits.get("validation", [])
        splits["validation"] = find_sources(validation, "validation")
        chosen = {source.identity for source in splits["validation"]}
        unnamed += [source for source in replaced if source.identity not in chosen]
    below = (path for folder in paths if folder.is_dir() for path in sorted(folder.rglob("*")))
    if tables := [path.name for path in below if path.name.lower().endswith(TABLES) and split_named(path.name)]:
        notes.append(f"{name}: passed over {tables[0]}, of {len(tables)} that are no text; make it a .jsonl or parquet")
    if unnamed:
        left_out = _first_of(unnamed, root)
        notes.append(f"{name}: left out {len(unnamed)} whose names tell no split, or another: {left_out}")
    return splits, notes


def _first_of(sources: list[Source], root: Path) -> str:
    """The first few sources, by their paths below `root`, or their splits."""
    return few([os.path.relpath(one.name, root) if one.split in (None, ALL) else str(one.split) for one in sources])


def few(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def split_of(source: Source, root: Path) -> str | None:
    """The split of a source: a folder below `root` that is called like one; or else the split in its name, or in a folder's."""
    if source.split and source.split != ALL:
        return split_named(source.split)
    parts = Path(source.name).absolute().relative_to(root).parts[::-1]
    folders = parts if source.split else parts[1:]
    called = [split for folder in folders if (split := _split_called(folder))]
    named = [split for part in parts if (split := split_named(part))]
    return next(iter([*called, *named]), None)
