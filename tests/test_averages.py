"""`--ema`: what is averaged, what it is used for, and that training goes on from the weights themselves.

That it is the same under every launch, and carried from one to the other, is in test_any_launch_resumes.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import export_hf
import pytest
import torch
from forked import TIMEOUT
from safetensors.torch import load_file
from test_optimizer import NAMES, RATES, make_backend, train
from test_resume import flags, write_text
from test_resume import launch as launch_gpt2
from toy_recipe import ToyRecipe

from trainer import main
from trainer.checkpoints.checkpoint import Checkpoint
from trainer.checkpoints.network import evaluate_objective, load_for_evaluation
from trainer.command_line import config
from trainer.distributed.control import Control
from trainer.distributed.launch import Launch
from trainer.errors import UserError
from trainer.optimisation.averages import keep_averages
from trainer.recipe import Data
from trainer.reporting.console import Console
from trainer.reporting.trackers import read_metrics

ALONE = Launch(0, 1, 0, torch.device("cpu"), Control(0, 1, TIMEOUT))
DECAY = 0.75


def run(folder: Path, *argv: str, recipe: ToyRecipe | None = None) -> list[dict[str, Any]]:
    """Train the toy in this process; what it logged."""
    recipe = recipe or ToyRecipe()
    words = [
        "--output_dir",
        str(folder),
        "--max_steps",
        "12",
        "--save_every",
        "1",
        "--keep_last",
        "0",
        "--device",
        "cpu",
        *argv,
    ]
    main.train(recipe, config.parse(recipe.config_class, {}, words, recipe.name), words, ALONE, Console(None, True))
    return read_metrics(folder / "metrics.jsonl")


def saved(folder: Path, step: int) -> Checkpoint:
    return Checkpoint(folder / "checkpoints" / f"checkpoint_step_{step}")


def curve(rows: list[dict[str, Any]], name: str) -> dict[int, float]:
    return {row["step"]: row[name] for row in rows if name in row}


@pytest.mark.parametrize("name", NAMES)
def test_the_average_is_the_mean_of_the_first_weights_and_then_forgets(name: str) -> None:
    net, update = make_backend(name, ema=DECAY)
    expected: dict[str, torch.Tensor] = {}
    for step in range(1, 9):
        train(net, update, RATES[name], [step])
        for key, p in net.named_parameters():
            expected[key] = torch.lerp(expected.get(key, p), p, max(1 - DECAY, 1 / step)).detach().clone()
    weights = {key: p.detach().clone() for key, p in net.named_parameters()}
    update.use_averages(True)
    for key, p in net.named_parameters():
        assert torch.allclose(p, expected[key], atol=1e-6), key
        assert not torch.allclose(p, weights[key], atol=1e-5), key
    update.use_averages(False)
    assert all(torch.equal(p, weights[key]) for key, p in net.named_parameters())


def test_a_step_that_the_device_skips_is_not_in_the_average() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer: Any = keep_averages(torch.optim.SGD([p], lr=1.0, fused=True), DECAY)
    for skipped in (0.0, 1.0, 0.0):
        p.grad = torch.ones(3)
        optimizer.found_inf = torch.tensor(skipped)
        optimizer.step()
    assert p.tolist() == [-1.0] * 3
    assert optimizer.state[p]["ema_steps"] == 2
    assert optimizer.state[p]["ema"].tolist() == [-0.5] * 3


def test_it_is_evaluated_and_loaded_and_training_is_what_it_would_be_without(tmp_path: Path) -> None:
    evaluating = ["--eval_every", "3"]
    plain, averaged = run(tmp_path / "plain", *evaluating), run(tmp_path / "ema", *evaluating, "--ema", str(DECAY))
    assert curve(plain, "train/loss") == curve(averaged, "train/loss")
    assert load_file(saved(tmp_path / "plain", 12).path / "model.safetensors").keys() >= {"embed.weight"}
    for step in (3, 6, 12):
        checkpoint, recipe = saved(tmp_path / "ema", step), ToyRecipe()
        settings = config.from_mapping(recipe.config_class, checkpoint.config, "test")
        data = recipe.build_data(settings)
        objective = load_for_evaluation(recipe, checkpoint, settings, data, ALONE)
        measured = evaluate_objective(recipe, objective, settings, data.evaluation["val"], ALONE, 8)["loss"]
        assert curve(averaged, "eval/val_loss")[step] == pytest.approx(measured, rel=1e-6)
        assert curve(plain, "eval/val_loss")[step] != pytest.approx(measured, rel=1e-4)
        weights = (load_file(saved(tmp_path / name, step).path / "model.safetensors") for name in ("plain", "ema"))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*(w.values() for w in weights), strict=True))


def test_a_run_that_begins_from_it_begins_from_the_average(tmp_path: Path) -> None:
    run(tmp_path / "first", "--ema", str(DECAY))
    path = saved(tmp_path / "first", 12).path
    run(tmp_path / "second", "--init_from", str(path), "--learning_rate", "1e-30", "--max_steps", "1")
    begun = load_file(saved(tmp_path / "second", 1).path / "model.safetensors")
    averages = load_file(path / "optimizer.safetensors")
    assert all(torch.allclose(tensor, averages[f"ema.{name}"]) for name, tensor in begun.items())


class Unreadable(ToyRecipe):
    """Whose validation set cannot be read at one evaluation."""

    def build_data(self, config: Any) -> Data:
        data = super().build_data(config)
        rows, reads = data.evaluation["val"], []

        class Failing:
            def __len__(self) -> int:
                return len(rows)

            def __getitems__(self, numbers: Sequence[int]) -> Any:
                reads.append(numbers)
                if len(reads) == 6:  # the second batch of the third evaluation
                    raise OSError("the disk is gone")
                return rows.__getitems__(numbers)

        data.evaluation["val"] = Failing()
        return data


def test_where_an_evaluation_fails_the_weights_themselves_are_saved(tmp_path: Path) -> None:
    argv = ["--ema", str(DECAY), "--eval_every", "1", "--save_every", "0", "--no_save_best"]
    with pytest.raises(UserError, match="the disk is gone"):
        run(tmp_path / "failed", *argv, recipe=Unreadable())
    run(tmp_path / "whole", "--ema", str(DECAY))
    step = max(int(path.name.rpartition("_")[2]) for path in (tmp_path / "failed/checkpoints").glob("checkpoint_step_*"))
    for stem in ("model", "optimizer"):
        failed, whole = (load_file(saved(tmp_path / name, step).path / f"{stem}.safetensors") for name in ("failed", "whole"))
        assert all(torch.equal(tensor, whole[name]) for name, tensor in failed.items())


def test_it_cannot_be_turned_on_or_off_in_a_run(tmp_path: Path) -> None:
    for name, before, after in (("without", "0.0", "0.9"), ("with", "0.9", "0.0")):
        run(tmp_path / name, "--stop_at_step", "2", "--ema", before)
        for resumed in ([], ["--resume_from", str(saved(tmp_path / name, 2).path)]):
            with pytest.raises(UserError) as error:
                run(tmp_path / name, "--ema", after, *resumed)
            assert str(error.value).startswith(f"ema: {saved(tmp_path / name, 2).path} has {before}, asked for {after}; train ")
    run(tmp_path / "with", "--ema", "0.99", "--resume_from", str(saved(tmp_path / "with", 2).path))  # another decay is none


def test_it_is_what_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMECURVE_CACHE", str(tmp_path / "cache"))
    data = write_text(tmp_path / "text")
    launch_gpt2(*flags(data, tmp_path / "run", "--ema", str(DECAY), "--max_steps", "4"))
    checkpoint = saved(tmp_path / "run", 4)
    export_hf.export(str(checkpoint.path), tmp_path / "exported")
    averages, exported = (
        load_file(checkpoint.path / "optimizer.safetensors"),
        load_file(tmp_path / "exported/model.safetensors"),
    )
    assert exported.keys() == checkpoint.names("model")
    assert all(torch.equal(tensor, averages[f"ema.{name}"]) for name, tensor in exported.items())
