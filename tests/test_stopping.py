import math
import os
import pty
import select
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.command_line.sections import Run
from trainer.distributed import signals, stop_command, stopping
from trainer.distributed.signals import reset_in_worker
from trainer.distributed.stopping import REQUESTS, StopReason, StopRequests, finished_reason
from trainer.errors import BAD_INPUT, UserError
from trainer.reporting.run_directory import RunDirectory
from trainer.state import TrainState

WAIT_SECONDS = 100.0  # for what comes at once on a machine that is not busy
# A trainer that steps for at most 200 s, and prints why it stopped.
TRAIN = """
import os, sys, time
from pathlib import Path
from trainer.reporting.run_directory import RunDirectory
from trainer.distributed.signals import die_with_launcher
from trainer.distributed.stopping import StopRequests
die_with_launcher()
if "--descriptor-0" in sys.argv:  # the pipe of somebody else, who got the number of the closed stdin
    reader, writer = os.pipe()
    assert reader == 0 and os.write(writer, b"stop\\n")
log = lambda line: print(line, flush=True)
run = RunDirectory(Path(sys.argv[1]))
with StopRequests(None, time.monotonic(), run, lambda: "step 7", log) as stop:
    stop.unsaved = True
    log(f"started {os.getpid()}")
    end = time.monotonic() + 200
    reason = None
    while reason is None and time.monotonic() < end:
        time.sleep(0.01)
        reason = stop.decide(stop.votes())
    log(f"reason {reason}")
    if "--slow-save" in sys.argv:
        time.sleep(200)
"""
PLAIN = {name: value for name, value in os.environ.items() if name not in ("TORCHELASTIC_RUN_ID", "CROSS_RANK")}
LAUNCHED = {**PLAIN, "ACCELERATE_DYNAMO_MODE": "default"}


