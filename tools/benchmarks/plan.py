"""The memory of a process that `--plan` predicts, beside that of real steps on this CPU, by launch.

python tools/benchmark.py plan --launches one ddp fsdp zero2 zero3 --context 512 --more --gradient_checkpointing

Measured is the peak of anonymous memory during steps of a run whose optimizer has moments, minus that of a process that has
only imported everything.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.memory import SIZES, arguments_of, measure

NAMES = {"one": "one process", "ddp": "DDP", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp": "FSDP2"}


def main(arguments: Sequence[str]) -> None:
    """Print a line for each launch: the planned MB of a process, and those measured in the process that took the most."""
    parser = argparse.ArgumentParser(prog="benchmark plan", description=__doc__)
    parser.add_argument("--parameters", type=int, default=100, choices=SIZES, help="in millions")
    parser.add_argument("--context", type=int, default=512, help="tokens of a sample")
    parser.add_argument("--launches", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="flags of the recipe")
    flags = parser.parse_args(arguments)
    print(f"{'launch':12}{'planned':>10}{'of it activations':>20}{'measured':>10}{'error':>8}   [MB]")
    for kind in flags.launches:
        with tempfile.TemporaryDirectory() as folder:
            argv = [*arguments_of(flags.parameters, flags.context, Path(folder)), *flags.more]
            device, activations = planned(kind, argv)
            measured = max(measure(kind, argv, Path(folder))["training"])
        print(f"{kind:12}{device:10,.0f}{activations:20,.0f}{measured:10,.0f}{device / measured - 1:8.1%}", flush=True)


def planned(kind: str, argv: Sequence[str]) -> tuple[float, float]:
    """(planned memory of a process on its device, the part of it that is activations), in MB."""
    from fault_injector import processes_of

    from recipes.tinystories_lm import TinyStoriesLM
    from trainer.command_line import config as configuration
    from trainer.planning.memory import memory_of, strategies
    from trainer.planning.plan import measure as measure_shapes

    recipe = TinyStoriesLM()
    config = configuration.parse(recipe.config_class, recipe.presets, argv, recipe.name).config
    strategy = next(s for s in strategies(processes_of(kind)) if s.name == NAMES[kind])
    memory = memory_of(strategy, measure_shapes(recipe, config, recipe.build_data(config), strategy, "no", on_gpu=False).net)
    return memory.device / 1e6, memory.activations / 1e6
