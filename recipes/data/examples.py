"""Rows to fine-tune on, as token ids: text, {"prompt", "completion"} or {"messages"}; packed into samples of one length.

Only what the model is to say is predicted: the completion, or an answer of the assistant; of plain text all.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from recipes.data.cache import CacheEntry, cache_folder, content_hash
from recipes.data.hub import one_line
from recipes.data.instructions import instruction_rows
from recipes.data.text import TokenSplit
from recipes.data.text_corpus import Corpus, Reading, find_corpus
from recipes.data.text_files import place_of
from recipes.data.text_sources import SPLITS
from recipes.data.tokenizer import END_OF_TEXT, train_tokenizer

if TYPE_CHECKING:
    import torch

IGNORED = -100  # a label that is not predicted: the default ignore_index of torch's cross entropy
ENCODED_TOGETHER = 1000  # examples
TRAINED_ENTRIES = 512  # of a tokenizer that is trained on the rows themselves
Example = tuple[str, str, bool]
"""(what is given, what is to be said, whether a chat template has put the special tokens there)"""


def find_rows(dataset: str, data_dir: Sequence[str]) -> Corpus:
    """The rows that are meant, each as JSON; `embedded`: questions and answers made on the spot. Errors as `find_corpus`'s."""
    if dataset == "embedded" and not data_dir:
        rows = instruction_rows()
        digest = content_hash(*(text for row in rows for text in row))
        return Corpus(digest, lambda without: ((split, row, True) for split, row in rows), [])
    return find_corpus(dataset, data_dir, Reading(column=None), cache_folder())


