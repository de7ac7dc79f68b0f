"""What a run will take (steps, memory under each strategy, hours, disk), computed from shapes, without making weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from trainer.backends.blocks import blocks, check_dimensions, recompute_activations
from trainer.backends.tensors import state_layout
from trainer.checkpoints.network import build_empty_network
from trainer.checkpoints.resume import default_directory
from trainer.command_line.config import Parsed
from trainer.data import stream
from trainer.data.bad_samples import first_batch
from trainer.distributed.launch import DDP, alone, precision_on, requested_precision
from trainer.errors import UserError, one_line, path_of
from trainer.evaluation.objective import Objective
from trainer.initial_weights import replace_tensors
from trainer.planning.activations import count_micro_step
from trainer.planning.flags import PlanFlags
from trainer.planning.launch import Place, config_of, place_of, strategy_of
from trainer.planning.memory import FP32_BYTES, Footprint, Memory, MicroStep, Strategy, memory_of, strategies
from trainer.planning.sizes import checkpoint_files, footprint, save_buffers
from trainer.recipe import Batch, Data, Recipe
from trainer.reporting.plot import plot_learning_rate
from trainer.setup import cut_warmup, load_data, make_optimizer, total_steps

READ_SAMPLES = 32
"""how many samples of a micro-batch are read; the longest of them gives it its length"""
FITS = 0.92
"""the part of a card's memory that a run can use: the driver takes some, and some is lost between tensors"""
NOT_COUNTED = MicroStep(0, 0, 0.0)
COLUMNS = ("weights", "gradients", "moments", "buffers", "activations", "device", "host")


@dataclass(frozen=True)
class Measured:
    """What the shapes of a run tell."""

    net: Footprint
    flops: float
    """FLOPs of a micro-step of one process; 0 if they could not be counted"""
    files: list[int]
    """bytes of each safetensors file of a checkpoint"""
    optimizer: Optimizer
    notes: list[str]
    """a line, if activations could not be counted"""


def plan(recipe: Recipe, parsed: Parsed, argv: Sequence[str], flags: PlanFlags, environ: Mapping[str, str]) -> list[str]:
    """The lines of the plan for the launch that `environ` describes. UserError where the run would raise it.

    Draws the learning rate into a picture beside the run directory.
    """
    said: list[str] = []
    config, resumes = config_of(recipe, parsed, argv, said.append)
    run = config.run
    processes = int(environ.get("WORLD_SIZE") or 1)
    place = place_of(flags.gpu, run.device, environ, int(environ.get("LOCAL_WORLD_SIZE") or processes))
    on_gpu = place.card is not None
    precision = precision_on(requested_precision(run.mixed_precision), on_gpu, place.card is not None and place.card.has_bf16)
    stream.share(config.optimisation.batch_size, 0, processes)
    own = strategy_of(environ, config.optimisation, processes, precision, run.mixed_precision)

    if run.fit_batch and not resumes:
        effective = config.optimisation.effective_batch_size
        said.append(f"--fit_batch: counted as typed; the run splits its {effective} samples a step so that they just fit")
    # Without `init_from`: a plan reads no weights.
    unread = dataclasses.replace(config, optimisation=dataclasses.replace(config.optimisation, init_from=None))
    data = load_data(recipe, unread, alone())
    samples = stream.length_of(data.train)
    steps = total_steps(config, samples)
    config = config if resumes else cut_warmup(config, parsed.typed, steps, lambda _: None)
    o = config.optimisation
    measured = measure(recipe, config, data, own, precision, on_gpu)
    sizes = {strategy: memory_of(strategy, measured.net) for strategy in (own, *others(own, measured))}
    directory = default_directory(recipe, parsed)
    picture = directory.with_name(f"{directory.name}_learning_rate.png")
    drawn = f"drawn in {picture}"
    try:
        plot_learning_rate([recipe.scheduled_rate(step, steps, config) for step in range(1, steps + 1)], picture, recipe.name)
    except OSError as error:
        drawn = f"not drawn in {picture} ({error.strerror or error})"
    step_flops = measured.flops * o.gradient_accumulation_steps
    hours = hours_of(step_flops * steps, place, precision, flags.mfu)
    trained, parameters = (size // FP32_BYTES for size in (measured.net.trained, measured.net.weights))
    return [
        f"Launch: {own.name}, {processes} x {place.name}, {'fp32' if precision == 'no' else precision}",
        *said,
        *data.notes,
        f"Parameters: {parameters:,} ({trained:,} trained)",
        *stream.describe(o.batch_size, o.gradient_accumulation_steps, processes, steps, samples),
        f"Optimizer: {type(measured.optimizer).__name__}, {recipe.report.schedule(config)}; {drawn}",
        *table(sizes, save_buffers(measured.files, processes, pinned=on_gpu)),
        *measured.notes,
        *work_lines(step_flops * processes, steps, hours, place, flags.mfu),
        *checkpoint_lines(run, steps, o.effective_batch_size, samples, sum(measured.files), hours),
        advice(sizes, own, place, processes, bool(config.run.recompute_every))
        + (", and activations" if measured.notes else ""),
    ]


def measure(recipe: Recipe, config: Any, data: Data, own: Strategy, precision: str, on_gpu: bool) -> Measured:
    """Build the network and its optimizer without memory, and count a micro-step. UserError if `own` cannot train it."""
    network, _ = build_empty_network(recipe, config, data)
    if own.kind != "plain":
        check_dimensions(network)
    if own.kind == "fsdp":
        blocks(network)
    # On the CPU, as an optimizer may refuse the meta device; expanded scalars take no memory.
    replace_tensors(network, lambda _, tensor: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape))
    optimizer = make_optimizer(recipe, network, config)
    if own.kind != "plain" and getattr(optimizer, "needs_whole_matrices", False):
        name = type(optimizer).__name__
        raise UserError(f"optimizer {name} needs whole matrices, and {own.name} cuts them; use adamw, or {path_of(DDP)}")
    layout = state_layout(optimizer, network)
    files = checkpoint_files(network, layout)
    batch, terms = micro_batch(recipe, data, config, own.processes)
    counts, notes = (NOT_COUNTED, NOT_COUNTED), []
    recompute_activations(network, config.run.recompute_every)
    try:
        counts = count_micro_step(Objective(network, recipe, terms), batch, precision, on_gpu)
    except RuntimeError as error:  # an operation that reads values, or that has no form for fake tensors
        notes.append(f"  Activations are NOT in it, as they cannot be counted without memory: {one_line(error, 150)}")
    accumulates = config.optimisation.gradient_accumulation_steps > 1
    return Measured(footprint(network, layout, counts, accumulates), counts[0].flops, files, optimizer, notes)


