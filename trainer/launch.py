"""The Accelerator under any launcher, and the control group: a CPU process group for counts, votes, errors and barriers."""

from __future__ import annotations

import json
import multiprocessing.util
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from trainer.errors import FINISHED, Refusal
from trainer.hardware import cores
from trainer.hosts import choose_interface
from trainer.sections import Optimisation
from trainer.signals import launched

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")


class Sum:
    """A sum over all processes that is on its way."""

    def __init__(self, values: Sequence[float], group: Any) -> None:
        self._tensor = torch.tensor(values, dtype=torch.float64)
        self._work = None if group is None else dist.all_reduce(self._tensor, group=group, async_op=True)

    def wait(self) -> list[float]:
        """The sums, in float64; the same on every process."""
        if self._work is not None:
            self._work.wait()
        return self._tensor.tolist()


class Control:
    """What the processes say to each other beside gradients: over gloo, so that no GPU and no NCCL watchdog is involved.

    With one process every call returns at once. All calls are collective.
    """

    def __init__(self, rank: int, processes: int, timeout: timedelta) -> None:
        self.rank, self.processes, self._timeout = rank, processes, timeout
        self._group = dist.new_group(backend="gloo", timeout=timeout) if processes > 1 else None

    def sum(self, values: Sequence[float]) -> Sum:
        """Start adding `values` up over all processes; `.wait()` gives the sums."""
        return Sum(values, self._group)

    def barrier(self) -> None:
        """Wait for every process; a missing one is named when the time-out passes."""
        if self._group is not None:
            dist.monitored_barrier(self._group, timeout=self._timeout, wait_all_ranks=True)

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """The JSON value that process `source` holds."""
        if self._group is None:
            return value
        data = json.dumps(value).encode() if self.rank == source else b""
        size = torch.tensor([len(data)])
        dist.broadcast(size, source, group=self._group)
        buffer = torch.zeros(int(size), dtype=torch.uint8)
        if self.rank == source:
            buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        dist.broadcast(buffer, source, group=self._group)
        return json.loads(bytes(buffer.tolist()))

    def gather(self, value: Any) -> list[Any]:
        """The JSON value of every process, by rank, on rank 0; an empty list elsewhere."""
        if self._group is None:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = self.sum([len(data) * (rank == self.rank) for rank in range(self.processes)]).wait()
        padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
        padded[: len(data)] = data
        parts = [torch.empty_like(padded) for _ in sizes] if self.rank == 0 else None
        dist.gather(padded, parts, dst=0, group=self._group)
        if parts is None:
            return []
        return [json.loads(bytes(part[: int(size)].tolist())) for part, size in zip(parts, sizes, strict=True)]

    def agree(self, error: Refusal | None) -> None:
        """Raise, on every process, the refusal of the lowest process that has one."""
        failed = self.sum([float(error is not None and r == self.rank) for r in range(self.processes)]).wait()
        if any(failed):
            source = next(r for r, flag in enumerate(failed) if flag)
            message, code = self.broadcast([str(error), error.exit_code] if error else None, source)
            raise Refusal(message, code, known_to_all=True)

    def on_main(self, action: Callable[[], T]) -> T:
        """Do `action` on rank 0 only; every process gets its (JSON) result, or raises its refusal."""
        result, error = None, None
        if self.rank == 0:
            try:
                result = action()
            except Refusal as refusal:
                error = refusal
        self.agree(error)
        return self.broadcast(result)


