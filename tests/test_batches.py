"""The stream of samples: what a step reads follows from its number alone."""

import itertools
import math
import os
import random
import signal
import tracemalloc
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from trainer.command_line.sections import Run
from trainer.data import loader, stream
from trainer.data.seeding import hash32
from trainer.data.stream import EvaluationOrder, TrainingOrder, sample_numbers, share, shuffled
from trainer.errors import LOST, UserError

CPU = torch.device("cpu")


def read(order: TrainingOrder, count: int) -> list[list[int]]:
    return list(itertools.islice(iter(order), count))


def order(
    batch_size: int, length: int | None, rank: int = 0, processes: int = 1, first: int = 0, seed: int = 3
) -> TrainingOrder:
    return TrainingOrder(batch_size, rank, processes, seed, length, first)


def epoch_order(seed: int, epoch: int, length: int) -> np.ndarray:
    return sample_numbers(range(epoch * length, (epoch + 1) * length), seed, length) - epoch * length


def test_an_epoch_is_a_permutation() -> None:
    for length in (*range(1, 70), 99, 100, 101, 1000, 10_007):
        for epoch in range(3):
            assert sorted(epoch_order(5, epoch, length).tolist()) == list(range(length))
    order = epoch_order(5, 0, 1000)
    assert (order != np.arange(1000)).mean() > 0.9
    assert (order != epoch_order(5, 1, 1000)).mean() > 0.9
    assert (order != epoch_order(6, 0, 1000)).mean() > 0.9


@pytest.mark.parametrize("length", [5, 8, 37])
def test_no_item_prefers_a_place_and_no_item_another_after_it(length: int) -> None:
    epochs = 4000
    orders = sample_numbers(range(epochs * length), 7, length).reshape(epochs, length) % length
    places = np.array([np.bincount(column, minlength=length) for column in orders.T])
    steps = np.bincount((np.diff(orders) % length).ravel(), minlength=length)[1:]
    for counts, freedom in ((places, (length - 1) ** 2), (steps, length - 2)):
        chi_squared = float(((counts - counts.mean()) ** 2 / counts.mean()).sum())
        assert chi_squared < freedom + 4 * math.sqrt(2 * freedom) + 4  # far outside with p < 1e-4


def test_the_order_is_the_same_for_ever() -> None:
    """A run that is resumed by another version of numpy goes on with the same data."""
    assert hash32(1, 2, 3) == 3066602209
    assert epoch_order(42, 0, 8).tolist() == [5, 4, 6, 3, 0, 2, 1, 7]
    assert shuffled(np.arange(3), np.arange(3, dtype=np.uint64), 10**12).tolist() == [508323523607, 483547150955, 263768673981]


