"""The regression PFN: who sees whom, its density, and a stack of models beside one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from recipes.data.regression import RegressionStream, task_pool
from recipes.models.pfn import AutoregressivePFN, attention_mask, repeat_weights
from recipes.pfn_raventos import PFNRaventos
from trainer.command_line import config as configuration

SMALL = {"d_x": 3, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 32, "d_vocab": 24, "examples": 6}


def network(y_min: float = -5.0, y_max: float = 5.0, models: int | None = None, **changes: Any) -> AutoregressivePFN:
    torch.manual_seed(0)
    model = AutoregressivePFN(**{**SMALL, **changes}, y_min=y_min, y_max=y_max, models=models)
    if models is None:
        with torch.no_grad():  # away from the start, where attention hardly matters
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def pairs(examples: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, examples, 3, generator=generator), torch.randn(batch, examples, generator=generator)


def test_the_default_model_has_its_parameters() -> None:
    sizes = {"d_x": 16, "d_model": 128, "num_layers": 2, "num_heads": 2, "d_ff": 256, "d_vocab": 128, "examples": 64}
    model = AutoregressivePFN(**sizes, y_min=-7, y_max=7)
    assert sum(p.numel() for p in model.parameters()) == 283_904
    assert model.edges.tolist() == pytest.approx([-7 + 14 * i / 128 for i in range(1, 128)])
    attention = torch.cat([layer.weight.flatten() for block in model.blocks for layer in (block.qkv, block.out)])
    assert float(attention.detach().std()) == pytest.approx(0.02, rel=0.02)
    assert all(not layer.bias.any() for block in model.blocks for layer in (block.qkv, block.out))


def test_at_the_start_every_bin_is_about_as_likely() -> None:
    torch.manual_seed(0)
    sizes = {"d_x": 16, "d_model": 128, "num_layers": 2, "num_heads": 2, "d_ff": 256, "d_vocab": 128, "examples": 64}
    model = AutoregressivePFN(**sizes, y_min=-16, y_max=16)
    batch = RegressionStream("train", 0, [task_pool(0, 16, 0)], 16, 64, 0.25).__getitems__(range(8))
    y = model.per_model(batch["y"])
    nats = float(model.cross_entropy(model(batch["x"], y), y).detach()) / y.numel()
    assert abs(nats - math.log(128)) < 0.35


@pytest.mark.parametrize("models", [None, 3])
def test_a_prediction_depends_on_the_pairs_before_it_and_on_its_own_x_alone(models: int | None) -> None:
    single = network()
    model = single if models is None else repeat_weights(single, network(models=models))
    x, y = pairs(6)
    ys = y if models is None else torch.stack([y, -y, y + 1])
    logits = model(x, ys)
    assert logits.shape == (*ys.shape, 24)
    for i in range(6):
        later_x, later_y = x.clone(), ys.clone()
        later_x[:, i + 1 :] += 1
        later_y[..., i:] += 1
        changed = model(later_x, later_y)
        torch.testing.assert_close(changed[..., : i + 1, :], logits[..., : i + 1, :])
        if i < 5:
            assert (changed[..., i + 1, :] - logits[..., i + 1, :]).abs().max() > 1e-3
        own_x = x.clone()
        own_x[:, i] += 1
        assert (model(own_x, ys)[..., i, :] - logits[..., i, :]).abs().max() > 1e-3


def test_a_bare_query_influences_nothing() -> None:
    """Token by token: what an odd or even token sees is itself and the odd ones before it."""
    mask = attention_mask(4)
    assert mask.dtype == torch.bool
    for row in range(8):
        assert [column for column in range(8) if mask[row, column]] == [*range(1, row, 2), row]
    model = network()
    x, y = pairs(6)
    logits = model(x, y)
    block, forward = model.blocks[0], model.blocks[0].forward
    block.forward = lambda hidden, mask: forward(_disturbed(hidden, 4), mask)  # the third query
    changed = (model(x, y) - logits).abs().amax((0, 2))
    assert float(changed[2].detach()) > 1e-3
    assert float(changed[[0, 1, 3, 4, 5]].detach().max()) == 0


def _disturbed(hidden: Tensor, token: int) -> Tensor:
    hidden = hidden.clone()
    hidden[:, token] += 1
    return hidden


def test_there_may_be_more_examples_than_in_training_and_no_position_is_marked() -> None:
    model = network()
    x, y = pairs(20)
    logits = model(x, y)
    assert logits.shape == (2, 20, 24)
    torch.testing.assert_close(logits[:, :6], model(x[:, :6], y[:, :6]))
    # In one layer the last query looks at a set; in more, examples have looked at those before them.
    shallow = network(num_layers=1)
    order = torch.tensor([*torch.randperm(19, generator=torch.Generator().manual_seed(0)), 19])
    torch.testing.assert_close(shallow(x[:, order], y[:, order])[:, -1], shallow(x, y)[:, -1])


@pytest.mark.parametrize(("low", "high"), [(-7.0, 7.0), (-3.0, 3.0), (-2.0, 9.0)])
def test_bins_are_those_of_the_models_own_range(low: float, high: float) -> None:
    model = network(low, high)
    width = (high - low) / 24
    y = torch.tensor([low - 5, low + width / 2, low + 1.5 * width, (low + high) / 2 + 1e-4, high - width / 2, high, high + 5])
    assert model.bins(y).tolist() == [0, 0, 1, 12, 23, 23, 23]
    assert model.centres[1:-1].tolist() == pytest.approx([low + (i + 0.5) * width for i in range(1, 23)], abs=1e-5)
    logits = torch.full((24,), -50.0)
    logits[3] = 50.0
    assert float(model.mean(logits)) == pytest.approx(low + 3.5 * width, abs=1e-5)


def test_the_density_is_one_with_tails_and_its_mean_and_samples_are_its_own() -> None:
    model = network(-3.0, 3.0)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(24, generator=generator) * 2
    logits[0] += 3  # so that the tails matter
    logits[-1] += 3
    y = torch.linspace(-8, 8, 160_001)
    density = model.log_density(logits.expand(len(y), -1), y).exp()
    assert float(torch.trapezoid(density, y)) == pytest.approx(1, abs=1e-3)
    mean = float(torch.trapezoid(density * y, y))
    assert float(model.mean(logits)) == pytest.approx(mean, abs=2e-3)
    inside = (y > -3) & (y < 3)
    edges = logits.softmax(0)[[0, -1]].sum() / 2  # half of an edge's mass lies beyond the range
    assert float(torch.trapezoid(density * ~inside, y)) == pytest.approx(float(edges), abs=1e-3)
    drawn = model.sample(logits.expand(100_000, -1), generator)
    assert float(drawn.mean()) == pytest.approx(mean, abs=4 * float(drawn.std()) / math.sqrt(1e5))
    frequencies = torch.bincount(model.bins(drawn), minlength=24) / 1e5
    assert float((frequencies - logits.softmax(0)).abs().max()) < 0.01


@pytest.mark.parametrize("reach", [7.0, 4 * math.sqrt(16.25)])
def test_a_perfect_predictor_scores_its_true_error(reach: float) -> None:
    """The exact posterior, put into the model's bins, has the exact posterior's error: whatever the range of the model.

    (At reach 7 of y with a standard deviation of 4, a twelfth is beyond; what is predicted inside must not suffer.)
    """
    model = network(-reach, reach, d_vocab=128)
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(20_000, generator=generator, dtype=torch.float64) * 2
    mean = mean.clamp(-5, 5)
    std = 0.6
    y = mean + std * torch.randn(20_000, generator=generator, dtype=torch.float64)
    edges = torch.cat([torch.tensor([-math.inf]), model.edges, torch.tensor([math.inf])]).double()
    upto = torch.distributions.Normal(mean[:, None], std).cdf(edges)
    logits = (upto[:, 1:] - upto[:, :-1]).clamp_min(1e-30).log()
    true, scored = (mean - y).square().mean(), (model.mean(logits) - y).square().mean()
    assert float(scored) == pytest.approx(float(true), rel=2e-3)


def test_a_stack_of_models_gives_what_each_gives_alone() -> None:
    singles = [network() for _ in range(3)]
    for i, single in enumerate(singles):
        with torch.no_grad():
            for parameter in single.parameters():
                parameter.add_(0.1 * i)
    stacked = network(models=3)
    rows = [dict(single.named_parameters()) for single in singles]
    assert {name: p.shape for name, p in stacked.named_parameters()} == {n: (3, *p.shape) for n, p in rows[0].items()}
    with torch.no_grad():
        for name, parameter in stacked.named_parameters():
            parameter.copy_(torch.stack([row[name] for row in rows]))
    x, y = pairs(6)
    ys = torch.stack([y, y + 1, -y])
    logits = stacked(x, ys)
    sums = stacked.cross_entropy(logits, ys)
    for i, single in enumerate(singles):
        alone = single(x, ys[i])
        torch.testing.assert_close(logits[i], alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sums[i : i + 1], single.cross_entropy(alone, ys[i]))


def test_flops_grow_as_the_matrix_products_do() -> None:
    def forward_flops(examples: int) -> float:
        model = network(examples=examples)
        # The fused attention of CPUs is not counted; the plain one is matrix products.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(*pairs(examples, batch=1))
        return counter.get_total_flops()

    for examples in (6, 40):
        ours = network().training_flops(examples)
        assert ours / 3 == pytest.approx(forward_flops(examples), rel=1e-6)
        assert network(models=3).training_flops(examples) == pytest.approx(3 * ours)


def test_muon_gets_the_matrices_of_the_blocks_and_adamw_the_rest() -> None:
    recipe, model = PFNRaventos(), network()
    config = configuration.parse(recipe.config_class, {}, ["--optimizer", "muon"], recipe.name).config
    groups = recipe.optimizer(model, config).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    muon, adamw = ({names[id(p)] for g in groups if g["muon"] == use for p in g["params"]} for use in (True, False))
    assert muon == {f"blocks.{i}.{layer}.weight" for i in (0, 1) for layer in ("qkv", "out", "up", "down")}
    assert {"embed_x.weight", "embed_y.weight", "head.weight", "blocks.0.qkv.bias", "blocks.0.norm1.weight"} <= adamw
    assert muon | adamw == set(names.values())
