"""Evaluation without a launch: every sample counts once and without dropout, and the network is left in the mode it was in.

The ranks of several processes are simulated one after another, by a control group that records what each would have sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from toy_recipe import ToyRecipe

from trainer import main
from trainer.checkpoints.network import build_network
from trainer.command_line import config
from trainer.data import loader
from trainer.distributed.launch import Launch, connect
from trainer.errors import UserError
from trainer.evaluation.exact import evaluate
from trainer.evaluation.objective import Objective
from trainer.reporting.console import Console
from trainer.reporting.trackers import read_metrics

RECIPE = ToyRecipe()
SETTINGS = config.parse(RECIPE.config_class, {}, ["--dropout", "0.5"], RECIPE.name).config
DATA = RECIPE.build_data(SETTINGS)
VALIDATION = DATA.evaluation["val"]
WEIGHTS = {"token": 1.0, "value": 0.3}


class Rank:
    """The control group of a process that receives nothing from the others."""

    def __init__(self) -> None:
        self.sent: list[list[float]] = []

    def sum(self, values: Sequence[float]) -> SimpleNamespace:
        self.sent.append(list(values))
        return SimpleNamespace(wait=lambda: list(values))


@pytest.fixture
def network() -> nn.Module:
    return build_network(RECIPE, SETTINGS, DATA)


def by_hand(network: nn.Module) -> dict[str, tuple[float, float]]:
    """Sum and count of each measure, each sample on its own."""
    network.eval()
    totals: dict[str, tuple[float, float]] = {}
    with torch.no_grad():
        for number in range(len(VALIDATION)):
            batch = VALIDATION.__getitems__([number])
            for name, value in RECIPE.measure(network, batch).items():
                total, count = value if isinstance(value, tuple) else (value, RECIPE.items(batch)[name])
                before = totals.get(name, (0.0, 0.0))
                totals[name] = (before[0] + float(total), before[1] + float(count))
    return totals


def measure(network: nn.Module, processes: int, batch_size: int, training: bool) -> list[float]:
    """What all ranks send, added up: sum and count of each measure."""
    totals: list[float] = []
    for number in range(processes):
        rank = Rank()
        model = Objective(network, RECIPE, list(WEIGHTS)).train(training)
        launch = Launch(rank=number, processes=processes, local_rank=number, device=torch.device("cpu"), control=rank)
        assert evaluate(model, RECIPE, WEIGHTS, VALIDATION, batch_size, SETTINGS.run, launch) is not None
        (sent,) = rank.sent
        totals = [a + b for a, b in zip(totals, sent, strict=True)] if totals else sent
        assert {module.training for module in model.modules()} == {training}
    return totals


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("processes", "batch_size"), [(1, 4), (1, 9), (2, 2), (2, 8), (3, 3), (4, 16), (16, 16)])
def test_each_sample_counts_once_and_without_dropout(
    processes: int, batch_size: int, training: bool, network: nn.Module
) -> None:
    right = [value for pair in by_hand(network).values() for value in pair]
    assert measure(network, processes, batch_size, training) == pytest.approx(right, rel=1e-5)


def test_each_measure_is_divided_by_its_own_count_and_the_loss_is_the_objective(network: nn.Module) -> None:
    means = {name: total / count for name, (total, count) in by_hand(network).items()}
    model = Objective(network, RECIPE, list(WEIGHTS))
    launch = Launch(rank=0, processes=1, local_rank=0, device=torch.device("cpu"), control=Rank())
    metrics = evaluate(model, RECIPE, WEIGHTS, VALIDATION, 4, SETTINGS.run, launch)
    right = {"loss": means["token"] + 0.3 * means["value"], "accuracy": means["accuracy"]}
    assert metrics == pytest.approx({**right, "loss_token": means["token"], "loss_value": means["value"]}, rel=1e-5)


class Decided:
    """Votes whose sums are known, and what was asked of them."""

    def __init__(self, *sums: bool) -> None:
        self.sums, self.seen = iter(sums), list[str]()

    def stop_requested(self) -> bool:
        return False

    def cast(self, error: Exception | None) -> None:
        assert error is None
        self.seen.append("cast")

    def interrupted(self) -> bool:
        self.seen.append("asked")
        return next(self.sums)


def test_the_vote_on_a_batch_is_on_its_way_while_the_one_before_is_computed(network: nn.Module) -> None:
    votes = Decided(*[False] * len(VALIDATION))
    model = Objective(network, RECIPE, list(WEIGHTS))
    model.register_forward_hook(lambda *_: votes.seen.append("computed"))
    launch = Launch(rank=0, processes=1, local_rank=0, device=torch.device("cpu"), control=Rank())
    assert evaluate(model, RECIPE, WEIGHTS, VALIDATION, 4, SETTINGS.run, launch, votes) is not None
    assert votes.seen == ["cast", *["asked", "computed", "cast"] * 2, "asked", "computed"]


@pytest.mark.parametrize("training", [True, False])
def test_an_evaluation_that_is_cut_short_leaves_the_mode_as_it_was(training: bool, network: nn.Module) -> None:
    model, rank = Objective(network, RECIPE, list(WEIGHTS)).train(training), Rank()
    launch = Launch(rank=0, processes=1, local_rank=0, device=torch.device("cpu"), control=rank)
    votes = Decided(False, True)
    assert evaluate(model, RECIPE, WEIGHTS, VALIDATION, 2, SETTINGS.run, launch, votes) is None
    assert rank.sent == []
    assert votes.seen == ["cast", "asked", "cast", "asked"]
    assert {module.training for module in model.modules()} == {training}


def test_an_evaluation_whose_data_do_not_come_is_left_with_all_others(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object) -> Iterator[dict[str, torch.Tensor]]:
        yield VALIDATION.__getitems__([0, 1])
        raise loader.StopWaiting

    monkeypatch.setattr(loader, "read", stopped)
    model, votes = Objective(network, RECIPE, list(WEIGHTS)), Decided(False, False)
    launch = Launch(rank=0, processes=1, local_rank=0, device=torch.device("cpu"), control=Rank())
    assert evaluate(model, RECIPE, WEIGHTS, VALIDATION, 2, SETTINGS.run, launch, votes) is None
    assert votes.seen == ["cast", "asked", "cast", "asked"]  # as often as on a rank that has its data


def test_every_recipe_has_an_evaluate_that_gives_what_training_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    argv, launch = ["--max_steps", "3", "--run_name", "mine"], connect("cpu", 1)
    main.train(RECIPE, config.parse(RECIPE.config_class, {}, argv, RECIPE.name), argv, launch, Console(None, True))
    trained = read_metrics(Path("runs/toy/mine/metrics.jsonl"))[-1]
    capsys.readouterr()

    def output(*argv: str) -> str:
        command, flags = main.read_command_line(RECIPE, ["evaluate", "--model_path", "checkpoint_final", *argv])
        main.commands_of(RECIPE)[command].run(RECIPE, flags, launch, print)
        return capsys.readouterr().out

    expected = [f"{name.removeprefix('final/val_')} {value:.4f}" for name, value in trained.items() if "final/val_" in name]
    assert len(expected) > 2
    said = f"Evaluating {tmp_path}/runs/toy/mine/checkpoints/checkpoint_step_3 on 1 process\n"
    assert output() == f"{said}val: {', '.join(expected)} over {len(VALIDATION)} samples, each once\n"
    assert output("--split", "val", "--batch_size", "3") == output()
    with pytest.raises(UserError, match="toy has no set tset; build_data gives: val"):
        output("--split", "tset")
