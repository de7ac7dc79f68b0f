"""A network without its weights: what each of them begins with, and that nothing but (seed, name) decides it."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scenarios import planned, recipe_of
from tiny_runs import TINY
from torch import Tensor, nn
from toy_recipe import ToyRecipe

from trainer.checkpoints.network import build_empty_network, build_network
from trainer.command_line import config as configuration
from trainer.errors import UserError
from trainer.initial_weights import build_empty, fill, replace_tensors

SEED = 42
CPU = torch.device("cpu")


def filled(build: Callable[[], nn.Module], seed: int = SEED) -> nn.Module:
    network, values = build_empty(build, seed)
    fill(network, values, CPU)
    return network


def mlp(width: int = 64) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.Linear(width, width), nn.LayerNorm(width))


@pytest.mark.parametrize("name", TINY)
def test_each_recipe_begins_with_the_distributions_its_network_asks_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the same network, built the ordinary way: constants and buffers equal, spreads alike, nothing left out."""
    monkeypatch.setenv("SAMECURVE_CACHE", str(tmp_path))
    path, argv = TINY[name]
    recipe = recipe_of(path)
    settings = planned(recipe, argv(tmp_path))
    data = recipe.build_data(settings)
    torch.manual_seed(0)
    ordinary, ours = recipe.build_model(settings, data), build_network(recipe, settings, data)
    assert ours.state_dict().keys() == ordinary.state_dict().keys()
    for (key, buffer), (_, expected) in zip(ours.named_buffers(), ordinary.named_buffers(), strict=True):
        assert torch.equal(buffer, expected), key
    for (key, p), (_, expected) in zip(ours.named_parameters(), ordinary.named_parameters(), strict=True):
        with torch.no_grad():
            spread, size = float(expected.std(correction=0)), expected.numel()
            assert p.requires_grad == expected.requires_grad
            if spread == 0 and size > 1:
                assert torch.equal(p, expected), key
            elif size > 1:
                assert not torch.equal(p, expected)
                assert float(p.std(correction=0)) == pytest.approx(spread, rel=min(0.9, 5 / math.sqrt(size))), key
                assert abs(float(p.mean() - expected.mean())) < 8 * spread / math.sqrt(size), key


def test_a_tensor_is_drawn_from_the_seed_and_its_name_alone() -> None:
    network, values = build_empty(mlp, SEED)
    names = [name for name, _ in network.named_parameters()]
    forwards = {name: values(name) for name in names}
    torch.rand(3)
    assert all(torch.equal(values(name), forwards[name]) for name in reversed(names))
    assert torch.equal(values("0.weight", slice(5, 9)), forwards["0.weight"][5:9])
    assert not torch.equal(forwards["0.weight"], forwards["1.weight"])
    assert not torch.equal(build_empty(mlp, SEED + 1)[1]("0.weight"), forwards["0.weight"])
    deeper = build_empty(lambda: nn.Sequential(nn.Linear(64, 64), *[nn.Linear(64, 64) for _ in range(4)]), SEED)[1]
    assert torch.equal(deeper("1.weight"), forwards["1.weight"])


def test_each_model_of_a_stack_begins_as_it_would_alone(tmp_path: Path) -> None:
    networks = []
    for name in ("pfn", "pfn_stack"):
        path, argv = TINY[name]
        recipe = recipe_of(path)
        settings = planned(recipe, argv(tmp_path))
        networks.append(build_network(recipe, settings, recipe.build_data(settings)))
    alone = dict(networks[0].named_parameters())
    for name, p in networks[1].named_parameters():
        assert p.shape == (3, *alone[name].shape)
        assert all(torch.equal(model, alone[name]) for model in p)


