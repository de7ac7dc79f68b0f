"""Optimizers by name. Fused where torch has it: faster, and the fused forms skip a step on the device (`found_inf`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trainer.sections import Optimisation

Groups = list[dict[str, Any]]


def build(groups: Groups, network: nn.Module, settings: Optimisation) -> torch.optim.Optimizer:
    """The optimizer of `settings` over `groups` (each with its own `weight_decay`)."""
    adam = {"lr": settings.learning_rate, "betas": (settings.beta1, settings.beta2), "eps": settings.eps, "fused": True}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, **adam)
    if settings.optimizer == "adam":
        return torch.optim.Adam(groups, **adam)
    if settings.optimizer == "sgd":
        sgd = torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.beta1, fused=True)
        if settings.beta1:
            # Fused SGD allocates this without filling it, and a skipped first step would leave it that way.
            for p in (p for group in groups for p in group["params"]):
                sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return sgd
    return MuonAndAdamW(groups, network, settings)


def moments(name: str, beta1: float) -> tuple[str, ...]:
    """Keys of the per-parameter state that `name` keeps, besides its step count."""
    if name == "sgd":
        return ("momentum_buffer",) if beta1 else ()
    return ("momentum_buffer", "exp_avg", "exp_avg_sq") if name == "muon" else ("exp_avg", "exp_avg_sq")


class MuonAndAdamW(torch.optim.Optimizer):
    """torch.optim.Muon (Jordan et al. 2024) for the hidden matrices, fused AdamW for embeddings, the head, norms and biases.

    Muon's learning rate is adjusted to match AdamW's update size (Liu et al. 2025, "match_rms_adamw"), so one
    learning rate and one schedule serve both. Both parts share this object's groups and state.
    """

    def __init__(self, groups: Groups, network: nn.Module, settings: Optimisation) -> None:
        # By name and shape, not by nn.Linear: GPT-2's projections in transformers are of a class of their own.
        matrices = {id(p) for n, p in network.named_parameters() if p.ndim == 2 and n.rpartition(".")[2] == "weight"}
        # An embedding is a look-up table, and so is a head, tied or not: a row per token, not a map between hidden spaces.
        matrices -= {id(m.weight) for m in network.modules() if isinstance(m, nn.Embedding)}
        matrices -= {id(getattr(getattr(network, "lm_head", None), "weight", None))}
        split = [
            {**g, "params": [p for p in g["params"] if (id(p) in matrices) == hidden], "muon": hidden}
            for g in groups
            for hidden in (True, False)
        ]
        super().__init__([g for g in split if g["params"]], {"lr": settings.learning_rate})
        muon = [g for g in self.param_groups if g["muon"]]
        others = [g for g in self.param_groups if not g["muon"]]
        rest = {"betas": (settings.beta1, settings.beta2), "eps": settings.eps, "fused": True}
        self.parts: list[torch.optim.Optimizer] = []
        if muon:
            options = {"momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
            self.parts.append(torch.optim.Muon(muon, lr=settings.learning_rate, **options))
        if others:
            self.parts.append(torch.optim.AdamW(others, lr=settings.learning_rate, **rest))
        # One list of groups, one state: what the trainer reads and writes here is what the parts use.
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        for part in self.parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update by both parts."""
        for part in self.parts:
            part.step()
