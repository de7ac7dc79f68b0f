"""When a run saves, under which names, and what a checkpoint holds besides tensors."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trainer.backends.tensors import TensorEntry, split_names, whole_entries
from trainer.checkpoints import retention
from trainer.checkpoints.network import is_kept
from trainer.checkpoints.resume import LaunchPlan
from trainer.checkpoints.writing import RankWriter, WriteReport, commit
from trainer.command_line.config import to_yaml
from trainer.distributed.stopping import StopReason
from trainer.distributed.time_limit import TimeLimit
from trainer.errors import CHECKPOINT, UserError
from trainer.reporting.metrics_logger import MetricsLogger
from trainer.reporting.trackers import SAVE_SECONDS
from trainer.state import TrainState

if TYPE_CHECKING:
    from trainer.setup import Session

# The link that a stop adds to its step checkpoint.
STOP_LINKS = {StopReason.TIME_LIMIT: "checkpoint_time_limit"}
# Until the first save has been timed it is expected to take this: fp32 weights and two moments, to a slow disk (bytes/s).
SLOW_SAVE_SECONDS, SLOW_DISK = 1.0, 200e6
POLL_SECONDS = 0.05


class Outcome(NamedTuple):
    """The outcome of a commit, on rank 0."""

    failure: str | None
    warning: str | None
    seconds: float


@dataclass
class SaveInFlight:
    """A save whose state has been copied. All ranks write it; then rank 0 commits it."""

    step: int
    name: str
    links: list[str]
    last: bool
    """whether the launch ends with it"""
    writes: bool
    """False: it only sets links to a checkpoint that is there"""
    stall_seconds: float
    seconds: float
    """of copying, writing and committing so far"""
    job: Future[Any]
    """the current job of this rank's thread: to write, then to commit"""
    committing: bool = False

    def done(self) -> bool:
        """Whether this rank's thread has finished its current job."""
        if not self.job.done():
            return False
        self.job.result()  # raises its exception, if it had one: errors of the disk are results
        return True


