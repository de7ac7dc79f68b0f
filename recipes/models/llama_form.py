"""The Transformer LM to and from the form of Llama and, with norms on queries and keys, Qwen3: config.json, names, row order.

We rotate the rows (2i, 2i + 1) of a head together, as the paper on rotary embeddings does; they rotate (i, i + width / 2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from recipes.models.transformer_lm import TransformerLM

NAMES = {
    "token_embeddings.": "model.embed_tokens.",
    "layers.": "model.layers.",
    ".attn.output_proj": ".self_attn.o_proj",
    ".attn.": ".self_attn.",
    ".ffn.w1": ".mlp.gate_proj",
    ".ffn.w2": ".mlp.down_proj",
    ".ffn.w3": ".mlp.up_proj",
    ".ln1": ".input_layernorm",
    ".ln2": ".post_attention_layernorm",
    "ln_final.": "model.norm.",
}
"""{part of a name of ours: theirs}"""
ROTATED = ("q_proj.weight", "k_proj.weight", "q_norm.weight", "k_norm.weight")


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """{flag: value} of the network that a config.json describes. ValueError, by name, for what the Transformer LM lacks."""
    from transformers import AutoConfig

    kind = config.get("model_type")
    if kind not in ("llama", "qwen3"):
        raise ValueError(f"model_type is {kind!r}, and this network can be llama or qwen3 alone; choose other weights")
    given = AutoConfig.for_model(**config)
    wanted: dict[str, Any] = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0}
    wanted |= {"use_sliding_window": False, "quantization_config": None}
    for name, own in wanted.items():
        if getattr(given, name, own) != own:
            raise ValueError(f"{name} is {getattr(given, name)!r}, and this network has {own!r} alone; choose other weights")
    rope = given.rope_parameters
    if rope["rope_type"] != "default":
        raise ValueError(f"rope_type is {rope['rope_type']!r}, and this network has 'default' alone; choose other weights")
    return {
        "vocab_size": given.vocab_size,
        "context_length": given.max_position_embeddings,
        "d_model": given.hidden_size,
        "num_heads": given.num_attention_heads,
        "num_kv_heads": given.num_key_value_heads,
        "head_dim": given.head_dim,
        "d_ff": given.intermediate_size,
        "num_layers": given.num_hidden_layers,
        "rope_theta": float(rope["rope_theta"]),
        "norm_eps": given.rms_norm_eps,
        "tie_embeddings": given.tie_word_embeddings,
        "qk_norm": kind == "qwen3",
        "norm_position": "pre",
        "rope": True,
        "ffn": "swiglu",
    }


def their_name(name: str) -> str:
    """Llama's name of one of our weights."""
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def our_name(name: str) -> str:
    """Our name of one of Llama's weights."""
    for ours, theirs in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def by_halves(weight: Tensor, width: int) -> Tensor:
    """Our rows in their order: in each head of `width` rows, the even rows before the odd ones."""
    return weight.unflatten(0, (-1, width // 2, 2)).transpose(1, 2).flatten(0, 2)


def by_pairs(weight: Tensor, width: int) -> Tensor:
    """Their rows in our order: the inverse of `by_halves`."""
    return weight.unflatten(0, (-1, 2, width // 2)).transpose(1, 2).flatten(0, 2)


def named_as_ours(network: TransformerLM, stored: Mapping[str, Any]) -> dict[str, Any]:
    """{our name: tensor}, its rows in our order. Tensors have a `shape`, and are read later, by `read(rows)`."""
    width, tied = network.d_head, network.lm_head.weight is network.token_embeddings.weight

    def in_pairs(read: Callable[[slice], Tensor], count: int, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(count)
        first = start // width * width
        return by_pairs(read(slice(first, -(-stop // width) * width)), width)[start - first : stop - first]

    found = {}
    for name, tensor in stored.items():
        if (tied and name == "lm_head.weight") or name.endswith("rotary_emb.inv_freq"):
            continue
        read = partial(in_pairs, tensor.read, tensor.shape[0]) if name.endswith(ROTATED) else tensor.read
        found[our_name(name)] = replace(tensor, read=read)
    return found
