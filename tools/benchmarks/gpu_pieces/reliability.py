"""Pieces (g) and (i): what a save costs, and whether a resumed run equals an uninterrupted one bit for bit."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.gpu_pieces.contenders import free, wait_for
from benchmarks.gpu_pieces.language import gpt2, tinystories
from benchmarks.gpu_pieces.networks import pfn, vit
from benchmarks.gpu_pieces.results import Result, noting
from benchmarks.gpu_pieces.sessions import OurLoop, Place
from trainer.checkpoints.checkpoint import Checkpoint
from trainer.recipe import Recipe


def piece_g(place: Place) -> Result:
    """How long a save holds up GPT-2's loop: steps with a save beside steps without, and `save_file` of the same tensors."""
    result = Result()
    every, saves = place.size((110, 3), (3, 2))  # so many steps take longer than a write, for which the next save would wait
    # The clock is read once the device has done a step, so that it shows that step's own time.
    recipe, config = gpt2(place, place.size(8, 2), compile="no", save_every=every, keep_last=1)
    folder = place.new_folder()
    loop, stamps = OurLoop(recipe, config, place.launch, folder), list[float]()

    def stamp() -> None:
        wait_for(place.device)
        stamps.append(time.perf_counter())

    loop.on_step = stamp
    assert loop.training is not None
    network, optimizer = loop.session.network, loop.session.backend.optimizer
    loop.run(every * saves + 2)  # a step is saved at the beginning of the next one
    seconds = [after - before for before, after in itertools.pairwise(stamps)]
    # The save of step i falls between the end of step i, stamps[i - 1], and that of step i + 1.
    with_save = [value for i, value in enumerate(seconds, start=1) if i % every == 0]
    without = [value for i, value in enumerate(seconds, start=1) if i % every and i > 1]
    stall = statistics.median(with_save) - statistics.median(without)
    plain = []
    for number in range(saves):
        wait_for(place.device)
        started = time.perf_counter()
        moments = {f"{n}.{key}": value for n, state in enumerate(optimizer.state.values()) for key, value in state.items()}
        save_file(dict(network.named_parameters()) | moments, place.folder / "peer.safetensors")
        if number or saves == 1:  # the first one warms up
            plain.append(time.perf_counter() - started)
    loop.close()
    newest = max(folder.glob("checkpoints/*_[0-9]*/manifest.json"), key=lambda path: path.stat().st_mtime).parent
    size = sum(path.stat().st_size for path in newest.iterdir())
    result.add("a save holds up the loop for", 1000 * stall, "ms", "100")
    result.add("save_file of the same tensors takes", 1000 * statistics.median(plain), "ms")
    result.add("a step without a save", 1000 * statistics.median(without), "ms")
    result.add("checkpoint", size / 1e9, "GB")
    result.details["ms of the steps with a save"] = [1000 * value for value in with_save]
    return result


def piece_i(place: Place) -> Result:
    """For each recipe, the share of tensor files that are equal after a resume from halfway; with --deterministic."""
    # CUDA's libraries read it when they start. `set_up` sets it too, but for the second recipe that would be too late.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    result = Result()
    steps = place.size(12, 4)
    shared: dict[str, Any] = {"max_steps": steps, "save_every": steps // 2, "compile": "no", "deterministic": True}
    small_gpt2 = place.size({"num_layers": 4}, {})
    makers: dict[str, Callable[[], tuple[Recipe, Any]]] = {
        "GPT-2": lambda: gpt2(place, place.size(8, 2), **(shared | small_gpt2 | {"dropout": 0.1})),
        "TinyStories": lambda: tinystories(place, **shared),
        "ViT": lambda: vit(place, **(shared | {"dropout": 0.1} | place.size({"batch_size": 16, "num_layers": 4}, {}))),
        "PFN": lambda: pfn(place, **(shared | {"max_steps": max(6, steps), "save_every": max(6, steps) // 2})),
    }
    try:
        for name, make in makers.items():
            with noting(result, name):
                equal, different = same_tensors(place, *make())
                result.add(f"{name}, files with the same bits", equal / (equal + len(different)), "of it", "1")
                if different:
                    result.notes.append(f"{name}: {', '.join(different)} differ")
            free(place.device)
    finally:
        torch.use_deterministic_algorithms(False)
    return result


def same_tensors(place: Place, recipe: Recipe, config: Any) -> tuple[int, list[str]]:
    """Train straight through, and again from the checkpoint of halfway. Returns (number of tensor files of the last checkpoint
    that are equal, names of those that are not)."""
    middle, last = config.run.save_every, config.optimisation.max_steps

    def train(checkpoint: Path | None) -> Path:
        folder = place.new_folder()
        loop = OurLoop(recipe, config, place.launch, folder, checkpoint)
        loop.run(last + 1)  # one more than it has, so that it saves its last step and ends by itself
        loop.close()
        return folder / "checkpoints"

    name = recipe.checkpoint_prefix
    straight = train(None)
    resumed = train(straight / f"{name}{middle}")
    files = [Checkpoint(folder / f"{name}{last}").files for folder in (straight, resumed)]
    hashes = [{file: entry["sha256"] for file, entry in own.items() if file.endswith(".safetensors")} for own in files]
    different = [file for file in hashes[0] if hashes[0][file] != hashes[1].get(file)]
    return len(hashes[0]) - len(different), different
