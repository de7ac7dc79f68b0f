"""Sets of token ids: one file or many shards as one stream, and mixtures of several."""

from __future__ import annotations

import functools
import glob
import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np

from recipes.data.remote import is_url, remote_files
from recipes.data.text_sources import SPLIT_NAMES
from recipes.data.token_files import TokenFile, ids_among, out_of_range
from recipes.data.unfinished_shards import check_finished


@dataclass(frozen=True)
class TokenSet:
    """The ids of one file or many, end to end: however they are cut into files, the same windows hold the same ids."""

    name: str
    """as it was given: a path or a pattern"""
    files: tuple[TokenFile, ...]
    vocab_size: int

    @functools.cached_property
    def ends(self) -> np.ndarray:
        """One past the last id of each file in the set, int64 [files]."""
        return np.cumsum([file.count for file in self.files], dtype=np.int64)

    @property
    def count(self) -> int:
        """Ids of all files."""
        return int(self.ends[-1])

    def windows(self, length: int, starts: np.ndarray) -> np.ndarray:
        """ids[start : start + length] for each start: int32 [len(starts), length]. ValueError for one out of the vocabulary."""
        if len(self.files) == 1:
            tokens = self.files[0].windows(length, starts)
        else:
            tokens = np.empty((len(starts), length), np.int32)
            numbers = np.searchsorted(self.ends, starts, side="right")
            whole = starts + length <= self.ends[numbers]
            for number in np.unique(numbers[whole]):
                chosen = whole & (numbers == number)
                tokens[chosen] = self.files[number].windows(length, starts[chosen] - self._begin(number))
            for row in np.flatnonzero(~whole):
                tokens[row] = self._across(length, int(starts[row]), int(numbers[row]))
        # The .json beside a file may be out of date, so the ids themselves are checked.
        ids = tokens.view(np.uint32)
        if ids.size and ids.max() >= self.vocab_size:
            row, column = np.argwhere(ids >= self.vocab_size)[0]
            place = int(starts[row]) + int(column)
            number = int(np.searchsorted(self.ends, place, side="right"))
            raise out_of_range(self.files[number].name, int(ids[row, column]), place - self._begin(number), self.vocab_size)
        return tokens

    def _begin(self, number: int) -> int:
        return int(self.ends[number]) - self.files[number].count

    def _across(self, length: int, start: int, number: int) -> np.ndarray:
        """The window at `start`, in file `number`, that reaches into the next files."""
        parts: list[np.ndarray] = []
        while length:
            file, place = self.files[number], start - self._begin(number)
            part = min(length, file.count - place)
            parts.append(file.windows(part, np.array([place]))[0])
            start, length, number = start + part, length - part, number + 1
        return np.concatenate(parts)

    def ids(self) -> np.ndarray:
        """All ids [count], read-only; mapped, where they are in one file."""
        return self.files[0].ids() if len(self.files) == 1 else np.concatenate([file.ids() for file in self.files])

    def __len__(self) -> int:
        return self.count

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.ids(), dtype)

    def check(self, longer_than: int) -> str:
        """The digest of the ids, of which there must be more than `longer_than`. ValueError as of `TokenFile.check`."""
        if self.count <= longer_than:
            raise ValueError(
                f"{self.name} holds {self.count} ids, too few for windows of {longer_than - 1} inputs: it takes more than "
                f"{longer_than}; give more text, or smaller windows (--context_length, --max_length)"
            )
        return self.digest()

    def digest(self) -> str:
        """A digest of the digests of the files, so that known files are not read again: the same ids in other files have
        another one. ValueError as of `TokenFile.check`.
        """
        digests = [f"{file.count} {file.check(self.vocab_size)}" for file in self.files]
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()


Weighted = tuple[str, float | None]
"""(a file, folder or pattern, its weight in a mixture, if it has one)"""


