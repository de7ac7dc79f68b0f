"""The experiment around the regression PFN: its commands, the sweep and its interruptions, the plot, `predict`."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from launching import ROOT, Started, environment
from safetensors.torch import load_file

from recipes.commands.predictive_resampling import posterior, resample
from recipes.commands.regression_evaluation import _statistics, compare_with_baselines, results_table
from recipes.data.regression import task_pool
from recipes.experiments import task_diversity
from recipes.experiments.task_diversity import collect_results, plan, sweep
from recipes.experiments.task_diversity_plot import plot_experiment, threshold
from recipes.pfn_raventos import PFNRaventos
from trainer.checkpoints.checkpoint import Checkpoint
from trainer.command_line import config as configuration
from trainer.distributed.control import Control
from trainer.distributed.launch import Launch
from trainer.errors import UserError
from trainer.main import read_command_line, train
from trainer.reporting.console import Console

RECIPE = ROOT / "recipes" / "pfn_raventos.py"
# What follows `python recipes/pfn_raventos.py sweep`.
COMMANDS = """
--tasks 4 16 64 256 1024
--task_size 8 16
--parallel --tasks 4 16 64 256
--parallel --gpus 4 --tasks 4 16 64 256
--out ./my_results.png
--tasks 4 16 --steps 1000 --batch 256
--tasks 4 16 64 256 1024 4096 --steps 500000 --parallel
--tasks 8 32 128 512 --task_size 16 --steps 100000 --batch 512 --examples 32 --lr 2e-3 --parallel --gpus 4 --out ./c.png
--eval_batch 256 --noise 0.25 --checkpoints 10
"""
COMMANDS = [line.split() for line in COMMANDS.strip().splitlines()]
TINY = ["--d_model", "16", "--n_layers", "1", "--n_heads", "2", "--d_vocab", "16", "--val_sequences", "8", "--device", "cpu"]
ALONE = Launch(0, 1, 0, torch.device("cpu"), Control(0, 1, timedelta(minutes=1)))


def parsed(*argv: str) -> Any:
    return read_command_line(PFNRaventos(), list(argv))[1]


@pytest.mark.parametrize("argv", COMMANDS, ids=" ".join)
def test_a_sweep_has_the_jobs_that_its_flags_name(argv: list[str]) -> None:
    flags = parsed("sweep", *argv)
    models = plan(PFNRaventos(), flags)

    def given(name: str, default: list[float]) -> list[float]:
        if name not in argv:
            return default
        rest = argv[argv.index(name) + 1 :]
        return [float(word) for word in rest[: next((i for i, w in enumerate(rest) if w.startswith("--")), len(rest))]]

    tasks = given("--tasks", [2**i for i in range(16)])
    sizes = given("--task_size", [16])
    assert [(m.config.data.task_size, m.config.data.num_tasks) for m in models] == [(d, m) for d in sizes for m in tasks]
    for model in models:
        c = model.config
        assert [c.optimisation.max_steps] == given("--steps", [500_000])
        assert [c.optimisation.batch_size] == given("--batch", [1024])
        assert [c.optimisation.learning_rate] == given("--lr", [1e-3])
        assert [c.data.examples] == given("--examples", [64])
        assert [c.data.noise] == [0.25]
        assert [c.run.eval_every, c.run.save_every] == [c.optimisation.max_steps // 10] * 2
        assert [c.run.eval_batch] == [256]
        assert (c.optimisation.optimizer, c.optimisation.weight_decay, c.optimisation.grad_clip) == ("adam", 0, 0)
        assert (c.model.d_model, c.model.num_layers, c.model.num_heads, c.model.d_ff, c.model.d_vocab) == (128, 2, 2, 256, 128)
    # The command line of a job gives what was planned.
    assert parsed(*models[-1].job().command[2:]).config.data == models[-1].config.data
    assert len({model.directory for model in models}) == len(models)
    assert (flags.parallel, flags.gpus) == ("--parallel" in argv, 4 if "--gpus" in argv else None)
    assert flags.out == (argv[argv.index("--out") + 1] if "--out" in argv else "plots/raventos_experiment.png")


def test_the_learning_rate_follows_one_cycle() -> None:
    recipe = PFNRaventos()
    rates = {}
    for steps in (10, 1000):
        config = parsed("train", "--max_steps", str(steps)).config
        rates[steps] = [recipe.learning_rate(step, steps, config) for step in range(1, steps + 1)]
    assert rates[10] == pytest.approx([2.5e-4, 4.375e-4, 6.25e-4, 8.125e-4, 1e-3, 8.125e-4, 6.25e-4, 4.375e-4, 2.5e-4, 6.25e-5])
    assert rates[1000][0] == pytest.approx(2.004e-6, rel=1e-3)
    assert rates[1000][499] == pytest.approx(1e-3)
    assert rates[1000][-1] == pytest.approx(4.0e-9, rel=1e-2)


def test_another_number_of_checkpoints_acts_when_a_run_is_resumed() -> None:
    saved = parsed("train", "--max_steps", "600", "--checkpoints", "3").config
    assert (saved.run.save_every, saved.run.eval_every) == (200, 200)
    for typed, expected in (([], (200, 200)), (["--checkpoints", "6"], (100, 100)), (["--save_every", "50"], (50, 200))):
        run = configuration.parse(PFNRaventos.config_class, {}, typed, "pfn_raventos", default=saved).config.run
        assert (run.save_every, run.eval_every) == expected, typed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--max_steps", "5"], "max_steps 5"),
        (["train", "--num_tasks", "-1"], "num_tasks -1"),
        (["train", "--noise", "0"], "noise 0"),
        (["train", "--noise", "nan"], "noise nan"),
        (["train", "--y_min", "3", "--y_max", "-3"], "y_min below y_max"),
        (["train", "--y_range", "-2"], "y_range above 0"),
        (["train", "--d_model", "30", "--n_heads", "4"], "d_model 30"),
        (["train", "--checkpoints", "0"], "checkpoints 0"),
        (["train", "--num_tasks", "9999999999"], "8 GiB"),
        (["train", "--stack", "4", "4"], "stack 4 4"),
        (["train", "--stack", "4", "8", "--grad_clip", "1"], "grad_clip 1"),
        (["train", "--stack", "4", "8", "--optimizer", "muon"], "muon"),
        (["train", "--stack", "4", "8", "--patience", "3"], "patience"),
        (["train", "--stack", "4", "8", "--target_loss", "1"], "target_loss"),
        (["train", "--eval_sequences", "1"], "eval_sequences 1"),
        (["train", "--max_steps", "0"], "max_steps"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parsed(*argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tasks", "4", "-4"], "num_tasks -4"),
        (["--tasks", "4", "4"], "tasks 4 4"),
        (["--task_size", "0"], "task_size 0"),
        (["--steps", "3"], "max_steps 3"),
        (["--gpus", "2"], "needs --parallel"),
        (["--parallel", "--gpus", "-1"], "gpus -1"),
        (["--tasks", "4", "16", "--job", "2"], "jobs 0 to 1"),
        (["--stacked", "--job", "0"], "leave --stacked"),
        (["--eval_sequences", "0"], "eval_sequences"),
        (["--out", "picture.xyz"], "--out picture.xyz: a picture is .png"),
        (["--out", "/proc/nowhere/picture.png"], "--out /proc/nowhere/picture.png"),
    ],
)
def test_a_sweep_refuses_before_it_starts_anything(argv: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        sweep(PFNRaventos(), parsed("sweep", "--output_dir", str(tmp_path / "s"), *argv), ALONE, print)
    assert not (tmp_path / "s").exists()


def test_a_sweep_in_several_processes_names_the_plain_command(tmp_path: Path) -> None:
    two = Launch(0, 2, 0, torch.device("cpu"), ALONE.control)
    with pytest.raises(UserError, match=r"started in 2; start it plainly: python recipes/pfn_raventos.py sweep"):
        sweep(PFNRaventos(), parsed("sweep"), two, print)


def test_the_preset_of_a_sweep_sets_its_list_and_that_of_its_models() -> None:
    models = plan(PFNRaventos(), parsed("sweep", "--preset", "quick"))
    assert [m.config.data.num_tasks for m in models] == list(parsed("sweep", "--preset", "quick").tasks)
    quick = parsed("train", "--preset", "quick").config
    assert {m.config.optimisation for m in models} == {quick.optimisation}
    assert {m.config.model for m in models} == {quick.model}
    fewer = plan(PFNRaventos(), parsed("sweep", "--preset", "quick", "--tasks", "3", "5", "--steps", "77"))
    assert [(m.config.data.num_tasks, m.config.optimisation.max_steps) for m in fewer] == [(3, 77), (5, 77)]
    with pytest.raises(UserError, match="unknown preset 'quik'"):
        parsed("sweep", "--preset", "quik")


# --------------------------------------------------------------------------------------------------------- a real sweep


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A small sweep, interrupted after its first job, and given again."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "tiny.yaml").write_text("".join(f"{k.lstrip('-')}: {v}\n" for k, v in zip(TINY[::2], TINY[1::2], strict=True)))
    argv = ["sweep", "--tasks", "4", "0", "--task_size", "3", "--steps", "400", "--batch", "16", "--examples", "5"]
    argv += ["--eval_sequences", "40", "--checkpoints", "3", "--config", str(folder / "tiny.yaml")]
    argv += ["--output_dir", str(folder / "runs"), "--out", str(folder / "picture.png")]
    env = environment(CUDA_VISIBLE_DEVICES="")
    outputs, codes = [], []
    for interrupt in (True, False):
        log = folder / f"{interrupt}.log"
        process = Started([sys.executable, str(RECIPE), *argv], log, env)
        try:
            if interrupt:
                _wait_for_checkpoint(folder / "runs" / "tasks0-size3" / "checkpoints", process)
                os.kill(process.pid, signal.SIGINT)
            codes.append(process.wait(timeout=100))
        finally:
            process.kill_all()
        outputs.append(log.read_text())
    return SimpleNamespace(folder=folder, runs=folder / "runs", argv=argv, outputs=outputs, codes=codes)


def _wait_for_checkpoint(folder: Path, process: Any) -> None:
    deadline = time.monotonic() + 90
    while not list(folder.glob("[!.]*")):
        assert process.poll() is None, "the sweep ended"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_interrupted_sweep_saves_and_prints_how_to_go_on(swept: SimpleNamespace) -> None:
    assert swept.codes == [0, 0], swept.outputs
    first = swept.outputs[0]
    assert "tasks4-size3: done after" in first
    assert "SIGINT: asking 1 running jobs to save and leave" in first
    assert "The same command goes on." in first
    assert "Plot:" not in first


def test_the_same_command_repeats_no_finished_job(swept: SimpleNamespace) -> None:
    again = swept.outputs[1]
    assert "tasks4-size3: done before" in again
    assert "tasks0-size3: started" in again
    assert (swept.runs / "tasks4-size3" / "command.txt").read_text().count("\n") == 1
    assert "Resumed from step" in (swept.runs / "tasks0-size3" / "job.log").read_text()


def test_it_ends_with_the_results_of_training_each_model_by_itself(swept: SimpleNamespace, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (swept.runs / "results.jsonl").read_text().splitlines()]
    assert [row["num_tasks"] for row in rows] == [4, 0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for row, model in zip(rows, plan(PFNRaventos(), parsed(*swept.argv)), strict=True):
        folder = tmp_path / model.name
        arguments = [*model.arguments, "--output_dir", str(folder)]
        console = Console(None, False)
        assert train(PFNRaventos(), parsed("train", *arguments), ["train", *arguments], ALONE, console) == "last step"
        ours, theirs = (
            load_file(p / "checkpoints" / "checkpoint_final" / "model.safetensors") for p in (folder, model.directory)
        )
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        alone = json.loads((folder / "evaluation.json").read_text())
        for name in ("pretraining", "true"):
            for kind, whose in row[name].items():
                for who, values in whose.items():
                    assert values["mean"] == pytest.approx(alone[name][kind][who]["mean"], rel=1e-6), (name, kind, who)
    torch.set_num_threads(threads)


def test_a_run_keeps_its_tasks_and_as_many_checkpoints_as_requested(swept: SimpleNamespace) -> None:
    checkpoints = swept.runs / "tasks4-size3" / "checkpoints"
    steps = sorted(int(p.name.rpartition("_")[2]) for p in checkpoints.glob("model_checkpoint_*"))
    assert steps == [134, 268, 400]
    for step in steps:
        kept = load_file(checkpoints / f"model_checkpoint_{step}" / "tasks.safetensors")
        assert torch.equal(kept["model_1"], task_pool(4, 3, 0))
    endless = load_file(swept.runs / "tasks0-size3" / "checkpoints" / "checkpoint_final" / "tasks.safetensors")
    assert endless["model_1"].shape == (0, 3)


def test_the_picture_is_there_and_can_be_drawn_again(swept: SimpleNamespace, tmp_path: Path) -> None:
    assert (swept.folder / "picture.png").stat().st_size > 20_000
    for source in (swept.runs / "results.jsonl", swept.runs):
        out = tmp_path / f"{source.name}.png"
        messages: list[str] = []
        task_diversity.plot(PFNRaventos(), parsed("plot", "--results", str(source), "--out", str(out)), ALONE, messages.append)
        assert out.stat().st_size == pytest.approx((swept.folder / "picture.png").stat().st_size, rel=0.02)
        assert "M* cannot be estimated" in messages[0]
    lines = (swept.runs / "results.jsonl").read_text().splitlines()
    for other, message in (({"examples": 7}, "examples 5 and 7"), ({}, "two models of 4 tasks of size 3")):
        (tmp_path / "mixed.jsonl").write_text("\n".join([*lines, json.dumps(json.loads(lines[0]) | other)]))
        with pytest.raises(UserError, match=message):
            collect_results(tmp_path / "mixed.jsonl")
    with pytest.raises(UserError, match="no results"):
        collect_results(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        collect_results(tmp_path / "nothing.jsonl")
    (tmp_path / "other.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match="something else"):
        collect_results(tmp_path / "other.jsonl")


def test_other_settings_are_refused_in_the_same_directory(swept: SimpleNamespace) -> None:
    with pytest.raises(UserError, match=r"max_steps: .*tasks4-size3 holds a run with 400, asked for 500; choose another"):
        plan(PFNRaventos(), parsed(*swept.argv, "--steps", "500"))


def test_one_job_of_a_slurm_array_does_its_part(
    swept: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    sweep(PFNRaventos(), parsed(*swept.argv), ALONE, print)
    text = capsys.readouterr().out
    assert "Job 1 of 0 to 1: tasks0-size3" in text
    assert "tasks0-size3: done before" in text
    assert "tasks4-size3" not in text
    assert f"plot --results {swept.runs}" in text


def test_a_model_is_measured_again_where_more_sequences_are_requested(swept: SimpleNamespace) -> None:
    model = plan(PFNRaventos(), parsed(*swept.argv, "--eval_sequences", "60"))[0]
    assert model.is_trained()
    assert not model.is_evaluated()
    assert model.job().command[2] == "evaluate"
    command = model.job().command[2:]
    assert "60 fresh sequences" in run_and_collect(command)
    assert model.is_evaluated()
    run_and_collect([*command, "--eval_sequences", "40"])
    assert not model.is_evaluated()


def run_and_collect(argv: list[str]) -> str:
    messages: list[str] = []
    recipe = PFNRaventos()
    recipe.commands[argv[0]].run(recipe, parsed(*argv), ALONE, messages.append)
    return "\n".join(messages)


def test_predict_and_a_longer_context(swept: SimpleNamespace) -> None:
    final = str(swept.runs / "tasks4-size3" / "checkpoints" / "checkpoint_final")
    argv = ["predict", "--model_path", final, "--observed", "2", "--paths", "20"]
    text = run_and_collect(argv)
    assert text == run_and_collect(argv)
    assert "2 pairs of a new task given; 20 continuations of 3 pairs" in text
    assert text.count("±") == 2 + 3 * 3
    with pytest.raises(UserError, match="future 0"):
        run_and_collect(["predict", "--model_path", final, "--observed", "5"])
    longer = run_and_collect(["evaluate", "--model_path", final, "--examples", "12", "--eval_sequences", "30"])
    assert "12 examples (trained on 5)" in longer
    assert "beyond the trained length" in longer


# ------------------------------------------------------------------------------------------------ numbers made by hand


def row(num_tasks: int, to_ridge: float, to_dmmse: float, se: float = 0.001, size: int = 8) -> dict[str, Any]:
    """A line of results.jsonl."""

    def value(mean: float) -> dict[str, float]:
        return {"mean": mean, "se": se}

    errors = {"model": value(0.5), "ridge": value(0.376), "dmmse": value(0.6)}
    delta = {"ridge": value(to_ridge), "dmmse": value(to_dmmse)}
    if not num_tasks:
        del errors["dmmse"], delta["dmmse"]
    kinds = {"error_y": errors, "delta": delta}
    facts = {"num_tasks": num_tasks, "task_size": size, "noise": 0.25, "examples": 16, "step": 1000, "sequences": 100}
    return {**facts, "pretraining": kinds, "true": kinds}


def test_the_threshold_is_where_the_model_is_as_far_from_both() -> None:
    # Ratios of 4 and 1/4 in log2 M from 4 to 8: half-way, at 2**6.
    rows = [row(4, 0.8, 0.1), row(16, 0.4, 0.1), row(256, 0.1, 0.4), row(1024, 0.05, 0.4)]
    assert threshold(rows) == pytest.approx(64)
    assert threshold(rows[::-1]) == pytest.approx(64)
    assert threshold([*rows, row(0, 0.01, 0.0)]) == pytest.approx(64)
    # No estimate: never crossed, crossed back and forth, from ridge to dMMSE, or not beyond what chance gives.
    assert threshold(rows[:2]) is None
    assert threshold(rows[2:]) is None
    assert threshold([*rows, row(4096, 0.4, 0.1)]) is None
    assert threshold([row(4, 0.1, 0.4), row(16, 0.4, 0.1)]) is None
    assert threshold([row(16, 0.4, 0.1, se=0.2), row(256, 0.1, 0.4)]) is None
    assert threshold([row(64, 0.2, 0.1)]) is None


def test_the_picture_has_six_panels_with_labels_and_marks_only_what_was_estimated(monkeypatch: Any, tmp_path: Path) -> None:
    figures = []
    monkeypatch.setattr("trainer.reporting.plot.save_figure", lambda figure, out: figures.append(figure))
    crossing = [row(4, 0.8, 0.1), row(16, 0.4, 0.1), row(256, 0.1, 0.4), row(0, 0.05, 0.0)]
    assert plot_experiment(crossing, tmp_path / "a.png") == {8: pytest.approx(64)}
    assert plot_experiment([*crossing, row(4, 0.8, 0.1, size=16)], tmp_path / "b.png")[16] is None
    plot_experiment(crossing[:2], tmp_path / "c.png")
    for figure, marked in zip(figures, (True, True, False), strict=True):
        assert len(figure.axes) == 6
        for axis in figure.axes:
            assert axis.get_ylabel().endswith("² / D")
            assert axis.get_title()
            low, high = axis.get_ylim()
            assert axis.get_yscale() == ("log" if high > 3.5 * low > 0 else "linear")
            assert len(axis.get_yticks()) > 2
        legend = [text.get_text() for text in figure.legends[0].get_texts()]
        assert any("dMMSE" in text for text in legend)
        assert any(text.startswith("M* ≈ 64") for text in legend) == marked
        assert figure.axes[5].get_xlabel() == "pretraining tasks M"
        assert len(figure.axes[0].containers) >= 3, "error bars"
    assert {"D = 8", "D = 16"} <= {text.get_text() for text in figures[1].legends[0].get_texts()}
    markers = {line.get_marker() for container in figures[1].axes[0].containers for line in container.lines[:1]}
    assert markers == {"o", "s"}, "sizes differ in their markers, even where there is no line"
    ticks = [text.get_text() for text in figures[0].axes[3].get_xticklabels()]
    assert ticks == ["4", "16", "256", "∞"]


class ExactPosterior(torch.nn.Module):
    """Predicts as the posterior for w ~ N(0, I) does: what a perfect model would give."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        predictions = []
        for i in range(x.shape[1]):
            mean, covariance = posterior(x[:, :i], y[:, :i], 0.25)
            query = x[:, i].double()
            spread = (0.25 + torch.einsum("bi,bij,bj->b", query, covariance, query)).sqrt()
            predictions.append(torch.stack([(mean * query).sum(-1), spread], -1))
        return torch.stack(predictions, 1)

    def sample(self, logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        mean, spread = logits.unbind(-1)
        return (mean + spread * torch.randn(mean.shape, generator=generator)).float()


def test_resampling_an_exact_model_gives_the_exact_posterior() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(3, 2, generator=generator), torch.tensor([1.0, -0.5])
    y = x @ w + 0.5 * torch.randn(3, generator=generator)
    all_x, all_y = resample(ExactPosterior(), x, y, 1500, 12, generator)
    assert torch.equal(all_x[:, :3], x.expand(1500, -1, -1))
    assert torch.equal(all_y[:, :3], y.expand(1500, -1))
    assert all_x[:, 3:].mean().item() == pytest.approx(0, abs=4 / math.sqrt(1500 * 24))
    assert all_x[:, 3:].std().item() == pytest.approx(1, abs=4 / math.sqrt(2 * 1500 * 24))
    mean, covariance = posterior(x[None], y[None], 0.25)
    later, later_covariance = posterior(all_x, all_y, 0.25)
    spread = (covariance[0] - later_covariance.mean(0)).diagonal().sqrt()
    assert float(((later.mean(0) - mean[0]) / spread).abs().max()) < 4 / math.sqrt(1500)
    torch.testing.assert_close(later.std(0), spread, rtol=0.1, atol=0)


def test_a_standard_error_is_that_of_sequences_averaged_over_their_positions() -> None:
    values = torch.tensor([[1.0, 3.0], [2.0, 8.0], [6.0, 4.0]], dtype=torch.float64)
    result = _statistics([values[:2], values[2:]])
    assert result["mean"] == pytest.approx(4)
    assert result["se"] == pytest.approx(np.std([2, 5, 5], ddof=1) / math.sqrt(3))
    assert result["by_position"]["mean"] == pytest.approx([3, 5])
    assert result["by_position"]["se"] == pytest.approx([np.std(c, ddof=1) / math.sqrt(3) for c in ([1, 2, 6], [3, 8, 4])])


def test_what_is_measured_is_on_its_documented_scale(swept: SimpleNamespace) -> None:
    """Of a trained run: identities between its numbers that hold whatever the model is."""
    recipe = PFNRaventos()
    checkpoint = Checkpoint((swept.runs / "tasks4-size3" / "checkpoints" / "checkpoint_final").resolve())
    config = plan(recipe, parsed(*swept.argv))[0].config
    with torch.no_grad():
        results = compare_with_baselines(recipe, checkpoint, config, torch.device("cpu"), 1500, 500)
        split = compare_with_baselines(recipe, checkpoint, config, torch.device("cpu"), 1500, 700)
    for name in ("pretraining", "true"):
        part = results[name]
        for who in ("model", "ridge", "dmmse"):
            noisy, clean = part["error_y"][who], part["error_mean"][who]
            assert noisy["mean"] - clean["mean"] == pytest.approx(0.25 / 3, abs=6 * noisy["se"])
            assert sum(noisy["by_position"]["mean"]) / 5 == pytest.approx(noisy["mean"])
            assert split[name]["error_y"][who]["mean"] == pytest.approx(noisy["mean"], rel=1e-5)
    # No estimator beats the ideal one for its distribution, in error and in likelihood.
    own, new = results["pretraining"], results["true"]
    for kind in ("error_y", "nll"):
        assert own[kind]["dmmse"]["mean"] < min(own[kind]["ridge"]["mean"], own[kind]["model"]["mean"])
        assert new[kind]["ridge"]["mean"] < min(new[kind]["dmmse"]["mean"], new[kind]["model"]["mean"])
    assert new["error_y"]["ridge"]["by_position"]["mean"][0] == pytest.approx((3 + 0.25) / 3, abs=0.25)
    lines = results_table(results)
    assert any("(prediction - w.x)² / D" in line for line in lines)
