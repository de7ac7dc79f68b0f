"""The text that a language model is trained on, as rows of train, validation and test: local, from the hub, or embedded."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from recipes.data.cache import content_hash, file_hash, remembered
from recipes.data.documents import piece_size
from recipes.data.embedded import load_embedded
from recipes.data.hub import hub_is_reachable, one_line
from recipes.data.text_files import cell, lines, no_progress, rows, text_blocks
from recipes.data.text_sources import SPLITS, Source, find_splits, split_named
from recipes.data.tokenizer import END_OF_TEXT

HUB_WIKITEXT = "Salesforce/wikitext"
HUB_DATASETS = {"wikitext2": (HUB_WIKITEXT, "wikitext-2-raw-v1"), "wikitext103": (HUB_WIKITEXT, "wikitext-103-raw-v1")}
HELD_OUT, MOST_HELD_OUT = 0.05, 10_000_000  # of a text without a validation split: the share, and bytes of it at most
Row = tuple[str, str]
"""(split, row), blank rows too"""


@dataclass(frozen=True)
class Corpus:
    """Text with its splits, which is read when it is needed."""

    digest: str
    """hex; of all that decides the rows"""
    rows: Callable[[Counter[str]], Iterator[Row]]
    """all rows, split by split or mixed; counts rows without text, by source"""
    notes: list[str]
    """what the user should know of it"""


def find_corpus(dataset: str, data_dir: str | None, column: str | None, cache: Path) -> Corpus:
    """The text that is meant; with `column` None each row whole, as JSON: {"text": ...} for one of plain text.

    `data_dir` (a file, a pattern, a folder, a data set that `datasets` saved) wins over `dataset`: wikitext2, wikitext103,
    OWNER/NAME[:CONFIGURATION] (from the hub or its local cache) or embedded. Raises ValueError or FileNotFoundError; no other
    text is ever substituted.
    """
    if data_dir:
        return _local_corpus(data_dir, column, cache)
    if dataset == "embedded":
        embedded = load_embedded(cache)
        digest = content_hash(*(row for split in SPLITS for row in (split, *embedded[split])))
        return Corpus(digest, lambda without: ((split, row) for split in SPLITS for row in embedded[split]), [])
    if dataset in HUB_DATASETS or "/" in dataset:
        return _hub_corpus(dataset, column)
    raise ValueError(
        f"dataset {dataset!r} is unknown; use {', '.join(HUB_DATASETS)}, embedded, OWNER/NAME of the hub, or --data_dir PATH"
    )


def _local_corpus(data_dir: str, column: str | None, cache: Path) -> Corpus:
    splits, notes = find_splits(data_dir)
    sources = [source for split in splits.values() for source in split]
    kinds = [f"{name} {source.split or source.kind}" for name, split in splits.items() for source in split]
    digest = content_hash(column or "", *kinds, *(_digest(path, cache) for source in sources for path in _files(source)))
    if "validation" in splits:
        return Corpus(digest, lambda without: _split_rows(splits, column, without), notes)
    size = sum(source.size_bytes or 0 for source in splits["train"])
    share = min(HELD_OUT, MOST_HELD_OUT / max(1, size))
    wanted = [split for split in ("validation", "test") if split not in splits]
    held = f"{share:.2%} of it, spread over it, is held out for each of {' and '.join(wanted)}"

    def held_out(without: Counter[str]) -> Iterator[Row]:
        return _hold_out(_split_rows(splits, column, without), wanted, share, piece_size(size, share))

    return Corpus(
        content_hash(digest, "held out", f"{share:.6g}"), held_out, [*notes, f"{data_dir} has no validation text: {held}"]
    )


def _files(source: Source) -> list[Path]:
    return sorted(Path(source.name).rglob("*.arrow")) if source.split else [Path(source.name)]


def _digest(path: Path, cache: Path) -> str:
    return remembered(path, "sha256", lambda: {"sha256": file_hash(path)}, cache)["sha256"]


def _split_rows(splits: dict[str, list[Source]], column: str | None, without: Counter[str]) -> Iterator[Row]:
    for split in SPLITS:
        for source in splits.get(split, ()):
            found = False
            for row in _plain_rows(Path(source.name)) if source.is_plain else rows(source, column, no_progress, without):
                found = found or not (row.isspace() or not row)
                yield split, row if column is not None or not source.is_plain else _json(row)
            if not found:
                raise ValueError(f"{source.name} is empty, or has only blank rows; give one with text, or remove it")


def _json(text: str) -> str:
    return json.dumps({"text": text}, ensure_ascii=False) if text.strip() else ""


def _plain_rows(path: Path) -> Iterator[str]:
    """The documents of a text file with END_OF_TEXT between them; the lines of one without, less white space at their ends."""
    if END_OF_TEXT not in next(text_blocks(path, no_progress)):
        yield from (line.rstrip() for line in lines(path, no_progress))
        return
    rest = ""
    for block in text_blocks(path, no_progress):
        *documents, rest = (rest + block).split(END_OF_TEXT)
        yield from documents
    yield rest


def _hold_out(stream: Iterable[Row], wanted: list[str], share: float, run_characters: int) -> Iterator[Row]:
    """The rows, with a `share` of the training text evenly over it given to each split that is `wanted`; the first stays.

    Rows are held out in runs of `run_characters`, so that short ones stay with their neighbours.
    """
    sizes: Counter[str] = Counter()
    run, left = "train", run_characters
    for split, row in stream:
        if split != "train":
            yield split, row
            continue
        if left <= 0:
            total = sizes.total()
            run = next((name for name in wanted if sizes[name] < share * total), "train")
            left = run_characters
        sizes[run] += len(row)
        left -= len(row)
        yield run, row


def _hub_corpus(dataset: str, column: str | None) -> Corpus:
    import datasets

    repository, _, configuration = dataset.partition(":")
    names = HUB_DATASETS.get(dataset, (repository, configuration or None))
    config_offline = datasets.config.HF_HUB_OFFLINE
    try:
        # Without this a machine with no network retries for half a minute or more before it reads its own cache.
        datasets.config.HF_HUB_OFFLINE = config_offline or not hub_is_reachable()
        data = datasets.load_dataset(*names)
        splits = {split: data[name] for name in data if (split := split_named(name))}
        columns = next(iter(data.values())).column_names
        if not {"train", "validation"} <= splits.keys() or (column is not None and column not in columns):
            raise ValueError(
                f"it has the splits {', '.join(data)} and the columns {', '.join(columns)}: train, validation"
                f"{f', {column}' if column is not None else ''} are needed"
            )
    except Exception as error:  # the library raises a dozen types; to the user all mean the same
        raise ValueError(
            f"cannot load --dataset {dataset} from the hub ({one_line(error)}); "
            "give local files with --data_dir PATH, or use --dataset embedded, which needs no network"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = config_offline

    def all_rows(without: Counter[str]) -> Iterator[Row]:
        for split in SPLITS:
            for row in splits.get(split, ()):
                text = cell(row, column)
                if text is None:
                    without[dataset] += 1
                else:
                    yield split, text.rstrip()

    return Corpus(content_hash(column or "", *(f"{name} {splits[name]._fingerprint}" for name in sorted(splits))), all_rows, [])
