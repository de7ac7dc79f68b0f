"""Console output, in a pipe and on a terminal, and that no failure of it ends a run."""

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import trainer.reporting.console
from trainer.reporting.console import Console, format_duration

TWO_LINES_AND_A_BAR = """
import time
from pathlib import Path
from trainer.reporting.console import Console
console = Console(Path("train.log"), is_main=True)
for step in (100, 200):
    console.progress(step, 2000, loss=3.25, units_per_sec=52_100, unit="tokens", eta_seconds=3723)
    time.sleep(0.15)
    console.log(f"Iter {step}")
console.close()
"""


def run_script(code: str, folder: Path, **streams: object) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, text=True, timeout=60, check=False, **streams
    )


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Our end and the program's end of a pseudo-terminal of 100 columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    yield ours, theirs
    os.close(ours)
    os.close(theirs)


def test_a_terminal_shows_step_loss_rate_and_eta_and_stdout_only_the_lines(tmp_path: Path, terminal: tuple[int, int]) -> None:
    ours, theirs = terminal
    done = run_script(TWO_LINES_AND_A_BAR, tmp_path, stdout=subprocess.PIPE, stderr=theirs)
    shown = os.read(ours, 65536).decode()
    assert done.returncode == 0
    assert done.stdout == "Iter 100\nIter 200\n"
    for part in ("100/2000", "200/2000", "10%", "loss 3.2500", "52.1k tokens/s", "ETA 1h 02m"):
        assert part in shown
    assert (tmp_path / "train.log").read_text() == "Iter 100\nIter 200\n"


def test_lines_stand_above_the_bar_when_both_share_a_terminal(tmp_path: Path, terminal: tuple[int, int]) -> None:
    ours, theirs = terminal
    assert run_script(TWO_LINES_AND_A_BAR, tmp_path, stdout=theirs, stderr=theirs).returncode == 0
    shown = os.read(ours, 65536).decode()
    # What a terminal keeps of each line: what follows the last return to its beginning.
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1].strip() for line in re.sub("\x1b\\[A", "", shown).split("\n")]
    assert lines[:2] == ["Iter 100", "Iter 200"]
    assert shown.rfind("200/2000") > shown.rfind("Iter 200"), "the bar is drawn again below the line"


