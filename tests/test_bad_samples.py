"""Samples that cannot be read: with `--bad_samples skip` the next one of the same epoch takes the place, whoever reads it."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Sequence

import pytest
import torch

from trainer.command_line.sections import Run
from trainer.data.bad_samples import MOST_IN_A_ROW, REPLACED, NextReadable, first_batch, reading_failed, reason_of
from trainer.data.loader import close, read
from trainer.data.stream import TrainingOrder
from trainer.errors import BAD_INPUT, LOST, UserError


class Rows:
    """Sample s is the number s; some rows raise."""

    def __init__(self, length: int, errors: dict[int, Exception]) -> None:
        self.length, self.errors = length, errors

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        for number in numbers:
            if number % self.length in self.errors:
                raise self.errors[number % self.length]
        return {"number": torch.tensor(numbers)}


BAD = {3: OSError("three\nis damaged"), 4: ValueError("four"), 9: OSError("nine")}


def test_the_next_readable_sample_of_the_same_epoch_is_read_and_the_bad_one_named() -> None:
    rows = NextReadable(Rows(10, BAD))
    batch = rows.__getitems__([3, 5, 14, 29])
    assert batch["number"].tolist() == [5, 5, 15, 20]  # after the last of an epoch comes its first
    assert batch[REPLACED] == ["sample 3: three is damaged", "sample 14: four", "sample 29: nine"]
    assert set(rows.__getitems__([5, 6])) == {"number"}
    for number in (3, 5, 14, 29):
        assert rows.__getitems__([number])["number"] == batch["number"][[3, 5, 14, 29].index(number)]


def test_any_number_of_processes_and_workers_reads_the_same() -> None:
    def first(rank: int, processes: int, workers: int) -> list[dict[str, torch.Tensor]]:
        order = TrainingOrder(4, rank, processes, seed=5, length=10, first_micro_batch=0)
        reader = read(Rows(10, BAD), order, Run(num_workers=workers, bad_samples="skip"), torch.device("cpu"))
        try:
            return list(itertools.islice(reader, 5))
        finally:
            close(reader)

    whole = first(0, 1, 0)
    assert sum(len(batch.get(REPLACED, [])) for batch in whole) == 6  # two epochs
    for parts in ([first(0, 1, 2)], [first(0, 2, 0), first(1, 2, 0)]):
        for step, batch in enumerate(whole):
            assert torch.equal(torch.cat([part[step]["number"] for part in parts]), batch["number"])
            assert [line for part in parts for line in part[step].get(REPLACED, [])] == batch.get(REPLACED, [])


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EMFILE, "Too many open files"), OSError(errno.ESTALE, "Stale file handle"), KeyError("a bug")],
    ids=lambda error: type(error).__name__ + str(error.args[0]),
)
def test_what_is_not_the_samples_fault_is_not_passed_over(error: Exception) -> None:
    wrapped = OSError("x.png cannot be read as an image")
    wrapped.__cause__ = error
    for raised in (error, wrapped) if isinstance(error, OSError) else (error,):
        with pytest.raises(type(raised)) as caught:
            NextReadable(Rows(10, {3: raised})).__getitems__([2, 3])
        assert caught.value is raised


def test_where_nothing_can_be_read_the_samples_are_not_blamed() -> None:
    gone = {i: FileNotFoundError(errno.ENOENT, "gone") for i in range(2 * MOST_IN_A_ROW)}
    for rows in (Rows(1000, gone), Rows(7, gone)):
        with pytest.raises(OSError, match=r"no sample from number 2 on can be read .*gone"):
            NextReadable(rows).__getitems__([2])


def test_a_batch_that_cannot_be_put_together_is_no_bad_sample() -> None:
    class Uneven(Rows):
        def __getitems__(self, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
            if len(numbers) > 1:
                raise ValueError("rows of unequal length")
            return super().__getitems__(numbers)

    with pytest.raises(ValueError, match="unequal"):
        NextReadable(Uneven(10, {})).__getitems__([1, 2])


class UnreadableRowError(OSError):
    """A class of some library."""


def test_what_a_data_worker_says_of_a_sample_is_its_line_not_its_traceback() -> None:
    for error in (OSError("three\nis damaged"), UnreadableRowError("Caught OSError: three is damaged"), KeyError("three")):
        reader = read(Rows(10, {3: error}), [[3]], Run(num_workers=1), torch.device("cpu"))
        try:
            with pytest.raises(type(error)) as caught:
                next(reader)
        finally:
            close(reader)
        assert "Traceback" in str(caught.value)
        assert reason_of(caught.value) == reason_of(error) == f"{type(error).__name__}: {' '.join(str(error).split())}"


def test_the_ways_on_are_those_of_what_failed() -> None:
    bad = reading_failed(OSError("row 7 is damaged"), 1, 3, Run())
    assert bad.exit_code == BAD_INPUT
    assert str(bad).startswith("reading data failed on rank 1: OSError: row 7 is damaged. Step 3 is saved; the same command")
    assert "--bad_samples skip" in str(bad)
    assert "--data_changed accept" in str(bad)
    assert "--bad_samples" not in str(reading_failed(OSError("x"), 1, 3, Run(bad_samples="skip")))
    for error in (reading_failed(OSError("x"), 1, None, Run()), reading_failed(KeyError("a bug"), 1, None, Run())):
        assert "saved" not in str(error)
        assert "accept" not in str(error)
    # A killed worker says nothing about the data.
    killed = reading_failed(UserError("a data worker was killed", LOST), 0, 3, Run())
    assert (str(killed), killed.exit_code) == ("reading data failed on rank 0: a data worker was killed. Step 3 is saved", LOST)


def test_a_bad_first_sample_is_a_message() -> None:
    with pytest.raises(UserError, match=r"^reading data failed: OSError: three is damaged; mend the data$"):
        first_batch(Rows(10, BAD), [3], Run())
    assert first_batch(Rows(10, BAD), [3], Run(bad_samples="skip"))["number"].tolist() == [5]
