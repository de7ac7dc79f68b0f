"""The sieve for 3n+1: residues mod 2^bits whose numbers all fall below themselves, so that they need not be followed.

T(n) = n/2 or (3n+1)/2 is the map with each odd step joined to the halving after it. The parities of the first j steps of
T depend on n mod 2^j alone, and with c odd steps among them T^j(2^j a + r) = 3^c a + T^j(r). If 3^c < 2^j, this is below
2^j a + r for every a, or from some small a on: the class r mod 2^j falls, and need not be followed.
(R. Terras, A stopping time problem on the positive integers, Acta Arithmetica 30, 1976.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MAX_BITS = 26  # `compiled` checks a number only after these steps, which take it from 2^112 to at most 2^112 x 1.5^26 < 2^128
POWERS_OF_3 = np.array([3**c for c in range(41)], np.uint64)


@dataclass(frozen=True)
class Sieve:
    """The residues mod 2^bits that do not fall within `bits` steps of T, sorted by residue mod 9, then by odd steps.

    residues: uint32 [survivors]. images: uint64 [survivors], T^bits of each residue. groups: int64 [9, bits + 2]; the residues
    that are m mod 9 and have c odd steps are those at groups[m, c] up to groups[m, c + 1]. ascending: the residues in order.
    """

    bits: int
    residues: np.ndarray
    images: np.ndarray
    groups: np.ndarray
    ascending: np.ndarray

    def survivors(self, first: int, stop: int) -> int:
        """How many residues r with first <= r < stop survive."""
        low, high = np.searchsorted(self.ascending, [first, stop])
        return int(high - low)


def build(bits: int) -> Sieve:
    """The sieve mod 2^bits, for numbers of at least 2^bits; bits: 1 to MAX_BITS."""
    residues, images, odd_steps = np.zeros(1, np.uint64), np.zeros(1, np.uint64), np.zeros(1, np.int64)
    for j in range(bits):
        residues = np.concatenate([residues, residues + np.uint64(1 << j)])
        images = np.concatenate([images, images + POWERS_OF_3[odd_steps]])
        odd_steps = np.concatenate([odd_steps, odd_steps])
        images, odd_steps = _step(images, odd_steps)
        falls = POWERS_OF_3[odd_steps] < np.uint64(2 << j)
        # n = 2^(j+1) a + r with a >= 1 falls if its image is at most r + 1 above: 3^c a + image < 2^(j+1) a + r.
        gain = np.uint64(2 << j) - POWERS_OF_3[odd_steps[falls]]
        assert (images[falls] < residues[falls] + gain).all(), "a residue falls only for larger numbers"
        residues, images, odd_steps = residues[~falls], images[~falls], odd_steps[~falls]
    class_mod_9 = (residues % np.uint64(9)).astype(np.int64)
    group = class_mod_9 * (bits + 2) + odd_steps
    order = np.argsort(group, kind="stable")
    groups = np.searchsorted(group[order], np.arange(9 * (bits + 2))).reshape(9, bits + 2)
    small = residues.astype(np.uint32)
    return Sieve(bits, small[order], images[order], groups, np.sort(small))


def jump_table(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """(factors, addends), uint64 [2^bits], for `bits` steps of T at once: T^bits(2^bits h + r) = factors[r] h + addends[r]."""
    addends, odd_steps = np.arange(1 << bits, dtype=np.uint64), np.zeros(1 << bits, np.int64)
    for _ in range(bits):
        addends, odd_steps = _step(addends, odd_steps)
    return POWERS_OF_3[odd_steps], addends


def _step(values: np.ndarray, odd_steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(T of each value, number of odd steps including this one)."""
    odd = values & np.uint64(1)
    return (values + odd * (np.uint64(2) * values + np.uint64(1))) >> np.uint64(1), odd_steps + odd.astype(np.int64)
