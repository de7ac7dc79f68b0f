"""qn+d one step at a time in Python's integers: a reference that shares no code with what it is compared with."""

from __future__ import annotations


def shortcut(n: int, steps: int) -> int:
    """T^steps(n) for 3n+1, where T joins an odd step to the halving after it."""
    for _ in range(steps):
        n = (3 * n + 1) // 2 if n % 2 else n // 2
    return n


def falls_within(n: int, steps: int) -> bool:
    x = n
    for _ in range(steps):
        x = shortcut(x, 1)
        if x < n:
            return True
    return False


def comes_after_smaller(n: int) -> bool:
    return n % 3 == 2 or n % 9 == 4


def plain_cycle(multiplier: int, addend: int, n: int, max_bits: int = 256) -> int | None:
    """The number closest to 0 on the cycle that `n` enters; None if a number on the way has more than `max_bits`."""
    seen: dict[int, None] = {}
    while n not in seen:
        if n.bit_length() > max_bits:
            return None
        seen[n] = None
        n = multiplier * n + addend if n % 2 else n // 2
    cycle = list(seen)[list(seen).index(n) :]
    return min(cycle, key=lambda m: (abs(m), -m))