def others(own: Strategy, measured: Measured) -> list[Strategy]:
    """The strategies, beside the launch's own, that could train this model."""
    only_plain = getattr(measured.optimizer, "needs_whole_matrices", False)
    return [s for s in strategies(own.processes) if s.name != own.name and (s.kind == "plain" or not only_plain)]


def micro_batch(recipe: Recipe, data: Data, config: Any, processes: int) -> tuple[Batch, list[str]]:
    """(a micro-batch of the process with the most samples; the loss terms). It has the shape of its first READ_SAMPLES samples,
    and uninitialised values."""
    o, last = config.optimisation, processes - 1
    order = stream.TrainingOrder(o.batch_size, last, processes, o.seed, stream.length_of(data.train), 0)
    numbers = next(iter(order))
    if getattr(data.train, "on_device", False):
        data.train.to(torch.device("cpu"))
    read = first_batch(data.train, numbers[:READ_SAMPLES], config.run)
    return {name: tensor.new_empty(len(numbers), *tensor.shape[1:]) for name, tensor in read.items()}, [*recipe.items(read)]


def table(sizes: Mapping[Strategy, Memory], copies: int) -> list[str]:
    """A row for each strategy, the launch's own first. `copies`: bytes of host memory that a save takes on top."""
    width = max(len(strategy.name) for strategy in sizes)
    unit, name = (1e9, "GB") if max(memory.device for memory in sizes.values()) >= 1e9 else (1e6, "MB")
    lines = [
        f"Memory of each process at its highest, in {name}:",
        f"  {'':{width}}" + "".join(f"{column:>12}" for column in COLUMNS),
    ]
    for number, (strategy, memory) in enumerate(sizes.items()):
        cells = [*(getattr(memory, column) for column in COLUMNS[:-1]), memory.host + copies]
        lines.append(f"{'  ' if number else '> '}{strategy.name:{width}}" + "".join(f"{size / unit:12,.2f}" for size in cells))
    return [*lines, f"  (host: what is offloaded, and {size_text(copies)} in which a save is copied)"]


