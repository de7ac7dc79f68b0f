"""What the ranks tell each other before each step, added up over all of them while the step before still runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from trainer.distributed.stopping import REQUESTS, StopReason, StopRequests


@dataclass(frozen=True)
class StepVotes:
    """One rank's part of it, or the sum over all ranks."""

    item_counts: list[float]
    """items of the step's micro-batches, by loss term"""
    stop_requests: list[float]
    """ranks that want to stop, for each of REQUESTS"""
    save: float
    """ranks (rank 0 alone has the clock) that want a checkpoint by the clock"""
    read_failed: float
    """ranks that could not read their micro-batches"""
    replaced: float
    """samples that could not be read, and another one stands for"""
    saved: float
    """ranks that have done their part of the save in flight"""

    def pack(self) -> list[float]:
        """As numbers to be summed."""
        return [*self.item_counts, *self.stop_requests, self.save, self.read_failed, self.replaced, self.saved]

    @classmethod
    def unpack(cls, numbers: Sequence[float], terms: int) -> Self:
        """The reverse of `pack`, for so many loss terms."""
        stops = terms + len(REQUESTS)
        return cls(list(numbers[:terms]), list(numbers[terms:stops]), *numbers[stops:])

    @property
    def stop_reason(self) -> StopReason | None:
        """Why to stop, if a rank wants to."""
        return StopRequests.decide(self.stop_requests)
