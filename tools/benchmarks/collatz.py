"""Microseconds per number of the Collatz generator on one core, beside Python's integers and the training step it feeds."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from recipes.collatz import Collatz, Config, next_token_loss, stopping_loss
from recipes.data.collatz import KINDS, NORMAL, CollatzStream, Layout
from recipes.data.trajectories import from_words, trajectory
from recipes.models.collatz import predict_batch
from trainer.recipe import Data


def main(arguments: list[str]) -> None:
    """Batches of the default settings (512 numbers, half of them above 2^68, 500 parities) on one core; rounds interleaved."""
    parser = argparse.ArgumentParser(prog="benchmark.py collatz", description=main.__doc__)
    parser.add_argument("--batch_size", type=int, default=512, help="numbers of a generated batch")
    parser.add_argument("--step_batch_size", type=int, default=16, help="numbers of the training step that is timed")
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args(arguments)
    torch.set_num_threads(1)
    config = Config()
    layout = Layout.of(config.model)
    streams = {"half normal, half hard": CollatzStream(0, 10, 0.5, 0, layout), "all hard": CollatzStream(0, 10, 1.0, 0, layout)}
    network = Collatz().build_model(config, Data(None, {})).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    mixed = streams["half normal, half hard"]
    batch = mixed.__getitems__(range(flags.step_batch_size))
    words, kinds = mixed.draw(range(400))
    numbers = from_words(words)

    def step() -> None:
        stopping, logits = predict_batch(network, batch)
        loss = stopping_loss(stopping, batch).sum() / batch["scored"].sum() + next_token_loss(logits, batch).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def generate(stream: CollatzStream) -> Callable[[], None]:
        def batches() -> None:
            for first in range(0, 100 * flags.batch_size, flags.batch_size):
                stream.__getitems__(range(first, first + flags.batch_size))

        return batches

    # {name: (work, how many Collatz numbers it handles)}
    timed: dict[str, tuple[Callable[[], object], int]] = {
        name: (generate(stream), 100 * flags.batch_size) for name, stream in streams.items()
    }
    timed["Python"] = (lambda: [trajectory(n, layout.max_len) for n in numbers], len(numbers))
    timed["step"] = (step, flags.step_batch_size)
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for number in range(flags.rounds + 1):
        for name, (work, count) in timed.items():
            started = time.perf_counter()
            work()
            if number:  # the first round compiles
                seconds[name].append((time.perf_counter() - started) / count)
    micros = {name: 1e6 * statistics.median(values) for name, values in seconds.items()}
    print(f"one core, batches of {flags.batch_size}, median of {flags.rounds} interleaved rounds")
    for name in streams:
        print(f"generator and batch assembly, {name}: {micros[name]:.3f} microseconds per number (goal 0.6)")
    hard = sum(kind != NORMAL for kind in kinds)
    print(
        f"Python integers ({hard} of {len(numbers)} hard; {', '.join(KINDS)}): {micros['Python']:.1f} microseconds per number"
    )
    share = 100 * micros["half normal, half hard"] / micros["step"]
    print(
        f"training step at the default sizes (on {flags.step_batch_size} numbers): {micros['step']:.0f} microseconds per number"
    )
    print(f"the generator is {share:.4f} % of that step (goal below 5 %)")
