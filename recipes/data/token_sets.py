"""Sets of token ids: one file or many shards as one stream, mixtures of several, and what a run is trained on of them."""

from __future__ import annotations

import functools
import glob
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np

from recipes.data.remote import is_url, remote_files
from recipes.data.text import Text, prepare_text
from recipes.data.text_sources import SPLIT_NAMES
from recipes.data.token_files import TokenFile, out_of_range
from recipes.data.tokenizer import existing_tokenizer, vocabulary_size

Weighted = tuple[str, float]
"""(a file, folder or pattern of ids, its weight in a mixture)"""
EMBEDDED = "embedded"


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
        places = np.broadcast_to(starts[:, None], tokens.shape)
        self._check_ids(tokens.view(np.uint32), lambda at: int(places[at]) + int(at[1]))
        return tokens

    def _check_ids(self, ids: np.ndarray, place_of: Callable[[tuple[Any, ...]], int]) -> None:
        """ValueError for an id out of the vocabulary: what is said of a file beside it may be old."""
        if ids.size and ids.max() >= self.vocab_size:
            at = tuple(np.argwhere(ids >= self.vocab_size)[0])
            place = place_of(at)
            number = int(np.searchsorted(self.ends, place, side="right"))
            raise out_of_range(self.files[number].name, int(ids[at]), place - self._begin(number), self.vocab_size)

    def _begin(self, number: int) -> int:
        return int(self.ends[number]) - self.files[number].count

    def _across(self, length: int, start: int, number: int) -> np.ndarray:
        """A window that goes on in the next files."""
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

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        """ids[places], as of one array; only what is asked for is read."""
        if len(self.files) == 1:
            ids = _mapped(self.files[0])[places]
        else:
            numbers = np.searchsorted(self.ends, places, side="right")
            ids = np.empty(places.shape, np.uint32)
            for number in np.unique(numbers):
                chosen = numbers == number
                ids[chosen] = _mapped(self.files[number])[places[chosen] - self._begin(number)]
        self._check_ids(ids, lambda at: int(places[at]))
        return ids

    def check(self, longer_than: int) -> str:
        """The digest of the ids, of which there must be more than `longer_than`. ValueError as of `TokenFile.check`."""
        if self.count <= longer_than:
            raise ValueError(
                f"{self.name} holds {self.count} ids, too few for windows of {longer_than - 1} inputs: it takes more than "
                f"{longer_than}; give more text or a smaller --context_length"
            )
        return self.digest()

    def digest(self) -> str:
        """The digest of the ids, however they are stored. ValueError as of `TokenFile.check`."""
        digests = [f"{file.count} {file.check(self.vocab_size)}" for file in self.files]
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()


@functools.lru_cache(maxsize=4096)
def _mapped(file: TokenFile) -> np.ndarray:
    return file.ids()


@dataclass(frozen=True)
class Mixture:
    """Sets of ids, each with the share of the samples that it is to give."""

    sets: tuple[TokenSet, ...]
    shares: tuple[float, ...]
    """of the samples; their sum is 1"""

    @property
    def count(self) -> int:
        """Ids of all sets."""
        return sum(part.count for part in self.sets)

    @property
    def labels(self) -> tuple[str, ...]:
        """A short name of each set, for metrics: the last part of its path that is no pattern and more than a split's name."""
        labels: list[str] = []
        for part in self.sets:
            parts = [re.sub(r"\.(ids|bin|npy)$", "", name) for name in reversed(Path(part.name).parts)]
            said = (name for name in parts if "*" not in name and name.lower() not in chain(*SPLIT_NAMES.values()))
            label = re.sub(r"\W+", "_", next(said, "ids"))
            numbered = (f"{label}_{number}" for number in count(len(labels) + 1))
            labels.append(label if label not in labels else next(name for name in numbered if name not in labels))
        return tuple(labels)

    @property
    def whole(self) -> TokenSet:
        """All ids, of each set once."""
        files = tuple(file for part in self.sets for file in part.files)
        return TokenSet(", ".join(part.name for part in self.sets), files, self.sets[0].vocab_size)


@dataclass(frozen=True)
class Streams:
    """The ids that a language model is trained on and measured with, and their tokenizer."""

    train: Mixture
    validation: Mixture
    tokenizer_json: str | None
    fingerprint: str
    """hex; of the ids, however they are stored, and of the shares"""

    def end_of_text(self) -> int:
        """The id that ends a document. ValueError without a tokenizer, which alone knows it."""
        if self.tokenizer_json is None:
            raise ValueError("document_mask needs the id of <|endoftext|>; give the --tokenizer that made the ids")
        return Text.without_data(self.tokenizer_json).end_of_text


