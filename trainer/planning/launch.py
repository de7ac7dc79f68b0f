"""The launch to plan: its configuration, hardware and strategy, read and checked as the run would."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trainer.backends import backend_of
from trainer.backends.deepspeed_config import check_deepspeed_file, check_filled, fill_deepspeed_config
from trainer.backends.fsdp import FsdpBackend, check_environment, mesh_sizes
from trainer.backends.zero import ZeroBackend
from trainer.checkpoints.changes import merge
from trainer.checkpoints.init_from import with_settings
from trainer.checkpoints.resume import choose, default_directory, earlier_value
from trainer.command_line.config import Parsed
from trainer.command_line.locations import with_absolute_paths
from trainer.command_line.sections import Optimisation
from trainer.distributed.hardware import CARDS, Card, card_named
from trainer.distributed.launch import switched_on
from trainer.errors import UserError
from trainer.planning.memory import BUCKETS, Strategy
from trainer.recipe import Log, Recipe
from trainer.reporting.run_directory import RunDirectory


@dataclass(frozen=True)
class Place:
    """What each process runs on."""

    name: str
    card: Card | None
    """None: a CPU"""
    gigabytes: float
    """memory of each process"""


def config_of(recipe: Recipe, parsed: Parsed, argv: Sequence[str], log: Log) -> tuple[Any, bool]:
    """(the configuration of the run, whether it would resume a checkpoint). UserError where the run would raise it.

    Makes no folder, takes no lock and verifies no hash.
    """
    parsed = dataclasses.replace(parsed, config=with_absolute_paths(parsed.config))
    path = default_directory(recipe, parsed)
    checkpoint_dir = parsed.config.run.checkpoint_dir or earlier_value(path, "checkpoint_dir")
    directory = RunDirectory(path, Path(checkpoint_dir) if checkpoint_dir else None)
    saved, same_run = choose(recipe, parsed.config.run, directory, log, lambda _: None, restarted=False)
    if saved is None:
        return with_settings(recipe, parsed, argv).config, False
    log(f"Resumes {saved.path} at step {saved.train_state.step:,}, with its flags; what follows is of the whole run")
    return merge(recipe, parsed, argv, saved, same_run, log), True


def place_of(gpu: str | None, device: str, environ: Mapping[str, str], local_processes: int) -> Place:
    """The card of `--gpu`, by name or gigabytes. Without it this machine's GPU, or a process's part of its host memory if
    there is no GPU, or `device` or the launcher says CPU. UserError for an unknown card."""
    if gpu is not None and (name := card_named(gpu)):
        return Place(name, CARDS[name], CARDS[name].memory_gb)
    if gpu is not None:
        gigabytes = _number(gpu)
        if not 0 < gigabytes < math.inf:
            names = ", ".join(name.lower().removeprefix("rtx ").replace(" ", "-") for name in CARDS)
            raise UserError(f"gpu {gpu!r} is unknown; give its gigabytes, or one of {names}")
        return Place("GPU", Card(gigabytes, None), gigabytes)
    on_cpu = switched_on(environ, "ACCELERATE_USE_CPU") if device == "auto" else device == "cpu"
    if torch.cuda.is_available() and not on_cpu:
        properties = torch.cuda.get_device_properties(0)
        known = CARDS.get(card_named(properties.name) or "", Card(0, None))
        gigabytes = properties.total_memory / 1e9
        return Place(properties.name, known._replace(memory_gb=gigabytes), gigabytes)
    return Place("CPU", None, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9 / local_processes)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def strategy_of(
    environ: Mapping[str, str], settings: Optimisation, processes: int, precision: str, precision_flag: str
) -> Strategy:
    """The strategy of the launch that `environ` describes. UserError where its files contradict the flags.

    `precision`: that of the run (no, bf16, fp16), `precision_flag`: what `--mixed_precision` says.
    """
    kind = backend_of(environ)
    if kind is ZeroBackend:
        return _zero(environ, settings, processes, precision, precision_flag)
    if kind is FsdpBackend:
        check_environment(environ)
        if precision == "fp16":
            raise UserError("mixed_precision fp16 is not for FSDP: use bf16 or no")
        replicas, shards = mesh_sizes(environ, processes)
        offloads = switched_on(environ, "FSDP_OFFLOAD_PARAMS")
        name = (f"HSDP, {replicas} replicas" if replicas > 1 else "FSDP2") + (", offload" if offloads else "")
        stays_gathered = environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() in ("false", "0")
        offload = frozenset({"weights", "moments"} if offloads else ())
        return Strategy(name, "fsdp", processes, shards, offload=offload, stays_gathered=stays_gathered)
    return Strategy("DDP" if processes > 1 else "one process", "plain", processes, 1)


def _zero(environ: Mapping[str, str], settings: Optimisation, processes: int, precision: str, precision_flag: str) -> Strategy:
    """The strategy of the DeepSpeed file, as Accelerate reads it."""
    from accelerate.utils import DeepSpeedPlugin

    check_deepspeed_file(environ)
    config = DeepSpeedPlugin().deepspeed_config
    filled = fill_deepspeed_config(config, precision, settings, processes, precision_flag)
    check_filled(filled)
    zero: Mapping[str, Any] = filled["zero_optimization"]

    def offloads(part: str) -> bool:
        return (zero.get(f"offload_{part}") or {}).get("device", "none") != "none"

    offload = frozenset(what for what, part in (("weights", "param"), ("moments", "optimizer")) if offloads(part))
    return Strategy(
        f"ZeRO-{zero['stage']}" + (", offload" if offload else ""),
        "zero",
        processes,
        processes,
        stage=zero["stage"],
        offload=offload,
        half=any((filled.get(name) or {}).get("enabled") is True for name in ("bf16", "fp16")),
        buckets={name: int(zero[name]) if zero.get(name, "auto") != "auto" else size for name, size in BUCKETS.items()},
    )
