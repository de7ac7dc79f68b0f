"""Collatz numbers as samples: an endless training stream of ordinary and hard numbers, and held-out ones it never contains.

A sample is a pure function of (seed, sample number). Ordinary numbers count up from `start`; hard ones lie above 2^68: 30 % are
2^68 + a random number below it, 30 % the same at 3 mod 4 (they rise first), 40 % dense ones of 70 to 119 bits, each 1 with
p = 0.8. A hash of the number itself, whatever the seed, holds 1 in 1,024 out: training takes another in its place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from recipes.data.compilation import compiled
from recipes.data.splitmix64 import INCREMENT, mix
from recipes.data.trajectories import PADDING, WORDS, parities_of_words, to_words

if TYPE_CHECKING:
    import torch

KINDS = ("normal", "large", "mod4", "dense")
NORMAL, LARGE, MOD4, DENSE = range(4)
HELD_OUT_ONE_IN = 1024
DIGITS = 128  # binary digits that `--input digits` reads

_0, _1, _3, _15 = (np.uint64(n) for n in (0, 1, 3, 15))
_CLASS = np.uint64(HELD_OUT_ONE_IN - 1)
_P_DENSE = np.uint64(0xCCCD)  # 0.8 x 2^16
_UP_TO_LARGE, _UP_TO_MOD4 = 0.3, 0.6  # cumulative shares of the hard kinds


_mix = compiled(mix)


@compiled
def _unit(x):  # noqa: ANN001, ANN202 - uint64 -> float in [0, 1)
    return (x >> np.uint64(11)) * 2.0**-53


@compiled
def _is_held_out(w0, w1, w2):  # noqa: ANN001, ANN202 - uint64 each -> bool
    return _mix(w0 + _mix(w1 + _mix(w2 + INCREMENT))) & _CLASS == _0


@compiled
def _add(words, low, total):  # noqa: ANN001, ANN202
    """total = words + low, for numbers of three words and a uint64.

    Word by word: for the assignment of whole arrays numba would compile, in 1.5 s, a message about shapes that do not fit.
    """
    total[0] = words[0] + low
    carry = _1 if total[0] < low else _0
    total[1] = words[1] + carry
    total[2] = words[2] + (_1 if total[1] < carry else _0)


@compiled
def _hard(state, kind, words):  # noqa: ANN001, ANN202
    """Draw a hard number of `kind` from a uint64 state into words [WORDS]."""
    words[2] = _0
    if kind != DENSE:
        words[0] = _mix(state + INCREMENT)
        words[1] = np.uint64(16) + (_mix(state + np.uint64(2) * INCREMENT) & _15)
        if kind == MOD4:
            words[0] |= _3
        return
    # 64 bits at once that are 1 with p = 0.8: random words joined by the binary digits of p, the lowest first.
    for word in range(2):
        ones = _0
        for digit in range(16):
            draw = _mix(state + np.uint64(3 + 16 * word + digit) * INCREMENT)
            ones = ones | draw if _P_DENSE >> np.uint64(digit) & _1 else ones & draw
        words[word] = ones
    top = np.uint64(5) + _mix(state + np.uint64(40) * INCREMENT) % np.uint64(50)  # its highest bit, 69 to 118, from bit 64 on
    words[1] = words[1] & (_1 << top) - _1 | _1 << top


@compiled
def _hard_kind(state):  # noqa: ANN001, ANN202
    share = _unit(_mix(state + np.uint64(41) * INCREMENT))
    return LARGE if share < _UP_TO_LARGE else MOD4 if share < _UP_TO_MOD4 else DENSE


@compiled
def _draw_training(numbers, key, start, hard_fraction, ramp, words, kinds):  # noqa: ANN001, ANN202
    """Samples `numbers` (int64) -> words [batch, WORDS], kinds [batch]; the hard share rises over `ramp` samples, if > 0."""
    for row in range(len(numbers)):
        number = np.uint64(numbers[row])
        state = _mix(key ^ _mix(number))
        hard = hard_fraction * min(1.0, numbers[row] / ramp) if ramp > 0.0 else hard_fraction
        # Multiples of the golden ratio fill [0, 1) evenly: any three neighbours or more hold both kinds.
        kinds[row] = _hard_kind(state) if _unit(number * INCREMENT + key) < hard else NORMAL
        attempt = _0
        while attempt == _0 or _is_held_out(words[row, 0], words[row, 1], words[row, 2]):
            if kinds[row] == NORMAL:
                _add(start, number + attempt, words[row])
            else:
                _hard(_mix(state + attempt), kinds[row], words[row])
            attempt += _1


@compiled
def _draw_held_out(key, start, span, words, kinds):  # noqa: ANN001, ANN202
    """Held-out numbers: every other one hard, the rest the next of its class above `start` + an evenly spread power of 2."""
    for row in range(len(words)):
        state = _mix(key ^ _mix(np.uint64(row)))
        kinds[row] = _hard_kind(state) if row % 2 else NORMAL
        attempt = _0
        while attempt == _0 or not _is_held_out(words[row, 0], words[row, 1], words[row, 2]):
            if kinds[row] != NORMAL:
                _hard(_mix(state + attempt), kinds[row], words[row])
            elif attempt == _0:
                _add(start, np.uint64(span ** _unit(_mix(state))), words[row])
            else:
                _add(words[row], _1, words[row])
            attempt += _1


@dataclass(frozen=True)
class Layout:
    """What a sample holds."""

    max_len: int = 500
    """parity tokens; longer vectors are cut"""
    prefix_len: int = 64
    """parities that the stopping time is predicted from; numbers that end within them reveal it, and are not scored"""
    digits: bool = False
    """the stopping time is predicted from the binary digits of n instead: they are added, and all numbers are scored"""
    whole: bool = False
    """the stopping time is predicted from all parities: all numbers are scored"""

    @classmethod
    def of(cls, model: Any) -> Layout:
        """For the `model` section of the configuration."""
        return cls(model.max_len, model.prefix_len, digits=model.input == "digits", whole=model.mode == "guide")

    def scores(self, steps: np.ndarray) -> np.ndarray:
        """Whether the stopping time is predicted for numbers with these steps: bool [batch]."""
        return steps > (0 if self.digits or self.whole else self.prefix_len)

    def batch(self, words: np.ndarray, kinds: np.ndarray) -> dict[str, torch.Tensor]:
        """Numbers [batch, WORDS] -> tokens uint8 [batch, max_len], steps int64 [batch], scored bool [batch] (by the
        stopping-time head), kind int64 [batch], words int64 [batch, WORDS]; with `digits` also digits uint8 [batch, DIGITS]."""
        import torch

        tokens, steps = parities_of_words(words, self.max_len)
        arrays = {"tokens": tokens, "steps": steps, "scored": self.scores(steps), "kind": kinds.astype(np.int64)}
        arrays["words"] = words.view(np.int64)  # torch can do little with uint64: the same bits
        if self.digits:
            arrays["digits"] = binary_digits(words)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def binary_digits(words: np.ndarray) -> np.ndarray:
    """uint8 [batch, DIGITS] of numbers below 2^DIGITS: the lowest digit first, PADDING above the highest 1."""
    bits = np.unpackbits(words[:, : DIGITS // 64].copy().view(np.uint8), axis=1, bitorder="little")
    above = np.cumsum(bits[:, ::-1], axis=1)[:, ::-1] == 0
    return np.where(above, np.uint8(PADDING), bits)


class CollatzStream:
    """The endless training stream."""

    def __init__(self, seed: int, start: int, hard_fraction: float, curriculum_samples: int, layout: Layout) -> None:
        """`curriculum_samples` > 0: the share of hard numbers rises evenly from 0 to `hard_fraction` over so many.

        ValueError for a start or a share out of range.
        """
        limit = DIGITS - 1 if layout.digits else 64 * WORDS - 1
        if not 2 <= start < 1 << limit:
            raise ValueError(f"start {start} must be at least 2 and below 2^{limit}")
        if not 0 <= hard_fraction <= 1:
            raise ValueError(f"hard_fraction {hard_fraction} must be from 0 to 1")
        self.start, self.hard_fraction, self.layout = to_words([start])[0], hard_fraction, layout
        self.curriculum_samples = curriculum_samples
        self.key = _key("training", seed)

    def __getitems__(self, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        """Sample numbers -> batch, see `Layout.batch`."""
        return self.layout.batch(*self.draw(numbers))

    def fingerprint(self) -> str:
        """A hash that changes with the numbers of the stream, but not with the length of a curriculum."""
        return _digest(self.draw(range(64), ramp=0.0)[0], self.start)

    def draw(self, numbers: Sequence[int], ramp: float | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Sample numbers -> (words uint64 [batch, WORDS], kinds uint8 [batch])."""
        chosen = np.asarray(numbers, dtype=np.int64)
        words, kinds = np.empty((len(chosen), WORDS), np.uint64), np.empty(len(chosen), np.uint8)
        ramp = float(self.curriculum_samples) if ramp is None else ramp
        _draw_training(chosen, self.key, self.start, self.hard_fraction, ramp, words, kinds)
        return words, kinds


