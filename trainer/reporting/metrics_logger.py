"""The log interval: loss sums on the device, item counts and times on the host, and the metrics and lines made of them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.distributed.hardware import gpu_memory, memory_text, peak_flops, sum_dtype
from trainer.evaluation.objective import summarise
from trainer.reporting.alerts import Alerts
from trainer.reporting.console import Console, format_duration
from trainer.reporting.trackers import Trackers
from trainer.state import TrainState

if TYPE_CHECKING:
    from trainer.reporting.profiling import StepProfiler
    from trainer.setup import Session

WARNING_LINES, WARNING_CHARACTERS = 10, 300  # of each process: an evaluation may find fault with every sample


class MetricsLogger:
    """Accumulates the metrics of a run and reports them. Called on every process; rank 0 prints and writes.

    It reads `state`, which the loop changes.
    """

    def __init__(
        self, session: Session, state: TrainState, trackers: Trackers | None, console: Console, alerts: Alerts
    ) -> None:
        self.session, self.state, self.trackers, self.console, self.alerts = session, state, trackers, console, alerts
        self.launch, self.recipe = session.launch, session.recipe
        self.terms = list(session.loss_weights)
        zeros = [0.0] * len(self.terms)
        # The sums of a checkpoint are over all ranks: rank 0 alone carries them on.
        resumed = [math.nan if s is None else s for s in state.loss_sums] or zeros
        mine = resumed if self.launch.is_main else zeros
        self.loss_sums = torch.tensor(mine, dtype=sum_dtype(self.launch.device), device=self.launch.device)
        self.item_counts = list(state.item_counts) or zeros
        self.resumed_counts = self.item_counts  # of them, items that an earlier launch trained on
        self.hours_before, self.started = state.hours, time.monotonic()
        self.interval_start, self.interval_start_step = self.started, state.step
        self.data_seconds, self.untimed_seconds = 0.0, 0.0
        self.per_second, self.seconds_per_step = math.nan, math.nan
        self.unit = self.recipe.throughput[0] if self.recipe.throughput else "samples"
        self.counted_term = self.recipe.throughput[1] if self.recipe.throughput else None
        self.last_line = "no step logged yet"
        self.peak = peak_flops(self.launch.device, session.backend.precision)
        self.profiler: StepProfiler | None = None

    # ---- what a step adds

    def add_losses(self, losses: Sequence[Tensor]) -> None:
        """Add the loss sums [terms] of a step's micro-batches on this process. Reads nothing on the host."""
        for loss_sums in losses:
            self.loss_sums += loss_sums.detach()

    def add_items(self, item_counts: Sequence[float]) -> None:
        """Add a step's items over all ranks, by term."""
        self.item_counts = [a + b for a, b in zip(self.item_counts, item_counts, strict=True)]

    def add_data_seconds(self, seconds: float) -> None:
        """Add a wait for data."""
        self.data_seconds += seconds

    def exclude_from_timing(self, seconds: float) -> None:
        """Leave these seconds, of an evaluation or a save, out of the interval's times."""
        self.untimed_seconds += seconds

    def unlogged(self) -> tuple[list[float | None], list[float]]:
        """(loss sums over all ranks, item counts) since the last log line, for a checkpoint. Collective."""
        sums = self.launch.control.sum(self.loss_sums.tolist()).wait()
        return [s if math.isfinite(s) else None for s in sums], self.item_counts

    # ---- what is logged

    def log_step(
        self,
        learning_rate: float,
        grad_norm: Tensor,
        layer_norms: Mapping[str, Tensor],
        bad_steps: int,
        seconds_left: float,
    ) -> float | None:
        """Log the interval: means over its items, rates, memory. Returns its training loss, None if that is not finite.

        Here the host reads the device. Collective.
        """
        step = self.state.step
        sums = self.launch.control.sum(self.loss_sums.tolist()).wait()
        measured = zip(self.terms, sums, self.item_counts, strict=True)
        means = {t: s / max(n, 1.0) for t, s, n in measured if n or t not in self.recipe.monitored}
        elapsed = max(time.monotonic() - self.interval_start - self.untimed_seconds, 1e-9)
        steps = max(1, step - self.interval_start_step)
        counted = steps * self.session.config.optimisation.effective_batch_size
        if self.counted_term:
            term = self.terms.index(self.counted_term)
            counted = self.item_counts[term] - self.resumed_counts[term]
        self.per_second, self.seconds_per_step = counted / elapsed, elapsed / steps
        metrics = {f"train/{key}": v for key, v in summarise(self.recipe, means, self.session.loss_weights).items()}
        metrics |= {
            "train/learning_rate": learning_rate,
            "train/grad_norm": float(grad_norm),
            "train/iter_time_ms": 1000 * self.seconds_per_step,
            "train/interval_seconds": elapsed,
            f"train/{self.unit}_per_sec": self.per_second,
            "train/data_wait_fraction": min(1.0, self.data_seconds / elapsed),
            "train/bad_steps": float(bad_steps),
        }
        if self.state.replaced_samples:
            metrics["train/replaced_samples"] = float(self.state.replaced_samples)
        metrics |= {f"train/grad_norm/{layer}": float(norm) for layer, norm in layer_norms.items()}
        metrics |= {f"train/{name}": value for name, value in self.recipe.report.step_metrics(step).items()}
        if self.session.samples:
            metrics["train/epoch"] = self.session.exact_epochs(step)
        flops = self.recipe.flops_per_item(self.session.config, self.session.network) if self.peak else None
        if self.peak and flops:
            metrics["train/mfu"] = self.per_second * flops / (self.peak * self.launch.processes)
        memory = gpu_memory(self.launch.device)
        metrics |= {f"train/gpu_memory_{name}_gib": size for name, size in memory.items()}
        self._start_interval()
        self.write(metrics)
        of_gpu = [f"MFU: {metrics['train/mfu']:.1%}"] if "train/mfu" in metrics else []
        of_gpu += [f"GPU: {memory['allocated']:.1f} GiB, peak {memory['peak']:.1f}"] if memory else []
        self.last_line = " | ".join([self.recipe.report.log_line(step, metrics), *of_gpu])
        self.console.log(self.last_line)
        if math.isfinite(seconds_left):
            self.console.log(f"Elapsed: {self.hours():.2f}h | Remaining: {max(0.0, seconds_left) / 3600:.2f}h")
        return metrics["train/loss"] if math.isfinite(metrics["train/loss"]) else None

    def _start_interval(self) -> None:
        self.loss_sums.zero_()
        self.item_counts = self.resumed_counts = [0.0] * len(self.terms)
        self.interval_start, self.interval_start_step = time.monotonic(), self.state.step
        self.data_seconds, self.untimed_seconds = 0.0, 0.0

    def log_evaluation(self, metrics: Mapping[str, float], replaced: Sequence[str]) -> None:
        """Log what an evaluation measured, the recipe's warnings, and the samples that were replaced. Collective."""
        self.write(metrics)
        self.console.log(self.recipe.report.evaluation_line(self.state.step, metrics))
        lines = self._of_all_ranks([*self.recipe.report.warnings(), *(f"could not be read, replaced: {r}" for r in replaced)])
        if lines:
            self.announce("noticed", "\n".join([f"Noticed at step {self.state.step:,}:", *lines]))

    def log_replaced(self, mine: Sequence[str], number: int) -> None:
        """Name the samples of this step that could not be read, on this process and on all others. Collective."""
        lines, total = self._of_all_ranks(mine), self.state.replaced_samples
        what = f"WARNING: step {self.state.step + 1:,} takes the next readable sample instead of these"
        text = "\n".join([f"{what} ({total:,} replaced so far in this run):", *lines])
        if total == number:  # the first ones of the run: an alert as well
            self.announce("bad samples", text)
        else:
            self.console.log(text)

    def _of_all_ranks(self, mine: Sequence[str]) -> list[str]:
        """On rank 0 the first lines of every process, and one that says how many more there are. Collective."""
        gathered = self.launch.control.gather([len(mine), [line[:WARNING_CHARACTERS] for line in mine[:WARNING_LINES]]])
        # A sample that fills up the last batch of a process is a sample of another one too.
        lines = list(dict.fromkeys(line for _, lines in gathered for line in lines))
        more = sum(number for number, _ in gathered) - sum(len(lines) for _, lines in gathered)
        return [*lines, f"... and {more} more"] if more else lines

    def write(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write metrics of `step` (default: the current one) to metrics.jsonl and the trackers."""
        if self.trackers is not None:
            self.trackers.log(self.state.step if step is None else step, metrics)

    def announce(self, event: str, text: str) -> None:
        """Print something out of the ordinary, and send it as an alert."""
        self.console.log(text)
        self.alerts.send(event, text, step=self.state.step)

    # ---- how far the run is

    def hours(self) -> float:
        """Hours trained, over all launches."""
        return self.hours_before + (time.monotonic() - self.started) / 3600

    def eta_seconds(self) -> float:
        """Seconds to the last step at the rate of the last log interval; NaN before the first."""
        return (self.session.total_steps - self.state.step) * self.seconds_per_step

    def show_progress(self) -> None:
        """The progress bar, on a terminal; every `alert_every` steps an alert. Both show the last log line's figures."""
        if self.profiler is not None:
            self.profiler.step()
        step, total, eta = self.state.step, self.session.total_steps, self.eta_seconds()
        loss = math.nan if self.state.train_loss is None else self.state.train_loss
        self.console.progress(step, total, loss, self.per_second, self.unit, eta)
        every = self.session.config.run.alert_every
        if every and step % every == 0:
            logged = (
                f"loss {loss:.4f} in the log interval to step {self.interval_start_step:,}, "
                f"{self.per_second:,.0f} {self.unit}/s, {format_duration(eta)} to go"
            )
            self.alerts.send(
                "progress",
                f"step {step:,} of {total:,}: {logged if math.isfinite(eta) else 'nothing logged yet in this launch'}",
                step=step, total_steps=total, loss=loss, loss_step=self.interval_start_step, eta_seconds=eta,
                **{f"{self.unit}_per_sec": self.per_second},
            )  # fmt: skip

    def status(self) -> str:
        """The answer to `status`."""
        eta = self.eta_seconds()
        left = f"about {format_duration(eta)} to go" if math.isfinite(eta) else "no estimate of the rest yet"
        return (
            f"Step {self.state.step:,} of {self.session.total_steps:,}; {self.hours():.2f} h trained, {left}; "
            f"{memory_text(self.launch.device)}; last: {self.last_line}"
        )
