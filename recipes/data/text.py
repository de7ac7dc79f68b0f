"""From text to token ids: rows -> tokenizer -> ids, read once and cached.

A row is a document, or one line of a text file: a paragraph, a heading, a story. In the stream of ids each is followed by
`<|endoftext|>`. Errors that a user can fix are ValueError or FileNotFoundError, with one line that names the next step.
"""

import hashlib
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recipes.data.cache import CacheEntry, cache_folder, content_hash
from recipes.data.encoding import Encoder
from recipes.data.text_corpus import Corpus, Reading, find_corpus
from recipes.data.text_sources import SPLITS
from recipes.data.token_files import TokenFile
from recipes.data.token_sets import Mixture, TokenSet
from recipes.data.tokenizer import end_of_text_id, load_tokenizer, vocabulary_size

if TYPE_CHECKING:
    from tokenizers import Tokenizer


ENCODE_CHARACTERS = 1 << 20  # tokenized at a time, so that memory stays bounded


@dataclass(frozen=True)
class TokenSplit:
    """One split as ids."""

    ids: TokenSet | np.ndarray  # [tokens]: each row followed by end-of-text
    row_ends: np.ndarray  # int64 [rows]: one past the end-of-text of each row; pickled by path where it is memory-mapped
    words: int  # words and line ends, also those of blank lines, which word perplexity divides by; 0: unknown
    fingerprint: str  # hex; of the ids
    largest_id: int | None = None  # where it is known

    def __getstate__(self) -> dict[str, Any]:
        return {k: (v.filename, v.dtype.name) if isinstance(v, np.memmap) else v for k, v in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({k: np.memmap(v[0], v[1], "r") if isinstance(v, tuple) else v for k, v in state.items()})


@dataclass(frozen=True)
class Text:
    """A tokenized data set with its tokenizer."""

    tokenizer_json: str
    vocab_size: int
    end_of_text: int
    splits: dict[str, TokenSplit]
    """train, validation, and test if there is one; of a mixture also `validation_LABEL` of each set"""
    notes: tuple[str, ...] = ()
    """for the user"""
    mixture: Mixture | None = None
    """the sets that training samples are drawn from, if they have weights"""

    @classmethod
    def without_data(cls, tokenizer_json: str) -> "Text":
        """A tokenizer alone, to encode and decode with."""
        from tokenizers import Tokenizer

        encoder = Tokenizer.from_str(tokenizer_json)
        return cls(tokenizer_json, vocabulary_size(encoder), end_of_text_id(encoder), {})

    @property
    def fingerprint(self) -> str:
        """Hash of the ids of all splits, of the tokenizer, and of a mixture."""
        splits = [f"{name} {split.fingerprint}" for name, split in self.splits.items()]
        return content_hash(self.tokenizer_json, *splits, *(self.mixture.digests(1) if self.mixture else []))

    def tokenizer(self) -> "Tokenizer":
        """The tokenizer, ready to encode and decode."""
        from tokenizers import Tokenizer

        return Tokenizer.from_str(self.tokenizer_json)


def prepare_text(
    dataset: str,
    inputs: Sequence[str],
    tokenizer: str,
    vocab_size: int,
    cache_dir: str | Path | None = None,
    reading: Reading | None = None,
    validation: Sequence[str] = (),
) -> Text:
    """Find text and tokenizer and return the ids of each split, from the cache if the same text was tokenized before.

    `vocab_size` is for `tokenizer="train"` only; `Text.vocab_size` is the actual size. The cache is `cache_dir`,
    else $SAMECURVE_CACHE, else ~/.cache/samecurve. Raises what `find_corpus` and `load_tokenizer` raise.
    """
    cache = cache_folder(cache_dir)
    corpus = find_corpus(dataset, inputs, reading or Reading(), cache, validation)

    def training_rows() -> Iterator[str]:
        return (text for split, text, _ in corpus.rows(Counter()) if split == "train" and text.strip())

    encoder = load_tokenizer(tokenizer, training_rows, corpus.digest, vocab_size, cache)
    splits, notes = _tokenize(corpus, encoder, cache)
    return Text(encoder.to_str(), vocabulary_size(encoder), end_of_text_id(encoder), splits, (*corpus.notes, *notes))


def _tokenize(corpus: Corpus, tokenizer: "Tokenizer", cache: Path) -> tuple[dict[str, TokenSplit], list[str]]:
    """The ids of every split, through the cache, and notes on the rows."""
    tokenizer_json, entries = tokenizer.to_str(), vocabulary_size(tokenizer)
    dtype = np.dtype(np.uint16 if entries <= 2**16 else np.uint32)
    entry = CacheEntry(cache / "ids" / content_hash(tokenizer_json, corpus.digest))
    facts = entry.read()
    if facts is None:
        facts = _write_ids(corpus, Encoder(tokenizer_json, dtype.name), entry)
    splits = {}
    for name, known in facts["splits"].items():
        file = TokenFile(entry.folder / f"{name}.ids", dtype.name, known["count"])
        row_ends = np.memmap(entry.folder / f"{name}.row_ends", np.int64, "r")
        ids = TokenSet(f"{name} text", (file,), entries)
        splits[name] = TokenSplit(ids, row_ends, known["words"], known["fingerprint"], known["largest_id"])
    return splits, [
        f"{name}: {count:,} rows without text passed over" if count else f"{name}: passed over, as it holds no text"
        for name, count in facts["without"].items()
    ]


def _write_ids(corpus: Corpus, encoder: Encoder, entry: CacheEntry) -> dict[str, Any]:
    """Tokenize all rows into files of the cache; the facts about them that the cache keeps."""
    # Set explicitly, the library neither warns nor switches itself off when DataLoader workers are forked later.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    written: dict[str, _SplitFile] = {}
    empty_rows: Counter[str] = Counter()
    try:
        for split, text, end in corpus.rows(empty_rows):
            if split not in written:
                written[split] = _SplitFile(entry.temporary(f"{split}.ids"), encoder)
            written[split].add(text, end)
        for file in written.values():
            file.finish()
        if missing := {"train", "validation"} - {split for split, file in written.items() if file.count}:
            raise ValueError(f"there is no text for {' and '.join(sorted(missing))}; give more, or files for each")
        files = {f"{split}.{kind}": content for split, file in written.items() for kind, content in file.contents().items()}
        facts = {"splits": {split: written[split].facts() for split in SPLITS if split in written}, "without": dict(empty_rows)}
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
        self.waiting: list[tuple[str, bool]] = []
        self.characters = self.words = self.count = self.largest = 0
        self.row_ends, self.digest, self.in_row = array("q"), hashlib.sha256(), False

    def add(self, text: str, end: bool) -> None:
        """Append a row, or a piece of one that does not `end` it. Blank rows only count as words."""
        # Published perplexities on WikiText divide by a count that includes the ends of blank lines.
        self.words += len(text.split()) + text.count("\n") + end
        if text.strip() or self.in_row or not end:
            self.waiting.append((text, end))
            self.characters += len(text)
            self.in_row = not end
        if self.characters >= ENCODE_CHARACTERS:
            self._write()

    def _write(self) -> None:
        contents: list[bytes] = []
        for ids, (_, end) in zip(self.encoder([text for text, _ in self.waiting]), self.waiting, strict=True):
            contents += [ids, self.encoder.end_of_text] if end else [ids]
            self.count += len(ids) // self.width + end
            if end:
                self.row_ends.append(self.count)
        content = b"".join(contents)
        self.largest = max(self.largest, int(np.frombuffer(content, self.encoder.dtype).max(initial=0)))
        self.digest.update(content)
        self.file.write(content)
        self.waiting, self.characters = [], 0

    def finish(self) -> None:
        """Write what is left, and close the file."""
        self._write()
        self.file.close()

    def contents(self) -> dict[str, bytes | Path]:
        """The files for the cache: {ending: content or path}."""
        return {"ids": self.path, "row_ends": self.row_ends.tobytes()}

    def facts(self) -> dict[str, Any]:
        """The facts that the cache keeps of this split."""
        return {
            "count": self.count,
            "words": self.words,
            "fingerprint": self.digest.hexdigest(),
            "largest_id": self.largest,
        }
