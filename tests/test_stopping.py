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
from types import SimpleNamespace

import pytest
import torch

from trainer.command_line.sections import Run
from trainer.distributed import signals, stop_command, stop_signals
from trainer.distributed.signals import reset_in_worker
from trainer.distributed.stop_signals import StopSignals
from trainer.distributed.stopping import REQUESTS, StopReason, StopRequests, finished_reason
from trainer.distributed.time_limit import EXIT_SECONDS, TimeLimit
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
from trainer.distributed.time_limit import TimeLimit
die_with_launcher()
if "--descriptor-0" in sys.argv:  # the pipe of somebody else, who got the number of the closed stdin
    reader, writer = os.pipe()
    assert reader == 0 and os.write(writer, b"stop\\n")
log = lambda line: print(line, flush=True)
run = RunDirectory(Path(sys.argv[1]))
with StopRequests(TimeLimit(None, time.monotonic()), run, lambda: "step 7", log) as stop:
    stop.signals.unsaved = True
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


def requests(
    run: RunDirectory | None = None,
    status: Callable[[], str] = str,
    log: Callable[[str], None] = print,
    stop_when: str | None = None,
    limit_hours: float | None = None,
    ago: float = 0.0,
) -> StopRequests:
    return StopRequests(TimeLimit(limit_hours, time.monotonic() - ago), run, status, log, stop_when)


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def eventually(what: Callable[[], bool], seconds: float = WAIT_SECONDS) -> bool:
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.02)
    return what()


# Votes


def test_one_rank_is_enough_and_the_first_reason_wins() -> None:
    assert StopRequests.decide([0.0] * len(REQUESTS)) is None
    for index, reason in enumerate(REQUESTS):
        assert StopRequests.decide([0.0] * index + [1.0] * (len(REQUESTS) - index)) == reason


def test_the_time_limit_is_a_vote_while_there_is_time_to_save() -> None:
    stop = requests(limit_hours=1.0)
    assert stop.decide(stop.votes()) is None
    stop.time_limit.expect_save(3600.0)
    assert stop.decide(stop.votes()) == "time_limit"


def test_votes_are_cheap(tmp_path: Path) -> None:
    stop = requests(RunDirectory(tmp_path), limit_hours=1.0)
    for _ in range(50):
        stop.time_limit.record_step(0.01)
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
        "from trainer.distributed.time_limit import TimeLimit\n"
        "def command_line(*_):\n"
        "    with StopRequests(TimeLimit(None, time.monotonic()), None, str, print) as stop:\n"
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
    script = (
        TRAIN[: TRAIN.index("    stop.signals.unsaved")] + "    import ctypes\n    libc, mutex = ctypes.CDLL(None), bytes(64)\n"
    )
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
    environment: dict[str, str], echo_seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 5000.0
    monkeypatch.setattr(stop_signals, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(os, "environ", environment)
    exit_codes = []
    monkeypatch.setattr(os, "_exit", exit_codes.append)
    caught = StopSignals()
    caught._hear(signal.SIGUSR1)  # neither a first one nor a second
    now += 10
    caught._hear(signal.SIGINT)
    now += 0.9 * echo_seconds
    caught._hear(signal.SIGINT)
    assert exit_codes == []
    now += 0.2 * echo_seconds
    caught._hear(signal.SIGINT)
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
    with requests(run) as stop, stop.acted_on_at_once(lambda reason: acted.set()):
        assert not acted.wait(0.3)
        run.stop_file.touch()
        assert acted.wait(WAIT_SECONDS)
        assert eventually(lambda: not run.stop_file.exists())
    with requests() as stop, stop.acted_on_at_once(lambda reason: acted.set()):
        acted.clear()
        os.kill(os.getpid(), signal.SIGTERM)
        assert acted.wait(WAIT_SECONDS)
    acted.clear()
    with requests(limit_hours=1.0, ago=3600 - EXIT_SECONDS + 0.1) as stop:
        stop.time_limit.record_step(1e9)  # nothing is left to train or to save
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
    with requests(run, lambda: "step 7", messages.append) as stop:
        run.status_file.touch()
        assert stop.decide(stop.votes()) is None
        assert messages == ["step 7"]
        assert not run.status_file.exists()
        run.stop_file.touch()
        assert eventually(lambda: stop.decide(stop.votes()) == "stop_file")
        assert run.stop_file.exists()  # a run killed before its save still knows that it should stop
    assert not run.stop_file.exists()
    with requests(log=messages.append) as other_rank:
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
            os.environ.update(PLAIN, PS1="$ ", PYTHONPATH=str(Path(stop_signals.__file__).parents[2]))
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
    with requests(stop_when=f"echo >>{asked}; test -e {notice}") as stop:
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
