"""The blocks of a network: what FSDP gathers at a time, and what `--gradient_checkpointing` computes again."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from trainer.distributed.launch import DDP
from trainer.errors import UserError, path_of


def check_dimensions(network: nn.Module) -> None:
    """UserError for a scalar parameter, which FSDP and ZeRO cannot shard."""
    for name in (name for name, p in network.named_parameters() if not p.ndim):
        raise UserError(f"{name} has no dimension to cut it along; give it the shape (1,), or use {path_of(DDP)}")


def blocks(network: nn.Module) -> list[nn.Module]:
    """The modules that FSDP gathers one at a time; empty if the network names no block classes.

    UserError if it names some and has none of them, or if a parameter is tied across blocks.
    """
    found, classes = named_blocks(network), _block_classes(network)
    if classes and not found:
        raise UserError(
            f"{type(network).__name__} has no block called {', '.join(classes)}: name the classes of its blocks in its class "
            "attribute _no_split_modules, or in fsdp_transformer_layer_cls_to_wrap"
        )
    tied = tie_across(network, found)
    if tied is not None:  # not every version of torch refuses it
        raise UserError(f"{tied} is tied to a parameter outside its block, and FSDP gathers block by block; use {path_of(DDP)}")
    return found


def named_blocks(network: nn.Module) -> list[nn.Module]:
    """The modules of the classes that the launcher names in `fsdp_transformer_layer_cls_to_wrap`, or else the network in
    `_no_split_modules`, as transformers' models do. Inner blocks come before outer ones, the order `fully_shard` needs."""
    classes = _block_classes(network)
    return [module for module in network.modules() if type(module).__name__ in classes][::-1]


def _block_classes(network: nn.Module) -> list[str]:
    named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
    return [name.strip() for name in named.split(",") if name.strip()] or list(
        getattr(network, "_no_split_modules", None) or ()
    )


def tie_across(network: nn.Module, found: list[nn.Module]) -> str | None:
    """The name of a parameter shared by two blocks, or by a block and the rest of the network; None if there is none."""
    blocks_by_name = {name: module for name, module in network.named_modules(remove_duplicate=False) if module in found}
    gathered_with: dict[nn.Parameter, nn.Module] = {}
    for name, p in network.named_parameters(remove_duplicate=False):
        parts = name.split(".")
        around = (blocks_by_name.get(".".join(parts[:end])) for end in reversed(range(len(parts))))
        block = next((module for module in around if module is not None), network)
        if gathered_with.setdefault(p, block) is not block:
            return name
    return None


def recompute_activations(network: nn.Module, every: int) -> None:
    """Activation checkpointing (Chen et al. 2016) of every `every`-th block, from the first on (0: of none).

    It wraps the block's `forward`, inside the hooks of FSDP and ZeRO, so that weights are gathered once for recomputation and
    backward together. UserError for a network that names no blocks.
    """
    blocks = named_blocks(network)[::-1]
    if every and not blocks:
        raise UserError(
            f"--gradient_checkpointing goes block by block, and {type(network).__name__} names none in _no_split_modules; "
            "leave it out"
        )
    for block in blocks[::every] if every else ():
        block.forward = partial(_recomputed, block, block.forward)


def _recomputed(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return checkpoint(forward, *args, use_reentrant=False, **kwargs) if block.training else forward(*args, **kwargs)
