"""Where the numbers of a run go: always metrics.jsonl; by flag TensorBoard, Weights & Biases, and the trackers of Accelerate.

No tracker may end or stall training: one that fails is named once and then left alone.
"""

from __future__ import annotations

import importlib
import json
import math
import mmap
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from trainer.errors import CHECKPOINT, UserError
from trainer.recipe import Log
from trainer.reporting.feed import Feed, Row
from trainer.reporting.wandb_run import WandbRun, WandbSettings

SAVE_SECONDS = "checkpoint/seconds"
"""what a save took; its row comes when that has ended, after those of later steps"""
BY_METRIC = {
    "train/loss": "Loss/train",
    "eval/val_loss": "Loss/val",
    "train/accuracy": "Accuracy/train",
    "eval/val_accuracy": "Accuracy/val",
}
"""the tags that `--tensorboard_tags by_metric` changes; others stay"""
RUN_NAME = {"mlflow": "run_name", "clearml": "task_name", "swanlab": "experiment_name", "trackio": "name"}
"""what Accelerate's trackers call the name of a run, those that have one beside that of the project"""


class Trackers:
    """Sends each row of numbers to every tracker; made on rank 0 only.

    `tensorboard_tags` are the tags of metrics that TensorBoard calls by another name than metrics.jsonl does.
    `others` are names of Accelerate's trackers: a run of theirs for every launch, called `run_name`, in `project`.
    `resumed_step` is the step of the checkpoint this run continues from: rows after it are dropped, for they will be
    written again. With None the run is new and the file starts empty. `config` must already be free of secrets.
    Raises UserError if `metrics_path` cannot be written at the start or a tracker that was asked for is not installed.
    """

    def __init__(
        self,
        metrics_path: Path,
        *,
        tensorboard_dir: Path | None,
        tensorboard_tags: Mapping[str, str] = MappingProxyType({}),
        wandb: WandbSettings | None,
        others: Sequence[str] = (),
        project: str = "",
        run_name: str = "",
        config: dict[str, object],
        resumed_step: int | None,
        log: Log,
    ) -> None:
        self._path, self._log = metrics_path, log
        self._failed: set[str] = set()
        self._trackers: dict[str, _TensorBoard | WandbRun | _AccelerateTracker] = {}
        _require(tensorboard_dir, "torch.utils.tensorboard", "SummaryWriter", "tensorboard")
        _require(wandb, "wandb", "init", "wandb")
        _require_others(others)
        try:
            _start_file(metrics_path, resumed_step)
        except OSError as error:
            raise UserError(f"{error}; choose another --output_dir", CHECKPOINT) from error
        if tensorboard_dir:
            with self._surviving("TensorBoard"):
                self._trackers["TensorBoard"] = _TensorBoard(tensorboard_dir, tensorboard_tags, config, resumed_step)
        if wandb:
            with self._surviving("W&B"):
                self._trackers["W&B"] = WandbRun(wandb, config, resumed_step is not None, log)
        for name in dict.fromkeys(others):
            self._trackers[name] = _AccelerateTracker(name, project, run_name, metrics_path.parent, config, log)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Records `values` at optimizer step `step`; a NaN or infinity, which JSON lacks, is null in metrics.jsonl."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self._surviving(self._path.name):
            _append_row(self._path, {"step": step, "time": round(time.time(), 3), **finite})
        for name, tracker in list(self._trackers.items()):
            with self._surviving(name):
                tracker.log(step, values)

    def close(self, exit_code: int = 0) -> None:
        """Flushes every tracker, those with a feed within its `EXIT_SECONDS`; `exit_code` becomes the state of the W&B run."""
        for name, tracker in list(self._trackers.items()):
            with self._surviving(name):
                tracker.close(exit_code)

    @contextmanager
    def _surviving(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a tracker raises, training goes on
            self._trackers.pop(name, None)
            if name not in self._failed:
                self._log(f"{name}: {error}; training goes on without it")
            self._failed.add(name)


class _TensorBoard:
    def __init__(self, directory: Path, tags: Mapping[str, str], config: dict[str, object], resumed_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._tags = tags
        # TensorBoard hides what an earlier launch wrote at `purge_step` and after.
        purge_step = 0 if resumed_step is None else resumed_step + 1
        self._writer = SummaryWriter(str(directory), purge_step=purge_step, flush_secs=10)
        self._writer.add_text("config", f"```\n{json.dumps(config, indent=2, default=str)}\n```", purge_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(self._tags.get(name, name), value, step)

    def close(self, exit_code: int) -> None:
        self._writer.close()


class _AccelerateTracker:
    """One of `accelerate.tracking`, by name, used from one thread of its own: whichever server it talks to."""

    def __init__(self, name: str, project: str, run_name: str, directory: Path, config: Mapping[str, object], log: Log) -> None:
        self.name, self.project, self.run_name, self.directory, self.config = name, project, run_name, directory, config
        self._feed, self._log = Feed(name, self._send, log), log
        self.log = self._feed.put

    def close(self, exit_code: int) -> None:
        if not self._feed.end():
            self._log(f"{self.name} did not finish in time; metrics.jsonl has all")

    def _send(self, rows: Iterator[Row]) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind = LOGGER_TYPE_TO_CLASS[self.name]
        named = {RUN_NAME[self.name]: self.run_name} if self.name in RUN_NAME else {}
        place = {"logging_dir": str(self.directory)} if kind.requires_logging_directory else {}
        tracker = kind(self.run_name if self.name == "aim" else self.project, **named, **place)
        tracker.start()
        plain = (str, int, float, bool, type(None))
        tracker.store_init_configuration({k: v if isinstance(v, plain) else str(v) for k, v in self.config.items()})
        for row in rows:
            tracker.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])
        tracker.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, oldest first; a half-written line is left out. Raises OSError."""
    return [row for line in path.read_bytes().splitlines() if (row := _parse_row(line))]


def _parse_row(line: bytes) -> dict[str, Any] | None:
    with suppress(ValueError, RecursionError):  # half a row, or bytes that are no text
        row = json.loads(line)
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            return row
    return None


def _start_file(path: Path, resumed_step: int | None) -> None:
    """Empties the file, or cuts it before the first row after `resumed_step`. Steps grow in it (but for the row of a save,
    which comes when that has ended), so what has to go is its end, and one truncate cannot be interrupted half-way and needs
    no space on a full disk."""
    with open(path, "ab+") as file:
        file.truncate(0 if resumed_step is None else _end_of_rows(file, resumed_step))


def _end_of_rows(file: BinaryIO, last_step: int) -> int:
    """Where the first row begins whose step is after `last_step`; looked for from the end: a long run has a million rows."""
    if not file.seek(0, os.SEEK_END):  # nothing that could be mapped
        return 0
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as rows:
        kept = end = rows.rfind(b"\n") + 1
        while end:
            end = rows.rfind(b"\n", 0, end - 1) + 1
            row = _parse_row(rows[end : rows.find(b"\n", end)])
            if row is None or row["step"] > last_step:
                kept = end
            elif SAVE_SECONDS not in row:
                break
        return kept


def _append_row(path: Path, row: dict[str, float | None]) -> None:
    """Writes one whole line or nothing: on a full disk the next row must not be glued to half of this one."""
    line = json.dumps(row, allow_nan=False, default=float).encode() + b"\n"  # float: for the scalars of numpy and torch
    with open(path, "ab", buffering=0) as file:
        end = file.tell()
        if file.write(line) != len(line):
            file.truncate(end)
            raise OSError(f"no space left for {path}")


def _require(wanted: object, module: str, name: str, package: str) -> None:
    try:
        # The name too: a folder called `wandb` in the working directory, which W&B itself makes, imports as well.
        if wanted:
            getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"--use_{package} needs a package: pip install {package}, or leave the flag out") from error


def _require_others(names: Sequence[str]) -> None:
    if names:
        from accelerate.tracking import get_available_trackers

        available = [str(tracker) for tracker in get_available_trackers()]
        for name in names:
            if name not in available:
                raise UserError(f"--log_with {name} needs a package: pip install {name.replace('_', '-')}, or leave it out")
