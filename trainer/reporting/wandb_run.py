"""A run of Weights & Biases, which never asks for a login on the terminal, or waits long for a server."""

from __future__ import annotations

import functools
import netrc
import os
import secrets
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from trainer.recipe import Log
from trainer.reporting.feed import FINISH_SECONDS, Feed, Row

REACHABLE_SECONDS = 2.0  # how long the W&B server may take to answer; after that the run is offline
INIT_SECONDS = 20.0  # how long `wandb.init` may take: the other processes wait for it


@dataclass(frozen=True)
class WandbSettings:
    """What identifies a W&B run. `id_file` keeps its id, so that a resumed run continues the same W&B run."""

    project: str
    group: str | None
    """W&B shows the runs of a group together"""
    run_name: str | None
    id_file: Path
    directory: Path


class WandbRun:
    """A W&B run, offline if there is no key or no server. A thread of its own sends it rows."""

    def __init__(self, where: WandbSettings, config: dict[str, object], resumed: bool, log: Log) -> None:
        import wandb

        where.directory.mkdir(parents=True, exist_ok=True)  # else W&B silently writes to the temporary folder
        run_id = where.id_file.read_text().strip() if resumed and where.id_file.exists() else ""
        if not run_id:
            run_id = secrets.token_hex(4)
            where.id_file.write_text(run_id)
        # `console="off"`: W&B need not capture what is printed, which is in train.log.
        start = functools.partial(
            wandb.init, project=where.project, group=where.group, name=where.run_name, id=run_id, resume="allow",
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
            wandb.teardown()  # W&B's process still knows the failed run under this id
            self._run = start(mode="offline")
        # `step` is a column of its own: W&B's counter only grows, and drops rows that a resumed run writes again.
        self._run.define_metric("*", step_metric="step")
        self._log, self._exit_code, self._teardown = log, 0, wandb.teardown
        self._feed = Feed("W&B", self._send, log)
        self.log = self._feed.put

    def close(self, exit_code: int) -> None:
        """Send the last rows and finish the W&B run, whose state `exit_code` decides. Waits for at most `feed.EXIT_SECONDS`."""
        self._exit_code = exit_code
        if not self._feed.end():
            self._log(f"W&B did not finish in time; upload the rest with: wandb sync {Path(self._run.dir).parent}")

    def _send(self, rows: Iterator[Row]) -> None:
        for row in rows:
            self._run.log(row)
        self._run.finish(exit_code=self._exit_code)
        self._teardown()  # ends W&B's process now, so that no exit hook waits for it


def _wandb_mode(settings: Any, log: Log) -> Literal["online", "offline", "disabled", "shared"]:
    """What WANDB_MODE (or `wandb offline`) says; else online if there are a key and a server, otherwise offline.

    Decided before `wandb.init`, which would ask for a key on the terminal, or have every process wait for the server.
    """
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
    """Whether an HTTP server answers at `url` (by a proxy, if one is set). Asks in a thread: name look-ups have no time-out."""
    answered = threading.Event()

    def ask() -> None:
        with suppress(OSError, ValueError):  # refused, unknown host, timed out; a malformed URL
            with suppress(urllib.request.HTTPError):  # an answer all the same
                urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=REACHABLE_SECONDS).close()
            answered.set()

    threading.Thread(target=ask, daemon=True).start()
    return answered.wait(REACHABLE_SECONDS)
