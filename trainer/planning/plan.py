"""What a run will take, before it is started: steps, memory by launch, hours, disk. No weights are made, nothing is trained."""

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
from trainer.planning.launch import Place, config_of, place_of, way_of
from trainer.planning.memory import FP32_BYTES, Footprint, Memory, MicroStep, Way, memory_of, ways
from trainer.planning.sizes import checkpoint_files, footprint, save_buffers
from trainer.recipe import Batch, Data, Recipe
from trainer.reporting.plot import plot_learning_rate
from trainer.setup import cut_warmup, load_data, make_optimizer, total_steps

READ_SAMPLES = 32
"""of a micro-batch, for the length of its longest"""
FITS = 0.92
"""of a card's memory: the rest is the driver's, and lost between tensors"""
NOT_COUNTED = MicroStep(0, 0, 0.0)
COLUMNS = ("weights", "gradients", "moments", "buffers", "activations", "device", "host")


@dataclass(frozen=True)
class Measured:
    """What is known of a run from its shapes."""

    net: Footprint
    flops: float
    """of a micro-step of one process"""
    files: list[int]
    """bytes of each file of tensors of a checkpoint"""
    optimizer: Optimizer
    notes: list[str]


def plan(recipe: Recipe, parsed: Parsed, argv: Sequence[str], flags: PlanFlags, environ: Mapping[str, str]) -> list[str]:
    """The lines of a plan for the launch that `environ` describes; draws the learning rate. UserError as the run raises it."""
    said: list[str] = []
    config, resumes = config_of(recipe, parsed, argv, said.append)
    run = config.run
    processes = int(environ.get("WORLD_SIZE") or 1)
    place = place_of(flags.gpu, run.device, environ, int(environ.get("LOCAL_WORLD_SIZE") or processes))
    on_gpu = place.card is not None
    precision = precision_on(requested_precision(run.mixed_precision), on_gpu, place.card is not None and place.card.has_bf16)
    stream.share(config.optimisation.batch_size, 0, processes)
    own = way_of(environ, config.optimisation, processes, precision, run.mixed_precision)

    if run.fit_batch and not resumes:
        effective = config.optimisation.effective_batch_size
        said.append(f"--fit_batch: counted as typed; the run splits its {effective} samples a step so that they just fit")
    unread = dataclasses.replace(config, optimisation=dataclasses.replace(config.optimisation, init_from=None))
    data = load_data(recipe, unread, alone())  # weights are not looked at
    samples = stream.length_of(data.train)
    steps = total_steps(config, samples)
    config = config if resumes else cut_warmup(config, parsed.typed, steps, lambda _: None)
    o = config.optimisation
    measured = measure(recipe, config, data, own, precision, on_gpu)
    sizes = {way: memory_of(way, measured.net) for way in (own, *others(own, measured))}
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


def measure(recipe: Recipe, config: Any, data: Data, own: Way, precision: str, on_gpu: bool) -> Measured:
    """Build the network without memory, and count a micro-step of it."""
    network, _ = build_empty_network(recipe, config, data)
    if own.kind != "plain":
        check_dimensions(network)
    if own.kind == "fsdp":
        blocks(network)
    # An optimizer may want a device that computes: shapes on the CPU, without memory.
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
    except RuntimeError as error:  # an operation that looks at values, or is not known for shapes alone
        notes.append(f"  Activations are NOT in it, as they cannot be counted without memory: {one_line(error, 150)}")
    accumulates = config.optimisation.gradient_accumulation_steps > 1
    return Measured(footprint(network, layout, counts, accumulates), counts[0].flops, files, optimizer, notes)


def others(own: Way, measured: Measured) -> list[Way]:
    """The ways that this launch is not, but could be."""
    kinds = {"plain"}
    if not getattr(measured.optimizer, "needs_whole_matrices", False):
        kinds |= {"zero", "fsdp"}
    return [way for way in ways(own.processes) if way.kind in kinds and way.name != own.name]


def micro_batch(recipe: Recipe, data: Data, config: Any, processes: int) -> tuple[Batch, list[str]]:
    """(a micro-batch of the process with the most samples, without values; the loss terms), by its first samples."""
    o, last = config.optimisation, processes - 1
    order = stream.TrainingOrder(o.batch_size, last, processes, o.seed, stream.length_of(data.train), 0)
    numbers = next(iter(order))
    if getattr(data.train, "on_device", False):
        data.train.to(torch.device("cpu"))
    read = first_batch(data.train, numbers[:READ_SAMPLES], config.run)
    return {name: tensor.new_empty(len(numbers), *tensor.shape[1:]) for name, tensor in read.items()}, [*recipe.items(read)]


