"""Writes the files of prepare_text: two whole files, or shards. Each appears complete or not at all, with a .json beside it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np

from recipes.data.token_files import ChunkDigest
from recipes.data.unfinished_shards import PROGRESS, SHARD_FOLDERS, read_progress

Encoded = Iterator[tuple[bytes, bytes]]
"""(training ids, validation ids) of each task"""
Facts = dict[str, Any]
"""contents that all .json files share: dtype, end_of_text, and more"""


def write_files(folder: Path, facts: Facts, encoded: Encoded, tokenizer_json: str) -> dict[Path, int]:
    """Write train.ids, valid.ids and tokenizer.json. Returns {path: number of ids}. ValueError if one would be empty."""
    files = [Output(folder / "train.ids", facts), Output(folder / "valid.ids", facts)]
    try:
        for pair in encoded:
            for file, ids in zip(files, pair, strict=True):
                file.write(ids)
        _check_counts({file.path.stem: file.count for file in files})
        _remove(files[0].path)  # first, so that new files never stand beside an old train.ids
        _replace(folder / "tokenizer.json", tokenizer_json.encode())
        _remove_shards(folder, 0)
        (folder / PROGRESS).unlink(missing_ok=True)
        for file in reversed(files):  # train.ids last: if it exists, all files do
            file.commit()
    finally:
        for file in files:
            file.discard()
    return {file.path: file.count for file in files}


def write_shards(
    folder: Path,
    facts: Facts,
    encoded: Callable[[int], Encoded],
    tokenizer_json: str,
    begun: dict[str, str],
    tasks: int,
    overwrite: bool,
) -> dict[Path, int]:
    """Write shards of `tasks` tasks each into train/ and valid/, after those that an interrupted call has written.

    `encoded(n)` yields all tasks but the first n. `begun`: "made_from", a hash of the settings, and the "command". Returns
    {folder: number of ids}. ValueError if one would be empty, or if the folder has shards of other settings and `overwrite` is
    not set.
    """
    progress = folder / PROGRESS
    done: dict[str, Any] = {**begun, "shards": 0, "train": 0, "valid": 0}
    before = read_progress(progress) if progress.exists() else done
    if before["made_from"] == begun["made_from"]:
        done = before
    elif not overwrite:
        raise ValueError(
            f"{folder} holds a part of other text or settings; choose another --out, add --overwrite, or go on with it: "
            f"{before.get('command')}"
        )
    if done["shards"]:
        print(f"{folder}: going on behind {done['shards']} shards")
    _replace(folder / "tokenizer.json", tokenizer_json.encode())
    _replace(progress, json.dumps(done).encode())
    _remove_shards(folder, done["shards"])
    for name in SHARD_FOLDERS:
        _remove(folder / f"{name}.ids")
    stream = encoded(done["shards"] * tasks)
    for number in count(done["shards"]):
        files = [Output(folder / name / f"{number:05d}.ids", facts) for name in SHARD_FOLDERS]
        try:
            for pair in islice(stream, tasks):
                for file, ids in zip(files, pair, strict=True):
                    file.write(ids)
            if not any(file.count for file in files):
                break
            for file in files:
                if file.count:
                    file.commit()
        finally:
            for file in files:
                file.discard()
        done |= {"shards": number + 1} | {file.path.parent.name: done[file.path.parent.name] + file.count for file in files}
        _replace(progress, json.dumps(done).encode())
    counts = {name: done[name] for name in SHARD_FOLDERS}
    _check_counts(counts)
    progress.unlink()
    return {folder / name: ids for name, ids in counts.items()}


def _remove_shards(folder: Path, first: int) -> None:
    """Remove the shards with numbers from `first` on."""
    for name in SHARD_FOLDERS:
        for path in (folder / name).glob("*.ids"):
            if path.stem.isdecimal() and int(path.stem) >= first:
                _remove(path)


def _remove(path: Path) -> None:
    """Remove a file of ids, after the .json beside it: a kill between the two leaves the file for the next call to find."""
    path.with_name(f"{path.name}.json").unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _check_counts(counts: dict[str, int]) -> None:
    """ValueError if one of train and valid has no ids."""
    for name, ids in counts.items():
        if not ids:
            raise ValueError(f"there is no text for {name}: give more documents, or --valid INPUT")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the folder against other calls; the kernel unlocks it however this process ends. ValueError if another holds it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
        os.fsync(handle)
    except BlockingIOError:
        raise ValueError(f"another prepare_text writes to {folder}; wait for it, or choose another --out") from None
    finally:
        os.close(handle)


class Output:
    """A file of ids that is written under a temporary name and renamed by `commit`."""

    def __init__(self, path: Path, facts: Facts) -> None:
        self.path, self.facts = path, facts
        self.dtype = np.dtype(str(facts["dtype"]))
        path.parent.mkdir(exist_ok=True)
        self.temporary = path.with_name(f".{path.name}.unfinished")
        self.file = self.temporary.open("wb")
        self.count = self.documents = 0
        self.known = ChunkDigest(self.dtype.name)

    def write(self, ids: bytes) -> None:
        """Append ids, as bytes of the dtype."""
        self.file.write(ids)
        self.known.update(ids)
        tokens = np.frombuffer(ids, self.dtype)
        self.count += len(tokens)
        self.documents += int(np.count_nonzero(tokens == self.facts["end_of_text"]))

    def commit(self) -> None:
        """Sync the file to disk, write the .json beside it, then rename the file to its final name."""
        self.file.flush()
        os.fsync(self.file.fileno())
        facts = {**self.facts, "count": self.count, "documents": self.documents, **self.known.facts()}
        _replace(self.path.with_name(f"{self.path.name}.json"), json.dumps(facts).encode())
        os.replace(self.temporary, self.path)

    def discard(self) -> None:
        """Close the file, and remove it if it was not committed."""
        self.file.close()
        self.temporary.unlink(missing_ok=True)


def _replace(path: Path, content: bytes) -> None:
    """Write a small file atomically, and sync it."""
    temporary = path.with_name(f".{path.name}.unfinished")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
