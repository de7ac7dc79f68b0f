"""Where the numbers of a run go: always metrics.jsonl, by flag TensorBoard and Weights & Biases.

No tracker may end or stall training: one that fails is named once and then left alone.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import mmap
import netrc
import os
import queue
import secrets
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal
from urllib.parse import urlsplit

from trainer.errors import CHECKPOINT, UserError
from trainer.recipe import Log

SAVE_SECONDS = "checkpoint/seconds"
"""what a save took; its row comes when that has ended, after those of later steps"""
REACHABLE_SECONDS = 2.0  # how long the W&B server may take to answer before the run goes offline
INIT_SECONDS = 20.0  # how long `wandb.init` may take: the other processes wait for it
WANDB_EXIT_SECONDS = 15.0  # FINISH_SECONDS, and what its thread may take on top
FINISH_SECONDS = 10.0  # how long the last upload may take: it counts against --max_training_hours


@dataclass(frozen=True)
class WandbSettings:
    """Where a W&B run lives; `id_file` keeps its id, so that a resumed run continues the same W&B run."""

    project: str
    run_name: str | None
    id_file: Path
    directory: Path


class Trackers:
    """Sends each row of numbers to every tracker; made on rank 0 only.

    `resumed_step` is the step of the checkpoint this run continues from: rows after it are dropped, for they will be
    written again. With None the run is new and the file starts empty. `config` must already be free of secrets.
    Raises UserError if `metrics_path` cannot be written at the start or a tracker that was asked for is not installed.
    """

    def __init__(
        self,
        metrics_path: Path,
        *,
        tensorboard_dir: Path | None,
        wandb: WandbSettings | None,
        config: dict[str, object],
        resumed_step: int | None,
        log: Log,
    ) -> None:
        self._path, self._log = metrics_path, log
        self._failed: set[str] = set()
        self._trackers: dict[str, _TensorBoard | _WandbRun] = {}
        _require(tensorboard_dir, "torch.utils.tensorboard", "SummaryWriter", "tensorboard")
        _require(wandb, "wandb", "init", "wandb")
        try:
            _start_file(metrics_path, resumed_step)
        except OSError as error:
            raise UserError(f"{error}; choose another --output_dir", CHECKPOINT) from error
        if tensorboard_dir:
            with self._surviving("TensorBoard"):
                self._trackers["TensorBoard"] = _TensorBoard(tensorboard_dir, config, resumed_step)
        if wandb:
            with self._surviving("W&B"):
                self._trackers["W&B"] = _WandbRun(wandb, config, resumed_step is not None, log)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Records `values` at optimizer step `step`; a NaN or infinity, which JSON lacks, is null in metrics.jsonl."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with self._surviving(self._path.name):
            _append_row(self._path, {"step": step, "time": round(time.time(), 3), **finite})
        for name, tracker in list(self._trackers.items()):
            with self._surviving(name):
                tracker.log(step, values)

    def close(self, exit_code: int = 0) -> None:
        """Flushes every tracker, W&B within about `FINISH_SECONDS`; `exit_code` becomes the state of the W&B run."""
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
    def __init__(self, directory: Path, config: dict[str, object], resumed_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard hides what an earlier launch wrote at `purge_step` and after.
        purge_step = 0 if resumed_step is None else resumed_step + 1
        self._writer = SummaryWriter(str(directory), purge_step=purge_step, flush_secs=10)
        self._writer.add_text("config", f"```\n{json.dumps(config, indent=2, default=str)}\n```", purge_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, exit_code: int) -> None:
        self._writer.close()


class _WandbRun:
    """A W&B run fed from a thread of its own, so that a stalled W&B process never holds up a training step."""

    def __init__(self, where: WandbSettings, config: dict[str, object], resumed: bool, log: Log) -> None:
        import wandb

        where.directory.mkdir(parents=True, exist_ok=True)  # otherwise W&B silently moves to the temporary folder
        run_id = where.id_file.read_text().strip() if resumed and where.id_file.exists() else ""
        if not run_id:
            run_id = secrets.token_hex(4)
            where.id_file.write_text(run_id)
        # `console="off"`: train.log has the console, and W&B's capture would stand between us and the terminal.
        start = functools.partial(
            wandb.init, project=where.project, name=where.run_name, id=run_id, resume="allow",
            dir=str(where.directory), config=config, allow_val_change=True,
            settings=wandb.Settings(init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS, console="off"),
        )  # fmt: skip
        mode = _wandb_mode(wandb.setup().settings, log)
        try:
            self._run = start(mode=mode)
        except wandb.Error as error:
            if mode != "online":
                raise
            log(f"W&B: {error}; writing an offline run instead")
            wandb.teardown()  # its process still holds the id of the failed run
            self._run = start(mode="offline")
        # Our step is a column, not W&B's counter, which only grows and drops what a resumed run writes a second time.
        self._run.define_metric("*", step_metric="step")
        self._log, self._exit_code = log, 0
        self._rows: queue.SimpleQueue[dict[str, float] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, args=(wandb.teardown,), name="wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self._thread.is_alive():
            self._rows.put({"step": step, **values})

    def close(self, exit_code: int) -> None:
        self._exit_code = exit_code
        self._rows.put(None)
        self._thread.join(WANDB_EXIT_SECONDS)
        if self._thread.is_alive():
            self._log(f"W&B did not finish in time; upload the rest with: wandb sync {Path(self._run.dir).parent}")

    def _work(self, teardown: Callable[[], None]) -> None:
        try:
            while (row := self._rows.get()) is not None:
                self._run.log(row)
            self._run.finish(exit_code=self._exit_code)
            teardown()  # W&B's process ends now: no hook of its own is left to wait at the exit of ours
        except Exception as error:
            self._log(f"W&B: {error}; training goes on without it")


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


def _wandb_mode(settings: Any, log: Log) -> Literal["online", "offline", "disabled", "shared"]:
    """What WANDB_MODE (or `wandb offline`) says; otherwise online if there are a key and a server, else offline.
    Decided before `wandb.init`, which would ask for a key on the terminal, or let every process wait for the server."""
    if os.environ.get("WANDB_MODE") or settings.mode != "online":
        return settings.mode
    has_key = bool(settings.api_key or settings.identity_token_file)
    with suppress(OSError, netrc.NetrcParseError):
        logins = netrc.netrc(os.path.expanduser(os.environ.get("NETRC") or "~/.netrc"))
        has_key |= any(logins.authenticators(host) for host in (urlsplit(settings.base_url).netloc, "api.wandb.ai"))
    if has_key and _answers(settings.base_url):
        return "online"
    reason = f"{settings.base_url} does not answer" if has_key else "no API key (`wandb login`, or WANDB_API_KEY)"
    log(f"W&B: {reason}; writing an offline run, upload it later with `wandb sync`")
    return "offline"


def _answers(url: str) -> bool:
    """Whether an HTTP server answers at `url` (proxies obeyed). In a thread: a name look-up knows no time-out."""
    answered = threading.Event()

    def ask() -> None:
        with suppress(OSError, ValueError):  # refused, unknown host, timed out; a malformed URL
            with suppress(urllib.request.HTTPError):  # an answer all the same
                urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=REACHABLE_SECONDS).close()
            answered.set()

    threading.Thread(target=ask, daemon=True).start()
    return answered.wait(REACHABLE_SECONDS)
