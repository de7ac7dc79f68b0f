"""What holds for every recipe, tried on each: exact resume, twice, and the run that was never interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scenarios import Finished, launch, planned, recipe_of
from tiny_runs import TINY, gpt2_mixture, mixture

from trainer.checkpoints.network import build_network
from trainer.evaluation.objective import Objective

STEPS, PARTS, HOW = 12, (3, 8), ("whole", "in parts")
COMMON = ["--max_steps", "16", "--batch_size", "2", "--gradient_accumulation_steps", "2", "--learning_rate", "1e-3"]
COMMON += ["--save_every", "0", "--keep_last", "0"]
MIXTURES = {"mixture": ("ids", "ids_2"), "gpt2 mixture": ("web", "books")}
RUNS = TINY | {"mixture": (TINY["tinystories"][0], mixture), "gpt2 mixture": (TINY["gpt2"][0], gpt2_mixture)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finished]:
    """Each recipe once in one piece, and once in three."""
    folder = tmp_path_factory.mktemp("data")

    def argv(name: str, step: int) -> list[str]:
        return [*RUNS[name][1](folder), *COMMON, "--stop_at_step", str(step)]

    runs = {f"{name} whole": (RUNS[name][0], argv(name, STEPS)) for name in RUNS}
    results = launch("one", runs, tmp_path_factory.mktemp("whole"))
    directories = tmp_path_factory.mktemp("parts")
    for step in (*PARTS, STEPS):
        runs = {f"{name} in parts": (RUNS[name][0], argv(name, step)) for name in RUNS}
        results |= launch("one", runs, tmp_path_factory.mktemp(f"to_{step}"), directories)
    return results


@pytest.mark.parametrize("name", RUNS)
def test_stopped_twice_it_ends_with_the_same_bits(name: str, finished: dict[str, Finished]) -> None:
    whole, parts = finished[f"{name} whole"], finished[f"{name} in parts"]
    assert parts.steps() == [*PARTS, STEPS], parts.outcomes
    for stem in ("model", "optimizer"):
        expected, actual = whole.tensors(stem, STEPS), parts.tensors(stem, STEPS)
        assert expected.keys() == actual.keys()
        assert [key for key in expected if not expected[key].equal(actual[key])] == []
    for key in ("train/loss", "train/grad_norm", "train/learning_rate"):
        assert len(whole.curve(key)) == STEPS
        assert parts.curve(key) == whole.curve(key)


@pytest.mark.parametrize("mixed", MIXTURES)
def test_the_shares_of_a_mixture_are_logged_and_go_on_after_a_stop(mixed: str, finished: dict[str, Finished]) -> None:
    whole, parts = ([finished[f"{mixed} {how}"].curve(f"train/share/{name}") for name in MIXTURES[mixed]] for how in HOW)
    assert parts == whole
    samples = [round(4 * step * whole[0][step], 6) for step in range(1, STEPS + 1)]
    assert all(count == int(count) for count in samples)
    assert 0.5 < whole[0][STEPS] < 1
    assert [whole[0][step] + whole[1][step] for step in whole[0]] == pytest.approx([1] * STEPS)


@pytest.mark.parametrize("mixed", MIXTURES)
def test_the_loss_of_each_set_of_a_mixture_is_that_of_its_own_samples(mixed: str, finished: dict[str, Finished]) -> None:
    runs = [finished[f"{mixed} {how}"] for how in HOW]
    one, two = MIXTURES[mixed]
    curves = [{name: run.curve(f"train/loss_{name}") for name in (one, two)} for run in runs]
    assert curves[0] == curves[1]
    shares, losses = runs[0].curve(f"train/share/{two}"), runs[0].curve("train/loss")
    drawn = {step: 4 * (step * shares[step] - (step - 1) * shares.get(step - 1, 0)) for step in shares}
    assert {step for step, number in drawn.items() if round(number)} == set(curves[0][two])  # else nothing is said of it
    assert 0 < len(curves[0][two]) < STEPS
    for step in set(curves[0][one]) - set(curves[0][two]):
        assert curves[0][one][step] == pytest.approx(losses[step], rel=1e-6)
    if mixed == "mixture":  # there every sample has as many tokens
        for step in curves[0][two]:
            part = drawn[step] / 4 * curves[0][two][step]
            assert part + (1 - drawn[step] / 4) * curves[0][one].get(step, 0) == pytest.approx(losses[step], rel=1e-6)


@pytest.mark.parametrize("name", TINY)
def test_it_learns_something(name: str, finished: dict[str, Finished]) -> None:
    """Else equal curves show little: the weights move, and the losses are no constants."""
    losses = list(finished[f"{name} whole"].curve("train/loss").values())
    assert len(set(losses)) > STEPS // 2


@pytest.mark.parametrize("name", ["tinystories", "gpt2", "pfn_stack", "vit", "collatz", "mixture"])
def test_what_is_compiled_is_one_graph(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each break is a wait of the device for the host. (Collatz, measuring, looks for anomalies on the host.)"""
    monkeypatch.setenv("SAMECURVE_CACHE", str(tmp_path))
    path, argv = RUNS[name]
    recipe = recipe_of(path)
    config = planned(recipe, [*argv(tmp_path), "--max_steps", "24"])
    data = recipe.build_data(config)
    first = data.train.__getitems__([0, 1])
    objective = Objective(build_network(recipe, config, data), recipe, list(recipe.items(first)))
    compiled = torch.compile(objective, backend="eager", fullgraph=True)
    assert compiled(first).isfinite().all()
    if name != "collatz":
        compiled(data.evaluation["val"].__getitems__([0, 1]), measuring=True)
    torch.compiler.reset()


def test_every_recipe_has_a_tiny_run() -> None:
    files = {path.stem for path in (Path(__file__).parents[1] / "recipes").glob("*.py")} - {"__init__"}
    assert {where.partition(":")[0].removeprefix("recipes.") for where, _ in TINY.values()} == files
