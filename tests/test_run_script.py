"""run.sh: which launch it makes of what the machine has, and that a signal to it reaches the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fault_injector import rows
from launching import ROOT, Started, environment

SCRIPT = str(ROOT / "run.sh")
COLLATZ, DDP = f"{ROOT}/recipes/collatz.py", f"{ROOT}/accelerate_configs/ddp.yaml"


@pytest.mark.parametrize(
    ("gpus", "arguments", "expected"),
    [
        (0, [], ["python", COLLATZ]),
        (1, ["--d_model", "64"], ["python", COLLATZ, "--d_model", "64"]),
        (1, ["recipes/x.py", "predict", "a b"], ["python", "recipes/x.py", "predict", "a b"]),
        (4, [], ["accelerate", "launch", "--config_file", DDP, "--num_processes", "4", COLLATZ]),
        (2, ["x.py", "--lr", "1"], ["accelerate", "launch", "--config_file", DDP, "--num_processes", "2", "x.py", "--lr", "1"]),
    ],
)
def test_it_starts_a_process_for_each_gpu(gpus: int, arguments: list[str], expected: list[str], tmp_path: Path) -> None:
    for name in ("python", "accelerate"):  # which say how they are called; the first is asked for the GPUs as well
        lines = ["#!/bin/sh", f'[ "$1" = -c ] && echo {gpus} && exit', f'printf "%s\\n" {name} "$@"']
        (tmp_path / name).write_text("\n".join(lines))
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run([SCRIPT, *arguments], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.splitlines()) == (0, expected), done.stderr


def test_sigterm_stops_the_run_saved(tmp_path: Path) -> None:
    directory, pace = tmp_path / "run", tmp_path / "pace"
    pace.write_text("0.2")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    argv = [SCRIPT, str(ROOT / "tests" / "toy_recipe.py"), "--output_dir", str(directory), "--max_steps", "1000000"]
    run = Started(argv, tmp_path / "log", environment(TOY_PACE=str(pace), PATH=path, CUDA_VISIBLE_DEVICES=""))
    try:
        end = time.monotonic() + 120
        while not rows(directory):
            assert time.monotonic() < end, run.log.read_text()
            time.sleep(0.05)
        os.kill(run.pid, signal.SIGTERM)
        assert run.wait(timeout=60) == 0
    finally:
        run.kill_all()
    status = json.loads((directory / "status.json").read_text())
    assert status["state"] == "stopped"
    assert (Path(status["checkpoint"]) / "manifest.json").is_file()
