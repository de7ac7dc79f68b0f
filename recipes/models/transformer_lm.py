"""A decoder-only Transformer: RMSNorm, rotary positions on interleaved pairs, SwiGLU, no biases; ablations by argument.

Weight names are those of Stanford's CS336 course. Each part is a plain function of tensors first, and a module around it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.models.causal_attention import causal_attention, document_mask
from recipes.models.next_token_loss import Reduction, next_token_loss

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

EPS = 1e-5  # of every norm


def rms_norm(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in fp32, in the type of `x`.

    Zhang & Sennrich 2019, eq. 4.
    """
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def rope_angles(positions: Tensor, d_head: int, theta: float) -> Tensor:
    """Angles of rotary embedding, fp32 [*positions, d_head / 2]: position x theta^(-2i / d_head) for pair i.

    Su et al. 2021, section 3.2.2.
    """
    exponents = torch.arange(0, d_head, 2, device=positions.device, dtype=torch.float32) / d_head
    return positions[..., None].float() * theta**-exponents


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn each pair (x[2i], x[2i+1]) of x [..., time, d_head] by its angle [..., time, d_head / 2].

    Su et al. 2021, eq. 34: interleaved pairs, as the paper has them (Llama's checkpoints at the hub pair i with i + d/2).
    """
    cos, sin = angles.cos(), angles.sin()
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


class Linear(nn.Linear):
    """A linear map; initial weights from N(0, 2 / (d_in + d_out)), cut at three standard deviations (Glorot & Bengio 2010)."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out, bias=False)

    def reset_parameters(self) -> None:
        """Draw initial weights."""
        std = math.sqrt(2 / (self.in_features + self.out_features))
        nn.init.trunc_normal_(self.weight, std=std, a=-3 * std, b=3 * std)


class Embedding(nn.Embedding):
    """An embedding; initial weights from N(0, 1), cut at 3."""

    def reset_parameters(self) -> None:
        """Draw initial weights."""
        nn.init.trunc_normal_(self.weight, a=-3, b=3)


class RMSNorm(nn.Module):
    """`rms_norm` with a weight that starts at 1."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width]."""
        return rms_norm(x, self.weight, self.eps)


@dataclass(frozen=True)
class Heads:
    """How many heads of queries, and of keys and values, each shared by several query heads (Ainslie et al. 2023)."""

    queries: int
    keys: int
    width: int
    """of one head"""


class Attention(nn.Module):
    """Multi-head causal self-attention. With `qk_norm`, queries and keys are normalised per head (Henry et al. 2020)."""

    def __init__(self, d_model: int, heads: Heads, qk_norm: bool, eps: float) -> None:
        super().__init__()
        self.heads, outward, inward = heads, heads.queries * heads.width, heads.keys * heads.width
        self.q_proj, self.output_proj = Linear(d_model, outward), Linear(outward, d_model)
        self.k_proj, self.v_proj = Linear(d_model, inward), Linear(d_model, inward)
        self.q_norm, self.k_norm = (RMSNorm(heads.width, eps) if qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, angles: Tensor | None, mask: Tensor | BlockMask | None) -> Tensor:
        """x [batch, time, d_model] -> the same; `angles` [..., time, d_head / 2], None: no positions."""
        width, each = self.heads.width, self.heads.queries // self.heads.keys
        q, k, v = (w(x).unflatten(-1, (-1, width)).transpose(-3, -2) for w in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        if each > 1:
            k, v = k.repeat_interleave(each, -3), v.repeat_interleave(each, -3)
        return self.output_proj(causal_attention(q, k, v, mask).transpose(-3, -2).flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU, w2(silu(w1 x) * w3 x) (Shazeer 2020, eq. 6); without its gate, w2(silu(w1 x))."""

    def __init__(self, d_model: int, d_ff: int, gated: bool) -> None:
        super().__init__()
        self.w1, self.w2 = Linear(d_model, d_ff), Linear(d_ff, d_model)
        self.w3 = Linear(d_model, d_ff) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d_model] -> the same."""
        hidden = F.silu(self.w1(x))
        return self.w2(hidden if self.w3 is None else hidden * self.w3(x))


class Block(nn.Module):
    """Attention and feed-forward, each around a residual; norms before them, or after the sum (Xiong et al. 2020, fig. 1)."""

    def __init__(self, d_model: int, heads: Heads, d_ff: int, pre_norm: bool, gated: bool, qk_norm: bool, eps: float) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.attn = Attention(d_model, heads, qk_norm, eps)
        self.ffn = FeedForward(d_model, d_ff, gated)
        self.ln1, self.ln2 = RMSNorm(d_model, eps), RMSNorm(d_model, eps)

    def forward(self, x: Tensor, angles: Tensor | None, mask: Tensor | BlockMask | None) -> Tensor:
        """x [batch, time, d_model] -> the same; `mask` as `causal_attention` takes it."""
        if self.pre_norm:
            x = x + self.attn(self.ln1(x), angles, mask)
            return x + self.ffn(self.ln2(x))
        x = self.ln1(x + self.attn(x, angles, mask))
        return self.ln2(x + self.ffn(x))


class Head(Linear):
    """Hidden states [batch, time, d_model] -> logits [batch, time, vocab_size]; with labels, the loss instead."""

    def forward(self, hidden: Tensor, labels: Tensor | None = None, reduction: Reduction = "sum") -> Tensor:
        """Logits or loss. The loss is here, not in the model: ZeRO-3 gathers a weight for its own module's forward."""
        return super().forward(hidden) if labels is None else next_token_loss(hidden, self.weight, labels, reduction)


class TransformerLM(nn.Module):
    """Token ids [batch, time] -> logits [batch, time, vocab_size]; with labels, the summed loss instead.

    `norm_position` "post" has no final norm (the last block ends in one); `rope` False leaves positions out; `tie_embeddings`
    has one matrix for embedding and output layer, initialised as the output layer's. ValueError where sizes do not fit.
    """

    _no_split_modules: ClassVar = ["Block"]
    """classes of the modules that FSDP gathers one at a time; transformers' models have the same attribute"""

    def __init__(
        self,
        *,
        vocab_size: int,
        context_length: int,
        d_model: int,
        num_heads: int,
        d_ff: int,
        num_layers: int,
        rope_theta: float = 10_000.0,
        norm_position: Literal["pre", "post"] = "pre",
        rope: bool = True,
        ffn: Literal["swiglu", "silu"] = "swiglu",
        tie_embeddings: bool = False,
        qk_norm: bool = False,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        norm_eps: float = EPS,
    ) -> None:
        super().__init__()
        if head_dim is None and d_model % num_heads:
            raise ValueError(f"d_model {d_model} does not divide into {num_heads} heads; give a --num_heads that divides it")
        if num_kv_heads and num_heads % num_kv_heads:
            raise ValueError(f"num_heads {num_heads} is not a multiple of num_kv_heads {num_kv_heads}; change one of them")
        self.d_head = head_dim or d_model // num_heads
        heads = Heads(num_heads, num_kv_heads or num_heads, self.d_head)
        if rope and self.d_head % 2:
            raise ValueError(
                f"heads of {self.d_head} cannot be rotated in pairs; give an even d_model / num_heads, or --no_rope"
            )
        self.context_length, self.rope_theta, self.rope = context_length, rope_theta, rope
        self.attention_width = num_heads * self.d_head
        pre_norm = norm_position == "pre"
        self.token_embeddings = Embedding(vocab_size, d_model)
        self.layers = nn.ModuleList(
            Block(d_model, heads, d_ff, pre_norm, ffn == "swiglu", qk_norm, norm_eps) for _ in range(num_layers)
        )
        self.ln_final = RMSNorm(d_model, norm_eps) if pre_norm else nn.Identity()
        self.lm_head = Head(d_model, vocab_size)
        if tie_embeddings:
            self.token_embeddings.weight = self.lm_head.weight

    def embeddings_and_heads(self) -> list[nn.Parameter]:
        """The parameters with a row per token, which Muon leaves to AdamW."""
        return [*self.token_embeddings.parameters(), *self.lm_head.parameters()]

    def training_flops_per_token(self) -> float:
        """Forward and backward FLOPs: 6 per weight in a matrix product, 12 x layers x width x length for attention.

        Kaplan et al. 2020, section 2.1; PaLM (2022), appendix B.
        """
        matrices = (module for module in self.modules() if isinstance(module, nn.Linear))
        weights = sum(m.in_features * m.out_features for m in matrices)  # from sizes: ZeRO-3 empties the tensors
        return 6.0 * weights + 12.0 * len(self.layers) * self.attention_width * self.context_length

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        positions: Tensor | None = None,
        reduction: Reduction = "sum",
    ) -> Tensor:
        """tokens: integers [batch, time], time at most `context_length`; labels: int64 [batch, time], for `next_token_loss`.

        `positions` [batch, time], those of tokens in their documents, keep attention within each document.
        """
        x = self.token_embeddings(tokens)
        mask = None if positions is None else document_mask(positions, self.d_head)
        # [time], or [batch, 1, time] to broadcast over heads.
        places = torch.arange(tokens.shape[-1], device=tokens.device) if positions is None else positions[:, None]
        # Computed in each forward, in a fraction of a layer's time: a backend could round a buffer to bf16.
        angles = rope_angles(places, self.d_head, self.rope_theta) if self.rope else None
        for layer in self.layers:
            x = layer(x, angles, mask)
        return self.lm_head(self.ln_final(x), labels, reduction)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Probabilities [..., vocab] cut to the smallest set of tokens with a mass of at least `top_p`, and scaled to sum to 1.

    Of equally likely tokens at the border those with the lowest ids stay. Holtzman et al. 2020, section 3.1.
    """
    ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    before = F.pad(ordered.cumsum(-1)[..., :-1], (1, 0))  # mass of the likelier tokens: below top_p this one is needed too
    kept = torch.zeros_like(probabilities).scatter(-1, tokens, ordered * (before < top_p))
    return kept / kept.sum(-1, keepdim=True)


@torch.no_grad()
def generate(
    network: TransformerLM,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    end_of_text: int | None = None,
) -> Tensor:
    """Continue `tokens` [time], at least one, by `max_new_tokens` or until `end_of_text`, which is left out: [longer time].

    `temperature` 0 takes the likeliest token, any other draws from the `nucleus` with torch's generator. The network sees the
    last `context_length` tokens.
    """
    for _ in range(max_new_tokens):
        logits = network(tokens[None, -network.context_length :])[0, -1].cpu().double()
        if temperature:
            probabilities = nucleus(torch.softmax((logits - logits.max()) / temperature, dim=-1), top_p)
            token = torch.multinomial(probabilities, 1)
        else:
            token = logits.argmax(-1, keepdim=True)
        if end_of_text is not None and int(token) == end_of_text:
            break
        tokens = torch.cat([tokens, token.to(tokens)])
    return tokens
