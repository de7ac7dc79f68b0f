"""The Vision Transformer (Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words") with relative position bias, as in Swin
(Liu et al. 2021, eq. 4), and its class-token rows, as in BEiT (Bao et al. 2022).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

INIT_STD = 0.02


class RelativePositionBias(nn.Module):
    """A learnt number per head and offset between two positions, added to the attention logits.

    Parameter `relative_position_bias_table` [offsets (+ 3 with a class token), heads]; buffer `relative_position_index`
    [N, N], the row of the table for each query and key. Two dimensions: offset (dh, dw) = query - key has row
    (dh + Wh - 1)(2 Ww - 1) + dw + Ww - 1; one dimension: row i - j + L - 1. With a class token (`prefix_tokens` 1, the first
    position) D offsets are followed by row D for class to patch, D + 1 for patch to class, D + 2 for class to class.
    """

    relative_position_index: Tensor

    def __init__(
        self,
        num_heads: int,
        window_size: tuple[int, int] | None = None,
        seq_len: int | None = None,
        bias_type: str = "2d",
        init_std: float = INIT_STD,
        prefix_tokens: int = 0,
        learnable: bool = True,
    ) -> None:
        """`window_size` (patches down, across) for "2d", `seq_len` for "1d". ValueError where they do not go together."""
        super().__init__()
        if prefix_tokens not in (0, 1):
            raise ValueError(f"prefix_tokens {prefix_tokens}: there is one class token or none")
        if bias_type == "2d" and window_size is not None:
            patches = window_size[0] * window_size[1]
            if seq_len not in (None, patches):
                raise ValueError(f"seq_len {seq_len} is not the {patches} patches of window_size {tuple(window_size)}")
            self.offset_grid = (2 * window_size[0] - 1, 2 * window_size[1] - 1)
            index = _offsets_2d(*window_size)
        elif bias_type == "1d" and seq_len is not None:
            self.offset_grid = (1, 2 * seq_len - 1)
            index = _offsets_1d(seq_len)
        elif bias_type in ("1d", "2d"):
            raise ValueError(f"bias_type {bias_type!r} needs {'window_size' if bias_type == '2d' else 'seq_len'}")
        else:
            raise ValueError(f"bias_type {bias_type!r} is neither '1d' nor '2d'")
        offsets = self.offset_grid[0] * self.offset_grid[1]
        if prefix_tokens:
            index = F.pad(index, (1, 0, 1, 0))
            index[0, :], index[:, 0], index[0, 0] = offsets, offsets + 1, offsets + 2
        # It follows from the sizes alone: nothing to save.
        self.register_buffer("relative_position_index", index, persistent=False)
        table = torch.empty(offsets + 3 * prefix_tokens, num_heads)
        self.relative_position_bias_table = nn.Parameter(table, requires_grad=learnable)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=init_std)

    def forward(self, dtype: torch.dtype | None = None) -> Tensor:
        """[heads, N, N]: the bias of each query (row) and key (column), in `dtype` if that is given.

        A view into memory whose rows are a multiple of 8 long, which is what the attention kernels of a GPU read. Gradients
        of the pairs at one offset are summed in the precision of the table.
        """
        index = self.relative_position_index
        length = index.shape[0]
        padded = F.pad(index, (0, -length % 8))
        # Selected from the transposed table, the values come in the order of the result: no second copy to reorder them.
        values = self.relative_position_bias_table.t().index_select(1, padded.flatten())
        # Cast before it is cut: a cast packs the rows of a view.
        return values.to(dtype or values.dtype).view(-1, *padded.shape)[..., :length]

    def by_offset(self) -> Tensor:
        """The table without its class-token rows as [heads, 2 Wh - 1, 2 Ww - 1]: offset 0 in the middle."""
        rows, columns = self.offset_grid
        return self.relative_position_bias_table[: rows * columns].t().reshape(-1, rows, columns)


def _offsets_2d(height: int, width: int) -> Tensor:
    down, across = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    down, across = down.flatten(), across.flatten()
    dh, dw = (at[:, None] - at[None, :] for at in (down, across))
    return (dh + height - 1) * (2 * width - 1) + dw + width - 1


def _offsets_1d(length: int) -> Tensor:
    at = torch.arange(length)
    return at[:, None] - at[None, :] + length - 1


class Attention(nn.Module):
    """Multi-head self-attention; it has the attribute `relative_position_bias` only where that is on."""

    def __init__(
        self, embed_dim: int, num_heads: int, head_dim: int, dropout: float, scale: bool, bias: RelativePositionBias | None
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.dropout = num_heads, head_dim, dropout
        self.scale = head_dim**-0.5 if scale else 1.0
        self.qkv = nn.Linear(embed_dim, 3 * num_heads * head_dim)
        self.proj = nn.Linear(num_heads * head_dim, embed_dim)
        if bias is not None:
            self.relative_position_bias = bias

    def _query_key_value(self, x: Tensor) -> Tensor:
        """[3, batch, heads, N, head_dim]."""
        return self.qkv(x).view(*x.shape[:2], 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)

    def _bias(self, batch: int, dtype: torch.dtype) -> Tensor | None:
        """[batch, heads, N, N], the same memory for every sample. In the dtype of the queries: cuDNN on Hopper reads an fp32
        mask as if it were bf16 (pytorch issue 191612).
        """
        if not hasattr(self, "relative_position_bias"):
            return None
        bias = self.relative_position_bias(dtype)
        return bias.expand(batch, *bias.shape)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, N, embed_dim] -> the same."""
        q, k, v = self._query_key_value(x).unbind(0)
        dropout = self.dropout if self.training else 0.0
        mask = self._bias(len(x), q.dtype)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=self.scale)
        out = self.proj(mixed.transpose(1, 2).flatten(2))
        return F.dropout(out, self.dropout, self.training)

    def weights(self, x: Tensor) -> Tensor:
        """What each query attends to: [batch, heads, N, N], rows sum to 1. For pictures."""
        q, k, _ = self._query_key_value(x).unbind(0)
        logits = q @ k.transpose(-2, -1) * self.scale
        bias = self._bias(len(x), q.dtype)
        return (logits if bias is None else logits + bias).softmax(-1)


