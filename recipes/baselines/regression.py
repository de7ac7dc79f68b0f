"""The Bayes-optimal predictions of each y from the pairs before it: exact, in float64, for all prefixes at once.

`k` counts the pairs before a query. Sequences are processed in chunks, so that no array has more than CHUNK_NUMBERS numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_NUMBERS = 2**23  # float64: 64 MiB an array; about six are in memory at a time


class Prediction(NamedTuple):
    """The prediction of each y from the pairs before it, float64 [sequences, examples] each."""

    mean: Tensor
    log_density: Tensor
    """of the observed y, in nats"""


def ridge(x: Tensor, y: Tensor, noise: float) -> Prediction:
    """The posterior predictive for w ~ N(0, I): N(mu.x, noise + x'Sx), with S = (I + X'X / noise)^-1 and mu = S X'y / noise.

    mu is ridge regression with penalty `noise`, 0 at k = 0. x [sequences, examples, size], y [sequences, examples].
    """

    def chunk(x: Tensor, y: Tensor) -> Prediction:
        penalty = noise * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        gram = _exclusive_cumsum(x.unsqueeze(-1) * x.unsqueeze(-2)) + penalty
        right_hand_sides = torch.stack([_exclusive_cumsum(x * y.unsqueeze(-1)), x], -1)
        solutions = torch.cholesky_solve(right_hand_sides, torch.linalg.cholesky(gram))  # [..., size, 2]: mu, S x / noise
        mean, variance_of_w = (solutions * x.unsqueeze(-1)).sum(-2).unbind(-1)
        return Prediction(mean, _log_normal(y - mean, noise * (1 + variance_of_w)))

    return _in_chunks(chunk, x, y, x.shape[1] * x.shape[2] ** 2)


def dmmse(x: Tensor, y: Tensor, tasks: Tensor, noise: float) -> Prediction:
    """The posterior predictive for w uniform over `tasks` [pool, size]: a mixture of N(w.x, noise), by the likelihoods so far.

    Its mean is the discrete minimum-mean-squared-error estimator of Raventós et al. 2023 (eq. 3); at k = 0 the pool's mean.
    """
    tasks = tasks.to(x.device, torch.float64)

    def chunk(x: Tensor, y: Tensor) -> Prediction:
        means = x @ tasks.T  # [sequences, examples, pool]
        log_likelihood = (y.unsqueeze(-1) - means).square_().mul_(-0.5 / noise)
        # Log posterior of each task before the query: likelihoods shifted by one position, uniform at k = 0.
        log_posterior = torch.zeros_like(means)
        torch.cumsum(log_likelihood[:, :-1], 1, out=log_posterior[:, 1:])
        log_posterior -= log_posterior.logsumexp(-1, keepdim=True)
        log_density = log_likelihood.add_(log_posterior).logsumexp(-1) - 0.5 * math.log(2 * math.pi * noise)
        return Prediction(means.mul_(log_posterior.exp_()).sum(-1), log_density)

    return _in_chunks(chunk, x, y, x.shape[1] * len(tasks))


def _exclusive_cumsum(terms: Tensor) -> Tensor:
    """Sums over the pairs before each one, along dimension 1."""
    return terms.cumsum(1) - terms


def _log_normal(difference: Tensor, variance: Tensor) -> Tensor:
    return -0.5 * (difference.square() / variance + variance.log() + math.log(2 * math.pi))


def _in_chunks(chunk: Callable[[Tensor, Tensor], Prediction], x: Tensor, y: Tensor, numbers: int) -> Prediction:
    """Apply `chunk` to as many sequences at a time as fit into CHUNK_NUMBERS, each taking `numbers`; join the results."""
    size = max(1, CHUNK_NUMBERS // numbers)
    parts = [chunk(*pair) for pair in zip(x.double().split(size), y.double().split(size), strict=True)]
    return Prediction(*(torch.cat(part) for part in zip(*parts, strict=True)))
