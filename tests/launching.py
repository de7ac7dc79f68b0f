"""Real launches for the tests: the commands that users type, on CPUs with gloo, with time-outs. No process is left behind."""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))  # for launch_server.py, a script that pytest does not set up

from fault_injector import ROOT, Started, command, environment, free_port, processes_of

RECIPE = ROOT / "recipes" / "gpt2_wikitext.py"
FAULTY = ROOT / "tests" / "faulty_recipe.py"
TIMEOUT_SECONDS = 240.0

__all__ = [
    "FAULTY",
    "RECIPE",
    "ROOT",
    "Started",
    "command",
    "environment",
    "free_port",
    "keep_imports_frozen",
    "obey_permissions",
    "processes_of",
    "run",
    "run_in_turn",
]


def run(
    kind: str,
    script: Path,
    *arguments: str,
    log: Path,
    env: Mapping[str, str] | None = None,
    timeout: float = TIMEOUT_SECONDS,
    expect: int | None = 0,
) -> str:
    """Run a launch to its end. Returns its output. Fails the test on a time-out, or an exit code other than `expect`."""
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


# Runs the recipe's file as __main__ for each command line: {number}.log has its output, codes.json all exit codes.
DRIVER = """
import gc, json, os, runpy, sys
import trainer.main
trainer.main.leave = sys.exit  # `main` would end the process
gc.unfreeze = lambda: None  # see keep_imports_frozen
recipe, folder = sys.argv[1:3]
codes = []
for number, argv in enumerate(json.loads(sys.argv[3])):
    out = os.open(os.path.join(folder, f"{number}.log"), os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1), os.dup2(out, 2)
    os.close(out)
    sys.argv = [recipe, *argv]
    code = 0
    try:
        runpy.run_path(recipe, run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    sys.stdout.flush(), sys.stderr.flush()
    codes.append(code)
with open(os.path.join(folder, "codes.json"), "w") as file:
    json.dump(codes, file)
"""


def keep_imports_frozen() -> None:
    """Exclude imported objects from garbage collection for good.

    A run freezes all objects and unfreezes them at its end. In a process of many runs each would then go through a million
    imported objects, which takes longer than to train the toy.
    """
    gc.freeze()
    gc.unfreeze = lambda: None


def obey_permissions() -> None:
    """A `preexec_fn` by which file permissions bind root too (Linux only): drop the capabilities that override them."""
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH; 24 is PR_CAPBSET_DROP, which takes effect at the exec
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)


def run_in_turn(
    script: Path,
    lines: Mapping[str, Sequence[str]],
    folder: Path,
    env: Mapping[str, str],
    preexec_fn: Callable[[], None] | None = None,
) -> dict[str, tuple[int, str]]:
    """Run the command lines of a recipe in `folder`, one after another in one process, which imports everything only once.

    Returns {name: (exit code, output)}.
    """
    logs = folder / "logs"
    logs.mkdir()
    argv = [sys.executable, "-c", DRIVER, str(script), str(logs), json.dumps([list(argv) for argv in lines.values()])]
    done = subprocess.run(
        argv, cwd=folder, env=dict(env), capture_output=True, stdin=subprocess.DEVNULL, timeout=250, preexec_fn=preexec_fn
    )
    outputs = [path.read_text() for path in sorted(logs.glob("*.log"), key=lambda path: int(path.stem))]
    last = outputs[-1][-3000:] if outputs else done.stderr.decode()[-3000:]
    assert (logs / "codes.json").exists(), f"ended in {list(lines)[len(outputs) - 1]}: {last}"
    codes = json.loads((logs / "codes.json").read_text())
    return dict(zip(lines, zip(codes, outputs, strict=True), strict=True))
