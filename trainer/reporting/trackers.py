"""Sends the metrics of a run to metrics.jsonl, and by flag to TensorBoard, Weights & Biases and the trackers of Accelerate.

No tracker may end or stall training: the first error of one is logged, and it is not used again.
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
"""how long a save took; its row is written when the save has ended, after the rows of later steps"""
BY_METRIC = {
    "train/loss": "Loss/train",
    "eval/val_loss": "Loss/val",
    "train/accuracy": "Accuracy/train",
    "eval/val_accuracy": "Accuracy/val",
}
"""{metric: tag} of `--tensorboard_tags by_metric`; other metrics keep their names"""
RUN_NAME = {"mlflow": "run_name", "clearml": "task_name", "swanlab": "experiment_name", "trackio": "name"}
"""{tracker of Accelerate: its argument for the name of a run}, for those that have one beside the project's name"""


class Trackers:
    """Sends each row of metrics to every tracker. On rank 0 only.

    `tensorboard_tags`: {metric: tag}, where TensorBoard's differs from the name. `others`: names of Accelerate's trackers, each
    of which gets a run `run_name` in `project` for every launch. `resumed_step`: the step of the checkpoint that this launch
    resumes; later rows are dropped, as they will be written again. None: a new run, whose file starts empty. `config` must
    be free of secrets.

    UserError if `metrics_path` cannot be written, or a tracker that was asked for is not installed.
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
        """Records `values` of optimizer step `step`. NaN and infinity, which JSON lacks, are null in metrics.jsonl."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self._surviving(self._path.name):
            _append_row(self._path, {"step": step, "time": round(time.time(), 3), **finite})
        for name, tracker in list(self._trackers.items()):
            with self._surviving(name):
                tracker.log(step, values)

    def close(self, exit_code: int = 0) -> None:
        """Flushes every tracker, those with a `Feed` for at most its EXIT_SECONDS. `exit_code` is the state of the W&B run."""
        for name, tracker in list(self._trackers.items()):
            with self._surviving(name):
                tracker.close(exit_code)

    @contextmanager
    def _surviving(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever it is, training goes on
            self._trackers.pop(name, None)
            if name not in self._failed:
                self._log(f"{name}: {error}; training goes on without it")
            self._failed.add(name)


class _TensorBoard:
    def __init__(self, directory: Path, tags: Mapping[str, str], config: dict[str, object], resumed_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._tags = tags
        # TensorBoard hides what earlier launches wrote from `purge_step` on.
        purge_step = 0 if resumed_step is None else resumed_step + 1
        self._writer = SummaryWriter(str(directory), purge_step=purge_step, flush_secs=10)
        self._writer.add_text("config", f"```\n{json.dumps(config, indent=2, default=str)}\n```", purge_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(self._tags.get(name, name), value, step)

    def close(self, exit_code: int) -> None:
        self._writer.close()


class _AccelerateTracker:
    """The tracker of `accelerate.tracking` called `name`. Only a thread of its own uses it, as its server may stall."""

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
    """The rows of a metrics.jsonl, oldest first, without lines that are no rows, such as half-written ones. Raises OSError."""
    return [row for line in path.read_bytes().splitlines() if (row := _parse_row(line))]


def _parse_row(line: bytes) -> dict[str, Any] | None:
    with suppress(ValueError, RecursionError):  # half a row, or bytes that are not UTF-8
        row = json.loads(line)
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            return row
    return None


def _start_file(path: Path, resumed_step: int | None) -> None:
    """Empties the file, or cuts it before the first row after `resumed_step`.

    Steps increase along the file, except in rows of saves (SAVE_SECONDS), so the rows to drop are at its end. A truncation
    cannot be interrupted half-way, and needs no space on a full disk.
    """
    with open(path, "ab+") as file:
        file.truncate(0 if resumed_step is None else _end_of_rows(file, resumed_step))


def _end_of_rows(file: BinaryIO, last_step: int) -> int:
    """The offset, in bytes, of the first row after `last_step`. Searched from the end, as a long run has a million rows."""
    if not file.seek(0, os.SEEK_END):  # an empty file cannot be mapped
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
    """Appends one whole line, or nothing and OSError: on a full disk the next row must not follow half of this one."""
    line = json.dumps(row, allow_nan=False, default=float).encode() + b"\n"  # float: converts scalars of numpy and torch
    with open(path, "ab", buffering=0) as file:
        end = file.tell()
        if file.write(line) != len(line):
            file.truncate(end)
            raise OSError(f"no space left for {path}")


def _require(wanted: object, module: str, name: str, package: str) -> None:
    """UserError if `wanted` and `module` has no `name`, because `package` is not installed."""
    try:
        # `name` too: a folder `wandb` in the working directory, which W&B itself makes, can be imported as well.
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
