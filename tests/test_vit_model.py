"""Relative position bias and the Vision Transformer: indices by hand, gradients, attention, sizes that must agree."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.models.patch_grid import patch_grid
from recipes.models.vit import RelativePositionBias, VisionTransformer
from recipes.vit_relpos import VitRelpos
from trainer.command_line import config as configuration

SMALL = {"img_size": (12, 20), "patch_size": 4, "in_channels": 1, "num_classes": 6, "embed_dim": 24, "depth": 2, "num_heads": 3}


def make_model(**changes: Any) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(**{**SMALL, **changes})


def images(batch: int = 4) -> Tensor:
    return torch.randn(batch, 1, 12, 20, generator=torch.Generator().manual_seed(1))


def test_images_of_eight_bits_and_of_floats_are_normalised_alike() -> None:
    model = make_model(in_channels=3, mean=(0.5, 0.1, 0.2), std=(0.5, 2.0, 1.0))
    pixels = torch.randint(256, (2, 3, 12, 20), dtype=torch.uint8)
    expected = (pixels.double() / 255 - torch.tensor([0.5, 0.1, 0.2]).view(3, 1, 1)) / torch.tensor([0.5, 2, 1]).view(3, 1, 1)
    torch.testing.assert_close(model.normalise(pixels), expected.float())
    torch.testing.assert_close(model(pixels), make_model(in_channels=3)(expected.float()))
    assert torch.equal(model(pixels), model(pixels / 255))
    assert model.bfloat16().normalise(pixels).dtype == torch.bfloat16


# --------------------------------------------------------------------------------------------------------------- index


def test_the_index_of_two_by_two_with_a_class_token() -> None:
    index = RelativePositionBias(2, (2, 2), prefix_tokens=1).relative_position_index
    expected = [[11, 9, 9, 9, 9], [10, 4, 3, 1, 0], [10, 5, 4, 2, 1], [10, 7, 6, 4, 3], [10, 8, 7, 5, 4]]
    assert index.tolist() == expected
    assert RelativePositionBias(2, (2, 2)).relative_position_index.tolist() == [row[1:] for row in expected[1:]]


@pytest.mark.parametrize("window", [(7, 7), (14, 14), (3, 5)])
@pytest.mark.parametrize("prefix", [0, 1])
def test_the_bias_equals_a_double_loop(window: tuple[int, int], prefix: int) -> None:
    layer = RelativePositionBias(3, window, prefix_tokens=prefix)
    height, width = window
    table, offsets = layer.relative_position_bias_table, (2 * height - 1) * (2 * width - 1)
    assert table.shape == (offsets + 3 * prefix, 3)
    bias = layer()
    assert bias.shape == (3, height * width + prefix, height * width + prefix)
    places = [(i, j) for i in range(height) for j in range(width)]
    rows = [[(qi - ki + height - 1) * (2 * width - 1) + qj - kj + width - 1 for ki, kj in places] for qi, qj in places]
    assert torch.equal(bias[:, prefix:, prefix:], table[torch.tensor(rows)].permute(2, 0, 1))
    if prefix:
        assert torch.equal(bias[:, 0, 1:], table[offsets, :, None].expand(3, len(places)))
        assert torch.equal(bias[:, 1:, 0], table[offsets + 1, :, None].expand(3, len(places)))
        assert torch.equal(bias[:, 0, 0], table[offsets + 2])


def test_one_dimension_counts_places_in_the_row() -> None:
    layer = RelativePositionBias(2, seq_len=3, bias_type="1d")
    assert layer.relative_position_index.tolist() == [[2, 1, 0], [3, 2, 1], [4, 3, 2]]
    with_class = RelativePositionBias(2, seq_len=3, bias_type="1d", prefix_tokens=1)
    assert with_class.relative_position_index.tolist() == [[7, 5, 5, 5], [6, 2, 1, 0], [6, 3, 2, 1], [6, 4, 3, 2]]


@pytest.mark.parametrize("prefix", [0, 1])
def test_the_gradient_of_a_row_is_the_sum_over_the_pairs_at_that_offset(prefix: int) -> None:
    layer = RelativePositionBias(2, (3, 4), prefix_tokens=prefix)
    upstream = torch.randn(layer().shape, generator=torch.Generator().manual_seed(2))
    layer().backward(upstream)
    for row in range(len(layer.relative_position_bias_table)):
        pairs = layer.relative_position_index == row
        expected = upstream[:, pairs].sum(-1)
        torch.testing.assert_close(layer.relative_position_bias_table.grad[row], expected, rtol=1e-5, atol=1e-5)


def test_by_offset_has_the_middle_of_the_table_in_the_middle() -> None:
    layer = RelativePositionBias(2, (3, 5), prefix_tokens=1)
    by_offset = layer.by_offset()
    assert by_offset.shape == (2, 5, 9)
    assert torch.equal(by_offset[:, 2, 4], layer()[:, 1, 1])  # a patch and itself
    assert torch.equal(by_offset[:, 2 + 1, 4 - 2], layer()[:, 1 + 5, 1 + 2])  # one below, two to the left: query - key


def test_tables_start_with_the_given_standard_deviation() -> None:
    torch.manual_seed(0)
    assert RelativePositionBias(8, (14, 14), init_std=0.1).relative_position_bias_table.std().item() == pytest.approx(
        0.1, rel=0.05
    )


# ----------------------------------------------------------------------------------------------------------- attention


def by_hand(attention: Any, x: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Softmax attention written out, in the dtype of x."""
    heads, width = attention.num_heads, attention.head_dim
    q, k, v = attention.qkv(x).view(*x.shape[:2], 3, heads, width).permute(2, 0, 3, 1, 4)
    logits = torch.einsum("bhqd,bhkd->bhqk", q, k) * scale
    mixed = (logits if bias is None else logits + bias).softmax(-1) @ v
    return attention.proj(mixed.transpose(1, 2).reshape(*x.shape[:2], heads * width))


