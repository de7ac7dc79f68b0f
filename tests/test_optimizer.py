"""Optimizers by name: they learn, keep the state they say they keep, and go on from it bit for bit."""

from collections.abc import Iterable
from typing import get_args, get_type_hints

import pytest
import torch
from torch import Tensor, nn

from recipes.gpt2_wikitext import Config, Gpt2Wikitext
from recipes.models.gpt2 import build_gpt2
from trainer import optimizer
from trainer.optimizer import MuonAndAdamW
from trainer.portable_state import STEP, PlainState
from trainer.sections import Optimisation
from trainer.update import PlainUpdate

NAMES = get_args(get_type_hints(Optimisation)["optimizer"])
RATES = {"adamw": 0.02, "adam": 0.02, "sgd": 0.3, "muon": 0.02}


class Tied(nn.Module):
    """A tiny language model with what trips optimizers: tied head, norms, biases, a one-element parameter, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.hidden = nn.Linear(8, 12)
        self.back = nn.Linear(12, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.gain = nn.Parameter(torch.ones(1))
        self.lm_head = nn.Linear(8, 11, bias=False)
        self.lm_head.weight = self.embed.weight
        self.register_buffer("offset", torch.zeros(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.lm_head(self.norm(x + self.back(torch.tanh(self.hidden(x)))) * self.gain)


def network() -> Tied:
    torch.manual_seed(0)
    return Tied()


def settings(name: str, **changes: float) -> Optimisation:
    return Optimisation(optimizer=name, learning_rate=RATES[name], **changes)


def groups(net: nn.Module, weight_decay: float = 0.1) -> list[dict]:
    decayed = [p for p in net.parameters() if p.ndim >= 2]
    others = [p for p in net.parameters() if p.ndim < 2]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def made(name: str, **changes: float) -> tuple[Tied, PlainUpdate, PlainState]:
    net, chosen = network(), settings(name, **changes)
    built = optimizer.build(groups(net), net, chosen)
    return net, PlainUpdate(net, built, None, 1, 1.0), PlainState(net, built, optimizer.moments(name, chosen.beta1))


def train(net: nn.Module, update: PlainUpdate, rate: float, steps: Iterable[int]) -> list[float]:
    losses = []
    for step in steps:
        ids = torch.randint(0, 11, (16,), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(net(ids), (ids + 3) % 11)
        update.backward(loss)
        update.step(rate)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", NAMES)
def test_it_learns(name: str) -> None:
    net, update, _ = made(name)
    losses = train(net, update, RATES[name], range(60))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", NAMES)
def test_it_updates_every_parameter_with_the_learning_rate_it_is_given(name: str) -> None:
    net, update, _ = made(name)
    before = {key: p.detach().clone() for key, p in net.named_parameters()}
    train(net, update, 0.0, range(2))
    assert all(torch.equal(before[key], p) for key, p in net.named_parameters())
    train(net, update, RATES[name], range(2))
    assert not any(torch.equal(before[key], p) for key, p in net.named_parameters())


def test_classes_and_settings() -> None:
    net = network()
    for name, kind in (("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam)):
        built = optimizer.build(groups(net), net, settings(name, beta1=0.8, beta2=0.7, eps=1e-3))
        assert type(built) is kind
        assert [g["weight_decay"] for g in built.param_groups] == [0.1, 0.0]
        for group in built.param_groups:
            assert (group["betas"], group["eps"], group["fused"]) == ((0.8, 0.7), 1e-3, True)
    sgd = optimizer.build(groups(net), net, settings("sgd", beta1=0.6))
    assert type(sgd) is torch.optim.SGD
    assert all(group["momentum"] == 0.6 and group["fused"] for group in sgd.param_groups)


# --------------------------------------------------------------------------------------------------------------- muon


def muon_names(net: nn.Module, built: MuonAndAdamW) -> set[str]:
    chosen = {id(p) for group in built.param_groups if group["muon"] for p in group["params"]}
    return {name for name, p in net.named_parameters() if id(p) in chosen}


def test_muon_takes_the_hidden_matrices_and_nothing_else() -> None:
    net = network()
    built = optimizer.build(groups(net), net, settings("muon"))
    assert isinstance(built, MuonAndAdamW)
    assert muon_names(net, built) == {"hidden.weight", "back.weight"}
    together = [p for group in built.param_groups for p in group["params"]]
    assert len(together) == len({id(p) for p in together}) == len(list(net.parameters()))
    decay = {id(p): group["weight_decay"] for group in built.param_groups for p in group["params"]}
    assert all(decay[id(p)] == (0.1 if p.ndim >= 2 else 0.0) for p in net.parameters())


def test_muon_takes_the_hidden_matrices_of_gpt2() -> None:
    """Its matrices are transformers' Conv1D, not nn.Linear: they must be found all the same."""
    net = build_gpt2(50, 0, max_length=8, d_model=16, num_layers=2, num_heads=2, d_ff=32, dropout=0.0)
    built = optimizer.build(Gpt2Wikitext().parameter_groups(net, Config()), net, settings("muon"))
    inner = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert muon_names(net, built) == {f"transformer.h.{i}.{name}.weight" for i in range(2) for name in inner}


