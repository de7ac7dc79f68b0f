"""Generated regression sequences: pure functions of (seed, number), with the statistics they claim to have."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from recipes.data.regression import (
    RegressionSample,
    RegressionStream,
    normal_columns,
    normals,
    sample_keys,
    task_pool,
)


def draw(samples: int, columns: int, seed: int = 0, stream: str = "train") -> Tensor:
    keys = torch.from_numpy(sample_keys(stream, seed, range(samples)).view("int64"))
    return normals(keys, normal_columns(columns))


def stream(pools: list[Tensor], name: str = "train", seed: int = 3, size: int = 3, examples: int = 5) -> RegressionStream:
    return RegressionStream(name, seed, pools, size, examples, 0.25)


@pytest.fixture(scope="module")
def values() -> Tensor:
    """[samples, columns]: two million numbers."""
    return draw(2048, 1024).double()


def splitmix64(state: int) -> int:
    """The generator's next output in Python's whole numbers, from its authors' C."""
    z = (state + 0x9E3779B97F4A7C15) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return z ^ (z >> 31)


def test_the_hash_is_splitmix64_and_the_normals_are_box_and_mullers() -> None:
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # its published first output
    keys = sample_keys("train", 0, range(4))
    drawn = normals(torch.from_numpy(keys.view("int64")), normal_columns(6))
    for row, key in zip(drawn, keys.tolist(), strict=True):
        for column in range(3):
            z = splitmix64(key + column * 0x9E3779B97F4A7C15)
            signed, low = z >> 32, z & 0xFFFFFFFF
            angle = (signed - (1 << 32) if signed >= 1 << 31 else signed) * math.pi / 2**31
            radius = math.sqrt(-2 * math.log((low + 1) / 2**32))
            expected = [radius * math.cos(angle), radius * math.sin(angle)]
            assert row[[column, 3 + column]].tolist() == pytest.approx(expected, abs=1e-5)


def test_moments_are_those_of_a_standard_normal(values: Tensor) -> None:
    n = values.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float(values.pow(power).mean()) - moment) < 4 * math.sqrt(variance / n)


def test_tails_are_those_of_a_standard_normal(values: Tensor) -> None:
    for bound in (1.0, 2.0, 3.0, 4.0):
        expected = math.erfc(bound / math.sqrt(2)) * values.numel()
        assert abs(int((values.abs() > bound).sum()) - expected) < 4 * math.sqrt(expected)
    assert 4.5 < float(values.abs().max()) < 6.7
    # Kolmogorov-Smirnov: the largest gap between both distribution functions, at the 0.1 % level.
    ordered = values.flatten().sort().values
    steps = torch.arange(1, len(ordered) + 1) / len(ordered)
    gap = (0.5 * (1 + torch.erf(ordered / math.sqrt(2))) - steps).abs().max()
    assert float(gap) < 1.95 / math.sqrt(len(ordered))


def test_neither_columns_nor_neighbouring_samples_know_of_each_other(values: Tensor) -> None:
    """Correlations of the numbers, and of their squares (what would show a shared radius), up to some lags."""
    for grid in (values, values.square() - 1):
        scale = float(grid.square().mean())
        for lag in (1, 2, 3, 16, 512):  # 512: both halves of Box and Muller's pairs
            across, down = (grid[:, lag:] * grid[:, :-lag]).mean(), (grid[lag:] * grid[:-lag]).mean()
            assert abs(float(across)) < 4.5 * scale / math.sqrt(grid[:, lag:].numel())
            assert abs(float(down)) < 4.5 * scale / math.sqrt(grid[lag:].numel())


def test_no_number_comes_twice_where_it_should_not(values: Tensor) -> None:
    """Float32 normals repeat now and then by chance; rows, columns and whole streams must not."""
    assert len(torch.unique(values[:, :8], dim=0)) == len(values)
    assert len(torch.unique(values[:8], dim=1).T) == values.shape[1]
    other_seed, other_stream = draw(2048, 8, seed=1), draw(2048, 8, stream="validation")
    together = torch.cat([draw(2048, 8), other_seed, other_stream])
    assert len(torch.unique(together, dim=0)) == 3 * 2048
    shifted = float((draw(2048, 8)[1:] * other_seed[:-1]).mean())
    assert abs(shifted) < 4.5 / math.sqrt(8 * 2047)


