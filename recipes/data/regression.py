"""Linear regression sequences, generated on the device: tasks w, inputs x ~ N(0, I), y = w.x + N(0, noise variance).

Every number is a pure function of (seed, sample number, column), by hashing a counter (Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3"): a batch takes about thirty operations, and is the same on any number of processes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recipes.data.splitmix64 import INCREMENT, MULTIPLIERS, SHIFTS, mix


def sample_keys(stream: str, seed: int, numbers: Sequence[int]) -> np.ndarray:
    """64 random bits for each sample number of a named stream: uint64 [batch]."""
    root = np.frombuffer(hashlib.blake2b(f"{stream},{seed}".encode(), digest_size=8).digest(), dtype="<u8")
    with np.errstate(over="ignore"):
        return mix(root + np.asarray(numbers, dtype=np.uint64) * INCREMENT)


def normals(keys: Tensor, columns: Tensor) -> Tensor:
    """Standard normals: keys int64 [batch], columns of `normal_columns(n)` -> float32 [batch, n] (n rounded up to even).

    Two from each 64-bit hash of (key, column), by Box and Muller (1958); the tail reaches to 6.6 standard deviations.
    """
    z = keys[:, None] + columns
    for shift, multiplier in zip(map(int, SHIFTS), (*MULTIPLIERS, np.uint64(1)), strict=True):  # `mix`, on int64
        z ^= (z >> shift).bitwise_and_((1 << (64 - shift)) - 1)  # torch shifts signed integers arithmetically
        z *= int(multiplier.view(np.int64))
    angle = (z >> 32).float().mul_(math.pi / 2**31)
    above_zero = z.bitwise_and_(0xFFFFFFFF).add_(1).float().mul_(2.0**-32)  # in (0, 1]: its logarithm is finite
    radius = above_zero.log_().mul_(-2.0).sqrt_()
    return torch.cat([angle.cos().mul_(radius), angle.sin_().mul_(radius)], dim=1)


def normal_columns(count: int) -> Tensor:
    """The counters of `normals` for at least `count` numbers a sample: int64 [ceil(count / 2)]."""
    with np.errstate(over="ignore"):
        steps = np.arange(1, -(-count // 2) + 1, dtype=np.uint64) * INCREMENT
    return torch.from_numpy(steps.view(np.int64))


def task_pool(num_tasks: int, task_size: int, seed: int) -> Tensor:
    """`num_tasks` vectors w ~ N(0, I): float32 [num_tasks, task_size]. A larger pool begins with the tasks of a smaller one."""
    keys = torch.from_numpy(sample_keys("tasks", seed, range(num_tasks)).view(np.int64))
    return normals(keys, normal_columns(task_size))[:, :task_size].contiguous()


class RegressionStream:
    """Endless sequences of `examples` pairs from pools of tasks. An empty pool means infinitely many: each sample a new task.

    With several pools a sample has one y for each, from the same x, noise, and uniform number that chooses the task: each y is
    that of a stream of its pool alone.
    """

    on_device = True
    VERSION = "regression 1"
    """to be changed whenever the same seed gives other samples"""

    def __init__(self, stream: str, seed: int, pools: Sequence[Tensor], task_size: int, examples: int, noise: float) -> None:
        """`noise` is the variance of y around w.x. Streams with another name (`stream`) or seed are independent."""
        self.stream, self.seed, self.task_size, self.examples = stream, seed, task_size, examples
        self.noise_std = math.sqrt(noise)
        self.sizes = np.array([[len(pool)] for pool in pools])
        self.starts = np.cumsum(self.sizes, axis=0) - self.sizes  # of each pool in `tasks`
        self.infinite = [i for i, pool in enumerate(pools) if not len(pool)]
        self.tasks = torch.cat(list(pools))
        self.columns = normal_columns(examples * (task_size + 1) + task_size)

    def to(self, device: torch.device) -> None:
        """Generate on `device` from now on."""
        self.tasks, self.columns = self.tasks.to(device), self.columns.to(device)

    def __getitems__(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """x [batch, examples, task_size], y [batch, pools, examples] and its mean w.x [batch, pools, examples]."""
        keys = sample_keys(self.stream, self.seed, numbers)
        with np.errstate(over="ignore"):
            uniform = (mix(keys - INCREMENT) >> np.uint64(11)) * 2.0**-53
        chosen = self.starts + (uniform * self.sizes).astype(np.int64)  # [pools, batch]
        keys_and_tasks = torch.from_numpy(np.concatenate([keys.view(np.int64)[None], chosen])).to(self.columns.device)
        device_keys, task_numbers = keys_and_tasks[0], keys_and_tasks[1:]
        z, size, inputs = normals(device_keys, self.columns), self.task_size, self.examples * self.task_size
        x = z[:, :inputs].view(len(keys), self.examples, size)
        noise = z[:, inputs : inputs + self.examples]
        new_task = z[:, inputs + self.examples : inputs + self.examples + size]
        if len(self.infinite) == len(self.sizes):
            w = new_task.unsqueeze(1).expand(-1, len(self.sizes), -1)
        else:
            w = self.tasks[task_numbers.clamp_(max=len(self.tasks) - 1).T]  # [batch, pools, task_size]
            if self.infinite:
                w[:, self.infinite] = new_task.unsqueeze(1)
        mean = w @ x.mT
        return {"x": x, "y": torch.add(mean, noise.unsqueeze(1), alpha=self.noise_std), "mean": mean}


class RegressionSample(RegressionStream):
    """The first `count` sequences of a stream: a finite set to evaluate on."""

    def __init__(self, count: int, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.count = count

    def __len__(self) -> int:
        return self.count
