"""Property 2: killed with SIGKILL at any moment and started again by the same command, a run ends with the same bits.

Each test ends with a count of what it injected: one that killed nothing fails.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import RECIPE, command, environment, kill_group, run, start
from safetensors.torch import load_file

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
    for name, rows in (("train", 70), ("validation", 6), ("test", 6)):
        lines = (" ".join(words.split()[(i * i + 5 * k) % 20] for k in range(12)) for i in range(rows))
        (folder / "text" / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def env(place: Path) -> dict[str, str]:
    return environment(SAMECURVE_CACHE=str(place / "cache"), OMP_NUM_THREADS="1")


def arguments(place: Path, directory: Path, *more: str) -> list[str]:
    return [*TINY.split(), "--data_dir", str(place / "text"), "--output_dir", str(directory), *more]


@pytest.fixture(scope="module")
def uninterrupted(place: Path, env: dict[str, str]) -> Path:
    """One process, never interrupted, and with another number of workers than most of the runs that are killed."""
    directory = place / "uninterrupted"
    run("one", RECIPE, *arguments(place, directory, "--num_workers", "0"), log=place / "uninterrupted.log", env=env)
    return directory


# The fault injector


def processes_of(directory: Path) -> list[int]:
    """Every process that has the run directory in its command line: launcher, ranks, data workers."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            try:
                words = Path("/proc", entry, "cmdline").read_bytes().split(b"\0")
                state = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if str(directory).encode() in words and state != "Z":
                found.append(int(entry))
    return found


def send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def rows(directory: Path) -> list[dict[str, float]]:
    """The whole lines of metrics.jsonl."""
    try:
        lines = (directory / "metrics.jsonl").read_text().split("\n")[:-1]
    except OSError:
        return []
    return [json.loads(line) for line in lines]


Moment = Callable[[Path, float], bool]
"""(run directory, when this launch started) -> whether the launch is at the point where it is to be killed"""


def reached(step: int) -> Moment:
    """This launch has logged `step`."""
    return lambda directory, since: any(row["step"] >= step and row["time"] >= since for row in rows(directory))


def inside_a_save(directory: Path, since: float) -> bool:
    """Between the making of a temporary folder and its renaming."""
    try:
        entries = list(os.scandir(directory / "checkpoints"))
        return any(e.name.startswith(".unfinished-checkpoint_step_") and e.stat().st_ctime >= since for e in entries)
    except FileNotFoundError:  # not there yet, or renamed meanwhile
        return False


def inside_a_save_after(step: int) -> Moment:
    """Inside a save of this launch, once it has logged `step`."""
    return lambda directory, since: inside_a_save(directory, since) and reached(step)(directory, since)


def start_and_kill(words: list[str], directory: Path, log: Path, env: dict[str, str], moment: Moment) -> bool:
    """Start a run and SIGKILL all its processes at `moment`; whether that was injected before the run ended by itself.

    At the moment the processes are stopped first and looked at again: so the kill falls inside it, or the run goes on.
    """
    since = time.time()
    process = start(words, log, env)
    try:
        end = time.monotonic() + SECONDS
        while process.poll() is None and time.monotonic() < end:
            if moment(directory, since):
                everyone = [*processes_of(directory), process.pid]
                send(everyone, signal.SIGSTOP)
                if moment(directory, since):
                    send([*everyone, *processes_of(directory)], signal.SIGKILL)
                    assert process.wait(timeout=30) == -signal.SIGKILL
                    return True
                send(everyone, signal.SIGCONT)
            time.sleep(0.0002)
        assert process.poll() is not None, f"hung: {log.read_text(errors='replace')[-3000:]}"
        return False
    finally:
        send(processes_of(directory), signal.SIGKILL)
        kill_group(process)


# What must hold afterwards


def assert_same_bits(directory: Path, expected: Path) -> None:
    for file in ("model.safetensors", "optimizer.safetensors"):
        got, wanted = (load_file(d / "checkpoints" / "checkpoint_final" / file) for d in (directory, expected))
        assert got.keys() == wanted.keys()
        different = [name for name in wanted if not got[name].equal(wanted[name])]
        assert not different, f"{file}: {different} differ"


def curve(directory: Path) -> dict[str, dict[int, float]]:
    """{metric: {step: value}} of what training and evaluation give; fails on a step that is there twice."""
    found: dict[str, dict[int, float]] = {"train/loss": {}, "train/grad_norm": {}, "eval/val_loss": {}}
    for row in rows(directory):
        for name, values in found.items():
            if name in row:
                assert row["step"] not in values, f"{name} of step {row['step']} is there twice"
                values[row["step"]] = row[name]
    return found


