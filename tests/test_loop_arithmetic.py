"""The arithmetic of the loop search against Python's integers: the sieve, and what numba compiles, to the edge of 128 bits."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from launching import ROOT
from plain_collatz import comes_after_smaller, falls_within, plain_cycle, shortcut

sys.path.insert(0, str(ROOT / "tools"))

from loops import compiled, coverage, exact, sieve
from loops.exact import Map

COLLATZ = Map(3, 1)
BITS = 10  # of the sieve: small enough to look at every residue


# ------------------------------------------------------------------------------------------------------------- the sieve


def test_the_sieve_keeps_exactly_what_does_not_fall() -> None:
    kept = set(sieve.build(BITS).residues.tolist())
    for n in range(1 << BITS, 9 << BITS):
        assert falls_within(n, BITS) == (n % (1 << BITS) not in kept), n


def test_a_residue_carries_its_image_and_odd_steps() -> None:
    s = sieve.build(BITS)
    assert s.groups[0, 0] == 0
    assert s.groups[8, BITS + 1] == len(s.residues)
    for residue_mod_9 in range(9):
        for c in range(BITS + 1):
            for i in range(s.groups[residue_mod_9, c], s.groups[residue_mod_9, c + 1]):
                residue = int(s.residues[i])
                assert residue % 9 == residue_mod_9
                assert shortcut((77 << BITS) + residue, BITS) == 77 * 3**c + int(s.images[i])


def test_a_jump_is_its_steps() -> None:
    factors, addends = sieve.jump_table(7)
    for n in (*range(300), 2**90 + 12345, 2**90 - 1):
        assert shortcut(n, 7) == int(factors[n % 128]) * (n >> 7) + int(addends[n % 128])


@pytest.mark.parametrize("n", [*range(10, 40), 2**71 + 5, 2**111 - 7])
def test_a_skipped_class_comes_after_a_smaller_number(n: int) -> None:
    if n % 3 == 2:
        assert shortcut((2 * n - 1) // 3, 1) == n
    if n % 9 == 4:
        assert shortcut((8 * n - 5) // 9, 3) == n


# ------------------------------------------------------------------------------------------------------ the compiled code


def follow_block(block: int, first: int, stop: int, max_jumps: int, skipping: bool = True) -> tuple[int, int, list[int]]:
    """compiled.follow_block with the sieve of BITS; the numbers given up."""
    s = sieve.build(BITS)
    skipped = np.array([skipping and comes_after_smaller(n) for n in range(9)])
    table = sieve.jump_table(compiled.JUMP_BITS)
    given_up = np.empty(len(s.residues), np.uint32)
    rows = (s.residues, s.images, s.groups, sieve.POWERS_OF_3, skipped, *table)
    low, high = np.uint64(block & 2**64 - 1), np.uint64(block >> 64)
    followed, passed, stuck = compiled.follow_block(low, high, BITS, first, stop, *rows, max_jumps, given_up)
    return followed, passed, sorted((block << BITS) + r for r in given_up[:stuck].tolist())


# At the default start; where a number, and where a block's number, pass 64 bits; the last blocks that fit.
BLOCKS = [1, 2, 5, 1 << 54, (1 << 54) - 1, 1 << 61, (1 << 64) - 1, 1 << 64, 12345678901234567890123, (1 << 102) - 1]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("skipping", [True, False])
@pytest.mark.parametrize(("first", "stop"), [(0, 1 << BITS), (100, 1 << BITS), (0, 801), (27, 28), (28, 31)])
def test_each_number_that_the_sieve_leaves_is_followed_once(block: int, skipping: bool, first: int, stop: int) -> None:
    numbers = range((block << BITS) + first, (block << BITS) + stop)
    left = [n for n in numbers if not falls_within(n, BITS)]
    expected = [n for n in left if not (skipping and comes_after_smaller(n))]
    # With no jump allowed, each followed number is given up: here they are, one by one.
    assert follow_block(block, first, stop, 0, skipping) == (len(expected), len(left) - len(expected), expected)


def given_up_by_plain_steps(n: int, max_jumps: int) -> bool:
    x = shortcut(n, BITS)
    for _ in range(max_jumps):
        if x < n or x >= 2**121:
            break
        x = shortcut(x, compiled.JUMP_BITS)
    return x >= n


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("max_jumps", [1, 2, 3, 8, 10_000])
def test_numbers_are_given_up_as_plain_steps_say(block: int, max_jumps: int) -> None:
    followed, _, given_up = follow_block(block, 0, 1 << BITS, max_jumps, skipping=False)
    numbers = [n for n in range(block << BITS, (block + 1) << BITS) if not falls_within(n, BITS)]
    assert followed == len(numbers)
    assert given_up == [n for n in numbers if given_up_by_plain_steps(n, max_jumps)]


def test_near_the_end_of_128_bits_some_overflow_and_most_do_not() -> None:
    overflowed = 0
    for block in range((1 << 102) - 60, 1 << 102):
        followed, _, given_up = follow_block(block, 0, 1 << BITS, 10_000, skipping=False)
        numbers = [n for n in range(block << BITS, (block + 1) << BITS) if not falls_within(n, BITS)]
        assert given_up == [n for n in numbers if given_up_by_plain_steps(n, 10_000)]
        assert len(given_up) < followed / 2
        overflowed += len(given_up)
    assert overflowed > 1  # not only 2^112 - 1


MAPS = [Map(*pair) for pair in [(3, 1), (3, -1), (5, 1), (181, 1), (3, 5), (-3, 1), (1, 1), (2, 2), (3, -3), (7, 2**61 + 1)]]
STARTS = [-60, 1, 2**63 - 30, 2**64 - 30, -(2**64) - 30, 2**71, -(2**100), 2**112 - 60, 1 - 2**112]


@pytest.mark.parametrize("rule", MAPS, ids=str)
def test_compiled_cycles_are_those_of_python(rule: Map) -> None:
    for start in STARTS:
        ends = np.empty(60, np.uint8)
        low, high = np.empty(60, np.uint64), np.empty(60, np.uint64)
        words = np.uint64(start & 2**64 - 1), np.uint64(start >> 64 & 2**64 - 1)
        compiled.find_cycles(*words, rule.multiplier, rule.addend, 1500, ends, low, high)
        for i, n in enumerate(range(start, start + 60)):
            outcome, last = exact.follow(rule, n, 1500, 10**6)
            if ends[i] == compiled.CYCLE:
                assert (outcome, last) == ("cycle", coverage._signed(int(low[i]), int(high[i])))
            elif ends[i] == compiled.TOO_LONG:
                assert outcome == "too many steps"
            else:
                room = 126 - rule.multiplier.bit_length()
                assert exact.follow(rule, n, 1500, 126)[0] == "too many bits" or abs(n).bit_length() >= room


def test_python_finds_the_cycles_of_a_dictionary() -> None:
    for rule in (Map(3, 1), Map(3, 5), Map(5, 1), Map(3, -3), Map(-3, 1)):
        for n in range(-200, 200):
            outcome, last = exact.follow(rule, n, 10**5, 256)
            expected = plain_cycle(rule.multiplier, rule.addend, n)
            assert (exact.cycle_through(rule, last).smallest if outcome == "cycle" else None) == expected, (rule, n)


def test_limits_of_python_steps() -> None:
    assert exact.follow(COLLATZ, 27, 91, 256, below=27)[0] == "too many steps"
    assert exact.follow(COLLATZ, 27, 95, 256)[0] == "too many steps"
    assert exact.follow(COLLATZ, 27, 10**5, 13)[0] == "too many bits"  # its peak is 9232, of 14 bits
    assert exact.follow(COLLATZ, 27, 10**5, 14) == ("cycle", 1)
    assert exact.follow(COLLATZ, 27, 96, 256, below=27) == ("fell", 23)
