"""What the ranks tell each other before each step, or batch of an evaluation, while the one before is still computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from trainer.distributed.control import Control
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


class EvaluationVotes:
    """On each batch of an evaluation during training: whether a rank wants to stop, or could not read it."""

    def __init__(self, control: Control, stops: StopRequests, end_without_data: Callable[[Exception | None], None]) -> None:
        self._control, self._stops, self._end_without_data = control, stops, end_without_data
        self.reason: StopReason | None = None
        """why to stop, if a rank wants to"""

    def cast(self, error: Exception | None) -> None:
        """Send off this rank's vote on a batch that it has read, or on the error that came in its place."""
        self._error = error
        self._pending = self._control.sum([*self._stops.votes(), float(error is not None)])

    def interrupted(self) -> bool:
        """Whether to end the evaluation, by the votes of all ranks; a UserError where data cannot be read."""
        *requests, failed = self._pending.wait()
        if failed:
            self._end_without_data(self._error)
        self.reason = StopRequests.decide(requests)
        return self.reason is not None
