"""A peer: GPT-2 trained the way nanoGPT trains it, but written anew for this comparison.

That is: a vocabulary padded to 50,304, one matrix for queries, keys and values, flash attention, the whole model compiled,
autocast to bf16, fused AdamW, windows at random starts of a memory-mapped file, the next batch fetched while the device
computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu_pieces.contenders import Steps

PADDED_VOCABULARY = 50_304


@dataclass(frozen=True)
class Shape:
    """Sizes of a GPT-2; the defaults are those of 124M parameters."""

    vocab_size: int = PADDED_VOCABULARY
    length: int = 1024
    layers: int = 12
    heads: int = 12
    width: int = 768


class Layer(nn.Module):
    """A pre-norm Transformer block: causal attention, then an MLP, each with a residual connection."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, width = shape.heads, shape.width
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, time, width] -> the same shape."""
        q, k, v = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class Gpt(nn.Module):
    """A GPT-2 whose forward returns the loss."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(shape.vocab_size, shape.width), nn.Embedding(shape.length, shape.width)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        """ids and labels (the ids one position further), int64 [batch, time] each -> mean cross entropy."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def nanogpt_steps(shape: Shape, batch_size: int, ids: Path, device: torch.device, learning_rate: float = 6e-4) -> Steps:
    """A contender that trains this GPT-2 on the uint16 ids of a file."""
    torch.manual_seed(0)
    model = Gpt(shape).to(device)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)
    compiled = torch.compile(model)
    stored = np.memmap(ids, np.uint16, "r")

    def fetch() -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(stored) - shape.length - 1, (batch_size,)).tolist()
        windows = torch.from_numpy(np.stack([stored[s : s + shape.length + 1].astype(np.int64) for s in starts]))
        if device.type == "cuda":
            windows = windows.pin_memory()
        windows = windows.to(device, non_blocking=True)
        return windows[:, :-1], windows[:, 1:]

    waiting = fetch()

    def step() -> None:
        nonlocal waiting
        inputs, labels = waiting
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = compiled(inputs, labels)
        waiting = fetch()  # while the device computes
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Steps(step)
