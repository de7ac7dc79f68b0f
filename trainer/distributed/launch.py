"""Joining the processes of a launch, under any launcher."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer.distributed.control import Control
from trainer.distributed.hardware import cores
from trainer.distributed.hosts import choose_interface
from trainer.distributed.peers import explained, wait_for_all
from trainer.distributed.rendezvous import Rendezvous, meet
from trainer.distributed.signals import launched
from trainer.errors import UserError, path_of

DDP = "accelerate_configs/ddp.yaml"


@dataclass(frozen=True)
class Launch:
    """Who and where this process is."""

    rank: int
    processes: int
    local_rank: int
    device: torch.device
    control: Control
    store: Any = None
    """what all processes of the launch can write to and read; None for a process alone"""
    restarted: bool = False
    """whether a launcher or scheduler, not a person, has started this command again; rank 0 knows"""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0


def alone() -> Launch:
    """A process by itself, on the CPU, whatever launch it is part of."""
    return Launch(0, 1, 0, torch.device("cpu"), Control(0, 1, timedelta()))


def connect(device: str, timeout_minutes: float, before_connect: Callable[[bool], None] = lambda on_cpu: None) -> Launch:
    """Join the other processes of this launch, on GPUs if there are some and `device` allows; else on CPUs with gloo.

    `before_connect(on_cpu)` is the backend's, called before the process group is made. Raises UserError where the launcher
    started several processes that do not know of each other, or one of them is not there within `timeout_minutes`.
    """
    timeout = timedelta(minutes=timeout_minutes)
    meeting = meet(os.environ, timeout)
    if meeting is None:
        return _join(device, timeout, before_connect, None)
    meeting = wait_for_all(meeting, timeout)
    with explained(meeting):
        launch = _join(device, timeout, before_connect, meeting)
    return launch


def _join(device: str, timeout: timedelta, before_connect: Callable[[bool], None], meeting: Rendezvous | None) -> Launch:
    """`connect`, once the store of the launch is open."""
    from accelerate import PartialState

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: torch sees no GPU here; use --device cpu")
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError("device mps: torch sees no Apple GPU here; use --device cpu")
    if device == "mps" and meeting is not None:
        raise UserError("device mps is for one process that python starts: Apple's GPUs have no collectives; use --device cpu")
    launcher_uses_cpu = switched_on(os.environ, "ACCELERATE_USE_CPU")
    has_gpu = torch.cuda.is_available() or (meeting is None and torch.backends.mps.is_available())
    on_cpu = device == "cpu" or (device == "auto" and launcher_uses_cpu) or not has_gpu
    # torch 2.13 has renamed it; Accelerate's keyword is the one that torch 2.11 knows too.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*broadcast_buffers.*")
    # Where `srun` or `mpirun` started us, which set no number; what it comes to is printed with the launch.
    warnings.filterwarnings("ignore", category=UserWarning, message="OMP_NUM_THREADS/MKL_NUM_THREADS unset")
    if not on_cpu and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # batches of other sizes leave no holes
    before_connect(on_cpu)
    choose_interface(os.environ)
    if meeting is not None:
        offloads = switched_on(os.environ, "FSDP_OFFLOAD_PARAMS")
        backend = "gloo" if on_cpu else "cuda:nccl,cpu:gloo" if offloads else "nccl"
        own = dist.PrefixStore("default", meeting.store)
        dist.init_process_group(backend, store=own, rank=meeting.rank, world_size=meeting.processes, timeout=timeout)
    state = PartialState(cpu=True, timeout=timeout) if on_cpu else PartialState(timeout=timeout)
    _check_world(os.environ, state.process_index, state.num_processes, on_cpu)
    if on_cpu:
        _use_all_cores(state.num_processes)
    control = Control(state.process_index, state.num_processes, timeout)
    # torchrun counts on each host for itself: of several processes only the store knows it all.
    counts = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
    restarted = any(int(os.environ.get(name) or 0) > 0 for name in counts) or (meeting is not None and meeting.restarted)
    store = meeting.store if meeting is not None else None
    place = (state.process_index, state.num_processes, state.local_process_index, state.device)
    return Launch(*place, control, store, restarted)


def switched_on(environ: Mapping[str, str], name: str) -> bool:
    """Whether a launcher, or a user, has set this variable to yes."""
    return environ.get(name, "").lower() in ("true", "1", "yes")


def _check_world(environ: Mapping[str, str], rank: int, processes: int, on_cpu: bool) -> None:
    """Refuse N copies that each think they are alone, and a group on another backend than the one asked for."""
    for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        copies = int(environ.get(name) or 0)
        if name == "SLURM_STEP_NUM_TASKS" and "WORLD_SIZE" in environ:
            continue  # one task a node, each starting the launcher
        if copies > 1 and copies != processes:
            raise UserError(
                f"{name}={copies} but this process is rank {rank} of {processes}: {copies} copies would train side by side "
                f"and write the same files; start with `accelerate launch --config_file {path_of(DDP)}`"
            )
    if int(environ.get("RANK") or rank) != rank and processes > 1:
        raise UserError(
            f"RANK={environ['RANK']} but the process group says rank {rank}; start with accelerate launch or torchrun"
        )
    if processes > 1 and on_cpu and dist.get_backend() != "gloo":
        raise UserError(f"{processes} CPU processes came up with backend {dist.get_backend()}; --device cpu needs gloo")


def _use_all_cores(processes: int) -> None:
    """Launchers set OMP_NUM_THREADS=1 where the user set nothing; share the cores between the processes of this host."""
    if launched(os.environ) and os.environ.get("OMP_NUM_THREADS") == "1" and not _had_threads_from_user(os.getppid()):
        local = int(os.environ.get("LOCAL_WORLD_SIZE") or processes)
        torch.set_num_threads(max(1, cores() // local))


def _had_threads_from_user(launcher: int) -> bool:
    """Whether a launcher was started with OMP_NUM_THREADS set, as far as the system tells."""
    with contextlib.suppress(OSError):
        return b"\0OMP_NUM_THREADS=" in b"\0" + Path("/proc", str(launcher), "environ").read_bytes()
    return False


def requested_precision(flag: str) -> str:
    """no, bf16 or fp16: the value of `--mixed_precision`, else what the launcher set; auto where neither says."""
    from_launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if flag == "auto" and from_launcher not in ("no", "bf16", "fp16"):
        raise UserError(f"the launcher asks for mixed_precision {from_launcher}; use no, bf16 or fp16")
    return from_launcher if flag == "auto" and from_launcher != "no" else flag


def resolve_precision(flag: str, launch: Launch) -> str:
    """no, bf16 or fp16: what was requested, else the best this device has; on Apple's fp32, as bf16 asks for macOS 14."""
    on_gpu = launch.device.type == "cuda"
    has_bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision_on(requested_precision(flag), on_gpu, has_bf16)


def precision_on(requested: str, on_gpu: bool, has_bf16: bool) -> str:
    """no, bf16 or fp16 on such a device. UserError for fp16 without a GPU."""
    if requested == "fp16" and not on_gpu:
        raise UserError("mixed_precision fp16 needs a CUDA GPU (elsewhere it would silently train in fp32); use bf16 or no")
    if requested == "auto":
        return "no" if not on_gpu else "bf16" if has_bf16 else "fp16"
    return requested
