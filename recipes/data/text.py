"""From text to token ids: rows -> tokenizer -> ids, read once and cached.

A row is a document, or one line of a text file: a paragraph, a heading, a story. In the stream of ids each is followed by
`<|endoftext|>`. Errors that a user can fix are ValueError or FileNotFoundError, with one line that names the next step.
"""

import hashlib
import os
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from recipes.data.cache import CacheEntry, cache_folder, content_hash
from recipes.data.encoding import Encoder
from recipes.data.text_corpus import Corpus, find_corpus
from recipes.data.text_sources import SPLITS
from recipes.data.tokenizer import end_of_text_id, load_tokenizer, vocabulary_size

if TYPE_CHECKING:
    from tokenizers import Tokenizer


ENCODE_CHARACTERS = 1 << 20  # tokenized at a time, so that memory stays bounded


class IdsInShards(Protocol):
    """Ids in several files, as one array would give them (`token_sets.TokenSet`)."""

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        """Those at some places, of any shape."""

    def __len__(self) -> int:
        """Of all files together."""


@dataclass(frozen=True)
class TokenSplit:
    """One split as ids. Pickling a memory-mapped one sends its path, not its content, so that workers start at once."""

    ids: np.ndarray | IdsInShards  # uint16 or uint32 [tokens]: each row followed by end-of-text; `[places]` reads some of them
    row_ends: np.ndarray  # int64 [rows]: one past the end-of-text of each row
    words: int  # words separated by white space, and line ends, of blank lines too: what word perplexity divides by; 0: unknown
    fingerprint: str  # hex; of the ids
    largest_id: int | None = None  # where it is known

    def __getstate__(self) -> dict[str, Any]:
        return {k: (file_of(v), v.dtype.name) if isinstance(v, np.memmap) else v for k, v in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({k: np.memmap(v[0], v[1], "r") if isinstance(v, tuple) else v for k, v in state.items()})


def file_of(ids: np.ndarray) -> Path:
    """The file of a memory-mapped array."""
    assert isinstance(ids, np.memmap)
    assert ids.filename is not None
    return Path(ids.filename)


@dataclass(frozen=True)
class Text:
    """A tokenized data set with its tokenizer."""

    tokenizer_json: str
    vocab_size: int
    end_of_text: int
    splits: dict[str, TokenSplit]
    """train, validation, and test if there is one"""
    notes: tuple[str, ...] = ()
    """what the user should know of the text"""

    @classmethod
    def without_data(cls, tokenizer_json: str) -> "Text":
        """A tokenizer alone, to encode and decode with."""
        from tokenizers import Tokenizer

        encoder = Tokenizer.from_str(tokenizer_json)
        return cls(tokenizer_json, vocabulary_size(encoder), end_of_text_id(encoder), {})

    @property
    def fingerprint(self) -> str:
        """Hash of the ids of all splits, and of the tokenizer."""
        return content_hash(self.tokenizer_json, *(f"{name} {split.fingerprint}" for name, split in self.splits.items()))

    def tokenizer(self) -> "Tokenizer":
        """The tokenizer, ready to encode and decode."""
        from tokenizers import Tokenizer

        return Tokenizer.from_str(self.tokenizer_json)


def prepare_text(
    dataset: str,
    data_dir: str | None,
    tokenizer: str,
    vocab_size: int,
    cache_dir: str | Path | None = None,
    column: str = "text",
) -> Text:
    """Find text and tokenizer and return the ids of each split, from the cache if the same text was tokenized before.

    `vocab_size` is for `tokenizer="train"` only; `Text.vocab_size` is the actual size. The cache is `cache_dir`,
    else $SAMECURVE_CACHE, else ~/.cache/samecurve. Raises what `find_corpus` and `load_tokenizer` raise.
    """
    cache = cache_folder(cache_dir)
    corpus = find_corpus(dataset, data_dir, column, cache)

    def training_rows() -> Iterator[str]:
        return (row for split, row in corpus.rows(Counter()) if split == "train" and row.strip())

    encoder = load_tokenizer(tokenizer, training_rows, corpus.digest, vocab_size, cache)
    splits, notes = _tokenize(corpus, encoder, cache)
    return Text(encoder.to_str(), vocabulary_size(encoder), end_of_text_id(encoder), splits, (*corpus.notes, *notes))


def _tokenize(corpus: Corpus, tokenizer: "Tokenizer", cache: Path) -> tuple[dict[str, TokenSplit], list[str]]:
    """The ids of every split, through the cache, and notes on the rows."""
    tokenizer_json = tokenizer.to_str()
    dtype = np.dtype(np.uint16 if vocabulary_size(tokenizer) <= 2**16 else np.uint32)
    entry = CacheEntry(cache / "tokens" / content_hash(tokenizer_json, corpus.digest))
    facts = entry.read()
    if facts is None:
        facts = _write_ids(corpus, Encoder(tokenizer_json, dtype.name), entry)
    splits = {
        name: TokenSplit(
            np.memmap(entry.folder / f"{name}.ids", dtype, "r"),
            np.memmap(entry.folder / f"{name}.row_ends", np.int64, "r"),
            known["words"],
            known["fingerprint"],
        )
        for name, known in facts["splits"].items()
    }
    return splits, [f"{name}: {count:,} rows without text passed over" for name, count in facts["without"].items()]


def _write_ids(corpus: Corpus, encoder: Encoder, entry: CacheEntry) -> dict[str, Any]:
    """Tokenize all rows into files of the cache; what is to be known of them."""
    # Set explicitly, the library neither warns nor switches itself off when DataLoader workers are forked later.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    written: dict[str, _SplitFile] = {}
    without: Counter[str] = Counter()
    try:
        for split, row in corpus.rows(without):
            if split not in written:
                written[split] = _SplitFile(entry.temporary(f"{split}.ids"), encoder)
            written[split].add(row)
        for file in written.values():
            file.finish()
        if missing := {"train", "validation"} - {split for split, file in written.items() if file.count}:
            raise ValueError(f"there is no text for {' and '.join(sorted(missing))}; give more, or files for each")
        files = {f"{split}.{kind}": content for split, file in written.items() for kind, content in file.contents().items()}
        facts = {"splits": {split: written[split].facts() for split in SPLITS if split in written}, "without": dict(without)}
        entry.write(files, facts)
    finally:
        for file in written.values():
            file.path.unlink(missing_ok=True)
    return facts


class _SplitFile:
    """The ids of a split, written as its rows come."""

    def __init__(self, path: Path, encoder: Encoder) -> None:
        self.path, self.encoder, self.file = path, encoder, path.open("wb")
        self.width = np.dtype(encoder.dtype).itemsize
        self.waiting: list[str] = []
        self.characters = self.words = self.count = 0
        self.row_ends, self.digest = array("q"), hashlib.sha256()

    def add(self, row: str) -> None:
        """Append a row, unless it is blank."""
        # WikiText's own count, by which published perplexities divide, has the ends of blank lines too.
        self.words += len(row.split()) + row.rstrip("\n").count("\n") + 1
        if row.strip():
            self.waiting.append(row)
            self.characters += len(row)
        if self.characters >= ENCODE_CHARACTERS:
            self._write()

    def _write(self) -> None:
        for ids in self.encoder(self.waiting):
            self.count += len(ids) // self.width + 1
            self.row_ends.append(self.count)
            for part in (ids, self.encoder.end_of_text):
                self.digest.update(part)
                self.file.write(part)
        self.waiting, self.characters = [], 0

    def finish(self) -> None:
        """Write what is left, and close the file."""
        self._write()
        self.file.close()

    def contents(self) -> dict[str, bytes | Path]:
        """What belongs into the cache."""
        return {"ids": self.path, "row_ends": self.row_ends.tobytes()}

    def facts(self) -> dict[str, Any]:
        """What is to be known."""
        return {"words": self.words, "fingerprint": self.digest.hexdigest()}
