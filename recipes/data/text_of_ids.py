"""Prepared ids in place of text, for a recipe whose samples are rows or blocks of a tokenized text."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from recipes.data.remote import is_url
from recipes.data.text import Text, TokenSplit, prepare_text
from recipes.data.text_corpus import Reading
from recipes.data.text_sources import SPLITS, Source, split_of
from recipes.data.token_sets import Mixture, TokenSet, Weighted, check_tokenizer, local_set, overlap
from recipes.data.tokenizer import GPT2_VOCAB_SIZE, end_of_text_id, existing_tokenizer, vocabulary_size


def holds_ids(data_dir: str) -> bool:
    """Whether a folder or a pattern has ids as tools/prepare_text.py writes them, not text with some ids further below."""
    folder = Path(data_dir)
    if folder.is_dir() and not (folder / "tokenizer.json").is_file() and not any(folder.glob("*.ids")):
        return False
    return bool(_files(data_dir))


def _files(data_dir: str) -> list[Path]:
    """The files of ids in a folder and below, or those that a pattern matches."""
    folder = Path(data_dir)
    found = folder.rglob("*.ids") if folder.is_dir() else map(Path, glob.glob(data_dir, recursive=True))
    return sorted(path for path in found if path.suffix == ".ids")


def text_or_ids(dataset: str, sources: Sequence[Weighted], tokenizer: str, vocab_size: int, column: str, by_rows: bool) -> Text:
    """The sources, as `text_of_all_ids` or `prepare_text` reads them; without any, the data set. Errors as of those."""
    paths = [path for path, _ in sources]
    if urls := [*filter(is_url, paths)]:
        raise ValueError(f"{urls[0]} is a URL, and data_dir takes what is here; copy it, or train tinystories_lm on its ids")
    if any(map(holds_ids, paths)):
        return text_of_all_ids(sources, tokenizer, by_rows)
    if weighted := [path for path, weight in sources if weight is not None]:
        raise ValueError(f"{weighted[0]} is text with a weight; make ids of each part of a mixture (tools/prepare_text.py)")
    return prepare_text(dataset, paths, tokenizer, vocab_size, reading=Reading(column))


def text_of_all_ids(sources: Sequence[Weighted], tokenizer_path: str, by_rows: bool) -> Text:
    """`text_of_ids` of each source, end to end. With weights, training samples are drawn from a mixture of them, and each has
    its validation split too. ValueError or OSError, in one line."""
    texts = [text_of_ids(path, tokenizer_path, by_rows) for path, _ in sources]
    if len(texts) == 1:
        return texts[0]
    first, paths = texts[0], [path for path, _ in sources]
    for path, text in zip(paths, texts, strict=True):
        if text.tokenizer_json != first.tokenizer_json:
            raise ValueError(f"{path} is of another tokenizer than {paths[0]}; make the ids of both with one")
    parts = {split: [text.splits[split] for text in texts if split in text.splits] for split in SPLITS}
    splits = {split: _end_to_end(of_split) for split, of_split in parts.items() if of_split}
    train, validation = (
        Mixture.of([_ids(part, path) for part, path in zip(parts[split], paths, strict=True)], sources)
        for split in ("train", "validation")
    )
    notes = [*(note for text in texts for note in text.notes), *overlap(train.whole, validation.whole)]
    if all(weight is None for _, weight in sources):
        return replace(first, splits=splits, notes=tuple(dict.fromkeys(notes)))
    splits |= {f"validation_{label}": part for label, part in zip(train.labels, parts["validation"], strict=True)}
    return replace(first, splits=splits, notes=tuple(dict.fromkeys([*train.notes, *notes])), mixture=train)


def _ids(split: TokenSplit, name: str = "") -> TokenSet:
    assert isinstance(split.ids, TokenSet)
    return replace(split.ids, name=name or split.ids.name)


def _end_to_end(parts: Sequence[TokenSplit]) -> TokenSplit:
    ids = Mixture(tuple(map(_ids, parts)), (1.0,)).whole
    begins = np.cumsum([0, *(len(part.ids) for part in parts)])
    row_ends = np.concatenate([begin + part.row_ends for begin, part in zip(begins[:-1], parts, strict=True)])
    return TokenSplit(ids, row_ends, 0, ids.digest(), max(part.largest_id or 0 for part in parts))


def text_of_ids(data_dir: str, tokenizer_path: str, by_rows: bool) -> Text:
    """The ids of files whose name or folder tells the split (train.ids, valid/00000.ids), with the tokenizer.json beside them.

    That tokenizer must have made the ids; a `tokenizer_path` must be the same one, but `gpt2` and `train` are for text.
    `by_rows`: rows end with end-of-text, found by reading all ids; else a split is one row. ValueError or OSError, in one line.
    """
    if not (files := _files(data_dir)):
        raise FileNotFoundError(f"{data_dir} has no .ids files, and what is beside it in data_dir has; make ids of it")
    root = Path(os.path.commonpath([data_dir if Path(data_dir).is_dir() else path.parent for path in files])).absolute()
    if not (beside := root / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{root} has no tokenizer.json beside its ids; copy the one that made them there")
    tokenizer = existing_tokenizer(str(beside))
    if tokenizer_path not in ("gpt2", "train") and existing_tokenizer(tokenizer_path).to_str() != tokenizer.to_str():
        raise ValueError(f"tokenizer {tokenizer_path} is not the one that made the ids of {data_dir}; leave it out")
    vocab_size, end_of_text = vocabulary_size(tokenizer), end_of_text_id(tokenizer)
    paths: dict[str, list[Path]] = {}
    for path in files:
        paths.setdefault(split_of(Source(str(path)), root) or "no split", []).append(path)
    for split in ("train", "validation"):
        if split not in paths:
            raise FileNotFoundError(f"{data_dir} has no .ids file for {split}; make it again with tools/prepare_text.py")
    sets = {split: local_set(f"{data_dir}, {split}", paths[split], vocab_size) for split in SPLITS if split in paths}
    splits = {}
    for split, ids in sets.items():
        check_tokenizer(str(beside), tokenizer.to_str(), ids.files)
        largest = max(file.facts.largest_id for file in ids.files)
        row_ends = np.array([len(ids)])
        if by_rows:
            ends = [np.flatnonzero(file.ids() == end_of_text) for file in ids.files]
            found = [1 + end - file.count + own for end, file, own in zip(ids.ends, ids.files, ends, strict=True)]
            row_ends = np.union1d(np.concatenate(found), row_ends)  # the last row may lack its end-of-text
        splits[split] = TokenSplit(ids, row_ends, words=0, fingerprint=ids.digest(), largest_id=largest)
    left_out = [f"{data_dir}: left out {len(paths['no split'])} .ids whose names tell no split"] if "no split" in paths else []
    if tokenizer_path == "train" or (tokenizer_path == "gpt2" and vocab_size != GPT2_VOCAB_SIZE):
        left_out.append(f"{beside}, of {vocab_size:,} entries, is the tokenizer: --tokenizer {tokenizer_path} is for text")
    notes = [*left_out, *overlap(sets["train"], sets["validation"])]
    return Text(tokenizer.to_str(), vocab_size, end_of_text, splits, tuple(notes))
