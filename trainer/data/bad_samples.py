"""Samples that cannot be read: with `--bad_samples skip` each is replaced by the next readable one, and named."""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from typing import Any

from trainer.command_line.sections import Run
from trainer.data.stream import length_of
from trainer.errors import BAD_INPUT, UserError, one_line

REPLACED = "replaced samples"
"""key of a batch: a line for each unreadable sample that another one replaces"""
MOST_IN_A_ROW = 100  # if more consecutive samples are unreadable, the cause is a missing disk or folder, not the samples
# Errors of the process or the server, not of the sample: another attempt may succeed, so replacing it would change the curve.
PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT)


def is_bad_sample(error: Exception | None) -> bool:
    """Whether an error of a data set means an unreadable sample: a ValueError, or an OSError that is not PASSING."""
    number = getattr(error, "errno", None) or getattr(getattr(error, "__cause__", None), "errno", None)
    return isinstance(error, ValueError | OSError) and number not in PASSING


def reason_of(error: Exception) -> str:
    """Class and text of an error in one line, without the traceback that torch adds to an error of a data worker."""
    name, text = type(error).__name__, str(error)
    if text.startswith(f"Caught {name} in "):
        text = re.split(rf"^(?:\w+\.)*{name}: ", text, flags=re.MULTILINE)[-1]
    return f"{name}: {one_line(ValueError(text), 600)}"


def reading_failed(error: Exception, rank: int, saved_step: int | None, run: Run) -> UserError:
    """The error that ends a run whose data cannot be read, with what to do. `saved_step`: the current step if it is saved."""
    ways = [] if saved_step is None else [f"Step {saved_step:,} is saved"]
    if isinstance(error, UserError):  # it says itself what to do
        what, code = one_line(error, 600), error.exit_code
    else:
        what, code = reason_of(error), BAD_INPUT
        ways.append("the same command goes on once the data are as before")
        if is_bad_sample(error) and run.bad_samples == "stop":
            ways.append("with --bad_samples skip it takes the next sample instead")
        if saved_step is not None:
            ways.append("with --data_changed accept it goes on with changed data")
    return UserError(". ".join(filter(None, [f"reading data failed on rank {rank}: {what}", "; ".join(ways)])), code)


def guarded(dataset: Any, run: Run) -> Any:
    """`dataset`; with `--bad_samples skip` in a wrapper that replaces unreadable samples."""
    if run.bad_samples == "stop" or getattr(dataset, "on_device", False):
        return dataset
    return NextReadable(dataset)


def first_batch(dataset: Any, numbers: Sequence[int], run: Run, way_on: str = "mend the data") -> Any:
    """A batch, read in this process. UserError, ending with `way_on`, if it cannot be read."""
    try:
        batch = guarded(dataset, run).__getitems__(numbers)
    except (ValueError, OSError) as error:
        raise UserError(f"reading data failed: {reason_of(error)}; {way_on}") from error
    return {name: value for name, value in batch.items() if name != REPLACED}


class NextReadable:
    """A data set in which an unreadable sample is replaced by the next readable one of the same epoch.

    Which one that is depends on the sample's number alone, so it is the same on any number of processes and workers.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset, self.length = dataset, length_of(dataset)

    def __getitems__(self, numbers: Sequence[int]) -> dict[str, Any]:
        try:
            return self.dataset.__getitems__(numbers)
        except (ValueError, OSError) as error:
            if not is_bad_sample(error):
                raise
            lines: list[str] = []
            readable = [self._readable(int(number), lines) for number in numbers]
            if not lines:  # each sample can be read alone: it is the batch that cannot be made
                raise
        return {**self.dataset.__getitems__(readable), REPLACED: lines}

    def _readable(self, number: int, lines: list[str]) -> int:
        """`number` if it can be read, else the number of the sample that replaces it, for which a line is added to `lines`.

        OSError if none of the next MOST_IN_A_ROW samples, or none of the epoch, can be read.
        """
        candidate = number
        first_error: Exception | None = None
        for _ in range(min(MOST_IN_A_ROW, self.length or MOST_IN_A_ROW)):
            try:
                self.dataset.__getitems__([candidate])
            except (ValueError, OSError) as error:
                if not is_bad_sample(error):
                    raise
                first_error = first_error or error
                candidate = self._after(candidate)
                continue
            if first_error:
                lines.append(f"sample {number:,}: {one_line(first_error, 300)}")
            return candidate
        assert first_error is not None
        raise OSError(f"no sample from number {number:,} on can be read ({one_line(first_error, 300)})")

    def _after(self, number: int) -> int:
        """The next number, within the epoch of a finite set."""
        return number + 1 if self.length is None else number - number % self.length + (number + 1) % self.length
