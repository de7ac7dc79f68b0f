"""Operations and time of a training step of N regression PFNs as one stacked network, beside N separate ones.

python tools/benchmark.py stacked [--models 16] [--batch 1024] [--examples 64] [--steps 5] [--bf16] [--compile]

The default batch is 1,024 sequences on a GPU and 32 on a CPU, where 16 models at 1,024 would take over 24 GiB.

A step is the trainer's: generate data, forward, backward, gradient norm, Adam. Operations are those that PyTorch dispatches in
it; views and allocations, which start nothing on the device, are counted apart. With --compile the timed steps are compiled,
but not the counted ones.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from recipes.pfn_raventos import PFNRaventos
from trainer.backends.plain import PlainBackend
from trainer.checkpoints.network import build_network
from trainer.command_line import config as configuration
from trainer.distributed.launch import Launch, connect
from trainer.evaluation.objective import Objective

NO_KERNEL = ("detach", "_unsafe_view", "lift_fresh", "empty", "new_empty", "empty_strided", "new_empty_strided", "empty_like")


class Operations(TorchDispatchMode):
    """Counts the operations dispatched while it is active, including those of the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.others: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the operation, then run it."""
        name = func.overloadpacket.__name__
        no_kernel = func.is_view or name in NO_KERNEL or func.namespace == "profiler"
        (self.others if no_kernel else self.kernels)[name] += 1
        return func(*args, **(kwargs or {}))


def stepper(argv: list[str], launch: Launch, bf16: bool, compiled: bool) -> Callable[[int], None]:
    """A function that takes the training step of a number, on its sequences, of a run with the flags `argv`."""
    recipe = PFNRaventos()
    config = configuration.parse(recipe.config_class, recipe.presets, argv, recipe.name).config
    data = recipe.build_data(config)
    network = build_network(recipe, config, data)
    data.train.to(launch.device)
    batch_size = config.optimisation.batch_size
    counts = recipe.items(data.train.__getitems__(range(batch_size)))
    objective = Objective(network, recipe, list(counts))
    precision = "bf16" if bf16 else "no"
    backend = PlainBackend(launch, precision, precision, config.optimisation)
    if compiled:
        backend.compile(objective, "default")
    backend.prepare(objective, network, lambda: recipe.optimizer(network, config))
    scale = torch.tensor([1.0 / n for n in counts.values()], device=launch.device)

    def step(number: int) -> None:
        batch = data.train.__getitems__(range(number * batch_size, (number + 1) * batch_size))
        backend.backward(backend.model(batch), scale)
        backend.step(1e-4)

    return step


def count_operations(step: Callable[[int], None]) -> Operations:
    """The operations of the second step, since the first may do more."""
    step(0)
    with Operations() as operations:
        step(1)
    return operations


def main(arguments: list[str]) -> None:
    """Print both counts, and the median times of interleaved steps."""
    parser = argparse.ArgumentParser("benchmark.py stacked", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--models", type=int, default=16)
    parser.add_argument("--batch", type=int, help="sequences of a step (1024 on a GPU, 32 on a CPU)")
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each (0: count only)")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args(arguments)
    launch = connect("auto", timeout_minutes=1.0)
    device = launch.device
    options.batch = options.batch or (1024 if device.type == "cuda" else 32)
    pools = [str(2**i) for i in range(options.models)]

    def build_step(*flags: str, batch: int = options.batch, compiled: bool = False) -> Callable[[int], None]:
        argv = [*flags, "--batch", str(batch), "--examples", str(options.examples)]
        return stepper(argv, launch, options.bf16, compiled)

    small = min(8, options.batch)  # the number of operations does not depend on it
    one, all_at_once = (
        count_operations(build_step("--num_tasks", pools[-1], batch=small)),
        count_operations(build_step("--stack", *pools, batch=small)),
    )
    print(f"operations of a step that start work on the device (and views, allocations), {device.type}, bf16 {options.bf16}:")
    for name, operations, times in (
        ("one model", one, 1),
        (f"{options.models} separate", one, options.models),
        (f"{options.models} stacked", all_at_once, 1),
    ):
        print(f"  {name:14}{times * operations.kernels.total():6,} ({times * operations.others.total():,})")
    if not options.steps:
        return
    steps = {"one model": build_step("--num_tasks", pools[-1], compiled=options.compile)}
    steps[f"{options.models} stacked"] = build_step("--stack", *pools, compiled=options.compile)
    times_ms: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(options.steps + 2):
        for name, step in steps.items():
            _wait(device)
            started = time.perf_counter()
            step(number)
            _wait(device)
            if number >= 2:  # the first ones compile and warm up
                times_ms[name].append(1000 * (time.perf_counter() - started))
    medians = {name: statistics.median(values) for name, values in times_ms.items()}
    print(
        f"ms per step, {options.batch} sequences of {options.examples}, compile {options.compile}, median of {options.steps}:"
    )
    for name, value in medians.items():
        print(f"  {name:14}{value:10.2f}  (from {min(times_ms[name]):.2f} to {max(times_ms[name]):.2f})")
    print(f"  {options.models} in turn   {options.models * medians['one model']:8.2f}  (the first, times {options.models})")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
