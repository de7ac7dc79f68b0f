"""What `--help` prints: commands, examples and the usual flags; with `--help all` every flag."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trainer.command_line.flags import Switch, flag_names

WIDTH, COLUMN = 100, 30
USUAL = (
    *("seed", "batch_size", "gradient_accumulation_steps", "max_steps", "max_epochs", "learning_rate", "init_from"),
    *("output_dir", "run_name", "preset", "config", "device", "mixed_precision", "num_workers"),
    *("log_every", "eval_every", "save_every", "resume_from", "max_training_hours", "use_tensorboard", "use_wandb"),
)
"""fields of `optimisation` and `run` that `--help` lists; of the recipe's own sections it lists all"""


def asked_for(argv: Sequence[str]) -> bool:
    """Whether a command line asks for help."""
    return any(word in ("-h", "--help") for word in argv)


def takes(flags: type, name: str) -> bool:
    """Whether a flat dataclass of flags has the flag `name`, and none without a default."""
    fields = dataclasses.fields(flags)
    return name in flag_names(flags) and all(field.default is not dataclasses.MISSING for field in fields)


def text(
    config_class: type,
    prog: str,
    presets: Mapping[str, Any],
    commands: Mapping[str, str] | None = None,
    examples: Sequence[str] = (),
    everything: bool = True,
    beside: Mapping[str, str] | None = None,
) -> str:
    """The help text for a config class in sections, or for a flat dataclass of flags.

    `commands` {sub-command: description} and `beside` {flag: description}, flags that are no part of the configuration, are
    listed too. `everything`: all flags of `optimisation` and `run`, not only those in USUAL.
    """
    sections = dict(_sections(config_class))
    shown = {
        title: [flag for flag in flags if everything or title not in ("optimisation", "run") or flag.name in USUAL]
        for title, flags in sections.items()
    }
    parts = [f"usage: {prog} [FLAGS]      [in brackets: the default]", inspect.getdoc(config_class) or ""]
    if commands:
        parts[0] = f"usage: {prog} [COMMAND] [FLAGS]      [in brackets: the default]"
        rows = [_row(name, description) for name, description in {"train": "the default", **commands}.items()]
        parts.append("\n".join(["Commands, each with a --help of its own:", *rows]))
    if presets:
        parts.append(f"Presets: {', '.join(presets)}")
    if examples:
        parts.append("\n".join(["Examples:", *(f"  {line}" for line in examples)]))
    for title, flags in shown.items():
        parts.append("\n".join([f"{title.capitalize() or 'Flags'}:", *(_row(flag.spelling, flag.help) for flag in flags)]))
    if beside:
        parts.append("\n".join(["Plan:", *(_row(name, description) for name, description in beside.items())]))
    hidden = sum(map(len, sections.values())) - sum(map(len, shown.values()))
    if hidden:
        parts.append(f"{hidden} more flags: --help all")
    return "\n\n".join(parts)


@dataclasses.dataclass(frozen=True)
class _Flag:
    name: str
    spelling: str
    help: str


def _sections(config_class: type) -> Iterator[tuple[str, list[_Flag]]]:
    """(title, flags) of each section, or of a flat dataclass with an empty title."""
    nested = [name for name, hint in typing.get_type_hints(config_class).items() if dataclasses.is_dataclass(hint)]
    unused = getattr(config_class, "unused", {})
    if not nested:
        yield "", [*_flags(config_class, {})]
    for name in nested:
        section = getattr(config_class(), name)
        yield name, [flag for flag in _flags(type(section), vars(section)) if flag.name not in unused]


def _flags(section: type, defaults: Mapping[str, Any]) -> Iterator[_Flag]:
    hints = typing.get_type_hints(section, include_extras=True)
    documented = {key: value for kind in reversed(section.__mro__) for key, value in _docstrings(kind).items()}
    for field in dataclasses.fields(section):
        value, hint = defaults.get(field.name, field.default), hints[field.name]
        marks = getattr(hint, "__metadata__", ())
        aliases = [alias for mark in marks for alias in getattr(mark, "aliases", None) or ()]
        bare = typing.get_args(hint)[0] if marks else hint
        help_text = documented.get(field.name, "")
        if value is True:
            help_text += f" [on; --no_{field.name}]"
        elif value not in (None, (), dataclasses.MISSING) and value is not False and "default:" not in help_text:
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}" if type(value) is float else value
            help_text += f" [{shown}]"
        names = ", ".join([f"--{field.name}", *aliases])
        # A field without a default is a positional argument: `predict 27`.
        spelling = field.name.upper() if value is dataclasses.MISSING else f"{names} {_kind(bare)}"
        yield _Flag(field.name, spelling.strip(), help_text.strip())


def _kind(hint: Any) -> str:
    """A flag's values as usage texts write them: `N`, `TEXT`, `a|b`, `N ...`; empty for true or false."""
    if hint is bool:
        return ""
    if hint == Switch:
        return "[yes|no|auto]"
    inner = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return "|".join(map(str, inner))
    if origin is tuple:
        return f"{_kind(inner[0])} ..." if inner[-1] is ... else " ".join(map(_kind, inner))
    if inner:  # a union
        return _kind(inner[0])
    return {"str": "TEXT", "int": "N", "float": "X"}.get(getattr(hint, "__name__", ""), "TEXT")


@functools.cache
def _docstrings(section: type) -> dict[str, str]:
    """{field: the string literal below it} of a dataclass, read from its source; empty if that cannot be read."""
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0].body  # type: ignore[attr-defined]
    except (OSError, TypeError):  # `object` has no source
        return {}
    return {
        field.target.id: " ".join(below.value.value.split())
        for field, below in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str)
    }


def _row(name: str, description: str) -> str:
    """`name` and its description in two columns, the second one wrapped at WIDTH."""
    first = f"  {name}"
    lines = textwrap.wrap(description, WIDTH - COLUMN, break_long_words=False, break_on_hyphens=False) or [""]
    head = f"{first:{COLUMN}}" if len(first) < COLUMN else f"{first}\n{'':{COLUMN}}"
    return f"{head}{f'{chr(10)}{chr(32) * COLUMN}'.join(lines)}".rstrip()
