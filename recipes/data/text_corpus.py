"""The text that a language model is trained on, as rows of train, validation and test: local, from the hub, or embedded."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.data.cache import CacheEntry, content_hash, remembered_hash
from recipes.data.documents import piece_size, pieces, units
from recipes.data.embedded import load_embedded
from recipes.data.hub import HubDataSet, open_data_set
from recipes.data.text_files import lines, no_progress, rows, text_blocks
from recipes.data.text_sources import SPLITS, Source, few, find_splits, split_named
from recipes.data.tokenizer import END_OF_TEXT

HUB_WIKITEXT = "Salesforce/wikitext"
HUB_DATASETS = {"wikitext2": f"{HUB_WIKITEXT}:wikitext-2-raw-v1", "wikitext103": f"{HUB_WIKITEXT}:wikitext-103-raw-v1"}
HELD_OUT, MOST_HELD_OUT = 0.05, 10_000_000  # of training text without a validation split: the share, and at most so many bytes
Row = tuple[str, str, bool]
"""(split, text, whether it ends its row: long rows come in pieces if some text is to be held out); blank rows are included"""


@dataclass(frozen=True)
class Corpus:
    """Text with its splits, read anew by each call of `rows`."""

    digest: str
    """hex; of everything that the rows depend on"""
    rows: Callable[[Counter[str]], Iterator[Row]]
    """yields all rows, split by split or mixed; counts rows without text, by source, in its argument"""
    notes: list[str]
    """for the user"""
    sources: Sequence[Source] = ()
    """what is read; empty for embedded text"""


@dataclass(frozen=True)
class Reading:
    """How files are read as rows."""

    column: str | None = "text"
    """the column with the text; None: each row whole, as JSON, plain text as {"text": ...}"""
    by_line: bool = True
    """a text file without END_OF_TEXT has a row on each line; False: it is one document, and its white space is kept"""
    held_out: tuple[str, ...] = ("validation", "test")
    """splits that get a part of the training text where there is no validation text, unless they have text of their own"""


def find_corpus(dataset: str, inputs: Sequence[str], reading: Reading, cache: Path, validation: Sequence[str] = ()) -> Corpus:
    """The text of `inputs` (files, patterns, folders, data sets that `datasets` saved) or, without any, of `dataset`:
    wikitext2, wikitext103, OWNER/NAME[:CONFIGURATION] (see `open_data_set`) or embedded.

    `validation` replaces the validation text that names of the inputs tell. ValueError or FileNotFoundError if it is not there.
    """
    if inputs:
        return _local_corpus(inputs, validation, reading, cache)
    if dataset == "embedded":
        embedded = load_embedded(cache)
        digest = content_hash(*(row for split in SPLITS for row in (split, *embedded[split])))
        return Corpus(digest, lambda empty_rows: ((split, row, True) for split in SPLITS for row in embedded[split]), [])
    if "/" in dataset and Path(dataset).exists():
        raise ValueError(f"dataset {dataset} is a path here; give --data_dir {dataset}, or, for the hub, start elsewhere")
    if dataset in HUB_DATASETS or "/" in dataset:
        return _hub_corpus(dataset, reading, cache)
    raise ValueError(
        f"dataset {dataset!r} is unknown; use {', '.join(HUB_DATASETS)}, embedded, OWNER/NAME of the hub, or --data_dir PATH"
    )


def _local_corpus(inputs: Sequence[str], validation: Sequence[str], reading: Reading, cache: Path) -> Corpus:
    splits, notes = find_splits(inputs, validation, "test" in reading.held_out)
    sources = [source for split in splits.values() for source in split]
    for source in sources:
        if source.split and not Path(source.name).exists():
            raise FileNotFoundError(
                f"{source.name} does not exist; give a file, folder or pattern, or a data set of the hub by --dataset"
            )
    hashes = {source: [remembered_hash(path, cache) for path in source.files] for source in sources}
    kinds = [f"{name} {source.split or source.kind}" for name, split in splits.items() for source in split]
    digest = content_hash(repr(reading), *kinds, *(one for source in sources for one in hashes[source]))
    for source in splits.get("validation", ()):
        if twin := next((other for other in splits["train"] if hashes[other] == hashes[source] and not source.split), None):
            notes.append(f"{source.name} has the text of {twin.name}: the validation loss is that of training text")

    def rows_of(empty_rows: Counter[str], piece: int | None) -> Iterator[Row]:
        return _split_rows(splits, reading, empty_rows, piece)

    size = sum(source.size_bytes or sum(path.stat().st_size for path in source.files) for source in splits["train"])
    return _with_validation(few(inputs), digest, rows_of, splits, size, reading, notes)


def _with_validation(
    name: str,
    digest: str,
    rows_of: Callable[[Counter[str], int | None], Iterator[Row]],
    splits: Mapping[str, list[Source]],
    size: int,
    reading: Reading,
    notes: list[str],
) -> Corpus:
    """The corpus of `rows_of(empty_rows, characters of a piece)`. Without validation text a part of the training text, which
    has `size` bytes, is held out for it.
    """
    sources = [source for split in splits.values() for source in split]
    if "validation" in splits:
        return Corpus(digest, lambda empty_rows: rows_of(empty_rows, None), notes, sources)
    share = min(HELD_OUT, MOST_HELD_OUT / max(1, size))
    piece = piece_size(size, share)
    wanted = [split for split in reading.held_out if split not in splits]
    held = f"{share:.2%} of it, spread over it, is held out for {' and as much for '.join(wanted)}"
    # A row that is JSON cannot be cut.
    cut = piece if reading.column is not None else None
    return Corpus(
        content_hash(digest, "held out", f"{share:.6g}"),
        lambda empty_rows: _hold_out(rows_of(empty_rows, cut), wanted, share, piece),
        [*notes, f"{name} has no validation text: {held}"],
        sources,
    )


def _split_rows(
    splits: Mapping[str, list[Source]], reading: Reading, empty_rows: Counter[str], piece: int | None
) -> Iterator[Row]:
    for split in (name for name in SPLITS if name in splits):
        empty: list[str] = []
        for source in splits[split]:
            found = False
            for text, end in _texts(source, reading, empty_rows, piece):
                found = found or bool(text)
                yield split, text, end
            if not found:
                empty.append(source.name)
        if len(empty) == len(splits[split]):
            raise ValueError(f"{empty[0]} is empty, or has only blank rows; give one with text for {split}, or remove it")
        empty_rows.update(dict.fromkeys(empty, 0))


def _texts(source: Source, reading: Reading, empty_rows: Counter[str], piece: int | None) -> Iterator[tuple[str, bool]]:
    """(text, whether it ends its row or document) of a source. White space at the end of a row is left out."""
    if not reading.by_line:
        documents = units([source], reading.column or "text", piece=piece, empty_rows=empty_rows)
        yield from ((unit.text, unit.ends) for unit in documents)
        return
    texts = _plain_rows(Path(source.name)) if source.is_plain else rows(source, reading.column, no_progress, empty_rows)
    for row in map(str.rstrip, texts):
        yield from _cut(_json(row) if reading.column is None and source.is_plain else row, piece)


def _cut(row: str, piece: int | None) -> Iterator[tuple[str, bool]]:
    """(text, whether it ends the row) of a row: a long one comes in pieces."""
    if piece is None or len(row) <= 2 * piece:
        yield row, True
    else:
        yield from ((unit.text, unit.ends) for unit in pieces(row, True, piece))


def _json(text: str) -> str:
    return json.dumps({"text": text}, ensure_ascii=False) if text.strip() else ""


def _plain_rows(path: Path) -> Iterator[str]:
    """The documents of a text file with END_OF_TEXT between them; the lines of one without."""
    if not _is_separated(path):
        yield from lines(path, no_progress)
        return
    rest = ""
    for block in text_blocks(path, no_progress):
        *documents, rest = (rest + block).split(END_OF_TEXT)
        yield from documents
    yield rest


def _is_separated(path: Path) -> bool:
    """Whether END_OF_TEXT is anywhere in a text file: its first document may be long."""
    rest = ""
    for block in text_blocks(path, no_progress):
        if END_OF_TEXT in (text := rest + block):
            return True
        rest = text[-len(END_OF_TEXT) :]
    return False


def _hold_out(stream: Iterable[Row], wanted: list[str], share: float, run_characters: int) -> Iterator[Row]:
    """The rows, with a `share` of the training text, spread evenly over it, moved to each `wanted` split; the first row stays.

    Text is moved in runs of `run_characters`, so that short rows stay with their neighbours. Where the pieces of a row go to
    several splits, it ends in each.
    """
    sizes: Counter[str] = Counter()
    run, left = "train", run_characters
    before: Row | None = None
    for split, text, end in stream:
        row = (split, text, end)
        if split == "train":
            if left <= 0:
                total = sizes.total()
                run = next((name for name in wanted if sizes[name] < share * total), "train")
                left = run_characters
            sizes[run] += len(text)
            left -= len(text)
            row = (run, text, end)
        if before:
            yield before[0], before[1], before[2] or row[0] != before[0]
        before = row
    if before:
        yield before


def _hub_corpus(dataset: str, reading: Reading, cache: Path) -> Corpus:
    name = HUB_DATASETS.get(dataset, dataset)
    entry = CacheEntry(cache / "hub" / content_hash(name, repr(reading)))
    known, notes = entry.read(), []
    try:
        opened = open_data_set(name)
    except ValueError as error:
        if known is None:
            raise ValueError(
                f"{error}; give local files (--data_dir, --train_data_path), or embedded, which needs no network "
                "(--dataset embedded, --train_data_path embedded)"
            ) from error
        notes = [f"{error}: it is taken to be as it was, at commit {known['commit'][:12]}"]
    else:
        if known is None or known["commit"] != opened.commit:
            known = _facts_of(name, opened, reading)
            entry.write({}, known)
    splits = {split: [Source(name, own)] for split, own in known["splits"].items()}

    def rows_of(empty_rows: Counter[str], piece: int | None) -> Iterator[Row]:
        return _split_rows(splits, reading, empty_rows, piece)

    digest = content_hash(repr(reading), name, known["commit"])
    return _with_validation(dataset, digest, rows_of, splits, known["size"], reading, notes)


def _facts_of(name: str, opened: HubDataSet, reading: Reading) -> dict[str, Any]:
    """Commit, splits and size of a data set of the hub. ValueError if it has no training split, or not the column."""
    splits = {split: own for own in opened.splits if (split := split_named(own))}
    if "train" not in splits or (reading.column is not None and reading.column not in opened.columns):
        raise ValueError(
            f"{name} has the splits {', '.join(opened.splits)} and the columns {', '.join(opened.columns)}: train"
            f"{f' and {reading.column} (--column)' if reading.column is not None else ''} are needed; give another --dataset"
        )
    size = opened.sizes.get(splits["train"])
    if size is None and "validation" not in splits:  # the share to hold out depends on it: all text is read to know
        training = _split_rows({"train": [Source(name, splits["train"])]}, reading, Counter(), None)
        size = sum(len(text) for _, text, _ in training)
    return {"commit": opened.commit, "splits": splits, "size": size or 0}
