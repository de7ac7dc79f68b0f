"""The training loop, top to bottom. `Training.steps` is the whole of it:

stop? -> evaluate? -> save? -> this step's micro-batches and their counts over all ranks -> seed -> forward and backward of
each -> update -> log
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from trainer import batches
from trainer.alerts import Alerts
from trainer.console import Console
from trainer.errors import NOT_FINITE, Refusal
from trainer.evaluation import evaluate
from trainer.launch import Sum
from trainer.logbook import Logbook, Progress
from trainer.metrics import Metrics
from trainer.recipe import Batch, move
from trainer.resume import Plan
from trainer.saving import Saver
from trainer.setup import Session, seed_everything
from trainer.stopping import REASONS, StopRequests, finished_reason
from trainer.update import BadSteps, layers


@dataclass
class Upcoming:
    """A step's micro-batches, read ahead, and what the ranks tell each other about it, on its way."""

    micro_batches: list[Batch]
    told: Sum
    error: Exception | None


class Training:
    """One launch of one run, from the first step of this launch to its last."""

    def __init__(
        self,
        session: Session,
        plan: Plan,
        stops: StopRequests,
        metrics: Metrics | None,
        console: Console,
        alerts: Alerts,
    ) -> None:
        self.session, self.stops, self.metrics, self.console = session, stops, metrics, console
        self.recipe, self.config, self.launch = session.recipe, session.config, session.launch
        self.run_config, self.optimisation = self.config.run, self.config.optimisation
        self.terms = list(session.weights)
        self.layers = layers(session.network) if self.run_config.log_grad_norms else {}
        self.progress = Progress(**plan.checkpoint.state["progress"]) if plan.checkpoint else Progress()
        self.bad_steps, self.warned = BadSteps(self.progress.bad_in_a_row, self.progress.bad_steps), False
        self.logbook = Logbook(session, self.progress, metrics, console, alerts)
        self.saver = Saver(session, plan, self.logbook, stops, console)
        self.samples = batches.length_of(session.data.train)
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
        if self.saver.saved_step == p.step and self.saver.epoch_due():
            self.save(False, None)  # only its link: a kill may have come between the save and that
        while True:
            totals, asked, save_asked = self.agreed(upcoming)
            better = False
            if not asked and self.evaluation_due():
                better, asked = self.evaluate()
            reason = asked or self.finished()
            if reason or better or save_asked or self.saver.due():
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
            logging = p.step % self.run_config.log_every == 0 or p.step == s.total_steps
            grad_norm, bad, norms = s.update.step(learning_rate, self.layers if logging else {})
            self.bad_steps.note(bad, p.step)
            self.check_bad_steps()
            self.logbook.count(totals)
            upcoming = self.read_ahead()
            if logging:
                self.logbook.log(learning_rate, grad_norm, norms, self.bad_steps.total, self.stops.seconds_left())
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
        except torch.OutOfMemoryError:  # of a set that is generated on the device
            raise
        except Exception as reason:  # told to every rank, so that none waits for a batch that never comes
            error = reason
        self.logbook.waited += time.monotonic() - began
        save = self.saver.due_by_the_clock() and self.launch.is_main
        votes = [*self.stops.votes(), float(save), float(error is not None)]
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

    def evaluation_due(self) -> bool:
        """Every `eval_every` steps, at the end of an epoch, and at the end of the run; once."""
        p, every = self.progress, self.run_config.eval_every
        if self.finished() not in (None, "stop_at_step"):
            # The launch that finishes a run reports its last evaluation, also if the one before has been killed after it.
            return bool(self.session.data.evaluation) and (p.evaluated_step != p.step or not self.last_evaluation)
        due = (every and p.step % every == 0) or self.logbook.epoch_ended()
        return bool(due and p.step > 0 and p.evaluated_step != p.step and self.session.data.evaluation)

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
        recipe = self.recipe
        watched, direction = recipe.patience_metric or (recipe.best_metric, recipe.best_is)
        for name in (recipe.best_metric, watched):
            if f"eval/{name}" not in found:
                raise Refusal(f"eval/{name} is to be watched, but measured are {', '.join(found)}; name one of them")
        metric = found[f"eval/{recipe.best_metric}"]
        p.evaluated_step, p.evaluated = p.step, metric if math.isfinite(metric) else None
        better = improves(metric, p.best, recipe.best_is)
        if better:
            self.previous_best = (p.best, p.best_step)
            p.best, p.best_step = metric, p.step
        progressed = improves(found[f"eval/{watched}"], p.watched_best, direction)
        if progressed:
            p.watched_best = found[f"eval/{watched}"]
        p.evaluations_without_better = 0 if progressed else p.evaluations_without_better + 1
        self.logbook.write(found)
        self.console.say(self.recipe.evaluation_line(p.step, found))
        self.logbook.tell_noticed()
        self.logbook.aside += time.monotonic() - began
        return better, None

    def save(self, better: bool, reason: str | None) -> None:
        """Write a checkpoint of this step, if there is none, and point to it by the names it has earned."""
        self.bad_steps.settle()
        self.check_bad_steps()  # a run that must end must not leave a checkpoint it cannot go on from
        p = self.progress
        p.bad_steps, p.bad_in_a_row = self.bad_steps.total, self.bad_steps.in_a_row
        finished = reason is not None and reason == self.finished() and reason != "stop_at_step"
        if not self.saver.save(better, reason, finished) and better:
            p.best, p.best_step = self.previous_best  # the weights of the new best are lost

    def check_bad_steps(self) -> None:
        """Tell of this launch's first non-finite step; end the run after too many in a row. Neither changes the weights."""
        if self.bad_steps.in_a_row and not self.warned:
            self.warned = True
            step = self.bad_steps.last_step
            self.logbook.tell("bad step", f"WARNING: the gradient of step {step:,} was not finite; it changed no weight")
        if self.bad_steps.in_a_row >= self.run_config.max_bad_steps:
            raise Refusal(
                f"the gradient was not finite in {self.bad_steps.in_a_row} steps in a row, up to step "
                f"{self.bad_steps.last_step}; lower --learning_rate, lengthen --warmup_steps, or look at the data (checkpoints "
                "are kept)",
                NOT_FINITE,
                known_to_all=True,
            )


def improves(value: float, before: float | None, direction: str) -> bool:
    """Whether `value` is finite and better than the best one before it; `direction`: is `lower` or `higher` better."""
    sign = 1.0 if direction == "lower" else -1.0
    return math.isfinite(value) and (before is None or sign * value < sign * before)
