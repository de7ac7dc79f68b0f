"""The overhead of training loops per step: ours, a bare one, and those of Accelerate, Fabric and transformers' Trainer.

python tools/benchmark.py loop [--rounds 30] [--steps 100]

Every loop trains the same tiny language model on the same batches, with the same fused AdamW and clipping, so that only the
loop differs. They take turns, round by round, so that a slow moment affects all alike; `bare again` shows the difference of two
equal loops, which is noise. Counts of operations and Python calls do not depend on the machine. Fabric needs
`lightning-fabric`.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.gpu_pieces.contenders import Contender, Steps, interleave
from benchmarks.gpu_pieces.hf_trainer import HfTrainerLoop
from benchmarks.gpu_pieces.language import gpt2
from benchmarks.gpu_pieces.overhead import profiled
from benchmarks.gpu_pieces.results import ResultFile
from benchmarks.gpu_pieces.sessions import OurLoop, Place, bare_loop, connected
from trainer.checkpoints.network import build_network
from trainer.data import loader, stream

COUNTED_STEPS = 10


def main(arguments: list[str]) -> None:
    """Print a table: microseconds of a step, how many of them above the bare loop, operations and Python calls."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py loop", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=100, help="in each round")
    flags = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = Place(connected(True), Path(folder), ResultFile(Path(folder, "results.json")), rehearse=True)
        makers = contenders(place)
        measured = interleave(makers, place.device, flags.rounds, flags.steps, warmup=20, required="ours")
        counts = {name: counted(makers[name]()) for name in measured.seconds}
    bare = measured.median("bare")
    print(f"{'us a step':14} {'median':>8} {'above bare':>11} {'operations':>11} {'Python calls':>13}")
    for name in measured.seconds:
        above = bare * (1 / measured.ratio(name, "bare") - 1)
        own = counts[name]
        print(f"{name:14} {1e6 * measured.median(name):8.0f} {1e6 * above:11.0f} {own.operations:11.0f} {own.calls:13.0f}")
    print(*measured.notes(), sep="\n")


def contenders(place: Place) -> dict[str, Callable[[], Contender]]:
    """{name: function that makes the contender}."""
    recipe, config = gpt2(place, batch_size=2, compile="no")

    def hf_trainer() -> Contender:
        data = recipe.build_data(config)
        model = AnswersWithALoss(build_network(recipe, config, data), config.model.max_length)
        return HfTrainerLoop(model, config.model.max_length, 2, recipe.ids, place.new_folder(), place.device)

    return {
        "ours": lambda: OurLoop(recipe, config, place.launch, place.new_folder()),
        "bare": lambda: bare_loop(recipe, config, place.launch, compile_mode=None),
        "bare again": lambda: bare_loop(recipe, config, place.launch, compile_mode=None),
        "Accelerate": functools.partial(accelerate_loop, recipe, config),
        "Fabric": functools.partial(fabric_loop, recipe, config),
        "HF Trainer": hf_trainer,
    }


class AnswersWithALoss(nn.Module):
    """A GPT-2 of ours with the interface that transformers' Trainer expects."""

    def __init__(self, network: nn.Module, length: int) -> None:
        super().__init__()
        self.network, self.length = network, length

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """{"loss": mean cross entropy} of ids and labels, [batch, time] each."""
        return {"loss": self.network(input_ids, labels) / labels.numel()}


def parts(recipe: Any, config: Any) -> tuple[nn.Module, Any, Iterator[Any]]:
    """(network, optimizer, batches on the CPU) of a run."""
    data = recipe.build_data(config)
    network = build_network(recipe, config, data).train()
    order = stream.TrainingOrder(config.optimisation.batch_size, 0, 1, 0, stream.length_of(data.train), first_micro_batch=0)
    return network, recipe.optimizer(network, config), loader.read(data.train, order, config.run, torch.device("cpu"))


def accelerate_loop(recipe: Any, config: Any) -> Contender:
    """A loop written like Accelerate's examples."""
    from accelerate import Accelerator

    network, optimizer, batches = parts(recipe, config)
    accelerator = Accelerator(cpu=True)
    model, wrapped = accelerator.prepare(network, optimizer)

    def step() -> None:
        batch = next(batches)
        with accelerator.accumulate(model):
            loss = recipe.loss(model, batch)["next_token"] / recipe.items(batch)["next_token"]
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), config.optimisation.grad_clip)
            wrapped.step()
            wrapped.zero_grad()

    return Steps(step)


def fabric_loop(recipe: Any, config: Any) -> Contender:
    """A loop written like Fabric's examples. ModuleNotFoundError if it is not installed."""
    network, optimizer, batches = parts(recipe, config)
    fabric = importlib.import_module("lightning_fabric").Fabric(accelerator="cpu", devices=1)
    model, wrapped = fabric.setup(network, optimizer)

    def step() -> None:
        batch = next(batches)
        loss = recipe.loss(model, batch)["next_token"] / recipe.items(batch)["next_token"]
        fabric.backward(loss)
        fabric.clip_gradients(model, wrapped, max_norm=config.optimisation.grad_clip)
        wrapped.step()
        wrapped.zero_grad()

    return Steps(step)


class Counts(NamedTuple):
    """Counts per step."""

    operations: float
    """operations of torch (aten)"""
    reads: float
    """tensor values that the host reads"""
    calls: float
    """calls of Python functions"""


def counted(contender: Contender) -> Counts:
    """Count what a step of the contender does, then close it."""
    contender.run(5)
    averages = profiled(contender, torch.device("cpu"), COUNTED_STEPS)
    calls = itertools.count()

    def within() -> Any:
        return _CountingCalls(calls)

    contender.run(COUNTED_STEPS, within)
    contender.close()
    by_name = {event.key: event.count / COUNTED_STEPS for event in averages if event.key.startswith("aten::")}
    return Counts(sum(by_name.values()), by_name.get("aten::_local_scalar_dense", 0.0), next(calls) / COUNTED_STEPS)


class _CountingCalls:
    """Advances `calls` at each call of a Python function in this thread."""

    def __init__(self, calls: Iterator[int]) -> None:
        self.calls = calls

    def __enter__(self) -> None:
        sys.setprofile(lambda frame, event, argument: event == "call" and next(self.calls))

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
