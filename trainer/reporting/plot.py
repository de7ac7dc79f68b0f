"""Pictures of a run, drawn from its metrics.jsonl."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from trainer.errors import UserError
from trainer.reporting.trackers import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = tuple[list[int], list[float]]  # optimizer steps, values; nan where a value was not finite

TRAIN_COLOUR, VALIDATION_COLOUR = "#1f77b4", "#d62728"
SHARES = ("accuracy", "fraction", "mfu")  # metrics between 0 and 1 that are read on a linear scale
MANY_POINTS = 200  # with more, a noisy curve is drawn pale under its running mean


def plot_loss(
    metrics_path: Path,
    out: Path,
    title: str,
    baseline: tuple[str, float] | None = None,
    *,
    unit: str = "nats per token",
) -> None:
    """Draws train/loss and eval/val_loss over train/learning_rate, with optimizer steps along the bottom.

    `baseline` is the name and loss of a horizontal line, `unit` that of the loss. The format is that of `out`'s ending.
    The picture is complete or absent. Raises UserError if there is no loss to draw, OSError, and ValueError for an ending
    that matplotlib does not know.
    """
    rows = read_metrics(metrics_path)
    train, validation = curve(rows, "train/loss"), curve(rows, "eval/val_loss")
    if not (train[0] or validation[0]):
        raise UserError(f"{metrics_path} holds no train/loss and no eval/val_loss yet; train for at least --log_every steps")
    figure = new_figure(8, 6.5)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    if train[0]:
        _draw(upper, train, f"train/loss (final {_final(train)})", TRAIN_COLOUR)
    if validation[0]:
        best_step, best = min(zip(*validation, strict=True), key=lambda point: (math.isnan(point[1]), point[1]))
        label = f"eval/val_loss (final {_final(validation)}, best {best:.4g} at step {best_step})"
        upper.plot(*validation, "o-", color=VALIDATION_COLOUR, markersize=3.5, label=label)
    if baseline:
        upper.axhline(baseline[1], color="0.25", linestyle="--", linewidth=1, label=f"{baseline[0]} ({baseline[1]:.4g})")
    _finish_axis(upper, f"loss ({unit})" if unit else "loss")
    upper.set_title(title)
    rates = curve(rows, "train/learning_rate")
    lower.plot(*rates, "o-" if len(rates[0]) == 1 else "-", color="#2ca02c", markersize=3.5)
    lower.set(xlabel="optimizer step", ylabel="learning rate", ylim=(0, None))
    lower.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    lower.grid(alpha=0.3)
    save_figure(figure, out)


def plot_metric(runs: Mapping[str, Path], metric: str, out: Path) -> None:
    """Draws one metric of several runs into one panel; `runs` maps a label to a metrics.jsonl.

    Raises UserError if a run lacks the metric, OSError, and ValueError for an ending that matplotlib does not know.
    """
    from matplotlib import colormaps

    figure = new_figure(8, 5)
    axis = figure.subplots()
    palette = colormaps["tab10"] if len(runs) <= 10 else colormaps["turbo"].resampled(len(runs))
    for number, (label, path) in enumerate(runs.items()):
        rows = read_metrics(path)
        points = curve(rows, metric)
        if not points[0]:
            names = sorted({name for row in rows for name in row} - {"step", "time"})
            raise UserError(f"{path} holds no {metric}; it has {', '.join(names) or 'no metric yet'}")
        _draw(axis, points, f"{label} (final {_final(points)})", palette(number))
    _finish_axis(axis, metric, linear=metric.endswith(SHARES))
    axis.set_xlabel("optimizer step")
    save_figure(figure, out)


def curve(rows: list[dict[str, Any]], metric: str) -> Curve:
    """The steps that have `metric`, and its values there: nan where the row has null (it was not finite)."""
    points = [(row["step"], row[metric]) for row in rows if metric in row]
    return [step for step, _ in points], [math.nan if value is None else value for _, value in points]


def _draw(axis: Axes, points: Curve, label: str, colour: object) -> None:
    steps, values = points
    marker = "o" if len(steps) < 30 else ""
    if len(steps) > MANY_POINTS:
        axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        values = _running_mean(values, window=len(values) // 50)
    axis.plot(steps, values, color=colour, marker=marker, markersize=3.5, label=label)


def _running_mean(values: list[float], window: int) -> list[float]:
    """The mean of each value and its neighbours, `window` in all (fewer at the ends), without those not finite."""
    import numpy as np

    finite = np.isfinite(values)
    weights = np.ones(window // 2 * 2 + 1)  # odd, so that it is centred: a mean of the past lags behind a falling curve
    sums, counts = (np.convolve(part, weights, "same") for part in (np.where(finite, values, 0.0), finite))
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan).tolist()


def _final(points: Curve) -> str:
    return f"{points[1][-1]:.4g}"


def new_figure(width_inches: float, height_inches: float) -> Figure:
    """An empty figure that is only ever saved."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot: no display is asked for, and nothing global stays behind in a training process.
    figure = Figure(figsize=(width_inches, height_inches), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _finish_axis(axis: Axes, label: str, linear: bool = False) -> None:
    """Names and grids a panel. Unless `linear`, its scale is logarithmic if the values span more than a factor of 3: on a
    linear one the first steps of a run take all the height and what matters afterwards is a flat line."""
    values = [v for line in axis.get_lines() for v in cast(list[float], line.get_ydata()) if math.isfinite(v)]
    span = max(values) / min(values) if values and min(values) > 0 else 1
    if span > 3 and not linear:
        log_scale(axis, span)
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)


def log_scale(axis: Axes, span: float) -> None:
    """A logarithmic y axis with ticks that read as numbers; `span` is the ratio of its largest and smallest values."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7) if span < 30 else (1, 3)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_locator(NullLocator())


def check_picture(out: Path) -> None:
    """OSError or ValueError if a picture could not be written to `out`; makes its folder."""
    if out.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError("a picture is .png, .pdf or .svg")
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise PermissionError("it cannot be written; choose another file")


def save_figure(figure: Figure, out: Path) -> None:
    """Writes the picture, complete or not at all, in the format of `out`'s ending; makes its folder. OSError, ValueError."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format=out.suffix.removeprefix(".") or "png")
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
