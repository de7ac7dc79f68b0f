"""Prints what a run will take, before it is started: batch arithmetic, steps, parameters, memory by launch, disk.

python tools/plan.py recipes/gpt2_wikitext.py --processes 8 -- --d_model 1024 --num_layers 24 --num_heads 16 --batch_size 32
python tools/plan.py recipes/finetune_lm.py --processes 8 --gpu_gb 80 -- --init_from FOLDER_OR_NAME --data_dir rows

What follows `--` is the recipe's command line. The data are read; the model is built without weights, and nothing is trained.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.command_line import config as configuration
from trainer.errors import UserError, path_of
from trainer.recipe import Recipe

if TYPE_CHECKING:
    from torch.optim import Optimizer

FP32_BYTES = 4
LAUNCHES = ("one process or DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP2", "HSDP, 2 replicas")


def main(arguments: list[str] | None = None) -> None:
    """Print the plan. Exits with 2 and one line on an error that the user can fix."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    separator = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="file of the recipe, such as recipes/gpt2_wikitext.py")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="processes of the launch")
    parser.add_argument("--gpu_gb", type=float, metavar="N", help="memory of each GPU: which launch fits into it?")
    options = parser.parse_args(argv[:separator])
    try:
        for line in plan(load_recipe(options.recipe), argv[separator + 1 :], options.processes, options.gpu_gb):
            print(line)
    except (UserError, OSError, ValueError) as error:
        parser.exit(2, f"plan: {error}\n")


def load_recipe(path: Path) -> Recipe:
    """The recipe that a file defines. UserError if it is no file, or defines none or several."""
    if not path.is_file():
        raise UserError(f"{path} is no file; give a recipe's, such as {path_of('recipes/gpt2_wikitext.py')}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    defined = [value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == path.stem]
    recipes = [value for value in defined if issubclass(value, Recipe)]
    if len(recipes) != 1:
        raise UserError(f"{path} defines {len(recipes)} recipes; give a file with one")
    return recipes[0]()


def plan(recipe: Recipe, argv: list[str], processes: int, gpu_gb: float | None = None) -> list[str]:
    """The lines of the plan. Raises UserError as the run itself would."""
    import torch

    from trainer.checkpoints.init_from import with_settings
    from trainer.checkpoints.network import build_empty_network
    from trainer.data import stream
    from trainer.initial_weights import replace_tensors
    from trainer.optimisation.schedule import warmup_for
    from trainer.setup import total_steps

    if processes < 1:
        raise UserError(f"processes {processes} must be at least 1")
    parsed = with_settings(recipe, configuration.parse(recipe.config_class, recipe.presets, argv, recipe.name), argv)
    config, settings = parsed.config, parsed.config.optimisation
    data = recipe.build_data(config)
    samples = stream.length_of(data.train)
    steps = total_steps(config, samples)
    if "warmup_steps" not in parsed.typed:
        settings = replace(settings, warmup_steps=warmup_for(settings.warmup_steps, steps)[0])
        config = replace(config, optimisation=settings)
    network, _ = build_empty_network(recipe, config, data)
    # An optimizer may want a device that computes: shapes on the CPU, without memory.
    replace_tensors(network, lambda name, tensor: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape))
    parameters = sum(p.numel() for p in network.parameters())
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    moments = state_share(recipe.optimizer(network, config))
    saved = FP32_BYTES * (parameters + moments * trained)
    run = config.run
    saves = math.ceil(steps / run.save_every) if run.save_every else 1
    kept = min(saves, run.keep_last + 1) if run.keep_last else saves
    effective, accumulates = settings.effective_batch_size, settings.gradient_accumulation_steps > 1
    epochs = steps * effective // samples // run.save_epochs if samples and run.save_epochs else 0
    sizes = {name: bytes_of_state(parameters, trained, moments, name, processes, accumulates) for name in LAUNCHES}
    return [
        *data.notes,
        f"Parameters: {parameters:,} ({trained:,} trained)",
        *stream.describe(settings.batch_size, settings.gradient_accumulation_steps, processes, steps, samples),
        f"Optimizer: {settings.optimizer}, {recipe.report.schedule(config)}",
        "Memory of each process for weights, gradients and optimizer state in fp32 (activations come on top):",
        *(f"  {name:20s}{size_text(size):>12s}" for name, size in sizes.items()),
        *([] if gpu_gb is None else [fitting(sizes, processes, gpu_gb)]),
        f"Checkpoint: {size_text(saved)}. {saves:,} step saves, with keep_last {run.keep_last} at most {kept:,} of them on the "
        f"disk at once; {epochs:,} of epochs and the best model stay: up to {size_text((kept + epochs + 1) * saved)} in all",
        f"Saving: a process keeps a copy of its share in host memory, at most "
        f"{size_text(largest_share(FP32_BYTES * parameters, round(moments * FP32_BYTES * trained), processes))}",
    ]


