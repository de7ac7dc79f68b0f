"""Ids that were prepared, in place of text: for a recipe whose samples are rows or blocks of a tokenized text."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from recipes.data.text import Text, TokenSplit
from recipes.data.text_sources import split_named
from recipes.data.token_files import TokenFile
from recipes.data.tokenizer import end_of_text_id, existing_tokenizer, vocabulary_size


def holds_ids(data_dir: str) -> bool:
    """Whether a folder is one of prepared ids, as tools/prepare_text.py leaves it."""
    return any(Path(data_dir).glob("*.ids"))


def text_of_ids(folder: str, tokenizer_path: str, by_rows: bool) -> Text:
    """The ids of train.ids, valid.ids and, if it is there, test.ids, with the tokenizer.json beside them.

    A `tokenizer_path` (not a name: gpt2, train) must be of the same one. `by_rows`: end-of-text ends a row, which is found by
    reading all ids; else they are one row. ValueError or OSError, in one line.
    """
    tokenizer = existing_tokenizer(str(Path(folder) / "tokenizer.json"))
    if tokenizer_path not in ("gpt2", "train") and existing_tokenizer(tokenizer_path).to_str() != tokenizer.to_str():
        raise ValueError(f"tokenizer {tokenizer_path} is not the one that made the ids of {folder}; leave it out")
    vocab_size, end_of_text = vocabulary_size(tokenizer), end_of_text_id(tokenizer)
    paths = {split_named(path.name): path for path in sorted(Path(folder).glob("*.ids"))}
    for split in ("train", "validation"):
        if split not in paths:
            raise FileNotFoundError(f"{folder} has no .ids file for {split}; make it again with tools/prepare_text.py")
    splits = {}
    for split in ("train", "validation", "test"):
        if split in paths:
            file = TokenFile.open(paths[split], vocab_size)
            digest = file.check(vocab_size)
            ids = file.ids()
            row_ends = np.flatnonzero(ids == end_of_text) + 1 if by_rows else np.array([len(ids)])
            splits[split] = TokenSplit(ids, row_ends, words=0, fingerprint=digest, largest_id=file.facts().largest_id)
    return Text(tokenizer.to_str(), vocab_size, end_of_text, splits)