def find_files(path: str, vocab_size: int) -> TokenSet:
    """The ids of a file, of the `.ids` files of a folder, or of those that a pattern matches, in the order of their names."""
    if is_url(path):
        return TokenSet(path, remote_files(path, vocab_size), vocab_size)
    folder = Path(path)
    matched = (
        [folder]
        if folder.is_file()
        else sorted(folder.rglob("*.ids") if folder.is_dir() else map(Path, glob.glob(path, recursive=True)))
    )
    if not matched and folder.is_dir():
        raise FileNotFoundError(
            f"{path} is a folder without .ids files; give a .ids, .bin or .npy file of token ids, or `embedded`"
        )
    return TokenSet(path, tuple(TokenFile.open(file, vocab_size) for file in matched or [folder]), vocab_size)


def _mixture(sources: Sequence[Weighted], vocab_size: int) -> Mixture:
    for path, _ in (source for source in sources if source[1] <= 0):
        raise ValueError(f"{path} has the weight 0 in its mixture; give it one above 0, or leave it out")
    total = sum(weight for _, weight in sources)
    return Mixture(tuple(find_files(path, vocab_size) for path, _ in sources), tuple(weight / total for _, weight in sources))


def open_streams(
    train: Sequence[Weighted], validation: Sequence[Weighted], tokenizer: str | None, vocab_size: int, length: int
) -> Streams:
    """Open and check all ids, for windows of `length` inputs. `embedded` prepares the text that comes with Python.

    `tokenizer`: a folder or tokenizer.json; None: the one beside the first of `train`, if there is one. ValueError or OSError,
    in one line.
    """
    embedded = [any(path == EMBEDDED for path, _ in sources) for sources in (train, validation)]
    if not train or (not validation and not embedded[0]):
        name = "val_data_path" if train else "train_data_path"
        raise ValueError(
            f"{name} is missing: give --{name} FILE.ids (tools/prepare_text.py of samecurve's source repository makes one), "
            "or --train_data_path embedded"
        )
    if (validation and embedded[0] != embedded[1]) or (embedded[0] and len(train) + len(validation) > 2):
        raise ValueError("`embedded` has its own tokens for training and validation; give it alone, as --train_data_path")
    if embedded[0]:
        text = prepare_text(EMBEDDED, None, tokenizer or "train", vocab_size)
        tokenizer_json: str | None = text.tokenizer_json
        both = [
            Mixture((TokenSet(EMBEDDED, (TokenFile.of_array(text.splits[split].ids),), vocab_size),), (1.0,))
            for split in ("train", "validation")
        ]
    else:
        both = [_mixture(sources, vocab_size) for sources in (train, validation)]
        files = [file for mixture in both for part in mixture.sets for file in part.files]
        tokenizer_json = _tokenizer(tokenizer, files, vocab_size)
    digests = [
        f"{part.check(length + 1)} {share:.9g}"
        for mixture in both
        for part, share in zip(mixture.sets, mixture.shares, strict=True)
    ]
    return Streams(both[0], both[1], tokenizer_json, hashlib.sha256("\n".join(digests).encode()).hexdigest())


def _tokenizer(tokenizer: str | None, files: Sequence[TokenFile], vocab_size: int) -> str | None:
    """The tokenizer of ids: the given one, or the one beside the first file. ValueError if it is another than theirs."""
    beside = [folder / "tokenizer.json" for folder in files[0].path.parents[:2]]  # shards lie in a folder of their own
    tokenizer = tokenizer or next((str(path) for path in beside if path.is_file()), None)
    if not tokenizer:
        return None
    encoder = existing_tokenizer(tokenizer)
    if (entries := vocabulary_size(encoder)) > vocab_size:
        ways_out = f"give --vocab_size {entries}, or the --tokenizer that made the ids"
        raise ValueError(f"tokenizer {tokenizer} has {entries} entries, vocab_size is {vocab_size}; {ways_out}")
    digest = hashlib.sha256(encoder.to_str().encode()).hexdigest()
    for file in files:
        if file.sidecar().get("tokenizer_sha256", digest) != digest:
            way_out = "give that one with --tokenizer, or make the ids again"
            raise ValueError(f"tokenizer {tokenizer} is not the one that made {file.name}; {way_out}")
    return encoder.to_str()
