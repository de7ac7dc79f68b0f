"""Pictures of a run, drawn from its metrics.jsonl."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from trainer.errors import UserError
from trainer.reporting.trackers import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = tuple[list[float], list[float]]
"""(x, y), two lists of equal length; y is NaN where a value was not finite"""

TRAIN_COLOUR, VALIDATION_COLOUR = "#1f77b4", "#d62728"
SHARES = ("accuracy", "fraction", "mfu")  # endings of metrics between 0 and 1, drawn on a linear scale
START_FRACTION = 0.02  # the first part of a run, where losses may be far above all later ones
LOG_SPAN = 3  # ratio of largest and smallest value above which the scale is logarithmic
MANY_POINTS = 200  # a curve with more points is drawn pale, under its running mean
TITLE_CHARACTERS, LABEL_CHARACTERS, LEGEND_ROW_INCHES = 80, 90, 0.2
BOTTOMS = {"step": "optimizer step", "hours": "hours of training", "items": "{unit} trained on"}
"""{x axis: its label}"""


def plot_loss(
    metrics_path: Path,
    out: Path,
    title: str,
    baseline: tuple[str, float] | None = None,
    *,
    unit: str = "nats per token",
    along: str = "step",
) -> None:
    """Draws train/loss and eval/val_loss, and below them train/learning_rate; `along`, one of BOTTOMS, is the x axis.

    `baseline`: (name, loss) of a horizontal line. `unit`: that of the loss. The ending of `out` names the format. The picture
    is complete or absent. UserError if there is no loss to draw; OSError; ValueError for a format that matplotlib lacks.
    """
    rows = read_metrics(metrics_path)
    train, validation = curve(rows, "train/loss", along), curve(rows, "eval/val_loss", along)
    if not (train[0] or validation[0]):
        raise UserError(f"{metrics_path} holds no train/loss and no eval/val_loss yet; train for at least --log_every steps")
    figure = new_figure(8, 6.5)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    if train[0]:
        _draw(upper, train, f"training loss (last {_last(train)})", TRAIN_COLOUR)
    if validation[0]:
        place, best = min(zip(*validation, strict=True), key=lambda point: (math.isnan(point[1]), point[1]))
        at = f" at step {place:,.0f}" if along == "step" else ""
        label = f"validation loss (last {_last(validation)}, best {best:.4g}{at})"
        upper.plot(*validation, "o-", color=VALIDATION_COLOUR, markersize=3.5, label=label)
    if baseline:
        _draw_baseline(upper, baseline)
    _finish_axis(upper, f"loss ({unit})" if unit else "loss")
    rates = curve(rows, "train/learning_rate", along)
    lower.plot(*rates, "o-" if len(rates[0]) == 1 else "-", color="#2ca02c", markersize=3.5)
    lower.set(xlabel=_bottom(rows, along), ylabel="learning rate", ylim=(0, None))
    _whole_numbers_below(lower)
    lower.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    lower.grid(alpha=0.3)
    _finish_figure(figure, title)
    save_figure(figure, out)


def draw_runs(
    runs: Mapping[str, Path],
    metric: str,
    *,
    title: str = "",
    unit: str = "",
    baseline: tuple[str, float] | None = None,
    along: str = "step",
) -> Figure:
    """One metric of several runs in one panel; `runs`: {label: its metrics.jsonl}.

    For one run, `train/X` is drawn together with the metric `eval/val_X`, if there is one. UserError if a run lacks the metric.
    """
    from matplotlib import colormaps

    figure = new_figure(8, 5)
    axis = figure.subplots()
    palette = colormaps["tab10"] if len(runs) <= 10 else colormaps["turbo"].resampled(len(runs))
    for number, (label, path) in enumerate(runs.items()):
        rows = read_metrics(path)
        points = curve(rows, metric, along)
        if not points[0]:
            names = sorted({name for row in rows for name in row} - {"step", "time"})
            raise UserError(f"{path} holds no {metric}; it has {', '.join(names) or 'no metric yet'}")
        train_metric = metric.replace("eval/val_", "train/")
        in_training = curve(rows, train_metric, along) if len(runs) == 1 else ([], [])
        if metric.startswith("eval/val_") and in_training[0]:
            _draw(axis, in_training, f"{in_words(train_metric)} (last {_last(in_training)})", TRAIN_COLOUR)
            label = in_words(metric)
        _draw(axis, points, f"{label} (last {_last(points)})", VALIDATION_COLOUR if in_training[0] else palette(number))
    if baseline:
        _draw_baseline(axis, baseline)
    share = metric.endswith(SHARES)
    name = in_words(metric).removeprefix("validation " if in_training[0] else "")
    _finish_axis(axis, f"{name} ({unit})" if unit else name, linear=share)
    if share:
        axis.set_ylim(max(0.0, axis.get_ylim()[0]), min(1.0, axis.get_ylim()[1]))
    axis.set_xlabel(_bottom(rows, along))
    _whole_numbers_below(axis)
    _finish_figure(figure, title)
    return figure


def plot_learning_rate(rates: Sequence[float], out: Path, title: str) -> None:
    """Draws `rates`, the learning rates of steps 1, 2, ... Raises OSError."""
    figure = new_figure(8, 3)
    axis = figure.subplots()
    every = max(1, len(rates) // 2000)
    places = [*range(0, len(rates), every), len(rates) - 1]
    axis.plot(
        [place + 1 for place in places], [rates[place] for place in places], label=f"learning rate (last {rates[-1]:.3g})"
    )
    axis.set_xlabel(BOTTOMS["step"])
    _finish_axis(axis, "learning rate", linear=True)
    _finish_figure(figure, title)
    save_figure(figure, out)


def in_words(metric: str) -> str:
    """The name of a metric in words: `validation accuracy` for `eval/val_accuracy`."""
    for prefix, word in {"train/": "training ", "eval/val_": "validation ", "eval/": ""}.items():
        if metric.startswith(prefix):
            rest = metric.removeprefix(prefix).replace("_", " ")
            return rest if rest in ("learning rate", "grad norm", "mfu") else f"{word}{rest}"
    return metric


def curve(rows: Sequence[Mapping[str, Any]], metric: str, along: str = "step") -> Curve:
    """The curve of `metric` over the rows that have it, with NaN for null, which stands for a value that was not finite."""
    places = _places(rows, along)
    points = [(place, row[metric]) for place, row in zip(places, rows, strict=True) if metric in row]
    return [place for place, _ in points], [math.nan if value is None else value for _, value in points]


def _places(rows: Sequence[Mapping[str, Any]], along: str) -> list[float]:
    """The x of each row: its step, or the hours trained (`hours`) or items trained on (`items`) up to it."""
    if along == "step":
        return [row["step"] for row in rows]
    rate = _rate_of(rows)
    total, places = 0.0, []
    for row in rows:
        seconds = row.get("train/interval_seconds") or 0.0
        total += seconds / 3600 if along == "hours" else seconds * (row.get(rate) or 0.0)
        places.append(total)
    return places


def _rate_of(rows: Sequence[Mapping[str, Any]]) -> str:
    return next((name for row in rows for name in row if name.endswith("_per_sec")), "train/items_per_sec")


def _bottom(rows: Sequence[Mapping[str, Any]], along: str) -> str:
    unit = _rate_of(rows).removeprefix("train/").removesuffix("_per_sec")
    return BOTTOMS[along].format(unit=unit)


def _whole_numbers_below(axis: Axes) -> None:
    """Only whole numbers as ticks of the x axis, also for a few steps."""
    from matplotlib.ticker import MaxNLocator

    left, right = axis.get_xlim()
    if right - left > 1:  # less than an hour needs fractions
        axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))


def _draw(axis: Axes, points: Curve, label: str, colour: object) -> None:
    places, values = points
    marker = "o" if len(places) < 30 else ""
    if len(places) > MANY_POINTS:
        axis.plot(places, values, color=colour, alpha=0.25, linewidth=0.8)
        values = _running_mean(values, window=len(values) // 50)
    axis.plot(places, values, color=colour, marker=marker, markersize=3.5, label=label)


def _draw_baseline(axis: Axes, baseline: tuple[str, float]) -> None:
    name, value = baseline
    axis.axhline(value, color="0.25", linestyle="--", linewidth=1, label=f"{name} ({value:.4g})")


def _running_mean(values: list[float], window: int) -> list[float]:
    """The mean of each value and its neighbours, `window` in all (fewer at the ends), without values that are not finite."""
    import numpy as np

    finite = np.isfinite(values)
    weights = np.ones(window // 2 * 2 + 1)  # odd, so that it is centred: a mean of past values only would lag behind
    sums, counts = (np.convolve(part, weights, "same") for part in (np.where(finite, values, 0.0), finite))
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan).tolist()


def _last(points: Curve) -> str:
    return f"{points[1][-1]:.4g}"


def new_figure(width_inches: float, height_inches: float) -> Figure:
    """An empty figure, to be saved, not shown."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot, which may want a display, and keeps global state in the training process.
    figure = Figure(figsize=(width_inches, height_inches), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _finish_axis(axis: Axes, label: str, linear: bool = False) -> None:
    """Sets label, grid, limits and scale of the y axis, so that high first losses do not make a flat line of the rest.

    If the whole curve spans more than five times what it spans without its start, the start is cut off at the top. The scale is
    logarithmic if what is shown spans more than a factor of LOG_SPAN. Neither happens if `linear`.
    """
    points = [
        (x, y)
        for line in axis.get_lines()
        for x, y in zip(cast(list[float], line.get_xdata()), cast(list[float], line.get_ydata()), strict=True)
        if math.isfinite(y)
    ]
    values, start = [y for _, y in points], axis.dataLim.x0 + START_FRACTION * axis.dataLim.width
    rest = [y for x, y in points if x >= start]
    below = max(rest) - min(values) if rest else 0.0
    if below > 0 and not linear and max(values) - min(values) > 5 * below:
        margin = 0.1 * below
        axis.set_ylim(min(values) - margin, max(rest) + margin)
        values = rest
    span = max(values) / min(values) if values and min(values) > 0 else 1
    if span > LOG_SPAN and not linear:
        log_scale(axis, span)
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)


