"""tools/benchmark.py gpu: its rehearsal on a CPU, from which its first minute on a GPU should differ in nothing but size."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import gpu
from benchmarks.gpu_pieces.contenders import Contender, Steps, StepsHere, interleave
from benchmarks.gpu_pieces.results import TITLES, Result, ResultFile, table
from launching import ROOT, environment

CPU = torch.device("cpu")


def benchmark(*arguments: str, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "benchmark.py"), "gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout)


# ------------------------------------------------------------------------------------------------------- the whole of it


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(the JSON file, what was printed)."""
    path = tmp_path_factory.mktemp("gpu") / "results.json"
    done = benchmark("--rehearse", "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr + path.with_suffix(".log").read_text()
    return path, done.stdout


def figures(path: Path) -> dict[str, dict[str, float]]:
    """{piece: {name: value}}."""
    results = json.loads(path.read_text())
    return {piece: {f["name"]: f["value"] for f in result["figures"]} for piece, result in results.items()}


def test_every_piece_runs_and_is_in_the_json_and_in_the_table(rehearsal: tuple[Path, str]) -> None:
    path, printed = rehearsal
    results = json.loads(path.read_text())
    assert list(results) == list(TITLES)
    assert {piece: result["error"] for piece, result in results.items()} == dict.fromkeys(TITLES, "")
    assert not {note for result in results.values() for note in result["notes"]}, "every package is there"
    lines = printed.splitlines()
    assert json.loads(next(line for line in lines if line.startswith("{"))) == results
    assert all(f"({piece}) {title} [CPU" in printed for piece, title in TITLES.items())


def test_peers_are_measured_beside_the_loop(rehearsal: tuple[Path, str]) -> None:
    found = figures(rehearsal[0])
    for peer in ("bare loop", "nanoGPT's arrangement", "HF Trainer"):
        assert found["a"][f"ours / {peer}, speed"] > 0
    assert found["b"]["ours, operations"] >= found["b"]["bare, operations"] > 0
    assert 0 <= found["f"]["ours, time spent waiting for data"] <= 1
    assert found["g"]["checkpoint"] > 0


def test_a_resumed_run_has_the_same_bits_and_every_launch_the_same_curve(rehearsal: tuple[Path, str]) -> None:
    found = figures(rehearsal[0])
    assert set(found["i"].values()) == {1.0}
    assert len(found["i"]) == 4
    apart = {name: value for name, value in found["h"].items() if "apart from one process, bf16" in name}
    assert {name.partition(",")[0] for name in apart} == {"DDP", "FSDP2", "ZeRO-2"}
    assert max(apart.values()) < 1e-3
    losses = json.loads(rehearsal[0].read_text())["h"]["details"]["losses"]
    assert {len(curve) for curve in losses.values()} == {3}


def test_a_second_call_measures_nothing_again(rehearsal: tuple[Path, str]) -> None:
    before = rehearsal[0].read_text()
    done = benchmark("--rehearse", "--json", str(rehearsal[0]))
    assert done.returncode == 0, done.stdout + done.stderr
    assert rehearsal[0].read_text() == before
    assert not [line for line in done.stdout.splitlines() if line.endswith(" ...")]


# ------------------------------------------------------------------------------------------------------------- its parts


def test_a_piece_that_fails_hangs_or_dies_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = ResultFile(tmp_path / "results.json")
    answers: dict[str, Callable[[], Result]] = {"a": Result, "b": lambda: 1 / 0, "c": lambda: __import__("not_there")}  # type: ignore[dict-item, return-value]
    monkeypatch.setattr(gpu, "run_piece", lambda piece, *_: answers[piece]())
    gpu.run_pieces(["a", "b", "c"], results, rehearse=True, seconds=60.0)
    found = results.read()
    assert found["a"]["error"] == ""
    assert "ZeroDivisionError" in found["b"]["error"]
    assert found["c"]["error"] == ""
    assert found["c"]["notes"] == ["needs not_there, which is not installed"]
    # A script that does not come back in time, in place of the benchmark's.
    script = tmp_path / "tools" / "benchmark.py"
    script.parent.mkdir()
    script.write_text("import time\nprint('begun', flush=True)\ntime.sleep(600)\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    gpu.run_process(["d"], results, True, 2.0, environment())
    script.write_text("import os\nos.abort()\n")
    gpu.run_process(["e"], results, True, 60.0, environment())
    found = results.read()
    assert found["d"]["error"].endswith("took longer than 2 s")
    assert "begun" in found["d"]["error"]
    assert found["e"]["error"].endswith("exit status -6")
    assert "    FAILED: no result: exit status -6" in list(table(found))


def test_ended_in_the_middle_it_ends_what_it_has_started(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "benchmark.py"), "gpu", "--rehearse", "--json", str(tmp_path / "r.json")]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not (piece := children.read_text().strip()) or "libtorch" not in Path("/proc", piece, "maps").read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on with what is missing" in error
    assert not Path("/proc", piece).exists()


def test_contenders_take_turns_and_one_that_fails_is_left_out() -> None:
    taken: list[str] = []
    threads: dict[str, set[int]] = {"ours": set(), "peer": set(), "peer here": set()}

    def note(name: str) -> None:
        taken.append(name)
        threads[name].add(threading.get_ident())

    class Loop(Contender):
        def __init__(self) -> None:
            super().__init__(self.train)

        def train(self) -> None:
            while True:
                note("ours")
                self.step_done()

    def broken() -> None:
        if taken.count("peer") > 2:
            raise RuntimeError("out of memory")

    def missing() -> Contender:
        raise ModuleNotFoundError("No module named 'lost'", name="lost")

    makers: dict[str, Callable[[], Contender]] = {
        "ours": Loop,
        "peer": lambda: Steps(lambda: note("peer")),
        "peer here": lambda: StepsHere(lambda: note("peer here")),
        "broken": lambda: Steps(broken),
        "missing": missing,
    }
    measured = interleave(makers, CPU, rounds=2, steps=2, warmup=1, required="ours")
    names = ["ours", "peer", "peer here"]
    turns = [name for name in [*names, *reversed(names)] for _ in range(2)]
    assert taken == [*names, *turns]  # to warm up, then in turn, then the other way round
    assert threads["peer here"] == {threading.get_ident()}
    assert [len(ids) for ids in threads.values()] == [1, 1, 1]
    assert len(set.union(*threads.values())) == 3
    assert {name: len(values) for name, values in measured.seconds.items()} == dict.fromkeys(names, 2)
    assert measured.notes() == ["missing: needs lost, which is not installed", "broken: RuntimeError: out of memory"]


def test_what_a_loop_raises_reaches_who_waits_for_it() -> None:
    def loop() -> Any:
        raise ValueError("no such batch")

    with pytest.raises(ValueError, match="no such batch"):
        interleave({"ours": lambda: Contender(loop)}, CPU, rounds=1, steps=1, warmup=1, required="ours")


def test_what_is_missing_or_has_failed_is_measured_until_the_time_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(gpu, "_sees_a_gpu", lambda: True)
    monkeypatch.setattr(gpu, "run_process", lambda pieces, *_: started.append(pieces))
    results = ResultFile(tmp_path / "results.json")
    for piece in "abcdefg":
        result = Result(error="lost" if piece == "b" else "")
        if piece != "d":  # it lacked a package
            result.add("steps/s", 1.0, "")
        results.write(piece, result)
    assert gpu.run_all(None, results, False, 8.0) == 0
    assert started == [["b"], ["d"], ["h"], ["i"], ["j"]]
    assert gpu.run_all(["c", "a"], results, False, 8.0) == 0
    assert started[5:] == [["c"], ["a"]]
    assert list(results.read()) == ["e", "f", "g"]
    capsys.readouterr()
    assert gpu.run_all(None, results, False, 0.5) == 0
    assert len(started) == 7
    assert "no time left; the same command goes on" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_can_be_done() -> None:
    done = benchmark()
    assert (done.returncode, done.stdout) == (2, "")
    assert "--rehearse runs every piece small on a CPU" in done.stderr


def test_a_result_is_replaced_dropped_and_found_again(tmp_path: Path) -> None:
    results = ResultFile(tmp_path / "results.json")
    result = Result()
    result.add("batch", 48, "samples")
    results.write("c", Result())
    results.write("a", result)
    assert list(results.read()) == ["a", "c"]
    assert results.figure("a", "batch") == 48
    assert results.figure("b", "batch") is None
    results.drop("a")
    assert list(results.read()) == ["c"]
