"""numba compilation, cached on disk where possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(function: Callable[..., Any]) -> Any:
    """`function`, compiled at its first call; it runs without the GIL. Later processes take it from numba's cache."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written: compiled again by each process
        return njit(nogil=True)(function)
