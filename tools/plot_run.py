"""Draws the curves of a run, or one metric of several runs in one picture.

python tools/plot_run.py RUN_DIR                                          -> RUN_DIR/plots/loss.png
python tools/plot_run.py RUN_DIR RUN_DIR --metric eval/val_loss --out compare.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from trainer.command_line.locations import argument_path
from trainer.errors import UserError
from trainer.reporting.plot import plot_loss, plot_metric


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line, draws, prints the path of the picture. Exits with 2 and one line if it cannot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dirs", nargs="+", type=argument_path, metavar="RUN_DIR", help="a folder with a metrics.jsonl")
    parser.add_argument("--out", type=argument_path, help="picture to write: .png, .pdf or .svg (default: in plots/)")
    parser.add_argument("--metric", help="draw only this one (default for several runs: eval/val_loss)")
    options = parser.parse_args(arguments)
    try:
        print(draw(options.run_dirs, options.metric, options.out))
    except (UserError, OSError, ValueError) as error:
        parser.exit(2, f"plot_run: {error}\n")


def draw(run_dirs: list[Path], metric: str | None, out: Path | None) -> Path:
    """Draws the picture and returns its path.

    Raises UserError if a folder is no run or lacks the metric, OSError, and ValueError for an unknown picture format.
    """
    for run_dir in run_dirs:
        if not (run_dir / "metrics.jsonl").is_file():
            raise UserError(f"{run_dir} holds no metrics.jsonl; give the folder of a run, such as runs/RECIPE/NAME")
    if len(run_dirs) == 1 and metric is None:
        out = out or run_dirs[0] / "plots" / "loss.png"
        plot_loss(run_dirs[0] / "metrics.jsonl", out, _label(run_dirs[0]), unit="")
        return out
    metric = metric or "eval/val_loss"
    out = out or (run_dirs[0] if len(run_dirs) == 1 else Path()) / "plots" / f"{metric.replace('/', '_')}.png"
    plot_metric({_label(run_dir): run_dir / "metrics.jsonl" for run_dir in run_dirs}, metric, out)
    return out


def _label(run_dir: Path) -> str:
    """`RECIPE/NAME`: two recipes may both have a run called `quick`."""
    return "/".join(run_dir.resolve().parts[-2:])


if __name__ == "__main__":
    main()