def table(sizes: Mapping[Way, Memory], copies: int) -> list[str]:
    """A row for each way, the launch's own first; `copies`: bytes of host memory that saving takes beside it."""
    width = max(len(way.name) for way in sizes)
    unit, name = (1e9, "GB") if max(memory.device for memory in sizes.values()) >= 1e9 else (1e6, "MB")
    lines = [
        f"Memory of each process at its highest, in {name}:",
        f"  {'':{width}}" + "".join(f"{column:>12}" for column in COLUMNS),
    ]
    for number, (way, memory) in enumerate(sizes.items()):
        cells = [*(getattr(memory, column) for column in COLUMNS[:-1]), memory.host + copies]
        lines.append(f"{'  ' if number else '> '}{way.name:{width}}" + "".join(f"{size / unit:12,.2f}" for size in cells))
    return [*lines, f"  (host: what is offloaded, and {size_text(copies)} in which a save is copied)"]


def hours_of(flops: float, place: Place, precision: str, mfu: float) -> float | None:
    """Of all steps, from the FLOPs of one process. None where the peak is not known: on a CPU, in fp32, on other cards."""
    if place.card is None or place.card.flops is None or precision == "no" or not flops:
        return None
    return flops / (mfu * place.card.flops) / 3600


def work_lines(step_flops: float, steps: int, hours: float | None, place: Place, mfu: float) -> list[str]:
    """FLOPs and hours."""
    total = f"Work: {step_flops:.3g} FLOPs a step, {step_flops * steps:.3g} in all"
    if hours is None:
        return [f"{total}; for hours the peak of a card in bf16 or fp16 is wanted (--gpu)"]
    assert place.card is not None
    assert place.card.flops is not None
    return [f"{total}: {time_text(hours)} at {mfu:.0%} of {place.card.flops / 1e12:.0f} TFLOP/s each (--mfu)"]


def checkpoint_lines(run: Any, steps: int, effective: int, samples: int | None, size: int, hours: float | None) -> list[str]:
    """What saves write, those of new bests too, and what of it stays on the disk."""
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
    """How many evaluations in `length` steps, or epochs, fall on no save. 0: none of these."""
    if not eval_every:
        return 0
    return length // eval_every - (length // math.lcm(eval_every, save_every) if save_every else 0)


def advice(sizes: Mapping[Way, Memory], own: Way, place: Place, processes: int, recomputes: bool) -> str:
    """Which launch to take: the plainest that fits, as what is cut costs talk, and what is offloaded more."""

    def needed(memory: Memory) -> float:
        return (memory.device + (memory.host if place.card is None else 0)) / 1e9

    def shown(way: Way) -> str:
        gigabytes = needed(sizes[way])
        return f"{gigabytes:.0f}" if gigabytes >= 10 else f"{gigabytes:.2g}"

    order = {"plain": 0, "fsdp": 1, "zero": 2}
    ordered = sorted(sizes, key=lambda way: (bool(way.offload), order[way.kind], -way.shards, -way.stage))
    plain, where = ordered[0], f"{processes} x {place.gigabytes:.4g} GB"
    best = next((way for way in ordered if needed(sizes[way]) <= FITS * place.gigabytes), None)
    if best is None:
        least = min(ordered, key=lambda way: needed(sizes[way]))
        ways_out = "a smaller --batch_size with more --gradient_accumulation_steps, or more processes"
        more = "" if recomputes else "--gradient_checkpointing, "
        return f"{where}: too little even for {least.name}, {shown(least)} GB each; {more}{ways_out}"
    because = "what is cut or offloaded would be slower" if best == plain else f"{plain.name} takes {shown(plain)}"
    line = f"{where}: {best.name}, {shown(best)} of {place.gigabytes:.4g} GB; {because}"
    if needed(sizes[own]) > FITS * place.gigabytes and own != plain:
        line += f", {own.name} (this launch) {shown(own)}"
    return line


def time_text(hours: float) -> str:
    """A time in hours, minutes or seconds."""
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return f"{60 * hours:.1f} minutes" if hours >= 1 / 60 else f"{3600 * hours:.2g} seconds"


def size_text(size_bytes: float) -> str:
    """A size in MB, GB or TB."""
    unit, name = next(
        (unit, name) for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")) if size_bytes >= unit or name == "MB"
    )
    return f"{size_bytes / unit:.2f} {name}"