def test_a_muon_step_is_orthogonal() -> None:
    """What makes it Muon: all singular values of the update are about the same (Jordan et al. 2024)."""
    net, update, _ = made("muon", weight_decay=0.0)
    for group in update.optimizer.param_groups:
        group["weight_decay"] = 0.0
    before = net.hidden.weight.detach().clone()
    train(net, update, 0.01, [0])
    values = torch.linalg.svdvals(net.hidden.weight.detach() - before)
    assert values.min() > 0.4 * values.max()


# --------------------------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize(("name", "beta1"), [*((name, 0.9) for name in NAMES), ("sgd", 0.0)])
def test_moments_names_all_that_is_kept(name: str, beta1: float) -> None:
    net, update, _ = made(name, beta1=beta1)
    train(net, update, RATES[name], range(2))
    kept = {key for state in update.optimizer.state.values() for key, value in state.items() if isinstance(value, Tensor)}
    assert kept - {"step"} == set(optimizer.moments(name, beta1))


@pytest.mark.parametrize(("name", "beta1"), [*((name, 0.9) for name in NAMES), ("sgd", 0.0)])
def test_it_goes_on_from_saved_state_bit_for_bit(name: str, beta1: float) -> None:
    net, update, _ = made(name, beta1=beta1)
    train(net, update, RATES[name], range(6))
    straight = {key: value.clone() for key, value in net.state_dict().items()}

    net, update, state = made(name, beta1=beta1)
    train(net, update, RATES[name], range(3))
    weights = {entry.name: entry.read().clone() for entry in state.model_entries()}
    saved = {entry.name: entry.read().clone() for entry in state.optimizer_entries()}
    for entry in [*state.model_entries(), *state.optimizer_entries()]:
        tensor = {**weights, **saved}[entry.name]
        assert entry.shape == tuple(tensor.shape)
        assert entry.dtype == tensor.dtype
        assert entry.size_bytes == tensor.numel() * tensor.element_size()
    train(net, update, RATES[name], range(3, 6))

    net, update, state = made(name, beta1=beta1)
    with torch.no_grad():
        for key, p in net.named_parameters():
            p.copy_(weights[key])
    state.restore_optimizer(set(saved), saved.__getitem__)
    train(net, update, RATES[name], range(3, 6))
    for key, value in net.state_dict().items():
        assert torch.equal(value, straight[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_names_in_a_checkpoint(name: str) -> None:
    net, update, state = made(name)
    assert STEP in {entry.name for entry in state.optimizer_entries()}
    assert not any(entry.read().any() for entry in state.optimizer_entries())
    train(net, update, RATES[name], range(2))
    names = [entry.name for entry in state.optimizer_entries()]
    parameters = [key for key, _ in net.named_parameters()]
    assert "lm_head.weight" not in parameters
    assert len(names) == len(set(names))
    muon = {"hidden.weight", "back.weight"}
    for key in parameters:
        own = {n.partition(".")[0] for n in names if n.partition(".")[2] == key}
        adam = {"exp_avg", "exp_avg_sq"}
        assert own == ({"momentum_buffer"} if name == "sgd" or (name == "muon" and key in muon) else adam), key
    assert [entry.name for entry in state.model_entries()] == [*parameters, "offset"]


def test_the_step_count_is_the_optimizers_own() -> None:
    net, update, state = made("adamw")
    train(net, update, 0.01, range(3))
    update.backward(net(torch.arange(4)).sum() * float("nan"))
    update.step(0.01)
    counts = {entry.name: entry for entry in state.optimizer_entries()}
    assert counts[STEP].read() == 3.0
    net, update, state = made("adamw")
    saved = {name: entry.read() for name, entry in counts.items()}
    state.restore_optimizer(set(saved), saved.__getitem__)
    assert {float(own["step"]) for own in update.optimizer.state.values()} == {3.0}
