"""What the ranks tell each other before each training step and each evaluation batch, while the previous one is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from trainer.distributed.control import Control
from trainer.distributed.stopping import REQUESTS, StopReason, StopRequests


@dataclass
class StepVotes:
    """The votes on one training step: one rank's, or their sum over all ranks."""

    item_counts: list[float]
    """items of the step's micro-batches, by loss term"""
    stop_requests: list[float]
    """ranks that want to stop, for each of REQUESTS"""
    save: float
    """ranks that want a checkpoint because --save_minutes have passed (rank 0 alone looks at the clock)"""
    read_failed: float
    """ranks that could not read their micro-batches"""
    replaced: float
    """unreadable samples that another sample replaces"""
    saved: float
    """ranks that have written their part of the save in flight"""

    def pack(self) -> list[float]:
        """As a list of numbers, to be summed over the ranks."""
        return [*self.item_counts, *self.stop_requests, self.save, self.read_failed, self.replaced, self.saved]

    @classmethod
    def unpack(cls, numbers: Sequence[float], terms: int) -> Self:
        """The inverse of `pack`; `terms`: how many loss terms there are."""
        stops = terms + len(REQUESTS)
        return cls(list(numbers[:terms]), list(numbers[terms:stops]), *numbers[stops:])

    @property
    def stop_reason(self) -> StopReason | None:
        """Why to stop; None if no rank wants to."""
        return StopRequests.decide(self.stop_requests)


class EvaluationVotes:
    """The votes on each batch of an evaluation during training: does a rank want to stop, or could it not read the batch?"""

    def __init__(self, control: Control, stops: StopRequests, end_without_data: Callable[[Exception | None], None]) -> None:
        self._control, self._stops, self._end_without_data = control, stops, end_without_data
        self.reason: StopReason | None = None
        """why to stop; None if no rank wants to"""

    def stop_requested(self) -> bool:
        """Whether this rank has to stop now."""
        return self._stops.any_requested()

    def cast(self, error: Exception | None) -> None:
        """Start summing the votes on a batch; `error`: why this rank could not read it."""
        self._error = error
        self._pending = self._control.sum([*self._stops.votes(), float(error is not None)])

    def interrupted(self) -> bool:
        """Wait for all votes: whether a rank wants to stop. UserError if one could not read its batch."""
        *requests, failed = self._pending.wait()
        if failed:
            self._end_without_data(self._error)
        self.reason = StopRequests.decide(requests)
        return self.reason is not None
