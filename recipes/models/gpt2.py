"""GPT-2 (Radford et al. 2019): learned positions, pre-norm, tanh GELU, tied embeddings. Weights as transformers names them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.models.causal_attention import causal_attention, document_mask
from recipes.models.next_token_loss import Reduction, next_token_loss

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask
    from transformers import GPT2LMHeadModel

INIT_STD = 0.02
SIZES = {"d_model": "n_embd", "num_layers": "n_layer", "num_heads": "n_head", "max_length": "n_positions", "d_ff": "n_inner"}
"""{flag: its name in config.json}"""
RATES = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
PUBLISHED: dict[str, Any] = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
"""settings beside sizes that change the function; this network has these values alone"""
DEFAULTS = {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "n_inner": None, **dict.fromkeys(RATES, 0.1)}
"""what transformers takes where a config.json leaves them out"""


@dataclass(frozen=True)
class Gpt2Config:
    """The configuration of a `Gpt2`, in transformers' words. ValueError where the width does not divide into the heads."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int
    resid_pdrop: float
    embd_pdrop: float
    attn_pdrop: float
    bos_token_id: int
    eos_token_id: int
    activation_function: str = "gelu_pytorch_tanh"
    """published GPT-2s have `gelu_new`, which transformers computes as the same function in seven operations"""

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head:
            raise ValueError(
                f"d_model {self.n_embd} does not divide into {self.n_head} heads; give a --num_heads that divides it"
            )

    @property
    def hidden_size(self) -> int:
        """The width, by the name that DeepSpeed looks for."""
        return self.n_embd

    def to_json_string(self) -> str:
        """The `config.json` of a checkpoint folder, for transformers and tools built on it."""
        named = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "dtype": "float32", "use_cache": True}
        return json.dumps(named | asdict(self), indent=2) + "\n"

    def generation_json(self) -> str:
        """The `generation_config.json` beside it: the token that ends a text, and defaults for sampling."""
        ends = {"bos_token_id": self.bos_token_id, "eos_token_id": self.eos_token_id, "pad_token_id": self.eos_token_id}
        return json.dumps(ends | {"do_sample": True, "temperature": 0.8, "top_p": 0.95}, indent=2) + "\n"


class Projection(nn.Module):
    """x @ weight + bias: a linear layer with its weight as [d_in, d_out], as in GPT-2's checkpoints."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(d_in, d_out)), nn.Parameter(torch.empty(d_out))

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_in] -> [..., d_out]."""
        return F.linear(x, self.weight.T, self.bias)


class Attention(nn.Module):
    """Multi-head causal self-attention."""

    def __init__(self, config: Gpt2Config) -> None:
        super().__init__()
        self.heads, self.dropout, self.resid_dropout = config.n_head, config.attn_pdrop, config.resid_pdrop
        self.c_attn, self.c_proj = Projection(config.n_embd, 3 * config.n_embd), Projection(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, mask: Tensor | BlockMask | None) -> Tensor:
        """[batch, time, width] -> the same."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=-1))
        attended = causal_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        return F.dropout(self.c_proj(attended.transpose(1, 2).flatten(2)), self.resid_dropout, self.training)


class Mlp(nn.Module):
    """Two projections with GELU between them."""

    def __init__(self, config: Gpt2Config) -> None:
        super().__init__()
        self.dropout = config.resid_pdrop
        self.c_fc, self.c_proj = Projection(config.n_embd, config.n_inner), Projection(config.n_inner, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same."""
        return F.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")), self.dropout, self.training)


class Block(nn.Module):
    """Attention and MLP, each behind a norm and around a residual."""

    def __init__(self, config: Gpt2Config) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(config.n_embd), nn.LayerNorm(config.n_embd)
        self.attn, self.mlp = Attention(config), Mlp(config)

    def forward(self, x: Tensor, mask: Tensor | BlockMask | None) -> Tensor:
        """[batch, time, width] -> the same; `mask` as `causal_attention` takes it."""
        x = x + self.attn(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))


class Head(nn.Linear):
    """Hidden states [batch, time, width] -> logits [batch, time, vocab_size]; with labels, the loss instead."""

    def forward(self, hidden: Tensor, labels: Tensor | None = None, reduction: Reduction = "sum") -> Tensor:
        """Logits or loss. The loss is here, not in the model: ZeRO-3 gathers a weight for its own module's forward."""
        return super().forward(hidden) if labels is None else next_token_loss(hidden, self.weight, labels, reduction)


