"""`compare` of the Vision Transformer recipe: training with and without relative bias and absolute positions, over seeds."""

from __future__ import annotations

import json
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from trainer.command_line.bounds import NotNegative, Positive
from trainer.command_line.locations import Existing, ToMake
from trainer.command_line.sections import Device
from trainer.recipe import Log, Recipe
from trainer.reporting.plot import TITLE_CHARACTERS, new_figure, save_figure

if TYPE_CHECKING:
    from trainer.distributed.launch import Launch


# {position encoding: its flags}
VARIANTS = {
    "relative": ("--relative_position", "--no_absolute_position"),
    "relative + absolute": ("--relative_position", "--absolute_position"),
    "absolute": ("--no_relative_position", "--absolute_position"),
    "none": ("--no_relative_position", "--no_absolute_position"),
}


@dataclass(frozen=True)
class Compare:
    """Train with and without relative bias and absolute positions, over several seeds; one table, one plot.

    Each training is an ordinary run below `output_dir`. If interrupted, the same command continues.
    """

    preset: str = "compare"
    """of `train`, for every run"""
    config: Annotated[str | None, Existing] = None
    """a YAML file in place of the preset"""
    seeds: Annotated[int, Positive] = 3
    """runs of each variant"""
    first_seed: Annotated[int, NotNegative] = 42
    output_dir: Annotated[str, ToMake] = "runs/vit_relpos_comparison"
    device: Device = "auto"


@dataclass(frozen=True)
class Curve:
    """Validation accuracy of one run."""

    steps: list[int]
    accuracy: list[float]
    classes: int


def compare(recipe: Recipe, flags: Compare, launch: Launch, log: Log) -> None:
    """The `compare` sub-command: one run after another, each with all processes of the launch."""
    folder = Path(flags.output_dir)
    curves: dict[str, list[Curve]] = {variant: [] for variant in VARIANTS}
    for seed in range(flags.first_seed, flags.first_seed + flags.seeds):
        for variant in VARIANTS:
            path = folder / f"{variant.replace(' + ', '_and_')}_seed{seed}"
            log(f"----- positions: {variant}; seed {seed}")
            stop_reason = _train(recipe, flags, launch, variant, seed, path)
            if stop_reason is not None:
                log(f"Stopped ({stop_reason}) in {path}; the same command goes on with the comparison")
                return
            if launch.is_main:
                curves[variant].append(read_curve(path))
                log(f"{variant}, seed {seed}: validation top-1 {curves[variant][-1].accuracy[-1]:.2%} ({path})")
    if launch.is_main:
        for line in accuracy_table(curves):
            log(line)
        plot_curves(curves, folder / "plots" / "comparison.png", flags.config or flags.preset)
        log(f"Plot: {folder / 'plots' / 'comparison.png'}")
    launch.control.barrier()


def _train(recipe: Recipe, flags: Compare, launch: Launch, variant: str, seed: int, path: Path) -> str | None:
    """Train one run. Returns None if it is finished, otherwise why it was stopped."""
    from trainer.command_line import config
    from trainer.main import train
    from trainer.reporting.console import Console

    settings = ["--config", flags.config] if flags.config else ["--preset", flags.preset]
    argv = [*settings, *VARIANTS[variant], "--seed", str(seed), "--device", flags.device, "--output_dir", str(path)]
    argv += ["--wandb_group", path.parent.name]
    console = Console(None, launch.is_main)
    try:
        reason = train(recipe, config.parse(recipe.config_class, recipe.presets, argv, recipe.name), argv, launch, console)
    finally:
        console.close()
    return None if reason.finished else reason


def read_curve(run: Path) -> Curve:
    """The validation accuracy of a finished run, from its files."""
    from trainer.reporting.trackers import read_metrics

    rows = [row for row in read_metrics(run / "metrics.jsonl") if row.get("eval/val_accuracy") is not None]
    classes = json.loads((run / "checkpoints" / "checkpoint_final" / "classes.json").read_text(encoding="utf-8"))
    return Curve([row["step"] for row in rows], [row["eval/val_accuracy"] for row in rows], len(classes))


def accuracy_table(curves: Mapping[str, Sequence[Curve]]) -> list[str]:
    """A line for each variant: final validation accuracy of its runs, as mean, standard deviation and range."""
    lines = [f"{'positions':<20} {'runs':>4} {'top-1 mean':>11} {'std':>7} {'lowest':>8} {'highest':>8}"]
    for variant, runs in curves.items():
        final = [run.accuracy[-1] for run in runs]
        std = f"{statistics.stdev(final):>7.2%}" if len(final) > 1 else f"{'-':>7}"
        lines.append(
            f"{variant:<20} {len(final):>4} {statistics.mean(final):>11.2%} {std} {min(final):>8.2%} {max(final):>8.2%}"
        )
    chance = 1 / next(iter(curves.values()))[0].classes
    return [*lines, f"{'(guessing)':<20} {'':>4} {chance:>11.2%}"]


def plot_curves(curves: Mapping[str, Sequence[Curve]], out: Path, title: str) -> None:
    """Plot accuracy during training on the left, as mean and range over seeds; final accuracy of each run on the right."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(10, 4.6)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2), sharey=True)
    for column, (variant, runs) in enumerate(curves.items()):
        colour, steps = f"C{column}", sorted(set.intersection(*(set(run.steps) for run in runs)))  # patience ends some early
        by_step = [[run.accuracy[run.steps.index(step)] for run in runs] for step in steps]
        left.plot(steps, [statistics.mean(values) for values in by_step], color=colour, label=variant)
        left.fill_between(steps, [min(v) for v in by_step], [max(v) for v in by_step], color=colour, alpha=0.2, linewidth=0)
        final = [run.accuracy[-1] for run in runs]
        mean = statistics.mean(final)
        right.plot([column] * len(final), final, "o", color=colour, alpha=0.6)
        right.plot([column - 0.25, column + 0.25], [mean] * 2, color=colour, linewidth=2)
        right.annotate(f"{mean:.1%}", (column + 0.14, mean), (0, 3), textcoords="offset points", fontsize=9)
    for axis in (left, right):
        axis.axhline(1 / next(iter(curves.values()))[0].classes, color="0.4", linestyle="--", linewidth=1, label="guessing")
        axis.grid(alpha=0.3)
    left.set(xlabel="optimizer step", ylabel="validation top-1", ylim=(0, 1.02))
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    left.legend(fontsize=9)
    right.set_xticks(range(len(curves)), [variant.replace(" + ", " +\n") for variant in curves])
    right.set(xlabel="position encoding", xlim=(-0.5, len(curves) - 0.3))
    title = f"{title}: with and without relative bias, {len(next(iter(curves.values())))} seeds"
    figure.suptitle(textwrap.fill(title, TITLE_CHARACTERS), fontsize=11)
    save_figure(figure, out)
