"""When a run saves, under which names, and what stands in a checkpoint beside the tensors."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.backends.tensors import split_names, whole_entries
from trainer.checkpoints import retention, writing
from trainer.checkpoints.resume import LaunchPlan
from trainer.command_line.config import to_yaml
from trainer.distributed.stopping import StopReason, StopRequests
from trainer.errors import UserError
from trainer.reporting.metrics_logger import MetricsLogger
from trainer.state import TrainState

if TYPE_CHECKING:
    from trainer.setup import Session

# The links each kind of stop leaves beside the step checkpoint.
STOP_LINKS = {StopReason.TIME_LIMIT: "checkpoint_time_limit"}
# What a save takes, until the first one has been timed: fp32 weights and two moments onto a slow disk, bytes per second.
SLOW_SAVE_SECONDS, SLOW_DISK = 1.0, 200e6


class Saver:
    """Writes the checkpoints of a run. Made, and called, on every process."""

    def __init__(
        self, session: Session, plan: LaunchPlan, state: TrainState, logger: MetricsLogger, stops: StopRequests
    ) -> None:
        self.session, self.state, self.logger, self.stops = session, state, logger, stops
        self.recipe, self.run, self.launch = session.recipe, session.config.run, session.launch
        self.folder = plan.directory.checkpoints
        self.saved_step = state.step if plan.checkpoint and plan.same_run else None
        self.saved_at = time.monotonic()
        size_bytes = sum(entry.size_bytes for entry in session.backend.model_tensors())
        stops.expect_save(SLOW_SAVE_SECONDS + 3 * size_bytes / SLOW_DISK)

    def due(self) -> bool:
        """Every `save_every` steps and every `save_epochs` epochs; not again where this run has just been resumed."""
        step, every = self.state.step, self.run.save_every
        due = bool(every and step % every == 0) or self.epoch_due()
        return due and step > 0 and self.saved_step != step

    def epoch_due(self) -> bool:
        """Whether the last step finished an epoch whose checkpoint is kept."""
        step, every = self.state.step, self.run.save_epochs
        return bool(every) and self.session.epochs(step) // every > self.session.epochs(step - 1) // every

    def due_by_the_clock(self) -> bool:
        """Whether `save_minutes` have passed since the last save."""
        minutes = self.run.save_minutes
        return bool(minutes) and time.monotonic() - self.saved_at > 60 * minutes

    def saved_as(self) -> Path | None:
        """The checkpoint of the current step, if there is one."""
        name = f"{self.recipe.checkpoint_prefix}{self.state.step}"
        return self.folder / name if self.saved_step == self.state.step else None

    def save(self, is_best: bool, reason: StopReason | None) -> bool:
        """Write a checkpoint of this step, if there is none, and point to it by the names it has earned. Collective.

        `reason`: why the launch ends with it, if it does. False where it failed and training can go on; raises UserError
        (exit 5) where it was the last one.
        """
        started, name = time.monotonic(), f"{self.recipe.checkpoint_prefix}{self.state.step}"
        links = self._links(is_best, reason)
        write = self.saved_step != self.state.step
        only_best = is_best and reason is None and not self.due()
        try:
            if write:
                self._write(name, only_best)
                self.saved_step = self.state.step
            self.launch.control.on_main(lambda: self._set_links(links, name))
        except UserError as failure:
            if reason:
                raise
            self.logger.announce("save failed", f"WARNING: {failure}. Training goes on; the checkpoint before it stays")
            return False
        finally:
            self.saved_at = time.monotonic()
            self.logger.exclude_from_timing(self.saved_at - started)
        if write:  # a link alone says nothing of what a save takes
            self.stops.record_save(self.saved_at - started)
            self.logger.write({"checkpoint/seconds": time.monotonic() - started})
        what = "Saved checkpoint to" if write else "Linked checkpoint"
        self.logger.console.log(f"{what} {self.folder / name}" + (f" ({', '.join(links)})" if links else ""))
        return True

    def _links(self, is_best: bool, reason: StopReason | None) -> list[str]:
        """The names that this checkpoint has earned."""
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

    def _set_links(self, links: list[str], name: str) -> None:
        """On rank 0: point to the checkpoint, and remove old ones."""
        try:
            for link in links:
                retention.link(self.folder, link, name)
            retention.prune(self.folder, self.recipe.checkpoint_prefix, self.run.keep_last)
        except OSError as error:
            self.logger.announce("save", f"WARNING: {error}: a link was not set or an old checkpoint not removed")

    def _write(self, name: str, only_best: bool) -> None:
        backend, extra = self.session.backend, self.session.extra_files
        tensors = {"model": backend.model_tensors(), "optimizer": backend.optimizer_tensors()}
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
        texts = {
            "trainer_state.json": json.dumps(trainer_state, indent=1),
            "config.yaml": to_yaml(self.session.config),
            **{file: text for file, text in extra.items() if isinstance(text, str)},
        }
        writing.write(self.folder, name, tensors, texts, self.launch.control)
