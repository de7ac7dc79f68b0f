"""Exact trajectories: against Python's integers, at every size where words overflow, and for 10^5 hard numbers of each kind."""

from __future__ import annotations

import random

import numpy as np
import pytest

from recipes.data import trajectories
from recipes.data.collatz import DENSE, LARGE, MOD4, CollatzStream, Layout
from recipes.data.trajectories import PADDING, from_words, parities_of_words, parity_vectors, to_words, trajectory

MAX_LEN = 500
LOW = 16  # shortcut steps that the reference takes at once


def one_by_one(n: int) -> list[int]:
    """The parity vector by the definition."""
    parities = []
    while n != 1:
        parities.append(n % 2)
        n = 3 * n + 1 if n % 2 else n // 2
    return parities


class Reference:
    """Python's integers, LOW shortcut steps at once: as exact as one by one, and ten times as fast."""

    def __init__(self) -> None:
        self.jumps = []
        for low in range(1 << LOW):
            n, power, parities, steps = low, 1, 0, 0
            for _ in range(LOW):
                if n & 1:
                    n, power, parities, steps = (3 * n + 1) >> 1, 3 * power, parities | 1 << steps, steps + 2
                else:
                    n, steps = n >> 1, steps + 1
            self.jumps.append((power, n, parities, steps))

    def __call__(self, n: int) -> tuple[int, int]:
        """(the parity vector as the bits of an integer, first parity lowest; steps)."""
        vector, total, jumps, mask = 0, 0, self.jumps, (1 << LOW) - 1
        while n > mask:
            power, addend, parities, steps = jumps[n & mask]
            vector |= parities << total
            total += steps
            n = power * (n >> LOW) + addend
        while n != 1:
            vector |= (n & 1) << total
            total += 1
            n = 3 * n + 1 if n & 1 else n >> 1
        return vector, total


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


def check(words: np.ndarray, reference: Reference) -> None:
    """Tokens and steps of `parities_of_words` against the reference, all of them."""
    tokens, steps = parities_of_words(words, MAX_LEN)
    expected = [reference(n) for n in from_words(words)]
    assert steps.tolist() == [total for _, total in expected]
    mask = (1 << MAX_LEN) - 1
    packed = b"".join((vector & mask).to_bytes(64, "little") for vector, _ in expected)
    bits = np.unpackbits(np.frombuffer(packed, np.uint8).reshape(-1, 64), axis=1, bitorder="little")[:, :MAX_LEN]
    behind = np.arange(MAX_LEN) >= steps[:, None]
    assert np.array_equal(tokens, np.where(behind, PADDING, bits))


def test_the_reference_is_the_definition(reference: Reference) -> None:
    rng = random.Random(0)
    for n in [2, 3, 27, 2**16 - 1, 2**16, 2**16 + 1, *(rng.getrandbits(rng.randint(2, 130)) | 1 for _ in range(200))]:
        vector, total = reference(n)
        assert [vector >> place & 1 for place in range(total)] == one_by_one(n)
        assert trajectory(n) == (bytes(one_by_one(n)), total)


@pytest.mark.parametrize(
    ("n", "steps"), [(1, 0), (2, 1), (27, 111), (703, 170), (837_799, 524), (63_728_127, 949), (2**100 - 1, 1465)]
)
def test_known_step_counts(n: int, steps: int) -> None:
    tokens, computed = parity_vectors([n], 2000)
    assert computed.tolist() == [steps]
    assert tokens[0, :steps].tolist() == one_by_one(n)
    assert (tokens[0, steps:] == PADDING).all()


def test_27_starts_with_its_known_parities_and_peaks_at_9232() -> None:
    tokens, _ = parity_vectors([27], 500)
    assert tokens[0, :4].tolist() == [1, 0, 1, 0]
    n = peak = 27
    for token in tokens[0, :111]:
        assert n % 2 == token
        n = 3 * n + 1 if token else n // 2
        peak = max(peak, n)
    assert (n, peak) == (1, 9232)


