"""Windows of token ids: each predicted once, or drawn at random, as pure functions of their number."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from test_token_files import VOCABULARY, ids_file

from recipes.data.token_sets import Mixture, find_files
from recipes.data.token_windows import IGNORED, RandomWindows, SharesSoFar, TokenWindows, _spreading_stride


def mixture(path: Path, vocab_size: int = VOCABULARY) -> Mixture:
    return Mixture((find_files(str(path), vocab_size),), (1.0,))


@pytest.mark.parametrize("count", [10, 17, 18, 25, 26, 200, 1001])
def test_windows_predict_every_id_but_the_first_exactly_once(count: int, tmp_path: Path) -> None:
    ids = ids_file(tmp_path / "a.ids", count)
    windows = TokenWindows(find_files(str(tmp_path / "a.ids"), VOCABULARY), 8)
    assert len(windows) == -(-(count - 1) // 8)
    tokens = windows.__getitems__(range(len(windows)))["tokens"]
    assert tokens.dtype == torch.int32
    assert tokens.shape == (len(windows), 9)
    labels = tokens[:, 1:]
    assert int((labels != IGNORED).sum()) == count - 1
    contents = sorted(tuple(row[row != IGNORED].tolist()) for row in tokens)
    assert contents == sorted(tuple(ids[start : start + 9].tolist()) for start in range(0, count - 1, 8))
    again = windows.__getitems__([n + 5 * len(windows) for n in range(len(windows))])["tokens"]
    assert torch.equal(again, tokens)


@pytest.mark.parametrize("windows", [1, 2, 13, 100, 144, 977, *random.Random(0).sample(range(1000, 16000), 25)])
def test_the_first_windows_are_spread_over_the_whole_file(windows: int, tmp_path: Path) -> None:
    np.arange(windows * 4 + 1, dtype=np.uint16).tofile(tmp_path / "a.ids")
    ids = find_files(str(tmp_path / "a.ids"), 65_536)
    for part in {1, windows // 7, windows // 2, windows} - {0}:
        some = TokenWindows(ids, 4, limit=part)
        assert len(some) == part
        starts = some.__getitems__(range(part))["tokens"][:, 0].sort().values.tolist()
        assert len(set(starts)) == part
        gaps = np.diff([*starts, starts[0] + 4 * windows]) / 4
        assert gaps.max() <= max(4, 4 * windows / part), (part, gaps.max())


def test_the_default_evaluation_of_a_large_file_is_spread_evenly() -> None:
    for windows in (100_138, 2_365_000, *random.Random(1).sample(range(10**5, 10**7), 20)):
        starts = np.sort(np.arange(6400) * _spreading_stride(windows) % windows)  # 100 batches of 64
        gaps = np.diff([*starts, starts[0] + windows])
        assert gaps.max() < 4 * windows / 6400, windows
        assert gaps.min() > windows / 6400 / 8, windows


def test_random_windows_are_pure_functions_of_seed_and_number(tmp_path: Path) -> None:
    ids = ids_file(tmp_path / "a.ids", 2000)
    one, two, other = (RandomWindows(mixture(tmp_path / "a.ids"), 16, seed) for seed in (3, 3, 4))
    assert not hasattr(one, "__len__")
    numbers = [5, 0, 10**12, 5]
    tokens = one.__getitems__(numbers)["tokens"]
    two.__getitems__(range(100))
    assert torch.equal(two.__getitems__(numbers)["tokens"], tokens)
    assert torch.equal(tokens[0], tokens[3])
    assert torch.equal(one.__getitems__([10**12])["tokens"][0], tokens[2])
    for start, row in zip(one.places(numbers)[1], tokens, strict=True):
        assert row.tolist() == ids[start : start + 17].tolist()
    assert not np.array_equal(one.places(range(50))[1], other.places(range(50))[1])


def test_every_start_is_equally_likely_and_independent_of_the_last(tmp_path: Path) -> None:
    ids_file(tmp_path / "a.ids", 116)
    for seed in range(3):
        starts = RandomWindows(mixture(tmp_path / "a.ids"), 16, seed).places(range(100_000))[1]
        counts = np.bincount(starts, minlength=100)
        assert len(counts) == 100  # the first and the last included
        chi_squared = float(((counts - 1000) ** 2 / 1000).sum())
        assert 50 < chi_squared < 160, (seed, chi_squared)  # 99 degrees of freedom: far outside with p < 1e-4
        pairs = np.bincount(starts[:-1] // 10 * 10 + starts[1:] // 10, minlength=100)
        assert 50 < float(((pairs - 1000) ** 2 / 1000).sum()) < 160


def test_a_file_is_sent_to_workers_by_its_path(tmp_path: Path) -> None:
    ids_file(tmp_path / "a.ids", 50_000)
    windows = RandomWindows(mixture(tmp_path / "a.ids"), 16, 0)
    tokens = windows.__getitems__(range(9))["tokens"]
    sent = pickle.dumps(windows)
    assert len(sent) < 1200
    assert torch.equal(pickle.loads(sent).__getitems__(range(9))["tokens"], tokens)


def test_a_mixture_gives_each_set_its_share_by_the_number_of_the_sample_alone(tmp_path: Path) -> None:
    for name, low in (("a", 1), ("b", 300), ("c", 600)):
        np.random.default_rng(0).integers(low, low + 300, 5000).astype(np.uint16).tofile(tmp_path / f"{name}.ids")
    sets = tuple(find_files(str(tmp_path / f"{name}.ids"), VOCABULARY) for name in "abc")
    three = Mixture(sets, (0.7, 0.05, 0.25))
    windows = RandomWindows(three, 16, 5)
    numbers = np.arange(20_000)
    chosen, _ = windows.places(numbers)
    counts = np.bincount(chosen)
    assert float(((counts - 20_000 * np.array(three.shares)) ** 2 / (20_000 * np.array(three.shares))).sum()) < 14  # p = 1e-3
    tokens = windows.__getitems__([7, 10**12, 3])["tokens"].numpy()
    for number, row in zip((7, 10**12, 3), tokens, strict=True):
        source = int(windows.places([number])[0][0])
        assert row.min() >= (1, 300, 600)[source]
        assert row.max() < (301, 600, 900)[source]
        assert np.array_equal(windows.__getitems__([number])["tokens"][0], row)  # in any batch
    assert not np.array_equal(chosen[:100], RandomWindows(three, 16, 6).places(numbers[:100])[0])
    alone = RandomWindows(Mixture(sets[:1], (1.0,)), 16, 5)
    first = numbers[chosen == 0][:20]
    assert np.array_equal(alone.__getitems__(first)["tokens"], windows.__getitems__(first)["tokens"])

    shares = SharesSoFar(windows)
    assert shares.at(0) == {"a": 0, "b": 0, "c": 0}
    assert shares.at(20_000) == {name: count / 20_000 for name, count in zip("abc", counts.tolist(), strict=True)}
    assert shares.at(100_000) == SharesSoFar(windows).at(100_000)
