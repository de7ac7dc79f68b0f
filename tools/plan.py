"""Says what a run comes to before it is started: batch arithmetic, steps, parameters, memory by launch, disk.

python tools/plan.py recipes/gpt2_wikitext.py --processes 8 -- --d_model 1024 --num_layers 24 --num_heads 16 --batch_size 32

What follows `--` is the recipe's command line. The data are read and the model is built, on the CPU; nothing is trained.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import math
import sys
from dataclasses import replace
from pathlib import Path

from trainer import config as configuration
from trainer.errors import Refusal
from trainer.recipe import Recipe

FP32_BYTES = 4
LAUNCHES = ("one process or DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3")


def main(arguments: list[str] | None = None) -> None:
    """Print the plan. Exits with 2 and one line for what a user can mend."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="file of the recipe, such as recipes/gpt2_wikitext.py")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="processes of the launch")
    options = parser.parse_args(words[:cut])
    try:
        for line in plan(load_recipe(options.recipe), words[cut + 1 :], options.processes):
            print(line)
    except (Refusal, OSError, ValueError) as error:
        parser.exit(2, f"plan: {error}\n")


def load_recipe(path: Path) -> Recipe:
    """The recipe that a file defines. Refusal if it is no file, or defines none or several."""
    if not path.is_file():
        raise Refusal(f"{path} is no file; give a recipe's, such as recipes/gpt2_wikitext.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    own = [value for value in vars(module).values() if inspect.isclass(value) and value.__module__ == path.stem]
    found = [value for value in own if issubclass(value, Recipe)]
    if len(found) != 1:
        raise Refusal(f"{path} defines {len(found)} recipes; give a file with one")
    return found[0]()


def plan(recipe: Recipe, argv: list[str], processes: int) -> list[str]:
    """The lines of the plan. Raises Refusal as the run itself would."""
    from trainer import batches, optimizer
    from trainer.schedule import warmup_for
    from trainer.setup import build_network, total_steps

    if processes < 1:
        raise Refusal(f"processes {processes} must be at least 1")
    parsed = configuration.parse(recipe.Config, recipe.presets, argv, recipe.name)
    config, settings = parsed.config, parsed.config.optimisation
    data = recipe.build_data(config)
    samples = batches.length_of(data.train)
    steps = total_steps(config, samples)
    if "warmup_steps" not in parsed.typed:
        settings = replace(settings, warmup_steps=warmup_for(settings.warmup_steps, steps)[0])
        config = replace(config, optimisation=settings)
    network = build_network(recipe, config, data)
    parameters = sum(p.numel() for p in network.parameters())
    moments = min(2, len(optimizer.moments(settings.optimizer, settings.beta1)))  # muon: two at most, one for each matrix
    saved = FP32_BYTES * parameters * (1 + moments)
    run = config.run
    saves = math.ceil(steps / run.save_every) if run.save_every else 1
    kept = min(saves, run.keep_last + 1) if run.keep_last else saves
    effective = settings.effective_batch_size
    epochs = steps * effective // samples // run.save_epochs if samples and run.save_epochs else 0
    return [
        *data.notes,
        f"Parameters: {parameters:,}",
        *batches.describe(settings.batch_size, settings.gradient_accumulation_steps, processes, steps, samples),
        f"Optimizer: {settings.optimizer}, {recipe.schedule_text(config)}",
        "Memory of each process for weights, gradients and optimizer state in fp32 (activations come on top):",
        *(f"  {name:20s}{size_text(bytes_of_state(parameters, moments, name, processes)):>12s}" for name in LAUNCHES),
        f"Checkpoint: {size_text(saved)}. {saves:,} step saves, with keep_last {run.keep_last} at most {kept:,} of them on the "
        f"disk at once; {epochs:,} of epochs and the best model stay: up to {size_text((kept + epochs + 1) * saved)} in all",
    ]


def bytes_of_state(parameters: int, moments: int, launch: str, processes: int) -> float:
    """Bytes each process holds for `parameters` in fp32 (Rajbhandari et al. 2020, section 3, with fp32 instead of fp16).

    ZeRO-1 and 2 keep the weights whole, with an fp32 master copy of each process's share beside its `moments` moments.
    """
    share = parameters / processes
    weights, gradients = {
        "one process or DDP": (parameters, parameters),
        "ZeRO-1": (parameters + share, parameters),
        "ZeRO-2": (parameters + share, share),
        "ZeRO-3": (2 * share, share),
    }[launch]
    state = moments * (parameters if launch == LAUNCHES[0] else share)
    return FP32_BYTES * (weights + gradients + state)


def size_text(size_bytes: float) -> str:
    """A size in MiB or GiB."""
    return f"{size_bytes / 2**30:.2f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:.1f} MiB"


if __name__ == "__main__":
    main()
