"""The Transformer of tinystories_lm: its parts against direct references, its ablations, and generation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recipes.models.causal_attention import causal_attention
from recipes.models.transformer_lm import (
    TransformerLM,
    generate,
    nucleus,
    rms_norm,
    rope_angles,
    rotate,
)
from recipes.tinystories_lm import Config, OptimisationConfig, TinyStoriesLM

RECIPE = TinyStoriesLM()
SIZES = {"vocab_size": 50, "context_length": 16, "d_model": 32, "num_heads": 4, "d_ff": 48, "num_layers": 2}


def small(**changed: Any) -> TransformerLM:
    torch.manual_seed(0)
    return TransformerLM(**{**SIZES, **changed})


def test_rotation_is_multiplication_by_complex_numbers() -> None:
    torch.manual_seed(0)
    x, theta = torch.randn(3, 4, 20, 8, dtype=torch.float64), 100.0
    positions = torch.tensor([0, 1, 2, 7, 900, *range(50, 65)])
    turned = rotate(x, rope_angles(positions, 8, theta).double())
    as_complex = torch.complex(x[..., 0::2], x[..., 1::2])
    for i in range(4):
        turn = torch.exp(1j * positions.double() * theta ** (-2 * i / 8))
        assert torch.allclose(torch.complex(turned[..., 2 * i], turned[..., 2 * i + 1]), as_complex[..., i] * turn, atol=1e-4)
    assert torch.equal(turned[:, :, 0], x[:, :, 0])


def test_scores_of_rotated_vectors_depend_on_distance_alone() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 16)
    near = [rotate(v, rope_angles(torch.tensor([p]), 16, 10_000.0)) for v, p in ((q, 5), (k, 3))]
    far = [rotate(v, rope_angles(torch.tensor([p]), 16, 10_000.0)) for v, p in ((q, 205), (k, 203))]
    assert float((near[0] * near[1]).sum()) == pytest.approx(float((far[0] * far[1]).sum()), abs=1e-4)
    assert abs(float((near[0] * k).sum()) - float((near[0] * near[1]).sum())) > 1e-2


def test_norm_and_attention_against_their_formulas() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 8), torch.randn(8)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    assert torch.allclose(rms_norm(x, weight), expected, atol=1e-6)
    large = (300 * x).half()  # squares overflow fp16: the norm is computed in fp32
    assert torch.isfinite(rms_norm(large, weight)).all()
    assert rms_norm(large, weight).dtype == torch.float16

    q, k, v = torch.randn(3, 2, 5, 8)
    scores = (q @ k.transpose(-1, -2) / math.sqrt(8)).masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    assert torch.allclose(causal_attention(q, k, v), scores.softmax(-1) @ v, atol=1e-6)


def test_the_network_is_its_formula() -> None:
    """Written out for one sequence with the weights by their public names."""
    network = small()
    w, tokens = network.state_dict(), torch.randint(50, (16,))
    x = w["token_embeddings.weight"][tokens]
    angles = rope_angles(torch.arange(16), 8, 10_000.0)
    for i in range(2):
        p = f"layers.{i}"
        n = rms_norm(x, w[f"{p}.ln1.weight"])
        q, k, v = ((n @ w[f"{p}.attn.{name}_proj.weight"].T).view(16, 4, 8).transpose(0, 1) for name in "qkv")
        heads = causal_attention(rotate(q, angles), rotate(k, angles), v)
        x = x + heads.transpose(0, 1).flatten(1) @ w[f"{p}.attn.output_proj.weight"].T
        n = rms_norm(x, w[f"{p}.ln2.weight"])
        a = n @ w[f"{p}.ffn.w1.weight"].T
        x = x + (a * a.sigmoid() * (n @ w[f"{p}.ffn.w3.weight"].T)) @ w[f"{p}.ffn.w2.weight"].T
    logits = rms_norm(x, w["ln_final.weight"]) @ w["lm_head.weight"].T
    assert torch.allclose(network(tokens[None])[0], logits, atol=1e-5)
    assert len(w) == 2 * 9 + 3
    assert not any(name.endswith("bias") for name in w)


@pytest.mark.parametrize(
    ("sizes", "parameters"),
    [
        ({"d_model": 512, "num_heads": 8, "d_ff": 2048, "num_layers": 6}, 35_412_480),
        ({"d_model": 512, "num_heads": 16, "d_ff": 1344, "num_layers": 4}, 22_696_448),
    ],
    ids=["default", "CS336"],
)
def test_parameter_counts(sizes: dict[str, int], parameters: int) -> None:
    with torch.device("meta"):
        network = TransformerLM(vocab_size=10_000, context_length=256, **sizes)
    assert sum(p.numel() for p in network.parameters()) == parameters
    d, layers = sizes["d_model"], sizes["num_layers"]
    products = layers * (4 * d * d + 3 * d * sizes["d_ff"]) + 10_000 * d
    assert network.training_flops_per_token() == 6 * products + 12 * layers * d * 256


def test_fresh_weights_are_truncated_normals() -> None:
    network = small(d_model=256, d_ff=512, vocab_size=2000)
    for module in network.modules():
        if isinstance(module, nn.Linear):
            std = math.sqrt(2 / (module.in_features + module.out_features))
            assert float(module.weight.detach().std()) == pytest.approx(
                0.9866 * std, rel=0.02
            )  # of a normal cut at three deviations
            assert float(module.weight.detach().abs().max()) <= 3 * std
    embedding = network.token_embeddings.weight.detach()
    assert float(embedding.std()) == pytest.approx(0.9866, rel=0.02)
    assert 2.5 < float(embedding.abs().max()) <= 3
    assert all(torch.equal(p, torch.ones_like(p)) for p in network.parameters() if p.ndim == 1)


ABLATIONS = {
    "post-norm": {"norm_position": "post"},
    "no rope": {"rope": False},
    "silu": {"ffn": "silu"},
    "tied": {"tie_embeddings": True},
    "qk norm": {"qk_norm": True},
}


@pytest.mark.parametrize("name", ["none", *ABLATIONS])
def test_no_position_sees_what_comes_after_it(name: str) -> None:
    network, tokens = small(**ABLATIONS.get(name, {})), torch.randint(50, (1, 16))
    changed = tokens.clone()
    changed[0, 9:] = (changed[0, 9:] + 1) % 50
    before, after = network(tokens), network(changed)
    assert torch.allclose(before[:, :9], after[:, :9], atol=1e-6)
    assert not torch.allclose(before[:, 9:], after[:, 9:], atol=1e-2)


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_changes_what_it_names(name: str) -> None:
    plain, network, tokens = small(), small(**ABLATIONS[name]), torch.randint(50, (2, 16))
    assert not torch.allclose(plain(tokens), network(tokens), atol=1e-3)
    gone = {n.removeprefix("layers.0.") for n in plain.state_dict().keys() - network.state_dict().keys() if "layers.1" not in n}
    new = {n.removeprefix("layers.0.") for n in network.state_dict().keys() - plain.state_dict().keys() if "layers.1" not in n}
    expected = {"post-norm": {"ln_final.weight"}, "silu": {"ffn.w3.weight"}}.get(name, set())
    assert gone == expected
    assert new == ({"attn.q_norm.weight", "attn.k_norm.weight"} if name == "qk norm" else set())
    if name == "no rope":  # the same token everywhere: without positions all places give the same
        same = network(torch.full((1, 16), 7))
        assert torch.allclose(same[:, :1].expand_as(same), same, atol=1e-5)
        turned = plain(torch.tensor([[3, 7, 7, 7]]))[0, 1:]
        assert not torch.allclose(turned[:1].expand_as(turned), turned, atol=1e-4)
    if name == "tied":
        assert network.token_embeddings.weight is network.lm_head.weight
        assert float(network(tokens).detach().std()) < 3


def test_post_norm_ends_every_block_in_a_norm() -> None:
    network, seen = small(norm_position="post"), []
    network.layers[-1].register_forward_hook(lambda m, i, o: seen.append(o))
    network(torch.randint(50, (2, 16)))
    assert torch.allclose(seen[0].square().mean(-1), torch.ones(2, 16), atol=1e-3)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"d_model 32 does not divide into 5 heads.*--num_heads"):
        small(num_heads=5)
    with pytest.raises(ValueError, match=r"heads of 1 .*--no_rope"):
        small(num_heads=32)
    small(num_heads=32, rope=False)


def test_decay_spares_norms_and_embeddings_unless_decay_all() -> None:
    def decayed(network: TransformerLM, decay_all: bool) -> set[str]:
        names = {id(p): name for name, p in network.named_parameters()}
        config = Config(optimisation=OptimisationConfig(weight_decay=0.1, decay_all=decay_all))
        groups = RECIPE.parameter_groups(network, config)
        assert sorted(id(p) for g in groups for p in g["params"]) == sorted(names)
        return {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}

    matrices = {name for name, p in small().named_parameters() if p.ndim == 2}
    assert decayed(small(), False) == matrices - {"token_embeddings.weight"}
    assert decayed(small(), True) == dict(small().named_parameters()).keys()
    assert "token_embeddings.weight" not in decayed(small(tie_embeddings=True), False)


@pytest.mark.parametrize("tied", [False, True])
def test_muon_takes_the_matrices_of_the_layers_and_adamw_the_rest(tied: bool) -> None:
    network = small(tie_embeddings=tied, qk_norm=True)
    optimizer = RECIPE.optimizer(network, Config(optimisation=OptimisationConfig(optimizer="muon")))
    names = {id(p): name for name, p in network.named_parameters()}
    by_muon = {names[id(p)] for g in optimizer.param_groups if g["muon"] for p in g["params"]}
    parts = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.output_proj", "ffn.w1", "ffn.w2", "ffn.w3")
    assert by_muon == {f"layers.{i}.{part}.weight" for i in range(2) for part in parts}
    assert {names[id(p)] for g in optimizer.param_groups if not g["muon"] for p in g["params"]} == set(names.values()) - by_muon


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_it_learns_a_batch_by_heart(optimizer: str) -> None:
    network = small().train()
    torch.manual_seed(1)
    tokens = torch.randint(50, (4, 17))
    settings = OptimisationConfig(optimizer=optimizer, learning_rate=1e-2, weight_decay=0.0)
    built = RECIPE.optimizer(network, Config(optimisation=settings))
    for _ in range(60):
        loss = RECIPE.loss(network, {"tokens": tokens})["next_token"] / 64
        built.zero_grad()
        loss.backward()
        built.step()
    assert loss.item() < 0.05


# ----------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.1, [2]), (0.5, [2]), (0.51, [2, 0]), (0.75, [2, 0]), (0.76, [2, 0, 3]), (0.875, [2, 0, 3]), (0.9, [2, 0, 3, 1])],
)
def test_the_nucleus_is_the_smallest_set_with_the_mass(top_p: float, kept: list[int]) -> None:
    probabilities = torch.tensor([0.25, 0.0625, 0.5, 0.125, 0.0625])
    cut = nucleus(probabilities, top_p)
    assert set(cut.nonzero().flatten().tolist()) == set(kept)
    assert float(cut.sum()) == pytest.approx(1)
    assert torch.allclose(cut[kept] * probabilities[kept].sum(), probabilities[kept])


def test_the_nucleus_of_many_distributions_is_minimal() -> None:
    torch.manual_seed(0)
    probabilities = torch.randn(200, 30, dtype=torch.float64).mul(2).softmax(-1)
    cut = nucleus(probabilities, 0.8) > 0
    mass = (probabilities * cut).sum(-1)
    least = torch.where(cut, probabilities, torch.inf).amin(-1)
    assert (mass >= 0.8).all()
    assert (mass - least < 0.8).all()
    assert (least >= torch.where(cut, 0.0, probabilities).amax(-1)).all()
    assert nucleus(torch.full((4,), 0.25), 0.5).tolist() == [0.5, 0.5, 0, 0]
    assert torch.equal(nucleus(torch.tensor([0.25, 0.75]), 1.0), torch.tensor([0.25, 0.75]))


class CountsUp(nn.Module):
    """Predicts n + 1 after n, and records its inputs."""

    context_length = 4

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[Tensor] = []

    def forward(self, tokens: Tensor) -> Tensor:
        self.shown.append(tokens)
        return 100.0 * nn.functional.one_hot(tokens + 1, 12).float()


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_generation_sees_the_last_context_and_stops_before_the_end(temperature: float) -> None:
    network: Any = CountsUp()
    assert generate(network, torch.tensor([1, 2]), 7, temperature, 0.9).tolist() == list(range(1, 10))
    assert [shown.shape[1] for shown in network.shown] == [2, 3, 4, 4, 4, 4, 4]
    assert network.shown[-1].tolist() == [[5, 6, 7, 8]]
    assert generate(network, torch.tensor([1]), 9, temperature, 0.9, end_of_text=5).tolist() == [1, 2, 3, 4]


def test_sampling_follows_temperature_and_top_p() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])

    class Fixed(nn.Module):
        context_length = 1

        def forward(self, tokens: Tensor) -> Tensor:
            return logits.expand(1, 1, 4)

    network: Any = Fixed()
    torch.manual_seed(0)
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.8)):
        drawn = generate(network, torch.tensor([0]), 4000, temperature, top_p)[1:].bincount(minlength=4) / 4000
        expected = nucleus((logits / temperature).softmax(-1), top_p)
        assert torch.allclose(drawn, expected, atol=0.03), (temperature, top_p)