@pytest.mark.parametrize("bias_on", [True, False])
@pytest.mark.parametrize("scale", [True, False])
def test_attention_adds_the_bias_to_the_scaled_logits(bias_on: bool, scale: bool) -> None:
    attention = make_model(use_relative_position=bias_on, scale=scale).eval().blocks[1].attn
    x = torch.randn(2, 16, 24)
    bias = attention.relative_position_bias() * 1.0 if bias_on else None
    expected = by_hand(attention, x, bias, 1 / math.sqrt(8) if scale else 1.0)
    torch.testing.assert_close(attention(x), expected, rtol=1e-5, atol=1e-6)
    assert hasattr(attention, "relative_position_bias") == bias_on
    weights = attention.attention_weights(x)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 16))


def test_in_bf16_attention_with_the_bias_equals_fp32_to_bf16_tolerance() -> None:
    attention = make_model().eval().blocks[0].attn
    with torch.no_grad():
        attention.relative_position_bias.relative_position_bias_table.mul_(50)  # of size 1: it must matter
        x = torch.randn(4, 16, 24)
        right = by_hand(attention, x, attention.relative_position_bias(), 8**-0.5)
        without = by_hand(attention, x, None, 8**-0.5)
        with torch.autocast("cpu", torch.bfloat16):
            result = attention(x)
    assert result.dtype == torch.bfloat16
    size = float(right.abs().max())
    assert float((result.float() - right).abs().max()) < 0.02 * size
    assert float((without - right).abs().max()) > 0.1 * size