def start(path: Path, *arguments: str, **options: object) -> subprocess.Popen:
    """A trainer in a session of its own, past its start."""
    options = {"stdin": subprocess.DEVNULL, "env": PLAIN, "start_new_session": True, **options}
    command = [sys.executable, "-u", "-c", TRAIN, str(path), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("started ")
    return process


def requests(limit_hours: float | None = None, ago: float = 0.0, **options: Any) -> StopRequests:
    return StopRequests(limit_hours, time.monotonic() - ago, None, str, print, **options)


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


class Clock:
    """Stands still until it is set."""

    def __init__(self) -> None:
        self.now = 5000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What StopRequests reads the time from."""
    standing = Clock()
    monkeypatch.setattr(stopping, "time", standing)
    monkeypatch.setattr(signals, "processor_seconds", lambda: (1.0, 0.0))  # nobody else uses the cores
    return standing


def eventually(what: Callable[[], bool], seconds: float = WAIT_SECONDS) -> bool:
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.02)
    return what()


# The time limit


@pytest.mark.parametrize(
    ("seconds_left", "steps", "save", "stops"),
    [
        (100, [1], 1, False),
        (100, [1, 49, 1], 1, True),  # 2 x 49 + 2.5 + 3.5 > 100
        (100, [49, *[1] * 50], 1, False),  # long ago: a compilation
        (100, [1], 39, True),  # one may be under way, and then there is one more
        (100, [1], 37, False),
        (-1, [], 0, True),
        (1, [], 0, True),
        (5, [], 0, False),
    ],
)
def test_time_limit_leaves_room_for_a_step_and_a_save(
    seconds_left: float, steps: list[float], save: float, stops: bool, clock: Clock
) -> None:
    started = clock.now - 3600 + seconds_left
    for stop in (
        StopRequests(1.0, started, None, str, print),
        StopRequests(2.0, clock.now, None, str, print, slurm_end=clock.now + seconds_left),
        StopRequests(None, clock.now, None, str, print, slurm_end=clock.now + seconds_left),
    ):
        for step in steps:
            stop.record_step(step)
        stop.expect_save(save)
        assert stop.decide(stop.votes()) == ("time_limit" if stops else None)
        assert stop.seconds_left() == pytest.approx(seconds_left)
        stop.expect_save(1e9)
        stop.record_save(save)  # measured: the guess is forgotten
        assert stop.decide(stop.votes()) == ("time_limit" if stops else None)


def test_time_limit_leaves_room_for_the_end_of_the_process(clock: Clock) -> None:
    """Which takes longer with alerts and W&B."""
    stop = StopRequests(1.0, clock.now, None, str, print, exit_seconds=20.0)
    clock.now += 3600 - 20.5
    assert stop.decide(stop.votes()) is None
    clock.now += 1.0
    assert stop.decide(stop.votes()) == "time_limit"


def test_what_a_stop_takes_grows_with_the_wait_for_a_core(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ten seconds this process ran one: all it does takes ten times as long."""
    monkeypatch.setattr(signals, "processor_seconds", lambda: (1.0, 9.0))
    for steps, saves, seconds in (([], [], 2 * 2 + 2.5 * 20), ([3], [], 2 * 3 + 2.5 * 20), ([3], [4], 2 * 3 + 2.5 * 4)):
        needed = seconds + stopping.EXIT_SECONDS + 9 * stopping.EXIT_PROCESSOR_SECONDS
        for left, stops in ((needed + 0.1, None), (needed - 0.1, "time_limit")):
            stop = StopRequests(1.0, clock.now - 3600 + left, None, str, print)
            stop.expect_save(2.0)
            stop._look(0.0)  # in the start
            for step in steps:
                stop.record_step(step)
            for save in saves:
                stop.record_save(save)
            assert stop.decide(stop.votes()) == stops, (steps, saves)
            clock.now += 1
    quiet = StopRequests(1.0, clock.now - 3600 + 36, None, str, print)  # 4 x 10 seconds of a save are expected now
    quiet.record_save(4.0)
    quiet._look(0.0)
    assert quiet.decide(quiet.votes()) == "time_limit"


def test_the_wait_for_a_core_is_measured() -> None:
    if not Path("/proc/self/schedstat").exists():
        pytest.skip("the kernel does not say")
    script = "import os, subprocess, time\nfrom trainer.distributed.signals import processor_seconds\n"
    script += "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    script += "busy = subprocess.Popen(['sh', '-c', 'while :; do :; done'])\n"
    script += "while time.process_time() < 0.5: pass\nbusy.kill()\nprint(*processor_seconds())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=WAIT_SECONDS)
    ran, waited = map(float, done.stdout.split())
    assert 0.4 < ran < 5.0
    assert waited > 0.2 * ran  # another one wants the same core


def test_no_limit() -> None:
    stop = requests()
    stop.record_step(1e9)
    assert stop.votes() == [0.0] * len(REQUESTS)
    assert stop.seconds_left() == math.inf


@pytest.mark.parametrize("hours", [0, -1, math.nan, math.inf, -math.inf])
def test_senseless_limit_is_refused(hours: float) -> None:
    with pytest.raises(UserError, match=f"max_training_hours {hours} ") as refused:
        requests(hours)
    assert refused.value.exit_code == BAD_INPUT


def test_process_start_counts_what_came_before() -> None:
    script = "import time; time.sleep(0.7); from trainer.distributed.signals import process_start_monotonic as start\n"
    script += "print(time.monotonic() - start())"
    began = time.monotonic()
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert float(printed) <= time.monotonic() - began + 0.02
    if sys.platform == "linux":
        assert float(printed) >= 0.7


def test_slurm_end(tmp_path: Path) -> None:
    seconds_left = stopping.slurm_seconds_left
    assert seconds_left({}) is None
    before = time.time()
    value = seconds_left({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": str(before + 50)})
    assert value is not None
    assert 50 - (time.time() - before) <= value <= 50
    squeue = tmp_path / "squeue"
    environ = {"SLURM_JOB_ID": "7", "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_TIME_FORMAT": "relative"}
    for answer, seconds in (("$(date -d '+100 seconds' +%FT%T)", 100), ("N/A", None), ("", None)):
        squeue.write_text(f'#!/bin/sh\n[ "$*$SLURM_TIME_FORMAT" = "-h -j 7 -o %estandard" ] && echo "{answer}"\n')
        squeue.chmod(0o755)
        os_path, os.environ["PATH"] = os.environ["PATH"], environ["PATH"]  # where the command itself is looked up
        try:
            before = time.time()
            value = seconds_left(environ)
            took = time.time() - before
            if seconds is None:
                assert value is None
            else:
                assert value is not None
                assert seconds - took - 1 <= value <= seconds + took  # squeue prints whole seconds
        finally:
            os.environ["PATH"] = os_path
    assert seconds_left({"SLURM_JOB_ID": "7", "PATH": str(tmp_path / "nowhere")}) is None  # no squeue


# Votes


def test_one_rank_is_enough_and_the_first_reason_wins() -> None:
    assert StopRequests.decide([0.0] * len(REQUESTS)) is None
    for index, reason in enumerate(REQUESTS):
        assert StopRequests.decide([0.0] * index + [1.0] * (len(REQUESTS) - index)) == reason


def test_votes_are_cheap(tmp_path: Path) -> None:
    stop = StopRequests(1.0, time.monotonic(), RunDirectory(tmp_path), str, print)
    for _ in range(50):
        stop.record_step(0.01)
    took = []
    for _ in range(2000):
        began = time.perf_counter()
        stop.votes()
        took.append(time.perf_counter() - began)
    assert statistics.median(took) < 100e-6  # the median: a few of them may meet other processes that use the core


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((10, 10, 0, 0, 1.0, None), StopReason.LAST_STEP),
        ((11, 10, 9, 3, 1.0, 2.0), StopReason.LAST_STEP),
        ((9, 10, 0, 0, 1.0, None), None),
        ((9, 10, 0, 0, 2.0, 2.0), StopReason.TARGET_LOSS),
        ((9, 10, 0, 0, 2.1, 2.0), None),
        ((9, 10, 0, 0, math.nan, 2.0), None),
        ((9, 10, 0, 0, None, 2.0), None),
        ((9, 10, 0, 0, -0.1, 0.0), StopReason.TARGET_LOSS),
        ((9, 10, 3, 3, 1.0, None), StopReason.PATIENCE),
        ((9, 10, 2, 3, 1.0, None), None),
        ((9, 10, 99, 0, 1.0, None), None),
    ],
)
def test_finished_reason(arguments: tuple, reason: StopReason | None) -> None:
    step, total_steps, without_improvement, patience, train_loss, target_loss = arguments
    state = TrainState(step=step, evaluations_without_improvement=without_improvement, train_loss=train_loss)
    run = Run(patience=patience, target_loss=target_loss)
    assert finished_reason(state, total_steps, run) == reason
    assert reason is None or reason.finished


# Signals


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_signal_is_a_vote_and_the_old_handler_returns(name: str) -> None:
    number, received = signal.Signals[name], []
    before = signal.signal(number, lambda *_: received.append(name))
    try:
        with requests() as stop:
            assert stop.decide(stop.votes()) is None
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            assert stop.decide(stop.votes()) == name
            assert received == []
        os.kill(os.getpid(), number)
        assert received == [name]
    finally:
        signal.signal(number, before)
    assert "interrupts" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGHUP"])
def test_a_signal_outside_training_ends_main_with_a_message(name: str) -> None:
    """For example in the imports, or in a C call that waits for a process that never comes."""
    script = (
        "import ctypes, os, signal, time\n"
        "from trainer import main\n"
        "from trainer.distributed.stopping import StopRequests\n"
        "def command_line(*_):\n"
        "    with StopRequests(None, time.monotonic(), None, str, print) as stop:\n"
        f"        os.kill(os.getpid(), signal.{name})\n"
        "        reason = stop.decide(stop.votes())\n"
        "    print(reason, flush=True)\n"
        "    libc, mutex = ctypes.CDLL(None), bytes(64)\n"
        "    libc.pthread_mutex_lock(mutex), libc.pthread_mutex_lock(mutex)\n"
        "main.read_command_line = command_line\n"
        "main.main(None, [])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=PLAIN, text=True
    )
    assert process.stdout.readline() == f"{name}\n"
    process.send_signal(signal.Signals[name])
    assert process.wait(timeout=WAIT_SECONDS) == 130
    assert process.stderr.read() == f"{name}: leaving at once; nothing is lost\n"


def test_second_interrupt_leaves_at_once_but_sigterm_does_not(tmp_path: Path) -> None:
    process = start(tmp_path, "--slow-save")
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "reason SIGINT\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=WAIT_SECONDS) == 130
    assert "without saving" in process.stderr.read()


def test_second_interrupt_ends_a_process_stuck_in_one_c_call() -> None:
    """As in a hung collective: no Python handler runs there."""
    script = TRAIN[: TRAIN.index("    stop.unsaved")] + "    import ctypes\n    libc, mutex = ctypes.CDLL(None), bytes(64)\n"
    script += "    log('started')\n    libc.pthread_mutex_lock(mutex)\n    libc.pthread_mutex_lock(mutex)"
    process = subprocess.Popen(
        [sys.executable, "-c", script, "x"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=PLAIN, text=True
    )
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=WAIT_SECONDS) == 130
    assert "nothing is lost" in process.stderr.read()  # no step was done yet


@pytest.mark.parametrize(("environment", "echo_seconds"), [({}, 0.2), ({"TORCHELASTIC_RUN_ID": "none"}, 1.0)])
def test_an_interrupt_and_its_echo_from_the_launcher_are_one(
    environment: dict[str, str], echo_seconds: float, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", environment)
    exit_codes = []
    monkeypatch.setattr(os, "_exit", exit_codes.append)
    stop = StopRequests(None, clock.now, None, str, print)
    stop._leave_at_second_interrupt(signal.SIGTERM)  # neither a first one nor a second
    clock.now += 10
    stop._leave_at_second_interrupt(signal.SIGINT)
    clock.now += 0.9 * echo_seconds
    stop._leave_at_second_interrupt(signal.SIGINT)
    assert exit_codes == []
    clock.now += 0.2 * echo_seconds
    stop._leave_at_second_interrupt(signal.SIGINT)
    assert exit_codes == [130]


def test_nohup_is_respected(tmp_path: Path) -> None:
    process = start(tmp_path, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGUSR1)
    assert process.communicate(timeout=WAIT_SECONDS)[0] == "reason SIGUSR1\n"


@pytest.mark.parametrize("environment", [LAUNCHED, PLAIN])
def test_trainer_stops_when_its_launcher_is_killed_but_not_when_its_shell_is(tmp_path: Path, environment: dict) -> None:
    launcher = "import subprocess, sys; subprocess.run([sys.executable, '-u', '-c', *sys.argv[1:]])"
    parent = subprocess.Popen(
        [sys.executable, "-c", launcher, TRAIN, str(tmp_path)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment, text=True,
    )  # fmt: skip
    trainer = int(parent.stdout.readline().split()[1])
    parent.kill()
    parent.wait()
    if environment is PLAIN:
        time.sleep(0.5)
        os.kill(trainer, signal.SIGUSR1)
    assert parent.stdout.readline() == ("reason SIGTERM\n" if environment is LAUNCHED else "reason SIGUSR1\n")


# At once


def test_a_request_is_acted_on_at_once_whatever_the_main_thread_does(tmp_path: Path) -> None:
    run, acted = RunDirectory(tmp_path), threading.Event()
    with StopRequests(None, time.monotonic(), run, str, print) as stop, stop.acted_on_at_once(lambda reason: acted.set()):
        assert not acted.wait(0.3)
        run.stop_file.touch()
        assert acted.wait(WAIT_SECONDS)
        assert eventually(lambda: not run.stop_file.exists())
    with requests() as stop, stop.acted_on_at_once(lambda reason: acted.set()):
        acted.clear()
        os.kill(os.getpid(), signal.SIGTERM)
        assert acted.wait(WAIT_SECONDS)
    acted.clear()
    with requests(1.0, ago=3600 - stopping.EXIT_SECONDS + 0.1) as stop:
        stop.record_step(1e9)  # nothing is left to train or to save
        with stop.acted_on_at_once(lambda reason: acted.set()):
            assert acted.wait(WAIT_SECONDS)
    assert "stop requests" not in [thread.name for thread in threading.enumerate()]


def test_what_is_typed_is_left_to_a_debugger(tmp_path: Path) -> None:
    script = TRAIN.replace(
        "    end = time", "    with stop.acted_on_at_once(lambda reason: log(reason)):\n        log(input())\n    end = time"
    )
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=PLAIN, text=True
    )
    assert process.stdout.readline().startswith("started ")
    time.sleep(0.3)
    process.stdin.write("stop\n")
    process.stdin.flush()
    assert process.stdout.readline() == "stop\n"
    process.terminate()
    assert process.communicate(timeout=WAIT_SECONDS)[0] == "reason SIGTERM\n"


LEAVE = """
import atexit, os, sys, threading, time, weakref
from trainer.distributed.signals import leave
class Thing: pass
thing = Thing()
weakref.finalize(thing, print, "finalized")
atexit.register(print, "at exit")
threading.Thread(target=time.sleep, args=(100,)).start()
if "stuck" in sys.argv:
    atexit.register(time.sleep, 100)
if "full" in sys.argv:
    os.set_blocking(1, False)
    try:
        while True: os.write(1, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(1, True)
print("not flushed", end=" ")
threading.Thread(target=leave, args=(7,)).start()
time.sleep(100)
"""


@pytest.mark.parametrize(("how", "output"), [("", "not flushed at exit\nfinalized\n"), ("stuck", ""), ("full", "xxxx")])
def test_leaving_runs_what_is_registered_and_waits_for_nothing(how: str, output: str) -> None:
    env = {**PLAIN, "PYTHONUNBUFFERED": ""}
    process = subprocess.Popen([sys.executable, "-c", LEAVE, how], stdout=subprocess.PIPE, env=env, text=True)
    assert process.wait(timeout=WAIT_SECONDS) == 7
    assert process.stdout.read(100) == output * (25 if how == "full" else 1)


# DataLoader workers


class Numbers(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, index: int) -> int:
        time.sleep(0.001)
        return os.getpid()


def loader() -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(Numbers(), batch_size=1, num_workers=1, worker_init_fn=reset_in_worker)


def workers_outlive_signals() -> None:
    with requests() as stop:
        batches = iter(loader())
        worker = int(next(batches))
        for number in signals.SIGNALS:
            os.kill(worker, number) if number != signal.SIGTERM else subprocess.run(["kill", str(worker)], check=True)
        time.sleep(0.1)
        for _ in range(20):
            assert int(next(batches)) == worker
        assert stop.decide(stop.votes()) is None  # their signals are not ours
        (process,) = batches._workers
        process.terminate()  # DataLoader's own way, at the interpreter's exit
        process.join(timeout=WAIT_SECONDS)
        assert process.exitcode == 0
    # Signal handlers of this process were not touched from the worker.
    assert signal.getsignal(signal.SIGTERM) != signal.SIG_IGN


def test_workers_outlive_signals_to_everyone_and_end_with_their_loader() -> None:
    script = "import sys; sys.path.insert(0, sys.argv[1])\nimport test_stopping\ntest_stopping.workers_outlive_signals()"
    subprocess.run([sys.executable, "-c", script, str(Path(__file__).parent)], check=True, timeout=60)


def test_workers_of_a_killed_trainer_end() -> None:
    script = "import sys; sys.path.insert(0, sys.argv[1])\nfrom test_stopping import *\n"
    # torch's own watchdog, which looks every five seconds whether the trainer lives, never does here.
    script += "torch.utils.data._utils.worker.MP_STATUS_CHECK_INTERVAL = 1e6\n"
    script += "batches = iter(loader())\nprint(int(next(batches)), flush=True)\ntime.sleep(600)"
    command = [sys.executable, "-c", script, str(Path(__file__).parent)]
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    worker = int(trainer.stdout.readline())
    trainer.kill()
    trainer.wait()

    def gone() -> bool:
        try:
            return signals.stat_fields(worker)[0] == "Z"
        except OSError:
            return True

    assert eventually(gone)


# Files and stdin


def test_stop_and_status_files(tmp_path: Path) -> None:
    run, messages = RunDirectory(tmp_path), []
    with StopRequests(None, time.monotonic(), run, lambda: "step 7", messages.append) as stop:
        run.status_file.touch()
        assert stop.decide(stop.votes()) is None
        assert messages == ["step 7"]
        assert not run.status_file.exists()
        run.stop_file.touch()
        assert eventually(lambda: stop.decide(stop.votes()) == "stop_file")
        assert run.stop_file.exists()  # a run killed before its save still knows that it should stop
    assert not run.stop_file.exists()
    with StopRequests(None, time.monotonic(), None, str, messages.append) as other_rank:
        run.stop_file.touch()
        assert other_rank.decide(other_rank.votes()) is None
    assert run.stop_file.exists()


def test_lines_from_a_pipe(tmp_path: Path) -> None:
    process = start(tmp_path, stdin=subprocess.PIPE)
    for typed, answer in (
        ("STA", ""),
        ("TUS \n\n", "step 7\n"),
        ("quit\n", "type `stop` to save and stop, or `status`\n"),
    ):
        process.stdin.write(typed)
        process.stdin.flush()
        if answer:
            assert process.stdout.readline() == answer
    assert process.communicate("stop", timeout=WAIT_SECONDS)[0] == "reason stop_typed\n"  # ended by the end of input


def test_end_of_input_does_not_stop(tmp_path: Path) -> None:
    process = start(tmp_path, stdin=subprocess.PIPE)
    process.stdin.close()
    time.sleep(0.8)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=WAIT_SECONDS) == 0


def test_files_and_closed_stdin_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("stop\n")
    with open(tmp_path / "list") as file:
        processes = [
            start(tmp_path, stdin=file),
            start(tmp_path, "--descriptor-0", stdin=None, preexec_fn=lambda: os.close(0)),
        ]
        time.sleep(0.8)
        assert [process.poll() for process in processes] == [None, None]
        assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == 0
    for process in processes:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=WAIT_SECONDS) == 0


