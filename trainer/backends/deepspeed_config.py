"""Checks a DeepSpeed file, and fills in its `auto` values from the flags."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from trainer.command_line.sections import Optimisation
from trainer.distributed.launch import DDP, switched_on
from trainer.errors import UserError, one_line, path_of

VARIABLE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
_SECTIONS = ("zero_optimization", "bf16", "fp16", "torch_autocast")


def request_zero(environ: MutableMapping[str, str], file: str | None) -> None:
    """Set the environment for ZeRO as Accelerate's launcher does, with the file of `--deepspeed_config` (None: not given).

    UserError where the launcher has asked for something else, or is DeepSpeed's own, which names no file.
    """
    asked = switched_on(environ, "ACCELERATE_USE_DEEPSPEED")
    if file is None:
        if "CROSS_RANK" in environ and not asked:
            raise UserError(
                f"`deepspeed` has started this, without a DeepSpeed file; add --deepspeed_config "
                f"{path_of('ds_configs/zero2.json')}, or start DDP with torchrun"
            )
        return
    if switched_on(environ, "ACCELERATE_USE_FSDP"):
        raise UserError(f"--deepspeed_config {file}, and the launcher asks for FSDP; keep one of them")
    if asked and Path(environ.get(VARIABLE) or "none").absolute() != Path(file).absolute():
        raise UserError(f"--deepspeed_config {file}, and the launcher asks for {environ.get(VARIABLE)}; keep one of them")
    if "WORLD_SIZE" not in environ:
        raise UserError(
            f"--deepspeed_config {file}: this process was started alone; start it with torchrun --nproc_per_node N (1 does), "
            "srun or deepspeed"
        )
    environ.update({"ACCELERATE_USE_DEEPSPEED": "true", VARIABLE: file})


def check_deepspeed_file(environ: Mapping[str, str]) -> None:
    """UserError for a malformed file. Accelerate would read it first, and fail on it with a traceback."""
    path = Path(environ.get(VARIABLE) or "none")
    if str(path) == "none":
        return
    shown = f"DeepSpeed file {path}"
    try:
        if path.is_fifo():
            raise UserError(f"{shown}: not an ordinary file; give a JSON file")
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_twice)
    except OSError as error:
        raise UserError(f"{shown}: {error.strerror}; give the path of a JSON file") from None
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a key twice; nested too deeply
        raise UserError(f"{shown} is no JSON: {one_line(error, 200)}") from None
    if not isinstance(config, dict):
        raise UserError(f"{shown}: expected an object {{...}}, found {json.dumps(config)[:50]}; see {path_of('ds_configs')}")
    zero = config.get("zero_optimization")
    sections = {name: config.get(name) for name in _SECTIONS}
    sections |= {name: zero.get(name) for name in ("offload_optimizer", "offload_param")} if isinstance(zero, dict) else {}
    for name, section in sections.items():
        if section is not None and not isinstance(section, dict):
            raise UserError(f"{shown}: {name} takes a section {{...}}, found {json.dumps(section)[:50]}")
    stage = (zero or {}).get("stage", 0)
    if not isinstance(stage, int) or isinstance(stage, bool):
        raise UserError(f"{shown}: zero_optimization.stage is {json.dumps(stage)[:50]}; write 1, 2 or 3 there")
    for name in ("bf16", "fp16"):
        enabled = (config.get(name) or {}).get("enabled", "auto")
        if enabled != "auto" and not isinstance(enabled, bool):
            raise UserError(f'{shown}: {name}.enabled is {json.dumps(enabled)[:50]}; write true, false or "auto" there')


def _without_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    section = dict(pairs)
    if len(section) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in section if names.count(name) > 1)!r} is given twice")
    return section


def check_filled(config: Mapping[str, Any]) -> None:
    """UserError, in one line, for what DeepSpeed's own parser refuses. Left out: `auto`, which Accelerate fills in later."""
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        # train_batch_size too: before its engine is made DeepSpeed assumes one process, and would find the product wrong.
        DeepSpeedConfig(_without_auto({key: value for key, value in config.items() if key != "train_batch_size"}))
    except Exception as error:  # pydantic's, DeepSpeed's own, or any that a wrong type leads to
        why = one_line(error, 300) or type(error).__name__
        details = getattr(error, "errors", None)
        if callable(details):  # pydantic's, which fill five lines each
            why = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}, found {e.get('input')!r:.50}" for e in details()[:3])
        raise UserError(f"DeepSpeed file {os.environ.get(VARIABLE) or '(none)'}: {why}; see {path_of('ds_configs')}") from error


def _without_auto(value: Any) -> Any:
    return {k: _without_auto(v) for k, v in value.items() if v != "auto"} if isinstance(value, Mapping) else value


