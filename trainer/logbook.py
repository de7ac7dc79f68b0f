"""What the trainer remembers from step to step, and what it says about it: log lines, metrics, progress bar, status."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainer.alerts import Alerts
from trainer.batches import length_of
from trainer.console import Console, format_duration
from trainer.evaluation import summarise
from trainer.hardware import memory_text, peak_flops
from trainer.metrics import Metrics
from trainer.setup import Session

NOTICED_LINES, NOTICED_CHARACTERS = 10, 300  # of each process: an evaluation may find fault with every sample


@dataclass
class Progress:
    """What the trainer remembers from one step to the next; all of it is in trainer_state.json."""

    step: int = 0
    evaluated_step: int = 0
    evaluated: float | None = None
    """the best-model metric at `evaluated_step`"""
    best: float | None = None
    best_step: int = 0
    watched_best: float | None = None
    """best value of the metric that patience waits for"""
    evaluations_without_better: int = 0
    train_loss: float | None = None
    hours: float = 0.0
    bad_steps: int = 0
    bad_in_a_row: int = 0
    sums: list[float | None] = field(default_factory=list)
    """loss sums of the log interval so far, over all ranks, by term"""
    counts: list[float] = field(default_factory=list)


class Logbook:
    """The log interval: sums on the device, counts on the host, times; and the lines that come of them."""

    def __init__(self, session: Session, progress: Progress, metrics: Metrics | None, console: Console, alerts: Alerts) -> None:
        self.session, self.progress, self.metrics, self.console, self.alerts = session, progress, metrics, console, alerts
        self.launch, self.recipe = session.launch, session.recipe
        self.terms = list(session.weights)
        self.batch_size = session.config.optimisation.effective_batch_size
        self.samples = length_of(session.data.train)
        zeros = [0.0] * len(self.terms)
        # The sums of a checkpoint are global: rank 0 alone carries them on.
        carried = [math.nan if s is None else s for s in progress.sums] or zeros
        mine = carried if self.launch.is_main else zeros
        self.sums = torch.tensor(mine, dtype=torch.float64, device=self.launch.device)
        self.counts = list(progress.counts) or zeros
        self.timed_counts = zeros
        self.hours_before, self.started = progress.hours, time.monotonic()
        self.interval_start, self.interval_first = self.started, progress.step
        self.waited, self.aside = 0.0, 0.0
        self.per_second, self.seconds_per_step = math.nan, math.nan
        self.unit = self.recipe.speed[0] if self.recipe.speed else "samples"
        self.last_line = "no step logged yet"
        self.peak = peak_flops(self.launch.device, session.precision)

    def count(self, totals: Sequence[float]) -> None:
        """Add a step's items over all ranks, by term."""
        self.counts = [a + b for a, b in zip(self.counts, totals, strict=True)]
        self.timed_counts = [a + b for a, b in zip(self.timed_counts, totals, strict=True)]

    def settle(self) -> None:
        """Bring `progress` up to date for a checkpoint. Collective."""
        sums = self.launch.control.sum(self.sums.tolist()).wait()
        self.progress.sums = [s if math.isfinite(s) else None for s in sums]  # JSON has no NaN
        self.progress.counts = self.counts
        self.progress.hours = self.hours()

    def log(
        self, learning_rate: float, grad_norm: Tensor, norms: Mapping[str, Tensor], bad_steps: int, seconds_left: float
    ) -> None:
        """Training metrics of the interval, means weighted by items. Here the host reads the device. Collective."""
        p = self.progress
        sums = self.launch.control.sum(self.sums.tolist()).wait()
        means = {t: s / max(n, 1.0) for t, s, n in zip(self.terms, sums, self.counts, strict=True)}
        elapsed = max(time.monotonic() - self.interval_start - self.aside, 1e-9)
        steps = max(1, p.step - self.interval_first)
        term = self.recipe.speed[1] if self.recipe.speed else None
        done = self.timed_counts[self.terms.index(term)] if term else steps * self.batch_size
        self.per_second, self.seconds_per_step = done / elapsed, elapsed / steps
        found = {f"train/{key}": value for key, value in summarise(self.recipe, means, self.session.weights).items()}
        found |= {
            "train/learning_rate": learning_rate,
            "train/grad_norm": float(grad_norm),
            "train/iter_time_ms": 1000 * self.seconds_per_step,
            "train/interval_seconds": elapsed,
            f"train/{self.unit}_per_sec": self.per_second,
            "train/data_wait_fraction": min(1.0, self.waited / elapsed),
            "train/bad_steps": float(bad_steps),
        }
        found |= {f"train/grad_norm/{layer}": float(norm) for layer, norm in norms.items()}
        if self.samples:
            found["train/epoch"] = p.step * self.batch_size / self.samples
        flops = self.recipe.flops_per_item(self.session.config, self.session.network) if self.peak else None
        if self.peak and flops:
            found["train/mfu"] = self.per_second * flops / (self.peak * self.launch.processes)
        p.train_loss = found["train/loss"] if math.isfinite(found["train/loss"]) else None
        self.sums.zero_()
        zeros = [0.0] * len(self.terms)
        self.counts, self.timed_counts = zeros, zeros
        self.interval_start, self.interval_first, self.waited, self.aside = time.monotonic(), p.step, 0.0, 0.0
        self.write(found)
        self.last_line = self.recipe.log_line(p.step, found)
        self.console.say(self.last_line)
        if math.isfinite(seconds_left):
            self.console.say(f"Elapsed: {self.hours():.2f}h | Remaining: {max(0.0, seconds_left) / 3600:.2f}h")

    def write(self, found: dict[str, float]) -> None:
        """To metrics.jsonl and the trackers."""
        if self.metrics is not None:
            self.metrics.log(self.progress.step, found)

    def epoch(self, steps_ago: int = 0) -> int:
        """Whole epochs behind this step, or one before it; 0 for an endless stream."""
        return max(0, self.progress.step - steps_ago) * self.batch_size // self.samples if self.samples else 0

    def epoch_ended(self) -> bool:
        """Whether the last step finished an epoch."""
        return self.epoch(steps_ago=1) < self.epoch()

    def hours(self) -> float:
        """Hours trained, over all launches."""
        return self.hours_before + (time.monotonic() - self.started) / 3600

    def eta_seconds(self) -> float:
        """Seconds to the last step at the rate of the last log interval; NaN before the first."""
        return (self.session.total_steps - self.progress.step) * self.seconds_per_step

    def show_progress(self) -> None:
        """The progress bar, on a terminal; every `alert_every` steps an alert. Both know what the last log line knew."""
        p, every, total, eta = self.progress, self.session.config.run.alert_every, self.session.total_steps, self.eta_seconds()
        loss = math.nan if p.train_loss is None else p.train_loss
        self.console.progress(p.step, total, loss, self.per_second, self.unit, eta)
        if every and p.step % every == 0:
            logged = (
                f"loss {loss:.4f} in the log interval to step {self.interval_first:,}, "
                f"{self.per_second:,.0f} {self.unit}/s, {format_duration(eta)} to go"
            )
            self.alerts.send(
                "progress",
                f"step {p.step:,} of {total:,}: {logged if math.isfinite(eta) else 'nothing logged yet in this launch'}",
                step=p.step, total_steps=total, loss=loss, loss_step=self.interval_first, eta_seconds=eta,
                **{f"{self.unit}_per_sec": self.per_second},
            )  # fmt: skip

    def tell(self, event: str, text: str) -> None:
        """Something out of the ordinary: to the console and, as an alert, to whoever is far away."""
        self.console.say(text)
        self.alerts.send(event, text, step=self.progress.step)

    def tell_noticed(self) -> None:
        """What the recipe noticed in an evaluation, on any process. Collective; bounded, whatever it noticed."""
        mine = [line[:NOTICED_CHARACTERS] for line in self.recipe.noticed()]
        gathered = self.launch.control.gather([len(mine), mine[:NOTICED_LINES]])
        # A sample that fills up the last batch of a process is a sample of another one too.
        lines = list(dict.fromkeys(line for _, lines in gathered for line in lines))
        more = sum(number for number, _ in gathered) - sum(len(lines) for _, lines in gathered)
        if lines:
            rest = [f"... and {more} more"] if more else []
            self.tell("noticed", "\n".join([f"Noticed at step {self.progress.step:,}:", *lines, *rest]))

    def status(self) -> str:
        """The answer to `status`."""
        eta = self.eta_seconds()
        left = f"about {format_duration(eta)} to go" if math.isfinite(eta) else "no estimate of the rest yet"
        return (
            f"Step {self.progress.step:,} of {self.session.total_steps:,}; {self.hours():.2f} h trained, {left}; "
            f"{memory_text(self.launch.device)}; last: {self.last_line}"
        )
