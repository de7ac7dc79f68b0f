"""Exact resume: killed with SIGKILL at any moment and started again by the same command, a run ends with the same bits.

Each test ends with a count of what it injected: one that killed nothing fails.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from fault_injector import (
    Moment,
    before_the_first_step,
    both,
    curve,
    different_tensors,
    inside_a_save,
    inside_an_evaluation,
    kill_at_moment,
    reached,
    rows,
)
from launching import RECIPE, Started, command, environment, run
from scenarios import launch

from trainer.checkpoints.checkpoint import Checkpoint
from trainer.checkpoints.retention import newest_good

LAST_STEP = 40
TINY = "--tokenizer train --vocab_size 300 --d_model 32 --num_layers 2 --num_heads 2 --max_length 32 --dropout 0.1"
TINY += f" --batch_size 4 --max_steps {LAST_STEP} --save_every 4 --log_every 2 --eval_every 10 --device cpu"
SECONDS = 120.0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `text/`: 36 blocks, so that an epoch is nine steps of 4."""
    folder = tmp_path_factory.mktemp("exact")
    (folder / "text").mkdir()
    words = "a rose by any other name would smell as sweet so romeo were he not called retain that dear perfection"
    # Validation is large enough for an evaluation to be met.
    for name, number in (("train", 70), ("validation", 60), ("test", 6)):
        lines = (" ".join(words.split()[(i * i + 5 * k) % 20] for k in range(12)) for i in range(number))
        (folder / "text" / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def env(place: Path) -> dict[str, str]:
    return environment(SAMECURVE_CACHE=str(place / "cache"), OMP_NUM_THREADS="1")


def arguments(place: Path, *more: str) -> list[str]:
    return [*TINY.split(), "--data_dir", str(place / "text"), *more]


def never_interrupted(place: Path, kind: str) -> Path:
    """The run directory of a launch that is left alone, with another number of workers than most of those that are killed."""
    runs = {"run": ("recipes.gpt2_wikitext:Gpt2Wikitext", arguments(place, "--num_workers", "0"))}
    return launch(kind, runs, place / f"uninterrupted-{kind}")["run"].path


@pytest.fixture(scope="module")
def uninterrupted(place: Path) -> Path:
    """One process, never interrupted."""
    return never_interrupted(place, "one")


def start_and_kill(
    moment: Moment, kind: str, argv: list[str], directory: Path, env: dict[str, str], rank: int | None = None
) -> bool:
    """Start a run and SIGKILL it, or one of its ranks, at `moment`; whether that was injected. No process may outlive it."""
    process = Started(command(kind, RECIPE, *argv), directory.with_suffix(".log"), env)
    try:
        killed = kill_at_moment(process, directory, moment, SECONDS, rank)
        assert (process.wait(timeout=60) != 0) == killed
        assert process.orphans(10) == []
    except subprocess.TimeoutExpired:
        raise AssertionError(f"the other rank went on:\n{process.log.read_text(errors='replace')[-3000:]}") from None
    finally:
        process.kill_all()
    return killed


# Comparison with the uninterrupted run


def assert_same_run(directory: Path, expected: Path) -> None:
    final = Path("checkpoints", "checkpoint_final")
    assert different_tensors(directory / final, expected / final) == []
    assert curve(directory) == curve(expected)  # loss sums that were under way at the kill are carried on, too
    assert list(curve(directory)["train/loss"]) == [1, *range(2, LAST_STEP + 1, 2)]
    assert max(row["step"] for row in rows(directory)) == LAST_STEP
    status = json.loads((directory / "status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", LAST_STEP)
    assert not list((directory / "checkpoints").glob(".unfinished-*"))


# Tests


def resume_lines(directory: Path) -> list[int]:
    lines = directory.with_suffix(".log").read_text().splitlines()
    return [int(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("Resumed from step ")]


def test_the_reference_run_is_what_it_should_be(uninterrupted: Path) -> None:
    """More than four epochs of nine steps, dropout on, a save every four steps: else the tests below would show little."""
    final = uninterrupted / "checkpoints" / "checkpoint_final"
    state = json.loads((final / "trainer_state.json").read_text())
    assert state["epoch"] == 4
    assert (uninterrupted / "checkpoints" / "checkpoint_epoch_2").resolve().name == "checkpoint_step_18"
    assert "dropout: 0.1" in (final / "config.yaml").read_text()
    assert sorted(curve(uninterrupted)["train/loss"]) == [1, *range(2, LAST_STEP + 1, 2)]


def later(moment: Moment, step: int) -> Moment:
    """Not in the first save, which may still be under way at that step where a disk is slow."""
    return both(both(reached(step), moment), lambda directory, _: any(directory.glob("checkpoints/checkpoint_step_*")))


ANYWHERE = {
    "at start": before_the_first_step(1.0),
    "inside the first save": inside_a_save,  # nothing good is there yet: the next launch starts from the beginning
    "inside a later save": later(inside_a_save, 8),
    "inside an evaluation": inside_an_evaluation(10),
    "inside one of the last saves": later(inside_a_save, 28),
}
TWICE_IN_ONE_EPOCH = {  # an epoch has nine steps: the first two fall into the third, steps 19 to 27
    "early in an epoch": reached(20),
    "late in the same epoch": reached(24),
    "inside a save": later(inside_a_save, 28),
}


@pytest.mark.parametrize(("workers", "moments"), [(0, ANYWHERE), (2, TWICE_IN_ONE_EPOCH)])
def test_killed_again_and_again_in_one_process(
    place: Path, env: dict[str, str], uninterrupted: Path, workers: int, moments: dict[str, Moment]
) -> None:
    directory = place / f"killed-{workers}"
    argv = arguments(place, "--output_dir", str(directory), "--num_workers", str(workers))
    found = []  # whether each launch finds a checkpoint: one that was still being written at the kill is none
    for name, moment in moments.items():
        found.append(any((directory / "checkpoints").glob("checkpoint_step_*")))
        assert start_and_kill(moment, "one", argv, directory, env), name
    found.append(any((directory / "checkpoints").glob("checkpoint_step_*")))

    run("one", RECIPE, *argv, log=directory.with_suffix(".log"), env=env)
    assert_same_run(directory, uninterrupted)
    resumed = resume_lines(directory)
    assert len(resumed) == sum(found) >= 2
    assert resumed == sorted(resumed)
    assert resumed[-1] > resumed[0]  # the launches came further
    if moments is TWICE_IN_ONE_EPOCH:
        assert all(14 <= step <= 27 for step in resumed[:2])


def verified(path: Path) -> Checkpoint:
    saved = Checkpoint(path)
    saved.verify()
    return saved


@pytest.mark.parametrize(("kind", "rank"), [("ddp", 1), ("zero2", None)])
def test_killed_under_a_launcher(place: Path, env: dict[str, str], kind: str, rank: int | None) -> None:
    """Two processes inside a save: all are killed; or one of them, and then the other ends by itself, non-zero.

    Their reference is a run of their own: dropout differs from one process's.
    """
    expected, directory = never_interrupted(place, kind), place / f"{kind}-killed"
    argv = arguments(place, "--output_dir", str(directory), "--num_workers", "0")
    assert start_and_kill(later(inside_a_save, 8), kind, argv, directory, env, rank)
    assert max(row["step"] for row in rows(directory)) < LAST_STEP
    messages: list[str] = []
    kept = newest_good(directory / "checkpoints", "checkpoint_step_", verified, messages.append)
    assert kept is not None
    assert messages == []  # nothing half-written passes for a checkpoint
    step = kept.state["train_state"]["step"]
    run(kind, RECIPE, *argv, log=directory.with_suffix(".log"), env=env)
    assert resume_lines(directory) == [step]
    assert_same_run(directory, expected)
