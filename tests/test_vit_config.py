"""The configuration of the Vision Transformer recipe: YAML files in sections, sizes that must agree, the schedule."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launching import ROOT, environment
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from recipes.vit_relpos import VitRelpos
from trainer.command_line import config as configuration
from trainer.errors import UserError

RECIPE = VitRelpos()
# Two files with sections of their own.
RPB_CONFIG = """
project:
  name: "relative_position_bias"
  seed: 42
  device: "cuda"

input:
  batch_size: 32
  sequence_length: 49
  embed_dim: 96

attention:
  num_heads: 4
  head_dim: 24
  dropout: 0.1
  scale: true

relative_position_bias:
  enabled: true
  type: "2d"
  window_size: [7, 7]
  learnable: true
  init_std: 0.02
"""
MY_EXPERIMENT = """
project:
  name: "my_experiment"
  seed: 123
  device: "cuda"

input:
  batch_size: 64
  embed_dim: 192

attention:
  num_heads: 8
  dropout: 0.1

relative_position_bias:
  enabled: true
  type: "2d"
  window_size: [14, 14]
"""


def parse(*argv: str) -> Any:
    return configuration.parse(RECIPE.config_class, RECIPE.presets, argv, RECIPE.name).config


def from_yaml(tmp_path: Path, text: str, *argv: str) -> Any:
    (tmp_path / "mine.yaml").write_text(text)
    return parse("--config", str(tmp_path / "mine.yaml"), *argv)


def build(config: Any) -> Any:
    with torch.device("meta"):
        return RECIPE.build_model(config, SimpleNamespace(extra={"classes": ["a"] * 10}))


# ---------------------------------------------------------------------------------------------------------------- YAML


def test_a_file_in_sections(tmp_path: Path) -> None:
    config = from_yaml(tmp_path, RPB_CONFIG)
    assert (config.run.run_name, config.run.device, config.optimisation.seed) == ("relative_position_bias", "cuda", 42)
    model = build(config)
    assert len(model.blocks) == 4
    assert model.head.out_features == 10
    assert model.grid == (7, 7)
    attention = model.blocks[0].attn
    assert (attention.num_heads, attention.head_dim, attention.dropout, attention.scale) == (4, 24, 0.1, 24**-0.5)
    assert attention.relative_position_bias.relative_position_bias_table.shape == (13 * 13 + 3, 4)
    sets = RECIPE.build_data(config)
    assert (len(sets.train), len(sets.evaluation["val"])) == (1000, 200)
    assert sets.train.__getitems__([0])["images"].shape == (1, 3, 112, 112)


def test_a_file_takes_defaults_for_what_it_lacks(tmp_path: Path) -> None:
    config = from_yaml(tmp_path, MY_EXPERIMENT)
    assert (config.optimisation.batch_size, config.optimisation.seed, config.model.d_model) == (64, 123, 192)
    assert config.optimisation.learning_rate == 1e-3
    assert build(config).blocks[0].attn.head_dim == 24
    assert RECIPE.build_data(config).train.__getitems__([0])["images"].shape == (1, 3, 224, 224)


def test_the_shipped_files_mean_the_same(tmp_path: Path) -> None:
    for name, text in (("rpb_config", RPB_CONFIG), ("my_experiment", MY_EXPERIMENT)):
        shipped, plain = parse("--config", f"recipes/configs/{name}.yaml"), from_yaml(tmp_path, text)
        assert shipped.model == plain.model
        differs = configuration.changed(shipped, plain, ("data", "optimisation", "run"))
        del differs["config"]
        # The shipped files name the number of samples, a device that every machine has, and one of them early stopping.
        ours = {"num_samples", "val_samples", "patience"} if name == "rpb_config" else set()
        assert set(differs) == ours | {"device"}
    assert parse("--config", "recipes/configs/rpb_config.yaml").run.patience == 10


def test_every_key_acts(tmp_path: Path) -> None:
    def changed(old: str, new: str) -> Any:
        assert old in RPB_CONFIG
        return build(from_yaml(tmp_path, RPB_CONFIG.replace(old, new))).blocks[0].attn

    assert changed("head_dim: 24", "head_dim: 10").qkv.out_features == 3 * 4 * 10
    assert changed("scale: true", "scale: false").scale == 1.0
    assert not changed("learnable: true", "learnable: false").relative_position_bias.relative_position_bias_table.requires_grad
    assert not hasattr(changed("enabled: true", "enabled: false"), "relative_position_bias")
    assert len(changed('type: "2d"', 'type: "1d"').relative_position_bias.relative_position_bias_table) == 2 * 49 - 1 + 3
    assert changed("dropout: 0.1", "dropout: 0.3").dropout == 0.3
    config = from_yaml(tmp_path, RPB_CONFIG + "training: {max_epochs: 3, lr: 1e-2}\ndata: {dataset: digits}\n")
    assert (config.optimisation.max_epochs, config.optimisation.learning_rate, config.data.dataset) == (3, 1e-2, "digits")
    assert RECIPE.build_data(config).train.__getitems__([0])["images"].shape == (
        1,
        1,
        14,
        14,
    )  # window x the digits' patch of 2


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("head_dim", "head_dims", ["'head_dims'", "'head_dim'", "attention"]),
        ("  type:", "  tpye:", ["'tpye'", "'type'"]),
        ("project:", "projcet:", ["'projcet'", "'project'"]),
        ("sequence_length: 49", "sequence_length: 50", ["50", "49"]),
        ("window_size: [7, 7]", "window_size: 7", ["window_size", "list"]),
        ("window_size: [7, 7]", "window_size: [7, 0]", ["window_size 0"]),
        ("num_heads: 4", "num_heads: 0", ["num_heads 0"]),
        ("head_dim: 24", "head_dim: -1", ["head_dim -1"]),
        ("init_std: 0.02", "init_std: -1", ["init_std -1"]),
        ("scale: true", "scale: 2", ["scale", "true or false"]),
        ('type: "2d"', 'type: "3d"', ["3d"]),
        ("input:", "data: {image_size: 224}\ninput:", ["7 x 7", "14 x 14"]),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(old: str, new: str, parts: list[str], tmp_path: Path) -> None:
    assert old in RPB_CONFIG
    with pytest.raises(UserError) as caught:
        from_yaml(tmp_path, RPB_CONFIG.replace(old, new))
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--num_heads", "5"], ["96", "5", "--head_dim"]),
        (["--image_size", "100"], ["100", "16"]),
        (["--mixup", "-1"], ["mixup -1"]),
        (["--label_smoothing", "1"], ["label_smoothing 1"]),
        (["--warmup_fraction", "1.5"], ["warmup_fraction 1.5"]),
        (["--image_std", "0"], ["image_std", "0"]),
        (["--image_mean", "nan"], ["image_mean", "nan"]),
        (["--image_mean", "0.1", "0.2"], ["image_mean", "2", "3"]),
        (["--in_channels", "2"], ["in_channels 2"]),
        (["--num_samples", "0"], ["num_samples 0"]),
    ],
)
def test_flags_that_no_run_can_mean(argv: list[str], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse(*argv)
    for part in parts:
        assert part in str(caught.value)


def test_a_resolved_configuration_stays_as_it_is() -> None:
    """A resumed run resolves the configuration of its checkpoint again."""
    for argv in ([], ["--preset", "quick"], ["--window_size", "3", "5"], ["--image_size", "224"], ["--dataset", "cifar10"]):
        config = parse(*argv)
        assert config.resolved() == config


def test_help_needs_no_torch() -> None:
    script = "import recipes.vit_relpos, sys; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "False\n", done.stderr


# ------------------------------------------------------------------------------------------------------------ schedule


@pytest.mark.parametrize(("epochs", "per_epoch"), [(100, 31), (50, 4)])
def test_the_first_step_of_each_epoch_has_the_rate_of_torchs_schedulers(epochs: int, per_epoch: int) -> None:
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    tenth = epochs // 10
    warmup = LinearLR(optimizer, start_factor=0.1, total_iters=tenth)
    parts = [warmup, CosineAnnealingLR(optimizer, T_max=epochs - tenth)]
    schedule = SequentialLR(optimizer, schedulers=parts, milestones=[tenth])
    config = parse()
    for epoch in range(epochs):
        ours = RECIPE.learning_rate(epoch * per_epoch + 1, epochs * per_epoch, config)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-15), epoch
        optimizer.step()
        schedule.step()


def test_a_typed_warmup_decides() -> None:
    rates = [RECIPE.learning_rate(step, 100, parse("--warmup_steps", "4")) for step in (1, 3, 5, 101)]
    assert rates == pytest.approx([1e-4, 5.5e-4, 1e-3, 0.0])
    assert RECIPE.learning_rate(1, 100, parse("--warmup_fraction", "0")) == 1e-3
    assert "10% of the run" in RECIPE.report.schedule(parse())
    assert "4 steps" in RECIPE.report.schedule(parse("--warmup_steps", "4"))
