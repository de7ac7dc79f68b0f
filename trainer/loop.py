"""The training loop, top to bottom. `Training.steps` is the whole of it:

stop? -> evaluate? -> save? -> this step's micro-batches and their counts over all ranks -> seed -> forward and backward of
each -> update -> log
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import time
from dataclasses import dataclass

import torch

from trainer import batches, checkpoint, retention
from trainer.config import to_yaml
from trainer.console import Console
from trainer.errors import NOT_FINITE, Refusal
from trainer.evaluation import evaluate
from trainer.launch import Sum
from trainer.logbook import Logbook, Progress
from trainer.metrics import Metrics
from trainer.recipe import Batch, move
from trainer.resume import Plan
from trainer.setup import Session, seed_everything
from trainer.stopping import REASONS, StopRequests, finished_reason
from trainer.update import BadSteps

# The links each kind of stop leaves beside the step checkpoint.
STOP_LINKS = {"time_limit": "checkpoint_time_limit"}
# What a save takes, until the first one has been timed: fp32 weights and two moments onto a slow disk, bytes per second.
SLOW_SAVE_SECONDS, SLOW_DISK = 1.0, 200e6


@dataclass
class Upcoming:
    """A step's micro-batches, read ahead, and what the ranks tell each other about it, on its way."""

    micro_batches: list[Batch]
    told: Sum
    error: Exception | None