class Saver:
    """Saves the checkpoints of a run. All methods are called on every process.

    `save` copies the state, and the loop waits for that alone. A thread of each rank writes its share; when all are done,
    `advance` gathers their reports, and the thread of rank 0 commits the checkpoint; the next `advance` reports it. At most one
    save is in flight. Threads make no collectives: these could be matched with others of the main threads.
    """

    def __init__(
        self, session: Session, plan: LaunchPlan, state: TrainState, logger: MetricsLogger, time_limit: TimeLimit
    ) -> None:
        self.session, self.state, self.logger, self.time_limit = session, state, logger, time_limit
        self.recipe, self.run, self.launch = session.recipe, session.config.run, session.launch
        self.directory, self.folder = plan.directory, plan.directory.checkpoints
        self.saved_step = state.step if plan.checkpoint and plan.same_run else None
        self.saved_at = time.monotonic()
        self.writer, self.thread = RankWriter(self.launch), ThreadPoolExecutor(1, "checkpoint")
        self.in_flight: SaveInFlight | None = None
        size_bytes = sum(entry.size_bytes for entry in self._model_tensors())
        time_limit.expect_save(SLOW_SAVE_SECONDS + 3 * size_bytes / SLOW_DISK)

    def due(self) -> bool:
        """Whether to save this step: every `save_every` steps and `save_epochs` epochs, unless it is saved already."""
        step, every = self.state.step, self.run.save_every
        due = bool(every and step % every == 0) or self.epoch_due()
        return due and step > 0 and self.saved_step != step

    def epoch_due(self) -> bool:
        """Whether the last step finished an epoch that gets a link, every `save_epochs`-th."""
        step, every = self.state.step, self.run.save_epochs
        return bool(every) and self.session.epochs(step) // every > self.session.epochs(step - 1) // every

    def due_by_the_clock(self) -> bool:
        """Whether `save_minutes` have passed since the last save, by the clock of rank 0."""
        minutes = self.run.save_minutes
        return self.launch.is_main and bool(minutes) and time.monotonic() - self.saved_at > 60 * minutes

    def saved_as(self) -> Path | None:
        """The checkpoint of the current step; None if it is not saved."""
        name = f"{self.recipe.checkpoint_prefix}{self.state.step}"
        return self.folder / name if self.saved_step == self.state.step else None

    def save(self, is_best: bool, reason: StopReason | None, only_best: bool) -> None:
        """Start to save this step, unless it is saved already, and to set its links. Collective. No save may be in flight.

        `reason`: why the launch ends with it, or None. `only_best`: it is saved only because it is a new best.
        """
        started, step = time.monotonic(), self.state.step
        name, links = f"{self.recipe.checkpoint_prefix}{step}", self._links(is_best, reason)
        writes = self.saved_step != step
        texts = self._copy(only_best) if writes else None
        job = self.thread.submit(self.writer.write, self.folder, name, texts) if texts else self.thread.submit(dict)
        self.saved_at = time.monotonic()
        stall = self.saved_at - started
        self.logger.exclude_from_timing(stall)
        self.in_flight = SaveInFlight(step, name, links, reason is not None, writes, stall, stall, job)

    def done(self) -> bool:
        """Whether there is a save in flight and this rank has finished its current job for it."""
        return self.in_flight is not None and self.in_flight.done()

    def advance(self) -> int | None:
        """Take the save in flight a stage further: when all ranks have written it, commit it; when that is done, report it.

        Waits for the current stage to end. Collective. Returns the step of a failed save; UserError (exit 5) if the launch ends
        with that save.
        """
        save, self.in_flight = self.in_flight, None
        assert save is not None
        self._wait_for_all(save)
        if save.committing:
            return self._report(save, save.job.result())
        report = save.job.result()
        reports = self.launch.control.gather(report)
        save.seconds += max((each["seconds"] for each in reports or [report] if each), default=0.0)
        save.job, save.committing = self.thread.submit(self._commit, save, reports), True
        self.in_flight = save
        return None

    def _report(self, save: SaveInFlight, outcome: Outcome) -> int | None:
        """Say, on every rank, what became of a save; see `advance`."""
        failure, warning, seconds = outcome
        save.seconds += seconds
        try:
            self.launch.control.raise_if_any(UserError(failure, CHECKPOINT) if failure else None)
        except UserError as error:
            if save.last:
                raise
            before = "this run has no checkpoint yet" if self.saved_step is None else f"that of step {self.saved_step:,} stays"
            self.logger.announce("save failed", f"WARNING: {error}. Training goes on; {before}")
            return save.step
        if warning:
            self.logger.announce("save", warning)
        if save.writes:  # a link alone says nothing of what a save takes
            self.saved_step = save.step
            self.time_limit.record_save(save.seconds)
            row = {SAVE_SECONDS: save.seconds, "checkpoint/stall_seconds": save.stall_seconds}
            self.logger.write(row, save.step)
            if self.launch.is_main and not save.last:
                self.directory.write_status("running", None, save.step, self.folder / save.name)
        what = "Saved checkpoint to" if save.writes else "Linked checkpoint"
        names = f" ({', '.join(save.links)})" if save.links else ""
        self.logger.console.log(f"{what} {self.folder / save.name}{names}")
        return None

    def _wait_for_all(self, save: SaveInFlight) -> None:
        """Wait until every rank has finished its current job. They poll each other, so that a rank that is gone is noticed."""
        ranks, timeout, started = range(self.launch.processes), self.launch.control.timeout, time.monotonic()
        while not all(done := self.launch.control.sum([float(r == self.launch.rank and save.done()) for r in ranks]).wait()):
            wait([save.job], POLL_SECONDS)
            if time.monotonic() - started > timeout.total_seconds():
                writing = ", ".join(str(r) for r in ranks if not done[r])
                raise UserError(
                    f"checkpoint {self.folder / save.name} is still being written after --timeout_minutes "
                    f"{timeout.total_seconds() / 60:g}, by ranks {writing}; does a disk hang?",
                    CHECKPOINT,
                )
        self.logger.exclude_from_timing(time.monotonic() - started)

    def _commit(self, save: SaveInFlight, reports: Sequence[WriteReport]) -> Outcome:
        """The second job of the thread: rank 0 commits the checkpoint and sets its links; the others do nothing."""
        started, failure, warning = time.monotonic(), None, None
        if self.launch.is_main:
            failure = commit(self.folder, save.name, reports) if save.writes else None
            warning = self._set_links(save.links, save.name) if failure is None else None
        return Outcome(failure, warning, time.monotonic() - started)

    def _links(self, is_best: bool, reason: StopReason | None) -> list[str]:
        """The names of the links to set to this checkpoint."""
        links = []
        if is_best:
            links.append("best_model")
        if self.epoch_due():
            links.append(f"checkpoint_epoch_{self.session.epochs(self.state.step)}")
        if reason in STOP_LINKS:
            links.append(STOP_LINKS[reason])
        if reason is not None and reason.finished:
            links.append("checkpoint_final")
        return links

    def _set_links(self, links: list[str], name: str) -> str | None:
        """Set links to the checkpoint and remove old checkpoints; a warning if that fails."""
        try:
            for link in links:
                retention.link(self.folder, link, name)
            retention.prune(self.folder, self.recipe.checkpoint_prefix, self.run.keep_last)
        except OSError as error:
            return f"WARNING: {error}: a link was not set or an old checkpoint not removed"
        return None

    def _model_tensors(self) -> list[TensorEntry]:
        return [entry for entry in self.session.backend.model_tensors() if is_kept(self.session.network, entry.name)]

    def _copy(self, only_best: bool) -> dict[str, str]:
        """Copy the tensors; returns the text files of the checkpoint, {name: content}. Collective."""
        backend, extra = self.session.backend, self.session.extra_files
        tensors = {"model": self._model_tensors(), "optimizer": backend.optimizer_tensors()}
        with_state = split_names(entry.name for entry in tensors["optimizer"])[0].keys()
        tensors |= {file.removesuffix(".safetensors"): whole_entries(t) for file, t in extra.items() if not isinstance(t, str)}
        trainer_state = {
            "recipe": self.recipe.name,
            "train_state": dataclasses.asdict(self.state),
            "epoch": self.session.epochs(self.state.step),
            "only_best": only_best,
            "processes": self.launch.processes,
            "loss_scale": backend.loss_scale_state(),
            "optimizer": backend.state_layout.optimizer,
            "parameters_without_state": sorted(backend.state_layout.tensors.keys() - with_state),
            "data_fingerprint": self.session.data.fingerprint,
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "accelerate", "safetensors")},
        }
        self.writer.copy(tensors)
        return {
            "trainer_state.json": json.dumps(trainer_state, indent=1),
            "config.yaml": to_yaml(self.session.config),
            **{file: text for file, text in extra.items() if isinstance(text, str)},
        }
