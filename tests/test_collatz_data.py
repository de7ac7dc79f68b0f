"""The stream of Collatz numbers: what it contains, what it never does, and the contents of a batch."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch

from recipes.data.collatz import (
    DENSE,
    DIGITS,
    HELD_OUT_ONE_IN,
    LARGE,
    MOD4,
    NORMAL,
    CollatzStream,
    HeldOutNumbers,
    Layout,
)
from recipes.data.trajectories import PADDING, from_words, trajectory


def stream(**changes: Any) -> CollatzStream:
    settings = {"seed": 42, "start": 10, "hard_fraction": 0.5, "curriculum_samples": 0, "layout": Layout()}
    return CollatzStream(**{**settings, **changes})


def numbers_of(words: Any) -> list[int]:
    return from_words(np.asarray(words))


def is_held_out(n: int) -> bool:
    """Whether training, counting up from n, passes over it."""
    return numbers_of(stream(start=n, hard_fraction=0.0).draw([0])[0]) != [n]


def test_a_sample_depends_on_seed_and_number_alone() -> None:
    batch = stream().__getitems__(range(100, 140))
    for part in (range(100, 101), range(120, 140), [133, 101]):
        subset = stream().__getitems__(part)
        for name, tensor in subset.items():
            assert torch.equal(tensor, batch[name][[number - 100 for number in part]]), name
    copy = pickle.loads(pickle.dumps(stream())).__getitems__(range(100, 140))
    assert all(torch.equal(copy[name], batch[name]) for name in batch)
    other = stream(seed=43).__getitems__(range(100, 140))
    assert not torch.equal(other["kind"], batch["kind"])


def test_a_batch_holds_each_trajectory_as_computed_in_python() -> None:
    batch = stream().__getitems__(range(1000, 1400))
    assert batch["tokens"].shape == (400, 500)
    for n, tokens, steps, scored in zip(
        numbers_of(batch["words"]), batch["tokens"], batch["steps"].tolist(), batch["scored"].tolist(), strict=True
    ):
        vector, count = trajectory(n, 500)
        assert steps == count
        assert scored == (count > 64)
        assert bytes(tokens.tolist()) == vector + bytes([PADDING]) * (500 - len(vector))


def test_kinds_come_in_their_shares_and_have_their_properties() -> None:
    words, kinds = stream().draw(range(100_000))
    shares = np.bincount(kinds) / len(kinds)
    assert shares == pytest.approx([0.5, 0.15, 0.15, 0.2], abs=0.005)
    by_kind = {kind: [n for n, k in zip(numbers_of(words), kinds, strict=True) if k == kind] for kind in range(4)}
    sample = np.flatnonzero(kinds == NORMAL)
    later = [n - 10 - int(number) for n, number in zip(by_kind[NORMAL], sample, strict=True)]
    assert set(later) <= {0, 1, 2}  # its place gives way where the number is held out
    assert sum(later) < 3 * len(later) / HELD_OUT_ONE_IN
    assert all(2**68 <= n < 2**69 for kind in (LARGE, MOD4) for n in by_kind[kind])
    assert {n % 4 for n in by_kind[LARGE]} == {0, 1, 2, 3}
    assert {n % 4 for n in by_kind[MOD4]} == {3}
    lengths = [n.bit_length() for n in by_kind[DENSE]]
    assert set(lengths) == set(range(70, 120))
    ones = sum(n.bit_count() - 1 for n in by_kind[DENSE]) / (sum(lengths) - len(lengths))
    assert ones == pytest.approx(0.8, abs=0.002)
    low_digits = [sum(n >> place & 1 for n in by_kind[DENSE]) / len(lengths) for place in range(69)]
    assert low_digits == pytest.approx([0.8] * 69, abs=0.02)
    assert len(set(by_kind[LARGE])) == len(by_kind[LARGE])


@pytest.mark.parametrize("size", [3, 8, 64, 512])
def test_every_batch_mixes_normal_and_hard(size: int) -> None:
    for seed in range(5):
        kinds = stream(seed=seed).draw(range(size * 200))[1].reshape(200, size)
        hard = (kinds != NORMAL).mean(axis=1)
        assert hard.min() > 0
        assert hard.max() < 1
    assert hard.mean() == pytest.approx(0.5, abs=0.01)


def test_the_ordinary_half_is_neither_even_nor_odd() -> None:
    words, kinds = stream().draw(range(1000))
    assert (words[kinds == NORMAL, 0] % np.uint64(2)).mean() == pytest.approx(0.5, abs=0.02)


def test_the_share_of_hard_numbers_is_as_configured_and_rises_with_a_curriculum() -> None:
    for share in (0.0, 0.1, 1.0):
        kinds = stream(hard_fraction=share).draw(range(10_000))[1]
        assert (kinds != NORMAL).mean() == pytest.approx(share, abs=0.002)
    kinds = stream(curriculum_samples=40_000, hard_fraction=0.8).draw(range(60_000))[1]
    shares = (kinds != NORMAL).reshape(6, 10_000).mean(axis=1)
    assert shares == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.8, 0.8], abs=0.005)


def test_training_never_meets_a_held_out_number_and_evaluation_only_those() -> None:
    words, _ = stream().draw(range(50_000))
    assert not any(is_held_out(n) for n in numbers_of(words))
    ordinary = np.array([is_held_out(n) for n in range(2, 100_000)])
    assert ordinary.mean() * HELD_OUT_ONE_IN == pytest.approx(1, abs=0.3)
    held_out = HeldOutNumbers("val", 1001, 10, 2**29, Layout())
    numbers = numbers_of(held_out.words)
    assert all(is_held_out(n) for n in numbers)
    assert len(held_out) == len(set(numbers)) == 1001
    assert (held_out.kinds == NORMAL).sum() == 501
    assert set(held_out.kinds) == {NORMAL, LARGE, MOD4, DENSE}
    normal = [n for n, kind in zip(numbers, held_out.kinds, strict=True) if kind == NORMAL]
    assert min(normal) < 10**4
    assert max(normal) > 10**8


def test_a_held_out_set_is_the_same_for_every_seed_and_other_for_another_name() -> None:
    one, two = (HeldOutNumbers(name, 64, 10, 2**29, Layout()) for name in ("val", "val"))
    assert np.array_equal(one.words, two.words)
    assert one.fingerprint() == two.fingerprint()
    other = HeldOutNumbers("analysis", 64, 10, 2**29, Layout())
    hard = one.kinds != NORMAL
    assert not set(numbers_of(one.words[hard])) & set(numbers_of(other.words))


def test_columns_follow_their_numbers() -> None:
    held_out = HeldOutNumbers("val", 20, 10, 2**29, Layout())
    held_out.columns = {"place": np.arange(20.0)}
    assert held_out.__getitems__([3, 0, 23])["place"].tolist() == [3.0, 0.0, 3.0]


def test_binary_digits_are_those_of_the_number() -> None:
    layout = Layout(max_len=100, prefix_len=64, digits=True)
    batch = stream(layout=layout).__getitems__(range(300))
    assert batch["digits"].shape == (300, DIGITS)
    assert batch["scored"].all()  # the digits show no length
    for n, row in zip(numbers_of(batch["words"]), batch["digits"].tolist(), strict=True):
        digits = [int(digit) for digit in reversed(f"{n:b}")]
        assert row == digits + [PADDING] * (DIGITS - len(digits))


def test_ordinary_numbers_may_start_anywhere() -> None:
    for start in (2, 2**64 - 5, 2**128 - 7, 2**190):
        words, kinds = stream(start=start, hard_fraction=0.0).draw(range(40))
        taken = [next(n for n in range(first, first + 9) if not is_held_out(n)) for first in range(start, start + 40)]
        assert numbers_of(words) == taken
        assert (kinds == NORMAL).all()
    for start in (1, 0, -3, 2**191):
        with pytest.raises(ValueError, match=f"start {start} "):
            stream(start=start)
    with pytest.raises(ValueError, match="start"):
        stream(start=2**127, layout=Layout(digits=True))
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="hard_fraction"):
            stream(hard_fraction=share)
    for length in (0, 1, 10**6):
        with pytest.raises(ValueError, match=f"{length} held-out"):
            HeldOutNumbers("val", length, 10, 2**29, Layout())
