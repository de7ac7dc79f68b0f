"""Optimizers by name: they learn, list their whole state, and resume from it bit for bit."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from small_checkpoints import saved
from torch import Tensor, nn

from recipes.gpt2_wikitext import Config, Gpt2Wikitext
from recipes.models.gpt2 import build_gpt2
from trainer.backends.plain import PlainBackend
from trainer.backends.tensors import elementwise_initial_state, state_layout, whole_entries
from trainer.checkpoints.network import optimizer_fits
from trainer.command_line.sections import Optimisation
from trainer.distributed.launch import connect
from trainer.errors import CHECKPOINT, UserError
from trainer.optimisation import optimizers as optimizer
from trainer.optimisation.averages import keep_averages
from trainer.optimisation.optimizers import MuonAndAdamW

NAMES = get_args(get_type_hints(Optimisation)["optimizer"])
ONE = torch.ones(())
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

    def embeddings_and_heads(self) -> list[nn.Parameter]:
        return [self.embed.weight]

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


class Saved(dict[str, Tensor]):
    """A checkpoint's optimizer tensors."""

    def names(self, stem: str) -> set[str]:
        return set(self)

    def tensor(self, stem: str, name: str) -> Tensor:
        return self[name]


def built(net: Tied, chosen: Optimisation) -> torch.optim.Optimizer:
    made = optimizer.build(groups(net), net, chosen)
    return keep_averages(made, chosen.ema) if chosen.ema else made


def make_backend(name: str, **changes: float) -> tuple[Tied, PlainBackend]:
    net, chosen = network(), settings(name, **changes)
    backend = PlainBackend(connect("cpu", 1.0), "no", "no", chosen)
    backend.prepare(net, net, lambda: built(net, chosen))
    return net, backend


