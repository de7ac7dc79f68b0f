"""Ids that were prepared, in place of text: for a recipe whose samples are rows or blocks of a tokenized text."""

from __future__ import annotations

import glob
import os
from pathlib import Path

import numpy as np

from recipes.data.text import Text, TokenSplit
from recipes.data.text_sources import SPLITS, Source, split_of
from recipes.data.token_sets import check_tokenizer, local_set, overlap
from recipes.data.tokenizer import GPT2_VOCAB_SIZE, end_of_text_id, existing_tokenizer, vocabulary_size


def holds_ids(data_dir: str) -> bool:
    """Whether a folder or a pattern has prepared ids, as tools/prepare_text.py leaves them: not a folder of text with ids of it
    somewhere below."""
    folder = Path(data_dir)
    if folder.is_dir() and not (folder / "tokenizer.json").is_file() and not any(folder.glob("*.ids")):
        return False
    return bool(_files(data_dir))


def _files(data_dir: str) -> list[Path]:
    """The files of ids in a folder and below, or those that a pattern matches."""
    folder = Path(data_dir)
    found = folder.rglob("*.ids") if folder.is_dir() else map(Path, glob.glob(data_dir, recursive=True))
    return sorted(path for path in found if path.suffix == ".ids")


def text_of_ids(data_dir: str, tokenizer_path: str, by_rows: bool) -> Text:
    """The ids of files whose names, or whose folders', tell the split (train.ids, valid/00000.ids), with the tokenizer.json
    beside them.

    That must have made them; so must a `tokenizer_path` (a name, gpt2 or train, is for text). `by_rows`: end-of-text ends a
    row, which is found by reading all ids; else they are one row. ValueError or OSError, in one line.
    """
    files = _files(data_dir)
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
