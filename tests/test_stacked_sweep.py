"""A stack of models beside models trained one by one: the same numbers, and run directories that cannot be distinguished."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launching import environment
from safetensors.torch import load_file

from recipes.data.regression import task_pool
from recipes.experiments.stacked_sweep import unstack
from recipes.experiments.task_diversity import collect_results, plan, sweep
from recipes.pfn_raventos import PFNRaventos
from trainer.distributed.control import Control
from trainer.distributed.launch import Launch
from trainer.errors import UserError
from trainer.main import read_command_line, train
from trainer.reporting.console import Console
from trainer.reporting.trackers import read_metrics

POOLS = (1, 4, 0, 33)
SETTINGS = ["--d_model", "16", "--num_heads", "2", "--d_vocab", "32", "--val_sequences", "16", "--task_size", "3"]
SETTINGS += ["--examples", "8", "--batch_size", "8", "--learning_rate", "3e-3", "--device", "cpu", "--log_every", "10"]
SETTINGS += ["--checkpoints", "4", "--eval_sequences", "0"]
ALONE = Launch(0, 1, 0, torch.device("cpu"), Control(0, 1, timedelta(minutes=1)))


def parsed(*argv: str) -> Any:
    return read_command_line(PFNRaventos(), list(argv))[1]


def run(folder: Path, *more: str, steps: int = 100) -> str:
    argv = ["train", *SETTINGS, "--max_steps", str(steps), *more, "--output_dir", str(folder)]
    return train(PFNRaventos(), parsed(*argv), argv, ALONE, Console(None, False))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Each model alone for 100 steps; all as one network, stopped and resumed on the way; and that taken apart."""
    folder = tmp_path_factory.mktemp("stacked")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for pool in POOLS:
        run(folder / f"alone{pool}", "--num_tasks", str(pool))
    stack = ["--stack", *map(str, POOLS)]
    assert run(folder / "stack", *stack, "--stop_at_step", "37") == "stop_at_step"
    assert run(folder / "stack", *stack) == "last step"
    for pool in POOLS:
        config = parsed("train", *SETTINGS, "--max_steps", "100", "--num_tasks", str(pool)).config
        unstack(PFNRaventos(), folder / "stack", config, folder / f"apart{pool}")
    yield SimpleNamespace(folder=folder)
    torch.set_num_threads(threads)


def checkpoints(run_folder: Path) -> dict[str, Path]:
    return {path.name: path for path in (run_folder / "checkpoints").iterdir() if path.is_dir()}


@pytest.mark.parametrize("pool", POOLS)
def test_after_a_hundred_steps_the_stack_has_the_weights_of_separate_training(trained: SimpleNamespace, pool: int) -> None:
    alone, apart = trained.folder / f"alone{pool}", trained.folder / f"apart{pool}"
    for name in ("model_checkpoint_25", "model_checkpoint_75", "checkpoint_final"):
        for stem in ("model", "optimizer", "tasks"):
            ours, theirs = (load_file(r / "checkpoints" / name / f"{stem}.safetensors") for r in (apart, alone))
            assert ours.keys() == theirs.keys()
            for key, tensor in theirs.items():
                assert ours[key].shape == tensor.shape
                assert ours[key].dtype == tensor.dtype
                difference = (ours[key] - tensor).abs()
                if key.endswith("qkv.bias"):
                    # Softmax does not see the bias of keys: its gradient is rounding, which Adam makes steps of.
                    difference[16:32] = 0
                assert not difference.numel() or float(difference.max()) < 1e-5, (name, key)
    assert torch.equal(ours["model_1"], task_pool(pool, 3, 0))


def test_decay_spares_in_a_stack_what_it_spares_in_a_model(tmp_path: Path) -> None:
    decay = ["--optimizer", "adamw", "--weight_decay", "1", "--learning_rate", "3e-2", "--checkpoints", "1"]
    run(tmp_path / "stack", "--stack", "4", "33", *decay, steps=10)
    run(tmp_path / "alone", "--num_tasks", "4", *decay, steps=10)
    config = parsed("train", *SETTINGS, *decay, "--max_steps", "10", "--num_tasks", "4").config
    unstack(PFNRaventos(), tmp_path / "stack", config, tmp_path / "apart")
    ours, theirs = (load_file(tmp_path / f"{r}/checkpoints/checkpoint_final/model.safetensors") for r in ("apart", "alone"))
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in theirs if not key.endswith("qkv.bias")) < 1e-5


def test_the_models_have_learned_different_things(trained: SimpleNamespace) -> None:
    """Else equality would show little."""
    heads = [
        load_file(trained.folder / f"apart{p}/checkpoints/checkpoint_final/model.safetensors")["head.weight"] for p in POOLS
    ]
    assert min(float((a - b).abs().max()) for i, a in enumerate(heads) for b in heads[:i]) > 1e-2


