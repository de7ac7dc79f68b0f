"""Commands for a trained Collatz model: predictions for any number, and errors on held-out ones with pictures of them."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from tyro.conf import Positional, arg

from recipes.baselines.collatz import FORMULA, beside_baselines, held_out_with_baselines, log_and_digits, steps_of
from trainer.command_line.bounds import Positive
from trainer.command_line.locations import Existing, ToMake
from trainer.command_line.sections import Device
from trainer.errors import UserError
from trainer.recipe import Data, Log, Recipe
from trainer.reporting.plot import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from recipes.data.collatz import HeldOutNumbers, Layout
    from trainer.distributed.launch import Launch

MAX_DECIMALS = 10_000  # a number with so many digits takes some 240,000 steps


@dataclass(frozen=True)
class Predict:
    """Predict the number of steps to 1, beside the true one: `predict 27 837799`."""

    numbers: Positional[tuple[str, ...]]
    """decimal numbers of any size"""
    model_path: Annotated[str, Existing] = "checkpoints/best_model"
    """checkpoint folder, as given or of the latest run"""
    device: Device = "auto"


@dataclass(frozen=True)
class Analyse:
    """Measure a trained model on held-out numbers, and draw its errors, confusions and states."""

    model_path: Annotated[str, Existing] = "checkpoints/best_model"
    """checkpoint folder, as given or of the latest run"""
    numbers: int | None = None
    """held-out numbers, others than those measured in training (default: 4096, fewer in a small val_span)"""
    output_dir: Annotated[str | None, ToMake] = None
    """where the pictures go (default: plots/ of the run)"""
    batch_size: Annotated[int, Positive, arg(aliases=("--batch",))] = 256
    """numbers of one micro-step, summed over all processes"""
    device: Device = "auto"


@dataclass(frozen=True)
class Predictions:
    """A set of numbers, with the predictions of a model and of the baselines; [numbers] each unless noted."""

    digits: np.ndarray
    """binary digits"""
    kind: np.ndarray
    steps: np.ndarray
    predicted: np.ndarray
    """steps"""
    scored: np.ndarray
    magnitude: np.ndarray
    """steps by the mean of the magnitude"""
    formula: np.ndarray
    """10.43 ln n"""
    pooled: np.ndarray
    """input of the stopping-time head [numbers, d_model]"""
    confusion: np.ndarray
    """counts [parity before, true parity, predicted parity]"""


# ------------------------------------------------------------------------------------------------------------- predict


def predict(recipe: Recipe, flags: Predict, launch: Launch, log: Log) -> None:
    """The `predict` sub-command; rank 0 does the work, from the checkpoint alone."""
    from recipes.data.collatz import Layout
    from trainer.checkpoints.network import find_checkpoint, load_network

    numbers = read_numbers(flags.numbers)
    checkpoint, config = find_checkpoint(recipe, flags.model_path, launch)
    network = load_network(recipe, checkpoint, config, Data(None, {}), launch.device)
    launch.control.on_main(lambda: log("\n".join(prediction_lines(network, Layout.of(config.model), numbers, launch.device))))


def read_numbers(texts: tuple[str, ...]) -> list[int]:
    """Decimal numbers of at least 1. UserError names the first that is not one."""
    if not texts:
        raise UserError("no number given; for example: predict 27 837799")
    for text in texts:
        if not re.fullmatch(r"[0-9]+", text) or not text.strip("0"):
            raise UserError(f"{text[:40]!r} is not a whole number of at least 1; give decimal digits only")
        if len(text) > MAX_DECIMALS:
            raise UserError(f"{text[:20]}... has {len(text):,} decimal digits; give at most {MAX_DECIMALS:,}")
    with _long_integers():
        return [int(text) for text in texts]


def prediction_lines(network: Any, layout: Layout, numbers: list[int], device: Any) -> Iterator[str]:
    """A line for each number: true steps, the model's and the formula's."""
    import torch

    from recipes.data.collatz import DIGITS, binary_digits
    from recipes.data.trajectories import parity_vectors, to_words
    from recipes.models.collatz import predict_batch

    for n in numbers:
        tokens, steps = parity_vectors([n], layout.max_len)
        truth, formula = f"{_short(n)}: {steps[0]} steps", f"10.43 ln n = {FORMULA * math.log(n):.0f}"
        if layout.digits and n.bit_length() > DIGITS:
            yield f"{truth}; not predicted, the model reads at most {DIGITS} binary digits; {formula}"
        elif not layout.scores(steps[0]):
            within = f"within the {layout.prefix_len} parities that the model reads" if n > 1 else "at once"
            yield f"{truth}; not predicted, it is at 1 {within}; {formula}"
        else:
            batch = {"tokens": torch.from_numpy(tokens).to(device)}
            if layout.digits:
                batch["digits"] = torch.from_numpy(binary_digits(to_words([n]))).to(device)
            predicted = float(steps_of(predict_batch(network, batch)[0])[0])
            yield f"{truth}; predicted {predicted:.0f} ({predicted - steps[0]:+.0f}); {formula}"


@contextmanager
def _long_integers() -> Iterator[None]:
    """Lift Python's limit of 4,300 decimal digits for reading and printing a number."""
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(MAX_DECIMALS)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(before)


