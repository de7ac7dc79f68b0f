"""Configuration: four sections of frozen dataclasses, and the command line that fills them.

A run is described by `model`, `data`, `optimisation` and `run`. A recipe defines the first two and may extend the others.
The command line is flat (`--d_model 512`). The values of a preset and a YAML file are put in front of it as arguments, so that
all three pass the same checks and the later one wins: flags > YAML > preset > defaults (or the checkpoint that is resumed).

Nothing here imports torch: `--help` has to answer at once.
"""

import dataclasses
import hashlib
import math
import os
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trainer.command_line.bounds import Bound, bounded_fields
from trainer.command_line.flags import arguments, cli, flag_names, nearest, peek, typed
from trainer.command_line.locations import with_homes
from trainer.command_line.secrets import redact_text
from trainer.command_line.webhook import Webhook, find_webhook
from trainer.command_line.yaml_file import read_yaml
from trainer.errors import UserError
from trainer.fields import problem_of

_FOLDERS = ("output_dir", "run_name", "checkpoint_dir")


@dataclass(frozen=True)
class Parsed:
    """What a training command line says."""

    config: Any
    unresolved: Any
    """`config` before its `resolved()` was called"""
    without_flags: Any
    """what `unresolved` would be without the flags on the command line; where the two differ names the run"""
    typed: frozenset[str]
    """names of the fields that were given: by a flag, in the YAML file or in the preset"""
    webhook: Webhook | None = None
    """where alerts go. Its URL is a secret, so the configs, which are written to files, do not hold it"""


