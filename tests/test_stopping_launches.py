"""The time limit, and every way to request a stop, through the launchers that users use: real processes, real signals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
from fault_injector import inside_a_save
from launching import FAULTY, RECIPE, Started, command, environment
from test_contributing import RECIPE as LINE

from trainer.checkpoints.checkpoint import Checkpoint

COMMON = "--max_steps 1000000 --save_every 0 --eval_every 0 --log_every 20 --device cpu"
TINY = "--tokenizer train --vocab_size 300 --d_model 32 --num_layers 2 --num_heads 2 --max_length 32 --batch_size 4"
TINY += " --no_use_tensorboard --num_workers 1"
PACE_SECONDS = 0.01  # of a micro-batch: what trains until it is stopped leaves the cores to other tests
# As long as it may take on a machine that is busy with others.
START_SECONDS = 200.0
SAVE_SECONDS = 100.0


class Launched:
    """A training run under some launcher, in a process group of its own."""

    def __init__(self, place: Path, argv: list[str], directory: Path, signals: str = "", **options: object) -> None:
        self.directory, self.log = directory, directory.with_suffix(".log")
        self.began = time.monotonic()
        env = environment(SAMECURVE_CACHE=str(place / "cache"), TOY_PACE=str(place / "pace"))
        env |= {"PET_SIGNALS_TO_HANDLE": signals} if signals else {}
        self.process = Started(argv, self.log, env, **options)

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_until(self, what: Callable[[], bool], seconds: float, why: str) -> None:
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, f"{why} within {seconds} s:\n{self.text[-3000:]}"
            time.sleep(0.02)

    def wait_for_training(self) -> None:
        def trains() -> bool:
            assert self.process.poll() is None, self.text[-3000:]
            return bool(re.search(r"^Step +\d+ \|", self.text, re.MULTILINE))

        self.wait_until(trains, START_SECONDS, "no step was logged")

    def exit_code(self, seconds: float = SAVE_SECONDS) -> int:
        try:
            return self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s:\n{self.text[-3000:]}") from None

    def check_stopped(self, reason: str) -> None:
        """It reports the reason, its checkpoint is complete, and none of its processes is left."""
        assert self.process.orphans(SAVE_SECONDS) == []
        status = json.loads((self.directory / "status.json").read_text())
        assert (status["state"], status["reason"]) == ("stopped", reason), self.text[-3000:]
        checkpoint = Checkpoint(Path(status["checkpoint"]))
        checkpoint.verify()
        assert checkpoint.state["train_state"]["step"] == status["step"] > 0
        assert f"Stopped at step {status['step']:,}: {reason}." in self.text
        saved = re.findall(r"Saved checkpoint to (\S+)", self.text)
        assert saved[-1] == str(checkpoint.path)
        assert len(set(saved)) == len(saved)  # signalled both directly and by its launcher: one stop, one save
        assert "Traceback" not in (self.directory / "train.log").read_text()  # (torchrun prints one of its own)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stopping")
    (folder / "text").mkdir()
    (folder / "pace").write_text(str(PACE_SECONDS))
    argv = "if music be the food of love play on give me excess of it that surfeiting the appetite may sicken"
    for name, rows in (("train", 6000), ("validation", 6), ("test", 6)):  # an epoch, whose end saves, is far away
        lines = (" ".join(argv.split()[(i * i + 5 * k) % 20] for k in range(12)) for i in range(rows))
        (folder / "text" / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return folder


Launcher = Callable[..., Launched]


@pytest.fixture
def launch(place: Path, tmp_path: Path) -> Iterator[Launcher]:
    """Starts a run; whatever still runs at the end of the test is killed."""
    started: list[Launched] = []

    def begin(kind: str, *more: str, name: str = "run", recipe: Path = FAULTY, **options: object) -> Launched:
        directory = tmp_path / name
        own = {FAULTY: ["--train_rows", "1000000"], RECIPE: [*TINY.split(), "--data_dir", str(place / "text")]}
        argv = [*COMMON.split(), *own.get(recipe, []), "--output_dir", str(directory), *more]
        if kind == "accelerate":  # the launcher with one process
            launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml"]
            line = [*launcher, str(recipe), *argv]
        else:
            line = command(kind, recipe, *argv)
        started.append(Launched(place, line, directory, **options))
        return started[-1]

    yield begin
    for each in started:
        each.process.kill_all()


# The time limit


def test_it_has_left_before_the_limit_counted_from_its_start(launch: Launcher) -> None:
    """One process, and two, side by side."""

    def seconds(run: Launched) -> float:
        assert run.exit_code(200) == 0, run.text[-3000:]
        return time.monotonic() - run.began

    late = ["one", "ddp"]
    for limit_seconds in (20.0, 40.0, 80.0):  # again, with more of it, where others kept it from the cores
        argv = ["--max_training_hours", str(limit_seconds / 3600)]
        runs = [launch(kind, *argv, name=f"{kind}-{limit_seconds:g}") for kind in late]
        with ThreadPoolExecutor() as threads:
            took = dict(zip(late, threads.map(seconds, runs), strict=True))
        late = []
        for (kind, needed), run in zip(took.items(), runs, strict=True):
            used_it = limit_seconds / 2 < needed <= limit_seconds  # a slow step or save takes its length off what is left
            if not used_it or "is over before the first step" in run.text:
                late.append(kind)
                continue
            run.check_stopped("time_limit")
            link = run.directory / "checkpoints" / "checkpoint_time_limit"
            assert link.is_symlink()
            Checkpoint(link).verify()
            assert Checkpoint(link).state["train_state"]["step"] > 0
        if not late:
            break
    assert not late, f"of {limit_seconds:g} s: {took}"


@pytest.mark.parametrize("kind", ["one", "ddp"])
def test_a_limit_that_is_over_before_the_first_step_is_named_and_ends_the_start(launch: Launcher, kind: str) -> None:
    """In the imports, or in a `build_data` of 200 seconds."""
    limit_seconds = 0.5 if kind == "one" else 8.0
    run = launch(kind, "--max_training_hours", str(limit_seconds / 3600), "--data_seconds", "200")
    assert run.exit_code(150) == 0, run.text[-3000:]
    assert "is over before the first step" in run.text
    assert "Traceback" not in run.text
    assert not list(run.directory.glob("checkpoints/checkpoint*"))
    assert run.process.orphans(SAVE_SECONDS) == []


# Signals


def test_signals_to_plain_python(launch: Launcher) -> None:
    """To the process alone, or, as a terminal does with Ctrl-C, to its whole group with the data workers in it."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    runs = {number: launch("one", "--num_workers", str(int(number == signal.SIGINT)), name=number.name) for number in signals}
    for number, run in runs.items():
        run.wait_for_training()
        if number == signal.SIGINT:
            os.killpg(run.process.pid, number)
        else:
            os.kill(run.process.pid, number)
    for number, run in runs.items():
        assert run.exit_code() == 0, run.text[-3000:]
        run.check_stopped(number.name)


