"""CPU seconds of `--help`, and of a run of `--preset quick` that ends after its first step and its save, for every recipe.

python tools/benchmark.py start [--rounds 3]

Importing torch and Accelerate alone is measured beside them, in turn. The first round begins with empty caches: it parses and
tokenizes the text, and compiles the generator of Collatz numbers.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main(arguments: list[str]) -> None:
    """Print a line for each recipe: the first start, the median of the others, and of `--help`."""
    parser = argparse.ArgumentParser(prog="benchmark.py start", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="after the first")
    rounds = 1 + parser.parse_args(arguments).rounds
    commands = {"import torch, accelerate": ["-c", "import torch, accelerate"]}
    for script in sorted((ROOT / "recipes").glob("[a-z]*.py")):
        commands[script.stem] = [str(script), "--preset", "quick", "--stop_at_step", "1", "--resume", "never"]
        commands[f"{script.stem} --help"] = [str(script), "--help"]
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    with tempfile.TemporaryDirectory() as folder:
        paths = {"PYTHONPATH": str(ROOT), "SAMECURVE_CACHE": f"{folder}/cache", "NUMBA_CACHE_DIR": f"{folder}/numba"}
        for number in range(rounds):
            for name, command in commands.items():
                out = [f"--output_dir={folder}/{number} {name}"] if "--preset" in command else []
                before = _of_children()
                subprocess.run(
                    [sys.executable, *command, *out],
                    env=os.environ | paths,
                    check=True,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
                seconds[name].append(_of_children() - before)
    print(f"{'CPU seconds':32} {'first start':>12} {'later':>7}")
    for name, (first, *later) in seconds.items():
        print(f"{name:32} {first:12.2f} {statistics.median(later):7.2f}")


def _of_children() -> float:
    """CPU seconds of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