def hours_of(flops: float, place: Place, precision: str, mfu: float) -> float | None:
    """Hours for `flops`, those of all steps of one process. None if there are none, or the peak is unknown: on a CPU, in fp32,
    on an unknown card."""
    if place.card is None or place.card.flops is None or precision == "no" or not flops:
        return None
    return flops / (mfu * place.card.flops) / 3600


def work_lines(step_flops: float, steps: int, hours: float | None, place: Place, mfu: float) -> list[str]:
    """The line of FLOPs, over all processes, and hours (None: unknown)."""
    total = f"Work: {step_flops:.3g} FLOPs a step, {step_flops * steps:.3g} in all"
    if hours is None:
        return [f"{total}; for hours the peak of a card in bf16 or fp16 is wanted (--gpu)"]
    assert place.card is not None
    assert place.card.flops is not None
    return [f"{total}: {time_text(hours)} at {mfu:.0%} of {place.card.flops / 1e12:.0f} TFLOP/s each (--mfu)"]


def checkpoint_lines(run: Any, steps: int, effective: int, samples: int | None, size: int, hours: float | None) -> list[str]:
    """The line of what all saves write, new bests included, and what stays on the disk; `size`: bytes of a checkpoint."""
    saves = math.ceil(steps / run.save_every) if run.save_every else 1
    kept = min(saves, run.keep_last + 1) if run.keep_last else saves
    passed = steps * effective // samples if samples else 0
    epochs = passed // run.save_epochs if run.save_epochs else 0
    bests = unsaved(steps, run.eval_every, run.save_every) + unsaved(passed, run.eval_epochs, run.save_epochs)
    written = (saves + epochs + bests * run.save_best) * size
    rate = "" if hours is None or hours < 1 else f", {size_text(written / hours)} an hour"
    step_saves = "1 step save" if saves == 1 else f"{saves:,} step saves"
    return [
        f"Checkpoint: {size_text(size)}. {step_saves}, with keep_last {run.keep_last} at most {kept:,} of them on the disk at "
        f"once; {epochs:,} of epochs and the best model stay: up to {size_text((kept + epochs + 1) * size)} in all; "
        f"up to {size_text(written)} are written{rate}"
    ]


def unsaved(length: int, eval_every: int, save_every: int) -> int:
    """How many evaluations within `length` steps, or epochs, fall on no save. An interval of 0: never."""
    if not eval_every:
        return 0
    return length // eval_every - (length // math.lcm(eval_every, save_every) if save_every else 0)


def advice(sizes: Mapping[Strategy, Memory], own: Strategy, place: Place, processes: int, recomputes: bool) -> str:
    """The launch to choose: the plainest that fits, as sharding costs communication, and offloading even more."""

    def needed(memory: Memory) -> float:
        return (memory.device + (memory.host if place.card is None else 0)) / 1e9

    def shown(strategy: Strategy) -> str:
        gigabytes = needed(sizes[strategy])
        return f"{gigabytes:.0f}" if gigabytes >= 10 else f"{gigabytes:.2g}"

    order = {"plain": 0, "fsdp": 1, "zero": 2}
    ordered = sorted(sizes, key=lambda s: (bool(s.offload), order[s.kind], -s.shards, -s.stage))
    plain, where = ordered[0], f"{processes} x {place.gigabytes:.4g} GB"
    best = next((s for s in ordered if needed(sizes[s]) <= FITS * place.gigabytes), None)
    if best is None:
        least = min(ordered, key=lambda strategy: needed(sizes[strategy]))
        ways_out = "a smaller --batch_size with more --gradient_accumulation_steps, or more processes"
        more = "" if recomputes else "--gradient_checkpointing, "
        return f"{where}: too little even for {least.name}, {shown(least)} GB each; {more}{ways_out}"
    because = "what is cut or offloaded would be slower" if best == plain else f"{plain.name} takes {shown(plain)}"
    line = f"{where}: {best.name}, {shown(best)} of {place.gigabytes:.4g} GB; {because}"
    if needed(sizes[own]) > FITS * place.gigabytes and own != plain:
        line += f", {own.name} (this launch) {shown(own)}"
    return line


def time_text(hours: float) -> str:
    """A time as text, in hours, minutes or seconds."""
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return f"{60 * hours:.1f} minutes" if hours >= 1 / 60 else f"{3600 * hours:.2g} seconds"


def size_text(size_bytes: float) -> str:
    """A size as text, in MB, GB or TB."""
    unit, name = next(
        (unit, name) for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")) if size_bytes >= unit or name == "MB"
    )
    return f"{size_bytes / unit:.2f} {name}"
