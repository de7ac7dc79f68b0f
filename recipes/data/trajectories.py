"""Collatz trajectories of integers of any size, exactly: parity vectors and total step counts, a batch at a time.

The map is n/2 for even n and 3n + 1 for odd n. The parity vector of n holds the parity of each number before each step until 1
is reached; its length is the number of steps. A token is EVEN, ODD or, after the end, PADDING.

The compiled code takes several steps at once. With the shortcut T(n) = n/2 or (3n + 1)/2, the low B bits of n decide its next
B parities: T^B(2^B h + b) = 3^odd(b) h + T^B(b) (Terras 1976, theorem 1.2). A table over b holds the power of 3, the addend and
the parities, an odd shortcut step being the two steps "odd, even". Numbers have three 64-bit words while they need them and one
afterwards; what would outgrow three is followed again in Python's integers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from recipes.data.compilation import compiled

EVEN, ODD, PADDING = 0, 1, 2
WORDS = 3  # 64-bit words of a number in an array, lowest first
BITS = 8  # shortcut steps taken at once
TAIL_WORDS = 2  # 64-bit words for the parities of a number below 2^BITS, none of which takes more than 127 steps


def parity_vectors(numbers: Sequence[int], max_len: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens uint8 [batch, max_len], steps int64 [batch]) of integers of any size. ValueError for one below 1."""
    small = [n < 1 << 64 * WORDS for n in numbers]
    tokens, steps = parities_of_words(to_words([n if fits else 1 for n, fits in zip(numbers, small, strict=True)]), max_len)
    for row in np.flatnonzero(~np.array(small, dtype=bool)):
        steps[row] = _fill(tokens[row], numbers[int(row)])
    return tokens, steps


def parities_of_words(words: np.ndarray, max_len: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens uint8 [batch, max_len], steps int64 [batch]) of numbers as uint64 [batch, WORDS], each at least 1."""
    columns = np.empty((len(words), -(-max_len // 8)), np.uint64)
    steps = np.empty(len(words), np.int64)
    _follow_all(words, columns, steps, max_len)
    tokens = columns.view(np.uint8)[:, :max_len]
    for row in np.flatnonzero(steps < 0):
        steps[row] = _fill(tokens[row], from_words(words[row : row + 1])[0])
    return tokens, steps


def to_words(numbers: Sequence[int]) -> np.ndarray:
    """Integers from 1 to 2^192 - 1 as uint64 [batch, WORDS], the lowest word first. ValueError for others."""
    for n in numbers:
        if not 0 < n < 1 << 64 * WORDS:
            raise ValueError(f"{n} is not between 1 and 2^{64 * WORDS} - 1")
    raw = b"".join(n.to_bytes(8 * WORDS, "little") for n in numbers)
    return np.frombuffer(raw, "<u8").reshape(-1, WORDS).astype(np.uint64)


def from_words(words: np.ndarray) -> list[int]:
    """The reverse of `to_words`; the words may be int64 of the same bits."""
    return [int.from_bytes(row.tobytes(), "little") for row in np.ascontiguousarray(words)]


def _fill(row: np.ndarray, n: int) -> int:
    """Write the parity vector of `n` into a row of tokens; returns its steps."""
    parities, steps = trajectory(n, len(row))
    row[: len(parities)] = np.frombuffer(parities, np.uint8)
    row[len(parities) :] = PADDING
    return steps


def trajectory(n: int, max_len: int | None = None) -> tuple[bytes, int]:
    """(the first `max_len` parities, steps) of one number, in Python's integers. ValueError for n < 1, which may never end."""
    if n < 1:
        raise ValueError(f"{n} has no steps to 1; give a number of at least 1")
    parities, steps = bytearray(), 0
    while n != 1:
        zeros = (n & -n).bit_length() - 1
        run = b"\0" * zeros if zeros else b"\1"
        n = n >> zeros if zeros else 3 * n + 1
        steps += len(run)
        if max_len is None or len(parities) < max_len:
            parities += run
    return bytes(parities[:max_len]), steps