def fitting(sizes: dict[str, float], processes: int, gpu_gb: float) -> str:
    """Which launch to take: the plainest that leaves a quarter of the memory for activations."""
    gigabytes = {name: sizes[name] / 1e9 for name in (LAUNCHES[0], "FSDP2")}
    name = next((name for name, size in gigabytes.items() if size <= 0.75 * gpu_gb), None)
    if name is None:
        return f"{processes} x {gpu_gb:g} GB: too little even for FSDP2 ({gigabytes['FSDP2']:.0f} GB each); take more processes"
    return f"{processes} x {gpu_gb:g} GB: {name}, {gigabytes[name]:.0f} of {gpu_gb:g} GB, and activations"


def largest_share(weights_bytes: int, state_bytes: int, processes: int) -> int:
    """Bytes of a checkpoint's tensors that one process copies and writes, at most: files are dealt out in turn."""
    from trainer.checkpoints.writing import SHARD_BYTES

    files = [min(SHARD_BYTES, size - start) for size in (weights_bytes, state_bytes) for start in range(0, size, SHARD_BYTES)]
    return max(sum(files[rank::processes]) for rank in range(processes))


def state_share(optimizer: Optimizer) -> float:
    """State values per trained parameter: 2 for Adam. By a trial step for each group, as an optimizer creates its state in its
    first step."""
    from trainer.backends.tensors import TRIAL_SIZES, trial_state

    kept = trained = 0.0
    for number, group in enumerate(optimizer.param_groups):
        first, size = group["params"][0], sum(p.numel() for p in group["params"])
        tensors = [v for v in trial_state(optimizer, number, first.ndim, first).values() if getattr(v, "ndim", 0)]
        kept += size * sum(tensor.numel() for tensor in tensors) / math.prod(TRIAL_SIZES[: max(1, first.ndim)])
        trained += size
    return kept / trained


def bytes_of_state(parameters: int, trained: int, moments: float, launch: str, processes: int, accumulates: bool) -> float:
    """Bytes each process holds for `parameters` in fp32, of which `trained` have gradients and moments.

    Rajbhandari et al. 2020, section 3, with fp32 instead of fp16.

    ZeRO-1 and 2 keep the weights whole, with an fp32 master copy of each process's share beside its `moments` moments. FSDP
    keeps gradients whole until the last micro-batch of a step, if there are several (`accumulates`).
    """
    shards = max(1, processes // 2 if "HSDP" in launch else processes)
    share, own = parameters / shards, trained / shards
    fsdp = (share, trained if accumulates else own)
    weights, gradients = {
        "one process or DDP": (parameters, trained),
        "ZeRO-1": (parameters + own, trained),
        "ZeRO-2": (parameters + own, own),
        "ZeRO-3": (share + own, own),
        "FSDP2": fsdp,
        "HSDP, 2 replicas": fsdp,
    }[launch]
    state = moments * (trained if launch == LAUNCHES[0] else own)
    return FP32_BYTES * (weights + gradients + state)


def size_text(size_bytes: float) -> str:
    """A size in MiB or GiB."""
    return f"{size_bytes / 2**30:.2f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.1f} MiB"


if __name__ == "__main__":
    main()
