"""How wrong a Collatz model is, each figure beside what it takes no network to know.

Baselines, counted on the same numbers that the model is measured on:

- the next parity, per kind of number, by its frequency after the parity before. After an odd number it is always even; after
  an even one it is nearly a coin toss for hard numbers, which makes 2/3 ln 2 = 0.46 nats and two parities of three right;
- steps: exp of the mean log1p(steps) of other numbers with as many binary digits;
- steps: 10.43 ln n, the mean of a random walk with these two moves (Lagarias & Weiss 1992, section 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer.recipe import Data, Recipe

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from recipes.data.collatz import HeldOutNumbers, Layout

Batch = dict[str, "Tensor"]
LEAK = "--mode guide leaks: every position sees the next parity, and all of them together the number of steps"
FORMULA = 10.43  # steps per ln n: 3 / ln(4/3), 2/3 of them even
ANOMALY = 3.0  # an error of log1p(steps) beyond which somebody should look at the number
MOST_ANOMALIES = 20
MOST_LOG_STEPS = 20.0
MOST_STEPS = int(math.expm1(MOST_LOG_STEPS))
NEIGHBOURS = 16  # other numbers that the mean of a magnitude is taken over, at least
BASELINES = ("magnitude", "formula")


def layout(model: Any) -> Layout:
    """What a sample shows, for the `model` section of a configuration."""
    from recipes.data.collatz import Layout

    return Layout(model.max_len, model.prefix_len, model.input == "digits", model.mode == "guide")


def held_out(
    name: str, length: int, start: int, span: int, shown: Layout, apart_from: np.ndarray | None = None
) -> HeldOutNumbers:
    """A held-out set whose batches also tell what the baselines say of each number."""
    from recipes.data.collatz import HeldOutNumbers

    dataset = HeldOutNumbers(name, length, start, span, shown, apart_from)
    dataset.columns = baseline_columns(dataset.everything())
    return dataset


def baseline_columns(batch: Batch) -> dict[str, np.ndarray]:
    """By number, float64 [batch]: `rule_nats` and `rule_right`, summed over its parities but the first, of the first-order
    rule; `magnitude` and `formula`, the log1p(steps) that the other two predict."""
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
    """By number [batch]: the mean of the others that are scored and have as many binary digits; where those are few, of as few
    more or less as it takes to have NEIGHBOURS. Numbers that are not scored are short for their size; its own answer is in no
    number's mean, which would make a baseline of few numbers too good."""
    means = np.zeros(len(log_steps))
    others = min(NEIGHBOURS, max(1, int(scored.sum()) - 1))
    for count in np.unique(digits):
        away = np.abs(digits - count)
        near = scored & (away <= np.sort(away[scored])[: others + 1].max())
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
    """The steps that a log1p means; bounded, so that a wild one leaves a mean finite."""
    return log_steps.clamp(0.0, MOST_LOG_STEPS).expm1()


def measured(network: torch.nn.Module, batch: Batch, anomalies: Anomalies) -> dict[str, tuple[Any, Any]]:
    """{name: (sum, count)} of both losses and what else describes the errors; `..._magnitude`, `..._formula` and `rule...`
    are the baselines' on the same numbers."""
    from recipes.data.collatz import KINDS
    from recipes.models.collatz import PADDING, next_token_loss, read, stopping_loss

    predicted, logits = read(network, batch)
    scored, steps, targets = batch["scored"], batch["steps"], batch["tokens"][:, 1:]
    real = targets != PADDING
    cut = steps > batch["tokens"].shape[1]
    nats, count = next_token_loss(logits, batch).double().sum(1), real.sum(1)
    right = ((logits.argmax(-1) == targets) & real).sum(1)
    found = {
        "stop": (stopping_loss(predicted, batch).double().sum(), scored.sum()),
        "seq": (nats.sum(), count.sum()),
        "rule": (batch["rule_nats"].sum(), count.sum()),
        "accuracy": (right.sum(), count.sum()),
        "rule_accuracy": (batch["rule_right"].sum(), count.sum()),
        "unscored": ((~scored).sum(), len(steps)),
        "cut": ((scored & cut).sum(), scored.sum()),
    }
    for suffix, guess in (("", predicted), *((f"_{name}", batch[name].float()) for name in BASELINES)):
        if suffix:
            found[f"stop{suffix}"] = (stopping_loss(guess, batch).double().sum(), scored.sum())
        off = (steps_of(guess) - steps).abs().double()
        for name, rows in (("mae", scored & ~cut), ("mae_cut", scored & cut)):
            found[f"{name}{suffix}"] = ((off * rows).sum(), rows.sum())
    for number, kind in enumerate(KINDS):
        rows = batch["kind"] == number
        found[f"seq_{kind}"] = ((nats * rows).sum(), (count * rows).sum())
        found[f"rule_{kind}"] = ((batch["rule_nats"] * rows).sum(), (count * rows).sum())
    anomalies.look(predicted, batch)
    return found