class HeldOutNumbers:
    """`length` distinct numbers that no training stream contains: every other one hard; the same for every seed.

    `columns`: further values of each number, [length] each, that are added to batches, such as predictions of baselines.
    """

    def __init__(
        self, name: str, length: int, start: int, span: int, layout: Layout, exclude: np.ndarray | None = None
    ) -> None:
        """The hard numbers depend on `name`; numbers of `exclude`, the `words` of another set, are left out. Ordinary numbers
        lie at most about `span` above `start`, evenly by the logarithm of that distance. ValueError for a length or span out
        of range."""
        if length < 2:
            raise ValueError(f"{length} held-out numbers are too few; take at least 2")
        if not 0 < span < 1 << 60:
            raise ValueError(f"val_span {span} must be above 0 and below 2^60")
        if length > max(2, span // HELD_OUT_ONE_IN):
            raise ValueError(f"{length} held-out numbers are too many for a span of {span}: 1 in {HELD_OUT_ONE_IN} is held out")
        words, kinds = np.empty((16 * length, WORDS), np.uint64), np.empty(16 * length, np.uint8)
        _draw_held_out(_key(name, 0), to_words([start])[0], float(span), words, kinds)
        distinct = np.sort(np.unique(words, axis=0, return_index=True)[1])  # near `start` the same one is drawn twice
        if exclude is not None:
            taken = set(map(bytes, exclude))
            distinct = np.array([row for row in distinct if bytes(words[row]) not in taken], dtype=np.int64)
        normal, hard = (distinct[(kinds[distinct] == NORMAL) == ordinary] for ordinary in (True, False))
        rows = np.sort(np.concatenate([normal[: length - length // 2], hard[: length // 2]]))
        if len(rows) < length:
            raise ValueError(f"{length} held-out numbers are too many for a span of {span}; take at most {len(rows)}")
        self.words, self.kinds, self.layout = words[rows], kinds[rows], layout
        self.columns: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.words)

    def as_batch(self) -> dict[str, torch.Tensor]:
        """The whole set as one batch."""
        return self.__getitems__(range(len(self)))

    def fingerprint(self) -> str:
        """A hash of the numbers of the set."""
        return _digest(self.words)

    def __getitems__(self, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        """Sample numbers -> batch, see `Layout.batch`, and the `columns`."""
        import torch

        rows = np.asarray(numbers, dtype=np.int64) % len(self)
        batch = self.layout.batch(self.words[rows], self.kinds[rows])
        return batch | {name: torch.from_numpy(column[rows]) for name, column in self.columns.items()}


def _digest(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def _key(*parts: object) -> np.uint64:
    """64 well-mixed bits of `parts`."""
    text = ",".join(map(str, parts)).encode()
    return np.uint64(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))
