"""Ids that were prepared, in place of text: for a recipe whose samples are rows or blocks of a tokenized text."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from recipes.data.text import Text, TokenSplit
from recipes.data.text_sources import SPLITS, split_named
from recipes.data.token_sets import find_files
from recipes.data.tokenizer import end_of_text_id, existing_tokenizer, vocabulary_size


def holds_ids(data_dir: str) -> bool:
    """Whether a folder is one of prepared ids, as tools/prepare_text.py leaves it."""
    return bool(_sets(Path(data_dir)))


def _sets(folder: Path) -> list[Path]:
    """The files of ids in a folder, and the folders in it that hold shards."""
    return sorted({*folder.glob("*.ids"), *(shard.parent for shard in folder.glob("*/*.ids"))})


def text_of_ids(folder: str, tokenizer_path: str, by_rows: bool) -> Text:
    """The ids of train.ids, valid.ids and, if it is there, test.ids, or of shards in folders of these names, with the
    tokenizer.json beside them.

    A `tokenizer_path` (not a name: gpt2, train) must be of the same one. `by_rows`: end-of-text ends a row, which is found by
    reading all ids; else they are one row. ValueError or OSError, in one line.
    """
    tokenizer = existing_tokenizer(str(Path(folder) / "tokenizer.json"))
    if tokenizer_path not in ("gpt2", "train") and existing_tokenizer(tokenizer_path).to_str() != tokenizer.to_str():
        raise ValueError(f"tokenizer {tokenizer_path} is not the one that made the ids of {folder}; leave it out")
    vocab_size, end_of_text = vocabulary_size(tokenizer), end_of_text_id(tokenizer)
    paths = {split_named(path.name): path for path in _sets(Path(folder))}
    for split in ("train", "validation"):
        if split not in paths:
            raise FileNotFoundError(f"{folder} has no .ids file for {split}; make it again with tools/prepare_text.py")
    splits = {}
    for split in SPLITS:
        if split in paths:
            ids = find_files(str(paths[split]), vocab_size)
            digest, largest = ids.digest(), max(file.facts().largest_id for file in ids.files)
            row_ends = np.array([len(ids)])
            if by_rows:
                ends = [np.flatnonzero(file.ids() == end_of_text) for file in ids.files]
                row_ends = np.concatenate(
                    [1 + end - file.count + own for end, file, own in zip(ids.ends, ids.files, ends, strict=True)]
                )
            splits[split] = TokenSplit(ids, row_ends, words=0, fingerprint=digest, largest_id=largest)
    return Text(tokenizer.to_str(), vocab_size, end_of_text, splits)