def _jumps() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The table over the low bits: 3^odd, addend, parities (first step in the lowest bit), steps. uint64 [2^BITS] each."""
    rows = []
    for low in range(1 << BITS):
        value, power, parities, steps = low, 1, 0, 0
        for _ in range(BITS):
            if value % 2:
                value, power, parities, steps = (3 * value + 1) // 2, 3 * power, parities | 1 << steps, steps + 2
            else:
                value, steps = value // 2, steps + 1
        rows.append((power, value, parities, steps))
    power, addend, parities, steps = np.array(rows, dtype=np.uint64).T.copy()
    return power, addend, parities, steps


def _tails() -> tuple[np.ndarray, np.ndarray]:
    """Parities (bits, [2^BITS, TAIL_WORDS]) and steps ([2^BITS]) from each small number down to 1."""
    parities, steps = np.zeros((1 << BITS, TAIL_WORDS), np.uint64), np.zeros(1 << BITS, np.uint64)
    for n in range(1, 1 << BITS):
        tokens, count = trajectory(n)
        bits = sum(token << place for place, token in enumerate(tokens))
        parities[n] = [bits >> 64 * word & (1 << 64) - 1 for word in range(TAIL_WORDS)]
        steps[n] = count
    return parities, steps


POWER, ADDEND, PARITIES, STEPS = _jumps()
TAIL_PARITIES, TAIL_STEPS = _tails()
# A byte of bits -> 8 bytes of tokens (the machine is little-endian, as every one that torch supports).
TOKENS_OF_BYTE = np.array([sum((byte >> place & 1) << 8 * place for place in range(8)) for byte in range(256)], dtype=np.uint64)
_0, _1, _32, _63, _64 = (np.uint64(n) for n in (0, 1, 32, 63, 64))
_B, _UP = np.uint64(BITS), np.uint64(64 - BITS)
_LOW, _LOW32, _LOW8 = np.uint64((1 << BITS) - 1), np.uint64(2**32 - 1), np.uint64(255)
_SMALL = np.uint64(1 << BITS)
_LOST = np.uint64(2**64 - 1)  # -1 as int64
# A jump multiplies by less than 3^BITS / 2^BITS = 2^(0.585 BITS): with its top word below this, a
# number loses nothing.
_TOP = np.uint64(1 << 64 - BITS * 585 // 1000 - 2)
_PADDING8 = np.uint64(0x0101010101010101 * PADDING)


@compiled
def _follow(w0, w1, w2, bits):  # noqa: ANN001, ANN202 - compiled for uint64, uint64 [words]
    """Steps of a number to 1, and its first parities into `bits` (64 a word); _LOST if it outgrows three words.

    Parities beyond the words of `bits` are counted only. Every value is uint64: numba makes uint64 with int64 a float.
    """
    steps, pending, fill, place, places = _0, _0, _0, 0, len(bits)
    while True:
        low = w0 & _LOW
        power, count = POWER[low], STEPS[low]
        if w1 | w2 == _0 and w0 < _TOP:
            if w0 < _SMALL:
                break
            w0 = (w0 >> _B) * power + ADDEND[low]
        else:
            if w2 >= _TOP:
                return _LOST
            w0, w1, w2 = w0 >> _B | w1 << _UP, w1 >> _B | w2 << _UP, w2 >> _B
            # 64 x 64 bits in halves of 32, word by word, the carry going up.
            first = (w0 & _LOW32) * power + ADDEND[low]
            second = (w0 >> _32) * power + (first >> _32)
            w0 = first & _LOW32 | second << _32
            first = (w1 & _LOW32) * power + (second >> _32)
            second = (w1 >> _32) * power + (first >> _32)
            w1 = first & _LOW32 | second << _32
            w2 = w2 * power + (second >> _32)
        steps += count
        if place < places:
            pending |= PARITIES[low] << fill
            fill += count
            if fill >= _64:
                bits[place] = pending
                place += 1
                fill -= _64
                pending = PARITIES[low] >> count - fill
    left = TAIL_STEPS[w0]
    steps += left
    for word in range(TAIL_WORDS):
        if place < places:
            bits[place] = pending | TAIL_PARITIES[w0, word] << fill
            # In two shifts: one by 64 is not defined.
            pending = TAIL_PARITIES[w0, word] >> _1 >> _63 - fill
            place += 1
    if place < places:
        bits[place] = pending
    return steps


@compiled
def _follow_all(words, tokens, steps, max_len):  # noqa: ANN001, ANN202
    """`_follow` for each row of words [batch, WORDS] into tokens (uint64 [batch, ceil(max_len / 8)]) and steps (int64)."""
    columns = tokens.shape[1]
    bits = np.zeros((max_len + 63) // 64 + 1, np.uint64)
    for row in range(len(words)):
        steps[row] = np.int64(_follow(words[row, 0], words[row, 1], words[row, 2], bits))
        length = max(0, min(steps[row], max_len))
        whole = length // 8
        for column in range(whole):
            tokens[row, column] = TOKENS_OF_BYTE[bits[column >> 3] >> np.uint64(column % 8 * 8) & _LOW8]
        for column in range(whole, columns):
            tokens[row, column] = _PADDING8
        if length % 8:
            part = TOKENS_OF_BYTE[bits[whole >> 3] >> np.uint64(whole % 8 * 8) & _LOW8]
            kept = np.uint64(length % 8 * 8)
            tokens[row, whole] = part & (_1 << kept) - _1 | _PADDING8 >> kept << kept