def values(config: Any) -> dict[str, Any]:
    """{field: value} of a config, in sections or flat."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flat |= values(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return flat


def changed(config: Any, base: Any, sections: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    """{field: (value in `base`, value in `config`)} of the fields of `sections` in which the two differ."""
    before = {k: v for s in sections for k, v in values(getattr(base, s)).items()}
    after = {k: v for s in sections for k, v in values(getattr(config, s)).items()}
    return {k: (before[k], v) for k, v in after.items() if before[k] != v}


def parse(
    config_class: type,
    presets: Mapping[str, Path],
    argv: Sequence[str],
    prog: str,
    default: Any = None,
) -> Parsed:
    """Read a training command line. `default` (a checkpoint's config, say) has the values of the flags that are not given.

    A config class may have a method `resolved() -> config` that fills in what follows from other values, with a ValueError or
    UserError where values contradict each other. UserError for whatever the user can mend.
    """
    default = config_class() if default is None else default
    names, config_file = flag_names(config_class), peek(argv, "config")
    if config_file == "":
        raise UserError("--config is empty; give a YAML file, or leave it out")
    leading = _preset(config_class, presets, argv)
    from_file = arguments(read_yaml(Path(config_file).expanduser(), config_class)) if config_file else []
    by_source = [frozenset(names[n] for n in typed(words, names)) for words in (leading, from_file, argv)]
    given = frozenset().union(*by_source)
    before_flags = [*leading, *from_file]
    try:
        base = _epochs_win(cli(config_class, before_flags, prog, default) if before_flags else default, by_source[:2])
    except UserError as error:
        raise UserError(f"--config {config_file}: {error}") from None
    config = _epochs_win(cli(config_class, [*before_flags, *argv], prog, default), by_source)
    steps, epochs = config.optimisation.max_steps, config.optimisation.max_epochs
    if _length_flags(by_source) == {"max_steps", "max_epochs"} and steps and epochs:
        ways_out = "--max_steps 0 to count epochs, or --max_epochs 0 to count steps"
        raise UserError(f"max_steps {steps} and max_epochs {epochs:g} were given together; add {ways_out}")
    webhook = find_webhook(config.run.alert_webhook, {} if "alert_webhook" in given else os.environ)
    base, config = (
        with_homes(dataclasses.replace(c, run=dataclasses.replace(c.run, alert_webhook=None))) for c in (base, config)
    )
    if config.run.debug:
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, num_workers=0, compile="no"))
    check(config)
    refuse_unused(config, given)
    return Parsed(_resolved(config), config, base, given, webhook)


def _resolved(config: Any) -> Any:
    if not hasattr(config, "resolved"):
        return config
    try:
        config = config.resolved()
    except ValueError as error:
        raise UserError(str(error)) from None
    check(config)
    return config


def refuse_unused(config: Any, given: frozenset[str]) -> None:
    """UserError for a given flag that does nothing in this recipe: its config class lists these as `unused` {field: why}."""
    default = values(type(config)())
    for name, reason in getattr(config, "unused", {}).items():
        value = values(config)[name]
        if name in ("warmup_steps", "min_lr") and config.optimisation.schedule != "recipe":
            continue
        if name in given and value not in (0, default[name]):
            raise UserError(f"{name} {value:g} would do nothing: {reason}")


def _length_flags(by_source: Sequence[frozenset[str]]) -> frozenset[str]:
    """Which of max_steps and max_epochs the last source (preset, YAML file, flags) gives that gives either; else none."""
    lengths = [given & {"max_steps", "max_epochs"} for given in by_source]
    return next((names for names in reversed(lengths) if names), frozenset())


def _epochs_win(config: Any, by_source: Sequence[frozenset[str]]) -> Any:
    """`config` with `max_steps` 0, which would otherwise decide, if the last source that gives a length gives only epochs."""
    if _length_flags(by_source) != {"max_epochs"} or not config.optimisation.max_epochs:
        return config
    return dataclasses.replace(config, optimisation=dataclasses.replace(config.optimisation, max_steps=0))


def parse_flat(config_class: type, argv: Sequence[str], prog: str, presets: Mapping[str, Path] | None = None) -> Any:
    """An instance of a flat dataclass, from the command line of a sub-command. UserError for whatever the user can mend."""
    leading = _preset(config_class, presets, argv) if presets else []
    flags = with_homes(cli(config_class, [*leading, *argv], prog, None))
    check(flags)
    return flags


def _preset(config_class: type, presets: Mapping[str, Path], argv: Sequence[str]) -> list[str]:
    """The values of the preset that a command line names, as words; empty if it names none. UserError for an unknown one."""
    preset = peek(argv, "preset")
    if preset is not None and preset not in presets:
        raise UserError(f"unknown preset {preset!r}{nearest(preset, presets)}; this recipe has: {', '.join(presets) or 'none'}")
    return arguments(read_yaml(presets[preset], config_class)) if preset else []


def check(config: Any) -> None:
    """UserError for values that no run can have: numbers out of bounds, URLs with a secret, values that contradict each other.

    It names the flag and the value, but no secret.
    """
    for name, value, bound in bounded_fields(config):
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, str):
                _check_text(name, part)
            elif isinstance(part, int | float) and not isinstance(part, bool):
                _check_number(name, part, bound)
        if name in _FOLDERS and value is not None:
            _check_folder(name, value)
    if hasattr(config, "optimisation"):
        _check_together(config)


def _check_text(name: str, text: str) -> None:
    if redact_text(text) != text:
        raise UserError(
            f"{name} is a URL with a secret in it, which every checkpoint would keep; give it without: logins belong "
            "in ~/.netrc or the environment"
        )


def _check_number(name: str, number: float, bound: Bound | None) -> None:
    if isinstance(number, float) and not math.isfinite(number):  # an integer may be too long for a float
        raise UserError(f"{name} {number} is not a finite number; give a finite one")
    wanted = bound and bound.broken_by(number)
    if wanted:
        raise UserError(f"{name} {number} {wanted}")


def _check_together(config: Any) -> None:
    optimisation = config.optimisation
    if config.run.patience and not config.run.eval_every and not config.run.eval_epochs:
        raise UserError(
            f"patience {config.run.patience} waits for evaluations, and there are none; give an --eval_every or --eval_epochs"
        )
    if not optimisation.max_steps and not optimisation.max_epochs:
        raise UserError("max_steps and max_epochs are both 0; give one of them")
    if optimisation.min_lr > optimisation.learning_rate:
        raise UserError(f"min_lr {optimisation.min_lr:g} is above learning_rate {optimisation.learning_rate:g}; lower it")


def _check_folder(name: str, value: str) -> None:
    """UserError for a value that names no folder, or one outside the runs (`--run_name ..`)."""
    if not value.strip() or (not value.isprintable() and value.isascii()):
        raise UserError(f"{name} {value!r} names no folder; give another, or leave it out")
    if re.match(r"[a-z0-9+.-]+://", value, re.IGNORECASE):
        raise UserError(f"{name} is a URL; give a folder of this machine")
    if name == "run_name" and (value in (".", "..") or "/" in value):
        raise UserError(f"run_name {value!r} is the last part of a path alone, without /; give a whole path as --output_dir")


def to_yaml(config: Any) -> str:
    """The whole config as YAML, in sections: a file for `--config`, and for `from_mapping`, once parsed.

    Where `max_steps` decides the length of the run, `max_epochs` is 0 in it: a file that gives both is refused.
    """
    mapping = to_mapping(config)
    if mapping["optimisation"]["max_steps"]:
        mapping["optimisation"]["max_epochs"] = 0.0
    return yaml.safe_dump(mapping, sort_keys=False, allow_unicode=True)


def to_mapping(config: Any) -> dict[str, Any]:
    """The whole config as plain dicts and lists (tuples become lists), in sections."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, tuple | list) else value

    return plain(dataclasses.asdict(config))


def from_mapping(config_class: type, mapping: Mapping[str, Any], source: str) -> Any:
    """The reverse of `to_mapping`; missing fields have the recipe's defaults. UserError, which begins with `source`, for an
    unknown key or a value of another type."""
    defaults, sections = config_class(), {}
    for name, section_class in typing.get_type_hints(config_class).items():
        section = dict(mapping.get(name) or {})
        problem = problem_of(typing.get_type_hints(section_class), section, whole=False)
        if problem:
            raise UserError(f"{source}: section {name} {problem}")
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in section.items()}
        sections[name] = dataclasses.replace(getattr(defaults, name), **values)
    return config_class(**sections)


def spelled(value: Any) -> str:
    """A value as text; texts in a tuple are separated by spaces, as on the command line."""
    texts = isinstance(value, tuple) and all(isinstance(part, str) for part in value)
    return " ".join(value) if texts else str(value)


def run_name(parsed: Parsed) -> str:
    """The default name of a run: its preset or YAML file, then each value that differs from that and changes weights.

    A path is shortened to its last part and a hash of the whole, so that runs on different data have different names.
    """
    run = parsed.config.run
    parts = [Path(run.config).stem if run.config else run.preset or "default"]
    for name, (_, value) in changed(parsed.unresolved, parsed.without_flags, ("model", "data", "optimisation")).items():
        text = f"{value:g}" if isinstance(value, float) else spelled(value)
        first = value[0] if isinstance(value, tuple) and value else value
        if isinstance(first, str) and "/" in first:
            parts.append(f"{_safe(Path(first).stem)[:24]}-{_digest(text)}")
            continue
        safe = _safe(text)
        # Two texts may become the same safe text: a hash keeps their runs apart.
        parts.append(f"{name}{safe}" if safe == text else f"{name}{safe[-24:]}-{_digest(text)}")
    name = "-".join(parts)
    return name if len(name) <= 80 else f"{name[:74]}-{_digest(name)}"


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", text).strip("_")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:4]
