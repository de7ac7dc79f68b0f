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
HELD_OUT, MOST_HELD_OUT = 0.05, 10_000_000  # of a text without a validation split: the share, and bytes of it at most
Row = tuple[str, str, bool]
"""(split, text, whether it ends a row: long ones come in pieces where a part of them is held out); blank rows too"""


@dataclass(frozen=True)
class Corpus:
    """Text with its splits, which is read when it is needed."""

    digest: str
    """hex; of all that decides the rows"""
    rows: Callable[[Counter[str]], Iterator[Row]]
    """all rows, split by split or mixed; counts rows without text, by source"""
    notes: list[str]
    """what the user should know of it"""
    sources: Sequence[Source] = ()
    """what is read; none where the text is embedded"""


@dataclass(frozen=True)
class Reading:
    """What is a row."""

    column: str | None = "text"
    """of the text; None: each row whole, as JSON: {"text": ...} for one of plain text"""
    by_line: bool = True
    """each line of a text file in which END_OF_TEXT separates nothing; else it is one document, and text is kept as it is"""
    held_out: tuple[str, ...] = ("validation", "test")
    """for which a part of the training text is taken, where there is no validation text, nor one for them"""


def find_corpus(dataset: str, inputs: Sequence[str], reading: Reading, cache: Path, validation: Sequence[str] = ()) -> Corpus:
    """The text that is meant.

    `inputs` (files, patterns, folders, data sets that `datasets` saved) win over `dataset`: wikitext2, wikitext103,
    OWNER/NAME[:CONFIGURATION] (see `open_data_set`) or embedded. `validation` takes the place of what their names
    call so. Raises ValueError or FileNotFoundError; no other text is ever substituted.
    """
    if inputs:
        return _local_corpus(inputs, validation, reading, cache)
    if dataset == "embedded":
        embedded = load_embedded(cache)
        digest = content_hash(*(row for split in SPLITS for row in (split, *embedded[split])))
        return Corpus(digest, lambda without: ((split, row, True) for split in SPLITS for row in embedded[split]), [])
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

    def rows_of(without: Counter[str], piece: int | None) -> Iterator[Row]:
        return _split_rows(splits, reading, without, piece)

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
    """The corpus of rows; of training text of `size` bytes a part is held out, where there is no validation text.

    `rows_of` takes the characters that a long row is cut at, too.
    """
    sources = [source for split in splits.values() for source in split]
    if "validation" in splits:
        return Corpus(digest, lambda without: rows_of(without, None), notes, sources)
    share = min(HELD_OUT, MOST_HELD_OUT / max(1, size))
    piece = piece_size(size, share)
    wanted = [split for split in reading.held_out if split not in splits]
    held = f"{share:.2%} of it, spread over it, is held out for {' and as much for '.join(wanted)}"
    # A row that is JSON cannot be cut.
    cut = piece if reading.column is not None else None
    return Corpus(
        content_hash(digest, "held out", f"{share:.6g}"),
        lambda without: _hold_out(rows_of(without, cut), wanted, share, piece),
        [*notes, f"{name} has no validation text: {held}"],
        sources,
    )


def _split_rows(
    splits: Mapping[str, list[Source]], reading: Reading, without: Counter[str], piece: int | None
) -> Iterator[Row]:
    for split in (name for name in SPLITS if name in splits):
        empty: list[str] = []
        for source in splits[split]:
            found = False
            for text, end in _texts(source, reading, without, piece):
                found = found or bool(text)
                yield split, text, end
            if not found:
                empty.append(source.name)
        if len(empty) == len(splits[split]):
            raise ValueError(f"{empty[0]} is empty, or has only blank rows; give one with text for {split}, or remove it")
        without.update(dict.fromkeys(empty, 0))


def _texts(source: Source, reading: Reading, without: Counter[str], piece: int | None) -> Iterator[tuple[str, bool]]:
    """(text, whether it ends a row or document) of a source. White space at the end of a row is no part of it."""
    if not reading.by_line:
        documents = units([source], reading.column or "text", piece=piece, without=without)
        yield from ((unit.text, unit.ends) for unit in documents)
        return
    for row in _plain_rows(Path(source.name)) if source.is_plain else rows(source, reading.column, no_progress, without):
        yield from _cut(_json(row.rstrip()) if reading.column is None and source.is_plain else row.rstrip(), piece)


def _cut(row: str, piece: int | None) -> Iterator[tuple[str, bool]]:
    """A row; a long one in pieces."""
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
    """The rows, with a `share` of the training text evenly over it given to each split that is `wanted`; the first stays.

    Text is held out in runs of `run_characters`, so that short rows stay with their neighbours. A row that is divided among
    splits ends in each.
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

    def rows_of(without: Counter[str], piece: int | None) -> Iterator[Row]:
        return _split_rows(splits, reading, without, piece)

    digest = content_hash(repr(reading), name, known["commit"])
    return _with_validation(dataset, digest, rows_of, splits, known["size"], reading, notes)


def _facts_of(name: str, opened: HubDataSet, reading: Reading) -> dict[str, Any]:
    """What decides the rows of a data set of the hub, beside what they hold. ValueError where it has not what is needed."""
    splits = {split: own for own in opened.splits if (split := split_named(own))}
    if "train" not in splits or (reading.column is not None and reading.column not in opened.columns):
        raise ValueError(
            f"{name} has the splits {', '.join(opened.splits)} and the columns {', '.join(opened.columns)}: train"
            f"{f' and {reading.column} (--column)' if reading.column is not None else ''} are needed; give another --dataset"
        )
    size = opened.sizes.get(splits["train"])
    if size is None and "validation" not in splits:  # of which a part is to be held out: all of it is read to know
        training = _split_rows({"train": [Source(name, splits["train"])]}, reading, Counter(), None)
        size = sum(len(text) for _, text, _ in training)
    return {"commit": opened.commit, "splits": splits, "size": size or 0}
