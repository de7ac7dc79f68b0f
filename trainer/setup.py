"""From a plan to a model that can take a step: data, network, weights, optimizer, `prepare`, restored moments."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer import batches, optimizer
from trainer.checkpoint import ENDINGS as CHECKPOINT_ENDINGS
from trainer.checkpoint import Checkpoint
from trainer.errors import CHECKPOINT, Refusal
from trainer.evaluation import Objective
from trainer.launch import Launch, accelerator, precision
from trainer.portable_state import PlainState, ZeroState, saved_buffers
from trainer.recipe import Data, Recipe
from trainer.resume import Plan
from trainer.schedule import warmup_for
from trainer.update import DeepSpeedUpdate, LossScale, PlainUpdate

Say = Callable[[str], None]


@dataclass
class Session:
    """Everything the loop works with."""

    recipe: Recipe
    config: Any
    launch: Launch
    data: Data
    network: nn.Module
    """the bare network, whose names a checkpoint uses"""
    model: Any
    """the prepared objective"""
    update: PlainUpdate | DeepSpeedUpdate
    state: PlainState | ZeroState
    weights: dict[str, float]
    """objective weight by loss term, in the order of the terms"""
    precision: str
    total_steps: int
    documents: dict[str, str]


def load_data(recipe: Recipe, config: Any, launch: Launch) -> Data:
    """Build the data, one process of each host first, so that the others find its cache. Collective."""
    data, error = None, None
    for turn in (True, False):
        if (launch.local_rank == 0) == turn and error is None:
            try:
                data = recipe.build_data(config)
            except (ValueError, OSError) as reason:
                error = Refusal(" ".join(str(reason).split()))
                error.__cause__ = reason
        launch.control.agree(error)
    assert data is not None
    for name, dataset in {"train": data.train, **data.evaluation}.items():
        if batches.length_of(dataset) == 0:
            raise Refusal(f"the {name} set is empty; give more data")
    return data


def total_steps(config: Any, samples: int | None) -> int:
    """Optimizer steps of the whole run: `max_steps`, or what `max_epochs` comes to (the last one may read on)."""
    optimisation = config.optimisation
    if optimisation.max_steps:
        return optimisation.max_steps
    if samples is None:
        raise Refusal("this data set has no end, so max_epochs means nothing; give --max_steps")
    return math.ceil(optimisation.max_epochs * samples / optimisation.effective_batch_size)


def seed_everything(device: torch.device, seed: int, *parts: object) -> None:
    """Seed torch's generators from a hash: dropout needs no generator state in a checkpoint, evaluation cannot disturb it."""
    value = batches.hash32(seed, *parts)
    torch.default_generator.manual_seed(value)  # torch.manual_seed takes a hundred times longer
    if device.type == "cuda":
        index = torch.cuda.current_device()  # on a line of its own: it is what fills `default_generators`
        torch.cuda.default_generators[index].manual_seed(value)


def build_network(recipe: Recipe, config: Any, data: Data) -> nn.Module:
    """The bare network, on the host, with fresh weights from the run's seed."""
    seed_everything(torch.device("cpu"), config.optimisation.seed, "initial weights")
    try:
        return recipe.build_model(config, data)
    except (ValueError, OSError) as reason:
        raise Refusal(" ".join(str(reason).split())) from reason


def load_weights(network: nn.Module, found: Checkpoint) -> None:
    """Copy a checkpoint's weights into a bare network. Refusal, before anything is changed, listing what does not fit."""
    wanted = {name: tuple(p.shape) for name, p in network.named_parameters()}
    wanted |= {name: tuple(b.shape) for name, b in saved_buffers(network)}
    have = {name: found.shape("model", name) for name in found.names("model")}
    wrong = [f"{n}: {have.get(n, 'missing')} instead of {s}" for n, s in wanted.items() if have.get(n) != s]
    wrong += [f"{n}: not in this model" for n in sorted(set(have) - set(wanted))]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise Refusal(f"{found.path} holds another model: {'; '.join(wrong[:4])}{more}; give its model flags", CHECKPOINT)
    targets = dict(network.named_parameters()) | dict(saved_buffers(network))
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(found.tensor("model", name))