def test_a_sample_is_the_same_in_every_batch() -> None:
    data = stream([task_pool(7, 3, 0)])
    whole = data.__getitems__(range(40, 64))
    for part in (range(40, 41), range(45, 64), [63, 40, 51]):
        subset = data.__getitems__(part)
        for name, tensor in subset.items():
            assert torch.equal(tensor, whole[name][[number - 40 for number in part]]), name
    far = data.__getitems__([5 * 10**11])
    assert torch.isfinite(far["y"]).all()


def test_a_sequence_is_linear_in_one_task_of_the_pool() -> None:
    pool = task_pool(5, 3, 0)
    batch = stream([pool]).__getitems__(range(4000))
    assert batch["x"].shape == (4000, 5, 3)
    assert batch["y"].shape == batch["mean"].shape == (4000, 1, 5)
    w = torch.linalg.lstsq(batch["x"].double(), batch["mean"].mT.double()).solution[..., 0]
    distance, nearest = torch.cdist(w, pool.double()).min(1)
    assert float(distance.max()) < 1e-3
    counts = torch.bincount(nearest, minlength=5)
    assert (counts - 800).abs().max() < 4.5 * math.sqrt(800)
    noise = (batch["y"] - batch["mean"]).double()
    assert float(noise.var()) == pytest.approx(0.25, abs=4 * 0.25 * math.sqrt(2 / noise.numel()))
    assert abs(float(noise.mean())) < 4 * 0.5 / math.sqrt(noise.numel())


def test_the_choice_of_a_task_knows_nothing_of_the_inputs() -> None:
    pool = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]])
    batch = stream([pool]).__getitems__(range(20_000))
    first = batch["mean"][:, 0, 0] * batch["x"][:, 0, 0] > 0
    assert abs(int(first.sum()) - 10_000) < 4.5 * math.sqrt(5000)
    for numbers in (batch["x"].flatten(1), batch["y"][:, 0] - batch["mean"][:, 0]):
        scale = numbers.std() / math.sqrt(int(first.sum()))
        assert float((numbers[first].mean(0) / scale).abs().max()) < 4.5


def test_an_empty_pool_gives_every_sequence_a_task_of_its_own() -> None:
    batch = stream([task_pool(0, 3, 0)]).__getitems__(range(4000))
    w = torch.linalg.lstsq(batch["x"].double(), batch["mean"].mT.double()).solution[..., 0]
    assert float((w.T @ w / 4000 - torch.eye(3)).abs().max()) < 4.5 * math.sqrt(2 / 4000)
    x = batch["x"].double()
    assert abs(float((w[:, None] * x).mean())) < 4 / math.sqrt(x.numel()), "tasks must not know of the inputs"


def test_several_pools_give_what_each_gives_alone() -> None:
    pools = [task_pool(size, 3, 0) for size in (1, 6, 0, 300)]
    together = stream(pools).__getitems__(range(50))
    for place, pool in enumerate(pools):
        alone = stream([pool]).__getitems__(range(50))
        assert torch.equal(together["x"], alone["x"])
        for name in ("y", "mean"):
            torch.testing.assert_close(together[name][:, place], alone[name][:, 0], atol=1e-6, rtol=1e-6)
    assert (together["y"][:, 1] - together["y"][:, 3]).abs().max() > 1
    endless = stream(pools[2:3] * 3).__getitems__(range(9))
    assert torch.equal(endless["y"][:, 0], endless["y"][:, 2])


def test_tasks_have_their_own_seed_and_larger_pools_begin_with_smaller_ones() -> None:
    pool = task_pool(64, 16, 0)
    assert pool.shape == (64, 16)
    assert torch.equal(task_pool(1000, 16, 0)[:64], pool)
    assert not torch.equal(task_pool(64, 16, 1), pool)
    assert abs(float(pool.var()) - 1) < 4.5 * math.sqrt(2 / pool.numel())
    with_other_seed = [stream([pool], seed=seed, size=16).__getitems__(range(4)) for seed in (0, 1)]
    assert not torch.equal(with_other_seed[0]["x"], with_other_seed[1]["x"])


def test_only_a_sample_has_an_end() -> None:
    pool = task_pool(2, 3, 0)
    assert not hasattr(stream([pool]), "__len__")
    sample = RegressionSample(9, "train", 3, [pool], 3, 5, 0.25)
    assert len(sample) == 9
    assert torch.equal(sample.__getitems__([4])["y"], stream([pool]).__getitems__([4])["y"])
    assert sample.on_device
