"""Alerts by webhook: start, progress, trouble, stop.

A thread of their own sends them, so a webhook that is slow, dead or full of errors costs training only microseconds. Its URL is
a secret, which no text of this module contains.
"""

from __future__ import annotations

import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any

from trainer.command_line.secrets import redact_text
from trainer.command_line.webhook import Fact, Webhook

REQUEST_SECONDS = 5.0  # how long the server may be silent
CLOSE_SECONDS = 5.0  # how long the end of a launch waits for alerts that are not sent yet; --max_training_hours includes it
ATTEMPTS, FIRST_PAUSE_SECONDS = 4, 1.0  # the pause doubles, unless the server asks for another
RETRY_AFTER_MAX_SECONDS = 600.0
WAITING_ALERTS = 50
TEXT_CHARACTERS = 1800  # Discord takes 2,000


class Alerts:
    """Alerts that go nowhere: no webhook was given, or this is not rank 0."""

    exit_seconds = 0.0
    """the most seconds that `close` takes"""

    def send(self, event: str, text: str, **facts: Fact) -> None:
        """Queue `text` to be sent; does not wait. A webhook that takes any JSON gets `event` and `facts` too."""

    def close(self) -> None:
        """Wait until all alerts are sent, for at most `exit_seconds`. A second call does nothing."""


class WebhookAlerts(Alerts):
    """Alerts to one webhook. Each begins with `title`, as runs may share a channel. `log` gets each kind of trouble once."""

    exit_seconds = CLOSE_SECONDS

    def __init__(self, webhook: Webhook, title: str, log: Callable[[str], None]) -> None:
        self._webhook, self._title, self._log = webhook, title, log
        self._warned: set[str] = set()
        self._closing, self._last = threading.Event(), b""
        self._waiting: queue.Queue[bytes | None] = queue.Queue(WAITING_ALERTS)
        self._thread = threading.Thread(target=self._work, name="alerts", daemon=True)
        self._thread.start()

    def send(self, event: str, text: str, **facts: Fact) -> None:
        """See `Alerts`. If the queue is full the oldest alert is dropped, as the latest matters most."""
        text = (
            redact_text(f"[{self._title}] {text}").encode(errors="replace").decode()
        )  # lone surrogates (of odd paths) become ?
        text = text if len(text) <= TEXT_CHARACTERS else text[: TEXT_CHARACTERS - 4] + " ..."
        self._last = self._webhook.body(text, {"event": event, "run": self._title, **facts})
        self._put(self._last)

    def close(self) -> None:
        """See `Alerts`. If the webhook is in trouble, only the latest alert is tried once more. The thread is a daemon: it ends
        with the process."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._put(None)
        self._thread.join(self.exit_seconds)
        if self._thread.is_alive():
            self._warn(f"the webhook took longer than {self.exit_seconds:g} s; the last alerts may not have been sent")
        self._log = lambda _: None  # a thread that prints while the interpreter ends can abort it

    def _put(self, body: bytes | None) -> None:
        try:
            self._waiting.put_nowait(body)
        except queue.Full:
            self._warn(f"{WAITING_ALERTS} alerts wait for the webhook: the oldest are dropped")
            with suppress(queue.Empty):
                self._waiting.get_nowait()
            self._waiting.put_nowait(body)  # nobody else puts anything in

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            self._log(f"WARNING: alerts: {text}; the run goes on")

    def _work(self) -> None:
        opener = urllib.request.build_opener(_NoRedirect)  # the proxies of the environment are obeyed
        hurried = False  # whether `close` has cut short a pause before another try
        while (body := self._waiting.get()) is not None:
            if hurried and body is not self._last:
                continue
            for attempt in range(ATTEMPTS):
                problem, wait_seconds = _post(opener, self._webhook.url, body)
                if wait_seconds is None or attempt + 1 == ATTEMPTS:
                    break
                if self._closing.wait(wait_seconds or FIRST_PAUSE_SECONDS * 2**attempt):
                    last_chance = body is self._last and not hurried
                    hurried = True
                    if not last_chance:
                        break
            if problem:
                self._warn(f"{problem}: an alert was not sent")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it would carry the secret, and the message, to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _post(opener: urllib.request.OpenerDirector, url: str, body: bytes) -> tuple[str | None, float | None]:
    """(None, None) if the alert was sent, else (what went wrong, seconds to wait before the next try).

    The seconds are 0 if the server names none, None if there should be no other try.
    The texts of urllib's errors repeat the URL, so only their numbers and names are reported.
    """
    try:
        # Discord refuses urllib's default user agent.
        headers = {"Content-Type": "application/json", "User-Agent": "samecurve"}
        request = urllib.request.Request(url, body, headers, method="POST")
        opener.open(request, timeout=REQUEST_SECONDS).close()
        return None, None
    except urllib.error.HTTPError as error:
        error.close()
        again = error.code in (408, 429) or error.code >= 500
        redirect = ", a redirect, which is not followed" if 300 <= error.code < 400 else ""
        return f"the webhook answers HTTP {error.code}{redirect}", _retry_after(error.headers) if again else None
    except Exception as error:  # whatever it is, it must not end the thread
        reason = getattr(error, "reason", error)
        why = reason.strerror if isinstance(reason, OSError) and reason.strerror else type(reason).__name__
        return f"the webhook cannot be reached ({why})", 0.0


def _retry_after(headers: Any) -> float:
    """Seconds the server asks us to wait, at most RETRY_AFTER_MAX_SECONDS; 0 if it does not say."""
    retry_after = str(headers.get("Retry-After", ""))
    seconds = 0.0
    try:
        seconds = float(retry_after)  # Discord gives fractions
    except ValueError:
        with suppress(ValueError, TypeError):
            seconds = parsedate_to_datetime(retry_after).timestamp() - time.time()
    return min(seconds, RETRY_AFTER_MAX_SECONDS) if seconds > 0 else 0.0  # NaN is not above 0


def open_alerts(webhook: Webhook | None, title: str, log: Callable[[str], None]) -> Alerts:
    """Alerts to `webhook`; with None, alerts that go nowhere. The caller closes them."""
    return Alerts() if webhook is None else WebhookAlerts(webhook, title, log)
