"""Messages to a person far away, by webhook: start, stop, progress, what went wrong.

They leave from a thread of their own: a webhook that is slow, dead or full of errors costs the sender microseconds, and
nothing else. Its URL is a secret, and in no text that leaves this module.
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
CLOSE_SECONDS = 5.0  # how long the end of a launch waits for what is still to be sent; part of --max_training_hours
ATTEMPTS, FIRST_PAUSE_SECONDS = 4, 1.0  # the pause doubles, unless the server asks for another
RETRY_AFTER_MAX_SECONDS = 600.0
WAITING_ALERTS = 50
TEXT_CHARACTERS = 1800  # Discord takes 2,000


class Alerts:
    """Alerts that go nowhere: no webhook was given, or this is not rank 0."""

    exit_seconds = 0.0
    """how long `close` may take"""

    def send(self, event: str, text: str, **facts: Fact) -> None:
        """Have `text` sent, at once and without waiting. `event` and `facts` go where the webhook takes any JSON."""

    def close(self) -> None:
        """Give what waits a last chance, for at most `exit_seconds`; once."""


class WebhookAlerts(Alerts):
    """Alerts to one webhook. `title` opens each, so that many runs may share a channel; `log` hears of trouble, once."""

    exit_seconds = CLOSE_SECONDS

    def __init__(self, webhook: Webhook, title: str, log: Callable[[str], None]) -> None:
        self._webhook, self._title, self._log = webhook, title, log
        self._warned: set[str] = set()
        self._closing, self._last = threading.Event(), b""
        self._waiting: queue.Queue[bytes | None] = queue.Queue(WAITING_ALERTS)
        self._thread = threading.Thread(target=self._work, name="alerts", daemon=True)
        self._thread.start()

    def send(self, event: str, text: str, **facts: Fact) -> None:
        """Put an alert into the queue; from a full one the oldest is dropped, for what happened last matters most."""
        text = redact_text(f"[{self._title}] {text}").encode(errors="replace").decode()  # no half characters of odd paths
        text = text if len(text) <= TEXT_CHARACTERS else text[: TEXT_CHARACTERS - 4] + " ..."
        self._last = self._webhook.body(text, {"event": event, "run": self._title, **facts})
        self._put(self._last)

    def close(self) -> None:
        """Wait until all is sent, for at most `exit_seconds`; once. The thread is a daemon: it ends with the process.

        If the webhook is in trouble, only what happened last is tried, once more.
        """
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
        hurried = False
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
    """A redirect would carry the secret, and the message, to another place."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _post(opener: urllib.request.OpenerDirector, url: str, body: bytes) -> tuple[str | None, float | None]:
    """(None, None) once it is sent; otherwise (what went wrong, seconds to wait before the next try: 0 our own, None never).

    The texts of urllib's errors repeat the URL: only their numbers and names are reported.
    """
    try:
        # Discord turns urllib's own name away.
        headers = {"Content-Type": "application/json", "User-Agent": "samecurve"}
        request = urllib.request.Request(url, body, headers, method="POST")
        opener.open(request, timeout=REQUEST_SECONDS).close()
        return None, None
    except urllib.error.HTTPError as error:
        error.close()
        again = error.code in (408, 429) or error.code >= 500
        redirect = ", a redirect, which is not followed" if 300 <= error.code < 400 else ""
        return f"the webhook answers HTTP {error.code}{redirect}", _retry_after(error.headers) if again else None
    except Exception as error:  # whatever it is: no alert may end the thread
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
    """Alerts to this webhook, if there is one. Close them."""
    return Alerts() if webhook is None else WebhookAlerts(webhook, title, log)
