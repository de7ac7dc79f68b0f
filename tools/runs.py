"""A table of runs: state, step, best and last loss, speed, and the flags in which they differ; or a page with their curves.

python tools/runs.py                                     # all below runs/
python tools/runs.py runs/gpt2_wikitext --html runs.html
"""

from __future__ import annotations

import argparse
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trainer.command_line.locations import argument_path
from trainer.errors import UserError
from trainer.reporting.lock import was_killed
from trainer.reporting.plot import curve, draw_runs
from trainer.reporting.trackers import read_metrics

COLUMNS = ("run", "state", "step", "best val", "last loss", "per second", "flags that differ")


@dataclass(frozen=True)
class RunSummary:
    """One row of the table."""

    name: str
    """RECIPE/NAME"""
    state: str
    step: int
    best: float
    """lowest eval/val_loss; nan without one"""
    last: float
    """last train/loss; nan without one"""
    per_second: str
    """the last rate and its unit, as in `1,200 tokens`"""
    flags: Mapping[str, Any]
    """the settings of the run, without its `run` section"""
    metrics: Path
    """metrics.jsonl"""

    def cells(self, differing: Sequence[str]) -> list[str]:
        """The texts for COLUMNS; `differing`: flags for the last one."""
        flags = " ".join(f"{name}={self.flags.get(name)}" for name in differing if name in self.flags)
        numbers = ["" if math.isnan(value) else f"{value:.4f}" for value in (self.best, self.last)]
        return [self.name, self.state, f"{self.step:,}", *numbers, self.per_second, flags]


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line, prints the table or writes the page. Exits with 2 and one line if it cannot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folders", nargs="*", type=argument_path, default=[Path("runs")], help="searched for runs (default: runs)"
    )
    parser.add_argument("--html", type=argument_path, metavar="FILE", help="write one page with the table and the curves")
    options = parser.parse_args(arguments)
    try:
        runs = find_runs(options.folders)
        if options.html:
            options.html.write_text(page(runs), encoding="utf-8")
            print(options.html)
        else:
            print(table(runs))
    except (UserError, OSError) as error:
        parser.exit(2, f"runs: {error}\n")


def find_runs(folders: Sequence[Path]) -> list[RunSummary]:
    """The runs in and below the folders, the most recently written first. UserError if there are none."""
    found = {path.parent for folder in folders for path in folder.glob("**/metrics.jsonl")}
    if not found:
        raise UserError(f"no run below {', '.join(map(str, folders))}; give a folder that holds RECIPE/NAME/metrics.jsonl")
    newest_first = sorted(found, key=lambda path: -(path / "metrics.jsonl").stat().st_mtime)
    return [summary_of(path) for path in newest_first]


def summary_of(path: Path) -> RunSummary:
    """The summary of a run directory, in which files other than metrics.jsonl may be missing or damaged."""
    rows = read_metrics(path / "metrics.jsonl")
    status, config = (_mapping(path / name) for name in ("status.json", "config.yaml"))
    state = str(status.get("state", "running or killed"))
    losses = [value for value in curve(rows, "eval/val_loss")[1] if not math.isnan(value)]
    rates = [(name, value) for row in rows for name, value in row.items() if name.endswith("_per_sec")]
    unit, rate = rates[-1] if rates else ("", math.nan)
    return RunSummary(
        name="/".join(path.resolve().parts[-2:]),
        state="killed" if state.startswith("running") and was_killed(path) else state,
        step=max((row["step"] for row in rows), default=0),
        best=min(losses, default=math.nan),
        last=([math.nan] + curve(rows, "train/loss")[1])[-1],
        per_second=f"{rate:,.0f} {unit.removeprefix('train/').removesuffix('_per_sec')}" if rates else "",
        flags={name: value for part in ("model", "data", "optimisation") for name, value in (config.get(part) or {}).items()},
        metrics=path / "metrics.jsonl",
    )


def _mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file; empty if the file is missing or damaged, as after a kill."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def by_recipe(runs: Sequence[RunSummary]) -> dict[str, list[RunSummary]]:
    """{recipe: its runs}."""
    groups: dict[str, list[RunSummary]] = {}
    for run in runs:
        groups.setdefault(run.name.partition("/")[0], []).append(run)
    return groups


def differing_flags(runs: Sequence[RunSummary]) -> list[str]:
    """Flags that have different values in the runs that have them."""
    names = dict.fromkeys(name for run in runs for name in run.flags)
    return [name for name in names if len({repr(run.flags[name]) for run in runs if name in run.flags}) > 1]


def table(runs: Sequence[RunSummary]) -> str:
    """The table as aligned text, recipe by recipe."""
    groups = by_recipe(runs).values()
    rows = [[*COLUMNS], *(run.cells(differing_flags(own)) for own in groups for run in own)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def page(runs: Sequence[RunSummary]) -> str:
    """A self-contained HTML page: for each recipe a table of its runs, and their curves."""
    parts = []
    for recipe, own in by_recipe(runs).items():
        pictures: list[str] = []
        for metric in ("eval/val_loss", "train/loss"):
            drawn = {run.name: run.metrics for run in own if curve(read_metrics(run.metrics), metric)[0]}
            if drawn and (len(own) > 1 or not pictures):  # for a single run the first picture shows both losses
                picture = io.StringIO()
                draw_runs(drawn, metric).savefig(picture, format="svg")
                pictures.append(picture.getvalue()[picture.getvalue().index("<svg") :])
        differing = differing_flags(own)
        rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in run.cells(differing))}</tr>" for run in own)
        head = "".join(f"<th>{column}</th>" for column in COLUMNS)
        parts.append(
            f"<h2>{html.escape(recipe)}</h2><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
            f"<div>{''.join(pictures)}</div>"
        )
    style = (
        "body{font:14px sans-serif;margin:2em}table{border-collapse:collapse}td,th{padding:.3em .8em;text-align:left;"
        "border-bottom:1px solid #ddd}"
        "td:not(:first-child):not(:last-child){white-space:nowrap}svg{max-width:48%;height:auto;vertical-align:top}"
    )
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>Runs</title><style>{style}</style>"
    return f"{head}<h1>Runs</h1>{''.join(parts)}"


if __name__ == "__main__":
    main()
