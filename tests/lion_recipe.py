"""The toy recipe with an optimizer of its own, which the trainer does not know: an example of all that it has to define."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from toy_recipe import ToyRecipe

from trainer.main import main


class Lion(Optimizer):
    """Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2: one moment; the update is a sign."""

    def __init__(self, groups: Any, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            slow, fast = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                update = torch.lerp(p.grad, state["momentum"], slow).sign()
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
                state["momentum"].lerp_(p.grad, 1 - fast)


class LionRecipe(ToyRecipe):
    """A toy trained by Lion."""

    def optimizer(self, network: nn.Module, config: Any) -> Optimizer:
        o = config.optimisation
        return Lion(self.parameter_groups(network, config), o.learning_rate, (0.9, 0.99))


if __name__ == "__main__":
    main(LionRecipe())