def test_the_mask_is_gathered_once_in_the_dtype_of_the_queries_and_padded_to_eights(monkeypatch: Any) -> None:
    masks: list[Tensor] = []
    real = F.scaled_dot_product_attention

    def spy(*args: Any, attn_mask: Tensor, **options: Any) -> Tensor:
        masks.append(attn_mask)
        return real(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    with torch.autocast("cpu", torch.bfloat16):
        make_model(pool="mean", img_size=(12, 12))(images()[..., :12])
    assert len(masks) == 2
    for mask in masks:
        assert mask.shape == (1, 3, 9, 9)
        assert mask.dtype == torch.bfloat16
        assert mask.stride()[1:] == (9 * 16, 16, 1)  # rows of 16 for 9 keys


# --------------------------------------------------------------------------------------------------------------- model


def test_vit_b_16_runs_forward_and_backward_with_its_class_token() -> None:
    model = VisionTransformer(
        img_size=224,
        patch_size=16,
        in_channels=3,
        num_classes=1000,
        embed_dim=768,
        depth=12,
        num_heads=12,
        use_relative_position=True,
        rpb_kwargs={"num_heads": 12, "window_size": (14, 14), "bias_type": "2d", "init_std": 0.02},
    )
    assert sum(p.numel() for p in model.parameters()) == 86_673_064
    assert [tuple(b.attn.relative_position_bias.relative_position_bias_table.shape) for b in model.blocks] == [(732, 12)] * 12
    logits = model(torch.randn(1, 3, 224, 224))
    assert logits.shape == (1, 1000)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_names() -> None:
    names = set(dict(make_model(depth=1).named_parameters()))
    block = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    expected = {f"{part}.{kind}" for part in ("patch_embed.proj", "norm", "head") for kind in ("weight", "bias")}
    expected |= {f"blocks.0.{part}.{kind}" for part in block for kind in ("weight", "bias")}
    expected |= {"cls_token", "pos_embed", "blocks.0.attn.relative_position_bias.relative_position_bias_table"}
    assert names == expected
    bare = set(
        dict(make_model(depth=1, pool="mean", use_absolute_position=False, use_relative_position=False).named_parameters())
    )
    assert expected - bare == {name for name in expected if "position" in name or "token" in name or "pos_embed" in name}


def test_weight_decay_by_name() -> None:
    model = make_model(depth=1, rpb_kwargs={"learnable": True})
    decayed, others = (
        {name for name, p in model.named_parameters() if any(p is q for q in group["params"])}
        for group in model.weight_decay_groups(0.05)
    )
    maps = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    assert decayed == {"patch_embed.proj.weight", "head.weight", *(f"blocks.0.{name}.weight" for name in maps)}
    assert decayed | others == set(dict(model.named_parameters()))
    assert [group["weight_decay"] for group in model.weight_decay_groups(0.05)] == [0.05, 0.0]


@pytest.mark.parametrize("learnable", [True, False])
def test_muon_gets_the_matrices_of_the_blocks_and_adamw_the_rest(learnable: bool) -> None:
    recipe, model = VitRelpos(), make_model(rpb_kwargs={"learnable": learnable})
    config = configuration.parse(recipe.config_class, {}, ["--optimizer", "muon"], recipe.name).config
    groups = recipe.optimizer(model, config).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    muon, adamw = ({names[id(p)] for g in groups if g["muon"] == use for p in g["params"]} for use in (True, False))
    maps = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert muon == {f"blocks.{i}.{layer}.weight" for i in (0, 1) for layer in maps}
    tables = {f"blocks.{i}.attn.relative_position_bias.relative_position_bias_table" for i in (0, 1)}
    assert {"patch_embed.proj.weight", "cls_token", "pos_embed", "head.weight", "norm.weight"} <= adamw
    assert muon | adamw == set(names.values()) - (set() if learnable else tables)


def test_a_frozen_table_is_not_trained() -> None:
    model = make_model(rpb_kwargs={"learnable": False})
    model(images()).sum().backward()
    table = model.blocks[0].attn.relative_position_bias.relative_position_bias_table
    assert table.grad is None
    assert all(p is not table for group in model.weight_decay_groups(0.1) for p in group["params"])


def test_dropout_is_on_in_training_only() -> None:
    """Everywhere: of attention weights too, which are dropped by a function and not by a module."""
    model, x = make_model(dropout=0.5), images()
    trained = model.train()(x), model(x)
    assert not torch.equal(*trained)
    assert torch.equal(model.eval()(x), make_model().eval()(x))


def test_a_model_without_positions_sees_only_which_patches_there_are() -> None:
    x = images(2)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(3))
    patches = F.unfold(x, 4, stride=4)[..., order]
    shuffled = F.fold(patches, (12, 20), 4, stride=4)
    for relative in (False, True):
        model = make_model(use_absolute_position=False, use_relative_position=relative).eval()
        if relative:
            with torch.no_grad():
                model.blocks[0].attn.relative_position_bias.relative_position_bias_table.mul_(50)
        apart = (model(x) - model(shuffled)).abs().max().item()
        assert (apart > 1e-4) if relative else (apart < 1e-6), apart


