"""DeepSpeed ZeRO 1, 2 and 3: moments, gradients and weights flattened and partitioned over the processes.

The engine is called directly rather than through Accelerate, which would step it inside `backward`: the learning rate is set
between the last backward and the step.
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer

from trainer.backends import tensors
from trainer.backends.backend import Backend, StepResult, set_learning_rate, without_gradient
from trainer.backends.blocks import check_dimensions
from trainer.backends.deepspeed_config import check_deepspeed_file, check_filled, fill_deepspeed_config, precision_notes
from trainer.backends.fsdp import shard_for_evaluation
from trainer.backends.tensors import TensorEntry, TensorSource
from trainer.backends.zero_parts import Fragments, Shares
from trainer.command_line.sections import Optimisation
from trainer.distributed.launch import DDP, Launch, switched_on
from trainer.errors import UserError, one_line, path_of
from trainer.initial_weights import ALL_ROWS, Weights, replace_tensors, rows_of
from trainer.optimisation import averages


class ZeroBackend(Backend):
    """DeepSpeed's engine, made by Accelerate."""

    gains_by_compiling = False  # the graph breaks wherever ZeRO-3 gathers a layer

    def __init__(self, launch: Launch, precision: str, precision_flag: str, settings: Optimisation) -> None:
        from accelerate import Accelerator

        super().__init__(launch, precision, precision_flag, settings)
        check_deepspeed_file(os.environ)
        # For bf16 Accelerate's autocast stays off: DeepSpeed's torch_autocast does it, see `fill_deepspeed_config`.
        self.accelerator = Accelerator(mixed_precision="fp16" if precision == "fp16" else "no")
        plugin = self.accelerator.state.deepspeed_plugin
        if plugin is None:
            raise UserError("the launcher asked for DeepSpeed and Accelerate did not enable it; check the --config_file")
        filled = fill_deepspeed_config(plugin.deepspeed_config, precision, settings, launch.processes, precision_flag)
        check_filled(filled)
        self.precision_notes = precision_notes(filled)
        self.config = plugin.deepspeed_config
        self.config.clear()
        self.config.update(filled)

    @staticmethod
    def requested(environ: Mapping[str, str]) -> bool:
        """By the variable that Accelerate's launcher sets."""
        return switched_on(environ, "ACCELERATE_USE_DEEPSPEED")

    @staticmethod
    def before_connect(on_cpu: bool) -> None:
        """Make DeepSpeed run on CPUs, without a compiler; quieten its deprecation warnings."""
        # DeepSpeed still calls names that torch 2.13 has deprecated, at every step of every process.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        if not on_cpu:
            return
        # ACCELERATE_USE_CPU would silently switch DeepSpeed off: PartialState(cpu=True) is what selects gloo.
        os.environ.pop("ACCELERATE_USE_CPU", None)
        try:
            import deepspeed.ops
        except ImportError:
            raise UserError("this launch wants DeepSpeed, which is not installed; pip install 'deepspeed>=0.19.8'") from None
        # Keep it from compiling its shared-memory all-reduce (40 s, a build lock, and it dies without g++); gloo serves.
        operators = getattr(deepspeed.ops, "__compatible_ops__", None)  # private; without it only the compilation comes back
        if isinstance(operators, dict):
            operators["deepspeed_shm_comm"] = False

    @staticmethod
    def fill_for_evaluation(objective: nn.Module, weights: Weights, launch: Launch) -> None:
        """Sharded by FSDP2, because DeepSpeed's engine needs an optimizer."""
        shard_for_evaluation(objective, weights, init_device_mesh(launch.device.type, (launch.processes,)))

    @property
    def name(self) -> str:
        """As it is printed at start."""
        return "DeepSpeed ZeRO"

    def prepare(
        self,
        objective: nn.Module,
        network: nn.Module,
        make_optimizer: Callable[[], Optimizer],
        weights: Weights | None = None,
    ) -> None:
        """Allocate the network, start DeepSpeed's engine, give each partition its optimizer state, then fill in the weights."""
        check_dimensions(network)
        self.network = network
        if weights is not None:
            replace_tensors(network, self._allocated)
        self.optimizer = make_optimizer()
        if getattr(self.optimizer, "needs_whole_matrices", False):
            raise UserError(
                f"optimizer {type(self.optimizer).__name__} needs whole matrices, and ZeRO flattens them; use adamw, or "
                f"{path_of(DDP)}"
            )
        self.state_layout = tensors.state_layout(self.optimizer, network)
        initial = tensors.elementwise_initial_state(self.optimizer, self.optimizer.param_groups[0]["params"][0])
        self.optimizer.state.clear()  # ZeRO keeps its own, for its flat partitions
        self._start_engine(objective, partition_first=weights is not None)
        self._initialise_state(initial)
        if weights is not None:
            self._fill(weights)
        self.awaited: dict[Tensor, str] = {}
        self.trained: dict[Tensor, str] = {p: name for name, p in network.named_parameters() if p.requires_grad}
        for p in self.trained:
            p.register_post_accumulate_grad_hook(self._gradient_came)

    def _start_engine(self, objective: nn.Module, partition_first: bool) -> None:
        """Accelerate's `prepare` of model and optimizer together. `partition_first`: under ZeRO-3 cut the parameters before."""
        import deepspeed

        try:
            if partition_first and self.config["zero_optimization"]["stage"] == 3:
                # One parameter at a time: the engine would move all of them to the device first, and broadcast them.
                deepspeed.init_distributed(dist.get_backend())
                deepspeed.zero.Init(module=self.network, config_dict_or_path=self.config)
            self.model, wrapped = self.accelerator.prepare(objective, self.optimizer)
        except ValueError as error:
            if "`auto`" not in str(error):  # a bucket size that Accelerate would derive from `model.config.hidden_size`
                raise
            raise UserError(
                f"DeepSpeed file: {one_line(error, 300)}; write numbers there, as in {path_of('ds_configs')}"
            ) from error
        self.engine = self.model
        if self._dynamic_scaler() is not None:
            self._dynamic_scaler().raise_error_at_min_scale = False  # the loop counts bad steps, and ends with a message
        # Accelerate's wrapper holds DeepSpeed's ZeRO optimizer, which holds ours: its groups are the flat partitions now.
        self.zero = zero = wrapped.optimizer
        self.base = zero
        while hasattr(self.base, "optimizer"):
            self.base = self.base.optimizer
        self.stage3 = hasattr(zero, "fp32_partitioned_groups_flat")
        self.parts = Shares(self.launch) if self.stage3 else Fragments()
        self.partitions = zero.fp32_partitioned_groups_flat if self.stage3 else zero.single_partition_of_fp32_groups

    def _initialise_state(self, initial: dict[str, Any]) -> None:
        """Give every partition the `initial` state of an optimizer: moments of zeros, and counts.

        ZeRO-1 and 2 link moments to parameters after the *first group's* step, and never if the first step is skipped; so the
        state is there before DeepSpeed links it. The training curve stays the same.
        """
        self.moments = sorted(key for key, value in initial.items() if isinstance(value, Tensor) and value.ndim)
        for flat in self.partitions:
            moments = {key: torch.zeros_like(flat.data) for key in self.moments}
            counts = {key: _copy_to(flat.device, value) for key, value in initial.items() if key not in moments}
            self.base.state[flat] = counts | moments
        if not self.stage3 and self.moments:
            self.zero._lazy_init_hp_params_optimizer_state()

    def _gradient_came(self, p: Tensor) -> None:
        self.awaited.pop(p, None)

    def _allocated(self, name: str, tensor: Tensor) -> Tensor:
        """An uninitialised tensor in the place of one on the meta device. On the host it takes no memory until it is filled."""
        if not isinstance(tensor, nn.Parameter):
            return torch.empty_like(tensor, device=self.launch.device)
        halves = {"fp16": torch.float16, "bf16": torch.bfloat16}  # sections of the file that keep weights in this type
        kind = next((kind for key, kind in halves.items() if self.config.get(key, {}).get("enabled")), tensor.dtype)
        return torch.empty_like(tensor, device="cpu", dtype=kind)

    @torch.no_grad()
    def _fill(self, weights: Weights) -> None:
        """Fill parameters and their fp32 master copies, of each this process's part, and buffers, one at a time."""
        for name, p in self.network.named_parameters():
            read = partial(weights, name) if self.stage3 else partial(rows_of, weights(name))
            own = self.parts.own(p, read)
            if self.stage3:
                p.ds_tensor.zero_()[: len(own)].copy_(own)  # type: ignore[attr-defined]
            else:
                p.copy_(read(ALL_ROWS))
            if p.requires_grad:
                self.parts.put(p, None, own)
        for name, buffer in self.network.named_buffers():
            buffer.copy_(weights(name))

    def notes(self) -> list[str]:
        """Lines on the settings that make this run's numbers differ from DDP's."""
        return self.precision_notes

    @property
    def gradient_divisor(self) -> int:
        """The engine averages over micro-batches too."""
        return self.launch.processes * self.settings.gradient_accumulation_steps

    @contextlib.contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        """The engine counts micro-batches by calls of `step`, so there is one after each: all but the last update nothing."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.awaited = dict(self.trained)
        yield
        if not last:
            self.engine.step()

    def backward(self, loss_sums: Tensor, weights: Tensor) -> None:
        """The engine's: with the step's last micro-batch it also reduces the gradients."""
        self.engine.backward((loss_sums * weights).sum())

    def step(self, learning_rate: float) -> StepResult:
        """The engine clips, updates and clears; it skips a step that is not finite (it reads the device for that)."""
        if self.awaited:
            raise without_gradient([*self.awaited.values()], "ZeRO would take zeros for their gradients")
        set_learning_rate(self.engine.optimizer, learning_rate)
        scaler = self._dynamic_scaler()
        scale_before = scaler.cur_scale if scaler else 0.0
        self.engine.step()
        skipped = bool(self.engine.optimizer.overflow)
        norm = torch.as_tensor(math.inf if skipped else self.engine.get_global_grad_norm())
        return StepResult(norm, torch.ones(()) if skipped and scale_before <= 1.0 else None)

    @torch.no_grad()
    def swap_averages(self) -> None:
        """In the fp32 partitions; DeepSpeed's weights are then made from them, as after a step."""
        from deepspeed.utils import safe_get_local_fp32_param

        for flat in self.partitions:
            averages.swap(flat, self.base.state[flat])
        if not self.stage3:
            self.zero.update_lp_params()
            return
        self.engine.empty_partition_cache()  # parameters that are still gathered have the values of before
        for p in (p for p in self.network.parameters() if p.requires_grad):
            p.ds_tensor.copy_(safe_get_local_fp32_param(p))  # type: ignore[attr-defined]

    def model_tensors(self) -> list[TensorEntry]:
        """Parameters from the fp32 master weights, and buffers."""
        parameters = [self._entry(name, p, None) for name, p in self.network.named_parameters()]
        return parameters + tensors.buffer_entries(self.network)

    def optimizer_tensors(self) -> list[TensorEntry]:
        """Moments of each parameter, and the counts, which are the same in every partition."""
        trained = ((name, p) for name, p in self.network.named_parameters() if p.requires_grad)
        entries = [self._entry(f"{key}.{name}", p, key) for name, p in trained for key in self.moments]
        first = self.base.state[self.partitions[0]]
        return entries + tensors.count_entries([first], set(first) - set(self.moments))

    def _entry(self, name: str, p: Tensor, key: str | None) -> TensorEntry:
        return TensorEntry(name, tensors.whole_shape(p), torch.float32, partial(self.parts.gather, p, key))

    def restore(self, saved: TensorSource, with_optimizer: bool) -> None:
        """Fill the moments and counts of each partition: of every tensor this process reads the rows that its part lies in."""
        keys_of, counts = tensors.split_names(saved.names("optimizer") if with_optimizer else ())
        for name, p in self.network.named_parameters():
            for key in keys_of.get(name, ()):
                read = partial(_rows, saved, f"{key}.{name}")
                self.parts.put(p, key, self.parts.own(p, read))
        for flat in self.partitions:
            state = self.base.state[flat]
            for key in counts:
                state[key] = tensors.restored_count(saved.tensor("optimizer", key).clone(), flat.device)

    def held_tensors(self) -> list[Tensor]:
        """Parameters (under ZeRO-3 this process's parts of them), their master copies, and moments."""
        weights = [p.ds_tensor if self.stage3 else p for p in self.network.parameters()]  # type: ignore[attr-defined]
        moments = [self.base.state[flat][key] for flat in self.partitions for key in self.moments]
        return [*weights, *self.partitions, *moments]

    def loss_scale_state(self) -> dict[str, Any]:
        """Scale, growth count and hysteresis of fp16."""
        scaler = self._dynamic_scaler()
        if scaler is None:
            return {}
        # DeepSpeed counts steps since the last overflow and doubles at each full window; checkpoints since the last doubling.
        clean = (scaler.cur_iter - scaler.last_overflow_iter - 1) % scaler.scale_window
        return {"scale": scaler.cur_scale, "growth": clean, "hysteresis": scaler.cur_hysteresis}

    def restore_loss_scale(self, state: Mapping[str, Any]) -> None:
        """From any backend's."""
        if (scaler := self._dynamic_scaler()) is not None and state:
            scaler.cur_scale = state["scale"]
            scaler.cur_iter, scaler.last_overflow_iter = int(state["growth"]), -1
            scaler.cur_hysteresis = state.get("hysteresis", scaler.delayed_shift)

    def _dynamic_scaler(self) -> Any:
        scaler = getattr(self.engine.optimizer, "loss_scaler", None)
        return scaler if getattr(scaler, "dynamic", False) else None


def _rows(saved: TensorSource, name: str, rows: slice) -> Tensor:
    return saved.tensor("optimizer", name, rows=rows)


def _copy_to(device: torch.device, value: Any) -> Any:
    """A copy of an initial count, so that partitions do not share it."""
    return value.to(device, copy=True) if isinstance(value, Tensor) else value
