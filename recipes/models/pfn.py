"""A transformer that predicts y from examples seen so far: a prior-data fitted network (Müller et al. 2022, arXiv 2112.10510).

A sequence of K pairs becomes 2K tokens: even token 2i is the query (x_i, 0), odd token 2i+1 the example (x_i, y_i). A token
attends to itself and to earlier *examples*, so the prediction at query i depends on the pairs before i and on x_i alone. There
is no positional embedding, so there may be more examples than in training.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HALF_NORMAL_MEDIAN = 0.6744897501960817


class StackedLinear(nn.Module):
    """`models` linear layers side by side: [models, ..., d_in] -> [models, ..., d_out]. Filled by `repeat_weights`."""

    def __init__(self, models: int, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(models, d_out, d_in))
        self.bias = nn.Parameter(torch.empty(models, d_out))

    def forward(self, x: Tensor) -> Tensor:
        """One batched matrix product for all models."""
        return torch.baddbmm(self.bias.unsqueeze(1), x.flatten(1, -2), self.weight.mT).unflatten(1, x.shape[1:-1])


class StackedLayerNorm(nn.Module):
    """`models` layer norms side by side over the last dimension of [models, ..., d]. Filled by `repeat_weights`."""

    def __init__(self, models: int, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(models, d))
        self.bias = nn.Parameter(torch.empty(models, d))

    def forward(self, x: Tensor) -> Tensor:
        """One normalisation for all models, then the scale and shift of each."""
        shape = (len(self.weight), *(1,) * (x.ndim - 2), x.shape[-1])
        return F.layer_norm(x, x.shape[-1:]) * self.weight.view(shape) + self.bias.view(shape)


class Block(nn.Module):
    """Pre-norm attention and exact-GELU MLP."""

    def __init__(self, d_model: int, num_heads: int, d_ff: int, models: int | None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = _norm(models, d_model), _norm(models, d_model)
        self.qkv, self.out = _linear(models, d_model, 3 * d_model), _linear(models, d_model, d_model)
        self.up, self.down = _linear(models, d_model, d_ff), _linear(models, d_ff, d_model)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[..., tokens, d_model] -> the same; mask bool [tokens, tokens], true where a token (row) attends."""
        # [..., tokens, 3 d] -> 3 x [sequences, heads, tokens, d_head]: attention treats models as more sequences.
        qkv = self.qkv(self.norm1(x)).reshape(-1, x.shape[-2], 3, self.num_heads, x.shape[-1] // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def _linear(models: int | None, d_in: int, d_out: int) -> nn.Module:
    return nn.Linear(d_in, d_out) if models is None else StackedLinear(models, d_in, d_out)


def _norm(models: int | None, d: int) -> nn.Module:
    return nn.LayerNorm(d) if models is None else StackedLayerNorm(models, d)


class AutoregressivePFN(nn.Module):
    """x [batch, examples, d_x], y [batch, examples] -> logits [batch, examples, d_vocab] over bins of y.

    With `models` N it is N such networks in one, with parameters [N, ...] under the same names: y becomes [N, batch, examples]
    and the logits [N, batch, examples, d_vocab], while x is shared.

    The prediction is a density over `d_vocab` equal bins on [y_min, y_max]: uniform in each inner bin, and half-normal in the
    two at the edge, which reach beyond it; half of their mass lies inside the bin (Müller et al. 2022, section 4).
    """

    _no_split_modules: ClassVar = ["Block"]
    """classes of the modules that FSDP gathers one at a time; transformers' models have the same attribute"""

    edges: Tensor
    centres: Tensor
    mask: Tensor

    def __init__(
        self,
        *,
        d_x: int,
        d_model: int,
        num_layers: int,
        num_heads: int,
        d_ff: int,
        d_vocab: int,
        y_min: float,
        y_max: float,
        examples: int,
        models: int | None = None,
    ) -> None:
        super().__init__()
        self.models = models
        self.d_x, self.d_model, self.d_ff, self.d_vocab = d_x, d_model, d_ff, d_vocab
        self.bin_width = (y_max - y_min) / d_vocab
        self.embed_x, self.embed_y = _linear(models, d_x, d_model), _linear(models, 1, d_model)
        self.blocks = nn.ModuleList(Block(d_model, num_heads, d_ff, models) for _ in range(num_layers))
        self.head = _linear(models, d_model, d_vocab)
        edges = torch.linspace(y_min, y_max, d_vocab + 1, dtype=torch.float64)
        centres = (edges[1:] + edges[:-1]) / 2
        self.tail_scale = self.bin_width / HALF_NORMAL_MEDIAN
        tail_mean = self.tail_scale * math.sqrt(2 / math.pi)  # of a half-normal
        centres[0], centres[-1] = edges[1] - tail_mean, edges[-2] + tail_mean
        self.register_buffer("edges", edges[1:-1].float(), persistent=False)  # between the bins
        self.register_buffer("centres", centres.float(), persistent=False)
        self.register_buffer("mask", attention_mask(examples), persistent=False)
        if models is None:
            self._init_weights()

    def _init_weights(self) -> None:
        """Attention N(0, 0.02) with zero biases; all other layers keep torch's default."""
        for block in self.blocks:
            for layer in (block.qkv, block.out):
                assert isinstance(layer, nn.Linear)
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def embeddings_and_heads(self) -> list[nn.Parameter]:
        """The maps from x and y and to the bins, which Muon leaves to AdamW."""
        return [p for layer in (self.embed_x, self.embed_y, self.head) for p in layer.parameters()]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Logits at the queries. Those at query i depend only on x up to i, and on y before i."""
        examples = y.shape[-1]
        if self.models is not None:
            x = x.expand(self.models, *x.shape)
        # The y of a query is 0, so its embedding is the bias alone.
        y_tokens = self.embed_y(torch.stack([torch.zeros_like(y), y], -1).unsqueeze(-1))
        hidden = (self.embed_x(x).unsqueeze(-2) + y_tokens).flatten(-3, -2)
        if len(self.mask) < 2 * examples:
            self.mask = attention_mask(examples).to(self.mask.device)
        mask = self.mask[: 2 * examples, : 2 * examples]
        for block in self.blocks:
            hidden = block(hidden, mask)
        return self.head(hidden[..., ::2, :])

    def per_model(self, y: Tensor) -> Tensor:
        """The y of a batch, [batch, models, examples], in the shape that `forward` takes."""
        return y.squeeze(1) if self.models is None else y.transpose(0, 1).contiguous()

    def bins(self, y: Tensor) -> Tensor:
        """The bin of each y, int64; values out of range are in the bin at that edge."""
        return torch.bucketize(y, self.edges, right=True)

    def cross_entropy(self, logits: Tensor, y: Tensor) -> Tensor:
        """Cross entropy of the bins of y in nats, summed for each model: [models], or [1]."""
        nats = F.cross_entropy(logits.flatten(0, -2).float(), self.bins(y).flatten(), reduction="none")
        return nats.view(self.models or 1, -1).sum(1)

    def mean(self, logits: Tensor) -> Tensor:
        """The mean of the predicted density: [..., d_vocab] -> [...]. The softmax-weighted centres of the model's own bins."""
        return (logits.float().softmax(-1) * self.centres).sum(-1)  # no matrix product: autocast would make it bf16

    def log_density(self, logits: Tensor, y: Tensor) -> Tensor:
        """log p(y) of the predicted density, in nats: [..., d_vocab], [...] -> [...]."""
        log_mass = logits.float().log_softmax(-1).gather(-1, self.bins(y).unsqueeze(-1)).squeeze(-1)
        low, high = self.edges[0], self.edges[-1]
        into_tail = torch.where(y < low, low - y, y - high) / self.tail_scale
        tail = math.log(math.sqrt(2 / math.pi) / self.tail_scale) - into_tail.square() / 2
        inside = (y >= low) & (y < high)
        return log_mass + torch.where(inside, -math.log(self.bin_width), tail)

    def sample(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A draw of y from each predicted density: [..., d_vocab] -> [...]."""
        mass = logits.float().softmax(-1)
        bins = torch.multinomial(mass.flatten(0, -2), 1, generator=generator).view(mass.shape[:-1])
        uniform = torch.rand(bins.shape, device=bins.device, generator=generator)
        normal = torch.randn(bins.shape, device=bins.device, generator=generator).abs() * self.tail_scale
        last = len(self.centres) - 1
        inside = self.centres[bins] + (uniform - 0.5) * self.bin_width
        return torch.where(bins == 0, self.edges[0] - normal, torch.where(bins == last, self.edges[-1] + normal, inside))

    def training_flops(self, examples: int) -> float:
        """Forward and backward FLOPs of a sequence, by all models: 6 per weight and token, and for attention 12 x layers x
        width x tokens for each token.
        """
        width, layers, tokens = self.d_model, len(self.blocks), 2 * examples
        blocks = layers * (4 * width * width + 2 * width * self.d_ff)
        per_token = 6.0 * (blocks + width) + 12.0 * layers * width * tokens
        return (self.models or 1) * (tokens * per_token + examples * 6.0 * width * (self.d_vocab + self.d_x))


def attention_mask(examples: int) -> Tensor:
    """bool [2 examples, 2 examples], true where a token (row) attends: to itself and to earlier examples (odd tokens)."""
    tokens = torch.arange(2 * examples)
    earlier_example = (tokens < tokens[:, None]) & (tokens % 2 == 1)
    return earlier_example | torch.eye(2 * examples, dtype=torch.bool)


def repeat_weights(single: AutoregressivePFN, stacked: AutoregressivePFN) -> AutoregressivePFN:
    """`stacked`, with the weights of `single` copied into each of its models."""
    weights = dict(single.named_parameters())
    with torch.no_grad():
        for name, parameter in stacked.named_parameters():
            parameter.copy_(weights[name].expand_as(parameter))
    return stacked
