"""The picture of the task-diversity experiment (after figure 2 of Raventós et al. 2023), and the threshold read off it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.studies.regression_evaluation import DISTRIBUTIONS, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WHO = {"model": ("transformer", "#1f77b4"), "dmmse": ("dMMSE", "#d62728"), "ridge": ("ridge", "#2ca02c")}
STYLES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))  # line and marker of a task size
MARK = "M*"  # label of a line that is no curve
CERTAIN = 2.0  # standard errors that the model must be nearer to one baseline than to the other


def plot_experiment(rows: Sequence[Results], out: Path) -> dict[int, float | None]:
    """Draw two rows (its own tasks, new tasks) of three panels: error, distance from dMMSE, distance from ridge.

    Returns {task size: threshold}. Raises OSError, and ValueError for an ending that matplotlib does not know.
    """
    from trainer.plot import new_figure, save_figure

    sizes = sorted({row["task_size"] for row in rows})
    by_size = {size: sorted((r for r in rows if r["task_size"] == size), key=_order) for size in sizes}
    thresholds = {size: threshold(by_size[size]) for size in sizes}
    places = {row["num_tasks"]: math.log2(row["num_tasks"]) for row in rows if row["num_tasks"]}
    if any(not row["num_tasks"] for row in rows):
        places[0] = max(places.values(), default=0) + 2
    figure = new_figure(13.5, 7.5)
    panels = figure.subplots(2, 3, sharex=True)
    styles = dict(zip(sizes, itertools.cycle(STYLES), strict=False))
    for line, name in enumerate(DISTRIBUTIONS):
        for size, style in styles.items():
            here = by_size[size]
            for who, (_, colour) in WHO.items():
                _curve(panels[line, 0], here, places, (name, "error_y", who), colour, style)
            for column, who in ((1, "dmmse"), (2, "ridge")):
                _curve(panels[line, column], here, places, (name, "delta", who), WHO[who][1], style)
            if (found := thresholds[size]) is not None:
                for axis in panels[line]:
                    axis.axvline(math.log2(found), color="0.4", linestyle=style[0], linewidth=1, label=MARK)
        for column, text in enumerate(("(prediction - y)² / D", "(transformer - dMMSE)² / D", "(transformer - ridge)² / D")):
            _finish(panels[line, column], text, ("pretraining tasks", "new tasks, w ~ N(0, I)")[line], places)
    for axis in panels[1]:
        axis.set_xlabel("pretraining tasks M")
    figure.legend(handles=_legend(styles, thresholds), loc="outside lower center", ncols=6, fontsize=9)
    first = rows[0]
    figure.suptitle(
        f"In-context linear regression, {' and '.join(f'D = {size}' for size in sizes)}: {first['examples']} examples, noise "
        f"variance {first['noise']:g}, {first['step']:,} steps; {first['sequences']:,} fresh sequences a point, bars: ±1 "
        "standard error",
        fontsize=11,
    )
    save_figure(figure, out)
    return thresholds


def threshold(rows: Sequence[Results]) -> float | None:
    """The number of tasks from which on a model is nearer to ridge than to dMMSE, on new tasks.

    Where the logarithm of the ratio of both distances changes sign, linear in log2 M between two neighbours. None unless it
    changes sign exactly once, from dMMSE to ridge, and both neighbours are sure of their side by CERTAIN standard errors.
    """
    points = []
    for row in sorted((r for r in rows if r["num_tasks"]), key=_order):
        near, far = row["true"]["delta"]["ridge"], row["true"]["delta"]["dmmse"]
        sure = abs(near["mean"] - far["mean"]) > CERTAIN * math.hypot(near["se"], far["se"])
        if near["mean"] > 0 and far["mean"] > 0:
            points.append((math.log2(row["num_tasks"]), math.log(near["mean"] / far["mean"]), sure))
    crossings = [(a, b) for a, b in itertools.pairwise(points) if (a[1] > 0) != (b[1] > 0)]
    if len(crossings) != 1:
        return None
    (left, before, sure_before), (right, after, sure_after) = crossings[0]
    if before < 0 or not (sure_before and sure_after):
        return None
    return 2 ** (left + (right - left) * before / (before - after))


def _order(row: Results) -> float:
    return row["num_tasks"] or math.inf


def _curve(
    axis: Axes,
    rows: Sequence[Results],
    places: dict[int, float],
    what: tuple[str, str, str],
    colour: str,
    style: tuple[str, str],
) -> None:
    name, kind, who = what
    points = [(places[row["num_tasks"]], row[name][kind][who]) for row in rows if who in row[name][kind]]
    # Infinitely many tasks stand apart: nothing is known between the largest pool and them.
    apart = [point for point in points if 0 in places and point[0] == places[0]]
    for part, line in (([point for point in points if point not in apart], style[0]), (apart, "none")):
        if part:
            x, values = zip(*part, strict=True)
            options: dict[str, Any] = {"color": colour, "linestyle": line, "marker": style[1], "capsize": 3, "markersize": 4}
            axis.errorbar(x, [v["mean"] for v in values], [v["se"] for v in values], linewidth=1.4, **options)


def _finish(axis: Axes, ylabel: str, title: str, places: dict[int, float]) -> None:
    from matplotlib.ticker import NullLocator

    from trainer.plot import log_scale

    every = -(-len(places) // 9)
    shown = [m for i, m in enumerate(sorted(places, key=lambda m: m or math.inf)) if i % every == 0 or not m]
    axis.set_xticks([places[m] for m in shown], [str(m) if m else "∞" for m in shown])
    axis.xaxis.set_minor_locator(NullLocator())
    low, high = min(places.values()), max(places.values())
    axis.set_xlim(low - 0.4, high + 0.4)
    axis.set(ylabel=ylabel, title=title)
    curves = [line for line in axis.get_lines() if line.get_label() != MARK]
    shown_values = [value for line in curves for value in line.get_ydata() if value > 0]
    if shown_values:
        log_scale(axis, max(shown_values) / min(shown_values))
    else:
        axis.text(0.5, 0.5, "no pool is finite", transform=axis.transAxes, ha="center")
        axis.set_yticks([])
    axis.grid(alpha=0.3)


def _legend(styles: dict[int, tuple[str, str]], thresholds: dict[int, float | None]) -> list[Any]:
    """Whose a colour is, which task size a line, and where the thresholds are."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, linewidth=2, label=text) for text, colour in WHO.values()]
    several = len(styles) > 1
    for size, (line, marker) in styles.items():
        if several:
            handles.append(Line2D([], [], color="black", linestyle=line, marker=marker, markersize=4, label=f"D = {size}"))
    for size, found in thresholds.items():
        if found is not None:
            text = f"M* ≈ {found:.0f}{f' (D = {size})' * several}: as far from dMMSE as from ridge, new tasks"
            handles.append(Line2D([], [], color="0.4", linestyle=styles[size][0], linewidth=1, label=text))
    return handles
