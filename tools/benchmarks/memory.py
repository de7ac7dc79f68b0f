"""Peak host memory at start, save and resume, of each process and of the host, by launch and size of the model.

python tools/benchmark.py memory --parameters 100 300 --launches one fsdp fsdp:4 zero3

A decoder-only Transformer takes one step on a few tokens on CPUs, saves and ends, and a second launch resumes it. The numbers
are anonymous memory, weights, gradients and moments included, minus that of a process that has only imported everything.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SIZES = {100: (768, 12, 2048), 300: (1024, 22, 2816)}
"""{millions of parameters: (d_model, layers, d_ff)}"""
VOCABULARY, CONTEXT = 10_000, 16
PHASES = ("start", "save", "resume")
SETTLED = {"MALLOC_MMAP_THRESHOLD_": "131072"}
"""makes the C library return freed memory to the system"""
SAMPLE_SECONDS = 0.002
TIMEOUT_SECONDS = 900


def main(arguments: Sequence[str]) -> None:
    """Print a line for each launch and size: megabytes at the peak of each phase, of a process and of the host."""
    parser = argparse.ArgumentParser(prog="benchmark memory", description=__doc__)
    parser.add_argument("--parameters", type=int, nargs="+", default=[100, 300], choices=SIZES, help="in millions")
    parser.add_argument("--launches", nargs="+", default=["one", "ddp", "fsdp", "fsdp:4", "zero3", "zero3:4"])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="has to hold a checkpoint")
    flags = parser.parse_args(arguments)
    print(f"{'launch':10}{'model':>10} |" + "".join(f"{f'{phase}: process, host':>24}" for phase in PHASES) + "   [MB]")
    for size in flags.parameters:
        for kind in flags.launches:
            with tempfile.TemporaryDirectory(dir=flags.folder) as place:
                peaks = measure(kind, arguments_of(size, CONTEXT, Path(place)), Path(place))
            cells = "".join(f"{f'{max(own):,.0f}, {sum(own):,.0f}':>24}" for own in (peaks[phase] for phase in PHASES))
            print(f"{kind:10}{peaks['model'][0]:10,.0f} |{cells}", flush=True)


def measure(kind: str, argv: Sequence[str], folder: Path) -> dict[str, list[float]]:
    """{phase: peak in MB of every process}. `training` is that of the resumed run, in steps 2 to 5; `model` has one number, the
    size of the weights in fp32. RuntimeError if a launch fails."""
    from fault_injector import ROOT, command, environment

    peaks: dict[str, list[float]] = defaultdict(list)
    for step, phases in ((1, ("start", "save")), (5, ("resume", "training"))):
        launched = command(kind, Path(__file__), str(folder), *argv, "--stop_at_step", str(step))
        env = environment(**SETTLED)
        done = subprocess.run(launched, cwd=ROOT, env=env, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
        reports = sorted(folder.glob("rank*.json"))
        if done.returncode or not reports:
            raise RuntimeError(f"{kind}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
        for path in reports:
            for phase, peak in json.loads(path.read_text()).items():
                if phase in phases:
                    peaks[phase].append(peak)
            path.unlink()
    weights = (folder / "run" / "checkpoints").glob("*_1/model*.safetensors")
    peaks["model"] = [sum(file.stat().st_size for file in weights) / 1e6]
    shutil.rmtree(folder / "run")
    return peaks


def arguments_of(size: int, context: int, folder: Path) -> list[str]:
    """The command line of a run with a model of `size` million parameters; writes its ids to `folder`."""
    ids = array("H", (number % VOCABULARY for number in range(20 * context + 2000)))
    for name in ("train", "valid"):
        (folder / f"{name}.ids").write_bytes(ids.tobytes())
    width, layers, d_ff = SIZES[size]
    argv = ["--train_data_path", f"{folder}/train.ids", "--val_data_path", f"{folder}/valid.ids"]
    argv += ["--output_dir", f"{folder}/run", "--context_length", str(context)]
    argv += ["--d_model", str(width), "--num_layers", str(layers), "--num_heads", "16", "--d_ff", str(d_ff)]
    argv += ["--vocab_size", str(VOCABULARY), "--batch_size", "4", "--max_steps", "9"]
    return [*argv, "--num_workers", "0", "--eval_every", "0", "--save_every", "0", "--device", "cpu"]


def train_and_watch(folder: Path, argv: list[str]) -> None:
    """In each process of a launch: train, and write {phase: peak in MB above that of the imports} to `folder`."""
    import os

    from recipes.tinystories_lm import TinyStoriesLM
    from trainer import launched_run
    from trainer.backends import backend_of
    from trainer.checkpoints.saving import Saver
    from trainer.command_line import config
    from trainer.distributed.launch import connect
    from trainer.distributed.signals import leave
    from trainer.main import train
    from trainer.reporting.console import Console

    launch = connect("cpu", 10.0, backend_of(os.environ).before_connect)
    recipe, phase = TinyStoriesLM(), "imports"
    peaks: dict[str, float] = defaultdict(float)

    def watch() -> None:
        while True:
            peaks[phase] = max(peaks[phase], anonymous_megabytes())
            time.sleep(SAMPLE_SECONDS)

    def during(name: str, afterwards: str, action: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*values: Any, **keywords: Any) -> Any:
            nonlocal phase
            phase = name
            result = action(*values, **keywords)
            phase = afterwards
            return result

        return wrapped

    parsed = config.parse(recipe.config_class, recipe.presets, argv, recipe.name)
    resumes = (folder / "run").exists()
    launch.control.barrier()
    launched_run.set_up = during("resume" if resumes else "start", "training", launched_run.set_up)
    Saver.save = during("save", "save", Saver.save)  # type: ignore[method-assign]
    before = anonymous_megabytes()
    threading.Thread(target=watch, daemon=True).start()
    train(recipe, parsed, argv, launch, Console(None, launch.is_main))
    (folder / f"rank{launch.rank}.json").write_text(json.dumps({name: peak - before for name, peak in peaks.items()}))
    leave(0)


def anonymous_megabytes() -> float:
    """Anonymous memory of this process (not backed by files), in MB."""
    match = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) / 1000


if __name__ == "__main__":
    train_and_watch(Path(sys.argv[1]), sys.argv[2:])