def _finish_figure(figure: Figure, title: str) -> None:
    """Adds the title, and a legend below the panels with a row (several for a long name) per curve, and makes room for both."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    labels = [textwrap.fill(label, LABEL_CHARACTERS) for label in labels]
    title = textwrap.fill(title, TITLE_CHARACTERS)
    rows = sum(label.count("\n") + 1 for label in labels) + title.count("\n")
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + LEGEND_ROW_INCHES * rows)
    figure.legend(handles, labels, loc="outside lower left", fontsize=9, frameon=False)
    if title:
        figure.suptitle(title, fontsize=11)


def log_scale(axis: Axes, span: float) -> None:
    """A logarithmic y axis with plain numbers at its ticks; `span`: the ratio of the largest and smallest value shown."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7) if span < 30 else (1, 3)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_locator(NullLocator())


def check_picture(out: Path) -> None:
    """OSError or ValueError if no picture can be written to `out`. Makes its folder."""
    if out.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError("a picture is .png, .pdf or .svg")
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise PermissionError("it cannot be written; choose another file")


def save_figure(figure: Figure, out: Path) -> None:
    """Writes the picture, complete or not at all, in the format that `out` ends with. Makes its folder. OSError, ValueError."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format=out.suffix.removeprefix(".") or "png")
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