def assert_same_run(directory: Path, expected: Path) -> None:
    assert_same_bits(directory, expected)
    assert curve(directory) == curve(expected)  # loss sums that were under way at the kill are carried on, too
    assert list(curve(directory)["train/loss"]) == list(range(2, LAST_STEP + 1, 2))
    assert max(row["step"] for row in rows(directory)) == LAST_STEP
    status = json.loads((directory / "status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", LAST_STEP)
    assert not list((directory / "checkpoints").glob(".unfinished-*"))
    assert not processes_of(directory)


# Tests


def resume_lines(log: Path) -> list[int]:
    return [int(line.rsplit(" ", 1)[1]) for line in log.read_text().splitlines() if line.startswith("Resumed from step ")]


def test_the_reference_run_is_what_it_should_be(uninterrupted: Path) -> None:
    """More than four epochs of nine steps, dropout on, a save every four steps: else the tests below would show little."""
    final = uninterrupted / "checkpoints" / "checkpoint_final"
    state = json.loads((final / "trainer_state.json").read_text())
    assert state["epoch"] == 4
    assert (uninterrupted / "checkpoints" / "checkpoint_epoch_2").resolve().name == "checkpoint_step_18"
    assert "dropout: 0.1" in (final / "config.yaml").read_text()
    assert sorted(curve(uninterrupted)["train/loss"]) == list(range(2, LAST_STEP + 1, 2))


INSIDE_SAVES = {
    "inside the first save": inside_a_save,  # nothing good is there yet: the next launch starts from the beginning
    "inside a later save": inside_a_save_after(8),
    "inside one of the last saves": inside_a_save_after(28),
}
TWICE_IN_ONE_EPOCH = {  # an epoch has nine steps: the first two fall into the third, steps 19 to 27
    "early in an epoch": reached(20),
    "late in the same epoch": reached(24),
    "inside a save": inside_a_save_after(28),
}


@pytest.mark.parametrize(("workers", "moments"), [(0, INSIDE_SAVES), (2, TWICE_IN_ONE_EPOCH)])
def test_killed_again_and_again_in_one_process(
    place: Path, env: dict[str, str], uninterrupted: Path, workers: int, moments: dict[str, Moment]
) -> None:
    directory, log = place / f"killed-{workers}", place / f"killed-{workers}.log"
    words = command("one", RECIPE, *arguments(place, directory, "--num_workers", str(workers)))
    injected = [name for name, moment in moments.items() if start_and_kill(words, directory, log, env, moment)]
    assert injected == list(moments)

    run("one", RECIPE, *words[2:], log=log, env=env)
    assert_same_run(directory, uninterrupted)
    resumed = resume_lines(log)
    assert len(resumed) == len(injected) - ("inside the first save" in injected)
    assert resumed == sorted(set(resumed))  # each launch came further than the one before
    if moments is TWICE_IN_ONE_EPOCH:
        assert all(18 <= step <= 27 for step in resumed[:2])


@pytest.mark.parametrize("kind", ["ddp", "zero2"])
def test_killed_under_a_launcher(place: Path, env: dict[str, str], kind: str) -> None:
    """Two processes, killed inside a save. Their reference is a run of their own: dropout differs from one process's."""
    expected, directory, log = place / kind, place / f"{kind}-killed", place / f"{kind}-killed.log"
    run(kind, RECIPE, *arguments(place, expected, "--num_workers", "0"), log=place / f"{kind}.log", env=env)
    words = arguments(place, directory, "--num_workers", "0")
    assert start_and_kill(command(kind, RECIPE, *words), directory, log, env, inside_a_save_after(8))
    assert list((directory / "checkpoints").glob(".unfinished-*"))  # the kill was inside the save
    assert max(row["step"] for row in rows(directory)) < LAST_STEP
    run(kind, RECIPE, *words, log=log, env=env)
    assert len(resume_lines(log)) == 1
    assert_same_run(directory, expected)


def test_sigkill_of_one_rank_ends_the_others_and_leaves_no_half_checkpoint(place: Path, env: dict[str, str]) -> None:
    directory, log = place / "one-rank", place / "one-rank.log"
    process = start(command("ddp", RECIPE, *arguments(place, directory, "--num_workers", "0", "--max_steps", "4000")), log, env)
    try:
        end = time.monotonic() + SECONDS
        while not reached(8)(directory, 0.0) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        victim = next(pid for pid in processes_of(directory) if _rank(pid) == "1")
        os.kill(victim, signal.SIGKILL)
        assert process.wait(timeout=60) != 0
        deadline = time.monotonic() + 10
        while processes_of(directory) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not processes_of(directory)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"the other rank went on:\n{log.read_text(errors='replace')[-3000:]}") from None
    finally:
        send(processes_of(directory), signal.SIGKILL)
        kill_group(process)
    from trainer.retention import newest_good

    said: list[str] = []
    assert newest_good(directory / "checkpoints", "checkpoint_step_", said.append) is not None
    assert said == []


def _rank(pid: int) -> str | None:
    try:
        values = Path("/proc", str(pid), "environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((value[5:].decode() for value in values if value.startswith(b"RANK=")), None)
