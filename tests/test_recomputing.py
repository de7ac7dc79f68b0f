"""`--gradient_checkpointing`: the same gradients of every network, from fewer activations in memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from scenarios import TOY, planned, recipe_of
from tiny_runs import TINY
from torch import nn

from trainer.backends.blocks import named_blocks, recompute_activations
from trainer.checkpoints.network import build_network
from trainer.errors import UserError

DROPOUT = {"gpt2": ["--dropout", "0.2"], "vit": ["--dropout", "0.2"], "collatz": ["--dropout", "0.2"]}


def gradients(name: str, folder: Path, every: int | None) -> tuple[list[torch.Tensor], dict[str, int]]:
    """(of a training step of a tiny run, with dropout where there is some; how often each block computed its output)."""
    recipe_name, argv = (TOY, lambda _: []) if name == "toy" else TINY[name]
    recipe: Any = recipe_of(recipe_name)
    settings = planned(recipe, [*argv(folder), *DROPOUT.get(name, [])])
    data = recipe.build_data(settings)
    network = build_network(recipe, settings, data).train()
    calls: dict[str, int] = {}
    for number, block in enumerate(named_blocks(network)[::-1]):
        first = next(module for module in block.modules() if not list(module.children()))
        first.register_forward_hook(lambda *_, key=f"block {number}": calls.update({key: calls.get(key, 0) + 1}))
    if every is not None:
        recompute_activations(network, every)
    torch.manual_seed(1)
    losses = recipe.loss(network, data.train.__getitems__(range(4)))
    sum(losses.values()).backward()  # type: ignore[union-attr]
    return [p.grad for p in network.parameters() if p.grad is not None], calls


@pytest.mark.parametrize("name", ["toy", *TINY])
def test_recomputing_changes_no_gradient_of_any_network(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "SAMECURVE_CACHE", str(tmp_path / "cache"))
    plain, once = gradients(name, tmp_path, None)
    for every in (1, 2):
        recomputed, calls = gradients(name, tmp_path, every)
        assert all(torch.allclose(one, two, rtol=1e-5, atol=1e-6) for one, two in zip(plain, recomputed, strict=True))
        expected = {key: count * (1 + (int(key.split()[1]) % every == 0)) for key, count in once.items()}
        assert calls == expected


def test_a_network_in_evaluation_recomputes_nothing(tmp_path: Path) -> None:
    recipe = recipe_of(TOY)
    settings = planned(recipe, [])
    network = build_network(recipe, settings, recipe.build_data(settings))
    recompute_activations(network, 1)
    tokens, calls = torch.zeros(1, 4, dtype=torch.long), []
    network.blocks[0][0].register_forward_hook(lambda *_: calls.append(1))
    network.eval()(tokens)[0].sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("argv", "every"),
    [
        ([], 0),
        (["--gradient_checkpointing"], 1),
        (["--gradient_checkpointing_every", "2"], 2),
        (["--gradient_checkpointing", "--gradient_checkpointing_every", "3"], 3),
    ],
)
def test_either_flag_turns_it_on(argv: list[str], every: int) -> None:
    assert planned(recipe_of(TOY), argv).run.recompute_every == every


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(UserError, match="goes block by block, and Linear names none in _no_split_modules; leave it out"):
        recompute_activations(nn.Linear(2, 2), 1)
