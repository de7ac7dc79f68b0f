"""Removes secrets from text that is shown or written: passwords, keys, and URLs that contain one."""

import re
from collections.abc import Iterable

# `hf_token` and `api_key` hold secrets, `max_tokens` and `tokenizer` do not. Matching too much only costs readability.
_SECRET_NAME = re.compile(r"-*[\w.-]*(token(?!s|i[sz])|key|secret|passw|webhook|credential)[\w.-]*", re.IGNORECASE)
# Hosts of webhooks, whose URL's path is the secret; where a host serves other pages too, with the beginning of that path.
_WEBHOOKS = (
    r"(?:\w+\.)?discord(?:app)?\.com{port}/+api/|media\.guilded\.gg{port}/|hooks\.slack(?:-gov)?\.com{port}/"
    r"|(?:[\w-]+\.)?webhook\.office(?:365)?\.com{port}/|outlook\.office(?:365)?\.com{port}/+webhook"
    r"|(?:[\w-]+\.)+logic\.azure\.com{port}/|(?:[\w-]+\.)+powerplatform\.com{port}/|chat\.googleapis\.com{port}/"
    r"|open\.(?:feishu\.cn|larksuite\.com|larkoffice\.com){port}/|oapi\.dingtalk\.com{port}/|qyapi\.weixin\.qq\.com{port}/"
    r"|api\.telegram\.org{port}/+(?:file/+)?bot|hooks\.zapier\.com{port}/|maker\.ifttt\.com{port}/"
    r"|hook\.(?:[\w-]+\.)?(?:make|integromat|celonis)\.com{port}/|(?:[\w-]+\.)+pipedream\.net|webhook\.site{port}/"
    r"|webexapis\.com{port}/+v1/+webhooks/|api\.ciscospark\.com{port}/+v1/+webhooks/|hooks\.chime\.aws{port}/"
    r"|webhooks\.gitter\.im{port}/|api\.flock\.com?{port}/+hooks/|events\.pagerduty\.com{port}/|alert\.victorops\.com{port}/"
    r"|hc-ping\.com{port}/|ntfy\.sh{port}/"
).replace("{port}", r"\.?(?::\d+)?")
# On self-hosted servers (Mattermost, Rocket.Chat, n8n, Home Assistant, Zulip): a path segment that says hook, or a parameter.
_HOOK = r"/(?:[a-z]+-?)?hooks?(?:b2|-test)?/+\w|[?&;][\w.-]*(?:token|key|sig|signature|secret|passw(?:or)?d|auth|code)="
_BEGINNING = r"(?<![a-z0-9+.-])"  # of a word, so that a megabyte without a space takes no quadratic time
_SCHEME = rf"{_BEGINNING}[a-z0-9+.-]+:/{{1,2}}"  # `{1,2}`: pathlib writes https:/host
_HOST, _START, _REST = r"[^\s/\"'@]", r"[^\s\"'\\]{0,500}?", r"[^\s\"'\\]*"
_SECRET_URL = re.compile(
    rf"{_SCHEME}{_HOST}+@{_REST}|(?:{_SCHEME}|{_BEGINNING})(?:{_WEBHOOKS}){_REST}|{_SCHEME}(?={_START}(?:{_HOOK})){_REST}",
    re.IGNORECASE,
)


def without_urls(text: str) -> str:
    """`text` with every URL replaced by `***`, for error messages: after a mistyped flag any URL may be a webhook's."""
    return re.sub(rf"{_SCHEME}.*", "***", redact_text(text), flags=re.IGNORECASE | re.DOTALL)


def redact_text(text: str) -> str:
    """`text` with every URL that carries a secret (credentials, or a webhook's path) replaced by `***`."""
    return _SECRET_URL.sub("***", text)


def redact(argv: Iterable[str]) -> list[str]:
    """A command line with `***` for each value of a flag named like a secret (`--x=y`, `--x y`) and each URL with a secret."""
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
