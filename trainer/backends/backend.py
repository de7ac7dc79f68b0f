"""The contract of a backend: everything that differs between one process, DDP and sharding a model.

The loop and the checkpoints know this class alone. The gradient of the objective is a sum over all samples of a step, each
divided by a global count; so averages that a backend takes by itself (over ranks, over micro-batches) are multiplied back.
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
    """What became of a step. Scalars of the device: reading them waits for it."""

    grad_norm: Tensor
    """global gradient norm before clipping"""
    bad: Tensor | None
    """1.0 if the norm was not finite, so no weight was changed, and a loss scale on its way down does not explain it; None
    where the host knows that it was finite"""


class Backend(ABC):
    """A model over the processes of a launch. All methods are called on every process.

    After `prepare`: `network` is the bare module, whose names checkpoints use; `model` the prepared objective, to be called;
    `optimizer` has the parameter groups; `state_layout` tells what it keeps.
    """

    supports_layer_norms: ClassVar[bool] = False
    survives_out_of_memory: ClassVar[bool] = False
    """whether it can go on where memory ran out in the middle of a forward or backward pass"""
    network: nn.Module
    model: Any
    optimizer: Optimizer
    averages_are_used = False
    state_layout: StateLayout

    def __init__(self, launch: Launch, precision: str, precision_flag: str, settings: Optimisation) -> None:
        """`precision` is no, bf16 or fp16; `precision_flag` the value of `--mixed_precision` that it came from."""
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state()  # a process may train several times; the process group stays
        self.launch, self.precision, self.settings = launch, precision, settings

    @staticmethod
    @abstractmethod
    def requested(environ: Mapping[str, str]) -> bool:
        """Whether the launcher asked for this backend."""

    @staticmethod
    def before_connect(on_cpu: bool) -> None:
        """What has to happen before the process group is made; by default nothing."""
        return

    @staticmethod
    def fill_for_evaluation(objective: nn.Module, weights: Weights, launch: Launch) -> None:
        """Give the network of an objective, on the meta device, its values; the objective is then called on every process
        alike. By default whole on each."""
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

        It is on the meta device and gets `weights`, of which a process reads what it will hold; or, without, has its own.
        """

    gains_by_compiling = True
    """what `--compile auto` asks on a GPU"""

    def compile(self, objective: nn.Module, mode: str) -> None:
        """`torch.compile` network and loss as one graph: in place, before `prepare`, so that names stay bare.

        DDP cuts the graph at its buckets, when it is compiled in its forward, so that they are reduced during the backward.
        """
        objective.compile(mode=mode)

    def notes(self) -> list[str]:
        """What the user should know of the prepared model, a line each."""
        return []

    @abstractmethod
    def held_tensors(self) -> list[Tensor]:
        """This process's part of weights and moments."""

    @torch.no_grad()
    def release(self) -> None:
        """Let go of weights and moments at the end of a run. The model cannot be used afterwards."""
        for tensor in self.held_tensors():
            tensor.untyped_storage().resize_(0)  # which others may hold a view of, as FSDP does of its shards

    # ---- a step: micro_step around each forward and backward, then step

    @property
    def gradient_divisor(self) -> int:
        """What the backend divides gradients by before the update; the loop multiplies the loss weights by it to undo that."""
        return self.launch.processes

    @abstractmethod
    def micro_step(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch; `last`: of the step's, after which gradients are complete."""

    @abstractmethod
    def backward(self, loss_sums: Tensor, weights: Tensor) -> None:
        """Accumulate the gradient of this process's part of the objective, the sum of `loss_sums` x `weights` [terms]."""

    def layer_norms(self, layers: Layers) -> dict[str, Tensor]:
        """Gradient norms of some layers before clipping, between the last backward and `step`."""
        raise TypeError(f"{self.name} has no gradient norms of layers")

    @abstractmethod
    def step(self, learning_rate: float) -> StepResult:
        """Clip, update, clear. A step with a non-finite gradient norm changes no weight and no moment."""

    # ---- averages of the weights

    def use_averages(self, use: bool) -> None:
        """Have the averages of `--ema`, if there are any, in the place of the weights; or have these back, to the bit."""
        if self.settings.ema and use != self.averages_are_used:
            self.averages_are_used = use
            self.swap_averages()

    @abstractmethod
    def swap_averages(self) -> None:
        """Exchange what `model` computes with and what the optimizer keeps as `averages.AVERAGE`."""

    # ---- a checkpoint: named tensors out and in

    # Entries are taken anew for every checkpoint, and read after the optimizer step, on every process in the same order.

    @abstractmethod
    def model_tensors(self) -> list[TensorEntry]:
        """Parameters (fp32, tied ones once) and buffers, under the names of the bare network."""

    @abstractmethod
    def optimizer_tensors(self) -> list[TensorEntry]:
        """Everything the optimizer keeps: `{key}.{parameter}` for tensors of a parameter, `{key}` for a count."""

    @abstractmethod
    def restore(self, saved: TensorSource, with_optimizer: bool) -> None:
        """Continue from a checkpoint, whose weights `prepare` has been given.

        `with_optimizer`: with the state of its optimizer too, which fits `state_layout`; otherwise ours starts afresh.
        """

    def loss_scale_state(self) -> dict[str, Any]:
        """Scale and growth count of fp16, for `restore_loss_scale` of any backend; empty otherwise."""
        return {}

    def restore_loss_scale(self, state: Mapping[str, Any]) -> None:
        """Continue with a saved loss scale, if there is one and this run has one."""
        return


def without_gradient(names: Sequence[str], why: str) -> UserError:
    """What ends a run whose loss left these parameters out."""
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
    """{layer: its trained parameters}. A name is cut after its first number (`blocks.0`), else before its last part."""
    grouped: dict[str, list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        parts = name.split(".")
        end = next((i + 1 for i, part in enumerate(parts) if part.isdigit()), max(1, len(parts) - 1))
        if parameter.requires_grad:
            grouped.setdefault(".".join(parts[:end]), []).append(parameter)
    return grouped
