"""The Transformer LM from folders of Llama's, SmolLM's and Qwen3's shape: their logits, and what cannot be ours is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scenarios import planned

from recipes.models.llama_form import NAMES, by_halves, by_pairs, our_name, their_name
from recipes.tinystories_lm import TinyStoriesLM
from trainer.checkpoints.network import build_empty_network, first_weights
from trainer.checkpoints.pretrained import stored_tensors
from trainer.distributed.launch import alone
from trainer.errors import UserError
from trainer.initial_weights import fill

RECIPE = TinyStoriesLM()
SIZES = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"max_position_embeddings": 40, "initializer_range": 0.2}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rope_theta": 500.0, "rms_norm_eps": 1e-3},
    "smollm": {"model_type": "llama", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False},
}


@pytest.fixture(params=SHAPES)
def theirs(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """(the network of transformers, the folder it is saved in)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SIZES | SHAPES[request.param])).eval()
    for p in network.parameters():
        if p.ndim == 1:  # trained norms are not ones
            torch.nn.init.uniform_(p, 0.5, 1.5)
    network.save_pretrained(tmp_path)
    return network, tmp_path


@torch.no_grad()
def test_it_begins_with_their_logits(theirs: Any) -> None:
    network, folder = theirs
    config = planned(RECIPE, ["--init_from", str(folder), "--context_length", "24"])
    assert config.model.context_length == 24
    empty, initial = build_empty_network(RECIPE, config, None)  # type: ignore[arg-type]
    fill(empty, first_weights(RECIPE, empty, initial, None, str(folder), alone().control, lambda _: None), torch.device("cpu"))
    tokens = torch.arange(48).view(2, 24)
    expected = network(tokens).logits
    assert float(expected.std()) > 0.1
    assert torch.allclose(empty(tokens), expected, atol=1e-4)  # type: ignore[operator]


def test_rows_are_read_alone_in_our_order(theirs: Any) -> None:
    folder = theirs[1]
    config = planned(RECIPE, ["--init_from", str(folder)])
    empty, initial = build_empty_network(RECIPE, config, None)  # type: ignore[arg-type]
    named = RECIPE.pretrained(str(folder), empty, initial)
    for name in ("layers.0.attn.q_proj.weight", "layers.1.attn.k_proj.weight", "layers.0.attn.v_proj.weight"):
        whole = named[name].read(slice(None))
        for rows in (slice(3, 9), slice(0, 1), slice(7, len(whole))):
            assert named[name].read(rows).equal(whole[rows])
        moved = not whole.equal(stored_tensors(str(folder))[their_name(name)].read(slice(None)))
        assert moved == ("v_proj" not in name)


def test_names_and_rows_go_there_and_back() -> None:
    names = [f"layers.3{part}.weight" for part in NAMES if part.startswith(".") and part != ".attn."]
    for name in (*names, "layers.0.attn.q_proj.weight", "token_embeddings.weight", "ln_final.weight", "lm_head.weight"):
        assert our_name(their_name(name)) == name
    weight = torch.arange(24.0).view(12, 2)
    assert by_halves(weight, 6)[:, 0].tolist() == [0, 4, 8, 2, 6, 10, 12, 16, 20, 14, 18, 22]
    assert by_pairs(by_halves(weight, 6), 6).equal(weight)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', and this network has 'silu' alone"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type is 'linear'"),
        ({"model_type": "gpt2"}, "model_type is 'gpt2', and this network can be llama or qwen3 alone"),
    ],
)
def test_what_the_network_has_not_is_refused_by_name(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SIZES | SHAPES["llama"] | change))
    with pytest.raises(UserError, match=words):
        planned(RECIPE, ["--init_from", str(tmp_path)])


def test_a_contradicting_flag_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SIZES | SHAPES["smollm"]))
    with pytest.raises(UserError, match=r"num_kv_heads: .* has 2, asked for 4"):
        planned(RECIPE, ["--init_from", str(tmp_path), "--num_kv_heads", "4"])
