"""Measures every claim about one GPU by one command, beside peers in the same run: `python tools/benchmark.py gpu`.

There are ten pieces, the most important first. Each runs in a process of its own with a time-out, and its result is written to
the JSON file at once. The same command goes on with pieces that are missing or have failed. No network is needed. A piece that
needs a package that is not installed says which one, and is tried again by the next call.

python tools/benchmark.py gpu --rehearse     # every piece small, on a CPU, in seconds: to find out what is broken
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu_pieces.results import TITLES, Result, ResultFile, reason, table
from trainer.command_line.locations import argument_path
from trainer.distributed.signals import die_with_parent

ROOT = Path(__file__).parents[2]
MODULES = {
    "a": "language",
    "b": "overhead",
    "c": "language",
    "d": "networks",
    "e": "networks",
    "f": "networks",
    "g": "reliability",
    "h": "launches",
    "i": "reliability",
    "j": "overhead",
}
LIMIT_SECONDS = {"a": 330.0, "h": 240.0}
"""time-out of a piece; LIMIT for the others"""
LIMIT = 150.0
REHEARSAL_LIMIT = 240.0
LEAST_SECONDS = 45.0
"""no piece is begun if less time is left"""
TYRO = {
    "__init__.py": "from tyro import conf\n",
    "conf.py": "class Positional:\n    def __class_getitem__(cls, of): return of\n\n\ndef arg(**_): return None\n",
}
"""a stand-in where tyro is not installed: the recipes' fields refer to it, but no command line is read here"""


