"""What must not be written down or shown: passwords, keys, and URLs whose path is one."""

import re
from collections.abc import Iterable

# `max_tokens` and `tokenizer` hold no secret, `hf_token` and `api_key` do; a name too many costs only readability.
_SECRET_NAME = re.compile(r"-*[\w.-]*(token(?!s|i[sz])|key|secret|passw|webhook|credential)[\w.-]*", re.IGNORECASE)
# The hosts of webhooks whose path is the secret, and how that path begins where they serve other pages too.
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
# On a host of one's own (Mattermost, Rocket.Chat, n8n, Home Assistant, Zulip): a segment that says hook, or a parameter.
_HOOK = r"/(?:[a-z]+-?)?hooks?(?:b2|-test)?/+\w|[?&;][\w.-]*(?:token|key|sig|signature|secret|passw(?:or)?d|auth|code)="
_BEGINNING = r"(?<![a-z0-9+.-])"  # of a word: quick on a megabyte without a space too
_SCHEME = rf"{_BEGINNING}[a-z0-9+.-]+:/{{1,2}}"  # pathlib makes one slash of two
_HOST, _START, _REST = r"[^\s/\"'@]", r"[^\s\"'\\]{0,500}?", r"[^\s\"'\\]*"
_SECRET_URL = re.compile(
    rf"{_SCHEME}{_HOST}+@{_REST}|(?:{_SCHEME}|{_BEGINNING})(?:{_WEBHOOKS}){_REST}|{_SCHEME}(?={_START}(?:{_HOOK})){_REST}",
    re.IGNORECASE,
)


def without_urls(text: str) -> str:
    """A word of a command line as an error message may repeat it: any URL may be a webhook's, under a mistyped name."""
    return re.sub(rf"{_SCHEME}.*", "***", redact_text(text), flags=re.IGNORECASE | re.DOTALL)


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
