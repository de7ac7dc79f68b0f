"""The Vision Transformer (Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words") with relative position bias."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.data.image_pixels import from_0_to_1
from recipes.models.patch_grid import resolve_sizes
from recipes.models.relative_position_bias import INIT_STD, RelativePositionBias, bias_arguments


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

    def _bias(self, dtype: torch.dtype) -> Tensor | None:
        """[1, heads, N, N], in the dtype of the queries: cuDNN on Hopper reads an fp32 mask as if it were bf16 (pytorch issue
        191612).
        """
        return self.relative_position_bias(dtype)[None] if hasattr(self, "relative_position_bias") else None

    def forward(self, x: Tensor) -> Tensor:
        """[batch, N, embed_dim] -> the same."""
        q, k, v = self._query_key_value(x).unbind(0)
        dropout = self.dropout if self.training else 0.0
        mask = self._bias(q.dtype)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=self.scale)
        out = self.proj(attended.transpose(1, 2).flatten(2))
        return F.dropout(out, self.dropout, self.training)

    def attention_weights(self, x: Tensor) -> Tensor:
        """Softmax of the logits: [batch, heads, N, N], rows (queries) sum to 1. For pictures."""
        q, k, _ = self._query_key_value(x).unbind(0)
        logits = q @ k.transpose(-2, -1) * self.scale
        bias = self._bias(q.dtype)
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


class PatchProjection(nn.Conv2d):
    """A convolution of patches that do not overlap, as a matrix product: half the time on a GPU."""

    def forward(self, images: Tensor) -> Tensor:
        """[batch, channels, height, width] -> [batch, patches, out_channels], row by row."""
        size = self.kernel_size[0]
        patches = images.unflatten(3, (-1, size)).unflatten(2, (-1, size)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return F.linear(patches, self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """One linear map for every patch."""

    def __init__(self, patch_size: int, in_channels: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = PatchProjection(in_channels, embed_dim, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """[batch, channels, height, width] -> [batch, patches, embed_dim]."""
        return self.proj(images)


class VisionTransformer(nn.Module):
    """Images [batch, channels, height, width] -> logits [batch, num_classes]. `pool`: what the head reads, "cls" a class token;
    or, without one, the mean of the patches after the last norm ("mean") or before it ("mean_then_norm")."""

    _no_split_modules: ClassVar = ["Block"]
    """classes of the modules that FSDP gathers one at a time; transformers' models have the same attribute"""

    arguments: dict[str, Any]
    """the constructor's, as JSON can hold them; set by `build_vit`"""

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
        head_dim: int | None = None,
        scale: bool = True,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
    ) -> None:
        """`rpb_kwargs`: arguments of RelativePositionBias; those not given follow from the model (2-D, the patch grid).

        `dropout` acts on attention weights, the output of attention, and the MLP. `head_dim` None: embed_dim / num_heads.
        `scale` False: no 1 / sqrt(head_dim) in the logits. `mean` and `std` are of pixels from 0 to 1, one number for all
        channels or one for each. ValueError, naming both values, where sizes contradict each other.
        """
        super().__init__()
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        if height % patch_size or width % patch_size:
            raise ValueError(f"img_size {height} x {width} is not a whole number of patches of patch_size {patch_size}")
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} does not divide into {num_heads} heads; give a head_dim")
        if pool not in ("cls", "mean", "mean_then_norm"):
            raise ValueError(f"pool {pool!r} is none of 'cls', 'mean' and 'mean_then_norm'")
        self.grid = (height // patch_size, width // patch_size)
        self.pool = pool
        self.mean, self.std = ([*values] * (in_channels // len(values)) for values in (mean, std))
        prefix_tokens, patches = int(pool == "cls"), self.grid[0] * self.grid[1]
        head_dim = head_dim or embed_dim // num_heads
        rpb = bias_arguments(rpb_kwargs or {}, num_heads, self.grid, prefix_tokens) if use_relative_position else None

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
        """Xavier, as in the paper's own code: a fixed standard deviation of 0.02 is too little for a network of small width."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        for parameter in (self.head.weight, getattr(self, "cls_token", None), getattr(self, "pos_embed", None)):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=INIT_STD)

    def embeddings_and_heads(self) -> list[nn.Parameter]:
        """Patch embedding, class token, position embedding, bias tables and the classifier, which Muon leaves to AdamW."""
        outside = ("patch_embed.", "cls_token", "pos_embed", "head.")
        return [
            parameter
            for name, parameter in self.named_parameters()
            if name.startswith(outside) or name.endswith("relative_position_bias_table")
        ]

    def normalise(self, images: Tensor) -> Tensor:
        """(images - mean) / std, in the dtype of the weights. [batch, channels, height, width], uint8 or floats from 0 to 1."""
        channels = zip(from_0_to_1(images).unbind(1), self.mean, self.std, strict=True)
        return torch.stack([(channel - mean) / std for channel, mean, std in channels], 1).to(self.head.weight.dtype)

    def embed(self, images: Tensor) -> Tensor:
        """Images as `normalise` takes them -> the tokens before the first block: [batch, N, embed_dim], class token first."""
        x = self.patch_embed(self.normalise(images))
        if hasattr(self, "cls_token"):
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        return x + self.pos_embed if hasattr(self, "pos_embed") else x

    def forward(self, images: Tensor) -> Tensor:
        """Images as `normalise` takes them -> logits [batch, num_classes]."""
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        if self.pool == "mean_then_norm":
            x = self.norm(x.mean(dim=1))
        else:
            x = self.norm(x)[:, 0] if self.pool == "cls" else self.norm(x).mean(dim=1)
        # Logits in the precision of the weights: bf16 would round them, and the gradient of the head, which is most of the
        # gradient norm, to three digits. The cost beside the blocks is nothing.
        with torch.autocast(x.device.type, enabled=False):
            return self.head(x.to(self.head.weight.dtype))

    def attention_maps(self, images: Tensor) -> Tensor:
        """Attention weights of every layer: [layers, batch, heads, N, N]. For pictures, in evaluation mode."""
        x, maps = self.embed(images), []
        for block in self.blocks:
            assert isinstance(block, Block)
            maps.append(block.attn.attention_weights(block.norm1(x)))
            x = block(x)
        return torch.stack(maps)

    def weight_decay_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Optimizer groups: weight decay for the weights of linear maps and the patch embedding; none for biases, norms, bias
        tables, class token and position embedding. (Bias tables are matrices: the number of dimensions cannot decide.)
        """
        decayed: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                (decayed if parameter.ndim >= 2 and name.endswith(".weight") else others).append(parameter)
        return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]

    def training_flops(self) -> float:
        """Forward and backward FLOPs for an image: 6 per weight of a matrix product and token, and 12 x tokens^2 x width of
        the heads in each layer for attention (PaLM 2022, appendix B). The head reads one token.
        """
        patches = self.grid[0] * self.grid[1]
        tokens = patches + int(self.pool == "cls")
        # From the sizes of the layers, not of their weights, which ZeRO-3 partitions.
        proj, head = self.patch_embed.proj, self.head
        pixels = proj.in_channels * proj.kernel_size[0] * proj.kernel_size[1]
        flops = 6.0 * (patches * pixels * proj.out_channels + head.in_features * head.out_features)
        for block in self.blocks:
            assert isinstance(block, Block)
            maps = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
            flops += 6.0 * tokens * sum(m.in_features * m.out_features for m in maps)
            flops += 12.0 * tokens * tokens * block.attn.num_heads * block.attn.head_dim
        return flops


def build_vit(m: Any, d: Any, num_classes: int) -> VisionTransformer:
    """The network of the recipe's sections `model` and `data`, with its constructor's arguments as `network.arguments`."""
    grid, in_channels = resolve_sizes(m, d)
    window = {"window_size": grid.window} if m.bias_type == "2d" else {"seq_len": grid.window[0] * grid.window[1]}
    arguments = {
        "img_size": grid.image,
        "patch_size": grid.patch,
        "in_channels": in_channels,
        "num_classes": num_classes,
        "embed_dim": m.d_model,
        "depth": m.num_layers,
        "num_heads": m.num_heads,
        "mlp_ratio": (m.d_ff or 4 * m.d_model) / m.d_model,
        "dropout": m.dropout,
        "use_relative_position": m.relative_position,
        "use_absolute_position": m.absolute_position,
        "rpb_kwargs": {"bias_type": m.bias_type, **window, "init_std": m.init_std, "learnable": m.learnable_bias},
        "pool": m.pool,
        "head_dim": m.head_dim,
        "scale": m.attention_scale,
        "mean": d.image_mean,
        "std": d.image_std,
    }
    network = VisionTransformer(**arguments)
    network.arguments = arguments
    return network
