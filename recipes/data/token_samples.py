"""From token ids to training samples: blocks of the joined stream, or one padded row each."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from recipes.data.text import TokenSplit
from recipes.data.token_sets import TokenSet, windows_of
from recipes.data.tokenizer import END_OF_TEXT

if TYPE_CHECKING:
    import torch


IGNORED = -100  # a label that is not trained on: the default ignore_index of torch's cross entropy


class TokenBlocks:
    """The stream cut into blocks of `max_length` inputs; every token but the first is predicted exactly once.

    Block i has inputs ids[i S : i S + T] and, as labels, the ids one further, where T is `max_length` and S the `stride`
    (None: T). With a smaller stride blocks overlap, and a block keeps only the labels that the block before it lacks, so
    that each is predicted from at least T - S tokens. The last block may be short: its inputs are padded with end-of-text,
    its labels with IGNORED. `by_document`: batches also have the position of each input in its document, and the first
    token of a document is no label.
    """

    truncated = 0  # rows are never cut off: the next block continues them

    def __init__(
        self,
        split: TokenSplit,
        max_length: int,
        vocab_size: int,
        end_of_text: int,
        stride: int | None = None,
        by_document: bool = False,
    ) -> None:
        """ValueError if there are fewer than 2 tokens, an id is not below `vocab_size`, or the stride leaves gaps."""
        _check_ids(split, max_length, vocab_size)
        self.stride = max_length if stride is None else stride
        if not 1 <= self.stride <= max_length:
            raise ValueError(f"stride {stride} must be from 1 to max_length {max_length}")
        self.split, self.max_length, self.end_of_text, self.by_document = split, max_length, end_of_text, by_document

    def __len__(self) -> int:
        return 1 + -(-max(0, len(self.split.ids) - 1 - self.max_length) // self.stride)

    def __getitems__(self, numbers: Sequence[int]) -> dict[str, "torch.Tensor"]:
        """Samples -> batch, int64 [batch, max_length] each. Number n is block n % len(self) of epoch n // len(self)."""
        blocks = np.asarray(numbers, dtype=np.int64) % len(self)
        starts = blocks * self.stride
        lengths = np.minimum(len(self.split.ids) - 1 - starts, self.max_length)
        batch = _gather(self.split.ids, starts, lengths, self.max_length, self.end_of_text)
        batch["labels"][blocks > 0, : self.max_length - self.stride] = IGNORED
        return by_document(batch, self.end_of_text if self.by_document else None)


class TokenRows:
    """One row per sample: its tokens as inputs, the same one further (to end-of-text) as labels.

    Rows longer than `max_length` inputs are cut there; `truncated` counts them. A batch is padded to its own longest
    row only, inputs with end-of-text and labels with IGNORED.
    """

    def __init__(self, split: TokenSplit, max_length: int, vocab_size: int, end_of_text: int) -> None:
        """ValueError if a row has fewer than 2 tokens or an id is not below `vocab_size`."""
        _check_ids(split, max_length, vocab_size)
        lengths = np.diff(split.row_ends, prepend=0)
        if lengths.min() < 2:
            row = int(lengths.argmin())
            raise ValueError(f"row {row} has no token besides {END_OF_TEXT}; drop it or use --packing blocks")
        self.split, self.max_length, self.end_of_text = split, max_length, end_of_text
        self.truncated = int(np.sum(lengths - 1 > max_length))

    def __len__(self) -> int:
        return len(self.split.row_ends)

    def __getitems__(self, numbers: Sequence[int]) -> dict[str, "torch.Tensor"]:
        """Samples -> batch, int64 [batch, time] each. Number n is row n % len(self) of epoch n // len(self)."""
        rows = np.asarray(numbers, dtype=np.int64) % len(self)
        starts = np.where(rows > 0, self.split.row_ends[rows - 1], 0)
        lengths = np.minimum(self.split.row_ends[rows] - starts - 1, self.max_length)
        return _gather(self.split.ids, starts, lengths, int(lengths.max()), self.end_of_text)


def _gather(
    ids: TokenSet | np.ndarray, starts: np.ndarray, lengths: np.ndarray, time: int, pad: int
) -> dict[str, "torch.Tensor"]:
    """ids[start : start + length] and, as labels, the ids one further, padded to `time`: int64 [batch, time] each.

    The one place where labels are shifted: neither a recipe nor a model shifts them again.
    """
    import torch

    steps = np.arange(time + 1)
    # Windows that reach past the end are read from an earlier start, and shifted.
    first = np.maximum(0, np.minimum(starts, len(ids) - time - 1))
    places = np.minimum(starts[:, None] + steps, len(ids) - 1) - first[:, None]
    window = np.take_along_axis(windows_of(ids, min(time + 1, len(ids)), first), places, axis=1).astype(np.int64)
    real = steps[:-1] < lengths[:, None]
    return {
        "input_ids": torch.from_numpy(np.where(real, window[:, :-1], pad)),
        "labels": torch.from_numpy(np.where(real, window[:, 1:], IGNORED)),
    }


def by_document(batch: dict[str, "torch.Tensor"], end_of_text: int | None) -> dict[str, "torch.Tensor"]:
    """The batch; with an `end_of_text` also "positions", of inputs in their documents, and no label that begins a document."""
    if end_of_text is None:
        return batch
    ended = batch["input_ids"] == end_of_text
    positions = positions_in_documents(batch["input_ids"], end_of_text)
    return {**batch, "labels": batch["labels"].masked_fill(ended, IGNORED), "positions": positions}


def positions_in_documents(tokens: "torch.Tensor", end_of_text: int) -> "torch.Tensor":
    """The position of each token in its document, from 0, int32 [batch, time]. A document ends with its end-of-text."""
    import torch

    places = torch.arange(tokens.shape[1], dtype=torch.int32)
    begins = torch.zeros_like(tokens, dtype=torch.bool)
    begins[:, 1:] = tokens[:, :-1] == end_of_text
    return places - (places * begins).cummax(1).values


def _check_ids(split: TokenSplit, max_length: int, vocab_size: int) -> None:
    if max_length < 1:
        raise ValueError(f"max_length {max_length} holds no token; use at least 1")
    if len(split.ids) < 2:
        raise ValueError(f"the text has {len(split.ids)} tokens; at least 2 are needed, one to read and one to predict")
    if split.largest_id is None and (ids := np.asarray(split.ids)).max() >= vocab_size:
        position = int(np.argmax(ids >= vocab_size))
        raise ValueError(
            f"token id {ids[position]} at position {position} is not below vocab_size {vocab_size}; "
            "use the tokenizer the model was built for"
        )
