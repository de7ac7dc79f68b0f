"""The plot of the task-diversity experiment (after figure 2 of Raventós et al. 2023), and the threshold it shows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recipes.commands.regression_evaluation import DISTRIBUTIONS, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PREDICTORS = {"model": ("transformer", "#1f77b4"), "dmmse": ("dMMSE", "#d62728"), "ridge": ("ridge", "#2ca02c")}
STYLES: tuple[tuple[Any, str], ...] = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))  # line and marker of a task size
THRESHOLD_LABEL = "M*"  # labels vertical lines, to tell them from curves
CERTAIN = 2.0  # standard errors by which the distances from both baselines must differ


def plot_experiment(rows: Sequence[Results], out: Path) -> dict[int, float | None]:
    """Two rows (pretraining tasks, new tasks) of three panels: error, distance from dMMSE, distance from ridge.

    Returns {task size: threshold}. Raises OSError, and ValueError for an ending that matplotlib does not know.
    """
    from trainer.reporting.plot import new_figure, save_figure

    sizes = sorted({row["task_size"] for row in rows})
    by_size = {size: sorted((r for r in rows if r["task_size"] == size), key=_pool_size) for size in sizes}
    thresholds = {size: threshold(by_size[size]) for size in sizes}
    x_of = {row["num_tasks"]: math.log2(row["num_tasks"]) for row in rows if row["num_tasks"]}
    if any(not row["num_tasks"] for row in rows):
        x_of[0] = max(x_of.values(), default=0) + 2  # infinitely many
    figure = new_figure(13.5, 7.5)
    panels = figure.subplots(2, 3, sharex=True)
    styles = dict(zip(sizes, itertools.cycle(STYLES), strict=False))
    titles = ("pretraining tasks", "new tasks, w ~ N(0, I)")
    labels = ("(prediction - y)² / D", "(transformer - dMMSE)² / D", "(transformer - ridge)² / D")
    for panel_row, distribution, title in zip(panels, DISTRIBUTIONS, titles, strict=True):
        for size, style in styles.items():
            for predictor, (_, colour) in PREDICTORS.items():
                _draw_curve(panel_row[0], by_size[size], x_of, (distribution, "error_y", predictor), colour, style)
            for axis, baseline in zip(panel_row[1:], ("dmmse", "ridge"), strict=True):
                _draw_curve(axis, by_size[size], x_of, (distribution, "delta", baseline), PREDICTORS[baseline][1], style)
            if (tasks := thresholds[size]) is not None:
                for axis in panel_row:
                    axis.axvline(math.log2(tasks), color="0.4", linestyle=style[0], linewidth=1, label=THRESHOLD_LABEL)
        for axis, label in zip(panel_row, labels, strict=True):
            _finish_axis(axis, label, title, x_of)
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
    """The number of tasks M above which the model is nearer to ridge than to dMMSE, on new tasks.

    It is where the logarithm of the ratio of both distances changes sign, interpolated linearly in log2 M. None unless there is
    exactly one change of sign, from dMMSE to ridge, and the distances on both sides differ by CERTAIN standard errors.
    """
    points = []
    for row in sorted((r for r in rows if r["num_tasks"]), key=_pool_size):
        ridge, dmmse = row["true"]["delta"]["ridge"], row["true"]["delta"]["dmmse"]
        certain = abs(ridge["mean"] - dmmse["mean"]) > CERTAIN * math.hypot(ridge["se"], dmmse["se"])
        if ridge["mean"] > 0 and dmmse["mean"] > 0:
            points.append((math.log2(row["num_tasks"]), math.log(ridge["mean"] / dmmse["mean"]), certain))
    crossings = [(a, b) for a, b in itertools.pairwise(points) if (a[1] > 0) != (b[1] > 0)]
    if len(crossings) != 1:
        return None
    (x_left, left, left_certain), (x_right, right, right_certain) = crossings[0]
    if left < 0 or not (left_certain and right_certain):
        return None
    return 2 ** (x_left + (x_right - x_left) * left / (left - right))


def _pool_size(row: Results) -> float:
    return row["num_tasks"] or math.inf


def _draw_curve(
    axis: Axes,
    rows: Sequence[Results],
    x_of: dict[int, float],
    keys: tuple[str, str, str],
    colour: str,
    style: tuple[Any, str],
) -> None:
    distribution, metric, predictor = keys
    available = [row for row in rows if predictor in row[distribution][metric]]
    points = [(x_of[row["num_tasks"]], row[distribution][metric][predictor]) for row in available]
    # The point at infinity is not connected: nothing was measured between it and the largest pool.
    infinite = [point for point in points if 0 in x_of and point[0] == x_of[0]]
    for part, line in (([point for point in points if point not in infinite], style[0]), (infinite, "none")):
        if part:
            x, values = zip(*part, strict=True)
            options: dict[str, Any] = {"color": colour, "linestyle": line, "marker": style[1], "capsize": 3, "markersize": 4}
            axis.errorbar(x, [v["mean"] for v in values], [v["se"] for v in values], linewidth=1.4, **options)


def _finish_axis(axis: Axes, ylabel: str, title: str, x_of: dict[int, float]) -> None:
    from matplotlib.ticker import NullLocator

    from trainer.reporting.plot import LOG_SPAN, log_scale

    every = math.ceil(len(x_of) / 9)
    ticks = [m for i, m in enumerate(sorted(x_of, key=lambda m: m or math.inf)) if i % every == 0 or not m]
    axis.set_xticks([x_of[m] for m in ticks], [str(m) if m else "∞" for m in ticks])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlim(min(x_of.values()) - 0.4, max(x_of.values()) + 0.4)
    axis.set(ylabel=ylabel, title=title)
    curves = [line for line in axis.get_lines() if line.get_label() != THRESHOLD_LABEL]
    values = [value for line in curves for value in np.asarray(line.get_ydata(), dtype=float).tolist() if value > 0]
    if values and max(values) > LOG_SPAN * min(values):  # a narrower one may have a single tick
        log_scale(axis, max(values) / min(values))
    elif not values:
        axis.text(0.5, 0.5, "no pool is finite", transform=axis.transAxes, ha="center")
        axis.set_yticks([])
    axis.grid(alpha=0.3)


def _legend(styles: dict[int, tuple[Any, str]], thresholds: dict[int, float | None]) -> list[Any]:
    """Handles for the colours of predictors, the lines of task sizes, and the thresholds."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, linewidth=2, label=text) for text, colour in PREDICTORS.values()]
    several = len(styles) > 1
    for size, (line, marker) in styles.items():
        if several:
            handles.append(Line2D([], [], color="black", linestyle=line, marker=marker, markersize=4, label=f"D = {size}"))
    for size, tasks in thresholds.items():
        if tasks is not None:
            of_size = f" (D = {size})" if several else ""
            text = f"M* ≈ {tasks:.0f}{of_size}: as far from dMMSE as from ridge, new tasks"
            handles.append(Line2D([], [], color="0.4", linestyle=styles[size][0], linewidth=1, label=text))
    return handles
