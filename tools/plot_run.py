"""Draws the curves of a run, or one metric of several runs in one picture.

python tools/plot_run.py RUN_DIR                                          -> RUN_DIR/plots/loss.png
python tools/plot_run.py RUN_DIR RUN_DIR --metric eval/val_loss --out compare.png
python tools/plot_run.py RUN_DIR RUN_DIR --along hours --unit "nats per token" --baseline "bigram=4.09" --out compare.svg
"""

from __future__ import annotations

import argparse
from pathlib import Path

from trainer.command_line.locations import argument_path
from trainer.errors import UserError
from trainer.reporting.plot import BOTTOMS, draw_runs, plot_loss, save_figure


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line, draws, prints the path of the picture. Exits with 2 and one line if it cannot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dirs", nargs="+", type=argument_path, metavar="RUN_DIR", help="a folder with a metrics.jsonl")
    parser.add_argument("--out", type=argument_path, help="picture to write: .png, .pdf or .svg (default: in plots/)")
    parser.add_argument("--metric", help="draw only this one (default for several runs: eval/val_loss)")
    parser.add_argument("--along", choices=BOTTOMS, default="step", help="what lies along the bottom (default: step)")
    parser.add_argument("--unit", default="", help="of the metric, as in 'nats per token'")
    parser.add_argument("--baseline", metavar="NAME=VALUE", help="a horizontal line")
    options = parser.parse_args(arguments)
    try:
        baseline = named_value(options.baseline) if options.baseline else None
        print(draw(options.run_dirs, options.metric, options.out, options.along, options.unit, baseline))
    except (UserError, OSError, ValueError) as error:
        parser.exit(2, f"plot_run: {error}\n")


def draw(
    run_dirs: list[Path],
    metric: str | None = None,
    out: Path | None = None,
    along: str = "step",
    unit: str = "",
    baseline: tuple[str, float] | None = None,
) -> Path:
    """Draw the losses of one run, or one metric of all `run_dirs`; returns the path of the picture.

    Raises UserError if a folder is not a run directory or lacks the metric, OSError, and ValueError for an unknown format.
    """
    for run_dir in run_dirs:
        if not (run_dir / "metrics.jsonl").is_file():
            raise UserError(f"{run_dir} holds no metrics.jsonl; give the folder of a run, such as runs/RECIPE/NAME")
    if len(run_dirs) == 1 and metric is None:
        out = out or run_dirs[0] / "plots" / "loss.png"
        plot_loss(run_dirs[0] / "metrics.jsonl", out, _label(run_dirs[0]), baseline, unit=unit, along=along)
        return out
    metric = metric or "eval/val_loss"
    out = out or (run_dirs[0] if len(run_dirs) == 1 else Path()) / "plots" / f"{metric.replace('/', '_')}.png"
    runs = {_label(run_dir): run_dir / "metrics.jsonl" for run_dir in run_dirs}
    title = _label(run_dirs[0]) if len(run_dirs) == 1 else ""
    save_figure(draw_runs(runs, metric, title=title, unit=unit, baseline=baseline, along=along), out)
    return out


def named_value(text: str) -> tuple[str, float]:
    """`bigram=4.09` as a name and a number. UserError for anything else."""
    name, _, value = text.rpartition("=")
    try:
        return name, float(value)
    except ValueError:
        raise UserError(f"--baseline {text!r}: give NAME=VALUE, as in bigram=4.09") from None


def _label(run_dir: Path) -> str:
    """`RECIPE/NAME`, because two recipes may both have a run called `quick`."""
    return "/".join(run_dir.resolve().parts[-2:])


if __name__ == "__main__":
    main()