class Mlp(nn.Module):
    """Two linear maps with exact GELU between them."""

    def __init__(self, embed_dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1, self.fc2, self.dropout = nn.Linear(embed_dim, hidden), nn.Linear(hidden, embed_dim), dropout

    def forward(self, x: Tensor) -> Tensor:
        """[..., embed_dim] -> the same."""
        hidden = F.dropout(F.gelu(self.fc1(x)), self.dropout, self.training)
        return F.dropout(self.fc2(hidden), self.dropout, self.training)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, embed_dim: int, attention: Attention, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(embed_dim, eps=1e-6), attention
        self.norm2, self.mlp = nn.LayerNorm(embed_dim, eps=1e-6), Mlp(embed_dim, hidden, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, N, embed_dim] -> the same."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """One linear map for every patch, written as a convolution."""

    def __init__(self, patch_size: int, in_channels: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, embed_dim, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """[batch, channels, height, width] -> [batch, patches, embed_dim], row by row."""
        return self.proj(images).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """Images to class logits. `pool` "cls" reads a class token, "mean" has none and reads the mean of the patches."""

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        use_relative_position: bool = True,
        use_absolute_position: bool = True,
        rpb_kwargs: Mapping[str, Any] | None = None,
        pool: str = "cls",
        gradient_checkpointing: bool = False,
        head_dim: int | None = None,
        scale: bool = True,
    ) -> None:
        """`rpb_kwargs`: arguments of RelativePositionBias; what is missing follows from the model (2-D, the patch grid).

        `dropout` acts on attention weights, the output of attention, and the MLP. `head_dim` None: embed_dim / num_heads.
        `scale` False: no 1 / sqrt(head_dim) in the logits. ValueError, naming both values, where sizes contradict each other.
        """
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if height % patch_size or width % patch_size:
            raise ValueError(f"img_size {height} x {width} is not a whole number of patches of patch_size {patch_size}")
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} does not divide into {num_heads} heads; give a head_dim")
        if pool not in ("cls", "mean"):
            raise ValueError(f"pool {pool!r} is neither 'cls' nor 'mean'")
        self.grid, self.pool, self.gradient_checkpointing = (
            (height // patch_size, width // patch_size),
            pool,
            gradient_checkpointing,
        )
        prefix_tokens, patches = int(pool == "cls"), self.grid[0] * self.grid[1]
        head_dim = head_dim or embed_dim // num_heads
        rpb = _bias_arguments(rpb_kwargs or {}, num_heads, self.grid, prefix_tokens) if use_relative_position else None

        self.patch_embed = PatchEmbed(patch_size, in_channels, embed_dim)
        if prefix_tokens:
            self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        if use_absolute_position:
            self.pos_embed = nn.Parameter(torch.empty(1, patches + prefix_tokens, embed_dim))
        self.blocks = nn.ModuleList()
        for _ in range(depth):
            bias = RelativePositionBias(**rpb) if rpb else None
            attention = Attention(embed_dim, num_heads, head_dim, dropout, scale, bias)
            self.blocks.append(Block(embed_dim, attention, round(embed_dim * mlp_ratio), dropout))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)
        self._init_weights()

    def _init_weights(self) -> None:
        """Xavier, as the paper's own code has it: a fixed standard deviation of 0.02 starves a network of small width."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
        for parameter in (self.head.weight, getattr(self, "cls_token", None), getattr(self, "pos_embed", None)):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=INIT_STD)

    def embed(self, images: Tensor) -> Tensor:
        """[batch, channels, height, width] -> the tokens before the first block: [batch, N, embed_dim], class token first."""
        x = self.patch_embed(images)
        if hasattr(self, "cls_token"):
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        return x + self.pos_embed if hasattr(self, "pos_embed") else x

    def forward(self, images: Tensor) -> Tensor:
        """[batch, channels, height, width] -> logits [batch, num_classes]."""
        x = self.embed(images)
        for block in self.blocks:
            recompute = self.gradient_checkpointing and self.training
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        x = self.norm(x)
        x = x[:, 0] if self.pool == "cls" else x.mean(dim=1)
        # Logits in the precision of the weights: bf16 keeps three digits of what softmax exponentiates, and of the gradient
        # of the head, which is most of the gradient norm. It costs nothing beside the blocks.
        with torch.autocast(x.device.type, enabled=False):
            return self.head(x.to(self.head.weight.dtype))

    def attention_maps(self, images: Tensor) -> Tensor:
        """What each token of each layer attends to: [layers, batch, heads, N, N]. For pictures, in evaluation mode."""
        x, maps = self.embed(images), []
        for block in self.blocks:
            maps.append(block.attn.weights(block.norm1(x)))
            x = block(x)
        return torch.stack(maps)