class Odd(nn.Module):
    """Whatever a network may do while it is built."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twin = nn.Linear(8, 8), nn.Linear(8, 8)
        with torch.no_grad():
            self.twin.weight.copy_(self.first.weight)
            self.first.bias[:4] = 7.0
            self.first.bias[4:] *= 0.5
        self.copies = nn.ModuleList(copy.deepcopy(nn.Linear(8, 8)) for _ in range(2))
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.first.weight
        self.table = nn.Parameter(torch.randn(300, 40))
        nn.init.trunc_normal_(self.table, std=0.5, a=-0.6, b=0.6)
        self.square = nn.Parameter(torch.empty(16, 16))
        nn.init.orthogonal_(self.square)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.scale.rate = 0.1  # type: ignore[attr-defined]
        self.still = nn.Parameter(torch.full((3,), 2.0), requires_grad=False)
        self.register_buffer("given", torch.tensor([1, 2, 3]))
        self.register_buffer("from_numpy", torch.from_numpy(np.arange(6.0)).view(2, 3).t())
        self.register_buffer("grid", torch.arange(4)[:, None] * torch.ones(2, dtype=torch.float64))


def test_what_a_network_does_while_it_is_built_is_done_when_it_is_filled() -> None:
    network = filled(Odd)
    assert isinstance(network, Odd)
    assert torch.equal(network.twin.weight, network.first.weight)
    assert network.tied.weight is network.first.weight
    bias = network.first.bias.detach()
    assert bias[:4].tolist() == [7.0] * 4
    assert 0 < float(bias[4:].abs().max()) < 0.5 / math.sqrt(8)
    assert not torch.equal(network.copies[0].weight, network.copies[1].weight)
    table = network.table.detach()
    assert float(table.abs().max()) <= 0.6
    assert float(table.std()) == pytest.approx(0.3213, rel=0.05)  # of N(0, 0.5) cut at 0.6
    assert torch.allclose(network.square @ network.square.t(), torch.eye(16), atol=1e-5)
    assert network.scale.item() == 1.5
    assert network.scale.rate == 0.1
    assert not network.still.requires_grad
    assert network.given.tolist() == [1, 2, 3]
    assert network.from_numpy.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert network.grid.dtype == torch.float64
    assert network.grid.tolist() == [[i, i] for i in range(4)]


def test_a_layer_is_copied_without_torchs_bookkeeping_of_it() -> None:
    """A copy of that as well crashes the process, at some later garbage collection."""
    modes: list[Any] = []

    def build() -> nn.Module:
        layer = nn.Linear(2, 2)
        twin = copy.deepcopy(layer)
        modes.extend(weight.fake_mode for weight in (layer.weight, twin.weight))  # type: ignore[attr-defined]
        return nn.ModuleList([layer, twin])

    filled(build)
    assert modes[0] is modes[1]


def test_building_changes_nothing_outside() -> None:
    before = nn.init._no_grad_trunc_normal_
    outside = torch.zeros(3)
    filled(lambda: nn.ParameterList([nn.Parameter(outside.clone() + 1)]))
    with pytest.raises(UserError):
        filled(lambda: nn.Linear(int(torch.ones(2).sum()), 2))
    assert nn.init._no_grad_trunc_normal_ is before
    assert type(torch.ones(2)) is Tensor
    assert outside.tolist() == [0, 0, 0]


def test_a_network_larger_than_memory_is_built_and_one_tensor_of_it_drawn() -> None:
    network, values = build_empty(lambda: nn.Sequential(nn.Linear(10**6, 10**6), nn.Linear(3, 2)), SEED)
    assert sum(p.numel() for p in network.parameters()) > 10**12
    assert all(p.is_meta for p in network.parameters())
    assert values("1.weight").shape == (2, 3)


def test_replacing_keeps_ties_and_visits_what_is_tied_once() -> None:
    network, seen = Odd(), []
    replace_tensors(network, lambda name, tensor: seen.append(name) or tensor.detach().clone())
    assert network.tied.weight is network.first.weight
    assert "tied.weight" not in seen
    assert len(seen) == len(set(seen)) == len(list(network.named_parameters())) + 3


class Unfilled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ParameterDict({"hole": nn.Parameter(torch.empty(3))})


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.layer.mask = torch.ones(2)


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        both = torch.zeros(4, 2)
        self.upper, self.lower = nn.Parameter(both[:2]), nn.Parameter(both[2:])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (Unfilled, "inner.hole has no initial value"),
        (Hidden, "layer.mask is a tensor that is neither parameter nor buffer"),
        (Views, "upper and lower lie in the same memory"),
        (lambda: nn.Linear(2, int(torch.randint(3, (1,)))), "building the network reads the values of a tensor"),
        (lambda: nn.LazyLinear(2), "building the network makes a lazy module"),
        (lambda: nn.ParameterDict({"none": nn.Parameter(torch.zeros(3, 0))}), r"none is of shape \(3, 0\), without an element"),
    ],
)
def test_what_could_not_be_filled_alone_is_refused_by_name(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(UserError, match=message):
        filled(build)


def test_parameters_lie_in_memory_as_a_resumed_run_has_them() -> None:
    """By rows, whatever layout their author gave them: sums in another order would round otherwise."""
    build = lambda: nn.Sequential(nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last))  # noqa: E731
    assert not build()[0].weight.is_contiguous()
    network = filled(build)
    assert network[0].weight.is_contiguous()
    assert network[0].weight.shape == (4, 3, 3, 3)


def test_what_a_recipe_cannot_build_is_one_line(tmp_path: Path) -> None:
    recipe = recipe_of(TINY["collatz"][0])
    argv = [*TINY["collatz"][1](tmp_path), "--d_model", "15"]
    settings = configuration.parse(recipe.config_class, recipe.presets, argv, recipe.name).config
    with pytest.raises(UserError, match="d_model 15 must be even"):
        build_empty_network(recipe, settings, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "dtype"), [(nn.Parameter, torch.complex64), (nn.Buffer, torch.complex128)])
def test_a_tensor_that_no_checkpoint_could_hold_is_refused_before_training(kind: Any, dtype: torch.dtype) -> None:
    class Complex(ToyRecipe):
        def build_model(self, config: Any, data: Any) -> nn.Module:
            network = super().build_model(config, data)
            network.phase = kind(torch.zeros(2, dtype=dtype))
            return network

    with pytest.raises(UserError, match=f"phase is of {dtype}, which checkpoints do not hold"):
        build_empty_network(Complex(), planned(Complex(), []), None)  # type: ignore[arg-type]


def test_a_generator_of_ones_own_is_refused() -> None:
    """Its numbers would depend on which parameters are drawn before, and a resumed run draws fewer."""
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(UserError, match=r"draws from a torch\.Generator"):
        build_empty(lambda: drawn_with(generator), 0)


def drawn_with(generator: torch.Generator) -> nn.Module:
    network = nn.Linear(3, 3)
    nn.init.normal_(network.weight, generator=generator)
    return network


def test_tensors_in_a_list_or_dictionary_are_named() -> None:
    def build() -> nn.Module:
        network = nn.Linear(3, 3)
        network.kept = {"mask": [torch.ones(3)]}
        return network

    with pytest.raises(UserError, match="kept is a tensor that is neither parameter nor buffer"):
        build_empty(build, 0)


def test_numbers_of_numpy_and_python_are_the_same_in_every_process() -> None:
    def build() -> nn.Module:
        network = nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            network.weight.copy_(torch.tensor([[np.random.rand(), random.random()]]))
        return network

    drawn = []
    for state in (1, 2):
        random.seed(state)
        np.random.seed(state)
        drawn.append([build_empty(build, seed)[1]("weight").tolist() for seed in (0, 1)])
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[0][1]
