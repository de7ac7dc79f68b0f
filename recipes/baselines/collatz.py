"""Baselines for Collatz numbers that need no network, counted on the same numbers that a model is measured on.

- The next parity, per kind of number, by its frequency after the parity before. After an odd number it is always even; after
  an even one it is nearly a coin toss for hard numbers, which gives 2/3 ln 2 = 0.46 nats and two of three parities right.
- Steps: exp of the mean log1p(steps) of other numbers with as many binary digits.
- Steps: 10.43 ln n, the mean of a random walk with these two moves (Lagarias & Weiss 1992, section 2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from recipes.data.collatz import HeldOutNumbers, Layout
    from trainer.recipe import Batch

FORMULA = 10.43  # steps per ln n: 3 / ln(4/3), 2/3 of them even
ANOMALY = 3.0  # an error of log1p(steps) above which a number is reported
MAX_ANOMALIES = 20
MAX_LOG_STEPS = 20.0
MAX_STEPS = int(math.expm1(MAX_LOG_STEPS))
NEIGHBOURS = 16  # the mean of a magnitude is over at least so many other numbers, if there are as many


def held_out_with_baselines(
    name: str, length: int, start: int, span: int, layout: Layout, exclude: np.ndarray | None = None
) -> HeldOutNumbers:
    """A held-out set whose batches also hold the baselines' predictions of each number (see `baseline_columns`)."""
    from recipes.data.collatz import HeldOutNumbers

    dataset = HeldOutNumbers(name, length, start, span, layout, exclude)
    dataset.columns = baseline_columns(dataset.as_batch())
    return dataset


def baseline_columns(batch: Batch) -> dict[str, np.ndarray]:
    """float64 [batch] each: `rule_nats` and `rule_right`, the nats and hits of the first-order rule, summed over a number's
    parities but the first; `magnitude` and `formula`, the log1p(steps) that the other two predict."""
    from recipes.data.collatz import KINDS

    tokens, steps, kinds, scored = (batch[name].numpy() for name in ("tokens", "steps", "kind", "scored"))
    ln_n, digits = log_and_digits(batch["words"].numpy())
    before, after = tokens[:, :-1], tokens[:, 1:]
    columns = {name: np.zeros(len(steps)) for name in ("rule_nats", "rule_right", "magnitude")}
    for kind in range(len(KINDS)):
        rows = kinds == kind
        for parity in (0, 1):
            # [numbers of the kind, parities that follow it]
            counts = np.stack([((before == parity) & (after == next_))[rows].sum(1) for next_ in (0, 1)], axis=1)
            total = counts.sum(0)
            nats = -np.log(np.maximum(total, 1) / max(1, total.sum()))
            columns["rule_nats"][rows] += counts @ nats
            columns["rule_right"][rows] += counts[:, total.argmax()]
    columns["magnitude"] = mean_of_others(np.log1p(steps), digits, scored if scored.any() else np.ones_like(scored))
    return {**columns, "formula": np.log1p(FORMULA * ln_n)}


def mean_of_others(log_steps: np.ndarray, digits: np.ndarray, scored: np.ndarray) -> np.ndarray:
    """For each number [batch] the mean log1p(steps) of the other scored numbers with as many binary digits; where these are
    few, also of those with the nearest counts of digits, until there are NEIGHBOURS.

    Unscored numbers are left out, as they are short for their size; and the number itself, as that would make the baseline
    too good where numbers are few."""
    means = np.zeros(len(log_steps))
    others = min(NEIGHBOURS, max(1, int(scored.sum()) - 1))
    for count in np.unique(digits):
        distance = np.abs(digits - count)
        near = scored & (distance <= np.sort(distance[scored])[: others + 1].max())
        same = digits == count
        own = (near & same)[same]
        means[same] = (log_steps[near].sum() - own * log_steps[same]) / np.maximum(near.sum() - own, 1)
    return means


def log_and_digits(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers [batch, words] -> (ln n, binary digits of n) [batch]."""
    from recipes.data.trajectories import from_words

    numbers = from_words(words)
    return np.array([math.log(n) for n in numbers]), np.array([n.bit_length() for n in numbers])


def steps_of(log_steps: Tensor) -> Tensor:
    """The steps of a log1p(steps); bounded, so that one wild prediction does not make a mean infinite."""
    return log_steps.clamp(0.0, MAX_LOG_STEPS).expm1()


def beside_baselines(means: Mapping[str, float]) -> str:
    """Lines with the means that `measure` gives, each with its baselines in brackets."""
    from recipes.data.collatz import KINDS

    m = means
    mae, mae_cut = (
        f"{m[name]:.1f} steps ({m[f'{name}_magnitude']:.1f}, {m[f'{name}_formula']:.1f})" for name in ("mae", "mae_cut")
    )
    errors = [f"off by {mae}"] if m["cut"] < 1 else []
    errors += [f"where the vector is cut ({100 * m['cut']:.0f} %) by {mae_cut}"] if m["cut"] else []
    kinds = ", ".join(f"{kind} {m[f'seq_{kind}']:.4f} ({m[f'rule_{kind}']:.4f})" for kind in KINDS)
    return (
        f"loss: {m['loss']:.4f}\n"
        f"  stopping time: Huber {m['loss_stop']:.4f} (mean of the magnitude {m['stop_magnitude']:.4f}, "
        f"10.43 ln n {m['stop_formula']:.4f}); {', '.join(errors)}; "
        f"{100 * m['unscored']:.1f} % left out, as they end within the prefix\n"
        f"  next parity: {m['loss_seq']:.4f} nats (first-order rule {m['rule']:.4f}), "
        f"{100 * m['accuracy']:.1f} % right ({100 * m['rule_accuracy']:.1f} %); {kinds}"
    )


class Anomalies:
    """Collects the first few held-out numbers of an evaluation whose prediction is far off."""

    def __init__(self) -> None:
        self._lines: dict[int, str] = {}
        self._more = 0

    def record(self, predicted: Tensor, batch: Batch) -> None:
        """Keep those of a batch whose |error of log1p(steps)| is above ANOMALY."""
        import torch

        # It reads the device and keeps state: nothing to compile.
        torch.compiler.disable(self._record)(predicted, batch)

    def _record(self, predicted: Tensor, batch: Batch) -> None:
        from recipes.data.trajectories import from_words

        error = predicted - batch["steps"].float().log1p()
        rows = (((error.abs() > ANOMALY) | ~error.isfinite()) & batch["scored"]).nonzero()[:, 0]
        if not len(rows):
            return
        numbers = from_words(batch["words"][rows].cpu().numpy())
        columns = (batch["steps"][rows].tolist(), steps_of(predicted[rows]).tolist(), error[rows].tolist())
        for n, steps, prediction, off in zip(numbers, *columns, strict=True):
            if n in self._lines:
                continue
            if len(self._lines) == MAX_ANOMALIES:
                self._more += 1
                continue
            bound = "over " if prediction >= MAX_STEPS else ""
            self._lines[n] = f"n = {n}: {steps} steps, predicted {bound}{prediction:.0f} (log1p off by {off:+.2f})"

    def take(self) -> list[str]:
        """A line for each number recorded since the last call; forgets them."""
        lines = [*self._lines.values(), *([f"and {self._more} more numbers"] if self._more else [])]
        self._lines, self._more = {}, 0
        return lines
