"""Optimizers by name. Fused where torch has it: faster, and the fused forms skip a step on the device (`found_inf`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from trainer.command_line.sections import Optimisation
from trainer.errors import UserError

Groups = list[dict[str, Any]]


def decay_groups(network: nn.Module, weight_decay: float, dimensions: int = 2) -> Groups:
    """Two parameter groups: weight decay for parameters of at least so many dimensions, none for the others."""
    trained = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= dimensions], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < dimensions], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build(groups: Groups, network: nn.Module, settings: Optimisation) -> torch.optim.Optimizer:
    """The optimizer of `settings` over `groups` (each with its own `weight_decay`)."""
    adam: dict[str, Any] = {"betas": (settings.beta1, settings.beta2), "eps": settings.eps, "fused": True}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.learning_rate, **adam)
    if settings.optimizer == "adam":
        return torch.optim.Adam(groups, lr=settings.learning_rate, **adam)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.beta1, fused=True)
    return MuonAndAdamW(groups, network, settings)


def hidden_matrices(network: Any) -> set[int]:
    """ids of the 2-D parameters that map one hidden space to another, which is what Muon is for.

    Embeddings and heads do not: theirs is a row per token or class. A network names them by a method
    `embeddings_and_heads() -> parameters`, or as transformers' models do. UserError where it does neither.
    """
    if hasattr(network, "embeddings_and_heads"):
        outside: Iterable[nn.Parameter] = network.embeddings_and_heads()
    elif hasattr(network, "get_output_embeddings"):
        ends = [network.get_output_embeddings(), *(m for m in network.modules() if isinstance(m, nn.Embedding))]
        outside = [p for module in ends if module is not None for p in module.parameters()]
    else:
        raise UserError(
            f"optimizer muon has to know which parameters of {type(network).__name__} are embeddings and heads; give it a "
            "method embeddings_and_heads(), or use adamw"
        )
    return {id(p) for p in network.parameters() if p.ndim == 2} - {id(p) for p in outside}


class MuonAndAdamW(torch.optim.Optimizer):
    """torch.optim.Muon (Jordan et al. 2024) for the hidden matrices, fused AdamW for everything else.

    Muon's learning rate is adjusted to match AdamW's update size (Liu et al. 2025, "match_rms_adamw"), so one
    learning rate and one schedule serve both. Both parts share this object's groups and state.
    """

    needs_whole_matrices = True

    def __init__(self, groups: Groups, network: nn.Module, settings: Optimisation) -> None:
        matrices = hidden_matrices(network)
        split = [
            {**g, "params": [p for p in g["params"] if (id(p) in matrices) == hidden], "muon": hidden}
            for g in groups
            for hidden in (True, False)
        ]
        super().__init__([g for g in split if g["params"]], {"lr": settings.learning_rate})
        muon = [g for g in self.param_groups if g["muon"]]
        others = [g for g in self.param_groups if not g["muon"]]
        self.parts: list[torch.optim.Optimizer] = []
        if muon:
            self.parts.append(torch.optim.Muon(muon, lr=settings.learning_rate, momentum=0.95, adjust_lr_fn="match_rms_adamw"))
        if others:
            adam: dict[str, Any] = {"betas": (settings.beta1, settings.beta2), "eps": settings.eps, "fused": True}
            self.parts.append(torch.optim.AdamW(others, lr=settings.learning_rate, **adam))
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update by both parts, which use the groups and the state of this object."""
        for part in self.parts:
            groups = [group for group in self.param_groups if group["muon"] == isinstance(part, torch.optim.Muon)]
            part.param_groups, part.state = groups, self.state
            part.step()
