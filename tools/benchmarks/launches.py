"""One curve under several launches, on top of each other: trains a small GPT-2 under each, kills one in the middle, draws.

`python tools/benchmark.py launches --out docs/launches.png`: CPUs and gloo, no network, some ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fault_injector import ROOT, Started, command, environment, kill_at_moment, reached

from trainer.reporting.plot import curve, new_figure, save_figure
from trainer.reporting.trackers import read_metrics

LAUNCHES = {
    "one": "one process",
    "ddp": "DDP, 2 processes",
    "ddp:3": "DDP, 3 processes, killed (kill -9) in the middle and started again",
    "zero2": "DeepSpeed ZeRO-2, 2 processes",
    "zero3": "DeepSpeed ZeRO-3, 2 processes",
    "fsdp": "FSDP2, 2 processes",
    "hsdp": "HSDP, 2 replicas of 2 shards",
}
KILLED = "ddp:3"
TIMEOUT_SECONDS = 1800.0


def main(arguments: Sequence[str]) -> None:
    """Print for each launch the largest relative difference from the losses of one process, and draw the curves."""
    parser = argparse.ArgumentParser(prog="benchmark launches", description=__doc__)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--out", type=Path, default=Path("launches.png"))
    flags = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        losses = {kind: train(kind, flags.steps, Path(folder, kind.replace(":", "x"))) for kind in LAUNCHES}
    for kind, values in losses.items():
        furthest = max(abs(a / b - 1) for a, b in zip(values, losses["one"], strict=True))
        print(f"{LAUNCHES[kind]}: {furthest:.1e} of the loss at most")
    draw(losses, flags.out)
    print(flags.out)


def train(kind: str, steps: int, directory: Path) -> list[float]:
    """The training loss of every step. The launch KILLED is killed halfway, and its command given again."""
    argv = ["--preset", "quick", "--device", "cpu", "--d_model", "64", "--num_layers", "2", "--batch_size", "12"]
    argv += ["--max_steps", str(steps), "--save_every", str(steps // 8), "--eval_every", "0", "--eval_epochs", "0"]
    argv += ["--log_every", "1", "--no_use_tensorboard", "--output_dir", str(directory)]
    launch, log = command(kind, ROOT / "recipes" / "gpt2_wikitext.py", *argv), directory.with_suffix(".log")
    if kind == KILLED:
        process = Started(launch, log, environment())
        killed = kill_at_moment(process, directory, reached(steps // 2), TIMEOUT_SECONDS)
        process.kill_all()
        assert killed, log.read_text()[-2000:]
    process = Started(launch, log, environment())
    try:
        code = process.wait(TIMEOUT_SECONDS)
    finally:
        process.kill_all()
    assert code == 0, log.read_text()[-2000:]
    return curve(read_metrics(directory / "metrics.jsonl"), "train/loss")[1]


def draw(losses: dict[str, list[float]], out: Path) -> None:
    """Draw the curves on top of each other, each narrower than the one below, so that all can be seen where they coincide."""
    from matplotlib import colormaps

    figure = new_figure(8, 4.5)
    axis = figure.subplots()
    for number, (kind, values) in enumerate(losses.items()):
        width = 1.4 * (len(losses) - number) - 0.6
        axis.plot(range(1, len(values) + 1), values, linewidth=width, color=colormaps["tab10"](number), label=LAUNCHES[kind])
    axis.set(xlabel="optimizer step", ylabel="training loss (nats per token)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, frameon=False)
    save_figure(figure, out)
