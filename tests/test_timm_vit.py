"""--init_from with a Vision Transformer of timm: the same function, on another grid too, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from recipes.models.timm_vit import MLP, TABLE
from recipes.models.vit import VisionTransformer
from recipes.vit_relpos import VitRelpos
from trainer.checkpoints.init_from import with_settings
from trainer.checkpoints.network import build_empty_network, pretrained_weights
from trainer.command_line import config as configuration
from trainer.errors import UserError
from trainer.initial_weights import fill
from trainer.recipe import Data

OURS = ".attn.relative_position_bias."


def random_vit(**more: Any) -> VisionTransformer:
    torch.manual_seed(0)
    arguments = {"img_size": 12, "patch_size": 4, "num_classes": 5, "embed_dim": 16, "depth": 2, "num_heads": 2}
    network = VisionTransformer(**{**arguments, **more}).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network


def as_timm(network: VisionTransformer) -> dict[str, Tensor]:
    """Its weights under timm's names, with layer scales and without biases of queries, keys and values."""
    found = {}
    for name, tensor in network.state_dict().items():
        found[name.replace(OURS, ".attn.rel_pos.")] = tensor.clone()
    for block in range(len(network.blocks)):
        for layer, scale in (("attn.proj", "ls1.gamma"), ("mlp.fc2", "ls2.gamma")):
            gamma = found[f"blocks.{block}.{scale}"] = torch.rand(16) + 0.5
            found[f"blocks.{block}.{layer}.weight"] /= gamma[:, None]
            found[f"blocks.{block}.{layer}.bias"] /= gamma
    return found


def loaded(folder: Path, weights: dict[str, Tensor], *flags: str, **config: Any) -> tuple[VisionTransformer, VitRelpos]:
    """Our network of a folder with these weights and settings, for 5 classes and images of 12 pixels unless flags say more."""
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_test", "global_pool": "token", **config}))
    recipe, argv = VitRelpos(), ["--init_from", str(folder), "--patch_size", "4", *(flags or ("--image_size", "12"))]
    config_of_run = with_settings(
        recipe, configuration.parse(recipe.config_class, recipe.presets, argv, recipe.name), argv
    ).config
    data = Data(None, {}, extra={"classes": list("abcde")})
    network, initial = build_empty_network(recipe, config_of_run, data)
    fill(network, pretrained_weights(recipe, network, initial, str(folder)), torch.device("cpu"))
    assert isinstance(network, VisionTransformer)
    return network.eval(), recipe


@pytest.mark.parametrize(
    ("more", "pool"),
    [
        ({"use_absolute_position": False}, "token"),
        ({"use_relative_position": False}, "token"),
        ({"pool": "mean", "use_absolute_position": False}, "avg"),
        ({"pool": "mean_then_norm", "use_absolute_position": False}, "avg"),
    ],
)
def test_it_is_the_same_function(more: dict[str, Any], pool: str, tmp_path: Path) -> None:
    theirs = random_vit(**more)
    weights = as_timm(theirs)
    if pool == "avg" and more["pool"] == "mean_then_norm":
        weights = {f"fc_{name}" if name.startswith("norm.") else name: tensor for name, tensor in weights.items()}
    arguments = {} if theirs.state_dict().keys() & {f"blocks.0{OURS}{TABLE}"} else {"model_args": {"num_heads": 2}}
    ours, recipe = loaded(tmp_path, weights, global_pool=pool, **arguments)
    images = torch.rand(3, 3, 12, 12)
    torch.testing.assert_close(ours(images), theirs((images - 0.5) / 0.5), rtol=1e-5, atol=1e-5)  # ours normalises by itself
    assert recipe.notes == []


def test_a_network_of_log_coordinates_becomes_a_table_for_any_grid(tmp_path: Path) -> None:
    """timm's RelPosMlp, mode `cr`: an MLP with a ReLU of sign(d) ln(1 + |d|); none to and from the class token."""
    weights = {name: tensor for name, tensor in as_timm(random_vit()).items() if not name.endswith((TABLE, "qkv.bias"))}
    del weights["pos_embed"]
    for block in range(2):
        shapes = {"fc1.weight": (8, 2), "fc1.bias": (8,), "fc2.weight": (2, 8), "fc2.bias": (2,)}
        weights |= {f"blocks.{block}.attn.rel_pos.mlp.{name}": torch.randn(shape) for name, shape in shapes.items()}
    ours, recipe = loaded(tmp_path, weights, "--window_size", "3", "5")
    fc = {name: weights[f"blocks.1.attn.rel_pos.mlp.{name}"] for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")}
    place = torch.tensor([2.0, -3.0])
    hidden = (fc["fc1.weight"] @ (place.sign() * (1 + place.abs()).log()) + fc["fc1.bias"]).relu()
    bias = ours.blocks[1].attn.relative_position_bias()  # type: ignore[union-attr, operator]
    query, key = 1 + 2 * 5 + 0, 1 + 0 * 5 + 3
    torch.testing.assert_close(bias[:, query, key], fc[MLP.removeprefix("mlp.")] @ hidden + fc["fc2.bias"])
    assert not bias[:, 0].any()
    assert not bias[:, :, 0].any()
    assert recipe.notes == ["Biases of queries, keys and values begin at 0: there are none in it"]


def test_another_grid_and_other_classes_are_said(tmp_path: Path) -> None:
    theirs = random_vit(num_classes=7)
    ours, recipe = loaded(tmp_path, as_timm(theirs), "--image_size", "20")
    before, after = (vit.blocks[0].attn.relative_position_bias for vit in (theirs, ours))  # type: ignore[union-attr]
    for place, other in ((2, 4), (0, 0), (-1, -1)):  # no offset, and the farthest
        torch.testing.assert_close(before.by_offset()[:, place, place], after.by_offset()[:, other, other])  # type: ignore[union-attr, operator]
    table = f"relative_position_bias.{TABLE}"
    torch.testing.assert_close(*(dict(vit.blocks[0].attn.named_parameters())[table][-3:] for vit in (theirs, ours)))
    torch.testing.assert_close(theirs.pos_embed[:, 0], ours.pos_embed[:, 0])
    assert recipe.notes == [
        "Position embeddings are interpolated: 10 positions to 26",
        "The classifier begins anew: its weights are of other classes",
        "Tables of the position bias are interpolated: 28 rows to 84",
    ]


def test_what_this_network_has_not_is_refused_by_name(tmp_path: Path) -> None:
    weights = as_timm(random_vit())
    with pytest.raises(UserError, match="architecture is 'vit_relpos_base_patch16_rpn_224', with norms behind"):
        loaded(tmp_path, weights, architecture="vit_relpos_base_patch16_rpn_224")
    with pytest.raises(UserError, match="global_pool is 'map'"):
        loaded(tmp_path, weights, global_pool="map")
    with pytest.raises(UserError, match=r"d_model: .* has 16, asked for 32"):
        loaded(tmp_path, weights, "--d_model", "32")
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.q_norm\.weight"):
        loaded(tmp_path, {**weights, "blocks.0.attn.q_norm.weight": torch.ones(8)})
    del weights["patch_embed.proj.weight"]
    with pytest.raises(UserError, match=r"holds no patch_embed\.proj\.weight"):
        loaded(tmp_path, weights)
