"""Piece (h): the same steps on one GPU under each launch and in each precision, their losses side by side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import torch
from fault_injector import free_port

from benchmarks.gpu_pieces.contenders import free
from benchmarks.gpu_pieces.language import tinystories
from benchmarks.gpu_pieces.results import Result, ResultFile, reason
from benchmarks.gpu_pieces.sessions import OurLoop, Place, connected

ROOT = Path(__file__).parents[3]
LAUNCH_SECONDS = 150.0


def launchers() -> dict[str, list[str]]:
    """{name of a launch: the words before the script}; each starts one process."""
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]

    def from_file(name: str) -> list[str]:
        return [*accelerate, "--main_process_port", str(free_port()), "--config_file", f"accelerate_configs/{name}.yaml"]

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1", "--rdzv_endpoint", "localhost:0"]
    return {
        "one process": [sys.executable],
        "DDP": [*torchrun, "--rdzv_backend", "c10d"],
        "FSDP2": from_file("fsdp"),
        "ZeRO-2": from_file("zero2"),
    }


def piece_h(place: Place) -> Result:
    """Losses and memory of each launch and precision, and how far the losses are from those of one process.

    Launches run one after another; in a rehearsal, where time does not matter, all at once.
    """
    result = Result()
    commands = launchers()
    if find_spec("deepspeed") is None:
        del commands["ZeRO-2"]
        result.notes.append("ZeRO-2: needs deepspeed, which is not installed")

    def start(name: str) -> dict[str, dict[str, list[float]]] | str:
        precisions = place.size(["no", "bf16", "fp16"], ["no", "bf16"]) if name == "one process" else ["bf16"]
        answer = place.folder / f"{name}.json"
        script = [str(ROOT / "tools" / "benchmark.py"), "gpu", "--launched", str(answer), "--precisions", *precisions]
        return run_launch([*commands[name], *script, *(["--rehearse"] if place.rehearse else [])], answer)

    with ThreadPoolExecutor(place.size(1, len(commands))) as pool:
        answers = dict(zip(commands, pool.map(start, commands), strict=True))
    curves: dict[str, list[float]] = {}
    for name, answer in answers.items():
        if isinstance(answer, str):
            result.notes.append(f"{name}: {answer}")
            continue
        for precision, measured in answer.items():
            label = f"{name}, {'fp32' if precision == 'no' else precision}"
            if "error" in measured:
                result.notes.append(f"{label}: {measured['error']}")
                continue
            curves[label] = measured["losses"]
            result.add(f"{label}, last loss", measured["losses"][-1], "nats")
            if measured["peak_gib"]:
                result.add(f"{label}, peak memory", measured["peak_gib"][0], "GiB")
    result.details["losses"] = curves
    for label, losses in curves.items():
        beside = "one process, bf16" if label.endswith("bf16") and not label.startswith("one") else "one process, fp32"
        if beside in curves and label != beside:
            apart = max(abs(a / b - 1) for a, b in zip(losses, curves[beside], strict=True))
            goal = "1e-3" if beside.endswith("bf16") else ""
            result.add(f"{label}, apart from {beside}", apart, "relative", goal)
    return result


def run_launch(command: list[str], answer: Path) -> dict[str, dict[str, list[float]]] | str:
    """Run a launch. Returns the contents of the file `answer`, see `launched`; or in one line why it was not written."""
    outer = ("ACCELERATE_", "SLURM_", "PET_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(outer)}
    with answer.with_suffix(".log").open("w+", encoding="utf-8", errors="replace") as log:
        # In this process's session, so that it is killed with it; `die_with_launcher` ends the launcher's children.
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            code = process.wait(LAUNCH_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
            process.kill()
            process.wait()
        log.seek(0)
        tail = " ".join(log.read()[-1500:].split())
    if answer.exists():
        return json.loads(answer.read_text(encoding="utf-8"))
    return f"no answer within {LAUNCH_SECONDS:g} s: {tail}" if code is None else f"exit status {code}: {tail}"


def launched(answer: Path, precisions: list[str], rehearse: bool) -> None:
    """In the process of a launch: take 20 steps (3 in a rehearsal) in each precision.

    Writes {precision: {"losses": by step, "peak_gib": [GPU memory] or []}, or {"error": in one line}} to `answer`.
    """
    from trainer.distributed.signals import die_with_launcher, leave

    die_with_launcher()
    launch = connected(rehearse)
    place = Place(launch, answer.parent / f"{answer.stem} data", ResultFile(answer), rehearse)
    place.folder.mkdir()
    steps = place.size(20, 3)
    found: dict[str, dict[str, object]] = {}
    for precision in precisions:
        # A short warm-up, so that the losses change within these few steps.
        recipe, config = tinystories(place, mixed_precision=precision, log_every=1, warmup_steps=2, compile="no")
        losses: list[float] = []
        free(launch.device)
        if launch.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            loop = OurLoop(recipe, config, launch, place.new_folder())
            state = loop.training.state  # type: ignore[union-attr]
            loop.on_step = lambda losses=losses, state=state: losses.append(state.train_loss or float("nan"))  # type: ignore[misc]
            loop.run(steps)
            loop.close()
            peak = [torch.cuda.max_memory_allocated() / 2**30] if launch.device.type == "cuda" else []
            found[precision] = {"losses": losses, "peak_gib": peak}
        except Exception as error:
            found[precision] = {"error": reason(error)}
    answer.write_text(json.dumps(found), encoding="utf-8")
    leave(0)
