"""Vision Transformers of timm, `vit_relpos_*` too: their settings as flags, and their weights under our names.

Parts that our network lacks are folded into those it has: a layer scale into the projection before it; the MLP of some
`vit_relpos_*`, from the logarithm of an offset to a bias, into a bias table for any grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from recipes.models.vit import VisionTransformer

ALL_ROWS = slice(None)
HEAD_WIDTH = 64  # in every ViT of timm whose config.json has no number of heads
TABLE, MLP = "relative_position_bias_table", "mlp.fc2.weight"
LAYER_SCALES = {"ls1.gamma": "attn.proj", "ls2.gamma": "mlp.fc2"}  # {layer scale: the layer before it}


def settings_of(config: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """{flag: value} of the network that timm's config.json and the shapes of its weights describe. ValueError, by name, for a
    part that our network lacks."""
    architecture = str(config.get("architecture"))
    for part, why in (("_rpn", "norms behind attention and MLP"), ("clsgap", "a class token that nobody reads")):
        if part in architecture:
            raise ValueError(f"architecture is {architecture!r}, with {why}; choose another")
    needed = ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight")
    if missing := [name for name in needed if name not in stored]:
        raise ValueError(f"holds no {missing[0]}, as timm calls it; give a vit_* of timm")
    d_model, channels, patch_size, _ = stored[needed[0]].shape
    pools: dict[tuple[bool, Any, bool], str] = {
        (True, "token", False): "cls",
        (False, "avg", False): "mean",
        (False, "avg", True): "mean_then_norm",
    }
    pool = pools.get(("cls_token" in stored, config.get("global_pool"), "fc_norm.weight" in stored))
    if pool is None:
        raise ValueError(f"global_pool is {config.get('global_pool')!r}, which does not go with its tokens and norm here")
    biases = [tensor.shape for name, tensor in stored.items() if "rel_pos." in name and name.endswith((TABLE, MLP))]
    arguments, pixels = (config.get(part) or {} for part in ("model_args", "pretrained_cfg"))
    heads = min(biases[0]) if biases else d_model // HEAD_WIDTH
    return {
        "d_model": d_model,
        "num_layers": 1 + max(int(name.split(".")[1]) for name in stored if name.startswith("blocks.")),
        "num_heads": arguments.get("num_heads", heads),
        "d_ff": stored[needed[2]].shape[0],
        "patch_size": patch_size,
        "in_channels": channels,
        "pool": pool,
        "attention_scale": True,
        "absolute_position": "pos_embed" in stored,
        "relative_position": bool(biases),
        "bias_type": "2d",
        **{f"image_{name}": tuple(pixels[name]) for name in ("mean", "std") if name in pixels},
    }


def named_as_ours(
    network: VisionTransformer, stored: Mapping[str, Any], fresh: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """({our name: tensor}, notes for the user). Tensors have a `shape`, and are read later, by `read(rows)`.

    `fresh` are the initial weights of our network, which stay where timm's has none that fit: a classifier of other classes,
    bias tables. What we have no place for keeps its name.
    """
    found: dict[str, Any] = {}
    used = {key for key in stored if key.endswith(tuple(LAYER_SCALES))}
    scale_of = {
        key.removesuffix(scale) + layer: stored[key]
        for scale, layer in LAYER_SCALES.items()
        for key in used
        if key.endswith(scale)
    }
    for name, own in fresh.items():
        theirs = f"fc_{name}" if name.startswith("norm.") and network.pool == "mean_then_norm" else name
        if name.endswith(TABLE):
            parts = _bias_parts(name, stored)
            used |= set(parts.values())
            tensors = {part: stored[key] for part, key in parts.items()}
            found[name] = _computed(own, bias_table, tensors, network.grid, own.shape[0]) if parts else own
        elif theirs in stored:
            used.add(theirs)
            layer = theirs.rpartition(".")[0]
            if name == "pos_embed":
                found[name] = _computed(own, position_embedding, stored[name], network.grid)
            elif name.startswith("head.") and stored[name].shape != own.shape:
                found[name] = own
            elif layer in scale_of:
                found[name] = _computed(own, _scaled, stored[theirs], scale_of[layer])
            else:
                found[name] = stored[theirs]
        elif name.endswith("qkv.bias"):
            found[name] = _computed(own, torch.zeros, own.shape)
    return found | {key: tensor for key, tensor in stored.items() if key not in used}, _notes(stored, fresh)


def _notes(stored: Mapping[str, Any], fresh: Mapping[str, Any]) -> list[str]:
    """What is said of weights that do not come over as they are."""
    notes, both = [], stored.keys() & fresh.keys()
    if "pos_embed" in both and stored["pos_embed"].shape != fresh["pos_embed"].shape:
        before, after = (tensors["pos_embed"].shape[1] for tensors in (stored, fresh))
        notes.append(f"Position embeddings are interpolated: {before} positions to {after}")
    if "blocks.0.attn.qkv.bias" in fresh.keys() - both:
        notes.append("Biases of queries, keys and values begin at 0: there are none in it")
    if "head.weight" in both and stored["head.weight"].shape != fresh["head.weight"].shape:
        notes.append("The classifier begins anew: its weights are of other classes")
    before, after = ({t.shape[0] for name, t in tensors.items() if name.endswith(TABLE)} for tensors in (stored, fresh))
    if before and after and before != after:
        notes.append(f"Tables of the position bias are interpolated: {max(before)} rows to {max(after)}")
    return notes


def _bias_parts(table: str, stored: Mapping[str, Any]) -> dict[str, str]:
    """{part: timm's name} of the position bias for a table of ours: that of its block, or of all; empty if there is none."""
    for place in (f"{table.partition('.attn.')[0]}.attn.rel_pos.", "shared_rel_pos."):
        if parts := {key.removeprefix(place): key for key in stored if key.startswith(place)}:
            return parts
    return {}


def _computed(own: Any, compute: Callable[..., Tensor], *arguments: Any) -> Any:
    """A tensor of the shape of `own` that is computed when it is read."""
    return replace(own, read=lambda rows: compute(*arguments)[rows])


def _scaled(stored: Any, stored_scale: Any) -> Tensor:
    weight, scale = stored.read(ALL_ROWS), stored_scale.read(ALL_ROWS)
    return weight * (scale[:, None] if weight.ndim == 2 else scale)


def position_embedding(stored: Any, grid: tuple[int, int]) -> Tensor:
    """Interpolate the positions of a square grid, [1, (1 +) positions, width], to another; the class token's stays as it is."""
    embedding = stored.read(ALL_ROWS)
    prefix = embedding.shape[1] - math.isqrt(embedding.shape[1]) ** 2
    side = math.isqrt(embedding.shape[1] - prefix)
    if grid == (side, side):
        return embedding
    square = embedding[:, prefix:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    resized = F.interpolate(square, grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([embedding[:, :prefix].float(), resized.flatten(2).transpose(1, 2)], 1)


def bias_table(parts: Mapping[str, Any], grid: tuple[int, int], rows: int) -> Tensor:
    """The table [rows, heads] of `RelativePositionBias` for a grid: timm's own, interpolated from a square grid if ours is
    another; or evaluated from its MLP of log-coordinates, which has no bias to and from a class token."""
    offsets = (2 * grid[0] - 1, 2 * grid[1] - 1)
    if TABLE in parts:
        table = parts[TABLE].read(ALL_ROWS).float()
        side = math.isqrt(len(table))
        last = table[side * side :]
        square = table[: side * side].t().reshape(1, -1, side, side)
        if (side, side) != offsets:
            square = F.interpolate(square, offsets, mode="bicubic", align_corners=True)
        return torch.cat([square.flatten(2)[0].t(), last])
    places = torch.stack(torch.meshgrid(*(torch.arange(1 - n, n).float() for n in grid), indexing="ij"), -1).flatten(0, 1)
    w1, b1, w2, b2 = (parts[f"mlp.{fc}"].read(ALL_ROWS).float() for fc in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"))
    table = F.linear(F.linear(places.sign() * places.abs().log1p(), w1, b1).relu(), w2, b2)
    return F.pad(table, (0, 0, 0, rows - len(table)))
