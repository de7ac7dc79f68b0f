"""What must not be written down or shown: passwords, keys, and URLs whose path is one."""

import re
from collections.abc import Iterable

# `max_tokens` and `tokenizer` hold no secret, `hf_token` and `api_key` do; a name too many costs only readability.
_SECRET_NAME = re.compile(r"-*[\w.-]*(token(?!s|i[sz])|key|secret|passw|webhook|credential)[\w.-]*", re.IGNORECASE)
_WEBHOOKS = (  # where the path is the secret
    r"discord(app)?\.com/api/(v\d+/)?webhooks/|hooks\.(slack|zapier)\.com/|webhook\.office\.com/"
    r"|outlook\.office\.com/webhook|chat\.googleapis\.com/|api\.telegram\.org/bot|maker\.ifttt\.com/"
)
_SCHEME = r"(?<![a-z0-9+.-])[a-z0-9+.-]+://"  # from the beginning of a word: quick on a megabyte without a space too
_HOST = r"[^\s/\"'@]"
_SECRET_URL = re.compile(rf"{_SCHEME}({_HOST}+@|({_HOST}*\.)?({_WEBHOOKS}))[^\s\"'\\]*", re.IGNORECASE)


def without_urls(text: str) -> str:
    """A word of a command line as an error message may repeat it: any URL may be a webhook's, under a mistyped name."""
    return re.sub(rf"{_SCHEME}.*", "***", text, flags=re.IGNORECASE | re.DOTALL)


def redact_text(text: str) -> str:
    """`text` with every URL that carries a secret (credentials, or a webhook's path) replaced by `***`."""
    return _SECRET_URL.sub("***", text)


def redact(argv: Iterable[str]) -> list[str]:
    """A command line without its secrets: `--x=y` and `--x y` where x is named like one, and URLs that carry one."""
    shown, value_is_secret = [], False
    for argument in argv:
        if value_is_secret and not argument.startswith("--"):
            shown.append("***")
            continue
        name, equals, _ = argument.partition("=")
        named = _SECRET_NAME.fullmatch(name) is not None
        value_is_secret = named and not equals and argument.startswith("--")
        shown.append(f"{name}=***" if named and equals else redact_text(argument))
    return shown
