"""What helps to find out what is wrong: --debug, --fast_dev_run, --overfit_batch, --profile."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import TIMEOUT
from torch import Tensor, nn
from toy_recipe import ToyRecipe

from trainer import main
from trainer.command_line import config
from trainer.data.stream import TrainingOrder, sample_numbers
from trainer.debugging import Watch, describe_batch
from trainer.distributed.control import Control
from trainer.distributed.launch import Launch
from trainer.errors import NOT_FINITE, UserError
from trainer.reporting.console import Console
from trainer.reporting.trackers import read_metrics

ALONE = Launch(0, 1, 0, torch.device("cpu"), Control(0, 1, TIMEOUT))


@pytest.fixture(autouse=True)
def _no_anomaly_mode_afterwards() -> Any:
    yield
    torch.autograd.set_detect_anomaly(False)


def run(folder: Path, *argv: str) -> list[dict[str, Any]]:
    """Train the toy in this process; what it logged."""
    recipe = ToyRecipe()
    words = ["--output_dir", str(folder), "--max_steps", "8", "--device", "cpu", *argv]
    main.train(recipe, config.parse(recipe.config_class, {}, words, recipe.name), words, ALONE, Console(None, True))
    return read_metrics(folder / "metrics.jsonl")


class Scaled(nn.Module):
    """Two layers, the output of the second times a number."""

    def __init__(self, factor: float, in_the_backward_pass: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.factor, self.backward_alone = factor, in_the_backward_pass

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.relu(self.first(x)))
        if self.backward_alone:
            return (x * 0).sqrt().sum()  # whose derivative at 0 is infinite
        return x * self.factor


def watched(network: nn.Module) -> list[str]:
    lines: list[str] = []
    Watch(network, lines.append, lambda: 12)
    return lines


def test_shapes_and_types_of_the_first_pass_are_logged_once() -> None:
    network = Scaled(1.0)
    lines = watched(network)
    for _ in range(2):
        network(torch.ones(5, 3))
    assert lines == [
        "The first pass, as each module ends:\n  first (Linear): (5, 4) float32\n  second (Linear): (5, 2) float32\n"
        "  the network (Scaled): (5, 2) float32"
    ]
    batch = {"ids": torch.tensor([[3, 7]]), "empty": torch.zeros(0)}
    assert describe_batch(batch) == ["  ids: (1, 2) int64, 3 to 7", "  empty: (0,) float32"]


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (
            lambda n: setattr(n, "factor", float("inf")),
            "step 12: the output of the network (Scaled) is not finite, its input is finite; the same command",
        ),
        (
            lambda n: n.second.bias.data.fill_(float("nan")),
            "of second (Linear) is not finite, its input is finite, and neither are some of its weights",
        ),
        (
            lambda n: setattr(n, "backward_alone", True),
            "the gradient of the output of second (Linear) is not finite, the first",
        ),
    ],
)
def test_the_module_where_a_value_stops_being_finite_is_named_with_its_step(break_it: Any, words: str) -> None:
    network = Scaled(1.0)
    watched(network)
    break_it(network)
    with pytest.raises(UserError) as refused:
        network(torch.ones(5, 3)).sum().backward()
    assert words in str(refused.value)
    assert refused.value.exit_code == NOT_FINITE


def test_debug_looks_at_the_first_batch_and_ends_a_run_at_its_first_bad_sample(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which the same command finds again: it goes on from the step before."""
    bad = sample_numbers(range(17, 18), 42, 64)[0]  # of the fifth step
    argv = ["--batch_size", "4", "--nan_samples", str(bad), "--save_every", "2", "--debug"]
    for _ in range(2):
        with pytest.raises(UserError, match=r"^step 5: the gradient of the output of .* is not finite"):
            run(tmp_path, *argv)
    text = capsys.readouterr().out
    assert "The first micro-batch of step 1:" in text
    assert "Resumed from step 4" in text
    assert "The first micro-batch of step 5:" in text
    assert "The first pass, as each module ends:" in text


def test_a_few_batches_come_again_and_again(tmp_path: Path) -> None:
    order = iter(TrainingOrder(4, 0, 1, 42, 64, first_micro_batch=0))
    first = [next(order) for _ in range(3)]
    again = iter(TrainingOrder(4, 0, 1, 42, 64, first_micro_batch=1, repeated=3))
    assert [next(again) for _ in range(600)] == [first[(1 + i) % 3] for i in range(600)]
    losses = [
        row["train/loss"]
        for row in run(tmp_path / "one", "--overfit_batch", "1", "--learning_rate", "1e-2")
        if "train/loss" in row
    ]
    others = [row["train/loss"] for row in run(tmp_path / "all", "--learning_rate", "1e-2") if "train/loss" in row]
    assert losses[0] == others[0]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < min(others)


def test_a_fast_dev_run_tries_everything_and_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["train", "--fast_dev_run", "--max_steps", "8", "--eval_every", "0", "--save_every", "0"]
    main.fast_dev_run(ToyRecipe(), argv, ALONE, Console(None, True))
    text = capsys.readouterr().out
    parts = ["Evaluating at step 1", "Saved checkpoint to", "Resumed from step 1", "Evaluating at step 2", "a resume work"]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert "same command" not in text
    assert not [*(tmp_path / "runs" / "toy").iterdir()]


def test_a_fast_dev_run_that_fails_keeps_nothing_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is not finite"):
        main.fast_dev_run(
            ToyRecipe(), ["--fast_dev_run", "--debug", "--nan_samples", *map(str, range(64))], ALONE, Console(None, True)
        )
    assert not [*(tmp_path / "runs" / "toy").iterdir()]


def test_a_profile_has_the_steps_after_the_first_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "--profile", "2")
    text = capsys.readouterr().out
    assert "Profile of 2 steps on rank 0" in text
    assert "aten::" in text
    with gzip.open(tmp_path / "profile" / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    assert {e["name"] for e in events if e["name"].startswith("ProfilerStep")} == {"ProfilerStep#3", "ProfilerStep#4"}


@pytest.mark.parametrize(
    ("steps", "flags", "last"),
    [("5", (), None), ("6", (), 8), ("1", ("--stop_at_step", "4"), None), ("2", ("--stop_at_step", "4"), 4)],
)
def test_a_profile_that_the_run_is_too_short_for_is_announced(
    steps: str, flags: tuple[str, ...], last: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, "--profile", steps, *flags)
    text = capsys.readouterr().out
    assert (tmp_path / "profile" / "trace.json.gz").exists() == (last is None)
    assert ("will write nothing" in text) == (last is not None)
    assert (
        last is None
        or f"--profile {steps} will write nothing: it takes 3 steps more than that, and step {last} is the last" in text
    )
    ending = "Without --stop_at_step the same command continues this run."
    assert (ending in text) == bool(flags)


def test_a_run_that_ends_with_nan_says_so_in_the_place_of_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        ToyRecipe, "measure", lambda self, network, batch: dict.fromkeys(("token", "value"), (torch.tensor(math.nan), 1))
    )
    run(tmp_path)
    text = capsys.readouterr().out
    assert "No report: eval/val_loss is not finite; lower --learning_rate, or look at the data" in text
    assert "WARNING: the report" not in text