@dataclass(frozen=True)
class Mixture:
    """Sets of ids, each with its share of the samples."""

    sets: tuple[TokenSet, ...]
    shares: tuple[float, ...]
    """of the samples; their sum is 1"""

    @classmethod
    def of(cls, sets: Sequence[TokenSet], sources: Sequence[Weighted]) -> Mixture:
        """A mixture of sets by the weights of their sources (default 1). ValueError for a weight that is not above 0."""
        weights = [1.0 if weight is None else weight for _, weight in sources]
        for (path, _), weight in zip(sources, weights, strict=True):
            if not 0 < weight < math.inf:
                raise ValueError(f"{path} has the weight {weight:g} in its mixture; give it one above 0, or leave it out")
        return cls(tuple(sets), tuple(weight / sum(weights) for weight in weights))

    @property
    def count(self) -> int:
        """Ids of all sets."""
        return sum(part.count for part in self.sets)

    @property
    def labels(self) -> tuple[str, ...]:
        """A short name of each set, for metrics: the last part of its path that is neither a pattern nor a split's name."""
        labels: list[str] = []
        for part in self.sets:
            parts = [re.sub(r"\.(ids|bin|npy)$", "", name) for name in reversed(Path(part.name).parts)]
            telling = (name for name in parts if "*" not in name and name.lower() not in chain(*SPLIT_NAMES.values()))
            label = re.sub(r"\W+", "_", next(telling, "ids"))
            numbered = (f"{label}_{number}" for number in count(len(labels) + 1))
            labels.append(label if label not in labels else next(name for name in numbered if name not in labels))
        return tuple(labels)

    @property
    def notes(self) -> list[str]:
        """The note on the shares of several sets."""
        shares = ", ".join(f"{label} {share:.2%}" for label, share in zip(self.labels, self.shares, strict=True))
        return [f"Samples are drawn from {shares}"] if len(self.sets) > 1 else []

    def digests(self, longer_than: int) -> list[str]:
        """The digest of each set, with its share. ValueError as of `TokenSet.check`."""
        return [f"{part.check(longer_than)} {share:.9g}" for part, share in zip(self.sets, self.shares, strict=True)]

    @property
    def whole(self) -> TokenSet:
        """The ids of all sets, end to end."""
        files = tuple(file for part in self.sets for file in part.files)
        return TokenSet(", ".join(part.name for part in self.sets), files, self.sets[0].vocab_size)


def find_files(path: str, vocab_size: int) -> TokenSet:
    """The ids of a file, of the `.ids` files of a folder, or of those that a pattern matches, in the order of their names."""
    if is_url(path):
        return TokenSet(path, remote_files(path, vocab_size), vocab_size)
    folder = Path(path)
    below = folder.rglob("*.ids") if folder.is_dir() else map(Path, glob.glob(path, recursive=True))
    matched = [folder] if folder.is_file() else sorted(map(Path, ids_among(map(str, below))))
    if not matched and folder.is_dir():
        raise FileNotFoundError(
            f"{path} is a folder without .ids files; give a .ids, .bin or .npy file of token ids, or text, or `embedded`"
        )
    return local_set(path, matched or [folder], vocab_size)


def local_set(name: str, paths: Sequence[Path], vocab_size: int) -> TokenSet:
    """The ids of these files, end to end. ValueError for shards of an unfinished preparation, and as of `TokenFile.open`."""
    for folder in dict.fromkeys(path.parent for path in paths):
        check_finished(folder)
    return TokenSet(name, tuple(TokenFile.open(path, vocab_size) for path in paths), vocab_size)


def windows_of(ids: TokenSet | np.ndarray, length: int, starts: np.ndarray) -> np.ndarray:
    """ids[start : start + length] for each start, of a set or in memory: [len(starts), length]."""
    return ids.windows(length, starts) if isinstance(ids, TokenSet) else ids[starts[:, None] + np.arange(length)]


def check_tokenizer(tokenizer: str, content: str, files: Sequence[TokenFile]) -> None:
    """ValueError if the .json beside one of the files says that another tokenizer than `content` (JSON) made it."""
    digest = hashlib.sha256(content.encode()).hexdigest()
    for file in files:
        if file.sidecar.get("tokenizer_sha256", digest) != digest:
            way_out = "give that one with --tokenizer, or make the ids again"
            raise ValueError(f"tokenizer {tokenizer} is not the one that made {file.name}; {way_out}")


def overlap(train: TokenSet, validation: TokenSet) -> list[str]:
    """Notes on the first few files whose ids are in both sets."""
    trained_on = {file.facts.digest: file.name for file in train.files}
    same = [(file.name, name) for file in validation.files if (name := trained_on.get(file.facts.digest))]
    return [f"{name} holds the ids of {other}: the validation loss is that of training text" for name, other in same[:3]]
