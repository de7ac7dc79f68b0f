"""Training and validation ids of a language model on windows: from files of ids, or from text that is tokenized here."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from recipes.data.remote import is_url
from recipes.data.text import Text, prepare_text
from recipes.data.text_corpus import Reading
from recipes.data.text_sources import is_hub_name, is_text
from recipes.data.token_files import TokenFile, head_of, holds_numbers
from recipes.data.token_sets import Mixture, TokenSet, Weighted, check_tokenizer, find_files, overlap
from recipes.data.tokenizer import existing_tokenizer, vocabulary_size

EMBEDDED = "embedded"
PADDED_TO = 128  # vocab_size is often rounded up to a multiple of it; only more unused entries are worth a note


@dataclass(frozen=True)
class Streams:
    """Training and validation ids, and their tokenizer."""

    train: Mixture
    validation: Mixture
    tokenizer_json: str | None
    fingerprint: str
    """hex; of the ids of each file, however they are stored, and of the shares"""
    notes: tuple[str, ...]
    """for the user"""

    def end_of_text(self) -> int:
        """The id that ends a document. ValueError if there is no tokenizer to ask for it."""
        if self.tokenizer_json is None:
            raise ValueError("document_mask needs the id of <|endoftext|>; give the --tokenizer that made the ids")
        return Text.without_data(self.tokenizer_json).end_of_text


def open_streams(
    train: Sequence[Weighted],
    validation: Sequence[Weighted],
    tokenizer: str | None,
    vocab_size: int,
    length: int,
    column: str = "text",
) -> Streams:
    """Open and check all ids, for windows of `length` inputs.

    Sets with weights are a mixture; several without are one set, end to end. Ids of text are kept in the cache; text without
    `validation`, and `embedded` (the text that comes with Python), is split into both parts.

    `tokenizer`: a folder or tokenizer.json; None: the one beside the first ids of `train`, if there is one; for text, one
    that is trained on it. ValueError or OSError, in one line.
    """
    if _are_text(train, validation):
        paths, others = ([path for path, _ in sources] for sources in (train, validation))
        return _of_text(paths, others, tokenizer, vocab_size, length, column)
    both = (_mixture(train, vocab_size, one_set=True), _mixture(validation, vocab_size, one_set=False))
    tokenizer_json = _tokenizer(tokenizer, [file for mixture in both for file in mixture.whole.files], vocab_size)
    return _checked(both[0], both[1], tokenizer_json, length, vocab_size, overlap(both[0].whole, both[1].whole))


def _are_text(train: Sequence[Weighted], validation: Sequence[Weighted]) -> bool:
    """Whether all sources are text; False: all are ids. ValueError where some are missing, or do not go together."""
    if not train:
        raise ValueError(
            "train_data_path is missing: give --train_data_path FILE.ids (tools/prepare_text.py of samecurve's source "
            "repository makes one), text, or --train_data_path embedded"
        )
    paths, others = ([path for path, _ in sources] for sources in (train, validation))
    if EMBEDDED in (*paths, *others) and (len(paths) > 1 or EMBEDDED not in paths or others not in ([], [EMBEDDED])):
        raise ValueError("`embedded` has its own tokens for training and validation; give it alone, as --train_data_path")
    texts = [path for path in (*paths, *others) if path == EMBEDDED or _is_text(path)]
    ids = [path for path in (*paths, *others) if path not in texts]
    weighted = [path for path, weight in (*train, *validation) if weight is not None]
    if texts and ids:
        raise ValueError(
            f"{texts[0]} is text and {ids[0]} is not; make ids of it with the same tokenizer (tools/prepare_text.py)"
        )
    if texts and weighted:
        raise ValueError(f"{weighted[0]} is text with a weight; make ids of each part of a mixture (tools/prepare_text.py)")
    if ids and not validation:
        raise ValueError("val_data_path is missing: give --val_data_path FILE.ids; or --train_data_path text or embedded")
    return bool(texts)


def _is_text(path: str) -> bool:
    """Whether a path is of text. Numbers written as text count as ids, and are refused as such later."""
    return is_text(path) and not (Path(path).is_file() and holds_numbers(head_of(Path(path))))


def _of_text(paths: list[str], others: list[str], tokenizer: str | None, vocab_size: int, length: int, column: str) -> Streams:
    dataset, inputs = (paths[0], []) if len(paths) == 1 and (paths[0] == EMBEDDED or is_hub_name(paths[0])) else ("", paths)
    if dataset and others not in ([], paths):
        raise ValueError(
            f"{dataset} has its own validation text; leave out val_data_path, or make ids with tools/prepare_text.py"
        )
    reading = Reading(column, by_line=False, held_out=("validation",))
    text = prepare_text(dataset, inputs, tokenizer or "train", vocab_size, None, reading, [] if dataset else others)
    if text.vocab_size > vocab_size:
        way_out = f"give --vocab_size {text.vocab_size}"
        raise ValueError(f"tokenizer {tokenizer} has {text.vocab_size} entries, vocab_size is {vocab_size}; {way_out}")
    names = {"train": ", ".join(paths), "validation": ", ".join(others) or f"validation text of {paths[0]}"}
    files = {split: ids.files for split in names if isinstance(ids := text.splits[split].ids, TokenSet)}
    train, validation = (Mixture((TokenSet(name, files[split], vocab_size),), (1.0,)) for split, name in names.items())
    return _checked(train, validation, text.tokenizer_json, length, vocab_size, text.notes)


def _mixture(sources: Sequence[Weighted], vocab_size: int, one_set: bool) -> Mixture:
    """The sets of the sources as a mixture. `one_set`: if none has a weight they are one set, as an unquoted pattern gives."""
    sets = tuple(find_files(path, vocab_size) for path, _ in sources)
    if one_set and all(weight is None for _, weight in sources):
        return Mixture((Mixture(sets, (1.0,)).whole,), (1.0,))
    return Mixture.of(sets, sources)


def _checked(
    train: Mixture, validation: Mixture, tokenizer_json: str | None, length: int, vocab_size: int, notes: Sequence[str]
) -> Streams:
    digests = [*train.digests(length + 1), *validation.digests(length + 1)]
    sizes = [f"{name} data size: {part.count:,} tokens" for name, part in (("Train", train), ("Validation", validation))]
    entries = Text.without_data(tokenizer_json).vocab_size if tokenizer_json else vocab_size
    unused = [f"vocab_size {vocab_size}: the tokenizer has {entries} entries alone; --vocab_size {entries} would do"]
    said = (*sizes, *train.notes, *notes, *(unused if vocab_size - entries >= PADDED_TO else []))
    fingerprint = hashlib.sha256("\n".join(digests).encode()).hexdigest()
    return Streams(train, validation, tokenizer_json, fingerprint, said)


def _tokenizer(tokenizer: str | None, files: Sequence[TokenFile], vocab_size: int) -> str | None:
    """The tokenizer of ids: the given one, or the one beside the first file. ValueError if another one made the ids."""
    if tokenizer is None:
        tokenizer = _tokenizer_beside(files[0])
    if tokenizer is None:
        return None
    encoder = existing_tokenizer(tokenizer)
    if (entries := vocabulary_size(encoder)) > vocab_size:
        ways_out = f"give --vocab_size {entries}, or the --tokenizer that made the ids"
        raise ValueError(f"tokenizer {tokenizer} has {entries} entries, vocab_size is {vocab_size}; {ways_out}")
    check_tokenizer(tokenizer, encoder.to_str(), files)
    return encoder.to_str()


def _tokenizer_beside(file: TokenFile) -> str | None:
    """tokenizer.json in the folder of a file; or in the folder above, as for shards, if the file's .json has its hash."""
    if is_url(file.name):
        return None
    beside, above = (folder / "tokenizer.json" for folder in list(file.path.absolute().parents)[:2])
    if beside.is_file():
        return str(beside)
    made_by = file.sidecar.get("tokenizer_sha256")
    return str(above) if above.is_file() and hashlib.sha256(above.read_bytes()).hexdigest() == made_by else None