@pytest.mark.parametrize("pool", POOLS)
def test_its_run_directory_is_an_ordinary_one(trained: SimpleNamespace, pool: int) -> None:
    alone, apart = trained.folder / f"alone{pool}", trained.folder / f"apart{pool}"
    ours, theirs = checkpoints(apart), checkpoints(alone)
    extra = {"model_checkpoint_37"}  # where the stack was stopped
    assert ours.keys() - extra == theirs.keys()
    assert {name for name, path in ours.items() if path.is_symlink()} == {"checkpoint_final", "best_model"}
    assert ours["checkpoint_final"].resolve().name == theirs["checkpoint_final"].resolve().name
    assert ours["best_model"].resolve().name == theirs["best_model"].resolve().name
    assert {p.name for p in ours["checkpoint_final"].iterdir()} == {p.name for p in theirs["checkpoint_final"].iterdir()}
    states = [json.loads((p["checkpoint_final"] / "trainer_state.json").read_text()) for p in (ours, theirs)]
    for state in states:
        state["train_state"].pop("hours")
    for key in ("best_metric", "train_loss", "patience_best", "evaluated_metric"):
        values = [state["train_state"].pop(key) for state in states]
        assert values[0] == pytest.approx(values[1], abs=1e-5), key
    assert states[0] == states[1]
    assert json.loads((apart / "status.json").read_text())["state"] == "finished"
    curves = [{(r["step"], key): r[key] for r in read_metrics(p / "metrics.jsonl") for key in r} for p in (apart, alone)]
    keys = {key for key in curves[1] if key[1].startswith(("train/loss", "train/learning_rate", "eval/", "final/"))}
    assert len(keys) > 30
    for key in keys:
        assert curves[0][key] == pytest.approx(curves[1][key], abs=1e-5), key


def test_a_model_taken_apart_is_finished_and_trains_on_as_the_other_does(trained: SimpleNamespace) -> None:
    losses = []
    for kind in ("apart", "alone"):
        folder = trained.folder / f"{kind}4"
        assert run(folder, "--num_tasks", "4") == "already finished"
        final = (folder / "checkpoints" / "model_checkpoint_100").resolve()
        assert run(folder, "--num_tasks", "4", "--resume_from", str(final), steps=140) == "last step"
        losses.append([r["train/loss"] for r in read_metrics(folder / "metrics.jsonl") if "train/loss" in r])
    assert len(losses[0]) == 15
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_stack_is_not_evaluated_as_one_model(trained: SimpleNamespace) -> None:
    recipe = PFNRaventos()
    final = str(trained.folder / "stack" / "checkpoints" / "checkpoint_final")
    for argv in (["evaluate"], ["predict", "--observed", "2"]):
        with pytest.raises(UserError, match="4 stacked models"):
            recipe.commands[argv[0]].run(recipe, parsed(*argv, "--model_path", final), ALONE, print)


def test_a_stacked_sweep_trains_a_stack_measures_its_models_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And models that have a run directory already are left as they are."""
    for name, value in environment(CUDA_VISIBLE_DEVICES="").items():
        monkeypatch.setenv(name, value)
    (tmp_path / "tiny.yaml").write_text("d_model: 16\nnum_heads: 2\nd_vocab: 16\nval_sequences: 8\ndevice: cpu\n")
    argv = ["sweep", "--tasks", "4", "16", "--task_size", "3", "--steps", "30", "--batch", "8", "--examples", "5"]
    argv += ["--eval_sequences", "30", "--checkpoints", "2", "--config", str(tmp_path / "tiny.yaml"), "--stacked"]
    argv += ["--output_dir", str(tmp_path / "runs"), "--out", str(tmp_path / "picture.png"), "--parallel", "--gpus", "2"]
    sweep(PFNRaventos(), parsed(*argv), ALONE, print)
    text = capsys.readouterr().out
    assert "2 models are in run directories of their own" in text
    assert [row["num_tasks"] for row in collect_results(tmp_path / "runs" / "results.jsonl")] == [4, 16]
    assert (tmp_path / "picture.png").is_file()
    for model in plan(PFNRaventos(), parsed(*argv)):
        assert model.is_trained()
        assert (model.directory / "command.txt").read_text().count("stack2-size3") == 1
        assert "train" not in (model.directory / "job.log").read_text().split()
    sweep(PFNRaventos(), parsed(*argv), ALONE, print)
    again = capsys.readouterr().out
    assert "started" not in again
    assert again.count("done before") == 2