def test_no_bar_in_a_pipe(tmp_path: Path) -> None:
    done = run_script(TWO_LINES_AND_A_BAR, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("stdout", ["broken pipe", "full disk", "closed"])
def test_a_stdout_that_fails_ends_nothing(tmp_path: Path, stdout: str) -> None:
    code = TWO_LINES_AND_A_BAR
    if stdout == "broken pipe":
        reader, stream = os.pipe()
        os.close(reader)
    else:
        stream = os.open("/dev/full", os.O_WRONLY)
    if stdout == "closed":
        code = "import sys; sys.stdout.close()\n" + code
    else:
        code += "print('a line of some library, flushed at exit')"
    done = run_script(code, tmp_path, stdout=stream, stderr=subprocess.PIPE)
    os.close(stream)
    assert (done.returncode, done.stderr) == (0, ""), "120 would mean: the flush at exit failed"
    assert (tmp_path / "train.log").read_text() == "Iter 100\nIter 200\n"


FULL_PIPE = """
import os, signal, sys, time
from pathlib import Path
from trainer.distributed.stopping import StopRequests
from trainer.distributed.time_limit import TimeLimit
from trainer.reporting.console import Console
console = Console(Path("train.log"), is_main=True)
with StopRequests(TimeLimit(None, time.monotonic()), None, str, print) as stop:
    for line in range(3000):
        console.log(f"Iter {line} " + 50 * "²")
    Path("written").touch()
    while not Path("read").exists():
        time.sleep(0.01)
    console.log("the reader is back")
    while not Path("asleep").exists():
        print("a library, which knows no better", flush=True)
    os.set_blocking(1, True)
    for line in range(3000):
        print("a library, which knows no better", flush=True)
        if stop.decide(stop.votes()):
            break
console.log("leaving")
console.error("of no weight")
"""


def test_a_pipe_that_nobody_reads_holds_up_neither_the_run_nor_a_signal(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", FULL_PIPE], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )

    end = time.monotonic() + 60
    while not (tmp_path / "written").exists():  # all of 3,000 lines, in spite of the pipe
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    shown = os.read(process.stdout.fileno(), 1 << 20).decode(errors="replace")
    assert shown.startswith("Iter 0 ")
    (tmp_path / "read").touch()
    while "the reader is back" not in shown:
        shown += os.read(process.stdout.fileno(), 1 << 20).decode(errors="replace")
    unread = int(re.search(r"\[(\d+) lines that nobody read are in train.log\]", shown)[1])
    assert shown.count("Iter ") + unread in (3000, 3001)  # 3001: the first half of a line
    (tmp_path / "asleep").touch()
    time.sleep(1.0)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    log = (tmp_path / "train.log").read_text()
    assert log.count("Iter ") == 3000
    assert log.endswith("leaving\nerror: of no weight\n")


def test_a_log_that_cannot_be_written_is_reported_once(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(Path("/dev/full"), is_main=True)
    console.log("one")
    console.log("two")
    output = capsys.readouterr().out
    assert output.count("/dev/full cannot be written (No space left on device)") == 1
    assert "one\n" in output
    assert "two\n" in output


def test_lines_before_the_log_is_open_are_written_first(tmp_path: Path) -> None:
    console = Console(None, is_main=True)
    console.log("early")
    console.open_log(tmp_path / "train.log")
    console.log("late")
    Console(tmp_path / "train.log", is_main=True).log("resumed")
    assert (tmp_path / "train.log").read_text() == "early\nlate\nresumed\n"


def test_a_traceback_goes_to_the_log_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise ValueError("boom")
    except ValueError as error:
        Console(tmp_path / "train.log", is_main=True).log_traceback(error)
    log = (tmp_path / "train.log").read_text()
    assert log.startswith("Traceback")
    assert log.endswith("ValueError: boom\n")
    assert "test_console.py" in log
    assert capsys.readouterr() == ("", "")


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(tmp_path / "train.log", is_main=False)
    console.log("hello")
    console.log_traceback(ValueError("boom"))
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "train.log").exists()


def test_a_character_the_terminal_lacks_is_replaced(tmp_path: Path) -> None:
    code = "import sys; sys.stdout.reconfigure(encoding='ascii')\n" + TWO_LINES_AND_A_BAR.replace("Iter", "10²")
    assert run_script(code, tmp_path, stdout=subprocess.PIPE).stdout == "10? 100\n10? 200\n"
    assert (tmp_path / "train.log").read_text(encoding="utf-8") == "10² 100\n10² 200\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *[(0.4, "0s"), (59.4, "59s"), (59.6, "1m 00s"), (3599.9, "1h 00m"), (12_000, "3h 20m"), (187_200, "2d 04h")],
        *[(float("nan"), "?"), (float("inf"), "?"), (-1, "?")],
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_secrets_in_urls_are_neither_shown_nor_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console, url = Console(tmp_path / "train.log", is_main=True), "http://me:hunter2@proxy:3128"
    console.log(f"trying {url}")
    console.error(f"no answer from {url}")
    try:
        raise OSError(f"{url} failed")
    except OSError as error:
        console.log_traceback(error)
    shown = capsys.readouterr()
    assert "hunter2" not in shown.out + shown.err + (tmp_path / "train.log").read_text()
    assert "trying ***" in shown.out
    assert "OSError: *** failed" in (tmp_path / "train.log").read_text()


def test_lines_of_several_threads_are_all_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow_disk(*arguments: object, **options: object) -> object:
        file = open(*arguments, **options)  # type: ignore[call-overload]  # noqa: SIM115 - closed by whoever opened it
        write = file.write
        file.write = lambda text: (write(text), time.sleep(0.001))
        return file

    monkeypatch.setattr(trainer.reporting.console, "open", slow_disk, raising=False)
    console = Console(tmp_path / "train.log", is_main=True)
    threads = [threading.Thread(target=lambda: [console.log("x") for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "train.log").read_text() == "x\n" * 80