def test_attention_maps_are_those_of_the_forward_pass() -> None:
    model = make_model().eval()
    maps = model.attention_maps(images())
    assert maps.shape == (2, 4, 3, 16, 16)
    x = model.embed(images())
    x = model.blocks[0](x)
    torch.testing.assert_close(maps[1], model.blocks[1].attn.attention_weights(model.blocks[1].norm1(x)))


def test_flops_of_vit_base() -> None:
    with torch.device("meta"):
        model = VisionTransformer()
    # 17.6 G multiply-adds forward is what is commonly reported for ViT-B/16 at 224; 6 FLOPs each, forward and backward.
    assert model.training_flops() == pytest.approx(6 * 17.56e9, rel=0.01)


# --------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"img_size": (12, 21)}, ["12 x 21", "patch_size 4"]),
        ({"num_heads": 5}, ["24", "5 heads"]),
        ({"rpb_kwargs": {"num_heads": 4}}, ["num_heads 4", "num_heads 3"]),
        ({"rpb_kwargs": {"window_size": (7, 7)}}, ["(7, 7)", "(3, 5)"]),
        ({"rpb_kwargs": {"bias_type": "1d", "seq_len": 49}}, ["49", "15"]),
        ({"rpb_kwargs": {"bias_type": "3d"}}, ["3d"]),
        ({"rpb_kwargs": {"prefix_tokens": 0}}, ["prefix_tokens 0"]),
        ({"pool": "max"}, ["max"]),
    ],
)
def test_sizes_that_contradict_each_other(arguments: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ValueError, match=r"\S") as caught:
        make_model(**arguments)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("arguments", [{"bias_type": "2d", "seq_len": 4}, {"bias_type": "1d", "window_size": (2, 2)}])
def test_a_bias_without_its_size(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs"):
        RelativePositionBias(2, **arguments)


def test_one_size_follows_from_the_others() -> None:
    assert patch_grid(16, 112).window == (7, 7)
    assert patch_grid(16, 224, window=(3, 5)).image == (48, 80)
    assert patch_grid(16, 224, sequence_length=49).image == (112, 112)
    assert patch_grid(16, 112, image=224).window == (14, 14)
    assert patch_grid(16, 112, image=224, window=(14, 14), sequence_length=196).window == (14, 14)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"image": 224, "window": (7, 7)}, ["7 x 7", "14 x 14"]),
        ({"image": 100}, ["100", "16"]),
        ({"image": 8}, ["8", "16"]),
        ({"window": (7, 7), "sequence_length": 50}, ["50", "49"]),
        ({"sequence_length": 50}, ["50", "window_size"]),
        ({"image": 224, "sequence_length": 49}, ["49", "196"]),
    ],
)
def test_sizes_that_leave_no_grid(given: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ValueError, match=r"\S") as caught:
        patch_grid(16, 112, **given)
    for part in parts:
        assert part in str(caught.value)
