"""The loop search: the known cycles, every number once, limits, going on after a kill, bad input."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from launching import ROOT, environment
from plain_collatz import comes_after_smaller, falls_within, plain_cycle

sys.path.insert(0, str(ROOT / "tools"))

import loop_search
from loops import beside_training, compiled, exact, sieve
from loops import search as searching
from loops.coverage import Coverage
from loops.exact import Map
from loops.record import Record, SearchConfig

COLLATZ = Map(3, 1)
BITS = 10  # of the sieve


def config(start: int, count: int, rule: Map = COLLATZ, max_steps: int = 100_000, max_bits: int = 256) -> SearchConfig:
    return SearchConfig(rule, start, count, max_steps, max_bits)


def run_search(search_config: SearchConfig, workers: int = 1, sieve_bits: int = BITS) -> tuple[Record, list[str]]:
    record, finds = Record(search_config), []
    assert searching.search(record, sieve_bits, workers, lambda: None, finds.append) is None
    return record, finds


# ------------------------------------------------------------------------------------------------------ the known cycles

KNOWN = [
    (Map(3, 1), -1000, 1000, {-1: 2, -5: 5, -17: 18}),
    (Map(3, -1), 1, 1000, {1: 2, 5: 5, 17: 18}),
    (Map(3, 1), 0, 1000, {0: 1, 1: 3}),
    (Map(5, 1), 1, 300, {1: 7, 13: 10, 17: 10}),
    (Map(181, 1), 1, 100, {27: 17, 35: 17}),
    (Map(3, 5), 1, 400, {1: 4, 5: 3, 19: 8, 23: 8, 187: 44, 347: 44}),
]


@pytest.mark.parametrize(("rule", "start", "count", "lengths"), KNOWN, ids=lambda v: str(v) if isinstance(v, Map) else None)
def test_known_cycles_are_found(rule: Map, start: int, count: int, lengths: dict[int, int]) -> None:
    record, finds = run_search(config(start, count, rule))
    assert {cycle.smallest: cycle.length for cycle in record.tally.reached} == lengths
    ends = {n: plain_cycle(rule.multiplier, rule.addend, n) for n in range(start, start + count)}
    reached = Counter({cycle.smallest: n for cycle, n in record.tally.reached.items()})
    assert reached | Counter({None: record.tally.unresolved.total()}) == Counter(ends.values())
    assert record.tally.unresolved_numbers == [n for n, end in ends.items() if end is None]
    assert len(finds) == len(lengths.keys() - {0} - ({rule.addend} if rule.multiplier == 3 and rule.addend > 0 else set()))


# ------------------------------------------------------------------------------------------------------ every number once


def brute_counts(start: int, count: int, skipping: bool) -> tuple[int, int, int]:
    """by_sieve, by_predecessor, followed."""
    kinds: Counter[str] = Counter()
    for n in range(start, start + count):
        if not 1 << BITS <= n < 2**112:
            kinds["followed"] += 1
        elif falls_within(n, BITS):
            kinds["sieve"] += 1
        else:
            kinds["predecessor" if skipping and comes_after_smaller(n) else "followed"] += 1
    return kinds["sieve"], kinds["predecessor"], kinds["followed"]


RANGES = [
    (-500, 20_000),
    (2**71 - 777, 12_345),
    (2**71 + 1, 9_999),
    (2**112 - 3000, 3_100),
    (5 << BITS, 1 << BITS),
    (1 << BITS, 1),
]


@pytest.mark.parametrize(("start", "count"), RANGES)
@pytest.mark.parametrize("workers", [1, 2])
def test_every_number_is_covered_once(start: int, count: int, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    lock = threading.Lock()
    cover = Coverage.cover

    def recorded(self: Coverage, first: int, stop: int) -> object:
        with lock:
            seen.extend(range(first, stop))
        return cover(self, first, stop)

    monkeypatch.setattr(Coverage, "cover", recorded)
    monkeypatch.setattr(searching, "STRETCH_SECONDS", 1e-3)  # many stretches
    record, _ = run_search(config(start, count), workers)
    assert sorted(seen) == list(range(start, start + count))
    tally = record.tally
    assert (tally.by_sieve, tally.by_predecessor, tally.followed) == brute_counts(start, count, start <= 2**71)
    assert tally.covered == count
    assert not tally.unresolved


def test_counts_that_disagree_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    follow = compiled.follow_block
    monkeypatch.setattr(compiled, "follow_block", lambda *a: (follow(*a)[0] - 1, *follow(*a)[1:]))
    with pytest.raises(RuntimeError, match="were seen"):
        run_search(config(2**71, 1 << BITS))


# --------------------------------------------------------------------------------------------------- overflow and limits


def test_overflow_is_redone_in_python_integers() -> None:
    start = 2**112 - (1 << BITS)
    record, _ = run_search(config(start, 1 << BITS))
    assert record.tally.redone_exactly > 0
    assert not record.tally.unresolved
    narrow, finds = run_search(config(start, 1 << BITS, max_bits=128))  # 2^112 - 1 rises to 178 bits
    assert narrow.tally.unresolved_numbers[-1] == 2**112 - 1
    assert narrow.tally.unresolved == {"too many bits": len(narrow.tally.unresolved_numbers)}
    assert f"if the {len(narrow.tally.unresolved_numbers)} unresolved" not in narrow.conclusion()  # above 2^71 no claim about 1
    assert f"except for {len(narrow.tally.unresolved_numbers)} unresolved" in narrow.conclusion()
    assert len(finds) == 1
    assert "unresolved" in finds[0]


def test_no_size_at_which_a_step_would_wrap_is_taken_for_less() -> None:
    """Numbers that rise furthest for their size, at every size: a check against overflow that is one bit late shows."""
    for bits in range(60, 112):
        n = -(2**bits + 1)
        record, _ = run_search(config(n, 1, max_bits=1000))
        assert {cycle.smallest for cycle in record.tally.reached} == {plain_cycle(3, 1, n, 1000)}, bits
        for lower in (5, 7, 9):
            n = 2**bits - 1 - 2 ** (bits - lower)
            record, _ = run_search(config(n, 1, max_bits=128))
            stuck = exact.follow(COLLATZ, n, 100_000, 128, below=n)[0] == "too many bits"
            assert bool(record.tally.unresolved) == stuck, (bits, lower)


def test_the_limit_of_steps_is_reported() -> None:
    negative, _ = run_search(config(-(2**111), 50, max_steps=1000))
    slow = [n for n in range(-(2**111), -(2**111) + 50) if exact.follow(COLLATZ, n, 1000, 256)[0] == "too many steps"]
    assert 0 < len(slow) < 50
    assert negative.tally.unresolved_numbers == slow
    huge, _ = run_search(config(2**300 - 2, 2, max_steps=1000, max_bits=1000))
    assert huge.tally.unresolved == {"too many steps": 1}
    assert huge.tally.unresolved_numbers == [2**300 - 1]


def test_the_conclusion_says_what_it_rests_on() -> None:
    assert "reaches 1, as all below the start do (verified below 2^71" in run_search(config(2**71, 5000))[0].conclusion()
    assert "rests on the numbers from 2^71" in run_search(config(2**71 + 1, 5000))[0].conclusion()
    assert run_search(config(1, 5000))[0].conclusion() == "every number of the range reaches 1"
    assert "or is positive and reaches 1" in run_search(config(-9, 5000))[0].conclusion()
    assert "followed into a cycle, except for" in run_search(config(1, 50, Map(5, 1)))[0].conclusion()
    other = exact.Cycle(2**80 + 1, 999, 400, False)
    record = Record(config(2**71, 10))
    record.tally.covered, record.tally.reached[other] = 10, 1
    assert "another cycle" in record.conclusion()
    assert "until" not in record.conclusion()


# ----------------------------------------------------------------------------------------------------------- the command

TOOL = str(ROOT / "tools" / "loop_search.py")


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def covered(state: Path) -> int:
    return json.loads(state.read_text())["covered"] if state.exists() else 0


def start_tool(*arguments: str, **streams: object) -> subprocess.Popen[bytes]:
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **streams}
    command = [sys.executable, TOOL, *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, **streams)  # type: ignore[call-overload]


def test_interrupted_and_killed_it_goes_on_and_counts_nothing_twice(tmp_path: Path) -> None:
    state, report = tmp_path / "state.json", tmp_path / "report.json"
    bits, blocks = 16, 1 << 18  # seconds of work
    arguments = [
        "--workers",
        "2",
        "--count",
        str(blocks << bits),
        "--sieve_bits",
        str(bits),
        "--state",
        str(state),
        "--report",
        str(report),
    ]

    terminal, inside = pty.openpty()  # the bar, where stderr is a terminal
    termios.tcsetwinsize(inside, (24, 100))
    process = start_tool(*arguments, stderr=inside)
    os.close(inside)
    wait_for(lambda: covered(state) > 0)
    assert b"numbers/s" in os.read(terminal, 1 << 16)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert b"interrupted: saved" in output
    os.close(terminal)
    first = covered(state)
    assert json.loads(report.read_text())["covered"] == first < blocks << bits

    process = start_tool(*arguments)
    wait_for(lambda: covered(state) > first)
    process.kill()
    output, _ = process.communicate(timeout=30)
    assert f"{first:,} are covered".encode() in output
    assert b"\r" not in output
    assert covered(state) < blocks << bits

    process = start_tool(*arguments)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    result = json.loads(state.read_text())
    residues = sieve.build(bits).residues.astype(np.int64)
    block_classes = Counter(((2**71 + (b << bits)) % 9) for b in range(blocks))
    skipped = sum(
        n * sum(comes_after_smaller((start + m) % 9) for m in (residues % 9).tolist()) for start, n in block_classes.items()
    )
    assert result["complete"]
    assert result["covered"] == blocks << bits
    assert result["by_predecessor"] == skipped
    assert result["followed"] == len(residues) * blocks - skipped
    assert result == json.loads(report.read_text())
    assert "every number of the range reaches 1" in output.decode()


def test_beside_a_training_it_gives_way_and_ends_with_it(tmp_path: Path) -> None:
    status = tmp_path / "run" / "status.json"
    status.parent.mkdir()
    status.write_text(json.dumps({"state": "running", "pid": os.getpid(), "host": os.uname().nodename}))
    state = tmp_path / "state.json"
    process = start_tool("--from-training", str(status.parent), "--state", str(state))
    wait_for(lambda: covered(state) > 0)
    assert os.getpriority(os.PRIO_PROCESS, process.pid) == 19
    status.write_text(json.dumps({"state": "finished"}))
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "is finished: saved" in output.decode()
    assert "workers: 1" in output.decode()


def test_a_find_is_alerted_once_and_the_secret_is_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bodies: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/hooks/SECRET"
        for first in (-6, -6, -30):  # the second launch finds all done
            state = tmp_path / f"{first}.json"
            with pytest.raises(SystemExit) as caught:
                loop_search.main(["--start", str(first), "--count", "5", "--state", str(state), "--alert_webhook", url])
            assert caught.value.code == 0
        server.shutdown()
    texts = [body["text"] for body in bodies]
    assert sum("cycle of -5, length 5" in text for text in texts) == 2  # once for each search
    assert sum("cycle of -1, length 2" in text for text in texts) == len(texts) - 2 > 0
    assert "SECRET" not in capsys.readouterr().out + "".join(p.read_text() for p in tmp_path.iterdir())


def test_a_training_is_waited_for_and_its_death_is_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside_training, "POLL_SECONDS", 0.0)
    assert beside_training.training_ended(tmp_path, 60.0)() is None
    ended = beside_training.training_ended(tmp_path, 0.0)
    assert "not there" in str(ended())
    gone = subprocess.Popen(["true"])
    gone.wait()
    status = {"state": "running", "pid": os.getpid(), "host": os.uname().nodename}
    for changes, reason in [({}, None), ({"host": "another", "pid": gone.pid}, None), ({"pid": gone.pid}, "killed")]:
        (tmp_path / "status.json").write_text(json.dumps(status | changes))
        assert ended() is None if reason is None else reason in str(ended())


# ------------------------------------------------------------------------------------------------------------- bad input


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        loop_search.main(list(arguments))
    assert caught.value.code in (2, 5)
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--multiplier", "0", "--addend", "2"], "0n+2"),
        (["--addend", "2"], "odd both"),
        (["--multiplier", str(2**31 + 1)], "too large"),
        (["--addend", str(2**62 + 1)], "too large"),
        (["--count", "0"], "count 0"),
        (["--count=-5"], "count -5"),
        (["--workers", "0"], "workers 0"),
        (["--sieve_bits", "40"], "sieve_bits 40"),
        (["--max_steps", "10"], "max_steps 10"),
        (["--max_bits", "64"], "max_bits 64"),
        (["--start", "2^300"], "give a higher --max_bits"),
        (["--start", "2^^7"], "invalid integer value: '2^^7'"),
        (["--start", "9^99999"], "invalid integer value"),
        (["--start", "nan"], "invalid integer value"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(capsys, "--state", str(tmp_path / "state.json"), *arguments).splitlines()[-1]
    assert not list(tmp_path.glob("state.json"))


@pytest.mark.parametrize(
    "arguments", [["--alert_webhok", "{url}"], ["--alert-webhook", "{url}", "{url}"], ["--start", "{url}"]]
)
def test_an_error_does_not_repeat_a_webhook(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, *(word.format(url="https://hooks.example.org/S3CRET") for word in arguments))
    assert "S3CRET" not in error
    assert "example.org" not in error


def test_a_report_that_cannot_be_written_is_refused_before_the_search(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--state", str(tmp_path / "s.json"), "--report", "/proc/x/y.json", "--count", "2^60"]
    assert "cannot write /proc/x/y.json" in refused(capsys, *arguments)


def test_integers_are_read_as_people_write_them() -> None:
    for text, value in [("2^71", 2**71), ("-5", -5), ("-2^10", -1024), ("2**71-1", 2**71 - 1), ("1_000+1", 1001)]:
        assert loop_search.integer(text) == value


def test_a_state_of_another_search_damaged_or_in_use_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = tmp_path / "state.json"
    arguments = ["--start", "5", "--state", str(state)]
    with pytest.raises(SystemExit) as caught:
        loop_search.main([*arguments, "--count", "300"])
    assert caught.value.code == 0
    assert "count 300, not 301" in refused(capsys, *arguments, "--count", "301")
    good = json.loads(state.read_text())
    too_many = {"covered": 301, "followed": 301, "next": "306"}
    for damage in (too_many, {"covered": 299}, {"followed": 7}, {"cycles": [{}]}, {"seconds": None}, {"next": "x"}):
        state.write_text(json.dumps(good | damage))
        assert "is damaged" in refused(capsys, *arguments, "--count", "300")
    state.write_text(json.dumps(good)[:-9])
    assert "cannot read the state" in refused(capsys, *arguments, "--count", "300")
    state.write_text(json.dumps(good))
    with open(tmp_path / ".state.json.lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another search is working" in refused(capsys, *arguments, "--count", "300")
    (tmp_path / "a file").write_text("")
    assert "cannot write" in refused(capsys, "--state", str(tmp_path / "a file" / "state.json"))
