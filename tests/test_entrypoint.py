"""tools/launch/entrypoint.sh as process 1 of a container: what SIGTERM does there, and what its exit status says."""

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

TOY = ROOT / "tests" / "toy_recipe.py"
ENTRYPOINT = str(ROOT / "tools" / "launch" / "entrypoint.sh")
NAMESPACE = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]


def test_sigterm_to_process_1_saves_also_under_a_launcher_of_one_process(tmp_path: Path) -> None:
    if subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode:
        pytest.skip("PID namespaces are not permitted here")
    directory, pace = tmp_path / "run", tmp_path / "pace"
    pace.write_text("0.2")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu.yaml", str(TOY)]
    argv = [*NAMESPACE, ENTRYPOINT, str(directory), *launch, "--max_steps", "1000000"]
    container = Started(argv, tmp_path / "log", environment(TOY_PACE=str(pace)))
    try:
        end = time.monotonic() + 120
        while not rows(directory):
            assert time.monotonic() < end, container.log.read_text()
            time.sleep(0.05)
        (first,) = Path(f"/proc/{container.pid}/task/{container.pid}/children").read_text().split()
        os.kill(int(first), signal.SIGTERM)
        assert container.wait(timeout=60) == 75
    finally:
        container.kill_all()
    status = json.loads((directory / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("stopped", "stop_file")
    assert (Path(status["checkpoint"]) / "manifest.json").is_file()
    assert not (directory / "stop").exists()


@pytest.mark.parametrize(
    ("state", "reason", "code", "expected"),
    [("finished", "last step", 0, 0), ("stopped", "stop_typed", 0, 0), ("stopped", "stop_when", 0, 75), ("failed", "x", 4, 4)],
)
def test_the_exit_status_says_whether_to_start_it_again(
    state: str, reason: str, code: int, expected: int, tmp_path: Path
) -> None:
    (tmp_path / "status.json").write_text(json.dumps({"state": state, "reason": reason}, indent=2))
    assert subprocess.run([ENTRYPOINT, str(tmp_path), "bash", "-c", f"exit {code}", "train"], timeout=60).returncode == expected
