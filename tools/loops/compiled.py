"""The part of the loop search that numba compiles: 128-bit arithmetic, and the two loops that follow numbers.

All of it is in one file, because numba's cache on disk notices only changes to the file of the cached function. A 128-bit
number is a pair (low, high) of uint64. No step overflows: each is taken only after a check that its result fits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import int64, types, uint64
from numba.extending import intrinsic

from recipes.data.compilation import compiled

BOUND_BITS = 112  # both loops take numbers n with |n| < 2^112
JUMP_BITS = 11  # steps of `follow_block` taken at once; 10 and 12 are slower
_FULL = 1 << 57  # a value with this high half, 2^121, or a larger one may not jump; below, 2^(121 - 11) x 3^11 < 2^127.5

CYCLE, TOO_LONG, OVERFLOW = 0, 1, 2  # how `find_cycles` ends for a number

_PAIR = types.UniTuple(types.uint64, 2)
_WIDE, _WORD = ir.IntType(128), ir.IntType(64)


def _operation(generator: Callable[..., Any]) -> Any:
    """numba's `intrinsic`, typed as Any: one is called without the first parameter of its generator, to mypy an error."""
    return intrinsic(generator)


def _join(builder: Any, low: Any, high: Any) -> Any:
    """The 128-bit LLVM value of two halves."""
    shifted = builder.shl(builder.zext(high, _WIDE), ir.Constant(_WIDE, 64))
    return builder.or_(shifted, builder.zext(low, _WIDE))


def _split(context: Any, builder: Any, value: Any) -> list[Any]:
    """The inverse of `_join`."""
    return [builder.trunc(value, _WORD), builder.trunc(builder.lshr(value, ir.Constant(_WIDE, 64)), _WORD)]


@_operation
def _affine(_: Any, low: Any, high: Any, factor: Any, addend: Any) -> Any:
    """x * factor + addend for unsigned x, mod 2^128; LLVM makes three 64-bit multiplications of it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        low, high, factor, addend = arguments
        product = builder.mul(_join(builder, low, high), builder.zext(factor, _WIDE))
        value = builder.add(product, builder.zext(addend, _WIDE))
        return context.make_tuple(builder, signature.return_type, _split(context, builder, value))

    return _PAIR(uint64, uint64, uint64, uint64), generate


@_operation
def _odd_step(_: Any, low: Any, high: Any, factor: Any, addend: Any) -> Any:
    """x * factor + addend for signed x, in two's complement, mod 2^128."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        low, high, factor, addend = arguments
        product = builder.mul(_join(builder, low, high), builder.sext(factor, _WIDE))
        value = builder.add(product, builder.sext(addend, _WIDE))
        return context.make_tuple(builder, signature.return_type, _split(context, builder, value))

    return _PAIR(uint64, uint64, int64, int64), generate


