"""Configuration: four sections of frozen dataclasses, and the command line that fills them.

A run is described by `model`, `data`, `optimisation` and `run`. A recipe brings the first two and may extend the others.
On the command line the sections disappear (`--d_model 512`). A preset and a YAML file become leading arguments, so that all
three meet the same checks, and the later one wins: flags > YAML > preset > defaults (or the checkpoint that is resumed).

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
from typing import Annotated, Any, Literal

import yaml
from tyro.conf import arg

from trainer.alerts import Webhook, find_webhook
from trainer.errors import Refusal
from trainer.flags import arguments, cli, flag_names, nearest, peek, read_yaml, typed
from trainer.redaction import redact_text


@dataclass(frozen=True)
class Optimisation:
    """What decides the weights, beside the model and the data."""

    seed: int = 42
    """seed of initial weights, order of the data and dropout"""
    batch_size: Annotated[int, arg(aliases=("--batch",))] = 8
    """samples of one micro-step, summed over all processes"""
    gradient_accumulation_steps: int = 1
    """micro-steps per optimizer step; effective batch = batch_size x this"""
    max_steps: Annotated[int, arg(aliases=("--max_iters", "--steps"))] = 0
    """optimizer steps of the whole run (0: max_epochs decides)"""
    max_epochs: float = 10.0
    """passes over the training set, if max_steps is 0"""
    learning_rate: Annotated[float, arg(aliases=("--lr",))] = 3e-4
    """peak learning rate"""
    min_lr: float = 0.0
    """learning rate of the last step"""
    warmup_steps: Annotated[int, arg(aliases=("--warmup_iters",))] = 2000
    """optimizer steps of linear warm-up; an untyped value is cut to a tenth of the run"""
    optimizer: Literal["adamw", "adam", "sgd", "muon"] = "adamw"
    """muon: 2-D hidden weights by Muon, the rest by AdamW (not under ZeRO)"""
    weight_decay: float = 0.01
    beta1: float = 0.9
    """first-moment decay of Adam; momentum of SGD"""
    beta2: float = 0.95
    eps: float = 1e-8
    grad_clip: float = 1.0
    """largest global gradient norm (0: no clipping)"""
    init_from: str | None = None
    """take the initial weights (only these) from this checkpoint folder or pretrained name"""

    @property
    def effective_batch_size(self) -> int:
        """Samples per optimizer step, over all processes and micro-steps."""
        return self.batch_size * self.gradient_accumulation_steps


@dataclass(frozen=True)
class Run:
    """What decides where and how the run happens, but not its mathematics."""

    output_dir: str | None = None
    """run directory (default: runs/RECIPE/NAME)"""
    run_name: str | None = None
    """last part of the run directory (default: from the preset or YAML file and the flags that change weights)"""
    preset: str | None = None
    """a named set of values of this recipe"""
    config: str | None = None
    """a YAML file of values, flat or in sections"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """auto: what the launcher says, else bf16 on a GPU and fp32 on a CPU"""
    compile: bool = False
    """torch.compile the network together with its loss"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, about a third more time"""
    deterministic: bool = False
    """deterministic kernels: bit-exact resume on a GPU too"""
    num_workers: int = 2
    """data-loading processes per training process"""
    prefetch_factor: int = 2
    """micro-batches each data-loading process prepares ahead"""
    pin_memory: bool = True
    """page-locked host batches (GPU only)"""
    log_every: Annotated[int, arg(aliases=("--log_interval",))] = 100
    """optimizer steps between log lines"""
    log_grad_norms: bool = False
    """with each log line the gradient norm of every layer too (not under ZeRO)"""
    eval_every: Annotated[int, arg(aliases=("--eval_interval",))] = 500
    """optimizer steps between evaluations (0: only at the end of epochs and of the run)"""
    eval_iters: int = 0
    """batches per evaluation (0: the whole set)"""
    save_every: Annotated[int, arg(aliases=("--checkpoint_interval",))] = 1000
    """optimizer steps between checkpoints (0: off)"""
    save_epochs: int = 1
    """epochs between checkpoints that are kept, as checkpoint_epoch_E (0: off)"""
    save_minutes: float = 0.0
    """minutes between checkpoints (0: off)"""
    keep_last: int = 3
    """step checkpoints to keep (0: all); those of new bests alone do not count, and what a link points to always stays"""
    checkpoint_dir: str | None = None
    """where the checkpoints go (default: checkpoints/ in the run directory)"""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue the run in this run directory, if it holds one"""
    resume_from: str | None = None
    """start from this checkpoint, or roll this run back to it"""
    stop_at_step: int = 0
    """end this launch at this step, as if asked to stop (0: off)"""
    max_training_hours: float | None = None
    """end this launch, checkpoint included, within so many hours of its start"""
    patience: int = 0
    """evaluations without a better one before the run ends (0: off)"""
    target_loss: float | None = None
    """end the run once the logged training loss is at or below this"""
    max_bad_steps: int = 10
    """steps in a row with a non-finite gradient before the run fails"""
    timeout_minutes: float = 60.0
    """how long a process waits for the others before it gives up"""
    use_tensorboard: bool = False
    use_wandb: bool = False
    wandb_project: str = "samecurve"
    wandb_run_name: str | None = None
    alert_webhook: str | None = None
    """Discord, Slack or any URL that takes JSON, told of start, progress, trouble and stop; kept nowhere. Better given as
    TRAINER_ALERT_WEBHOOK in the environment: other users see command lines, and a launcher repeats that of a failed run"""
    alert_every: int = 500
    """optimizer steps between alerts of progress (0: off)"""


# What describes this launch alone, and is therefore never taken over from a checkpoint.
PER_LAUNCH = ("output_dir", "run_name", "preset", "config", "device", "resume", "resume_from", "stop_at_step")
# Must be positive / may be zero / must lie in [0, 1): the same bounds for every recipe.
_SIZES = ("d_model", "num_layers", "num_heads", "d_ff", "max_length", "vocab_size")
_POSITIVE = (*_SIZES, "batch_size", "gradient_accumulation_steps", "learning_rate", "eps", "log_every", "prefetch_factor")
_NOT_NEGATIVE = ("max_steps", "max_epochs", "min_lr", "warmup_steps", "weight_decay", "grad_clip", "num_workers")
_NOT_NEGATIVE += (
    "eval_every",
    "eval_iters",
    "save_every",
    "save_epochs",
    "save_minutes",
    "keep_last",
    "stop_at_step",
    "patience",
    "seed",
    "alert_every",
)
_FRACTION = ("beta1", "beta2", "dropout")
_MORE_POSITIVE = ("max_bad_steps", "timeout_minutes", "max_training_hours")


@dataclass(frozen=True)
class Parsed:
    """A command line, read. `asked` is the config before `resolved`, and `base` what that would have been without the typed
    flags: their difference names the run."""

    config: Any
    asked: Any
    base: Any
    typed: frozenset[str]
    """names of the fields that were given: by a flag, in the YAML file or in the preset"""
    webhook: Webhook | None = None
    """where alerts go. Its URL is a secret: it is here alone, and in none of the configs, which are written to files"""


def values(config: Any) -> dict[str, Any]:
    """All values of a sectioned (or flat) config by field name."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flat |= values(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return flat


