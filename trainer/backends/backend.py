"""The contract of a backend: everything that differs between one process, DDP and a sharded model.

The loop and the checkpoints know only this class. The objective of a step is a sum over all of its samples, divided by global
counts; so where a backend averages gradients by itself (over ranks, over micro-batches) the loop undoes it: `gradient_divisor`.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from trainer.backends.tensors import StateLayout, TensorEntry, TensorSource
from trainer.command_line.sections import Optimisation
from trainer.distributed.launch import Launch
from trainer.errors import UserError
from trainer.initial_weights import Weights, fill

Layers = Mapping[str, Sequence[nn.Parameter]]


class StepResult(NamedTuple):
    """The outcome of an optimizer step, as scalar tensors on the device: reading one on the host waits for the device."""

    grad_norm: Tensor
    """global gradient norm before clipping"""
    bad: Tensor | None
    """1.0 for a bad step: its norm was not finite, so it changed no weight, and fp16's loss scale cannot come down any further.
    None where the host knows already that the step was good"""


class Backend(ABC):
    """A model and its optimizer over the processes of a launch. All methods are called on every process."""

    supports_layer_norms: ClassVar[bool] = False
    survives_out_of_memory: ClassVar[bool] = False
    """whether it can go on where memory ran out in the middle of a forward or backward pass"""
    averages_are_used = False
    """whether `model` computes with the averages of --ema now"""

    # Set by `prepare`.
    network: nn.Module
    """the bare network, whose names checkpoints use"""
    model: Any
    """the prepared objective, to be called"""
    optimizer: Optimizer
    """has the parameter groups"""
    state_layout: StateLayout
    """what the optimizer keeps of each parameter"""

    def __init__(self, launch: Launch, precision: str, precision_flag: str, settings: Optimisation) -> None:
        """`precision`: no, bf16 or fp16. `precision_flag`: the value of `--mixed_precision` that led to it."""
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state()  # a process may train several times; the process group stays
        self.launch, self.precision, self.settings = launch, precision, settings

    @staticmethod
    @abstractmethod
    def requested(environ: Mapping[str, str]) -> bool:
        """Whether the launcher asked for this backend."""

    @staticmethod
    def before_connect(on_cpu: bool) -> None:
        """Called before the process group is made. Default: nothing."""
        return

    @staticmethod
    def fill_for_evaluation(objective: nn.Module, weights: Weights, launch: Launch) -> None:
        """Fill the network of an objective, which is on the meta device, for evaluation: the objective is then called equally
        often on every process. Default: the whole network on each."""
        fill(objective.network, weights, launch.device)  # type: ignore[arg-type]

    @property
    @abstractmethod
    def name(self) -> str:
        """As it is printed at start."""

    @abstractmethod
    def prepare(
        self,
        objective: nn.Module,
        network: nn.Module,
        make_optimizer: Callable[[], Optimizer],
        weights: Weights | None = None,
    ) -> None:
        """Spread the model and its optimizer over the processes. `network` is the part of `objective` that is saved.

        With `weights` the network is on the meta device, and each process reads of them what it will hold; without, it has its
        values already.
        """

    gains_by_compiling = True
    """whether `--compile auto` compiles on a GPU"""

    def compile(self, objective: nn.Module, mode: str) -> None:
        """`torch.compile` network and loss as one graph: in place and before `prepare`, so that parameter names stay the same.

        Under DDP torch splits the graph at the gradient buckets, so that they are reduced during the backward pass.
        """
        objective.compile(mode=mode)

    def notes(self) -> list[str]:
        """Lines for the user about the prepared model, printed at start."""
        return []

    @abstractmethod
    def held_tensors(self) -> list[Tensor]:
        """The tensors that hold this process's part of weights and moments."""

    @torch.no_grad()
    def release(self) -> None:
        """Free weights and moments at the end of a run. The model cannot be used afterwards."""
        for tensor in self.held_tensors():
            tensor.untyped_storage().resize_(0)  # dropping the reference is not enough: FSDP holds views of its shards

    # ---- a step: micro_step around each forward and backward, then step

    @property
    def gradient_divisor(self) -> int:
        """What the backend divides gradients by before the update; the loop multiplies the loss weights by it to undo that."""
        return self.launch.processes

    @abstractmethod
    def micro_step(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Context of a micro-batch's forward and backward. `last`: it is the step's last one, so gradients are reduced."""

    @abstractmethod
    def backward(self, loss_sums: Tensor, weights: Tensor) -> None:
        """Add this process's gradient of the objective, the sum over terms of `loss_sums` [terms] x `weights` [terms]."""

    def layer_norms(self, layers: Layers) -> dict[str, Tensor]:
        """{layer: its gradient norm before clipping}. Call it between the last backward and `step`."""
        raise TypeError(f"{self.name} has no gradient norms of layers")

    @abstractmethod
    def step(self, learning_rate: float) -> StepResult:
        """Clip gradients, update the weights, clear gradients. A non-finite gradient norm changes no weight and no moment."""

    # ---- averages of the weights

    def use_averages(self, use: bool) -> None:
        """Compute with the averages of `--ema`, if the run keeps them, or (False) with the weights again, bit for bit."""
        if self.settings.ema and use != self.averages_are_used:
            self.averages_are_used = use
            self.swap_averages()

    @abstractmethod
    def swap_averages(self) -> None:
        """Exchange the weights of `model` with their averages, `averages.AVERAGE` in the optimizer's state."""

    # ---- a checkpoint: named tensors out and in

    # Called anew for every checkpoint. Entries are read after the optimizer step, on every process in the same order.

    @abstractmethod
    def model_tensors(self) -> list[TensorEntry]:
        """Parameters (as fp32; tied ones once) and buffers, under the names of the bare network."""

    @abstractmethod
    def optimizer_tensors(self) -> list[TensorEntry]:
        """All optimizer state: `{key}.{parameter}` for a tensor of a parameter, `{key}` for a count of steps."""

    @abstractmethod
    def restore(self, saved: TensorSource, with_optimizer: bool) -> None:
        """Take the optimizer state of a checkpoint whose weights `prepare` was given.

        `with_optimizer` False: it does not fit `state_layout`, and the optimizer starts afresh.
        """

    def loss_scale_state(self) -> dict[str, Any]:
        """fp16's loss scale and growth count, which any backend's `restore_loss_scale` takes; empty for other precisions."""
        return {}

    def restore_loss_scale(self, state: Mapping[str, Any]) -> None:
        """Take a saved loss scale, if the checkpoint has one and this run uses one."""
        return


def without_gradient(names: Sequence[str], why: str) -> UserError:
    """The error for parameters that the loss does not depend on."""
    named = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
    return UserError(
        f"the loss of the last micro-batch does not depend on {named or 'some parameters'}, and {why}: leave them out of the "
        "network, or set their requires_grad to False in build_model"
    )


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    """Set the rate of every group; `lr_scale` of a group, where it has one, multiplies it."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)


def layers(network: nn.Module) -> dict[str, list[nn.Parameter]]:
    """{layer: its trained parameters}. A layer's name is that of a parameter up to its first number (`blocks.0` of
    `blocks.0.mlp.weight`), or without its last part."""
    grouped: dict[str, list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        parts = name.split(".")
        end = next((i + 1 for i, part in enumerate(parts) if part.isdigit()), max(1, len(parts) - 1))
        if parameter.requires_grad:
            grouped.setdefault(".".join(parts[:end]), []).append(parameter)
    return grouped