def load_chat_tokenizer(name: str, corpus: Corpus) -> Any:
    """transformers' tokenizer of a folder or hub name; for `train` one trained on the rows. ValueError in one line."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if name == "train":
        rows = (json.loads(row) for split, row, _ in corpus.rows(Counter()) if split == "train" and row.strip())
        texts = (text for row in rows for text in row.values() if isinstance(text, str))
        trained = train_tokenizer(texts, TRAINED_ENTRIES)
        return PreTrainedTokenizerFast(tokenizer_object=trained, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the library raises a dozen types; to the user all mean the same
        raise ValueError(
            f"no tokenizer at {name} ({one_line(error)}); give a folder with tokenizer.json by --tokenizer"
        ) from error
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        lacks = "an eos_token, which ends an example" if tokenizer.is_fast else "a tokenizer.json"
        raise ValueError(f"the tokenizer of {name} has not {lacks}; give another with --tokenizer")
    return tokenizer


def encode_rows(corpus: Corpus, tokenizer: Any, column: str) -> tuple[dict[str, TokenSplit], list[str]]:
    """({split: its examples}, notes), from the cache if the same rows were encoded before. An id that is given and not to be
    predicted is kept as -1 - id. ValueError for rows of another form."""
    known_by = (corpus.digest, tokenizer.backend_tokenizer.to_str(), str(tokenizer.chat_template), tokenizer.eos_token, column)
    entry = CacheEntry(cache_folder() / "examples" / content_hash(*known_by))
    facts = entry.read()
    if facts is None:
        facts = _write(corpus, tokenizer, column, entry)
    splits = {
        name: TokenSplit(
            np.memmap(entry.folder / f"{name}.ids", np.int32, "r"),
            np.memmap(entry.folder / f"{name}.row_ends", np.int64, "r"),
            words=0,
            fingerprint=digest,
        )
        for name, digest in facts["splits"].items()
    }
    return splits, [passed_over(count)] if (count := facts["without"]) else []


def passed_over(count: int) -> str:
    """What to say of rows that teach nothing."""
    return f"{count:,} row{'s'[: count > 1]} without text or answer passed over"


def _write(corpus: Corpus, tokenizer: Any, column: str, entry: CacheEntry) -> dict[str, Any]:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else the library warns when a process is forked later
    ids: dict[str, array[int]] = {}
    ends: dict[str, array[int]] = {}
    without: Counter[str] = Counter()
    rows = corpus.rows(without)

    def examples() -> Iterator[tuple[str, Example]]:
        for split, row, _ in rows:
            try:
                found = list(_examples_of(row, tokenizer, column)) if row.strip() else []
            except ValueError as error:
                raise ValueError(f"{place_of(row, corpus.sources)}: {error}") from error
            without["blank"] += not found and bool(row.strip())
            yield from ((split, example) for example in found)

    stream = examples()
    while chunk := list(islice(stream, ENCODED_TOGETHER)):
        encoded = _encode([example for _, example in chunk], tokenizer)
        for (split, _), one in zip(chunk, encoded, strict=True):
            ids.setdefault(split, array("i")).extend(one)
            ends.setdefault(split, array("q")).append(len(ids[split]))
    if missing := {"train", "validation"} - ids.keys():
        lost = f" ({passed_over(without.total())})" if without.total() else ""
        raise ValueError(
            f"there is nothing to learn for {' and '.join(sorted(missing))}{lost}; give more rows, or files for each"
        )
    contents = {f"{split}.ids": ids[split].tobytes() for split in ids} | {
        f"{split}.row_ends": ends[split].tobytes() for split in ids
    }
    digests = {s: hashlib.sha256(contents[f"{s}.ids"] + contents[f"{s}.row_ends"]).hexdigest() for s in SPLITS if s in ids}
    facts = {"splits": digests, "without": without.total()}
    entry.write(contents, facts)
    return facts


def _examples_of(text: str, tokenizer: Any, column: str) -> Iterator[Example]:
    """The examples of a row: each answer of a conversation is one, after all that was said before it."""
    row = json.loads(text)
    given = {key: value for key, value in row.items() if value is not None}
    if "messages" in given:
        if not _is_conversation(given["messages"]):
            raise ValueError(
                f'messages are no list of {{"role", "content"}}, with each answer\'s content: {text[:80]}; mend them'
            )
        yield from _answers(given["messages"], tokenizer)
    elif "prompt" in given and "completion" in given:
        prompt, completion = str(given["prompt"]), str(given["completion"])
        if tokenizer.chat_template:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            yield from _answers(turns, tokenizer)
        else:
            yield prompt, completion, False
    elif column in given:
        if str(given[column]).strip():
            yield "", str(given[column]), False
    elif column not in row:
        raise ValueError(f"it has {', '.join(row)}: messages, prompt and completion, or {column} (--column) are needed")


def _is_conversation(messages: Any) -> bool:
    """Whether each message has a role; and those of the assistant a content, unless they call tools."""
    return isinstance(messages, list) and all(
        isinstance(one, dict)
        and isinstance(one.get("role"), str)
        and (one["role"] != "assistant" or one.get("content") is not None or bool(one.get("tool_calls")))
        for one in messages
    )


def _answers(messages: list[dict[str, Any]], tokenizer: Any) -> Iterator[Example]:
    if not tokenizer.chat_template:
        raise ValueError(
            "messages need a chat template, and the tokenizer has none; give one that has by --tokenizer, or prompts"
        )
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or not number:  # a greeting answers nothing
            continue
        try:
            before = tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
            after = tokenizer.apply_chat_template(messages[: number + 1], tokenize=False)
        except Exception as error:  # whatever the template raises
            raise ValueError(f"the chat template refuses messages ({one_line(error)}): {str(messages)[:80]}") from error
        if not after.startswith(before):
            raise ValueError(f"the chat template does not put the answer behind what was said before: {after[:80]!r}")
        yield before, after.removeprefix(before), True


def _encode(examples: Sequence[Example], tokenizer: Any) -> Iterator[list[int]]:
    """The ids of each: -1 - id where it is given."""
    end, begin = tokenizer.eos_token_id, tokenizer.bos_token_id
    start = [begin] if begin is not None and tokenizer("a").input_ids[:1] == [begin] else []

    def ids(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False, verbose=False).input_ids

    given, said = ids([example[0] for example in examples]), ids([example[1] for example in examples])
    for (_, _, templated), before, after in zip(examples, given, said, strict=True):
        before = before if templated else start + before
        yield [-1 - token for token in before] + (after if end in after[-2:] else [*after, end])


class PackedExamples:
    """Examples side by side in rows of at most `length` inputs, or one a row; each is read as if it stood alone.

    Plain text goes on in the next piece where it is longer; another example is cut, and left out if nothing of it is left to
    predict. `cut` and `left_out` count those.
    """

    def __init__(self, split: TokenSplit, length: int, vocab_size: int, packing: bool) -> None:
        """ValueError if an id is not below `vocab_size`, or nothing is to be predicted."""
        ids, self.split, self.packing = np.asarray(split.ids), split, packing
        largest = int(np.maximum(ids, -1 - ids).max())
        if largest >= vocab_size:
            raise ValueError(
                f"token id {largest} is not below vocab_size {vocab_size} of the network; give its own --tokenizer"
            )
        ends = np.asarray(split.row_ends)
        starts = np.concatenate([[0], ends[:-1]])
        inputs = ends - starts - 1
        whole = np.minimum.reduceat(ids, starts) >= 0  # nothing is given: plain text
        pieces = np.where(whole, np.maximum(1, -(-inputs // length)), 1)
        number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # of a piece in its example
        first = np.repeat(starts, pieces) + number * length
        size = np.minimum(np.repeat(ends, pieces) - 1 - first, length)
        said = np.concatenate([[0], np.cumsum(ids >= 0)])
        kept = said[first + size + 1] > said[first + 1]
        self.cut, self.left_out = int(((inputs > length) & ~whole).sum()), int((~kept).sum())
        self.first, self.size = first[kept], size[kept]
        if not len(self.first):
            raise ValueError(f"nothing is left to predict within max_length {length}; raise it")
        self.rows = _packed(self.size, length) if packing else np.arange(len(self.first) + 1)

    def __len__(self) -> int:
        return len(self.rows) - 1

    @property
    def ids(self) -> np.ndarray:
        """Of all examples; the split keeps them, and sends their file to data workers, not their content."""
        assert isinstance(self.split.ids, np.ndarray)
        return self.split.ids

    def __getitems__(self, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        """Samples -> batch, int64 [batch, time] each, time that of the longest row: input_ids, labels (the ids one further, or
        IGNORED) and, where examples are packed, position_ids, which start at 0 with each; padding goes on with the last one's.
        """
        import torch

        rows = np.asarray(numbers, dtype=np.int64) % len(self)
        used = [int(self.size[self.rows[row] : self.rows[row + 1]].sum()) for row in rows]
        batch = {name: np.full((len(rows), max(used)), IGNORED) for name in ("input_ids", "labels", "position_ids")}
        for place, row in enumerate(rows):
            at = 0
            for piece in range(self.rows[row], self.rows[row + 1]):
                first, size = self.first[piece], self.size[piece]
                ids = np.asarray(self.ids[first : first + size + 1], dtype=np.int64)
                batch["input_ids"][place, at : at + size] = np.maximum(ids[:-1], -1 - ids[:-1])
                batch["labels"][place, at : at + size] = np.where(ids[1:] >= 0, ids[1:], IGNORED)
                batch["position_ids"][place, at:] = np.arange(max(used) - at)
                at += size
            batch["input_ids"][place, at:] = 0
        if not self.packing:
            del batch["position_ids"]
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    def predicted(self) -> tuple[np.ndarray, np.ndarray]:
        """(the ids of all examples end to end, int64; which of them are predicted where none was cut, bool): [ids] each."""
        ids = np.asarray(self.ids, dtype=np.int64)
        mask = ids >= 0
        mask[np.concatenate([[0], self.split.row_ends[:-1]])] = False
        return np.maximum(ids, -1 - ids), mask

    def text_of(self, example: int) -> tuple[list[int], list[int]]:
        """(what is given, what is to be said) of an example, as ids. Of plain text the first quarter is taken as given."""
        start = self.split.row_ends[example - 1] if example else 0
        ids = np.asarray(self.ids[start : self.split.row_ends[example]])
        given = int((ids < 0).sum()) or max(1, len(ids) // 4)
        return np.where(ids < 0, -1 - ids, ids)[:given].tolist(), ids[given:].tolist()


def _packed(sizes: np.ndarray, length: int) -> np.ndarray:
    """Borders of rows: as many pieces, in their order, as fit into each. int64 [rows + 1]."""
    borders, used = [0], 0
    for piece, size in enumerate(sizes.tolist()):
        if used + size > length:
            borders.append(piece)
            used = 0
        used += size
    return np.array([*borders, len(sizes)])