def test_the_steps_of_the_first_million_sum_to_131434424() -> None:
    total = 0
    for first in range(1, 10**6, 50_000):
        words = np.zeros((50_000, trajectories.WORDS), np.uint64)
        words[:, 0] = np.arange(first, first + 50_000)
        total += int(parities_of_words(words, 8)[1].sum())
    assert total == 131_434_424


@pytest.mark.parametrize("kind", [LARGE, MOD4, DENSE])
def test_1e5_hard_numbers_of_each_kind_are_exact(kind: int, reference: Reference) -> None:
    words, kinds = CollatzStream(7, 10, 1.0, 0, Layout()).draw(range(360_000))
    chosen = words[kinds == kind][:100_000]
    assert len(chosen) == 100_000
    check(chosen, reference)


def around(n: int, width: int = 40) -> list[int]:
    return [n + offset for offset in range(-width, width + 1)]


def test_it_is_exact_where_words_overflow(reference: Reference) -> None:
    """Numbers, and numbers whose peaks, pass 2^63, 2^64, 2^128 and the limits of the compiled code."""
    rng = random.Random(1)
    numbers = [n for power in (51, 57, 58, 59, 60, 63, 64, 65, 121, 122, 123, 127, 128) for n in around(2**power)]
    numbers += around(8_528_817_511) + around(12_327_829_503)
    numbers += [2**bits - 1 for bits in range(8, 129)]  # they rise by 3^bits / 2^bits
    for bits in (119, 120, 127):
        numbers += [rng.getrandbits(bits) | rng.getrandbits(bits) | 1 << bits - 1 for _ in range(2000)]
    check(to_words(numbers), reference)


def test_the_named_numbers_do_pass_64_bits() -> None:
    """int64 and uint64 would be wrong there, so that the test above can fail."""
    for n, limit in ((8_528_817_511, 2**63), (12_327_829_503, 2**64)):
        peak = n
        while n != 1:
            n = 3 * n + 1 if n % 2 else n // 2
            peak = max(peak, n)
        assert peak >= limit


def test_what_outgrows_three_words_is_computed_in_python(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    outgrown: list[int] = []
    in_python = trajectories.trajectory
    monkeypatch.setattr(trajectories, "trajectory", lambda n, max_len: outgrown.append(n) or in_python(n, max_len))
    rising = [2**bits - 1 for bits in range(110, 193)]
    check(to_words(rising), reference)
    assert rising[-1] in outgrown
    assert rising[0] not in outgrown
    longer = [2**192, 2**500 - 1, 27, 3**300]
    tokens, steps = parity_vectors(longer, MAX_LEN)
    for n, row, count in zip(longer, tokens, steps, strict=True):
        vector = one_by_one(n)
        assert count == len(vector)
        assert row.tolist() == (vector + [PADDING] * MAX_LEN)[:MAX_LEN]


@pytest.mark.parametrize("max_len", [1, 7, 8, 9, 63, 64, 65, 128, 200])
def test_vectors_are_cut_and_padded_anywhere(max_len: int) -> None:
    numbers = [2, 3, 5, 9, 27, 97, 255, 256, 2**30, 2**64, 2**70 + 1]
    tokens, steps = parity_vectors(numbers, max_len)
    assert tokens.shape == (len(numbers), max_len)
    for n, row, count in zip(numbers, tokens, steps, strict=True):
        vector = one_by_one(n)
        assert count == len(vector)
        assert row.tolist() == (vector + [PADDING] * max_len)[:max_len]
        assert trajectory(n, max_len) == (bytes(vector[:max_len]), count)


def test_numbers_become_words_and_back() -> None:
    numbers = [1, 2**64 - 1, 2**64, 2**128 + 5, 2**192 - 1]
    assert from_words(to_words(numbers)) == numbers
    assert from_words(to_words(numbers).view(np.int64)) == numbers
    for n in (0, -1, 2**192):
        with pytest.raises(ValueError, match=str(n)):
            to_words([n])
    with pytest.raises(ValueError, match="at least 1"):
        trajectory(0)
