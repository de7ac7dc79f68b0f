"""`compare`: the same training with and without relative bias, with and without absolute positions, over several seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from trainer.errors import Refusal
from trainer.plot import new_figure, save_figure
from trainer.recipe import Recipe

if TYPE_CHECKING:
    from trainer.launch import Launch

Say = Callable[[str], None]

# {what the model knows of positions: its flags}, from most to none
VARIANTS = {
    "relative": ("--relative_position", "--no_absolute_position"),
    "relative + absolute": ("--relative_position", "--absolute_position"),
    "absolute": ("--no_relative_position", "--absolute_position"),
    "none": ("--no_relative_position", "--no_absolute_position"),
}


@dataclass(frozen=True)
class Compare:
    """Train with and without relative bias and absolute positions, over several seeds; one table, one plot.

    Each training is an ordinary run below `output_dir`. Interrupted, the same command goes on where it was.
    """

    preset: str = "compare"
    """what each run trains, as for `train`"""
    config: str | None = None
    """a YAML file in place of the preset"""
    seeds: int = 3
    """runs of each variant"""
    first_seed: int = 42
    output_dir: str = "runs/vit_relpos_comparison"
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True)
class Curve:
    """Validation accuracy of one run."""

    steps: list[int]
    accuracy: list[float]
    classes: int


def compare(recipe: Recipe, flags: Compare, launch: Launch, say: Say) -> None:
    """The `compare` sub-command: one run after another, each with all processes of the launch."""
    if flags.seeds < 1 or flags.first_seed < 0:
        raise Refusal(f"seeds {flags.seeds} must be above 0, and first_seed {flags.first_seed} not negative")
    folder = Path(flags.output_dir)
    curves: dict[str, list[Curve]] = {variant: [] for variant in VARIANTS}
    for seed in range(flags.first_seed, flags.first_seed + flags.seeds):
        for variant in VARIANTS:
            path = folder / f"{variant.replace(' + ', '_and_')}_seed{seed}"
            say(f"----- positions: {variant}; seed {seed}")
            ended = _train(recipe, flags, launch, variant, seed, path)
            if ended is not None:
                say(f"Stopped ({ended}) in {path}; the same command goes on with the comparison")
                return
            if launch.is_main:
                curves[variant].append(read_curve(path))
                say(f"{variant}, seed {seed}: validation top-1 {curves[variant][-1].accuracy[-1]:.2%} ({path})")
    if launch.is_main:
        for line in table(curves):
            say(line)
        draw(curves, folder / "plots" / "comparison.png", flags.config or flags.preset)
        say(f"Plot: {folder / 'plots' / 'comparison.png'}")
    launch.control.barrier()


def _train(recipe: Recipe, flags: Compare, launch: Launch, variant: str, seed: int, path: Path) -> str | None:
    """One run, trained to its end; why it was stopped, if it was."""
    from trainer import config
    from trainer.console import Console
    from trainer.main import train
    from trainer.stopping import REASONS

    base = ["--config", flags.config] if flags.config else ["--preset", flags.preset]
    argv = [*base, *VARIANTS[variant], "--seed", str(seed), "--device", flags.device, "--output_dir", str(path)]
    console = Console(None, launch.is_main)
    try:
        reason = train(recipe, config.parse(recipe.Config, recipe.presets, argv, recipe.name), argv, launch, console)
    finally:
        console.close()
    return reason if reason in REASONS else None


def read_curve(run: Path) -> Curve:
    """The validation accuracy of a finished run, from its files."""
    from trainer.metrics import read_metrics

    rows = [row for row in read_metrics(run / "metrics.jsonl") if row.get("eval/val_accuracy") is not None]
    classes = json.loads((run / "checkpoints" / "checkpoint_final" / "classes.json").read_text(encoding="utf-8"))
    return Curve([row["step"] for row in rows], [row["eval/val_accuracy"] for row in rows], len(classes))


def table(curves: Mapping[str, Sequence[Curve]]) -> list[str]:
    """A line for each variant: validation accuracy at the end of its runs, as mean, standard deviation and range."""
    lines = [f"{'positions':<20} {'runs':>4} {'top-1 mean':>11} {'std':>7} {'lowest':>8} {'highest':>8}"]
    for variant, runs in curves.items():
        last = [run.accuracy[-1] for run in runs]
        spread = f"{statistics.stdev(last):>7.2%}" if len(last) > 1 else f"{'-':>7}"
        lines.append(
            f"{variant:<20} {len(last):>4} {statistics.mean(last):>11.2%} {spread} {min(last):>8.2%} {max(last):>8.2%}"
        )
    chance = 1 / next(iter(curves.values()))[0].classes
    return [*lines, f"{'(guessing)':<20} {'':>4} {chance:>11.2%}"]


def draw(curves: Mapping[str, Sequence[Curve]], out: Path, title: str) -> None:
    """Accuracy along training, the mean over seeds in a band from the lowest to the highest; beside it how each run ended."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(10, 4.6)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2), sharey=True)
    for place, (variant, runs) in enumerate(curves.items()):
        colour, steps = f"C{place}", sorted(set.intersection(*(set(run.steps) for run in runs)))  # patience ends some early
        each = [[run.accuracy[run.steps.index(step)] for run in runs] for step in steps]
        left.plot(steps, [statistics.mean(values) for values in each], color=colour, label=variant)
        left.fill_between(steps, [min(v) for v in each], [max(v) for v in each], color=colour, alpha=0.2, linewidth=0)
        last = [run.accuracy[-1] for run in runs]
        end = statistics.mean(last)
        right.plot([place] * len(last), last, "o", color=colour, alpha=0.6)
        right.plot([place - 0.25, place + 0.25], [end] * 2, color=colour, linewidth=2)
        right.annotate(f"{end:.1%}", (place + 0.14, end), (0, 3), textcoords="offset points", fontsize=9)
    for axis in (left, right):
        axis.axhline(1 / next(iter(curves.values()))[0].classes, color="0.4", linestyle="--", linewidth=1, label="guessing")
        axis.grid(alpha=0.3)
    left.set(xlabel="optimizer step", ylabel="validation top-1", ylim=(0, 1.02))
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    left.legend(fontsize=9)
    right.set_xticks(range(len(curves)), [variant.replace(" + ", " +\n") for variant in curves])
    right.set(xlabel="positions the model knows", xlim=(-0.5, len(curves) - 0.3))
    figure.suptitle(f"{title}: with and without relative bias, {len(next(iter(curves.values())))} seeds", fontsize=11)
    save_figure(figure, out)
