"""Rows to fine-tune on, as token ids: text, {"prompt", "completion"} or {"messages"}; packed into samples of one length.

Only the completion, or the assistant's answer, is predicted; of plain text every token is.
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
from recipes.data.token_samples import IGNORED
from recipes.data.tokenizer import END_OF_TEXT, train_tokenizer

if TYPE_CHECKING:
    import torch

ENCODED_TOGETHER = 1000  # examples
TRAINED_ENTRIES = 512  # of a tokenizer that is trained on the rows themselves
Example = tuple[str, str, bool]
"""(prompt, completion, whether a chat template has added the special tokens)"""


def find_rows(dataset: str, data_dir: Sequence[str]) -> Corpus:
    """The rows of files or a data set, each as JSON; `embedded`: made-up questions. Errors as of `find_corpus`."""
    if dataset == "embedded" and not data_dir:
        rows = instruction_rows()
        digest = content_hash(*(text for row in rows for text in row))
        return Corpus(digest, lambda empty_rows: ((split, row, True) for split, row in rows), [])
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
    """({split: its examples}, notes), from the cache if the same rows were encoded before. An id of a prompt, which is not to
    be predicted, is stored as -1 - id. ValueError for rows of another form."""
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
    return splits, [passed_over(facts["without"])] if facts["without"] else []


def passed_over(count: int) -> str:
    """The note about rows without anything to learn."""
    return f"{count:,} {'rows' if count > 1 else 'row'} without text or answer passed over"


def _write(corpus: Corpus, tokenizer: Any, column: str, entry: CacheEntry) -> dict[str, Any]:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else the library warns when a process is forked later
    ids: dict[str, array[int]] = {}
    ends: dict[str, array[int]] = {}
    empty_rows: Counter[str] = Counter()
    rows = corpus.rows(empty_rows)

    def examples() -> Iterator[tuple[str, Example]]:
        for split, row, _ in rows:
            try:
                found = list(_examples_of(row, tokenizer, column)) if row.strip() else []
            except ValueError as error:
                raise ValueError(f"{place_of(row, corpus.sources)}: {error}") from error
            if row.strip() and not found:
                empty_rows["blank"] += 1
            yield from ((split, example) for example in found)

    stream = examples()
    while chunk := list(islice(stream, ENCODED_TOGETHER)):
        encoded = _encode([example for _, example in chunk], tokenizer)
        for (split, _), example_ids in zip(chunk, encoded, strict=True):
            ids.setdefault(split, array("i")).extend(example_ids)
            ends.setdefault(split, array("q")).append(len(ids[split]))
    if missing := {"train", "validation"} - ids.keys():
        lost = f" ({passed_over(empty_rows.total())})" if empty_rows.total() else ""
        raise ValueError(
            f"there is nothing to learn for {' and '.join(sorted(missing))}{lost}; give more rows, or files for each"
        )
    contents = {f"{split}.ids": ids[split].tobytes() for split in ids} | {
        f"{split}.row_ends": ends[split].tobytes() for split in ids
    }
    digests = {s: hashlib.sha256(contents[f"{s}.ids"] + contents[f"{s}.row_ends"]).hexdigest() for s in SPLITS if s in ids}
    facts = {"splits": digests, "without": empty_rows.total()}
    entry.write(contents, facts)
    return facts


def _examples_of(text: str, tokenizer: Any, column: str) -> Iterator[Example]:
    """The examples of a row. In a conversation each answer is one, with all messages before it as its prompt."""
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
    """Whether each message has a role, and each of the assistant a content, unless it calls tools."""
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
    """The ids of each example: -1 - id in its prompt."""
    end, begin = tokenizer.eos_token_id, tokenizer.bos_token_id
    start = [begin] if begin is not None and tokenizer("a").input_ids[:1] == [begin] else []

    def ids(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=False, verbose=False).input_ids

    prompts, completions = ids([example[0] for example in examples]), ids([example[1] for example in examples])
    for (_, _, templated), prompt, completion in zip(examples, prompts, completions, strict=True):
        prompt = prompt if templated else start + prompt
        # A template may end an answer itself, perhaps with a line end behind.
        yield [-1 - token for token in prompt] + (completion if end in completion[-2:] else [*completion, end])


class PackedExamples:
    """Examples side by side in rows of at most `length` inputs, or one a row; each is read as if it stood alone.

    Longer plain text is divided into several pieces. Other examples are cut at `length`, and left out if that leaves nothing to
    predict; `cut` and `left_out` count them.
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
        plain = np.minimum.reduceat(ids, starts) >= 0  # it has no prompt
        used = np.where(plain, inputs, np.minimum(inputs, length))
        example, offset = _pieces(used, length)
        first, size = starts[example] + offset, np.minimum(used[example] - offset, length)
        predicted_before = np.concatenate([[0], np.cumsum(ids >= 0)])  # each place
        kept = predicted_before[first + 1 + size] > predicted_before[first + 1]
        self.cut, self.left_out = int((used < inputs).sum()), int((~kept).sum())
        self.first, self.size = first[kept], size[kept]
        if not len(self.first):
            raise ValueError(f"nothing is left to predict within max_length {length}; raise it")
        self.rows = _packed(self.size, length) if packing else np.arange(len(self.first) + 1)

    def __len__(self) -> int:
        return len(self.rows) - 1

    @property
    def ids(self) -> np.ndarray:
        """The ids of all examples. They stay in the split, which is pickled for data workers by its file, not its content."""
        assert isinstance(self.split.ids, np.ndarray)
        return self.split.ids

    def __getitems__(self, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        """Samples -> batch, int64 [batch, time of the longest row]: input_ids, labels (the ids one further, or IGNORED) and,
        where examples are packed, position_ids, which restart at 0 with each example and count on through the padding.
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
        """(the ids of all examples end to end, int64; whether each is predicted if no example is cut, bool): [ids] each."""
        ids = np.asarray(self.ids, dtype=np.int64)
        mask = ids >= 0
        mask[np.concatenate([[0], self.split.row_ends[:-1]])] = False
        return np.maximum(ids, -1 - ids), mask

    def text_of(self, example: int) -> tuple[list[int], list[int]]:
        """(prompt, completion) of an example, as ids. The first quarter of plain text is taken as its prompt."""
        start = self.split.row_ends[example - 1] if example else 0
        ids = np.asarray(self.ids[start : self.split.row_ends[example]])
        prompt = int((ids < 0).sum()) or max(1, len(ids) // 4)
        return np.where(ids < 0, -1 - ids, ids)[:prompt].tolist(), ids[prompt:].tolist()


def _pieces(inputs: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of each example -> (the example, the first input) of each piece of at most `length`; each has one or more."""
    pieces = np.maximum(1, -(-inputs // length))
    example = np.repeat(np.arange(len(inputs)), pieces)
    first_piece = np.cumsum(pieces) - pieces
    return example, (np.arange(len(example)) - first_piece[example]) * length


def _packed(sizes: np.ndarray, length: int) -> np.ndarray:
    """Row r holds the pieces from borders[r] to borders[r + 1]: as many, in their order, as fit. borders: int64 [rows + 1]."""
    borders, used = [0], 0
    for piece, size in enumerate(sizes.tolist()):
        if used + size > length:
            borders.append(piece)
            used = 0
        used += size
    return np.array([*borders, len(sizes)])