class Training:
    """One launch of one run, from the first step of this launch to its last."""

    def __init__(self, session: Session, plan: Plan, stops: StopRequests, metrics: Metrics | None, console: Console) -> None:
        self.session, self.stops, self.metrics, self.console = session, stops, metrics, console
        self.recipe, self.config, self.launch = session.recipe, session.config, session.launch
        self.run_config, self.optimisation = self.config.run, self.config.optimisation
        self.folder, self.run_directory = plan.directory.checkpoints, plan.directory
        self.terms = list(session.weights)
        self.progress = Progress(**plan.checkpoint.state["progress"]) if plan.checkpoint else Progress()
        self.saved_step = self.progress.step if plan.checkpoint and plan.same_run else None
        self.bad_steps = BadSteps(self.progress.bad_in_a_row, self.progress.bad_steps)
        self.logbook = Logbook(session, self.progress, metrics, console)
        self.samples = batches.length_of(session.data.train)
        self.last_saved_at = time.monotonic()
        stops.expect_save(SLOW_SAVE_SECONDS + 3 * sum(e.size_bytes for e in session.state.model_entries()) / SLOW_DISK)
        self.last_evaluation: dict[str, float] = {}
        self.previous_best: tuple[float | None, int] = (None, 0)

    def run(self) -> str:
        """Train until something ends it; the reason."""
        s, p = self.session, self.progress
        first = p.step * self.optimisation.gradient_accumulation_steps
        order = batches.TrainingOrder(
            self.optimisation.batch_size,
            self.launch.rank,
            self.launch.processes,
            self.optimisation.seed,
            self.samples,
            first,
        )
        self.reader = batches.read(s.data.train, order, self.run_config, self.launch.device)
        s.model.train()
        try:
            return self.steps()
        finally:
            batches.close(self.reader)

    def steps(self) -> str:
        """The loop itself."""
        s, p = self.session, self.progress
        accumulation = self.optimisation.gradient_accumulation_steps
        upcoming = self.read_ahead()
        if self.saved_step == p.step and self.epoch_ended():
            self.save(False, None)  # only its link: a kill may have come between the save and that
        while True:
            totals, asked, save_asked = self.agreed(upcoming)
            better = False
            if not asked and self.evaluation_due():
                better, asked = self.evaluate()
            reason = asked or self.finished()
            if reason or better or save_asked or self.save_due():
                self.save(better, reason)
            if reason:
                return reason

            began = time.monotonic()
            seed_everything(self.launch.device, self.optimisation.seed, p.step, self.launch.rank)
            scale = torch.tensor([s.weights[t] / max(n, 1.0) for t, n in zip(self.terms, totals, strict=True)])
            scale = scale.to(self.launch.device, non_blocking=True)
            for number, batch in enumerate(upcoming.micro_batches, start=1):
                with s.update.micro_step(last=number == accumulation):
                    sums = s.model(move(batch, self.launch.device))
                    s.update.backward((sums * scale).sum())
                self.logbook.sums += sums.detach()
            p.step += 1
            learning_rate = self.recipe.learning_rate(p.step, s.total_steps, self.config)
            grad_norm, bad = s.update.step(learning_rate)
            self.bad_steps.note(bad)
            self.check_bad_steps()
            self.logbook.count(totals)
            upcoming = self.read_ahead()
            if p.step % self.run_config.log_every == 0 or p.step == s.total_steps:
                self.logbook.log(learning_rate, grad_norm, self.bad_steps.total, self.stops.seconds_left())
            self.stops.note_step(time.monotonic() - began)
            self.logbook.show_progress()

    def read_ahead(self) -> Upcoming:
        """The next step's micro-batches; sends off their counts, and this rank's votes, while the device still works."""
        began, micro_batches, error = time.monotonic(), [], None
        counts = [0.0] * len(self.terms)
        try:
            for _ in range(self.optimisation.gradient_accumulation_steps):
                micro_batches.append(next(self.reader))
                items = self.recipe.items(micro_batches[-1])
                counts = [n + items[term] for n, term in zip(counts, self.terms, strict=True)]
        except Exception as reason:  # told to every rank, so that none waits for a batch that never comes
            error = reason
        self.logbook.waited += time.monotonic() - began
        save = self.run_config.save_minutes and time.monotonic() - self.last_saved_at > 60 * self.run_config.save_minutes
        votes = [*self.stops.votes(), float(bool(save) and self.launch.is_main), float(error is not None)]
        return Upcoming(micro_batches, self.launch.control.sum([*counts, *votes]), error)

    def agreed(self, upcoming: Upcoming) -> tuple[list[float], str | None, bool]:
        """(items of the step by term over all ranks, why to stop if a rank asks to, whether to save by the clock)."""
        told = upcoming.told.wait()
        votes = told[len(self.terms) :]
        if votes[-1]:
            error = upcoming.error  # None on the ranks that are well
            text = (
                f"reading data failed on rank {self.launch.rank}: {type(error).__name__}: {' '.join(str(error).split())[-600:]}"
            )
            self.launch.control.agree(None if error is None else Refusal(text))
        return told[: len(self.terms)], StopRequests.decide(votes[: len(REASONS)]), bool(votes[-2])

    def finished(self) -> str | None:
        """Why the run, or this launch, is over; the same on every rank."""
        p, run = self.progress, self.run_config
        over = finished_reason(
            p.step, self.session.total_steps, p.evaluations_without_better, run.patience, p.train_loss, run.target_loss
        )
        asked = run.stop_at_step and p.step >= run.stop_at_step
        return over or ("stop_at_step" if asked else None)

    def epoch(self) -> int:
        """Whole epochs behind this step; 0 for an endless stream."""
        return self.progress.step * self.optimisation.effective_batch_size // self.samples if self.samples else 0

    def epoch_ended(self) -> bool:
        """Whether the last step finished an epoch."""
        before = (self.progress.step - 1) * self.optimisation.effective_batch_size
        return bool(self.samples) and self.progress.step > 0 and before // self.samples < self.epoch()

    def evaluation_due(self) -> bool:
        """Every `eval_every` steps, at the end of an epoch, and at the end of the run; once."""
        p, every = self.progress, self.run_config.eval_every
        if self.finished() not in (None, "stop_at_step"):
            # The launch that finishes a run reports its last evaluation, also if the one before has been killed after it.
            return bool(self.session.data.evaluation) and (p.evaluated_step != p.step or not self.last_evaluation)
        due = (every and p.step % every == 0) or self.epoch_ended()
        return bool(due and p.step > 0 and p.evaluated_step != p.step and self.session.data.evaluation)

    def save_due(self) -> bool:
        """Every `save_every` steps and at the end of an epoch; not again where this run has just been resumed."""
        every = self.run_config.save_every
        due = bool(every and self.progress.step % every == 0) or self.epoch_ended()
        return due and self.progress.step > 0 and self.saved_step != self.progress.step

    def evaluate(self) -> tuple[bool, str | None]:
        """Measure the evaluation sets. (whether the best metric improved, why to stop if a rank asked to meanwhile)."""
        began, p, asked = time.monotonic(), self.progress, None

        def interrupted() -> bool:
            nonlocal asked
            asked = StopRequests.decide(self.launch.control.sum(self.stops.votes()).wait())
            return asked is not None

        found: dict[str, float] = {}
        for name, dataset in self.session.data.evaluation.items():
            means = evaluate(
                self.session.model,
                self.recipe,
                self.session.weights,
                dataset,
                self.optimisation.batch_size,
                self.run_config,
                self.launch,
                interrupted,
            )
            if means is None:
                return False, asked
            found |= {f"eval/{name}_{key}": value for key, value in means.items()}
        self.last_evaluation = found
        if p.evaluated_step == p.step:
            return False, None  # known already: the launch before was ended between this evaluation and its last save
        p.evaluated_step = p.step
        metric = found[f"eval/{self.recipe.best_metric}"]
        sign = 1.0 if self.recipe.best_is == "lower" else -1.0
        better = math.isfinite(metric) and (p.best is None or sign * metric < sign * p.best)
        if better:
            self.previous_best = (p.best, p.best_step)
            p.best, p.best_step = metric, p.step
        p.evaluations_without_better = 0 if better else p.evaluations_without_better + 1
        self.logbook.write(found)
        self.console.say(self.recipe.evaluation_line(p.step, found))
        self.logbook.aside += time.monotonic() - began
        return better, None

    def save(self, better: bool, reason: str | None) -> None:
        """Write a checkpoint of this step, if there is none, and point to it by the names it has earned."""
        began, p, name = time.monotonic(), self.progress, f"{self.recipe.checkpoint_prefix}{self.progress.step}"
        finished = reason is not None and reason == self.finished() and reason != "stop_at_step"
        links = ["best_model"] * better + [f"checkpoint_epoch_{self.epoch()}"] * self.epoch_ended()
        links += [STOP_LINKS[reason]] if reason in STOP_LINKS else []
        links += ["checkpoint_final"] * finished

        def point() -> None:
            try:
                for link in links:
                    retention.link(self.folder, link, name)
                retention.prune(self.folder, self.recipe.checkpoint_prefix, self.run_config.keep_last)
            except OSError as error:
                self.console.say(f"WARNING: {error}: a link was not set or an old checkpoint not removed")

        written = self.saved_step != p.step
        try:
            if written:
                tensors = {
                    "model": self.session.state.model_entries(),
                    "optimizer": self.session.state.optimizer_entries(),
                }
                checkpoint.write(self.folder, name, tensors, self.documents(), self.launch.control)
                self.saved_step = p.step
            self.launch.control.on_main(point)
        except Refusal as failure:
            if reason:
                raise
            if better:  # its weights are lost: the best one is still the one before
                p.best, p.best_step = self.previous_best
            self.console.say(f"WARNING: {failure}. Training goes on; the checkpoint before it stays")
            return
        finally:
            self.last_saved_at = time.monotonic()
            self.logbook.aside += self.last_saved_at - began
            self.stops.note_save(self.last_saved_at - began)
        if written:
            self.logbook.write({"checkpoint/seconds": time.monotonic() - began})
        what = "Saved checkpoint to" if written else "Linked checkpoint"
        self.console.say(f"{what} {self.folder / name}" + (f" ({', '.join(links)})" if links else ""))

    def documents(self) -> dict[str, str]:
        """The text files of a checkpoint."""
        self.bad_steps.settle()
        p = self.progress
        p.bad_steps, p.bad_in_a_row = self.bad_steps.total, self.bad_steps.in_a_row
        self.logbook.settle()
        state = {
            "recipe": self.recipe.name,
            "progress": dataclasses.asdict(p),
            "epoch": self.epoch(),
            "processes": self.launch.processes,
            "loss_scale": self.session.update.loss_scale_state(),
            "data_fingerprint": self.session.data.fingerprint,
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "accelerate", "safetensors")},
        }
        return {
            "trainer_state.json": json.dumps(state, indent=1),
            "config.yaml": to_yaml(self.config),
            **self.session.documents,
        }

    def check_bad_steps(self) -> None:
        """End the run after too many non-finite steps in a row. The weights are as they were before them."""
        if self.bad_steps.in_a_row >= self.run_config.max_bad_steps:
            raise Refusal(
                f"the gradient was not finite in {self.bad_steps.in_a_row} steps in a row, up to step {self.progress.step}; "
                "lower --learning_rate, lengthen --warmup_steps, or look at the data (checkpoints are kept)",
                NOT_FINITE,
            )
