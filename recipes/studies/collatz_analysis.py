"""What is done with a trained Collatz model: predictions for any number, and pictures of its errors on held-out ones."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from tyro.conf import Positional, arg

from recipes.studies.collatz_errors import FORMULA, held_out, layout, log_and_digits, report, steps_of
from trainer.errors import Refusal
from trainer.plot import new_figure, save_figure
from trainer.recipe import Data, Recipe, move

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from recipes.data.collatz import HeldOutNumbers, Layout
    from trainer.launch import Launch

Say = Callable[[str], None]
MOST_DECIMALS = 10_000  # a number of so many takes some 240,000 steps


@dataclass(frozen=True)
class Predict:
    """Predict the number of steps to 1, beside the true one: `predict 27 837799`."""

    numbers: Positional[tuple[str, ...]]
    """decimal numbers of any size"""
    model_path: str = "checkpoints/best_model"
    """checkpoint folder, as given or below the latest run"""
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True)
class Analyse:
    """Measure a trained model on held-out numbers, and draw its errors, confusions and states."""

    model_path: str = "checkpoints/best_model"
    """checkpoint folder, as given or below the latest run"""
    numbers: int | None = None
    """held-out numbers, others than those measured in training (default: 4096, or what a small val_span has room for)"""
    output_dir: str | None = None
    """where the pictures go (default: plots/ of the run)"""
    batch_size: Annotated[int, arg(aliases=("--batch",))] = 256
    """numbers of one micro-step, summed over all processes"""
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True)
class Seen:
    """What a model says of a set of numbers, [numbers] each unless noted."""

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
    """what the stopping-time head sees [numbers, d_model]"""
    confusion: np.ndarray
    """counts [parity before, true parity, predicted parity]"""


# ------------------------------------------------------------------------------------------------------------- predict


def predict(recipe: Recipe, flags: Predict, launch: Launch, say: Say) -> None:
    """The `predict` sub-command: on rank 0 only, from the checkpoint alone."""
    from trainer.inference import find, load, on_main

    numbers = read_numbers(flags.numbers)
    found, config = find(recipe, flags.model_path, launch)
    network = load(recipe, found, config, Data(None, {}), launch)
    on_main(launch, lambda: say("\n".join(predictions(network, layout(config.model), numbers, launch.device))))


def read_numbers(texts: tuple[str, ...]) -> list[int]:
    """Decimal numbers of at least 1. Refusal, naming the first that is none."""
    if not texts:
        raise Refusal("no number given; for example: predict 27 837799")
    for text in texts:
        if not re.fullmatch(r"[0-9]+", text) or not text.strip("0"):
            raise Refusal(f"{text[:40]!r} is not a whole number of at least 1; give decimal digits only")
        if len(text) > MOST_DECIMALS:
            raise Refusal(f"{text[:20]}... has {len(text):,} decimal digits; give at most {MOST_DECIMALS:,}")
    with _long_integers():
        return [int(text) for text in texts]


def predictions(network: Any, shown: Layout, numbers: list[int], device: Any) -> Iterator[str]:
    """A line for each number: true steps, the model's and the formula's."""
    import torch

    from recipes.data.collatz import DIGITS, binary_digits
    from recipes.data.trajectories import parity_vectors, to_words
    from recipes.models.collatz import read

    for n in numbers:
        tokens, steps = parity_vectors([n], shown.max_len)
        truth, formula = f"{_short(n)}: {steps[0]} steps", f"10.43 ln n = {FORMULA * math.log(n):.0f}"
        if shown.digits and n.bit_length() > DIGITS:
            yield f"{truth}; not predicted, the model reads at most {DIGITS} binary digits; {formula}"
        elif not shown.scores(steps[0]):
            within = f"within the {shown.prefix_len} parities that the model reads" if n > 1 else "at once"
            yield f"{truth}; not predicted, it is at 1 {within}; {formula}"
        else:
            batch = {"tokens": torch.from_numpy(tokens)}
            if shown.digits:
                batch["digits"] = torch.from_numpy(binary_digits(to_words([n])))
            guess = float(steps_of(read(network, move(batch, device))[0])[0])
            yield f"{truth}; predicted {guess:.0f} ({guess - steps[0]:+.0f}); {formula}"


@contextmanager
def _long_integers() -> Iterator[None]:
    """Python refuses to read or print more than 4,300 decimal digits unless told otherwise."""
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(MOST_DECIMALS)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(before)


def _short(n: int) -> str:
    with _long_integers():
        text = str(n)
    return text if len(text) <= 60 else f"{text[:20]}...{text[-20:]} ({len(text):,} digits)"


# ------------------------------------------------------------------------------------------------------------- analyse


def analyse(recipe: Recipe, flags: Analyse, launch: Launch, say: Say) -> None:
    """The `analyse` sub-command: the metrics are exact on any number of processes; rank 0 draws."""
    from trainer.inference import evaluate_trained, find, load, on_main

    if flags.batch_size < 1:
        raise Refusal(f"batch_size {flags.batch_size} must be above 0")
    found, config = find(recipe, flags.model_path, launch)
    try:
        data, shown = config.data, layout(config.model)
        measured = held_out("val", data.val_numbers, data.start, data.val_span, shown).words
        count = flags.numbers if flags.numbers is not None else min(4096, max(2, data.val_span // 8192))
        dataset = held_out("analysis", count, data.start, data.val_span, shown, measured)
    except ValueError as reason:
        raise Refusal(f"--numbers: {reason}") from None
    network = load(recipe, found, config, Data(None, {}), launch)
    means = evaluate_trained(recipe, network, config, dataset, launch, flags.batch_size)
    say(f"{found.path} on {len(dataset):,} numbers held out of training, {report(means)}")
    folder = Path(flags.output_dir) if flags.output_dir else found.path.resolve().parent.parent / "plots"

    def draw() -> None:
        seen = look(network, dataset, flags.batch_size, launch.device)
        say("\n".join(table(seen)))
        for name, picture in (("errors", draw_errors), ("confusion", draw_confusion), ("states", draw_states)):
            path = folder / f"collatz_{name}.png"
            try:
                save_figure(picture(seen), path)
            except OSError as error:
                raise Refusal(f"{folder}: {error.strerror or error}; choose another --output_dir") from None
            say(f"Picture: {path}")

    on_main(launch, draw)


def look(network: Any, dataset: HeldOutNumbers, batch_size: int, device: Any) -> Seen:
    """Run a model over a set, without gradients."""
    import torch

    from recipes.models.collatz import PADDING

    rows: dict[str, list[np.ndarray]] = {}
    confusion = np.zeros((2, 2, 2), np.int64)
    with torch.no_grad():
        for first in range(0, len(dataset), batch_size):
            host = dataset.__getitems__(range(first, min(first + batch_size, len(dataset))))
            batch = move(host, device)
            src, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
            predicted, logits, pooled = network.everything(src, src == PADDING, batch.get("digits"))
            cells = (4 * src + 2 * targets + logits[..., :2].argmax(-1))[targets != PADDING]
            confusion += torch.bincount(cells, minlength=8).cpu().numpy().reshape(2, 2, 2)
            values = {"predicted": steps_of(predicted.float()), "pooled": pooled.float()}
            values |= {name: steps_of(host[name]) for name in ("magnitude", "formula")}
            values |= {name: host[name] for name in ("kind", "steps", "scored")}
            for name, value in values.items():
                rows.setdefault(name, []).append(value.cpu().numpy())
    columns = {name: np.concatenate(parts) for name, parts in rows.items()}
    return Seen(digits=log_and_digits(dataset.words)[1], confusion=confusion, **columns)


def magnitudes(seen: Seen) -> list[tuple[str, np.ndarray]]:
    """(label, which numbers) of ranges of binary digits that hold at least 5 scored numbers."""
    edges = [1, *range(11, 31, 3), 60, 70, 80, 90, 100, 110, 128, 193]
    ranges = [(low, high, (seen.digits >= low) & (seen.digits < high) & seen.scored) for low, high in pairwise(edges)]
    return [(f"{low}-{high - 1}" if high > low + 1 else str(low), rows) for low, high, rows in ranges if rows.sum() >= 5]


def errors(seen: Seen, rows: np.ndarray) -> dict[str, float]:
    """Mean absolute errors in steps of the model and its baselines over some of the numbers."""
    guesses = {"model": seen.predicted, "mean of the magnitude": seen.magnitude, "10.43 ln n": seen.formula}
    return {name: float(np.abs(guess - seen.steps)[rows].mean()) for name, guess in guesses.items()}


def table(seen: Seen) -> Iterator[str]:
    """Errors by magnitude as text."""
    yield "mean error in steps by binary digits of n: model (mean of the magnitude, 10.43 ln n)"
    for label, rows in magnitudes(seen):
        model, magnitude, formula = errors(seen, rows).values()
        yield f"  {label:>9} digits, {rows.sum():5d} numbers: {model:6.1f} ({magnitude:6.1f}, {formula:6.1f})"


def draw_errors(seen: Seen) -> Figure:
    """Errors in steps by magnitude beside the baselines; predicted against true steps."""
    figure = new_figure(14, 5)
    left, right = figure.subplots(1, 2)
    groups = magnitudes(seen)
    places = np.arange(len(groups))
    found = [errors(seen, rows) for _, rows in groups]
    for shift, name in enumerate(("model", "mean of the magnitude", "10.43 ln n")):
        left.bar(places + 0.27 * (shift - 1), [row[name] for row in found], 0.27, label=name)
    left.set_xticks(places, [f"{label}\n({rows.sum()})" for label, rows in groups], fontsize=7)
    left.set(xlabel="binary digits of n (numbers)", ylabel="mean absolute error (steps)", title="Errors by magnitude")
    left.legend()
    _by_kind(right, seen.steps[seen.scored], seen.predicted[seen.scored], seen.kind[seen.scored])
    ends = [seen.steps[seen.scored].min(), seen.steps[seen.scored].max()]
    right.plot(ends, ends, color="0.3", linewidth=1)
    right.set(xlabel="true steps", ylabel="predicted steps", title="Held-out numbers")
    return figure


def draw_confusion(seen: Seen) -> Figure:
    """The next-parity head, by the parity before: counts and shares of each row."""
    figure = new_figure(8, 4)
    axes = figure.subplots(1, 2)
    figure.suptitle("Next parity of held-out numbers")
    for before, axis in enumerate(axes):
        counts = seen.confusion[before]
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


def draw_states(seen: Seen) -> Figure:
    """The two main directions of what the stopping-time head sees, coloured by steps and by kind."""
    figure = new_figure(12, 5)
    left, right = figure.subplots(1, 2)
    states = seen.pooled[seen.scored]
    centred = states - states.mean(0)
    _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
    places, shares = centred @ directions[:2].T, sizes**2 / max((sizes**2).sum(), 1e-30)
    drawn = left.scatter(*places.T, c=seen.steps[seen.scored], s=6, cmap="viridis")
    figure.colorbar(drawn, ax=left, label="true steps")
    _by_kind(right, *places.T, seen.kind[seen.scored])
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
