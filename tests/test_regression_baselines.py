"""Ridge and dMMSE: against one sequence, one prefix, one task at a time, and against what is known in closed form."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from launching import ROOT, environment
from torch import Tensor

from recipes.baselines import regression as regression_baselines
from recipes.baselines.regression import dmmse, ridge
from recipes.data.regression import RegressionStream, task_pool

NOISE = 0.25


def sequences(pool: Tensor, count: int, size: int, examples: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, y and w.x of a stream."""
    batch = RegressionStream("test", 5, [pool], size, examples, NOISE).__getitems__(range(count))
    return batch["x"], batch["y"][:, 0], batch["mean"][:, 0]


def log_normal(y: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return torch.distributions.Normal(mean, variance.sqrt()).log_prob(y)


def test_ridge_is_the_posterior_prefix_by_prefix() -> None:
    x, y, _ = sequences(task_pool(0, 4, 0), 6, 4, 9)
    prediction = ridge(x, y, NOISE)
    for b in range(6):
        for k in range(9):
            before, targets, query = x[b, :k].double(), y[b, :k].double(), x[b, k].double()
            covariance = torch.linalg.inv(torch.eye(4, dtype=torch.float64) + before.T @ before / NOISE)
            w = covariance @ before.T @ targets / NOISE
            penalised = torch.linalg.lstsq(
                torch.cat([before, math.sqrt(NOISE) * torch.eye(4)]), torch.cat([targets, torch.zeros(4)])[:, None]
            )
            torch.testing.assert_close(w, penalised.solution[:, 0])
            torch.testing.assert_close(prediction.mean[b, k], w @ query)
            variance = NOISE + query @ covariance @ query
            torch.testing.assert_close(prediction.log_density[b, k], log_normal(y[b, k].double(), w @ query, variance))
    assert not prediction.mean[:, 0].any()


def test_dmmse_weighs_each_task_by_its_likelihood_so_far() -> None:
    pool = task_pool(7, 4, 0)
    x, y, _ = sequences(pool, 5, 4, 9)
    prediction = dmmse(x, y, pool, NOISE)
    for b in range(5):
        for k in range(9):
            likelihoods = []
            for w in pool.double():
                errors = y[b, :k].double() - x[b, :k].double() @ w
                likelihoods.append(math.exp(-float(errors.square().sum()) / (2 * NOISE)))
            weights = torch.tensor(likelihoods, dtype=torch.float64) / sum(likelihoods)
            means = pool.double() @ x[b, k].double()
            torch.testing.assert_close(prediction.mean[b, k], weights @ means)
            density = weights @ log_normal(y[b, k].double(), means, torch.tensor(NOISE, dtype=torch.float64)).exp()
            torch.testing.assert_close(prediction.log_density[b, k], density.log())
    torch.testing.assert_close(prediction.mean[:, 0], (x[:, 0].double() @ pool.double().mean(0)))


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = task_pool(20, 4, 0)
    x, y, _ = sequences(pool, 33, 4, 9)
    whole = [*ridge(x, y, NOISE), *dmmse(x, y, pool, NOISE)]
    for numbers in (1, 1000, 5000):
        monkeypatch.setattr(regression_baselines, "CHUNK_NUMBERS", numbers)
        parts = [*ridge(x, y, NOISE), *dmmse(x, y, pool, NOISE)]
        for one, other in zip(whole, parts, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("size", "examples", "expected"), [(8, 16, 0.3760), (16, 32, 0.3177), (16, 64, 0.1711)])
def test_ridge_has_its_known_error(size: int, examples: int, expected: float) -> None:
    """Squared error over D against the noisy y, averaged over k < K, for noise variance 1/4."""
    x, y, mean = sequences(task_pool(0, size, 0), 1500, size, examples)
    prediction = ridge(x, y, NOISE)
    per_sequence = (prediction.mean - y).square().mean(1) / size
    assert float(per_sequence.mean()) == pytest.approx(expected, abs=4 * float(per_sequence.std()) / math.sqrt(1500))
    against_mean = (prediction.mean - mean).square().mean(1) / size
    difference = per_sequence - against_mean
    assert float(difference.mean()) == pytest.approx(NOISE / size, abs=4 * float(difference.std()) / math.sqrt(1500))


def test_the_posterior_is_as_surprised_as_it_expects_to_be() -> None:
    x, y, _ = sequences(task_pool(0, 8, 0), 1500, 8, 16)
    nats = -ridge(x, y, NOISE).log_density.mean(1)
    x, eye = x.double(), torch.eye(8, dtype=torch.float64)
    gram = (x.unsqueeze(-1) * x.unsqueeze(-2)).cumsum(1) - x.unsqueeze(-1) * x.unsqueeze(-2)
    variance = NOISE + (x.unsqueeze(-2) @ torch.linalg.inv(eye + gram / NOISE) @ x.unsqueeze(-1))[..., 0, 0]
    entropy = 0.5 * (2 * math.pi * math.e * variance).log().mean(1)
    assert float(nats.mean()) == pytest.approx(float(entropy.mean()), abs=4 * float((nats - entropy).std()) / math.sqrt(1500))


def test_with_one_task_dmmse_misses_by_the_noise_alone() -> None:
    pool = task_pool(1, 8, 0)
    x, y, mean = sequences(pool, 4000, 8, 16)
    prediction = dmmse(x, y, pool, NOISE)
    torch.testing.assert_close(prediction.mean, mean.double(), atol=1e-5, rtol=1e-5)
    error = (prediction.mean - y).square() / 8
    assert float(error.mean()) == pytest.approx(NOISE / 8, abs=4 * NOISE / 8 * math.sqrt(2 / error.numel()))


def test_with_very_many_tasks_dmmse_comes_near_ridge() -> None:
    x, y, _ = sequences(task_pool(0, 2, 0), 400, 2, 6)
    distances = [
        float((dmmse(x, y, task_pool(size, 2, 0), NOISE).mean - ridge(x, y, NOISE).mean).square().mean())
        for size in (4, 64, 1024, 8192)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.01


def test_65536_tasks_fit_into_two_gigabytes() -> None:
    script = """
import re
from recipes.data.regression import RegressionStream, task_pool
from recipes.baselines.regression import dmmse
pool = task_pool(65536, 16, 0)
batch = RegressionStream("test", 0, [pool], 16, 64, 0.25).__getitems__(range(3))
prediction = dmmse(batch["x"], batch["y"][:, 0], pool, 0.25)
error = (prediction.mean[:, -8:] - batch["mean"][:, 0, -8:]).square().mean()
assert error < 0.05, error  # 64 pairs single out one of 65,536 tasks
# Not getrusage, which begins with the peak of the process that started this one.
print(1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]))
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2e9
