"""The webhook that receives alerts: its URL, which is a secret, and the JSON that its host accepts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from trainer.errors import UserError

VARIABLE = "TRAINER_ALERT_WEBHOOK"
Fact = str | float | int | None


@dataclass(frozen=True)
class Webhook:
    """Where alerts go, and in which format. Whoever knows the URL can write there, so `repr` leaves it out."""

    url: str = field(repr=False)

    @property
    def kind(self) -> Literal["discord", "slack", "json"]:
        """The format that the host accepts; `json` for unknown hosts."""
        parts = urlsplit(self.url)
        host = parts.hostname or ""
        if host in ("hooks.slack.com", "hooks.slack-gov.com") or (_is_discord(host) and parts.path.endswith("/slack")):
            return "slack"
        return "discord" if _is_discord(host) else "json"

    def body(self, text: str, facts: Mapping[str, Fact]) -> bytes:
        """The request's JSON: `text`, and for `json` the facts too. No mention in `text` can notify a whole channel."""
        if self.kind == "discord":
            content: dict[str, Any] = {"content": text, "allowed_mentions": {"parse": []}}
        elif self.kind == "slack":  # <!channel> would be a mention; Slack wants these three characters escaped, and no others
            content = {"text": text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")}
        else:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in facts.items()}
            content = {"text": text, **finite}
        return json.dumps(content).encode()


def _is_discord(host: str) -> bool:
    return any(host == name or host.endswith(f".{name}") for name in ("discord.com", "discordapp.com"))


def find_webhook(flag: str | None, environ: Mapping[str, str]) -> Webhook | None:
    """The webhook of `--alert_webhook` (`flag`), else of the environment's VARIABLE; None if neither is given.

    UserError, which does not repeat the value, if that is no http(s) URL.
    """
    source, given = ("--alert_webhook", flag) if flag is not None else (VARIABLE, environ.get(VARIABLE) or None)
    if given is None:
        return None
    url = given.strip()  # a secret read from a file ends in a newline
    why = _why_not(url)
    if why:
        raise UserError(f"{source} {why}; copy the webhook's whole https:// address (it is a secret, so not repeated here)")
    return Webhook(url)


def _why_not(url: str) -> str | None:
    if not url:
        return "is empty"
    if not url.isascii() or any(c.isspace() or not c.isprintable() for c in url):
        return "holds characters that no URL may have"
    try:
        parts = urlsplit(url)
        _ = parts.port  # ValueError if it is no number; the text of the error repeats the URL
    except ValueError:
        return "is not a URL"
    if parts.scheme not in ("http", "https"):
        return "does not begin with https:// or http://"
    if not parts.hostname:
        return "names no host"
    return "holds a user name or password, which is not supported" if "@" in parts.netloc else None
