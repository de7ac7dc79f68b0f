"""What DDP and FSDP share: parameters keep their names and shapes, whole or as DTensors, and a torch optimizer updates them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from trainer.backends import tensors
from trainer.backends.backend import Backend, Layers, StepResult, set_learning_rate
from trainer.backends.tensors import TensorEntry, TensorSource
from trainer.optimisation import averages
from trainer.optimisation.finite import LossScale


class TorchBackend(Backend):
    """Each parameter has its gradient and its optimizer state beside it, cut as it is."""

    supports_layer_norms = True
    scale: LossScale | None = None

    def use(self, network: nn.Module, optimizer: Optimizer) -> None:
        """Train this network, whose parameters are on their device and cut already, with this optimizer."""
        self.network, self.optimizer = network, optimizer
        # Looked up once: while weights are gathered, FSDP2 has others registered in their places.
        self.named_parameters = dict(network.named_parameters())
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        fused = all(group.get("fused") for group in optimizer.param_groups)
        self.skips_on_device = fused and self.launch.device.type != "mps"  # fused optimizers on Apple's GPUs do not promise it
        self.state_layout = tensors.state_layout(optimizer, network)
        if isinstance(optimizer, torch.optim.SGD):
            # Fused SGD allocates its buffer uninitialised and fills it in its first step, which may be skipped.
            for group in (group for group in optimizer.param_groups if group["momentum"] and not group["dampening"]):
                optimizer.state |= {p: {"momentum_buffer": torch.zeros_like(p)} for p in group["params"]}

    def backward(self, loss_sums: Tensor, weights: Tensor) -> None:
        """Backward from the vector of sums: its gradient is the weights (times the loss scale)."""
        loss_sums.backward(weights if self.scale is None else weights * self.scale.scale)

    def layer_norms(self, layers: Layers) -> dict[str, Tensor]:
        """From the gradients that the parameters have now."""
        norms = {name: _total_norm([p.grad for p in own if p.grad is not None]) for name, own in layers.items()}
        return norms if self.scale is None else {name: norm / self.scale.scale for name, norm in norms.items()}

    def step(self, learning_rate: float) -> StepResult:
        """On a GPU a fused optimizer skips a non-finite step by itself (`found_inf`); otherwise the host reads the norm.

        On a CPU the host always reads it: that takes 1 us, and a `found_inf` of 0, which fused optimizers subtract from every
        step count, 60.
        """
        set_learning_rate(self.optimizer, learning_rate)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self.scale is not None:
            torch._foreach_mul_(gradients, 1.0 / self.scale.scale)
        norm = _total_norm(gradients)
        not_finite = None
        if norm.device.type != "cpu" and self.skips_on_device:
            not_finite = (norm - norm).ne(0).float()
        elif not math.isfinite(norm.item()):
            not_finite = torch.ones_like(norm)
        if self.settings.grad_clip:
            clip_grads_with_norm_(self.parameters, self.settings.grad_clip, norm)
        self.optimizer.found_inf = not_finite  # type: ignore[attr-defined]
        if not_finite is None or self.skips_on_device:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scale is None:
            return StepResult(norm, not_finite)
        overflow = torch.zeros_like(norm) if not_finite is None else not_finite
        bad = overflow * (self.scale.scale <= 1.0)
        self.scale.update(overflow)
        return StepResult(norm, bad)

    def swap_averages(self) -> None:
        """Parameter by parameter, in place."""
        for p, state in self.optimizer.state.items():
            averages.swap(p, state)

    def model_tensors(self) -> list[TensorEntry]:
        """Parameters and buffers."""
        parameters = [tensors.whole_entry(name, p, torch.float32) for name, p in self.named_parameters.items()]
        return parameters + tensors.buffer_entries(self.network)

    def optimizer_tensors(self) -> list[TensorEntry]:
        """Whatever tensors the optimizer keeps for each parameter (none before its first step), and its counts."""
        state = self.optimizer.state
        counts = tensors.count_keys(state)
        named = self.named_parameters.items()
        entries = [entry for name, p in named for entry in tensors.state_entries(name, state.get(p, {}), counts)]
        return entries + tensors.count_entries(state.values(), counts)

    def restore(self, saved: TensorSource, with_optimizer: bool) -> None:
        """Build the state of each parameter as the optimizer would have."""
        if not with_optimizer:
            return
        keys_of, _ = tensors.split_names(saved.names("optimizer"))
        names = {p: name for name, p in self.named_parameters.items()}
        for group in self.optimizer.param_groups:
            # As torch's Optimizer.load_state_dict does: only these forms keep the step count on the device.
            on_device = group.get("fused") or group.get("capturable")
            for p in group["params"]:
                if names[p] not in keys_of:
                    continue  # it never had a gradient
                device = p.device if on_device else torch.device("cpu")
                state = {key: tensors.restored_like(p, saved, f"{key}.{names[p]}") for key in keys_of[names[p]]}
                for key in self.state_layout.counts[names[p]]:
                    state[key] = tensors.restored_count(saved.tensor("optimizer", key).clone(), device)
                self.optimizer.state[p] = state

    def held_tensors(self) -> list[Tensor]:
        """Parameters and the tensors of their optimizer state; of a DTensor the local part."""
        states = [value for state in self.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        held = [*self.named_parameters.values(), *states]
        return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in held]

    def loss_scale_state(self) -> dict[str, Any]:
        """Scale and growth count."""
        return {} if self.scale is None else {"scale": float(self.scale.scale), "growth": int(self.scale.growth)}

    def restore_loss_scale(self, state: Mapping[str, Any]) -> None:
        """From any backend's."""
        if self.scale is not None and state:
            self.scale = LossScale(self.launch.device, state["scale"], int(state["growth"]))


def _total_norm(gradients: list[Tensor]) -> Tensor:
    norm = get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