def fill_deepspeed_config(
    config: Mapping[str, Any], precision: str, settings: Optimisation, processes: int, precision_flag: str = "auto"
) -> dict[str, Any]:
    """`config` with batch size, accumulation, clipping and precision from the flags.

    UserError where a number in the file contradicts a flag, naming both. Without a file the numbers are Accelerate's defaults,
    and are replaced.
    """
    _check_stage(config)
    _check_numbers(config if os.environ.get(VARIABLE) else {}, settings, processes)
    for key in ("optimizer", "scheduler"):
        if key in config:
            raise UserError(f"DeepSpeed file: remove its {key!r} section; samecurve sets it from its own flags")
    share, accumulation = settings.batch_size // processes, settings.gradient_accumulation_steps
    return {
        "steps_per_print": 2**31 - 1,
        **{key: value for key, value in config.items() if key not in ("bf16", "fp16")},
        "train_micro_batch_size_per_gpu": share,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": settings.grad_clip,
        # DeepSpeed only logs this, but checks that it is the product of the others: where shares differ, of the smallest share.
        "train_batch_size": share * accumulation * processes,
        # With an offloaded optimizer Accelerate would compile DeepSpeed's CPU Adam and use it instead of the requested
        # optimizer; torch's own fused CPU optimizers are as good.
        "zero_force_ds_cpu_optimizer": False,
        **_precision_section(config, precision, precision_flag),
    }


def _check_stage(config: Mapping[str, Any]) -> None:
    stage = int((config.get("zero_optimization") or {}).get("stage", 0))
    if stage not in (1, 2, 3):
        raise UserError(f"DeepSpeed zero_optimization.stage {stage} brings nothing over DDP; use {path_of(DDP)}")
    if config["zero_optimization"].get("zero_hpz_partition_size", 1) != 1:
        raise UserError(  # DeepSpeed fills its second copy of the weights, within a node, with other values than the first
            "DeepSpeed file: zero_hpz_partition_size trains on other weights than the run's; leave it out, or use "
            f"{path_of('accelerate_configs/hsdp.yaml')}"
        )


def _check_numbers(file: Mapping[str, Any], settings: Optimisation, processes: int) -> None:
    flags = {
        "train_micro_batch_size_per_gpu": (settings.batch_size // processes, "--batch_size over the processes"),
        "gradient_accumulation_steps": (settings.gradient_accumulation_steps, "--gradient_accumulation_steps"),
        "gradient_clipping": (settings.grad_clip, "--grad_clip"),
        "train_batch_size": (settings.effective_batch_size, "--batch_size x --gradient_accumulation_steps"),
    }
    for key, (value, flag) in flags.items():
        in_file = file.get(key, "auto")
        if in_file == "auto":
            continue
        if isinstance(in_file, bool) or not isinstance(in_file, int | float):
            raise UserError(f'DeepSpeed file: {key} is {json.dumps(in_file)[:50]}; write "auto" there')
        if in_file != value:
            raise UserError(f'DeepSpeed file: {key} {in_file} contradicts {flag} = {value:g}; write "auto" there')


def _precision_section(config: Mapping[str, Any], precision: str, precision_flag: str) -> dict[str, Any]:
    """The one section of `bf16`, `fp16` and `torch_autocast` that makes the precision, under its name; empty for fp32."""
    bf16, fp16 = config.get("bf16") or {}, config.get("fp16") or {}
    in_file = "bf16" if bf16.get("enabled") is True else "fp16" if fp16.get("enabled") is True else None
    pure_bf16 = in_file == "bf16" and precision_flag == "auto" and precision == "no"
    if in_file and in_file != precision and not pure_bf16:
        raise UserError(
            f"DeepSpeed file: {in_file}.enabled contradicts --mixed_precision, which came to {precision}; "
            f'write "auto" there, or --mixed_precision {in_file}'
        )
    if in_file == "bf16":
        # Pure bf16 weights, which the file asks for. Without this DeepSpeed does not notice a NaN there.
        return {"bf16": {**bf16, "check_grad_overflow": True}}
    if precision == "bf16":
        # Autocast over fp32 weights, for DDP's numbers. DeepSpeed communicates the modules that the file names in bf16.
        classes = (config.get("torch_autocast") or {}).get("lower_precision_safe_modules", [])
        return {"torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": classes}}
    if precision == "fp16":
        return {"fp16": {"loss_scale_window": 2000, **fp16, "enabled": True}}
    return {}


def precision_notes(filled: Mapping[str, Any]) -> list[str]:
    """A line for each setting of a filled DeepSpeed file that makes numbers differ from DDP's."""
    settings = {"fp16": "DeepSpeed fp16", "bf16": "DeepSpeed bf16.enabled"}
    differs = "so this run's numbers differ from DDP's"
    notes = [
        f"{setting}: weights are kept in {kind}, {differs}"
        for kind, setting in settings.items()
        if (filled.get(kind) or {}).get("enabled")
    ]
    sent = (filled.get("torch_autocast") or {}).get("lower_precision_safe_modules")
    if sent:
        notes.append(f"DeepSpeed torch_autocast: what is sent of {', '.join(sent)} is bf16, {differs}")
    return notes
