"""The Collatz transformer: the next parity of a trajectory, and the number of steps it will take in all.

Layers are torch's own `nn.TransformerEncoderLayer`, run one by one. `nn.TransformerEncoder` would copy one layer, so that all
have the same initial weights, and in evaluation use nested tensors, which compute something else than training does.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

PADDING = 2  # the token behind the end; 0 and 1 are parities or binary digits
TOKENS = 3
TYPICAL_STEPS = 200  # the stopping-time head predicts relative to it: from 0 it would need a thousand updates to get there


class CollatzTransformer(nn.Module):
    """tokens [batch, time] -> (log1p(steps) [batch], logits of the next token [batch, time, TOKENS]).

    Honest mode: attention is causal, so position t predicts token t + 1 from tokens 0 .. t, and the stopping time is predicted
    from the mean state of the first `prefix_len` positions, which attend to nothing else; or, with `input="digits"`, from the
    binary digits of n in a pass of their own. Guide mode: every position attends to every token, and all real ones are pooled,
    so that the next token and the length can be read off.
    """

    positions: Tensor

    _no_split_modules: ClassVar = ["TransformerEncoderLayer"]
    """classes of the modules that FSDP gathers one at a time; transformers' models have the same attribute"""

    def __init__(
        self,
        d_model: int,
        num_layers: int,
        num_heads: int,
        d_ff: int | None,
        dropout: float,
        max_len: int,
        mode: Literal["honest", "guide"] = "honest",
        input: Literal["parities", "digits"] = "parities",
        prefix_len: int = 64,
    ) -> None:
        """ValueError for sizes that do not fit together."""
        super().__init__()
        if d_model % num_heads or d_model % 2:
            raise ValueError(f"d_model {d_model} must be even and a multiple of num_heads {num_heads}")
        if not 1 <= prefix_len < max_len:
            raise ValueError(f"prefix_len {prefix_len} must be at least 1 and below max_len {max_len}")
        if mode == "guide" and input == "digits":
            raise ValueError("mode guide predicts from all parities; leave out --input digits, or use --mode honest")
        # One path for training and evaluation: torch's fused inference layer keeps whole attention matrices, and reads weights
        # that ZeRO-3 has not gathered.
        torch.backends.mha.set_fastpath_enabled(False)
        self.causal = mode == "honest"
        self.prefix_len = prefix_len if self.causal else max_len
        self.embed = nn.Embedding(TOKENS, d_model)
        self.embed_digits = nn.Embedding(TOKENS, d_model) if input == "digits" else None
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(d_model, num_heads, d_ff or 4 * d_model, dropout, batch_first=True)
            for _ in range(num_layers)
        )
        self.dropout = nn.Dropout(dropout)
        self.stopping = nn.Sequential(nn.Linear(d_model, 64), nn.ReLU(), nn.Linear(64, 1))
        self.next_token = nn.Linear(d_model, TOKENS)
        self.register_buffer("positions", sinusoids(max(max_len, 128), d_model), persistent=False)
        for name, parameter in self.named_parameters():
            if name.startswith("embed"):
                nn.init.normal_(parameter, std=d_model**-0.5)  # of unit size once multiplied by sqrt(d_model)

    def forward(self, src: Tensor, src_key_padding_mask: Tensor, digits: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`src_key_padding_mask` [batch, time] is True at padding; `digits` [batch, digits] with `input="digits"` only.

        Padding stands behind the real tokens, where causal attention never reaches; the mask is needed for pooling.
        """
        return self.forward_with_pooled(src, src_key_padding_mask, digits)[:2]

    def forward_with_pooled(
        self, src: Tensor, src_key_padding_mask: Tensor, digits: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`forward`, and the pooled states [batch, d_model] that the stopping time is predicted from."""
        states = self.encode(self.embed(src.long()), None if self.causal else src_key_padding_mask)
        pooled = self.pool(states, src_key_padding_mask, digits)
        # Both heads in fp32 under autocast too: they cost next to nothing, and in bf16 a log1p of 5 comes in steps of 0.03.
        with torch.autocast(states.device.type, enabled=False):
            relative = self.stopping(pooled.to(self.next_token.weight.dtype))[:, 0]
            logits = self.next_token(states.to(self.next_token.weight.dtype))
        return relative.float() + math.log1p(TYPICAL_STEPS), logits, pooled

    def encode(self, embedded: Tensor, padding: Tensor | None) -> Tensor:
        """Embedded tokens [batch, time, d_model] -> states of the same shape. Causal without `padding`, else masked by it."""
        time, width = embedded.shape[1:]
        x = self.dropout(embedded * math.sqrt(width) + self.positions[:time])
        causal = padding is None
        mask = nn.Transformer.generate_square_subsequent_mask(time, x.device) if causal else None
        for layer in self.layers:
            x = layer(x, src_mask=mask, src_key_padding_mask=padding, is_causal=causal)
        return x

    def pool(self, states: Tensor, padding: Tensor, digits: Tensor | None = None) -> Tensor:
        """Input of the stopping-time head, [batch, d_model]: the mean state of real tokens, in the prefix or of the digits."""
        if self.embed_digits is not None:
            if digits is None:
                raise ValueError("a model with input digits needs the digits")
            padding = digits == PADDING
            states = self.encode(self.embed_digits(digits.long()), padding)
        else:
            states, padding = states[:, : self.prefix_len], padding[:, : self.prefix_len]
        real = (~padding).unsqueeze(-1).to(states.dtype)
        return (states * real).sum(1) / real.sum(1).clamp_min(1)

    def embeddings_and_heads(self) -> list[nn.Parameter]:
        """The parameters with a row per token or per prediction, which Muon leaves to AdamW."""
        modules = [self.embed, self.embed_digits, self.stopping[2], self.next_token]
        return [p for module in modules if module is not None for p in module.parameters()]

    def training_flops(self, time: int) -> float:
        """Forward and backward FLOPs of one number of `time` tokens: 6 per weight and token, and attention's two products."""
        weights = sum(getattr(p, "ds_numel", p.numel()) for name, p in self.named_parameters() if not name.startswith("embed"))
        width = self.next_token.in_features
        attention = 12 * len(self.layers) * width * time * (0.5 if self.causal else 1.0)
        return time * (6.0 * weights + attention)


def sinusoids(length: int, width: int) -> Tensor:
    """Positions [length, width]: sin(t / 10000^(2i / width)) and its cosine (Vaswani et al. 2017, section 3.5)."""
    angle = torch.arange(length)[:, None] * torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


def predict_batch(network: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The network on all tokens but the last of a batch: (log1p(steps) [batch], logits [batch, time - 1, TOKENS]) in fp32."""
    src = batch["tokens"][:, :-1]
    stopping, logits = network(src, src == PADDING, batch.get("digits"))
    return stopping.float(), logits.float()
