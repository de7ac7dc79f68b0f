"""Steps whose gradient is not finite: the dynamic loss scale of fp16, and the count of skipped steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.errors import NOT_FINITE, UserError


class LossScale:
    """Dynamic loss scale for fp16 (Micikevicius et al. 2018): halved at an overflow, doubled after 2,000 clean steps."""

    GROWTH_INTERVAL = 2000

    def __init__(self, device: torch.device, scale: float = 2.0**16, growth: int = 0) -> None:
        self.scale = torch.tensor(scale, device=device)
        self.growth = torch.tensor(growth, device=device)

    def update(self, overflow: Tensor) -> None:
        """Adapt to a step; `overflow` is a scalar, 1.0 where its gradients were not finite. Reads nothing on the host."""
        clean = torch.where(overflow > 0, 0, self.growth + 1)
        grow = clean >= self.GROWTH_INTERVAL
        self.scale = torch.where(overflow > 0, self.scale / 2, torch.where(grow, self.scale * 2, self.scale))
        self.growth = torch.where(grow, 0, clean)


class BadSteps:
    """Counts steps that were skipped because their gradient was not finite.

    The flag of a step is read one step later, when the device has computed it and reading it does not wait.
    """

    def __init__(self, total: int = 0, in_a_row: int = 0) -> None:
        self.total, self.in_a_row, self.last_step = total, in_a_row, 0
        self._warned = False
        self._unread: tuple[Tensor | None, Any, int] | None = None

    def add(self, bad: Tensor | None, step: int) -> None:
        """Start copying this step's flag (None: it was good) to the host, and count the flag of the step before."""
        self.read()
        if bad is None or bad.device.type == "cpu":
            self._unread = (bad, None, step)
            return
        # `non_blocking` to the host goes through page-locked memory; the event tells when it has arrived.
        copy, arrived = bad.to("cpu", non_blocking=True), torch.cuda.Event()
        arrived.record()
        self._unread = (copy, arrived, step)

    def read(self) -> None:
        """Count the flag that has not been read yet, if there is one."""
        if self._unread is None:
            return
        bad, arrived, step = self._unread
        if arrived is not None:
            arrived.synchronize()
        self._unread, is_bad = None, bool(bad)
        self.total += is_bad
        self.in_a_row, self.last_step = (self.in_a_row + 1, step) if is_bad else (0, self.last_step)

    def take_warning(self) -> str | None:
        """The line to print for the first such step of this launch, once; None otherwise."""
        if not self.last_step or self._warned:
            return None
        self._warned = True
        return f"WARNING: the gradient of step {self.last_step:,} was not finite; it changed no weight"

    def too_many(self) -> UserError:
        """The error that ends a run with too many in a row. Every rank raises it, having counted the same."""
        return UserError(
            f"the gradient was not finite in {self.in_a_row} steps in a row, up to step {self.last_step}; lower "
            "--learning_rate, lengthen --warmup_steps, or look at the data (checkpoints are kept)",
            NOT_FINITE,
            known_to_all=True,
        )