@dataclass(frozen=True)
class Launch:
    """Who and where this process is."""

    rank: int
    processes: int
    local_rank: int
    device: torch.device
    deepspeed: bool
    control: Control

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and speaks."""
        return self.rank == 0


def connect(device: str, timeout_minutes: float) -> Launch:
    """Join the other processes of this launch, on GPUs if there are some and `device` allows; else on CPUs with gloo.

    Raises Refusal where the launcher started several processes that do not know of each other.
    """
    from accelerate import PartialState

    if device == "cuda" and not torch.cuda.is_available():
        raise Refusal("device cuda: torch sees no GPU here; use --device cpu")
    told_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes")
    on_cpu = device == "cpu" or (device == "auto" and told_cpu) or not torch.cuda.is_available()
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1")
    timeout = timedelta(minutes=timeout_minutes)
    # torch 2.13 has renamed it; Accelerate's keyword is the one that torch 2.11 knows too.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*broadcast_buffers.*")
    if deepspeed:
        # DeepSpeed still calls names that torch 2.13 has deprecated, at every step of every process.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if deepspeed and on_cpu:
        # ACCELERATE_USE_CPU would silently switch DeepSpeed off: PartialState(cpu=True) is what selects gloo.
        os.environ.pop("ACCELERATE_USE_CPU", None)
        _do_without_shared_memory_op()
    choose_interface(os.environ)
    state = PartialState(cpu=True, timeout=timeout) if on_cpu else PartialState(timeout=timeout)
    _check_world(os.environ, state.process_index, state.num_processes, on_cpu)
    if on_cpu:
        _use_all_cores(state.num_processes)
    control = Control(state.process_index, state.num_processes, timeout)
    return Launch(state.process_index, state.num_processes, state.local_process_index, state.device, deepspeed, control)


def _check_world(environ: Mapping[str, str], rank: int, processes: int, on_cpu: bool) -> None:
    """Refuse N copies that each think they are alone, and a group on another backend than the one asked for."""
    for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        told = int(environ.get(name) or 0)
        if name == "SLURM_STEP_NUM_TASKS" and "WORLD_SIZE" in environ:
            continue  # one task a node, each starting the launcher
        if told > 1 and told != processes:
            raise Refusal(
                f"{name}={told} but this process is rank {rank} of {processes}: {told} copies would train side by side and "
                "write the same files; start with `accelerate launch --config_file accelerate_configs/ddp.yaml`"
            )
    if int(environ.get("RANK") or rank) != rank and processes > 1:
        raise Refusal(
            f"RANK={environ['RANK']} but the process group says rank {rank}; start with accelerate launch or torchrun"
        )
    if processes > 1 and on_cpu and dist.get_backend() != "gloo":
        raise Refusal(f"{processes} CPU processes came up with backend {dist.get_backend()}; --device cpu needs gloo")


def _do_without_shared_memory_op() -> None:
    """Keep DeepSpeed from compiling its shared-memory all-reduce (40 s, a build lock, and it dies without g++); gloo serves."""
    try:
        import deepspeed.ops
    except ImportError:
        raise Refusal("this launch wants DeepSpeed, which is not installed; pip install 'deepspeed>=0.19.8'") from None
    known = getattr(deepspeed.ops, "__compatible_ops__", None)  # private; without it only the compilation comes back
    if isinstance(known, dict):
        known["deepspeed_shm_comm"] = False


def _use_all_cores(processes: int) -> None:
    """Launchers set OMP_NUM_THREADS=1 where the user set nothing; share the cores between the processes of this host."""
    if launched(os.environ) and os.environ.get("OMP_NUM_THREADS") == "1":
        local = int(os.environ.get("LOCAL_WORLD_SIZE") or processes)
        torch.set_num_threads(max(1, cores() // local))


def precision(asked: str, launch: Launch) -> str:
    """no, bf16 or fp16: what was asked for, else what the launcher set, else the best this device has."""
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if asked == "auto" and told not in ("no", "bf16", "fp16"):
        raise Refusal(f"the launcher asks for mixed_precision {told}; use no, bf16 or fp16")
    if asked == "auto" and told in ("bf16", "fp16"):
        asked = told
    elif asked == "auto":
        on_gpu = launch.device.type == "cuda"
        asked = "no" if not on_gpu else "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if asked == "fp16" and launch.device.type == "cpu":
        raise Refusal("mixed_precision fp16 needs a GPU (on a CPU it would silently train in fp32); use bf16 or no")
    return asked


def accelerator(launch: Launch, mixed_precision: str, settings: Optimisation, asked: str) -> Accelerator:
    """An Accelerator for this launch; under DeepSpeed with its `auto` values filled in from our own flags."""
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # a process may train several times; the process group stays
    if not launch.deepspeed:
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        return Accelerator(cpu=launch.device.type == "cpu", mixed_precision=mixed_precision, kwargs_handlers=[ddp])
    # bf16 under ZeRO is torch_autocast over fp32 weights, so that it gives DDP's numbers; Accelerate's own is off then.
    made = Accelerator(mixed_precision="fp16" if mixed_precision == "fp16" else "no")
    plugin = made.state.deepspeed_plugin
    if plugin is None:
        raise Refusal("the launcher asked for DeepSpeed and Accelerate did not enable it; check the --config_file")
    filled = fill_deepspeed_config(plugin.deepspeed_config, mixed_precision, settings, launch.processes, asked)
    plugin.deepspeed_config.clear()
    plugin.deepspeed_config.update(filled)
    return made


def fill_deepspeed_config(
    config: Mapping[str, Any], mixed_precision: str, settings: Optimisation, processes: int, asked: str = "auto"
) -> dict[str, Any]:
    """A DeepSpeed configuration with batch, accumulation, clipping and precision from our flags.

    Refusal where a number in the file contradicts a flag, naming both. Values Accelerate puts in for a launch without a
    file are not the user's, and give way.
    """
    filled = dict(config)
    stage = int((filled.get("zero_optimization") or {}).get("stage", 0))
    if stage not in (1, 2, 3):
        raise Refusal(f"DeepSpeed zero_optimization.stage {stage} brings nothing over DDP; use accelerate_configs/ddp.yaml")
    if settings.optimizer == "muon":
        raise Refusal("optimizer muon needs whole matrices, and ZeRO flattens them; use adamw, or accelerate_configs/ddp.yaml")
    from_file = bool(os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"))
    wanted = {
        "train_micro_batch_size_per_gpu": (settings.batch_size // processes, "--batch_size over the processes"),
        "gradient_accumulation_steps": (settings.gradient_accumulation_steps, "--gradient_accumulation_steps"),
        "gradient_clipping": (settings.grad_clip, "--grad_clip"),
        "train_batch_size": (settings.effective_batch_size, "--batch_size x --gradient_accumulation_steps"),
    }
    for key, (value, flag) in wanted.items():
        given = filled.get(key, "auto")
        if from_file and given != "auto" and float(given) != value:
            raise Refusal(f'DeepSpeed file: {key} {given} contradicts {flag} = {value:g}; write "auto" there')
        filled[key] = value
    for key in ("optimizer", "scheduler"):
        if key in filled:
            raise Refusal(f"DeepSpeed file: remove its {key!r} section; samecurve sets it from its own flags")
    bf16, fp16 = (dict(filled.pop(key, None) or {}) for key in ("bf16", "fp16"))
    told = "bf16" if bf16.get("enabled") is True else "fp16" if fp16.get("enabled") is True else None
    if told and told != mixed_precision and not (told == "bf16" and asked == "auto" and mixed_precision == "no"):
        raise Refusal(
            f"DeepSpeed file: {told}.enabled contradicts --mixed_precision, which came to {mixed_precision}; "
            f'write "auto" there, or --mixed_precision {told}'
        )
    if told == "bf16":
        # Pure bf16 weights, asked for by name. By default a NaN would go unnoticed there.
        filled["bf16"] = {**bf16, "check_grad_overflow": True}
    elif mixed_precision == "bf16":
        filled["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    elif mixed_precision == "fp16":
        filled["fp16"] = {"loss_scale_window": 2000, **fp16, "enabled": True}
    # With an offloaded optimizer Accelerate would put DeepSpeed's CPU Adam in place of whatever was asked for, and compile
    # it; torch's own fused CPU forms do the same work.
    filled["zero_force_ds_cpu_optimizer"] = False
    filled.setdefault("steps_per_print", 2**31 - 1)
    return filled


def shut_down(launch: Launch | None, code: int) -> None:
    """Leave the process with `code`. Gloo's threads abort the interpreter's own exit now and then, so it is skipped."""
    if launch is not None and dist.is_initialized():
        if code == FINISHED:
            try:
                launch.control.barrier()
            except RuntimeError as error:  # another process has died meanwhile, and says why itself
                print(f"error: rank {launch.rank} lost the other processes at the end: {error}", file=sys.stderr)
                code = 1
        # What the interpreter's exit would have done for the semaphores of data workers (those of priority 0 wait for nothing).
        multiprocessing.util._run_finalizers(0)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