def main(arguments: list[str]) -> None:
    """Measure the pieces that the JSON file lacks, and print the table of all. Exit status 1 if a piece has failed."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=argument_path, help="results (default: runs/benchmark_gpu.json, or ..._rehearsal.json)")
    parser.add_argument("--only", nargs="+", choices=TITLES, metavar="PIECE", help="measure these again, nothing else (a to j)")
    parser.add_argument("--minutes", type=float, default=8.5, help="stop before this; the same command goes on")
    parser.add_argument("--rehearse", action="store_true", help="every piece small, on a CPU")
    parser.add_argument("--piece", nargs="+", choices=TITLES, help=argparse.SUPPRESS)  # what a process of ours does
    parser.add_argument("--seconds", type=float, default=math.inf, help=argparse.SUPPRESS)  # until it is ended
    parser.add_argument("--launched", type=argument_path, help=argparse.SUPPRESS)  # what a process of piece (h) does
    parser.add_argument("--precisions", nargs="+", help=argparse.SUPPRESS)
    flags = parser.parse_args(arguments)
    name = "benchmark_gpu_rehearsal.json" if flags.rehearse else "benchmark_gpu.json"
    results = ResultFile((flags.json or Path("runs", name)).resolve())
    if flags.launched:
        importlib.import_module("benchmarks.gpu_pieces.launches").launched(flags.launched, flags.precisions, flags.rehearse)
    elif flags.piece:
        die_with_parent(signal.SIGKILL)
        run_pieces(flags.piece, results, flags.rehearse, flags.seconds)
    else:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            sys.exit(run_all(flags.only, results, flags.rehearse, flags.minutes))
        except KeyboardInterrupt:
            print(f"interrupted; the same command goes on with what is missing in {results.path}", file=sys.stderr)
            sys.exit(130)


def run_all(only: list[str] | None, results: ResultFile, rehearse: bool, minutes: float) -> int:
    """Measure `only` these pieces, or all that are missing or have failed, each in a process. Returns the exit status."""
    if not rehearse and not _sees_a_gpu():
        print("benchmark gpu: torch sees no GPU here; --rehearse runs every piece small on a CPU", file=sys.stderr)
        return 2
    deadline = time.monotonic() + 60 * minutes
    there = results.read()
    # A result without figures lacked a package, which may be installed by now.
    done = {piece for piece, result in there.items() if result["figures"] and not result["error"]}
    wanted = only or [piece for piece in TITLES if piece not in done]
    for piece in wanted:
        results.drop(piece)
    with tempfile.TemporaryDirectory(prefix="benchmark_gpu_") as folder:
        environment = environment_of_pieces(Path(folder), rehearse)
        # In a rehearsal one process for all: most of its time goes into imports. (h) starts its own and need not wait.
        groups = [wanted] if rehearse else [[piece] for piece in wanted]
        for group in groups:
            left = deadline - time.monotonic()
            if left < LEAST_SECONDS:
                print(f"({group[0]}) and what follows: no time left; the same command goes on", flush=True)
                break
            limit = REHEARSAL_LIMIT if rehearse else LIMIT_SECONDS.get(group[0], LIMIT)
            run_process(group, results, rehearse, min(limit, left), environment)
    found = results.read()
    print(json.dumps(found))
    print(*table(found), sep="\n")
    print(f"JSON: {results.path}")
    return 1 if any(result["error"] for result in found.values()) else 0


def _sees_a_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def environment_of_pieces(folder: Path, rehearse: bool) -> dict[str, str]:
    """The environment of every piece: this source tree on PYTHONPATH, one cache of compiled code, and no network."""
    paths = [str(ROOT), str(ROOT / "tools")]
    if find_spec("tyro") is None:
        stand_in = folder / "stand_in" / "tyro"
        stand_in.mkdir(parents=True)
        for file, text in TYRO.items():
            (stand_in / file).write_text(text)
        paths.append(str(stand_in.parent))
    given = os.environ.get("PYTHONPATH")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([*paths, *([given] if given else [])]),
        "SAMECURVE_CACHE": str(folder / "cache"),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
        "TMPDIR": str(folder),
    }
    if rehearse:
        # torch.compile is called and does nothing: compiling alone would take minutes.
        return environment | {"TORCH_COMPILE_DISABLE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    # A cache outside `folder`, so that other pieces and later calls find a model compiled.
    cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir(), "benchmark_gpu_compiled")))
    # One GPU only: transformers' Trainer would use all that it sees.
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    return environment | {"CUDA_VISIBLE_DEVICES": gpu, "TORCHINDUCTOR_CACHE_DIR": cache}


def run_process(
    pieces: list[str], results: ResultFile, rehearse: bool, limit_seconds: float, environment: dict[str, str]
) -> None:
    """Run pieces in one process. A piece without a result, since the process was killed or hung, gets one with that error."""
    started = time.monotonic()
    for piece in pieces:
        print(f"({piece}) {TITLES[piece]} ...", flush=True)
    command = [sys.executable, str(ROOT / "tools" / "benchmark.py"), "gpu", "--json", str(results.path)]
    command += ["--seconds", f"{limit_seconds:.0f}", *(["--rehearse"] if rehearse else [])]
    log_path = results.path.with_suffix(".log")
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("a+", encoding="utf-8", errors="replace") as log:
        begin = log.tell()
        # In a new session, so that its data workers and launches can be killed with it.
        process = subprocess.Popen(
            [*command, "--piece", *pieces],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            ended = f"exit status {process.wait(limit_seconds)}"
        except subprocess.TimeoutExpired:
            ended = f"took longer than {limit_seconds:.0f} s"
        finally:
            _kill_group(process)
        log.seek(begin)
        tail = log.read()[-2000:]
    there = results.read()
    for piece in pieces:
        if piece not in there:
            seconds = time.monotonic() - started
            results.write(piece, Result(error=f"{tail}\nno result: {ended}"), rehearsal=rehearse, seconds=seconds)


def _kill_group(process: subprocess.Popen[Any]) -> None:
    """SIGKILL the process and all others of its session's first group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def run_pieces(pieces: list[str], results: ResultFile, rehearse: bool, seconds: float) -> None:
    """In the process of `run_process`: run each piece and write its result, or its error. `seconds`: the process's time-out."""
    until = time.monotonic() + seconds
    import torch

    on_gpu = torch.cuda.is_available() and not rehearse
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "torch": torch.__version__,
        "accelerate": importlib.metadata.version("accelerate"),
        "cores": os.cpu_count(),
        "rehearsal": rehearse,
    }
    for piece in pieces:
        started, result = time.monotonic(), Result()
        try:
            result = run_piece(piece, results, rehearse, until)
        except ModuleNotFoundError as error:
            result.notes.append(reason(error))
        except Exception as error:
            result.error = f"{traceback.format_exc()}\n{reason(error)}"
        results.write(piece, result, **facts, seconds=time.monotonic() - started)


def run_piece(piece: str, results: ResultFile, rehearse: bool, until: float) -> Result:
    """Run a piece in a temporary folder."""
    module = importlib.import_module(f"benchmarks.gpu_pieces.{MODULES[piece]}")
    sessions = importlib.import_module("benchmarks.gpu_pieces.sessions")
    with tempfile.TemporaryDirectory() as folder:
        place = sessions.Place(sessions.connected(rehearse), Path(folder), results, rehearse, until)
        return getattr(module, f"piece_{piece}")(place)
