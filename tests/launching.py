"""Real launches for the tests: the commands a user types, on CPU with gloo, with time-outs; nothing of them is left behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))  # pytest knows it already; scenarios.py is also a script

from fault_injector import ROOT, Started, command, environment, free_port

RECIPE = ROOT / "recipes" / "gpt2_wikitext.py"
TOY = ROOT / "tests" / "toy_recipe.py"
TIMEOUT_SECONDS = 240.0

__all__ = ["RECIPE", "ROOT", "TOY", "Started", "command", "environment", "free_port", "run"]


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
    process = Started(command(kind, script, *arguments), log, env)
    try:
        code = process.wait(timeout=timeout)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"{kind} launch hung for {timeout} s:\n{log.read_text(errors='replace')[-3000:]}") from None
    finally:
        process.kill_all()
    text = log.read_text(errors="replace")
    assert expect is None or code == expect, f"exit code {code} instead of {expect}:\n{text[-3000:]}"
    return text
