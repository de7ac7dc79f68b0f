"""Real launches for the tests: the commands a user types, on CPU with gloo, with time-outs, killed by process group."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "gpt2_wikitext.py"
TIMEOUT_SECONDS = 240.0


def free_port() -> int:
    """A TCP port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(kind: str, script: Path, *arguments: str) -> list[str]:
    """`python` for "one", else `accelerate launch` with accelerate_configs/{kind}.yaml on two processes."""
    if kind == "one":
        return [sys.executable, str(script), *arguments]
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    options = ["--config_file", f"accelerate_configs/{kind}.yaml", "--num_processes", "2"]
    return [*launcher, *options, "--main_process_port", str(free_port()), str(script), *arguments]


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without what a launcher around pytest may have set.

    One thread each: tiny steps spend their time waiting for a second thread that another process keeps from running.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "SLURM_", "PET_", "WANDB_"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        kept.pop(name, None)
    return {**kept, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", **extra}


def start(words: Sequence[str], log: Path, env: Mapping[str, str] | None = None, **options: object) -> subprocess.Popen[bytes]:
    """Start a command in a process group of its own, output to `log`."""
    options.setdefault("stdin", subprocess.DEVNULL)
    with log.open("ab") as out:
        return subprocess.Popen(
            list(words), cwd=ROOT, env=dict(env or environment()), stdout=out, stderr=out, start_new_session=True, **options
        )  # type: ignore[call-overload]


def descendants(pid: int) -> list[int]:
    """Processes below `pid`, whatever group or session they are in (launchers give each rank its own)."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if entry.name.isdigit():
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, waiting = [], [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a started command and all it has started, at once."""
    doomed = [*descendants(process.pid), process.pid]
    for pid in doomed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(timeout=30)


def run(
    kind: str,
    script: Path,
    *arguments: str,
    log: Path,
    env: Mapping[str, str] | None = None,
    timeout: float = TIMEOUT_SECONDS,
    expect: int | None = 0,
) -> str:
    """Run a launch to its end; its output. Fails the test on a time-out, or an exit code other than `expect`."""
    process = start(command(kind, script, *arguments), log, env)
    try:
        code = process.wait(timeout=timeout)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"{kind} launch hung for {timeout} s:\n{log.read_text(errors='replace')[-3000:]}") from None
    finally:
        kill_group(process)
    text = log.read_text(errors="replace")
    assert expect is None or code == expect, f"exit code {code} instead of {expect}:\n{text[-3000:]}"
    return text