def _short(n: int) -> str:
    with _long_integers():
        text = str(n)
    return text if len(text) <= 60 else f"{text[:20]}...{text[-20:]} ({len(text):,} digits)"


# ------------------------------------------------------------------------------------------------------------- analyse


def analyse(recipe: Recipe, flags: Analyse, launch: Launch, log: Log) -> None:
    """The `analyse` sub-command: the metrics are exact on any number of processes; rank 0 draws."""
    from recipes.data.collatz import Layout
    from trainer.checkpoints.network import evaluate_objective, find_checkpoint, load_network
    from trainer.evaluation.objective import Objective

    checkpoint, config = find_checkpoint(recipe, flags.model_path, launch)
    try:
        data, layout = config.data, Layout.of(config.model)
        measured = held_out_with_baselines("val", data.val_numbers, data.start, data.val_span, layout).words
        count = flags.numbers if flags.numbers is not None else min(4096, max(2, data.val_span // 8192))
        dataset = held_out_with_baselines("analysis", count, data.start, data.val_span, layout, measured)
    except ValueError as reason:
        raise UserError(f"--numbers: {reason}") from None
    network = load_network(recipe, checkpoint, config, Data(None, {}), launch.device)
    means = evaluate_objective(recipe, Objective(network, recipe), config, dataset, launch, flags.batch_size)
    log(f"{checkpoint.path} on {len(dataset):,} numbers held out of training, {beside_baselines(means)}")
    folder = Path(flags.output_dir) if flags.output_dir else checkpoint.path.resolve().parent.parent / "plots"

    def draw() -> None:
        predictions = predict_all(network, dataset, flags.batch_size, launch.device)
        log("\n".join(table(predictions)))
        for name, picture in (("errors", draw_errors), ("confusion", draw_confusion), ("states", draw_states)):
            path = folder / f"collatz_{name}.png"
            try:
                save_figure(picture(predictions), path)
            except OSError as error:
                raise UserError(f"{folder}: {error.strerror or error}; choose another --output_dir") from None
            log(f"Picture: {path}")

    launch.control.on_main(draw)


def predict_all(network: Any, dataset: HeldOutNumbers, batch_size: int, device: Any) -> Predictions:
    """Run a model over a set, without gradients."""
    import torch

    from recipes.models.collatz import PADDING

    rows: dict[str, list[np.ndarray]] = {}
    confusion = np.zeros((2, 2, 2), np.int64)
    with torch.no_grad():
        for first in range(0, len(dataset), batch_size):
            host = dataset.__getitems__(range(first, min(first + batch_size, len(dataset))))
            batch = {name: tensor.to(device) for name, tensor in host.items()}
            src, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
            predicted, logits, pooled = network.forward_with_pooled(src, src == PADDING, batch.get("digits"))
            cells = (4 * src + 2 * targets + logits[..., :2].argmax(-1))[targets != PADDING]
            confusion += torch.bincount(cells, minlength=8).cpu().numpy().reshape(2, 2, 2)
            values = {"predicted": steps_of(predicted.float()), "pooled": pooled.float()}
            values |= {name: steps_of(host[name]) for name in ("magnitude", "formula")}
            values |= {name: host[name] for name in ("kind", "steps", "scored")}
            for name, value in values.items():
                rows.setdefault(name, []).append(value.cpu().numpy())
    columns = {name: np.concatenate(parts) for name, parts in rows.items()}
    return Predictions(digits=log_and_digits(dataset.words)[1], confusion=confusion, **columns)


def magnitudes(p: Predictions) -> list[tuple[str, np.ndarray]]:
    """(label, bool [numbers]: which are scored and in it) of each range of binary digits that holds at least 5 such numbers."""
    edges = [1, *range(11, 31, 3), 60, 70, 80, 90, 100, 110, 128, 193]
    ranges = [(low, high, (p.digits >= low) & (p.digits < high) & p.scored) for low, high in pairwise(edges)]
    return [(f"{low}-{high - 1}" if high > low + 1 else str(low), rows) for low, high, rows in ranges if rows.sum() >= 5]


def errors(p: Predictions, rows: np.ndarray) -> dict[str, float]:
    """Mean absolute errors in steps of the model and its baselines over some of the numbers."""
    by_source = {"model": p.predicted, "mean of the magnitude": p.magnitude, "10.43 ln n": p.formula}
    return {name: float(np.abs(steps - p.steps)[rows].mean()) for name, steps in by_source.items()}


def table(p: Predictions) -> Iterator[str]:
    """Errors by magnitude as text."""
    yield "mean error in steps by binary digits of n: model (mean of the magnitude, 10.43 ln n)"
    for label, rows in magnitudes(p):
        model, magnitude, formula = errors(p, rows).values()
        yield f"  {label:>9} digits, {rows.sum():5d} numbers: {model:6.1f} ({magnitude:6.1f}, {formula:6.1f})"


def draw_errors(p: Predictions) -> Figure:
    """Errors in steps by magnitude beside the baselines; predicted against true steps."""
    figure = new_figure(14, 5)
    left, right = figure.subplots(1, 2)
    groups = magnitudes(p)
    places = np.arange(len(groups))
    means = [errors(p, rows) for _, rows in groups]
    for shift, name in enumerate(("model", "mean of the magnitude", "10.43 ln n")):
        left.bar(places + 0.27 * (shift - 1), [row[name] for row in means], 0.27, label=name)
    left.set_xticks(places, [f"{label}\n({rows.sum()})" for label, rows in groups], fontsize=7)
    left.set(xlabel="binary digits of n (numbers)", ylabel="mean absolute error (steps)", title="Errors by magnitude")
    left.legend()
    _by_kind(right, p.steps[p.scored], p.predicted[p.scored], p.kind[p.scored])
    ends = [p.steps[p.scored].min(), p.steps[p.scored].max()]
    right.plot(ends, ends, color="0.3", linewidth=1)
    right.set(xlabel="true steps", ylabel="predicted steps", title="Held-out numbers")
    return figure


def draw_confusion(p: Predictions) -> Figure:
    """Confusion of the next-parity head, by the parity before: counts, and shares of each row."""
    figure = new_figure(8, 4)
    axes = figure.subplots(1, 2)
    figure.suptitle("Next parity of held-out numbers")
    for before, axis in enumerate(axes):
        counts = p.confusion[before]
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for truth, guess in np.ndindex(2, 2):
            colour = "white" if shares[truth, guess] > 0.5 else "black"
            text = f"{counts[truth, guess]:,}\n{100 * shares[truth, guess]:.1f} %"
            axis.text(guess, truth, text, ha="center", va="center", color=colour)
        axis.set_xticks((0, 1), ("even", "odd"))
        axis.set_yticks((0, 1), ("even", "odd"))
        axis.set(xlabel="predicted parity", ylabel="true parity", title=f"after an {('even', 'odd')[before]} number")
    return figure


def draw_states(p: Predictions) -> Figure:
    """The first two principal components of the stopping-time head's input, coloured by steps and by kind."""
    figure = new_figure(12, 5)
    left, right = figure.subplots(1, 2)
    states = p.pooled[p.scored]
    centred = states - states.mean(0)
    _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
    (x, y), shares = directions[:2] @ centred.T, sizes**2 / max((sizes**2).sum(), 1e-30)
    drawn = left.scatter(x, y, c=p.steps[p.scored], s=6, cmap="viridis")
    figure.colorbar(drawn, ax=left, label="true steps")
    _by_kind(right, x, y, p.kind[p.scored])
    for axis in (left, right):
        axis.set(
            xlabel=f"component 1 ({100 * shares[0]:.0f} % of the variance)", ylabel=f"component 2 ({100 * shares[1]:.0f} %)"
        )
    left.set_title("Pooled states of held-out numbers")
    return figure


def _by_kind(axis: Axes, x: np.ndarray, y: np.ndarray, kind: np.ndarray) -> None:
    from recipes.data.collatz import KINDS

    for number, name in enumerate(KINDS):
        axis.scatter(x[kind == number], y[kind == number], s=6, alpha=0.6, label=name)
    axis.legend(markerscale=2)