def test_each_item_once_per_epoch_and_its_number_gives_the_epoch() -> None:
    length, epochs = 37, 4
    numbers = sample_numbers(range(length * epochs), 9, length).tolist()
    assert len(set(numbers)) == len(numbers)
    for epoch in range(epochs):
        part = numbers[epoch * length : (epoch + 1) * length]
        assert {n // length for n in part} == {epoch}
        assert sorted(n % length for n in part) == list(range(length))


def test_an_endless_stream_is_read_in_order() -> None:
    assert sample_numbers(range(5, 9), 9, None).tolist() == [5, 6, 7, 8]
    assert read(order(4, None, rank=1, processes=2, first=2), 2) == [[10, 11], [14, 15]]


@pytest.mark.parametrize("processes", [2, 3, 5, 11, 12])
@pytest.mark.parametrize("length", [5, 12, 50, None])
def test_the_processes_together_read_the_micro_batch_of_one(processes: int, length: int | None) -> None:
    alone = read(order(12, length), 20)
    parts = [read(order(12, length, rank, processes), 20) for rank in range(processes)]
    assert [list(itertools.chain(*rows)) for rows in zip(*parts, strict=True)] == alone


def test_accumulation_only_cuts_the_stream_otherwise() -> None:
    whole = list(itertools.chain(*read(order(8, 30), 12)))
    assert list(itertools.chain(*read(order(2, 30), 48))) == whole
    assert list(itertools.chain(*read(order(4, 30), 24))) == whole


def test_a_resumed_stream_goes_on_where_it_was() -> None:
    assert read(order(8, 30, first=7), 20) == read(order(8, 30), 27)[7:]


def test_a_huge_set_and_a_place_far_into_a_run_cost_nothing() -> None:
    """10^12 items, which as an array would take 8 TB; and the 10^9th epoch of a small set."""
    tracemalloc.start()
    try:
        huge = read(order(8, 10**12, first=10**13 // 8 - 2), 4)
        late = read(order(8, 1000, first=10**12 // 8), 1)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    assert [n // 10**12 for n in itertools.chain(*huge)] == [9] * 16 + [10] * 16
    assert {n // 1000 for n in late[0]} == {10**9}


def test_batches_run_through_the_border_of_epochs() -> None:
    batches = read(order(4, 6), 6)
    assert {len(batch) for batch in batches} == {4}
    assert [n // 6 for n in batches[1]] == [0, 0, 1, 1]


def test_a_set_smaller_than_a_batch_works() -> None:
    batch = read(order(8, 3), 2)[0]
    assert [n // 3 for n in batch] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert sorted(n % 3 for n in batch[:3]) == [0, 1, 2]


@pytest.mark.parametrize("batch", [1, 5, 8, 12, 97])
def test_shares_differ_by_one_sample_at_most(batch: int) -> None:
    for processes in range(1, batch + 1):
        shares = [share(batch, rank, processes) for rank in range(processes)]
        assert list(itertools.chain(*shares)) == list(range(batch))
        assert {len(places) for places in shares} <= {batch // processes, -(-batch // processes)}


def test_more_processes_than_samples_are_refused() -> None:
    with pytest.raises(UserError, match=r"batch_size 3 does not reach for 4 processes; use 3 processes at most") as caught:
        share(3, 0, 4)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------------- evaluation


def test_evaluation_reads_every_sample_once_in_the_same_number_of_batches() -> None:
    for length, batch, processes in itertools.product([1, 2, 3, 7, 8, 9, 16, 33], [1, 2, 3, 8, 64], [1, 2, 3, 4, 8]):
        ranks = [EvaluationOrder(length, batch, rank, processes) for rank in range(processes)]
        assert len({len(rank) for rank in ranks}) == 1
        own = []
        for rank in ranks:
            assert len(rank) == len(list(rank)) == len(list(rank.counts))
            for numbers, count in zip(rank, rank.counts, strict=True):
                assert numbers, "every process takes part in every forward"
                assert all(0 <= n < length for n in numbers)
                assert count in (len(numbers), 0)
                own += numbers[:count]
        assert sorted(own) == list(range(length)), (length, batch, processes)


def test_evaluation_batches_are_no_larger_than_training_ones() -> None:
    for rank in range(4):
        assert max(map(len, EvaluationOrder(100, 8, rank, 4))) == 2
    assert [len(b) for b in EvaluationOrder(10, 8, 0, 1)] == [8, 2]


# ------------------------------------------------------------------------------------------------------------- loader


@dataclass
class Squares:
    """Item n is n²; every batch also holds the requested numbers."""

    length: int = 23

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        requested = torch.tensor(numbers)
        return {"number": requested, "square": (requested % self.length) ** 2}


def loaded(workers: int, count: int = 9) -> list[dict[str, torch.Tensor]]:
    reader = loader.read(Squares(), order(5, 23), Run(num_workers=workers), CPU)
    try:
        return [next(reader) for _ in range(count)]
    finally:
        loader.close(reader)


def test_workers_change_no_batch_and_nothing_draws_from_the_global_generators() -> None:
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone, helped = loaded(0), loaded(2)
    for one, two, numbers in zip(alone, helped, read(order(5, 23), 9), strict=True):
        assert torch.equal(one["number"], two["number"])
        assert torch.equal(one["square"], two["square"])
        assert one["number"].tolist() == numbers
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]


@dataclass
class Failing(Squares):
    """The worker that is to read sample `sample` sends itself a signal before."""

    number: signal.Signals = signal.SIGSTOP

    def __getitems__(self, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        if 7 in numbers:
            os.kill(os.getpid(), self.number)
        return super().__getitems__(numbers)


def failing(number: signal.Signals, minutes: float, stop_requested: Callable[[], bool]) -> tuple[type, str, int | None]:
    """(what, its text, its exit code) that reading on ends with; the workers are gone then."""
    reader = loader.read(
        Failing(number=number), EvaluationOrder(23, 4, 0, 1), Run(num_workers=1, timeout_minutes=minutes), CPU, stop_requested
    )
    workers = list(reader._iterator._workers)  # type: ignore[attr-defined]
    try:
        with pytest.raises((loader.StopWaiting, UserError)) as caught:
            list(reader)
    finally:
        loader.close(reader)
    assert not any(worker.is_alive() for worker in workers)
    return caught.type, str(caught.value), getattr(caught.value, "exit_code", None)


def test_a_worker_that_hangs_or_is_killed_holds_nobody_up_and_is_no_bad_data() -> None:
    assert failing(signal.SIGSTOP, 60.0, lambda: True)[0] is loader.StopWaiting
    kind, text, code = failing(signal.SIGSTOP, 0.01, lambda: False)
    assert (kind, code) == (UserError, LOST)
    assert text.startswith("no batch for 0.009 minutes")
    kind, text, code = failing(signal.SIGKILL, 60.0, lambda: False)
    assert (kind, code) == (UserError, LOST)
    assert text.startswith("a data worker was killed")


def test_the_loader_reads_evaluation_to_its_end() -> None:
    reader = loader.read(Squares(), EvaluationOrder(23, 8, 0, 1), Run(num_workers=0), CPU)
    assert torch.cat([batch["number"] for batch in reader]).tolist() == list(range(23))


def test_a_set_on_the_device_is_called_here_with_the_same_numbers() -> None:
    dataset = Squares()
    moved: list[torch.device] = []
    dataset.on_device, dataset.to = True, moved.append  # type: ignore[attr-defined]
    reader = loader.read(dataset, order(5, 23), Run(num_workers=2), CPU)
    assert moved == [CPU]
    assert [next(reader)["number"].tolist() for _ in range(6)] == read(order(5, 23), 6)
    loader.close(reader)


# --------------------------------------------------------------------------------------------------------------- seeds


def test_hashes_of_neighbours_do_not_collide() -> None:
    seen = {hash32(seed, step, rank) for seed in range(4) for step in range(2000) for rank in range(4)}
    assert len(seen) >= 4 * 2000 * 4 - 2  # 32,000 draws from 2^32: a collision is expected in one run of eight
    assert all(0 <= value < 2**32 for value in seen)
    assert hash32(1, 23) != hash32(12, 3)
    assert hash32(1, 2) != hash32(2, 1)
    assert hash32("order", 1) != hash32(1)


def test_hashes_are_spread_over_all_32_bits() -> None:
    values = np.array([hash32(0, step, 0) for step in range(4000)], dtype=np.uint64)
    for bit in range(32):
        assert 0.45 < float(((values >> np.uint64(bit)) & np.uint64(1)).mean()) < 0.55


def test_the_batch_arithmetic_is_printed() -> None:
    text = "\n".join(stream.describe(8, 4, 2, 100, 1600))
    for part in (
        "4 samples x 2 processes x 4 accumulation = 32",
        "100 optimizer steps",
        "3,200 samples",
        "2.00 epochs of 1,600",
    ):
        assert part in text
    assert "2 or 3 samples x 3 processes x 1 accumulation = 8" in "\n".join(stream.describe(8, 1, 3, 100, None))
    assert "epochs" not in "\n".join(stream.describe(8, 1, 1, 100, None))
