"""A DeepSpeed configuration with its `auto` values filled in from the recipe's flags."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from trainer.command_line.sections import Optimisation
from trainer.distributed.launch import DDP
from trainer.errors import UserError, path_of


def fill_deepspeed_config(
    config: Mapping[str, Any], precision: str, settings: Optimisation, processes: int, precision_flag: str = "auto"
) -> dict[str, Any]:
    """`config` with batch, accumulation, clipping and precision from our flags.

    UserError where a number in the file contradicts a flag, naming both. Values Accelerate puts in for a launch without a
    file are not the user's, and give way.
    """
    filled = dict(config)
    stage = int((filled.get("zero_optimization") or {}).get("stage", 0))
    if stage not in (1, 2, 3):
        raise UserError(f"DeepSpeed zero_optimization.stage {stage} brings nothing over DDP; use {path_of(DDP)}")
    from_file = bool(os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"))
    flags = {
        "train_micro_batch_size_per_gpu": (settings.batch_size // processes, "--batch_size over the processes"),
        "gradient_accumulation_steps": (settings.gradient_accumulation_steps, "--gradient_accumulation_steps"),
        "gradient_clipping": (settings.grad_clip, "--grad_clip"),
        "train_batch_size": (settings.effective_batch_size, "--batch_size x --gradient_accumulation_steps"),
    }
    for key, (value, flag) in flags.items():
        in_file = filled.get(key, "auto")
        if from_file and in_file != "auto" and float(in_file) != value:
            raise UserError(f'DeepSpeed file: {key} {in_file} contradicts {flag} = {value:g}; write "auto" there')
        filled[key] = value
    for key in ("optimizer", "scheduler"):
        if key in filled:
            raise UserError(f"DeepSpeed file: remove its {key!r} section; samecurve sets it from its own flags")
    bf16, fp16 = (dict(filled.pop(key, None) or {}) for key in ("bf16", "fp16"))
    in_file = "bf16" if bf16.get("enabled") is True else "fp16" if fp16.get("enabled") is True else None
    pure_bf16 = in_file == "bf16" and precision_flag == "auto" and precision == "no"
    if in_file and in_file != precision and not pure_bf16:
        raise UserError(
            f"DeepSpeed file: {in_file}.enabled contradicts --mixed_precision, which came to {precision}; "
            f'write "auto" there, or --mixed_precision {in_file}'
        )
    if in_file == "bf16":
        # Pure bf16 weights, asked for by name. By default a NaN would go unnoticed there.
        filled["bf16"] = {**bf16, "check_grad_overflow": True}
    elif precision == "bf16":
        # Autocast over fp32 weights, so that ZeRO gives DDP's numbers.
        filled["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    elif precision == "fp16":
        filled["fp16"] = {"loss_scale_window": 2000, **fp16, "enabled": True}
    # With an offloaded optimizer Accelerate would put DeepSpeed's CPU Adam in place of whatever was asked for, and compile
    # it; torch's own fused CPU forms do the same work.
    filled["zero_force_ds_cpu_optimizer"] = False
    filled.setdefault("steps_per_print", 2**31 - 1)
    return filled