@_operation
def _make_odd(_: Any, low: Any, high: Any) -> Any:
    """(low, high, halvings) of a signed x other than 0, halved until it is odd."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = _join(builder, *arguments)
        zeros = builder.cttz(value, ir.Constant(ir.IntType(1), 1))
        parts = _split(context, builder, builder.ashr(value, zeros))
        return context.make_tuple(builder, signature.return_type, [*parts, builder.trunc(zeros, _WORD)])

    return types.UniTuple(types.uint64, 3)(uint64, uint64), generate


@compiled
def follow_block(
    block_low: int,
    block_high: int,
    sieve_bits: int,
    first: int,
    stop: int,
    residues: Any,
    images: Any,
    groups: Any,
    powers_of_3: Any,
    skipped_mod_9: Any,
    factors: Any,
    addends: Any,
    max_jumps: int,
    given_up: Any,
) -> tuple[int, int, int]:
    """Follow the numbers n = block * 2^sieve_bits + residue of one block, first <= residue < stop, until they fall below n.

    residues, images, groups: see `sieve.Sieve`; factors, addends: `sieve.jump_table(JUMP_BITS)`. Numbers whose residue mod 9 is
    marked in `skipped_mod_9`, bool [9], are not followed. The residues of numbers that would overflow 128 bits, or have not
    fallen after `max_jumps` jumps, are written to `given_up`, uint32 with room for all. Needs block >= 1, n < 2^BOUND_BITS and
    sieve_bits <= `sieve.MAX_BITS`.

    Returns how many numbers were followed, skipped by their residue mod 9, and given up (of those followed).
    """
    start_low, start_high = _affine(block_low, block_high, uint64(1) << uint64(sieve_bits), uint64(0))
    start_mod_9 = ((start_high % uint64(9)) * uint64(7) + start_low % uint64(9)) % uint64(9)  # 2^64 = 7 mod 9
    whole = first == 0 and stop == 1 << sieve_bits
    first_residue, stop_residue = uint64(first), uint64(stop)
    shift, back, mask = uint64(JUMP_BITS), uint64(64 - JUMP_BITS), uint64((1 << JUMP_BITS) - 1)
    followed, skipped, stuck = 0, 0, 0
    for residue_mod_9 in range(9):
        skip = skipped_mod_9[(start_mod_9 + uint64(residue_mod_9)) % uint64(9)]
        for odd_steps in range(sieve_bits + 1):
            # After sieve_bits steps of the map, n has become block * 3^odd_steps + image.
            low, high = _affine(block_low, block_high, powers_of_3[odd_steps], uint64(0))
            for i in range(groups[residue_mod_9, odd_steps], groups[residue_mod_9, odd_steps + 1]):
                residue = uint64(residues[i])
                if not whole and (residue < first_residue or residue >= stop_residue):
                    continue
                if skip:
                    skipped += 1
                    continue
                followed += 1
                x_low, x_high = _affine(low, high, uint64(1), images[i])
                n_low = start_low + residue
                jumps = 0
                while x_high > start_high or (x_high == start_high and x_low >= n_low):
                    if x_high >= uint64(_FULL) or jumps == max_jumps:
                        given_up[stuck] = residue
                        stuck += 1
                        break
                    jumps += 1
                    entry = x_low & mask
                    x_low, x_high = _affine(
                        (x_low >> shift) | (x_high << back), x_high >> shift, factors[entry], addends[entry]
                    )
    return followed, skipped, stuck


@compiled
def find_cycles(
    low: int, high: int, multiplier: int, addend: int, max_steps: int, ends: Any, members_low: Any, members_high: Any
) -> None:
    """Follow n, n + 1, ... (n is signed; one number per entry of `ends`) to the cycles they enter, by Brent's algorithm.

    R. P. Brent, An improved Monte Carlo factorization algorithm, BIT 20 (1980). Writes CYCLE, TOO_LONG (more than `max_steps`
    steps of the plain map) or OVERFLOW to `ends`, uint8; and for a CYCLE one number on it, odd or 0, to members_low and
    members_high, uint64. Needs |n| < 2^BOUND_BITS, an even multiplier + addend, |multiplier| < 2^32, |addend| < 2^62.
    """
    bound = int64(1 << 62) // abs(multiplier)  # |high| below it: |x * multiplier| < 2^127 - 2^62
    for i in range(len(ends)):
        ends[i] = CYCLE
        members_low[i], members_high[i] = uint64(0), uint64(0)
        x_low, x_high = low, high
        low, high = _affine(low, high, uint64(1), uint64(1))
        if x_low == 0 and x_high == 0:
            continue
        x_low, x_high, halvings = _make_odd(x_low, x_high)
        steps = int64(halvings)
        marked_low, marked_high = x_low, x_high
        power, since_marked = 1, 0
        while True:
            if int64(x_high) >= bound or int64(x_high) < -bound:
                ends[i] = OVERFLOW
                break
            x_low, x_high = _odd_step(x_low, x_high, multiplier, addend)
            if x_low == 0 and x_high == 0:  # 0 is a cycle of its own
                break
            x_low, x_high, halvings = _make_odd(x_low, x_high)
            steps += 1 + int64(halvings)
            if steps > max_steps:
                ends[i] = TOO_LONG
                break
            if x_low == marked_low and x_high == marked_high:
                members_low[i], members_high[i] = x_low, x_high
                break
            since_marked += 1
            if since_marked == power:
                marked_low, marked_high = x_low, x_high
                power, since_marked = 2 * power, 0