class Terminal:
    """An interactive shell with job control, on a pseudo-terminal."""

    def __init__(self) -> None:
        self.shell, self.descriptor = pty.fork()
        if self.shell == 0:
            os.environ.clear()
            os.environ.update(PLAIN, PS1="$ ", PYTHONPATH=str(Path(stopping.__file__).parents[1]))
            os.execvp("bash", ["bash", "--norc", "--noprofile", "-i"])
        self.unread = b""

    def type(self, line: str) -> None:
        os.write(self.descriptor, line.encode() + b"\n")

    def shows(self, expected: str, seconds: float = WAIT_SECONDS) -> bool:
        end = time.monotonic() + seconds
        while expected.encode() not in self.unread and time.monotonic() < end:
            if select.select([self.descriptor], [], [], 0.1)[0]:
                self.unread += os.read(self.descriptor, 4096)
        seen, self.unread = expected.encode() in self.unread, self.unread.partition(expected.encode())[2]
        return seen

    def close(self) -> None:
        os.kill(self.shell, signal.SIGKILL)
        os.close(self.descriptor)
        os.waitpid(self.shell, 0)


TORCHRUN = """
import os, subprocess, sys
environment = {**os.environ, "TORCHELASTIC_RUN_ID": "none"}
subprocess.run([sys.executable, *sys.argv[1:]], env=environment, start_new_session=True)
"""