def changed(config: Any, base: Any, sections: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    """{field: (base value, config value)} where the two differ, within `sections`."""
    before = {k: v for s in sections for k, v in values(getattr(base, s)).items()}
    after = {k: v for s in sections for k, v in values(getattr(config, s)).items()}
    return {k: (before[k], v) for k, v in after.items() if before[k] != v}


def parse(
    config_class: type,
    presets: Mapping[str, Path],
    argv: Sequence[str],
    prog: str,
    default: Any = None,
    description: str = "",
) -> Parsed:
    """Read a training command line. `default` (a checkpoint's config) stands in for the defaults of the flags not given.

    A config class with a method `resolved() -> config` fills in what follows from other values, and refuses (with a
    Refusal) values that contradict each other.

    Raises Refusal (one or two lines) for anything a user can mend; exits 0 after `--help`.
    """
    default = config_class() if default is None else default
    names, config_file = flag_names(config_class), peek(argv, "config")
    if config_file == "":
        raise Refusal("--config is empty; give a YAML file, or leave it out")
    leading = _preset(config_class, presets, argv)
    from_file = arguments(read_yaml(Path(config_file), config_class)) if config_file else []
    description = f"{(config_class.__doc__ or '').strip()}\nPresets: {', '.join(presets) or 'none'}.{description}"
    by_source = [frozenset(names[n] for n in typed(words, names)) for words in (leading, from_file, argv)]
    given = frozenset().union(*by_source)
    base = _counting(cli(config_class, [*leading, *from_file], prog, default, description), by_source[:2])
    config = _counting(cli(config_class, [*leading, *from_file, *argv], prog, default, description), by_source)
    steps, epochs = config.optimisation.max_steps, config.optimisation.max_epochs
    if _length_flags(by_source) == {"max_steps", "max_epochs"} and steps and epochs:
        ways_out = "--max_steps 0 to count epochs, or --max_epochs 0 to count steps"
        raise Refusal(f"max_steps {steps} and max_epochs {epochs:g} were given together; add {ways_out}")
    webhook = find_webhook(config.run.alert_webhook, {} if "alert_webhook" in given else os.environ)
    base, config = (dataclasses.replace(c, run=dataclasses.replace(c.run, alert_webhook=None)) for c in (base, config))
    check(config)
    asked = config
    if hasattr(config, "resolved"):
        config = config.resolved()
        check(config)
    return Parsed(config, asked, base, given, webhook)


def _length_flags(by_source: Sequence[frozenset[str]]) -> frozenset[str]:
    """What the last of preset, YAML file and flags that tells how long to train does so with."""
    told = [given & {"max_steps", "max_epochs"} for given in by_source]
    return next((names for names in reversed(told) if names), frozenset())


def _counting(config: Any, by_source: Sequence[frozenset[str]]) -> Any:
    """`config` with `max_steps` 0, which would decide, if epochs were given after it."""
    if _length_flags(by_source) != {"max_epochs"} or not config.optimisation.max_epochs:
        return config
    return dataclasses.replace(config, optimisation=dataclasses.replace(config.optimisation, max_steps=0))


def parse_flat(config_class: type, argv: Sequence[str], prog: str, presets: Mapping[str, Path] | None = None) -> Any:
    """Read the command line of a sub-command: one flat dataclass."""
    leading = _preset(config_class, presets, argv) if presets else []
    return cli(config_class, [*leading, *argv], prog, None, (config_class.__doc__ or "").strip())


def _preset(config_class: type, presets: Mapping[str, Path], argv: Sequence[str]) -> list[str]:
    """The values of the preset that a command line names, as its leading words."""
    preset = peek(argv, "preset")
    if preset is not None and preset not in presets:
        raise Refusal(f"unknown preset {preset!r}{nearest(preset, presets)}; this recipe has: {', '.join(presets) or 'none'}")
    return arguments(read_yaml(presets[preset], config_class)) if preset else []


def check(config: Any) -> None:
    """Refuse numbers no run can mean, naming the flag and the value, and URLs that hold a secret, without it."""
    for name, value in values(config).items():
        words = [word for word in (value if isinstance(value, tuple) else (value,)) if isinstance(word, str)]
        if any(redact_text(word) != word for word in words):
            raise Refusal(
                f"{name} is a URL with a secret in it, which every checkpoint would keep; give it without: logins belong "
                "in ~/.netrc or the environment"
            )
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if isinstance(value, float) and not math.isfinite(value):  # an integer may be too long for a float
            raise Refusal(f"{name} {value} is not a finite number; give a finite one")
        if name in _POSITIVE + _MORE_POSITIVE and value <= 0:
            raise Refusal(f"{name} {value} must be above 0")
        if name in _NOT_NEGATIVE and value < 0:
            raise Refusal(f"{name} {value} must not be negative")
        if name in _FRACTION and not 0 <= value < 1:
            raise Refusal(f"{name} {value} must be at least 0 and below 1")
    optimisation = config.optimisation
    if not optimisation.max_steps and not optimisation.max_epochs:
        raise Refusal("max_steps and max_epochs are both 0; give one of them")
    if optimisation.min_lr > optimisation.learning_rate:
        raise Refusal(f"min_lr {optimisation.min_lr:g} is above learning_rate {optimisation.learning_rate:g}; lower it")


def to_yaml(config: Any) -> str:
    """The whole config as YAML, in sections; `from_mapping(yaml)` gives it back."""
    return yaml.safe_dump(to_mapping(config), sort_keys=False, allow_unicode=True)


def to_mapping(config: Any) -> dict[str, Any]:
    """The whole config as plain dicts and lists (tuples become lists), in sections."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, tuple | list) else value

    return plain(dataclasses.asdict(config))


def from_mapping(config_class: type, mapping: Mapping[str, Any], source: str) -> Any:
    """The reverse of `to_mapping`; `source` is named when a section or key is not ours."""
    sections = {}
    for name, section_class in typing.get_type_hints(config_class).items():
        section = dict(mapping.get(name) or {})
        unknown = set(section) - {f.name for f in dataclasses.fields(section_class)}
        if unknown:
            raise Refusal(f"{source}: unknown key {sorted(unknown)[0]!r} in section {name}; written by another version?")
        sections[name] = section_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in section.items()})
    return config_class(**sections)


def run_name(parsed: Parsed) -> str:
    """The default name of a run: preset or YAML file, then each value that differs from it and changes weights."""
    run = parsed.config.run
    parts = [Path(run.config).stem if run.config else run.preset or "default"]
    for name, (_, value) in changed(parsed.asked, parsed.base, ("model", "data", "optimisation")).items():
        text = f"{value:g}" if isinstance(value, float) else str(value)
        safe = re.sub(r"[^A-Za-z0-9._+-]+", "_", text).strip("_")
        # Two paths may read the same once made safe; a short hash keeps their runs apart.
        parts.append(f"{name}{safe}" if safe == text else f"{name}{safe[-24:]}-{_digest(text)}")
    name = "-".join(parts)
    return name if len(name) <= 120 else f"{name[:110]}-{_digest(name)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]
