"""When a run saves, under which names, and what stands in a checkpoint beside the tensors."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import time

from trainer import checkpoint, retention
from trainer.config import to_yaml
from trainer.console import Console
from trainer.errors import Refusal
from trainer.logbook import Logbook
from trainer.portable_state import plain_entries
from trainer.resume import Plan
from trainer.setup import Session
from trainer.stopping import StopRequests

# The links each kind of stop leaves beside the step checkpoint.
STOP_LINKS = {"time_limit": "checkpoint_time_limit"}
# What a save takes, until the first one has been timed: fp32 weights and two moments onto a slow disk, bytes per second.
SLOW_SAVE_SECONDS, SLOW_DISK = 1.0, 200e6


class Saver:
    """Writes the checkpoints of a run. Made, and called, on every process."""

    def __init__(self, session: Session, plan: Plan, logbook: Logbook, stops: StopRequests, console: Console) -> None:
        self.session, self.logbook, self.stops, self.console = session, logbook, stops, console
        self.recipe, self.config, self.launch = session.recipe, session.config, session.launch
        self.kept = self.recipe.tensors(self.config, session.data)
        self.folder, self.progress = plan.directory.checkpoints, logbook.progress
        self.saved_step = self.progress.step if plan.checkpoint and plan.same_run else None
        self.saved_at = time.monotonic()
        stops.expect_save(SLOW_SAVE_SECONDS + 3 * sum(e.size_bytes for e in session.state.model_entries()) / SLOW_DISK)

    def due(self) -> bool:
        """Every `save_every` steps and every `save_epochs` epochs; not again where this run has just been resumed."""
        step, every = self.progress.step, self.config.run.save_every
        due = bool(every and step % every == 0) or self.epoch_due()
        return due and step > 0 and self.saved_step != step

    def epoch_due(self) -> bool:
        """Whether the last step finished an epoch whose checkpoint is kept."""
        every = self.config.run.save_epochs
        return bool(every) and self.logbook.epoch() // every > self.logbook.epoch(steps_ago=1) // every

    def due_by_the_clock(self) -> bool:
        """Whether `save_minutes` have passed since the last save."""
        minutes = self.config.run.save_minutes
        return bool(minutes) and time.monotonic() - self.saved_at > 60 * minutes

    def save(self, better: bool, reason: str | None, finished: bool) -> bool:
        """Write a checkpoint of this step, if there is none, and point to it by the names it has earned. Collective.

        `reason`: why the launch ends with it, if it does; `finished`: and the run too. False where it failed and training
        can go on; raises Refusal (exit 5) where it was the last one.
        """
        began, p, name = time.monotonic(), self.progress, f"{self.recipe.checkpoint_prefix}{self.progress.step}"
        links = ["best_model"] * better + [f"checkpoint_epoch_{self.logbook.epoch()}"] * self.epoch_due()
        links += [STOP_LINKS[reason]] if reason in STOP_LINKS else []
        links += ["checkpoint_final"] * finished

        def point() -> None:
            try:
                for link in links:
                    retention.link(self.folder, link, name)
                retention.prune(self.folder, self.recipe.checkpoint_prefix, self.config.run.keep_last)
            except OSError as error:
                self.logbook.tell("save", f"WARNING: {error}: a link was not set or an old checkpoint not removed")

        written = self.saved_step != p.step
        only_best = better and not (reason or self.due())
        try:
            if written:
                tensors = {
                    "model": self.session.state.model_entries(),
                    "optimizer": self.session.state.optimizer_entries(),
                    **{stem: plain_entries(held) for stem, held in self.kept.items()},
                }
                checkpoint.write(self.folder, name, tensors, self.documents(only_best), self.launch.control)
                self.saved_step = p.step
            self.launch.control.on_main(point)
        except Refusal as failure:
            if reason:
                raise
            self.logbook.tell("save failed", f"WARNING: {failure}. Training goes on; the checkpoint before it stays")
            return False
        finally:
            self.saved_at = time.monotonic()
            self.logbook.aside += self.saved_at - began
        if written:  # a link alone says nothing of what a save takes
            self.stops.note_save(self.saved_at - began)
            self.logbook.write({"checkpoint/seconds": time.monotonic() - began})
        what = "Saved checkpoint to" if written else "Linked checkpoint"
        self.console.say(f"{what} {self.folder / name}" + (f" ({', '.join(links)})" if links else ""))
        return True

    def documents(self, only_best: bool) -> dict[str, str]:
        """The text files of a checkpoint. Collective."""
        self.logbook.settle()
        state = {
            "recipe": self.recipe.name,
            "progress": dataclasses.asdict(self.progress),
            "epoch": self.logbook.epoch(),
            "only_best": only_best,
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
