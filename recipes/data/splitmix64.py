"""SplitMix64 (Steele, Lea & Flood 2014, figure 17): 64 random bits from a counter, so that a sample needs its number alone.

Output n of the generator with a given state is mix(state + n * INCREMENT), in uint64 arithmetic.
"""

import numpy as np

INCREMENT = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: its multiples fill [0, 2^64) evenly
MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))


def mix(z):  # noqa: ANN001, ANN201 - uint64, an array or one that numba compiles -> the same
    """The finaliser: every bit of `z` decides every bit of the result."""
    z = (z ^ (z >> SHIFTS[0])) * MULTIPLIERS[0]
    z = (z ^ (z >> SHIFTS[1])) * MULTIPLIERS[1]
    return z ^ (z >> SHIFTS[2])