def test_sigterm_to_accelerate_launch_with_one_process(launch: Launcher) -> None:
    """The launcher dies of it without signalling its child, which must save all the same and end."""
    run = launch("accelerate", recipe=RECIPE)
    run.wait_for_training()
    os.kill(run.process.pid, signal.SIGTERM)
    run.exit_code()
    run.check_stopped("SIGTERM")


@pytest.mark.parametrize(
    ("kind", "number", "times"),
    [
        ("ddp", signal.SIGTERM, 2),
        ("fsdp", signal.SIGINT, 1),
        pytest.param(
            *("zero2", signal.SIGUSR1, 1),
            marks=pytest.mark.skipif(torch.__version__ < "2.10", reason="torchrun 2.9 passes on SIGTERM and SIGINT alone"),
        ),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_signals_to_the_launcher_of_two(launch: Launcher, kind: str, number: signal.Signals, times: int) -> None:
    """torchrun passes on what `PET_SIGNALS_TO_HANDLE` names; its own exit status shows nothing, status.json does."""
    run = launch(kind, signals="SIGTERM,SIGINT,SIGUSR1,SIGHUP")
    run.wait_for_training()
    for _ in range(times):
        os.kill(run.process.pid, number)
        time.sleep(0.05)
    run.exit_code()
    run.check_stopped(number.name)


def test_sigterm_while_the_first_step_is_compiled(launch: Launcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilers run meanwhile, in processes of their own. The smallest network: each of its kernels takes them seconds."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    line = tmp_path / "line.py"
    line.write_text(LINE)
    run = launch("one", "--compile", "--log_every", "1", "--num_workers", "0", recipe=line)
    run.wait_until(lambda: "Optimizer: " in run.text, START_SECONDS, "no start")
    run.wait_until(lambda: len(run.process.family()) > 1, START_SECONDS, "no compiler")
    os.kill(run.process.pid, signal.SIGTERM)
    assert "Step " not in run.text
    assert run.exit_code(200) == 0, run.text[-3000:]
    run.check_stopped("SIGTERM")
    assert json.loads((run.directory / "status.json").read_text())["step"] == 1


def test_sigterm_inside_an_evaluation_ends_it_there(launch: Launcher) -> None:
    run = launch("one", "--eval_every", "20", "--batch_size", "1", "--evaluation_seconds", "1")
    run.wait_until(lambda: "Step     20" in run.text, START_SECONDS, "no step was logged")
    time.sleep(0.5)
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.exit_code() == 0, run.text[-3000:]
    assert 1 <= run.text.count("measured a batch") < 9  # of nine, of a second each
    run.check_stopped("SIGTERM")
    assert json.loads((run.directory / "status.json").read_text())["step"] == 20
    assert "eval/" not in (run.directory / "metrics.jsonl").read_text()


def test_sigterm_inside_a_save_and_again_lets_it_be_whole(launch: Launcher) -> None:
    run = launch("one", "--save_every", "50", "--width", "1500", "--keep_last", "0")
    inside = False
    while not inside and run.process.poll() is None:
        if inside_a_save(run.directory, run.process.since):
            os.kill(run.process.pid, signal.SIGSTOP)
            inside = inside_a_save(run.directory, run.process.since)
            if inside:
                os.kill(run.process.pid, signal.SIGTERM)
            os.kill(run.process.pid, signal.SIGCONT)
    assert inside, run.text[-3000:]
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.exit_code() == 0, run.text[-3000:]
    run.check_stopped("SIGTERM")
    folder = run.directory / "checkpoints"
    assert not list(folder.glob(".unfinished-*"))
    steps = sorted(int(path.name.rpartition("_")[2]) for path in folder.glob("checkpoint_step_*"))
    assert steps[0] % 50 == 0  # the save that was in progress, and the one after the signal
    assert 2 <= len(steps) <= steps[-1] // 50 + 1
    for step in steps:
        Checkpoint(folder / f"checkpoint_step_{step}").verify()


def test_sigterm_while_the_data_are_prepared_ends_it_there(launch: Launcher) -> None:
    run = launch("one", "--data_seconds", "200")
    run.wait_until(lambda: "preparing data" in run.text, START_SECONDS, "no start")
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.exit_code() == 130  # nothing was saved
    assert "SIGTERM before the first step: nothing was trained" in run.text
    status = json.loads((run.directory / "status.json").read_text())
    assert [status[key] for key in ("state", "reason", "step", "checkpoint")] == ["stopped", "SIGTERM", 0, None]
    assert (run.directory / ".lock").read_text() == ""
    assert run.process.orphans(SAVE_SECONDS) == []


@pytest.mark.parametrize("kind", ["one", "ddp"])
def test_the_report_after_training_is_cut_short(launch: Launcher, kind: str) -> None:
    """By a signal, or by the stop file; under DDP rank 1 does not wait for it."""
    run = launch(kind, "--max_steps", "5", "--num_workers", "1", "--report_seconds", "200")
    run.wait_until(lambda: "drawing the report" in run.text, START_SECONDS, "no report")
    if kind == "ddp":
        run.wait_until(lambda: run.process.rank(1) is None, SAVE_SECONDS, "rank 1 waits")
        (run.directory / "stop").touch()
    else:
        os.killpg(run.process.pid, signal.SIGINT)
    assert run.exit_code() == 0, run.text[-3000:]
    assert f"{'SIGINT' if kind == 'one' else 'stop_file'}: the report is cut short; all is saved" in run.text
    status = json.loads((run.directory / "status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", 5)
    Checkpoint(run.directory / "checkpoints" / "checkpoint_final").verify()
    assert "final/train_loss" in (run.directory / "metrics.jsonl").read_text()
    assert not (run.directory / "stop").exists()
    assert (run.directory / ".lock").read_text() == ""  # released, not just lost
    assert run.process.orphans(SAVE_SECONDS) == []
    assert "semaphore" not in run.text  # multiprocessing's complaint of what was left


def test_sigkill_to_the_ddp_launcher_leaves_no_orphans(launch: Launcher) -> None:
    run = launch("ddp")
    run.wait_for_training()
    os.kill(run.process.pid, signal.SIGKILL)
    run.exit_code()
    run.check_stopped("SIGTERM")  # what the kernel sends to the ranks for it


def test_a_signal_to_one_rank_stops_both_at_the_same_step(launch: Launcher) -> None:
    run = launch("ddp")
    run.wait_for_training()
    os.kill(run.process.rank(1), signal.SIGUSR1)
    assert run.exit_code() == 0, run.text[-3000:]
    run.check_stopped("SIGUSR1")


def test_a_second_interrupt_leaves_at_once(launch: Launcher) -> None:
    """A step of minutes: the first Ctrl-C would be obeyed after it, the second one is not for waiting."""
    run = launch("one", "--gradient_accumulation_steps", "20000", "--num_workers", "0", recipe=RECIPE)
    run.wait_until(lambda: "Optimizer: " in run.text, START_SECONDS, "no start")
    process = psutil.Process(run.process.pid)
    begun = sum(process.cpu_times()[:2])
    # Its micro-batches are read by then, before which a request would be obeyed.
    run.wait_until(lambda: sum(process.cpu_times()[:2]) > begun + 2, START_SECONDS, "no step")
    os.killpg(run.process.pid, signal.SIGINT)
    time.sleep(1.0)
    assert run.process.poll() is None, "the first interrupt must wait for the step"
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.exit_code() == 130  # at the end of the step it would have saved, and left with 0
    assert "second interrupt: leaving at once" in run.text
    assert not list((run.directory / "checkpoints").glob("*step_*"))
    assert run.process.orphans(SAVE_SECONDS) == []


# Words and files


def test_a_stop_file_stops_and_is_removed(launch: Launcher) -> None:
    run = launch("ddp")
    run.wait_for_training()
    (run.directory / "status").touch()
    run.wait_until(lambda: not (run.directory / "status").exists(), SAVE_SECONDS, "the status file was not answered")
    run.wait_until(lambda: " of 1,000,000; " in run.text, SAVE_SECONDS, "no status")
    (run.directory / "stop").touch()
    assert run.exit_code() == 0, run.text[-3000:]
    run.check_stopped("stop_file")
    assert not (run.directory / "stop").exists()
    assert (run.directory / "plots" / "loss.png").exists()  # somebody is there to look at it


def test_status_and_stop_typed_into_a_pipe(launch: Launcher) -> None:
    run = launch("one", stdin=subprocess.PIPE)
    run.wait_for_training()
    typed = run.process.stdin
    assert typed is not None
    typed.write(b"status\n")
    typed.flush()
    run.wait_until(lambda: " of 1,000,000; " in run.text, SAVE_SECONDS, "no status")
    assert run.process.poll() is None
    line = next(line for line in run.text.splitlines() if " of 1,000,000; " in line)
    for part in ("Step ", " h trained", "to go", "last: Step", "Loss: "):
        assert part in line
    typed.write(b"stop\n")
    typed.flush()
    assert run.exit_code() == 0, run.text[-3000:]
    run.check_stopped("stop_typed")


def test_the_end_of_stdin_stops_nothing_and_the_same_command_goes_on(launch: Launcher) -> None:
    run = launch("one", stdin=subprocess.PIPE)
    run.wait_for_training()
    assert run.process.stdin is not None
    run.process.stdin.close()
    time.sleep(1.5)  # three looks at stdin
    assert run.process.poll() is None, run.text[-3000:]
    os.kill(run.process.pid, signal.SIGHUP)
    assert run.exit_code() == 0, run.text[-3000:]
    run.check_stopped("SIGHUP")
    stopped_at = json.loads((run.directory / "status.json").read_text())["step"]

    again = launch("one", "--stop_at_step", str(stopped_at + 3))
    assert again.exit_code(200) == 0, again.text[-3000:]
    assert f"Resumed from step {stopped_at}" in again.text