class Gpt2(nn.Module):
    """Ids [batch, time] -> logits [batch, time, vocab_size]; with labels, the summed loss instead."""

    _no_split_modules: ClassVar = ["Block"]
    """classes of the modules that FSDP gathers one at a time; transformers' models have the same attribute"""

    def __init__(self, config: Gpt2Config) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.n_positions, config.n_embd),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd),
            }
        )
        self.lm_head = Head(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight  # type: ignore[assignment]
        self._init_weights()

    def _init_weights(self) -> None:
        """Matrices N(0, 0.02), those into the residual stream 1 / sqrt(2 x layers) of that; biases 0."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(parameter, std=INIT_STD / (2 * self.config.n_layer) ** 0.5 if residual else INIT_STD)

    def embeddings_and_heads(self) -> list[nn.Parameter]:
        """The parameters with a row per token or position, which Muon leaves to AdamW."""
        return [*self.transformer["wte"].parameters(), *self.transformer["wpe"].parameters()]

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        positions: Tensor | None = None,
        reduction: Reduction = "sum",
    ) -> Tensor:
        """Logits; with `labels` [batch, time], which are shifted already, `next_token_loss` instead.

        Attention is causal, so no id attends to padding on its right. `positions` [batch, time], those of ids in their
        documents, keep attention within each document.
        """
        wte, wpe, layers, ln_f = self.transformer.values()
        c, dropout = self.config, self.config.attn_pdrop if self.training else 0.0
        mask = None if positions is None else document_mask(positions, c.n_embd // c.n_head, dropout)
        places = torch.arange(input_ids.shape[1], device=input_ids.device) if positions is None else positions
        x = F.dropout(wte(input_ids) + wpe(places), c.embd_pdrop, self.training)
        for layer in layers:  # type: ignore[attr-defined]
            x = layer(x, mask)
        return self.lm_head(ln_f(x), labels, reduction)

    def training_flops_per_token(self) -> float:
        """Forward and backward FLOPs: 6 per weight in a matrix product, 12 x layers x width x length for attention.

        Kaplan et al. 2020, section 2.1, with the output layer counted and the embedding lookups not; PaLM (2022), appendix B.
        """
        c = self.config
        weights = c.n_layer * (4 * c.n_embd * c.n_embd + 2 * c.n_embd * c.n_inner) + c.vocab_size * c.n_embd
        return 6.0 * weights + 12.0 * c.n_layer * c.n_embd * c.n_positions


def build_gpt2(
    vocab_size: int,
    end_of_text: int,
    *,
    max_length: int,
    d_model: int,
    num_layers: int,
    num_heads: int | None,
    d_ff: int | None,
    dropout: float,
) -> Gpt2:
    """A network of these flags with fresh weights; `num_heads` None means heads of 64, `d_ff` None 4 x d_model."""
    config = Gpt2Config(
        vocab_size=vocab_size,
        n_positions=max_length,
        n_embd=d_model,
        n_layer=num_layers,
        n_head=num_heads or max(1, d_model // 64),
        n_inner=d_ff or 4 * d_model,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )
    return Gpt2(config)


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """{flag: value} of the network that a config.json describes; what it leaves out is as in GPT-2. ValueError, by name, for a
    setting that this network lacks."""
    given = {**PUBLISHED, **DEFAULTS, "model_type": "none", **config}
    if given["activation_function"] == "gelu_pytorch_tanh":  # the same function
        given["activation_function"] = "gelu_new"
    for name, own in PUBLISHED.items():
        if given[name] != own:
            raise ValueError(f"{name} is {given[name]!r}, and this network has {own!r} alone; choose other weights")
    rates = {key: given[key] for key in RATES}
    if len({*rates.values()}) > 1:
        raise ValueError(f"{', '.join(f'{key} is {rate}' for key, rate in rates.items())}, and this network has one dropout")
    sizes = {flag: given[key] for flag, key in SIZES.items()}
    return sizes | {"d_ff": given["n_inner"] or 4 * given["n_embd"], "dropout": given["resid_pdrop"]}


def as_transformers(network: Gpt2) -> GPT2LMHeadModel:
    """transformers' model with the same weights, not copied, for its `generate`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        theirs = GPT2LMHeadModel(GPT2Config(**json.loads(network.config.to_json_string())))
    theirs.load_state_dict(network.state_dict(), assign=True)
    theirs.tie_weights()
    return theirs.eval()
