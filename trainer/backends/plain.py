"""One process, or DDP: weights, gradients and moments are whole on every process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from trainer.backends.backend import StepResult, without_gradient
from trainer.backends.torch_backend import TorchBackend
from trainer.command_line.sections import Optimisation
from trainer.distributed.launch import Launch
from trainer.initial_weights import Weights, fill
from trainer.optimisation.finite import LossScale

_NOTHING = contextlib.nullcontext()


class PlainBackend(TorchBackend):
    """The network itself, or torch's DistributedDataParallel around it."""

    survives_out_of_memory = True

    def __init__(self, launch: Launch, precision: str, precision_flag: str, settings: Optimisation) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs

        super().__init__(launch, precision, precision_flag, settings)
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        on_cpu = launch.device.type == "cpu"
        self.accelerator = Accelerator(cpu=on_cpu, mixed_precision=precision, kwargs_handlers=[ddp])
        self.scale = LossScale(launch.device) if precision == "fp16" else None

    @staticmethod
    def requested(environ: Mapping[str, str]) -> bool:
        """What is left when no other backend was asked for."""
        return True

    @property
    def name(self) -> str:
        """As it is printed at start."""
        return "DDP" if self.launch.processes > 1 else "one process"

    def prepare(
        self,
        objective: nn.Module,
        network: nn.Module,
        make_optimizer: Callable[[], Optimizer],
        weights: Weights | None = None,
    ) -> None:
        """Accelerate's `prepare`, for the model alone: its wrapper of the optimizer would cost 0.1 ms a step."""
        if weights is not None:
            fill(network, weights, self.launch.device)
        self.model = self.accelerator.prepare(objective)
        self.no_sync = getattr(self.model, "no_sync", contextlib.nullcontext)
        self.use(network, make_optimizer())

    def step(self, learning_rate: float) -> StepResult:
        """UserError where DDP has not reduced all gradients: it waits for a parameter that got none."""
        if self.launch.processes > 1:
            try:
                self.model._check_reducer_finalized()
            except RuntimeError as error:
                unused = [name for name, p in self.named_parameters.items() if p.requires_grad and p.grad is None]
                raise without_gradient(unused, "DDP waits for each gradient") from error
        return TorchBackend.step(self, learning_rate)

    def micro_step(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Gradients are reduced with the last micro-batch only."""
        return _NOTHING if last else self.no_sync()
