"""The recipe of the Vision Transformer: the guide's YAML, schedule and stops, and its commands on a small trained run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launching import ROOT, environment
from PIL import Image
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from recipes.models.vit import VisionTransformer
from recipes.studies.position_study import Curve, table
from recipes.studies.relative_bias import bias_statistics, visualize_relative_position_bias
from recipes.vit_relpos import VitRelpos
from trainer import config as configuration
from trainer.checkpoint import Checkpoint
from trainer.errors import Refusal

RECIPE = VitRelpos()
# The guide's two files, word for word.
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
    return configuration.parse(RECIPE.Config, RECIPE.presets, argv, RECIPE.name).config


def from_yaml(tmp_path: Path, text: str, *argv: str) -> Any:
    (tmp_path / "mine.yaml").write_text(text)
    return parse("--config", str(tmp_path / "mine.yaml"), *argv)


def build(config: Any) -> Any:
    with torch.device("meta"):
        return RECIPE.build_model(config, SimpleNamespace(extra={"sets": SimpleNamespace(classes=["a"] * 10)}))


# ---------------------------------------------------------------------------------------------------------------- YAML


def test_the_guides_first_file(tmp_path: Path) -> None:
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


def test_the_guides_second_file_takes_defaults_for_what_it_lacks(tmp_path: Path) -> None:
    config = from_yaml(tmp_path, MY_EXPERIMENT)
    assert (config.optimisation.batch_size, config.optimisation.seed, config.model.d_model) == (64, 123, 192)
    assert config.optimisation.learning_rate == 1e-3
    assert build(config).blocks[0].attn.head_dim == 24
    assert RECIPE.build_data(config).train.__getitems__([0])["images"].shape == (1, 3, 224, 224)


def test_the_shipped_files_are_the_guides(tmp_path: Path) -> None:
    for name, text in (("rpb_config", RPB_CONFIG), ("my_experiment", MY_EXPERIMENT)):
        shipped, guides = parse("--config", f"recipes/configs/{name}.yaml"), from_yaml(tmp_path, text)
        assert shipped.model == guides.model
        differs = configuration.changed(shipped, guides, ("data", "optimisation", "run"))
        del differs["config"]
        # Named in full in ours; a device that every machine has; and the guide's early stopping, which its file lacks.
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
    ("old", "new", "words"),
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
def test_a_wrong_file_is_refused_in_one_line(old: str, new: str, words: list[str], tmp_path: Path) -> None:
    assert old in RPB_CONFIG
    with pytest.raises(Refusal) as caught:
        from_yaml(tmp_path, RPB_CONFIG.replace(old, new))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "words"),
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
def test_flags_that_no_run_can_mean(argv: list[str], words: list[str]) -> None:
    with pytest.raises(Refusal) as caught:
        parse(*argv)
    for word in words:
        assert word in str(caught.value)


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
def test_the_first_step_of_each_epoch_has_the_guides_rate(epochs: int, per_epoch: int) -> None:
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    tenth = epochs // 10
    warmup = LinearLR(optimizer, start_factor=0.1, total_iters=tenth)
    parts = [warmup, CosineAnnealingLR(optimizer, T_max=epochs - tenth)]
    schedule = SequentialLR(optimizer, schedulers=parts, milestones=[tenth])
    config = parse()
    for epoch in range(epochs):
        mine = RECIPE.learning_rate(epoch * per_epoch + 1, epochs * per_epoch, config)
        assert mine == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-15), epoch
        optimizer.step()
        schedule.step()


def test_a_typed_warmup_decides() -> None:
    rates = [RECIPE.learning_rate(step, 100, parse("--warmup_steps", "4")) for step in (1, 3, 5, 101)]
    assert rates == pytest.approx([1e-4, 5.5e-4, 1e-3, 0.0])
    assert RECIPE.learning_rate(1, 100, parse("--warmup_fraction", "0")) == 1e-3
    assert "10% of the run" in RECIPE.schedule_text(parse())
    assert "4 steps" in RECIPE.schedule_text(parse("--warmup_steps", "4"))


# ------------------------------------------------------------------------------------------------------- a trained run

# Runs commands one after another in one process, each as the recipe's file does it, so that the imports are paid once.
DRIVER = """
import json, os, runpy, sys
recipe, folder = sys.argv[1:3]
codes = []
for number, argv in enumerate(json.loads(sys.argv[3])):
    out = os.open(os.path.join(folder, f"{number}.log"), os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1), os.dup2(out, 2)
    os.close(out)
    sys.argv = [recipe, *argv]
    code = 0
    try:
        runpy.run_path(recipe, run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    sys.stdout.flush(), sys.stderr.flush()
    codes.append(code)
with open(os.path.join(folder, "codes.json"), "w") as file:
    json.dump(codes, file)
"""
SMALL = ["--patch_size", "2", "--d_model", "16", "--num_layers", "2", "--num_heads", "2", "--num_workers", "0"]
DIGITS = ["--dataset", "digits", "--val_samples", "100", "--batch_size", "100", "--max_epochs", "3", "--lr", "4e-3", *SMALL]
COMPARED = "model: {d_model: 16, num_layers: 1, num_heads: 2, patch_size: 2, window_size: [3, 3]}\n"
COMPARED += "data: {num_samples: 40, val_samples: 20, num_classes: 4}\n"
COMPARED += "optimisation: {batch_size: 20, max_epochs: 2}\nrun: {num_workers: 0, use_tensorboard: false}\n"
SCRIPT = {
    "train": ["--run_name", "digits", *DIGITS, "--log_grad_norms", "--log_every", "10"],
    "evaluate": ["evaluate", "--model_path", "checkpoints/checkpoint_final"],
    "other batch": ["evaluate", "--model_path", "checkpoints/checkpoint_final", "--batch_size", "7"],
    "no test": ["evaluate", "--model_path", "checkpoints/checkpoint_final", "--split", "test"],
    "training set": ["evaluate", "--model_path", "checkpoints/checkpoint_final", "--split", "train"],
    "visualise": ["visualise", "--model_path", "checkpoints/best_model", "--images", "2"],
    "patience": ["--run_name", "patient", *DIGITS, "--max_epochs", "50", "--lr", "0.3", "--patience", "2"],
    "compare": ["compare", "--config", "compared.yaml", "--seeds", "2", "--device", "cpu"],
    "compare again": ["compare", "--config", "compared.yaml", "--seeds", "2", "--device", "cpu"],
    "no seeds": ["compare", "--seeds", "0"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A working directory in which SCRIPT has been run: its folder, and {name: (exit code, output)}."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "logs").mkdir()
    (folder / "compared.yaml").write_text(COMPARED)
    words = [sys.executable, "-c", DRIVER, str(ROOT / "recipes" / "vit_relpos.py"), str(folder / "logs")]
    words.append(json.dumps(list(SCRIPT.values())))
    env = environment(CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(ROOT))
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, stdin=subprocess.DEVNULL, timeout=250)
    logs = sorted((folder / "logs").glob("*.log"), key=lambda path: int(path.stem))
    last = logs[-1].read_text()[-3000:] if logs else done.stderr.decode()[-3000:]
    assert (folder / "logs" / "codes.json").exists(), f"ended in {list(SCRIPT)[len(logs) - 1]}: {last}"
    codes = json.loads((folder / "logs" / "codes.json").read_text())
    said = zip(codes, (path.read_text() for path in logs), strict=True)
    return SimpleNamespace(folder=folder, said=dict(zip(SCRIPT, said, strict=True)))


def output(place: SimpleNamespace, name: str, code: int = 0) -> str:
    found, text = place.said[name]
    assert found == code, text[-3000:]
    assert "Traceback" not in text
    assert "WARNING" not in text
    return text


def rows(place: SimpleNamespace, run: str) -> list[dict[str, float]]:
    path = place.folder / "runs" / "vit_relpos" / run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_trains_and_logs_what_the_guide_lists(place: SimpleNamespace) -> None:
    text = output(place, "train")
    assert re.search(r"top-1: \d+\.\d\d% \| top-5: \d+\.\d\d%", text)
    assert re.search(r"validation, best weights \(step \d+, best_model\): top-1 \d", text)
    logged = rows(place, "digits")
    keys = {key for row in logged for key in row}
    expected = {"train/loss", "train/accuracy", "train/learning_rate", "eval/val_loss", "eval/val_accuracy", "eval/val_top5"}
    expected |= {"final/val_accuracy", "train/images_per_sec"}
    expected |= {
        f"train/grad_norm/{layer}" for layer in ("patch_embed.proj", "cls_token", "blocks.0", "blocks.1", "norm", "head")
    }
    assert expected <= keys
    assert not any("loss_" in key for key in keys)
    measured = [row for row in logged if "eval/val_accuracy" in row]
    assert len(measured) == 3  # at the end of each epoch
    assert measured[-1]["eval/val_accuracy"] > 0.15
    for row in logged:
        if "train/accuracy" in row:
            assert 0 < row["train/accuracy"] < 1
            squares = sum(value**2 for key, value in row.items() if key.startswith("train/grad_norm/"))
            assert squares**0.5 == pytest.approx(row["train/grad_norm"], rel=1e-5)
    folder = place.folder / "runs" / "vit_relpos" / "digits"
    assert (folder / "plots" / "accuracy.png").stat().st_size > 1000
    assert list((folder / "tensorboard").glob("**/events.out.tfevents*"))


def test_the_best_model_is_the_most_accurate(place: SimpleNamespace) -> None:
    measured = {row["step"]: row["eval/val_accuracy"] for row in rows(place, "digits") if "eval/val_accuracy" in row}
    folder = place.folder / "runs" / "vit_relpos" / "digits" / "checkpoints"
    best = int(os.readlink(folder / "best_model").rpartition("_")[2])
    assert measured[best] == max(measured.values())


def test_a_checkpoint_says_how_to_build_its_network(place: SimpleNamespace) -> None:
    found = Checkpoint(place.folder / "runs" / "vit_relpos" / "digits" / "checkpoints" / "best_model")
    model = VisionTransformer(**json.loads(found.text("config.json")))
    model.load_state_dict({name: found.tensor("model", name) for name in found.names("model")})
    assert json.loads(found.text("classes.json")) == [str(digit) for digit in range(10)]


def test_evaluate_gives_what_training_logged_for_any_batch_size(place: SimpleNamespace) -> None:
    last = rows(place, "digits")[-1]
    for name in ("evaluate", "other batch"):
        match = re.search(
            r"validation: top-1 ([\d.]+)%, top-5 ([\d.]+)%, loss ([\d.]+) nats per image over 100 images", output(place, name)
        )
        assert match
        top1, top5, loss = map(float, match.groups())
        assert top1 == pytest.approx(100 * last["final/val_accuracy"], abs=0.006)
        assert top5 == pytest.approx(100 * last["final/val_top5"], abs=0.006)
        assert loss == pytest.approx(last["final/val_loss"], abs=6e-5)
    assert "over 1,697 images" in output(place, "training set")
    assert "no test split" in output(place, "no test", 2)


def test_early_stopping_waits_for_a_lower_validation_loss(place: SimpleNamespace) -> None:
    """At a learning rate this high the loss goes up and down from the start."""
    assert "Finished" in output(place, "patience")
    assert ": patience." in output(place, "patience")
    losses = [row["eval/val_loss"] for row in rows(place, "patient") if "eval/val_loss" in row]
    assert losses.index(min(losses)) == len(losses) - 3


def test_pictures_and_statistics(place: SimpleNamespace) -> None:
    text = output(place, "visualise")
    pattern = r"blocks\.\d\.attn\.relative_position_bias\.relative_position_bias_table: mean=-?0\.\d{4}, std=0\.\d{4}"
    assert len(re.findall(pattern, text)) == 2
    folder = place.folder / "runs" / "vit_relpos" / "digits" / "plots"
    for name in ("bias_layer_0", "bias_layer_1", "bias_by_offset", "attention"):
        with Image.open(folder / f"{name}.png") as picture:
            assert min(picture.size) > 200
            assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24)) > 50  # something is drawn


def test_the_guides_loop_over_blocks_draws_their_bias(tmp_path: Path) -> None:
    model = VisionTransformer(img_size=(12, 8), patch_size=4, embed_dim=8, depth=2, num_heads=2)
    for i, block in enumerate(model.blocks):
        if hasattr(block.attn, "relative_position_bias"):
            bias = block.attn.relative_position_bias()
            visualize_relative_position_bias(bias, save_path=f"{tmp_path}/debug/bias_block_{i}.png")
    assert len(list((tmp_path / "debug").glob("bias_block_*.png"))) == 2
    assert len(bias_statistics(model)) == 2
    assert bias_statistics(VisionTransformer(use_relative_position=False, embed_dim=8, depth=1, num_heads=2)) == []


def test_compare_trains_each_variant_and_seed_once(place: SimpleNamespace) -> None:
    text = output(place, "compare")
    folder = place.folder / "runs" / "vit_relpos_comparison"
    assert (folder / "plots" / "comparison.png").stat().st_size > 1000
    names = {
        f"{variant}_seed{seed}" for variant in ("relative", "relative_and_absolute", "absolute", "none") for seed in (42, 43)
    }
    assert {path.name for path in folder.iterdir()} == names | {"plots"}
    tensors = {name: Checkpoint(folder / name / "checkpoints" / "checkpoint_final").names("model") for name in names}
    for name, have in tensors.items():
        assert ("pos_embed" in have) == ("absolute" in name)
        assert any("relative_position_bias" in tensor for tensor in have) == ("relative" in name)
    lines = [line for line in text.splitlines() if line.startswith(("relative", "absolute", "none"))][-4:]
    again = output(place, "compare again")
    assert again.count("Already finished") == 8
    assert [line for line in again.splitlines() if line in lines] == lines
    assert "seeds 0" in output(place, "no seeds", 2)


def test_the_table_has_the_spread_over_seeds() -> None:
    curves = {"relative": [Curve([1, 2], [0.1, 0.8], 4), Curve([1, 2], [0.1, 0.6], 4)], "none": [Curve([2], [0.25], 4)]}
    lines = table(curves)
    assert lines[1].split() == ["relative", "2", "70.00%", "14.14%", "60.00%", "80.00%"]
    assert lines[2].split() == ["none", "1", "25.00%", "-", "25.00%", "25.00%"]
    assert "25.00%" in lines[3]
