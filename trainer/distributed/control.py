"""The control group: a CPU process group for item counts, stop requests, errors and barriers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from trainer.errors import UserError

T = TypeVar("T")


class PendingSum:
    """A sum over all processes that is under way."""

    def __init__(self, values: Sequence[float], group: Any) -> None:
        self._values, self._work = values, None
        if group is not None:
            self._tensor = torch.tensor(values, dtype=torch.float64)
            self._work = dist.all_reduce(self._tensor, group=group, async_op=True)

    def wait(self) -> list[float]:
        """The sums, in float64; the same on every process."""
        if self._work is None:
            return list(map(float, self._values))
        self._work.wait()
        return self._tensor.tolist()


class Control:
    """Collectives for everything but gradients, over gloo, so that no GPU and no NCCL watchdog is involved.

    With one process every call returns at once. All calls are collective.
    """

    def __init__(self, rank: int, processes: int, timeout: timedelta) -> None:
        self.rank, self.processes, self.timeout = rank, processes, timeout
        self._group = dist.new_group(backend="gloo", timeout=timeout) if processes > 1 else None

    def sum(self, values: Sequence[float]) -> PendingSum:
        """Start summing `values` over all processes, elementwise; `.wait()` returns the sums."""
        return PendingSum(values, self._group)

    def barrier(self) -> None:
        """Wait for every process; a missing one is named when the time-out passes."""
        if self._group is not None:
            dist.monitored_barrier(self._group, timeout=self.timeout, wait_all_ranks=True)

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """The JSON-serialisable `value` of process `source`, on every process."""
        if self._group is None:
            return value
        data = json.dumps(value).encode() if self.rank == source else b""
        size = torch.tensor([len(data)])
        dist.broadcast(size, source, group=self._group)
        buffer = torch.zeros(int(size), dtype=torch.uint8)
        if self.rank == source:
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        dist.broadcast(buffer, source, group=self._group)
        return json.loads(bytes(buffer.tolist()))

    def gather(self, value: Any) -> list[Any]:
        """The JSON-serialisable values of all processes, by rank, on rank 0; an empty list elsewhere."""
        if self._group is None:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = self.sum([len(data) if rank == self.rank else 0 for rank in range(self.processes)]).wait()
        padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
        padded[: len(data)] = data
        parts = [torch.empty_like(padded) for _ in sizes] if self.rank == 0 else None
        dist.gather(padded, parts, dst=0, group=self._group)
        if parts is None:
            return []
        return [json.loads(bytes(part[: int(size)].tolist())) for part, size in zip(parts, sizes, strict=True)]

    def raise_if_any(self, error: UserError | None) -> None:
        """Raise, on every process, the error of the lowest rank that has one."""
        failed = self.sum([float(error is not None and r == self.rank) for r in range(self.processes)]).wait()
        if any(failed):
            source = next(r for r, flag in enumerate(failed) if flag)
            message, code = self.broadcast([str(error), error.exit_code] if error else None, source)
            raise UserError(message, code, known_to_all=True)

    def on_main(self, action: Callable[[], T]) -> T:
        """Do `action` on rank 0 only; every process gets its (JSON) result, or raises its UserError."""
        result, error = None, None
        if self.rank == 0:
            try:
                result = action()
            except UserError as user_error:
                error = user_error
        self.raise_if_any(error)
        return self.broadcast(result)