@pytest.mark.parametrize("launcher", ["python", "torchrun"])
def test_background_job_is_not_suspended_and_listens_once_in_the_foreground(tmp_path: Path, launcher: str) -> None:
    if launcher == "torchrun" and sys.platform != "linux":
        pytest.skip("the launcher's terminal is read from /proc")
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "torchrun.py").write_text(TORCHRUN)
    command = f"{sys.executable} {tmp_path}/torchrun.py" if launcher == "torchrun" else sys.executable
    terminal = Terminal()
    try:
        terminal.type(f"{command} {tmp_path}/train.py {tmp_path} &")
        assert terminal.shows("started ")
        terminal.type("sleep 1.5")  # while it runs, what is typed waits in the terminal for anyone to read
        time.sleep(0.3)
        terminal.type("stop")
        assert terminal.shows("stop: command not found")  # the shell got it, not the background job
        terminal.type("jobs")
        assert terminal.shows("Running")  # not: Stopped (tty input)
        terminal.type("fg")
        assert terminal.shows("train.py")
        time.sleep(0.3)
        terminal.type("status")
        assert terminal.shows("step 7")
        terminal.type("stop")
        assert terminal.shows("reason stop_typed")
    finally:
        terminal.close()


def test_a_command_of_the_users_asks_to_stop_once_it_exits_with_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_command, "POLL_SECONDS", 0.05)
    notice, asked = tmp_path / "notice", tmp_path / "asked"
    with requests(None, stop_when=f"echo >>{asked}; test -e {notice}") as stop:
        wait_until(lambda: asked.exists() and asked.stat().st_size > 2)
        assert not stop.any_requested()
        notice.touch()
        wait_until(stop.any_requested)
        assert stop.decide(stop.votes()) == "stop_when"


def test_a_command_that_cannot_be_run_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_command, "POLL_SECONDS", 0.01)
    said: list[str] = []
    command = stop_command.StopCommand("no-such-command --at all", said.append)
    wait_until(lambda: bool(said))
    time.sleep(0.1)
    command.close()
    assert len(said) == 1
    assert "'no-such-command --at all' (exit 127)" in said[0]
    assert not command.says_stop