def _bias_arguments(given: Mapping[str, Any], num_heads: int, grid: tuple[int, int], prefix_tokens: int) -> dict[str, Any]:
    """Arguments of RelativePositionBias; ValueError where those that are given do not fit the model."""
    size = {"seq_len": grid[0] * grid[1]} if given.get("bias_type") == "1d" else {"window_size": grid}
    made = {"num_heads": num_heads, "prefix_tokens": prefix_tokens, **size, **given}
    window, length = made.get("window_size"), made.get("seq_len")
    if made["num_heads"] != num_heads:
        raise ValueError(f"rpb_kwargs num_heads {made['num_heads']} is not the model's num_heads {num_heads}")
    if window is not None and tuple(window) != grid:
        raise ValueError(f"rpb_kwargs window_size {tuple(window)} is not the patch grid {grid} of the images")
    if length not in (None, grid[0] * grid[1]):
        raise ValueError(f"rpb_kwargs seq_len {length} is not the {grid[0] * grid[1]} patches of the images")
    if made["prefix_tokens"] != prefix_tokens:
        raise ValueError(f"rpb_kwargs prefix_tokens {made['prefix_tokens']}: pool decides, and there are {prefix_tokens}")
    return made


def weight_decay_groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups: decay for the weights of linear maps and the patch embedding alone; none for biases, norms, bias
    tables, class token and position embedding (two of them are matrices: the number of dimensions does not tell).
    """
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in network.named_parameters():
        decayed = parameter.ndim >= 2 and name.endswith(".weight")
        if parameter.requires_grad:
            groups[0 if decayed else 1]["params"].append(parameter)
    return groups


def training_flops_per_image(network: VisionTransformer) -> float:
    """Forward and backward FLOPs for an image: 6 per weight of a matrix product and token, and 12 x tokens^2 x width of the
    heads in each layer for attention (PaLM 2022, appendix B). The head reads one token.
    """
    patches = network.grid[0] * network.grid[1]
    tokens = patches + int(network.pool == "cls")
    # From the sizes of the maps, not of their weights, which are in pieces under ZeRO-3.
    proj, head = network.patch_embed.proj, network.head
    pixels = proj.in_channels * proj.kernel_size[0] * proj.kernel_size[1]
    flops = 6.0 * (patches * pixels * proj.out_channels + head.in_features * head.out_features)
    for block in network.blocks:
        maps = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
        flops += 6.0 * tokens * sum(m.in_features * m.out_features for m in maps)
        flops += 12.0 * tokens * tokens * block.attn.num_heads * block.attn.head_dim
    return flops