def report(means: Mapping[str, float]) -> str:
    """What `measured` comes to, the baselines in brackets. Lines."""
    from recipes.data.collatz import KINDS

    def error(name: str) -> str:
        return f"{m[name]:.1f} steps ({m[f'{name}_magnitude']:.1f}, {m[f'{name}_formula']:.1f})"

    m = means
    errors = [f"off by {error('mae')}"] if m["cut"] < 1 else []
    errors += [f"where the vector is cut ({100 * m['cut']:.0f} %) by {error('mae_cut')}"] if m["cut"] else []
    kinds = ", ".join(f"{kind} {m[f'seq_{kind}']:.4f} ({m[f'rule_{kind}']:.4f})" for kind in KINDS)
    return "\n".join(
        [
            f"loss: {m['loss']:.4f}",
            f"  stopping time: Huber {m['loss_stop']:.4f} (mean of the magnitude {m['stop_magnitude']:.4f}, "
            f"10.43 ln n {m['stop_formula']:.4f}); {', '.join(errors)}; "
            f"{100 * m['unscored']:.1f} % left out, as they end within the prefix",
            f"  next parity: {m['loss_seq']:.4f} nats (first-order rule {m['rule']:.4f}), "
            f"{100 * m['accuracy']:.1f} % right ({100 * m['rule_accuracy']:.1f} %); {kinds}",
        ]
    )


class Anomalies:
    """Held-out numbers whose prediction is far off, as met in evaluation; the first few of them."""

    def __init__(self) -> None:
        self._texts: dict[int, str] = {}
        self._more = 0

    def look(self, predicted: Tensor, batch: Batch) -> None:
        """Keep those of a batch whose |error of log1p(steps)| is above ANOMALY."""
        import torch

        # It reads the device and remembers: nothing to compile.
        torch.compiler.disable(self._look)(predicted, batch)

    def _look(self, predicted: Tensor, batch: Batch) -> None:
        from recipes.data.trajectories import from_words

        error = predicted - batch["steps"].float().log1p()
        rows = (((error.abs() > ANOMALY) | ~error.isfinite()) & batch["scored"]).nonzero()[:, 0]
        if not len(rows):
            return
        numbers = from_words(batch["words"][rows].cpu().numpy())
        told = zip(
            numbers, batch["steps"][rows].tolist(), steps_of(predicted[rows]).tolist(), error[rows].tolist(), strict=True
        )
        for n, steps, guess, off in told:
            if n not in self._texts and len(self._texts) < MOST_ANOMALIES:
                bound = "over " * (guess >= MOST_STEPS)
                self._texts[n] = f"n = {n}: {steps} steps, predicted {bound}{guess:.0f} (log1p off by {off:+.2f})"
            else:
                self._more += n not in self._texts

    def told(self) -> list[str]:
        """What was kept since the last call."""
        texts = [*self._texts.values(), *([f"and {self._more} more numbers"] if self._more else [])]
        self._texts, self._more = {}, 0
        return texts


class Reports(Recipe):
    """What a recipe says of Collatz models, in training and after it."""

    loss_unit = "Huber of log1p(steps) + nats per parity"

    def __init__(self) -> None:
        self.anomalies = Anomalies()

    def measure(self, network: torch.nn.Module, batch: Batch) -> dict[str, tuple[Any, Any]]:
        """Losses, errors in steps and accuracy, each with its baseline on the same numbers."""
        return measured(network, batch, self.anomalies)

    def noticed(self) -> list[str]:
        """Held-out numbers whose prediction was far off in the last evaluation; emptied by the call."""
        return self.anomalies.told()

    def flops_per_item(self, config: Any, network: Any) -> float:
        """Of a number, for MFU."""
        from recipes.models.collatz import training_flops_per_number

        return training_flops_per_number(network, config.model.max_len - 1)

    def log_line(self, step: int, metrics: Mapping[str, float]) -> str:
        """In the guide's format; the time is that of the whole log interval."""
        losses = f"Stop: {metrics['train/loss_stop']:.4f}, Seq: {metrics['train/loss_seq']:.4f}"
        rate, seconds = metrics["train/learning_rate"], metrics["train/interval_seconds"]
        return f"Step {step} | Loss: {metrics['train/loss']:.4f} ({losses}) | LR: {rate:.2e} | Time: {seconds:.2f}s"

    def evaluation_line(self, step: int, metrics: Mapping[str, float]) -> str:
        """Every metric beside its baselines."""
        return f"Evaluating at step {step}... " + report(_bare(metrics, "eval/val_"))

    def baseline(self, config: Any, data: Data) -> tuple[str, float]:
        """The objective of the mean steps of each magnitude and the first-order rule together."""
        from recipes.models.collatz import stopping_loss

        batch = data.evaluation["val"].everything()
        sums = {"stop": stopping_loss(batch["magnitude"].float(), batch).sum(), "seq": batch["rule_nats"].sum()}
        counts, weights = self.items(batch), self.loss_weights(config)
        loss = sum(weights[term] * float(sums[term]) / max(1, counts[term]) for term in sums)
        return "mean of the magnitude + first-order rule", loss

    def after_training(self, config: Any, data: Data, run: Any, checkpoint: Any, say: Callable[[str], None]) -> None:
        """Whether the loss fell, and how far: beside the baselines of both terms."""
        from trainer.metrics import read_metrics

        rows = read_metrics(run.metrics)
        losses = [row["train/loss"] for row in rows if "train/loss" in row]
        final = next(row for row in reversed(rows) if "final/val_loss" in row)
        name, baseline = self.baseline(config, data)
        say(f"Training loss: {losses[0]:.4f} in the first log interval, {losses[-1]:.4f} in the last")
        say(f"Held-out numbers: {final['final/val_loss']:.4f}; for scale, {name}: {baseline:.4f}")


def _bare(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
