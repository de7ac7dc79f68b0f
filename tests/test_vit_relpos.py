"""The commands of the Vision Transformer recipe, on small trained runs: what they log, print, plot and compare."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launching import DRIVER, ROOT, environment
from matplotlib.figure import Figure
from PIL import Image

from recipes.commands import attention_visualisation
from recipes.commands.attention_visualisation import bias_statistics, one_of_each_class, visualize_relative_position_bias
from recipes.experiments.position_encodings import Curve, accuracy_table
from recipes.models.vit import VisionTransformer
from trainer.checkpoints.checkpoint import Checkpoint

SMALL = ["--patch_size", "2", "--d_model", "16", "--num_layers", "2", "--num_heads", "2", "--num_workers", "0"]
DIGITS = ["--dataset", "digits", "--val_samples", "100", "--batch_size", "100", "--max_epochs", "3", "--lr", "4e-3", *SMALL]
COMPARED = "model: {d_model: 16, num_layers: 1, num_heads: 2, patch_size: 2, window_size: [3, 3]}\n"
COMPARED += "data: {num_samples: 40, val_samples: 20, num_classes: 4}\n"
COMPARED += "optimisation: {batch_size: 20, max_epochs: 2}\nrun: {num_workers: 0, use_tensorboard: false}\n"
SCRIPT = {
    "train": ["--run_name", "digits", *DIGITS, "--log_grad_norms", "--log_every", "10", "--tensorboard_tags", "by_metric"],
    "evaluate": ["evaluate", "--model_path", "checkpoints/checkpoint_final"],
    "other batch": ["evaluate", "--model_path", "checkpoints/checkpoint_final", "--batch_size", "7"],
    "no test": ["evaluate", "--model_path", "checkpoints/checkpoint_final", "--split", "test"],
    "other classes": ["evaluate", "--model_path", "checkpoints/checkpoint_final", "--data_dir", "letters"],
    "training set": ["evaluate", "--model_path", "checkpoints/checkpoint_final", "--split", "train"],
    "visualise": ["visualise", "--model_path", "checkpoints/best_model", "--images", "2"],
    "patience": [
        "--run_name",
        "patient",
        *DIGITS,
        "--max_epochs",
        "50",
        "--lr",
        "0.3",
        "--patience",
        "2",
        "--save_epochs",
        "2",
    ],
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
    for name in "abcdefghij":
        (folder / "letters" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("L", (8, 8)).save(folder / "letters" / name / f"{number}.png")
    command = [sys.executable, "-c", DRIVER, str(ROOT / "recipes" / "vit_relpos.py"), str(folder / "logs")]
    command.append(json.dumps(list(SCRIPT.values())))
    env = environment(CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(ROOT), SAMECURVE_CACHE=str(folder / "cache"))
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, stdin=subprocess.DEVNULL, timeout=250)
    logs = sorted((folder / "logs").glob("*.log"), key=lambda path: int(path.stem))
    last = logs[-1].read_text()[-3000:] if logs else done.stderr.decode()[-3000:]
    assert (folder / "logs" / "codes.json").exists(), f"ended in {list(SCRIPT)[len(logs) - 1]}: {last}"
    codes = json.loads((folder / "logs" / "codes.json").read_text())
    outputs = zip(codes, (path.read_text() for path in logs), strict=True)
    return SimpleNamespace(folder=folder, outputs=dict(zip(SCRIPT, outputs, strict=True)))


def output(place: SimpleNamespace, name: str, code: int = 0) -> str:
    exit_code, text = place.outputs[name]
    assert exit_code == code, text[-3000:]
    assert "Traceback" not in text
    assert "WARNING" not in text
    return text


def rows(place: SimpleNamespace, run: str) -> list[dict[str, float]]:
    path = place.folder / "runs" / "vit_relpos" / run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_trains_and_logs_its_metrics(place: SimpleNamespace) -> None:
    text = output(place, "train")
    assert re.search(r"top-1: \d+\.\d\d% \| top-5: \d+\.\d\d%", text)
    assert re.search(r"validation, logistic regression on the pixels: top-1 9\d\.\d\d%, loss 0\.\d{4} nats per image", text)
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


def test_tensorboard_has_the_curves_of_training_and_validation_side_by_side(place: SimpleNamespace) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged = rows(place, "digits")
    events = EventAccumulator(str(place.folder / "runs" / "vit_relpos" / "digits" / "tensorboard"))
    events.Reload()
    tags = {"train/loss": "Loss/train", "eval/val_loss": "Loss/val"}
    tags |= {"train/accuracy": "Accuracy/train", "eval/val_accuracy": "Accuracy/val"}
    for metric, tag in tags.items():
        expected = {row["step"]: row[metric] for row in logged if metric in row}
        assert {event.step: event.value for event in events.Scalars(tag)} == pytest.approx(expected, rel=1e-6)
    others = {key for row in logged for key in row} - {"step", "time", *tags}
    assert set(events.Tags()["scalars"]) - set(tags.values()) == others


def test_the_best_model_is_the_most_accurate(place: SimpleNamespace) -> None:
    measured = {row["step"]: row["eval/val_accuracy"] for row in rows(place, "digits") if "eval/val_accuracy" in row}
    folder = place.folder / "runs" / "vit_relpos" / "digits" / "checkpoints"
    best = int(os.readlink(folder / "best_model").rpartition("_")[2])
    assert measured[best] == max(measured.values())


def test_a_checkpoint_holds_the_configuration_of_its_network(place: SimpleNamespace) -> None:
    checkpoint = Checkpoint(place.folder / "runs" / "vit_relpos" / "digits" / "checkpoints" / "best_model")
    model = VisionTransformer(**json.loads(checkpoint.text("config.json")))
    model.load_state_dict({name: checkpoint.tensor("model", name) for name in checkpoint.names("model")})
    assert json.loads(checkpoint.text("classes.json")) == [str(digit) for digit in range(10)]


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
    assert "letters has the classes a, b, c, d, e, f and 4 more" in output(place, "other classes", 2)
    assert "no test split" in output(place, "no test", 2)


def test_early_stopping_waits_for_a_lower_validation_loss(place: SimpleNamespace) -> None:
    """At a learning rate this high the loss goes up and down from the start."""
    assert "Finished" in output(place, "patience")
    assert ": patience." in output(place, "patience")
    losses = [row["eval/val_loss"] for row in rows(place, "patient") if "eval/val_loss" in row]
    assert losses.index(min(losses)) == len(losses) - 3
    folder = place.folder / "runs" / "vit_relpos" / "patient" / "checkpoints"
    kept = {path.name for path in folder.glob("checkpoint_epoch_*")}
    assert kept == {f"checkpoint_epoch_{epoch}" for epoch in range(2, len(losses) + 1, 2)}


def test_pictures_and_statistics(place: SimpleNamespace) -> None:
    text = output(place, "visualise")
    pattern = r"blocks\.\d\.attn\.relative_position_bias\.relative_position_bias_table: mean=-?0\.\d{4}, std=0\.\d{4}"
    assert len(re.findall(pattern, text)) == 2
    folder = place.folder / "runs" / "vit_relpos" / "digits" / "plots"
    for name in ("bias_layer_0", "bias_layer_1", "bias_by_offset", "attention"):
        with Image.open(folder / f"{name}.png") as picture:
            assert min(picture.size) > 200
            assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24)) > 50  # something is drawn


def test_offsets_are_whole_patches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(attention_visualisation, "save_figure", lambda figure, out: figures.append(figure))
    for height, width in ((7, 7), (3, 5), (1, 7)):
        attention_visualisation.plot_offsets([torch.ones(4, height, width)], tmp_path / "offsets.png", "offsets")
        for axis in figures[-1].axes[:4]:
            ticks = [*axis.get_xticks(), *(axis.get_yticks() if height > 1 else [])]
            assert all(tick == int(tick) for tick in ticks), ticks


def test_a_loop_over_the_blocks_plots_their_bias(tmp_path: Path) -> None:
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
    lines = accuracy_table(curves)
    assert lines[1].split() == ["relative", "2", "70.00%", "14.14%", "60.00%", "80.00%"]
    assert lines[2].split() == ["none", "1", "25.00%", "-", "25.00%", "25.00%"]
    assert "25.00%" in lines[3]


def test_the_images_of_the_attention_picture_are_one_of_each_class_wrong_ones_first() -> None:
    labels, predicted = [0, 0, 0, 1, 1, 2, 0], [0, 0, 1, 1, 1, 2, 2]
    assert one_of_each_class(labels, predicted, 3) == [2, 3, 5]  # wrong, then the first of the others
    assert one_of_each_class(labels, predicted, 5) == [2, 3, 5, 6, 4]  # then a second one of each, wrong ones first again
    assert sorted(one_of_each_class(labels, predicted, 9)) == [*range(7)]