def _initial_weights(recipe: Recipe, network: nn.Module, name: str) -> None:
    folder = Path(re.sub(CHECKPOINT_ENDINGS, "", name))
    # One of ours is always checked, also if its manifest is what was lost.
    if any((folder / file).exists() for file in ("manifest.json", "trainer_state.json")):
        found = Checkpoint(folder)
        found.verify()
        load_weights(network, found)
        return
    try:
        weights = recipe.pretrained(name)
    except (ValueError, OSError) as reason:
        raise Refusal(f"--init_from {name}: {' '.join(str(reason).split())}") from reason
    try:
        network.load_state_dict(weights)
    except RuntimeError as reason:
        raise Refusal(
            f"--init_from {name} holds another model: {' '.join(str(reason).split())[:600]}; give its model flags"
        ) from None


def _check_data(recipe: Recipe, data: Data) -> None:
    """Refusal for what would show hours later: at the first evaluation, or never when a run is resumed with other data."""
    if not data.fingerprint:
        raise Refusal("build_data gives no fingerprint; give a hash of what decides the samples, to know the data again")
    measured = [recipe.best_metric, *([recipe.patience_metric[0]] if recipe.patience_metric else [])]
    for metric in measured if data.evaluation else ():
        if not any(metric.startswith(f"{name}_") for name in data.evaluation):
            sets = ", ".join(data.evaluation)
            raise Refusal(
                f"{metric} is to be watched, but the evaluation sets are called {sets}; a metric is SET_NAME, val_loss"
            )


def _same_everywhere(network: nn.Module, data: Data, launch: Launch) -> None:
    """Gradients are summed by position, and samples dealt out by number: both must mean the same on every process."""
    sets = {"train": data.train, **data.evaluation}
    text = data.fingerprint + ";".join(f"{name}{batches.length_of(dataset)}" for name, dataset in sets.items())
    text += ";".join(f"{name}{tuple(p.shape)}" for name, p in network.named_parameters())
    digest = hashlib.sha256(text.encode()).hexdigest()
    same = launch.control.broadcast(digest) == digest
    differs = f"rank {launch.rank} built another model or data set than rank 0 (names, shapes or order of parameters, contents)"
    launch.control.agree(None if same else Refusal(f"{differs}; are versions and files the same on every host?"))


