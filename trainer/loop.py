"""The training loop, top to bottom. `Training.steps` is the whole of it:

stop? -> evaluate? -> save? -> this step's micro-batches and their counts over all ranks -> seed -> forward and backward of
each -> update -> log
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.backends.backend import layers
from trainer.checkpoints.resume import LaunchPlan
from trainer.checkpoints.saving import Saver
from trainer.data import loader
from trainer.data.bad_samples import REPLACED, reading_failed
from trainer.data.seeding import seed_generators
from trainer.distributed.control import PendingSum
from trainer.distributed.stopping import StopReason, StopRequests, finished_reason
from trainer.distributed.votes import EvaluationVotes, StepVotes
from trainer.errors import UserError
from trainer.evaluation.exact import evaluate, improves
from trainer.micro_batches import can_recover, recover
from trainer.optimisation.finite import BadSteps
from trainer.recipe import Batch
from trainer.reporting.alerts import Alerts
from trainer.reporting.console import Console
from trainer.reporting.metrics_logger import MetricsLogger
from trainer.reporting.trackers import Trackers
from trainer.setup import Session
from trainer.state import TrainState


@dataclass
class NextStep:
    """The micro-batches of the next step, already read, and the votes on it, whose sum over the ranks is under way."""

    micro_batches: list[Batch]
    pending_votes: PendingSum
    read_error: Exception | None
    replaced: list[str]
    """a line for each unreadable sample that another one replaces"""


class Training:
    """Trains for one launch: from the step that it starts at to the step that it stops after."""

    def __init__(
        self,
        session: Session,
        plan: LaunchPlan,
        stops: StopRequests,
        trackers: Trackers | None,
        console: Console,
        alerts: Alerts,
    ) -> None:
        self.session, self.stops, self.time_limit = session, stops, stops.time_limit
        self.recipe, self.launch, self.backend = session.recipe, session.launch, session.backend
        self.run_config, self.optimisation = session.config.run, session.config.optimisation
        self.terms = list(session.loss_weights)
        self.layers = layers(session.network) if self.run_config.log_grad_norms else {}
        self.state = plan.checkpoint.train_state if plan.checkpoint else TrainState()
        saved_with = plan.checkpoint.state["data_fingerprint"] if plan.checkpoint else session.data.fingerprint
        if saved_with != session.data.fingerprint:
            self.state.data_changes.append((self.state.step, saved_with))
        self.weighted_counts: list[float] = []
        self.bad_steps = BadSteps(self.state.bad_steps, self.state.bad_steps_in_a_row)
        self.logger = MetricsLogger(session, self.state, trackers, console, alerts)
        self.saver = Saver(session, plan, self.state, self.logger, self.time_limit)
        self.last_evaluation: dict[str, float] = {}
        self.previous_best: tuple[float | None, int] = (None, 0)

    def run(self) -> StopReason:
        """Train until there is a reason to stop, and return it."""
        self.batches = self.session.training_batches(self.state.step, self.stops.any_requested)
        self.backend.model.train()
        try:
            return self.steps()
        finally:
            loader.close(self.batches)
            if self.launch.processes == 1:  # of several, an error may have ended some, and the others would wait for them
                self.settle()

    def steps(self) -> StopReason:
        """The loop; returns the reason to stop."""
        state, backend, recipe = self.state, self.backend, self.recipe
        next_step, first_step = self.read_ahead(), state.step
        if self.saver.saved_step == state.step and self.saver.epoch_due():
            self.save(False, None)  # sets the epoch's link alone: a kill may have come between the save and its link
        while True:
            votes = self.wait_for_votes(next_step)
            if votes.saved == self.launch.processes:
                self.advance_save()
            reason, is_best = votes.stop_reason, False
            if reason and state.step == first_step:  # nothing was trained
                self.settle()
                self.logger.console.log(self.stops.before_the_first_step(reason))
                return reason
            if reason is None and self.evaluation_due():
                is_best, reason = self.evaluate(votes.save > 0)
            reason = reason or self.end_reason()
            due = votes.save > 0 or self.saver.due()
            if reason or is_best or due:
                self.save(is_best, reason, only_best=not (reason or due))
            if reason:
                return reason

            started = time.monotonic()
            seed_generators(self.launch.device, self.optimisation.seed, state.step, self.launch.rank)
            term_weights = self.term_weights(votes.item_counts)
            losses: list[Tensor] = []
            try:
                for number, batch in enumerate(next_step.micro_batches, start=1):
                    with backend.micro_step(last=number == len(next_step.micro_batches)):
                        losses.append(backend.model(loader.to_device(batch, self.launch.device)))
                        backend.backward(losses[-1], term_weights)
            except Exception as error:
                if not can_recover(self.session, error):
                    raise
                next_step = self.split_further(error)
                continue
            self.logger.add_losses(losses)
            if votes.replaced:
                state.replaced_samples += round(votes.replaced)
                self.logger.log_replaced(next_step.replaced, round(votes.replaced))
            state.step += 1
            learning_rate = recipe.scheduled_rate(state.step, self.session.total_steps, self.session.config)
            log_due = state.step % self.run_config.log_every == 0 or state.step in (1, self.session.total_steps)
            layer_norms = backend.layer_norms(self.layers) if log_due and self.layers else {}
            grad_norm, bad = backend.step(learning_rate)
            self.bad_steps.add(bad, state.step)
            self.check_bad_steps()
            self.logger.add_items(votes.item_counts)
            next_step = self.read_ahead()
            if log_due:
                seconds_left, bad_steps = self.time_limit.seconds_left(), self.bad_steps.total
                state.train_loss = self.logger.log_step(learning_rate, grad_norm, layer_norms, bad_steps, seconds_left)
            self.time_limit.record_step(time.monotonic() - started)
            self.logger.show_progress()

    def split_further(self, error: Exception) -> NextStep:
        """After running out of memory: make micro-batches smaller, and read the same step again."""
        self.logger.announce("out of memory", recover(self.session, self.state.step, error))
        self.optimisation = self.session.config.optimisation
        loader.close(self.batches)
        self.batches = self.session.training_batches(self.state.step, self.stops.any_requested)
        return self.read_ahead()

    def read_ahead(self) -> NextStep:
        """Read the next step's micro-batches while the device computes, and start summing all ranks' votes on it."""
        started, micro_batches, error = time.monotonic(), [], None
        replaced: list[str] = []
        item_counts = [0.0] * len(self.terms)
        try:
            for _ in range(self.optimisation.gradient_accumulation_steps):
                micro_batches.append(next(self.batches))
                replaced += micro_batches[-1].pop(REPLACED, [])
                items = self.recipe.items(micro_batches[-1])
                item_counts = [n + items[term] for n, term in zip(item_counts, self.terms, strict=True)]
        except loader.StopWaiting:  # this rank votes to stop, so no rank takes the step
            pass
        except torch.OutOfMemoryError:  # a data set that generates on the device: not an unreadable batch
            raise
        except Exception as reason:  # raised on every rank once the votes are in, so that none waits for this one
            error = reason
        self.logger.add_data_seconds(time.monotonic() - started)
        flags = (self.saver.due_by_the_clock(), error is not None, len(replaced), self.saver.done())
        votes = StepVotes(item_counts, self.stops.votes(), *map(float, flags))
        return NextStep(micro_batches, self.launch.control.sum(votes.pack()), error, replaced)

    def wait_for_votes(self, next_step: NextStep) -> StepVotes:
        """The votes summed over all ranks. UserError if one of them could not read its data."""
        votes = StepVotes.unpack(next_step.pending_votes.wait(), len(self.terms))
        if votes.read_failed:
            self.end_without_data(next_step.read_error)
        return votes

    def end_without_data(self, reason: Exception | None) -> None:
        """Save, then raise on every rank the UserError of the rank that could not read its data."""
        self.save_before_the_end()
        saved_step = self.state.step if self.saver.saved_step == self.state.step else None
        error = reading_failed(reason, self.launch.rank, saved_step, self.run_config) if reason else None
        self.launch.control.raise_if_any(error)

    def save_before_the_end(self) -> None:
        """Save this step, unless it is saved already, where an error is about to end the run on every rank."""
        if self.state.step and self.saver.saved_step != self.state.step:
            self.save(False, None)
            self.settle()

    def term_weights(self, item_counts: list[float]) -> Tensor:
        """Weight of one item of each loss term, [terms]: the term's weight / its items over all ranks x gradient_divisor."""
        if item_counts != self.weighted_counts:
            weights, factor = self.session.loss_weights, self.backend.gradient_divisor
            per_item = [factor * weights[term] / max(count, 1.0) for term, count in zip(self.terms, item_counts, strict=True)]
            self.weighted_counts = item_counts
            self.weights = torch.tensor(per_item).to(self.launch.device, non_blocking=True)
        return self.weights

    def end_reason(self) -> StopReason | None:
        """Why training ends with this step, without anybody asking; None if it goes on. The same on every rank."""
        reason = finished_reason(self.state, self.session.total_steps, self.run_config)
        return reason or (StopReason.STOP_AT_STEP if 0 < self.run_config.stop_at_step <= self.state.step else None)

    def evaluation_due(self) -> bool:
        """Every `eval_every` steps, every `eval_epochs` epochs, and at the end of the run; once. Never if both are 0."""
        state, every = self.state, self.run_config.eval_every
        epochs, every_epochs = self.session.epochs, self.run_config.eval_epochs
        if not self.session.data.evaluation or not (every or every_epochs):
            return False
        if (reason := self.end_reason()) and reason.finished:
            # Its metrics go into the final report; a launch that was killed since the evaluation has taken them with it.
            return state.evaluated_step != state.step or not self.last_evaluation
        epoch_ended = every_epochs and epochs(state.step - 1) // every_epochs < epochs(state.step) // every_epochs
        due = (every and state.step % every == 0) or epoch_ended
        return bool(due and state.step > 0 and state.evaluated_step != state.step)

    def evaluate(self, save_due: bool) -> tuple[bool, StopReason | None]:
        """Evaluate and report. Returns (whether to save these weights as the best, the request to stop that cut it short)."""
        started, state, recipe = time.monotonic(), self.state, self.recipe
        replaced: list[str] = []
        metrics, reason = self.measure(replaced)
        if reason:
            return False, reason
        self.last_evaluation = metrics
        if state.evaluated_step == state.step:
            return False, None  # reported by the launch before, which was killed between this evaluation and its last save
        patience_metric, direction = recipe.patience_metric or (recipe.best_metric, recipe.best_is)
        if unknown := {f"eval/{name}" for name in (recipe.best_metric, patience_metric)} - metrics.keys():
            self.save_before_the_end()
            raise UserError(f"{min(unknown)} is to be watched, but measured are {', '.join(metrics)}; name one of them")
        metric, watched = metrics[f"eval/{recipe.best_metric}"], metrics[f"eval/{patience_metric}"]
        state.evaluated_step, state.evaluated_metric = state.step, metric if math.isfinite(metric) else None
        if improves(watched, state.patience_best, direction):
            state.patience_best, state.evaluations_without_improvement = watched, 0
        else:
            state.evaluations_without_improvement += 1
        self.logger.log_evaluation(metrics, replaced)
        self.logger.exclude_from_timing(time.monotonic() - started)
        if self.saver.in_flight and self.saver.in_flight.step == state.best_step:
            self.settle()  # the best so far is no longer the best if its save fails
        will_save = self.run_config.save_best or save_due or self.saver.due() or self.end_reason() is not None
        is_best = will_save and improves(metric, state.best_metric, recipe.best_is)
        if is_best:
            self.previous_best = (state.best_metric, state.best_step)
            state.best_metric, state.best_step = metric, state.step
        return is_best, None

    def measure(self, replaced: list[str]) -> tuple[dict[str, float], StopReason | None]:
        """Metrics of the evaluation sets, `eval/{set}_{name}`, and the request to stop, if one cut the evaluation short."""
        votes = EvaluationVotes(self.launch.control, self.stops, self.end_without_data)
        model, run, o, weights = self.backend.model, self.run_config, self.optimisation, self.session.loss_weights
        samples = run.eval_iters * o.effective_batch_size
        metrics: dict[str, float] = {}
        self.backend.use_averages(True)
        for name, dataset in self.session.data.evaluation.items():
            means = evaluate(model, self.recipe, weights, dataset, o.batch_size, run, self.launch, votes, samples, replaced)
            if means is None:
                return metrics, votes.reason
            metrics |= {f"eval/{name}_{key}": value for key, value in means.items()}
        self.backend.use_averages(False)
        return metrics, None

    def save(self, is_best: bool, reason: StopReason | None, only_best: bool = False) -> None:
        """Start to save this step, unless it is saved already, and to set its links; before a stop, wait for the end of it."""
        self.settle()  # one save at a time
        self.backend.use_averages(False)  # an evaluation may have been cut short
        self.bad_steps.read()
        self.check_bad_steps()  # a run that ends here for too many of them must not be resumed from here
        state = self.state
        state.bad_steps, state.bad_steps_in_a_row = self.bad_steps.total, self.bad_steps.in_a_row
        state.loss_sums, state.item_counts = self.logger.unlogged()
        state.hours = self.logger.hours()
        self.saver.save(is_best, reason, only_best)
        if reason or self.run_config.save_sync:
            self.settle()

    def settle(self) -> None:
        """Finish the save in flight, if there is one."""
        while self.saver.in_flight:
            self.advance_save()

    def advance_save(self) -> None:
        """Take the save in flight a stage further."""
        if self.saver.advance() == self.state.best_step:  # it failed: the weights of the new best are lost
            self.state.best_metric, self.state.best_step = self.previous_best

    def check_bad_steps(self) -> None:
        """Warn of this launch's first step with a non-finite gradient; end the run after too many in a row."""
        if warning := self.bad_steps.take_warning():
            self.logger.announce("bad step", warning)
        if self.bad_steps.in_a_row >= self.run_config.max_bad_steps:
            self.settle()  # or the checkpoint in flight would be lost
            raise self.bad_steps.too_many()