def train(net: nn.Module, update: PlainBackend, rate: float, steps: Iterable[int]) -> list[float]:
    losses = []
    for step in steps:
        ids = torch.randint(0, 11, (16,), generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(net(ids), (ids + 3) % 11)
        update.backward(loss, ONE)
        update.step(rate)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", NAMES)
def test_it_learns(name: str) -> None:
    net, update = make_backend(name)
    losses = train(net, update, RATES[name], range(60))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", NAMES)
def test_it_updates_every_parameter_with_the_learning_rate_it_is_given(name: str) -> None:
    net, update = make_backend(name)
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
    assert not sgd.state  # nothing of the size of the whole model before a backend has cut it


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
    """Its matrices are transformers' Conv1D, not nn.Linear: they must be recognised too."""
    net = build_gpt2(50, 0, max_length=8, d_model=16, num_layers=2, num_heads=2, d_ff=32, dropout=0.0)
    built = optimizer.build(Gpt2Wikitext().parameter_groups(net, Config()), net, settings("muon"))
    inner = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert muon_names(net, built) == {f"transformer.h.{i}.{name}.weight" for i in range(2) for name in inner}


def test_a_muon_step_is_orthogonal() -> None:
    """What makes it Muon: all singular values of the update are about the same (Jordan et al. 2024)."""
    net, update = make_backend("muon", weight_decay=0.0)
    for group in update.optimizer.param_groups:
        group["weight_decay"] = 0.0
    before = net.hidden.weight.detach().clone()
    train(net, update, 0.01, [0])
    values = torch.linalg.svdvals(net.hidden.weight.detach() - before)
    assert values.min() > 0.4 * values.max()


# --------------------------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize(("name", "beta1"), [*((name, 0.9) for name in NAMES if name != "muon"), ("sgd", 0.0)])
def test_the_state_of_an_optimizer_is_known_before_its_first_step(name: str, beta1: float) -> None:
    net, update = make_backend(name, beta1=beta1)
    initial = elementwise_initial_state(update.optimizer, net.gain)
    train(net, update, RATES[name], range(2))
    for p, state in update.optimizer.state.items():
        kept = {key: value for key, value in state.items() if value is not None}
        assert initial.keys() == kept.keys()
        assert all((initial[key].shape == ()) == (value.shape != p.shape) for key, value in kept.items())
        assert not any(value.any() for value in initial.values())


@pytest.mark.parametrize(("name", "beta1", "ema"), [*((name, 0.9, 0.8) for name in NAMES), ("sgd", 0.0, 0.0)])
def test_it_goes_on_from_saved_state_bit_for_bit(name: str, beta1: float, ema: float) -> None:
    net, update = make_backend(name, beta1=beta1, ema=ema)
    train(net, update, RATES[name], range(6))
    update.use_averages(bool(ema))
    straight = {key: value.clone() for key, value in net.state_dict().items()}

    net, update = make_backend(name, beta1=beta1, ema=ema)
    train(net, update, RATES[name], range(3))
    weights = {entry.name: entry.read(0).clone() for entry in update.model_tensors()}
    saved = {entry.name: entry.read(0).clone() for entry in update.optimizer_tensors()}
    for entry in [*update.model_tensors(), *update.optimizer_tensors()]:
        tensor = {**weights, **saved}[entry.name]
        assert entry.shape == tuple(tensor.shape)
        assert entry.dtype == tensor.dtype
        assert entry.size_bytes == tensor.numel() * tensor.element_size()
    train(net, update, RATES[name], range(3, 6))

    net, update = make_backend(name, beta1=beta1, ema=ema)
    with torch.no_grad():
        for key, p in net.named_parameters():
            p.copy_(weights[key])
    update.restore(Saved(saved), with_optimizer=True)
    train(net, update, RATES[name], range(3, 6))
    update.use_averages(bool(ema))
    for key, value in net.state_dict().items():
        assert torch.equal(value, straight[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_names_in_a_checkpoint(name: str) -> None:
    net, update = make_backend(name)
    assert not any(entry.read(0).any() for entry in update.optimizer_tensors())
    train(net, update, RATES[name], range(2))
    names = [entry.name for entry in update.optimizer_tensors()]
    parameters = [key for key, _ in net.named_parameters()]
    assert "lm_head.weight" not in parameters
    assert len(names) == len(set(names))
    muon = {"hidden.weight", "back.weight"}
    for key in parameters:
        own = {n.partition(".")[0] for n in names if n.partition(".")[2] == key}
        adam = {"exp_avg", "exp_avg_sq"}
        assert own == ({"momentum_buffer"} if name == "sgd" or (name == "muon" and key in muon) else adam), key
    assert [entry.name for entry in update.model_tensors()] == [*parameters, "offset"]


def test_the_step_count_is_the_optimizers_own() -> None:
    net, update = make_backend("adamw")
    train(net, update, 0.01, range(3))
    update.backward(net(torch.arange(4)).sum() * float("nan"), ONE)
    update.step(0.01)
    counts = {entry.name: entry for entry in update.optimizer_tensors()}
    assert counts["step"].read(0) == 3.0
    net, update = make_backend("adamw")
    saved = {name: entry.read(0) for name, entry in counts.items()}
    update.restore(Saved(saved), with_optimizer=True)
    assert {float(own["step"]) for own in update.optimizer.state.values()} == {3.0}


@pytest.mark.parametrize("name", NAMES)
def test_the_layout_of_the_state_is_that_of_what_is_saved(name: str) -> None:
    net, update = make_backend(name)
    train(net, update, RATES[name], range(2))
    entries = {entry.name: (entry.shape, entry.dtype) for entry in update.optimizer_tensors()}
    layout = update.state_layout
    tensors = {f"{key}.{parameter}": form for parameter, own in layout.tensors.items() for key, form in own.items()}
    counts = {key: form for own in layout.counts.values() for key, form in own.items()}
    assert entries.keys() == (tensors | counts).keys()
    assert all(form.fits(*entries[key]) for key, form in (tensors | counts).items())


def test_sizes_of_the_state_are_told_from_those_of_the_parameter() -> None:
    """Adafactor keeps a row and a column for a matrix."""
    net = nn.Linear(30, 40)
    layout = state_layout(torch.optim.Adafactor(net.parameters()), net)
    assert {key: form.shape for key, form in layout.tensors["weight"].items()} == {"row_var": (40, 1), "col_var": (1, 30)}


WRONG_STATE = {
    "one number": (lambda t: t | {"exp_avg.hidden.weight": torch.zeros(1)}, r"exp_avg.hidden.weight: \(1,\) instead of"),
    "transposed": (lambda t: t | {"exp_avg.hidden.weight": torch.zeros(8, 12)}, r"\(8, 12\) instead of \(12, 8\)"),
    "emptied": (lambda t: t | {"exp_avg.hidden.weight": torch.zeros(0)}, r"\(0,\) instead of"),
    "halved": (lambda t: t | {"exp_avg.hidden.weight": torch.zeros(12, 8).half()}, r"\(12, 8\) float16 instead of"),
    "missing": (lambda t: {k: v for k, v in t.items() if k != "exp_avg.hidden.weight"}, "missing instead of"),
    "all of one missing": (lambda t: {k: v for k, v in t.items() if not k.endswith("hidden.weight")}, "missing"),
    "all missing": (lambda t: {}, "and .* more"),
    "no count": (lambda t: {k: v for k, v in t.items() if k != "step"}, "step: missing"),
    "another's": (lambda t: t | {"exp_avg.nobody": torch.zeros(1)}, "exp_avg.nobody: not in this model"),
    "count as integer": (lambda t: t | {"step": torch.tensor(3)}, r"step: \(\) int64 instead of"),
    "count too high": (lambda t: t | {"step": torch.tensor(1e9)}, "step: 1e[+]09 of 3 steps"),
    "count in between": (lambda t: t | {"step": torch.tensor(1.5)}, "step: 1.5 of 3 steps"),
    "count not finite": (lambda t: t | {"step": torch.tensor(float("nan"))}, "NaN or infinity in step"),
}


@pytest.mark.parametrize("case", WRONG_STATE)
def test_state_of_the_same_optimizer_that_does_not_fit_is_refused(case: str, tmp_path: Path) -> None:
    """With a manifest that matches: so another program, or a bug, has written it. It once ended with SIGSEGV."""
    change, message = WRONG_STATE[case]
    net, update = make_backend("adamw")
    train(net, update, 0.01, range(3))
    kept = {entry.name: entry.read(0).clone() for entry in update.optimizer_tensors()}
    assert optimizer_fits(saved(update, tmp_path, 3), update.state_layout)
    update.optimizer_tensors = lambda: whole_entries(change(kept))  # type: ignore[method-assign]
    wrong = saved(update, tmp_path / "wrong", 3)
    wrong.state["parameters_without_state"].clear()
    with pytest.raises(UserError, match=message) as caught:
        optimizer_fits(wrong, update.state_layout)
    assert caught.value.exit_code == CHECKPOINT


@pytest.mark.parametrize(
    ("key", "number", "message"),
    [
        ("exp_avg", float("inf"), "holds NaN or infinity in exp_avg[.]"),
        ("exp_avg_sq", float("nan"), "holds NaN or infinity in exp_avg_sq[.]"),
        ("exp_avg_sq", -1e-9, "holds numbers below 0 in exp_avg_sq[.]"),  # its root would make the weights NaN
    ],
)
def test_moments_that_no_optimizer_can_have_are_refused(tmp_path: Path, key: str, number: float, message: str) -> None:
    net, update = make_backend("adamw")
    train(net, update, 0.01, range(3))
    next(iter(update.optimizer.state.values()))[key][0] = number
    checkpoint = saved(update, tmp_path, 3)
    assert optimizer_fits(checkpoint, update.state_layout)
    with pytest.raises(UserError, match=message):
        update.restore(checkpoint, with_optimizer=True)


def test_a_parameter_that_was_never_used_has_no_state_and_needs_none(tmp_path: Path) -> None:
    net, update = make_backend("adamw")
    net.offset_of_nothing = nn.Parameter(torch.zeros(3))
    update.prepare(net, net, lambda: optimizer.build(groups(net), net, settings("adamw")))
    train(net, update, 0.01, range(3))
    checkpoint = saved(update, tmp_path, 3)
    assert checkpoint.state["parameters_without_state"] == ["offset_of_nothing"]
    assert optimizer_fits(checkpoint, update.state_layout)
    update.restore(checkpoint, with_optimizer=True)
    train(net, update, 0.01, range(3, 4))


# ----------------------------------------------------------------------------------------------- a recipe's own optimizer


def test_any_optimizer_goes_on_from_saved_state_bit_for_bit() -> None:
    """Any kind of state is saved: tensors of other shapes, counts that are numbers, and counts that are tensors."""

    class Odd(torch.optim.Optimizer):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    state = self.state[p]
                    if not state:
                        state |= {"taken": 0, "decay": 1.0, "seen": torch.tensor(0.0), "row": torch.zeros(p.shape[0])}
                    state["taken"] += 1
                    state["decay"] *= 0.9
                    state["seen"] += 1
                    state["row"] += p.grad.flatten(1).sum(1) if p.ndim > 1 else p.grad
                    row = state["row"].view(-1, *[1] * (p.ndim - 1))
                    p.data -= group["lr"] * state["decay"] / (state["taken"] + state["seen"]) * (p.grad + row)

    def make_odd_backend() -> tuple[Tied, PlainBackend]:
        net = network()
        backend = PlainBackend(connect("cpu", 1.0), "no", "no", settings("sgd"))
        backend.prepare(net, net, lambda: Odd(net.parameters(), {"lr": 0.1}))
        return net, backend

    net, backend = make_odd_backend()
    train(net, backend, 0.1, range(6))
    straight = {key: value.clone() for key, value in net.state_dict().items()}
    net, backend = make_odd_backend()
    train(net, backend, 0.1, range(3))
    weights = {entry.name: entry.read(0).clone() for entry in backend.model_tensors()}
    saved = {entry.name: entry.read(0).to(entry.dtype).clone() for entry in backend.optimizer_tensors()}
    assert {"taken", "decay", "seen", "row.embed.weight"} <= set(saved)
    net, backend = make_odd_backend()
    with torch.no_grad():
        for key, p in net.named_parameters():
            p.copy_(weights[key])
    backend.restore(Saved(saved), with_optimizer=True)
    assert all(isinstance(own["taken"], int) and isinstance(own["decay"], float) for own in backend.optimizer.state.values())
    train(net, backend, 0.1, range(3, 6))
    assert all(torch.equal(value, straight[key]) for key, value in net.state_dict().items())


def reloaded(backend: PlainBackend, make: Callable[[], PlainBackend], folder: Path, kept: bool = True) -> PlainBackend:
    """Another backend that goes on from this one's state, optimizer and weights."""
    checkpoint, other = saved(backend, folder, 3), make()
    with torch.no_grad():
        for name, p in other.network.named_parameters():
            p.copy_(checkpoint.tensor("model", name))
    assert optimizer_fits(checkpoint, other.state_layout) == kept
    other.restore(checkpoint, with_optimizer=kept)
    return other


class Scaled(nn.Module):
    """With a parameter that has no dimension, as a logit scale has none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale, self.layer = nn.Parameter(torch.tensor(1.5)), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_parameter_without_dimensions_keeps_its_own_state(name: str, tmp_path: Path) -> None:
    def make() -> PlainBackend:
        net, chosen = Scaled(), settings(name)
        backend = PlainBackend(connect("cpu", 1.0), "no", "no", chosen)
        backend.prepare(net, net, lambda: optimizer.build(optimizer.decay_groups(net, 0.1), net, chosen))
        return backend

    def steps(backend: PlainBackend, numbers: Iterable[int]) -> None:
        for number in numbers:
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(number))
            backend.backward(backend.model(x).square().mean(), ONE)
            backend.step(0.05)

    straight, halfway = make(), make()
    steps(straight, range(6))
    steps(halfway, range(3))
    resumed = reloaded(halfway, make, tmp_path)
    steps(resumed, range(3, 6))
    for one, two in zip(straight.network.parameters(), resumed.network.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("before", "after", "kept"), [("sgd", "adamw", False), ("muon", "adam", False), ("adam", "adamw", True)]
)
def test_the_state_of_another_optimizer_is_left_out(before: str, after: str, kept: bool, tmp_path: Path) -> None:
    net, first = make_backend(before)
    train(net, first, RATES[before], range(2))
    second = reloaded(first, lambda: make_backend(after)[1], tmp_path, kept)
    hidden = second.network.hidden.weight
    assert (hidden in second.optimizer.state) == kept
    train(second.network, second, RATES[after], range(2))
    keys = {entry.name.partition(".")[0] for entry in second.optimizer_tensors()}
    assert keys == {"exp_avg", "exp_avg_sq", "step"}


@pytest.mark.parametrize("name", ["NAdam", "Rprop", "ASGD", "Adafactor"])
def test_an_optimizer_whose_state_cannot_be_cut_is_refused_for_sharding(name: str) -> None:
    net = network()
    with pytest.raises(UserError, match=rf"optimizer {name} .*DDP"):
        elementwise_initial_state(getattr(torch.optim, name)(net.parameters(), lr=0.01), net.gain)
