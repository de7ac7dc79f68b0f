"""Joins the processes of a launch, whatever started them, and settles device and precision."""

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
    """This process in its launch: rank, device, and the ways to reach the other processes."""

    rank: int
    processes: int
    local_rank: int
    device: torch.device
    control: Control
    store: Any = None
    """the key-value store of the launch; None for a single process"""
    restarted: bool = False
    """whether a launcher or scheduler, not a person, has started this command again; reliable on rank 0 only"""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0


def alone() -> Launch:
    """A launch of one process, on the CPU, even if this process belongs to a larger one."""
    return Launch(0, 1, 0, torch.device("cpu"), Control(0, 1, timedelta()))


def connect(device: str, timeout_minutes: float, before_connect: Callable[[bool], None] = lambda on_cpu: None) -> Launch:
    """Join the other processes of this launch: on GPUs if there are any and `device` allows it, else on CPUs with gloo.

    `before_connect(on_cpu)` is the backend's; it is called before the process group is made. Raises UserError if `device` is
    not there, if a process has not started within `timeout_minutes`, or if processes that the launcher started together do not
    form one group.
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
    """Choose the device and make the process group, over the store of `meeting` (None: a single process)."""
    from accelerate import PartialState

    on_cpu = _uses_cpu(device, one_process=meeting is None)
    # torch 2.13 has renamed this argument of DDP; Accelerate passes the old name, the only one that torch 2.11 knows.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*broadcast_buffers.*")
    # `srun` and `mpirun` do not set these variables; the number of threads is printed with the launch.
    warnings.filterwarnings("ignore", category=UserWarning, message="OMP_NUM_THREADS/MKL_NUM_THREADS unset")
    if not on_cpu and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # batches of varying size would fragment the memory
    before_connect(on_cpu)
    choose_interface(os.environ)
    if meeting is not None:
        offloads = switched_on(os.environ, "FSDP_OFFLOAD_PARAMS")
        backend = "gloo" if on_cpu else "cuda:nccl,cpu:gloo" if offloads else "nccl"
        own = dist.PrefixStore("default", meeting.store)
        dist.init_process_group(backend, store=own, rank=meeting.rank, world_size=meeting.processes, timeout=timeout)
    state = PartialState(cpu=True, timeout=timeout) if on_cpu else PartialState(timeout=timeout)
    rank, processes = state.process_index, state.num_processes
    _check_world(os.environ, rank, processes, on_cpu)
    if on_cpu:
        _use_all_cores(processes)
    # torchrun counts restarts per host, so that rank 0 may not see another host's: the store shows them all.
    counts = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
    restarted = any(int(os.environ.get(name) or 0) > 0 for name in counts) or (meeting is not None and meeting.restarted)
    store = meeting.store if meeting is not None else None
    control = Control(rank, processes, timeout)
    return Launch(rank, processes, state.local_process_index, state.device, control, store, restarted)


def _uses_cpu(device: str, one_process: bool) -> bool:
    """Whether `--device` means the CPU here. UserError for a GPU that is not there, or not for several processes."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: torch sees no GPU here; use --device cpu")
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError("device mps: torch sees no Apple GPU here; use --device cpu")
    if device == "mps" and not one_process:
        raise UserError("device mps is for one process that python starts: Apple's GPUs have no collectives; use --device cpu")
    if device == "auto":
        has_gpu = torch.cuda.is_available() or (one_process and torch.backends.mps.is_available())
        return switched_on(os.environ, "ACCELERATE_USE_CPU") or not has_gpu
    return device == "cpu"


def switched_on(environ: Mapping[str, str], name: str) -> bool:
    """Whether a variable of the environment is set to true, 1 or yes."""
    return environ.get(name, "").lower() in ("true", "1", "yes")


def _check_world(environ: Mapping[str, str], rank: int, processes: int, on_cpu: bool) -> None:
    """UserError if the launcher's variables disagree with the process group (as where N processes each train alone), or if
    processes on CPUs do not use gloo."""
    for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        copies = int(environ.get(name) or 0)
        if name == "SLURM_STEP_NUM_TASKS" and "WORLD_SIZE" in environ:
            continue  # each task is a launcher, one per node, and not a rank
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
    """Share this host's cores between its processes, where OMP_NUM_THREADS=1 is the launcher's default and not the user's."""
    if launched(os.environ) and os.environ.get("OMP_NUM_THREADS") == "1" and not _had_threads_from_user(os.getppid()):
        local = int(os.environ.get("LOCAL_WORLD_SIZE") or processes)
        torch.set_num_threads(max(1, cores() // local))


def _had_threads_from_user(launcher: int) -> bool:
    """Whether the process `launcher` was started with OMP_NUM_THREADS set; False where /proc does not tell."""
    with contextlib.suppress(OSError):
        return b"\0OMP_NUM_THREADS=" in b"\0" + Path("/proc", str(launcher), "environ").read_bytes()
    return False


def requested_precision(flag: str) -> str:
    """The value of `--mixed_precision` (`flag`) or, if that is auto, the launcher's bf16 or fp16; auto if neither is set.

    UserError if the launcher asks for another precision, such as fp8.
    """
    from_launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if flag == "auto" and from_launcher not in ("no", "bf16", "fp16"):
        raise UserError(f"the launcher asks for mixed_precision {from_launcher}; use no, bf16 or fp16")
    return from_launcher if flag == "auto" and from_launcher != "no" else flag


def resolve_precision(flag: str, launch: Launch) -> str:
    """The precision to train in: no, bf16 or fp16. See `precision_on`."""
    on_gpu = launch.device.type == "cuda"
    has_bf16 = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    return precision_on(requested_precision(flag), on_gpu, has_bf16)


def precision_on(requested: str, on_gpu: bool, has_bf16: bool) -> str:
    """Resolve auto: bf16 on a CUDA GPU that has it, fp16 on others, no (fp32) elsewhere. UserError for fp16 without a GPU."""
    if requested == "fp16" and not on_gpu:
        raise UserError("mixed_precision fp16 needs a CUDA GPU (elsewhere it would silently train in fp32); use bf16 or no")
    if requested == "auto":
        return "no" if not on_gpu else "bf16" if has_bf16 else "fp16"
    return requested