def assemble(recipe: Recipe, plan: Plan, launch: Launch, say: Say) -> Session:
    """Everything up to the first step. Collective. Refusal for whatever does not fit together."""
    config, found = plan.config, plan.checkpoint
    optimisation, run = config.optimisation, config.run
    batches.share(optimisation.batch_size, launch.processes)
    if run.log_grad_norms and launch.deepspeed:
        raise Refusal("--log_grad_norms reads whole gradients, which ZeRO does not keep; leave it out, or use DDP")
    mixed_precision = precision(run.mixed_precision, launch)
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    made = accelerator(launch, mixed_precision, optimisation, run.mixed_precision)

    data = load_data(recipe, config, launch)
    _check_data(recipe, data)
    for note in data.notes:
        say(note)
    if found is not None:
        trained_on, here = found.state["data_fingerprint"], data.fingerprint
        way_out = f"restore the data, or take the weights only: --init_from {found.path}"
        text = f"data fingerprint: {found.path} was trained on {trained_on[:12]}, this is {here[:12]}; {way_out}"
        launch.control.agree(None if trained_on == here else Refusal(text))
    samples = batches.length_of(data.train)
    steps = total_steps(config, samples)
    if found is None and "warmup_steps" not in plan.typed:
        # Kept in the config as cut, so that a resumed run, longer perhaps, goes on with the same warm-up.
        warmup, message = warmup_for(optimisation.warmup_steps, steps)
        optimisation = dataclasses.replace(optimisation, warmup_steps=warmup)
        config = dataclasses.replace(config, optimisation=optimisation)
        if message:
            say(message)

    network = build_network(recipe, config, data)
    if found is not None:
        load_weights(network, found)
    elif optimisation.init_from:
        _initial_weights(recipe, network, optimisation.init_from)
        say(f"Initial weights from {optimisation.init_from}")
    _same_everywhere(network, data, launch)
    first = batches.sample_numbers(range(1), optimisation.seed, samples)
    terms = recipe.items(data.train.__getitems__(first))
    given = recipe.loss_weights(config)
    weights = {term: float(given.get(term, 1.0)) for term in terms}
    documents = recipe.documents(config, network, data)

    objective = Objective(network, recipe, list(weights))
    moments = optimizer.moments(optimisation.optimizer, optimisation.beta1)
    if run.compile:
        if launch.deepspeed:
            say("WARNING: --compile under ZeRO breaks the graph at every gathered layer and gains little")
        objective.compile()  # in place, before prepare: names stay bare, and one graph holds network and loss
    update: PlainUpdate | DeepSpeedUpdate
    state: PlainState | ZeroState
    if launch.deepspeed:
        built = optimizer.build(recipe.parameter_groups(network, config), network, optimisation)
        built.state.clear()  # ZeRO has its own, in flat partitions
        model, wrapped = made.prepare(objective, built)
        state = ZeroState(network, wrapped, moments, launch.processes, launch.rank)
        update = DeepSpeedUpdate(model, launch.processes, optimisation.gradient_accumulation_steps)
        if mixed_precision == "fp16":
            say("DeepSpeed fp16: weights are kept in fp16 between updates, so this run's numbers differ from DDP's")
        if model.bfloat16_enabled():
            say("DeepSpeed bf16.enabled: weights are kept in bf16, so this run's numbers differ from DDP's")
    else:
        model = made.prepare(objective)
        built = optimizer.build(recipe.parameter_groups(network, config), network, optimisation)  # where the weights are now
        state = PlainState(network, built, moments)
        scale = LossScale(launch.device) if mixed_precision == "fp16" else None
        update = PlainUpdate(model, built, scale, launch.processes, optimisation.grad_clip)
    if found is not None:
        if isinstance(state, ZeroState):
            state.restore_weights(found.names("model"), lambda name: found.tensor("model", name))
        state.restore_optimizer(found.names("optimizer"), lambda name: found.tensor("optimizer", name))
        update.restore_loss_scale(found.state["loss_scale"])
    return Session(recipe, config, launch, data, network, model, update, state, weights, mixed_precision, steps, documents)


def describe(session: Session, step: int) -> list[str]:
    """What is printed before the first step of a launch, which begins after `step`."""
    network, config, launch = session.network, session.config, session.launch
    sizes = [math.prod(getattr(p, "ds_shape", p.shape)) for p in network.parameters()]
    trained = [math.prod(getattr(p, "ds_shape", p.shape)) for p in network.parameters() if p.requires_grad]
    backend = "DeepSpeed ZeRO" if launch.deepspeed else "DDP" if launch.processes > 1 else "one process"
    names = {"no": "fp32", "bf16": "bf16", "fp16": "fp16 with loss scaling"}
    optimisation = config.optimisation
    return [
        f"Launch: {backend}, {launch.processes} x {launch.device.type}, {names[session.precision]}, "
        f"{torch.get_num_threads()} CPU threads each",
        f"Parameters: {sum(sizes):,} ({sum(trained):,} trained)",
        *batches.describe(
            optimisation.batch_size,
            optimisation.gradient_accumulation_steps,
            launch.processes,
            session.total_steps,
            batches.length_of(session.data.train),
        ),
        f"Optimizer: {optimisation.optimizer}, {session.recipe.schedule_text(config)}; "
        f"weight decay {optimisation.weight_decay:g}; clip {optimisation.grad_clip:g}",
        *session.recipe.start_lines(step, session.total_steps, launch.device.type, sum(sizes), sum(trained)),
    ]
