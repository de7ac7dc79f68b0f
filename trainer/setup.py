"""From a plan to a model that can take a step. `set_up` is the list of its steps, which follow below it."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.attention_kernels import attention_kernels
from trainer.backends import backend_of
from trainer.backends.backend import Backend
from trainer.backends.blocks import recompute_activations
from trainer.backends.tensors import TensorForm
from trainer.checkpoints.checkpoint import STATE, Checkpoint
from trainer.checkpoints.network import build_empty_network, differences, first_weights, optimizer_fits
from trainer.checkpoints.resume import LaunchPlan
from trainer.checks import check_batch_norm, check_data, check_same_everywhere, first_sample, warn_of_other_tokenizer
from trainer.data import loader, stream
from trainer.distributed.launch import Launch, resolve_precision
from trainer.errors import UserError, one_line
from trainer.evaluation.objective import Objective, objective_weights
from trainer.micro_batches import fit_to_memory, in_one_micro_batch
from trainer.optimisation.averages import keep_averages
from trainer.optimisation.schedule import described, warmup_for
from trainer.recipe import Batch, Data, Log, Recipe


@dataclass(kw_only=True)
class Session:
    """What the loop trains with: recipe, configuration, launch, data and model."""

    recipe: Recipe
    config: Any
    launch: Launch
    data: Data
    network: nn.Module
    """the bare network, whose names a checkpoint uses"""
    backend: Backend
    """`backend.model` is the prepared objective"""
    loss_weights: dict[str, float]
    """{loss term: its weight in the objective}, in the order of the terms"""
    total_steps: int
    extra_files: Mapping[str, str | Mapping[str, Tensor]]
    """{name: content} of the files that the recipe adds to each checkpoint"""

    def __post_init__(self) -> None:
        self.samples = stream.length_of(self.data.train)
        """samples in an epoch; None for an endless stream"""

    def exact_epochs(self, step: int) -> float:
        """Epochs read after `step` steps, as a fraction; 0 for an endless stream."""
        return step * self.config.optimisation.effective_batch_size / self.samples if self.samples else 0.0

    def epochs(self, step: int) -> int:
        """Whole epochs read after `step` steps; 0 for an endless stream."""
        return max(0, step) * self.config.optimisation.effective_batch_size // self.samples if self.samples else 0

    def training_batches(self, step: int, stop_requested: Callable[[], bool] = lambda: False) -> Iterator[Batch]:
        """This process's part of every micro-batch after step `step`, for ever."""
        o, launch = self.config.optimisation, self.launch
        order = stream.TrainingOrder(
            o.batch_size,
            launch.rank,
            launch.processes,
            o.seed,
            self.samples,
            first_micro_batch=step * o.gradient_accumulation_steps,
            repeated=o.overfit_batch * o.gradient_accumulation_steps,
        )
        return loader.read(self.data.train, order, self.config.run, launch.device, stop_requested)


def set_up(recipe: Recipe, plan: LaunchPlan, launch: Launch, log: Log) -> Session:
    """Everything up to the first step. Collective. UserError for whatever does not fit together."""
    backend = make_backend(plan.config, launch)
    data = load_data(recipe, plan.config, launch)
    check_data(recipe, data, plan, launch, log)
    for note in data.notes:
        log(note)
    steps = total_steps(plan.config, stream.length_of(data.train))
    config = plan.config if plan.checkpoint else cut_warmup(plan.config, plan.typed, steps, log)
    if config.run.fit_batch and not plan.checkpoint:  # a checkpoint has the size that was found
        config = dataclasses.replace(config, optimisation=in_one_micro_batch(config.optimisation))

    network, initial = build_empty_network(recipe, config, data)
    weights = first_weights(recipe, network, initial, plan.checkpoint, config.optimisation.init_from, launch.control, log)
    check_same_everywhere(network, data, launch)
    check_batch_norm(network, launch)
    sample = first_sample(config, data)
    loss_weights = objective_weights(recipe, config, recipe.items(sample))
    extra_files = recipe.checkpoint_files(config, network, data)
    if config.optimisation.init_from and not plan.checkpoint and "tokenizer.json" in extra_files:
        warn_of_other_tokenizer(config.optimisation.init_from, str(extra_files["tokenizer.json"]), log)

    if kernels := attention_kernels(network, recipe, sample, launch.device, backend.precision):
        log(f"Attention: {kernels}")
    recompute_activations(network, config.run.recompute_every)
    objective = Objective(network, recipe, list(loss_weights))
    on_gpu = launch.device.type == "cuda"
    if config.run.compile == "yes" or (config.run.compile == "auto" and on_gpu and backend.gains_by_compiling):
        backend.compile(objective, config.run.compile_mode)
        log("Compiling: the first step takes up to minutes (--no_compile turns it off)")
    backend.prepare(objective, network, lambda: make_optimizer(recipe, network, config), weights)
    if plan.checkpoint is not None:
        restore(backend, plan.checkpoint, extra_files, list(loss_weights), log)
        plan.checkpoint.close()
    for note in backend.notes():
        log(note)
    session = Session(
        recipe=recipe,
        config=config,
        launch=launch,
        data=data,
        network=network,
        backend=backend,
        loss_weights=loss_weights,
        total_steps=steps,
        extra_files=extra_files,
    )
    if config.run.fit_batch:
        fit_to_memory(session, plan.checkpoint.train_state.step if plan.checkpoint else 0, log)
    return session


def make_optimizer(recipe: Recipe, network: nn.Module, config: Any) -> torch.optim.Optimizer:
    """The recipe's optimizer; with `--ema` it also averages the weights."""
    optimizer, decay = recipe.optimizer(network, config), config.optimisation.ema
    return keep_averages(optimizer, decay) if decay else optimizer


def restore(backend: Backend, saved: Checkpoint, extra_files: Mapping[str, Any], terms: Sequence[str], log: Log) -> None:
    """Restore optimizer and loss scale from a checkpoint, whose weights the backend has already.

    UserError, before either is changed, for what does not fit this launch.
    """
    for file, tensors in extra_files.items():
        if not isinstance(tensors, str):
            check_extra_tensors(saved, file.removesuffix(".safetensors"), tensors)
    state = saved.train_state
    if {len(state.loss_sums), len(state.item_counts)} - {0, len(terms)}:
        raise saved.damaged(STATE, f"has sums of {len(state.loss_sums)} loss terms, and the recipe has {', '.join(terms)}")
    fits = optimizer_fits(saved, backend.state_layout)
    if not fits:
        log("The optimizer of the checkpoint kept another state: this one starts afresh")
    backend.restore(saved, fits)
    backend.restore_loss_scale(saved.state["loss_scale"])


def check_extra_tensors(saved: Checkpoint, stem: str, tensors: Mapping[str, Tensor]) -> None:
    """UserError unless the tensors that the recipe has made from the seed are those that the checkpoint holds."""
    wrong = differences(saved, stem, {name: TensorForm(tuple(t.shape), t.dtype) for name, t in tensors.items()})
    for name, tensor in tensors.items():
        # Not bit for bit: other processors and versions of torch round random numbers differently.
        if not wrong and not torch.allclose(saved.tensor(stem, name, finite=False), tensor.cpu(), 1e-4, equal_nan=True):
            wrong = f"{name} has other values"
    if wrong:
        raise saved.damaged(f"{stem}.safetensors", f"is not what this launch makes from the same seed ({wrong})")


def make_backend(config: Any, launch: Launch) -> Backend:
    """The backend of this launch, in the requested precision. UserError for flags that do not go with it."""
    optimisation, run = config.optimisation, config.run
    stream.share(optimisation.batch_size, launch.rank, launch.processes)  # UserError for more processes than samples
    backend_class = backend_of(os.environ)
    if run.log_grad_norms and not backend_class.supports_layer_norms:
        raise UserError(
            "--log_grad_norms needs the gradients of each layer, and ZeRO flattens them; leave it out, or use FSDP or DDP"
        )
    if run.fit_batch and not backend_class.survives_out_of_memory:
        raise UserError("--fit_batch needs one process or DDP: what is sharded cannot go on where memory ran out; leave it out")
    precision = resolve_precision(run.mixed_precision, launch)
    torch.set_float32_matmul_precision("high" if run.tf32 else "highest")
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return backend_class(launch, precision, run.mixed_precision, optimisation)


def load_data(recipe: Recipe, config: Any, launch: Launch) -> Data:
    """Build the data: on each host one process first, so that the others find its cache. Collective."""
    data, error = None, None
    for first_turn in (True, False):
        if (launch.local_rank == 0) == first_turn and error is None:
            try:
                data = recipe.build_data(config)
            except (ValueError, OSError) as reason:
                error = UserError(one_line(reason))
                error.__cause__ = reason
        launch.control.raise_if_any(error)
    assert data is not None
    for name, dataset in {"train": data.train, **data.evaluation}.items():
        if not hasattr(dataset, "__getitems__"):
            raise UserError(
                f"the {name} set, a {type(dataset).__name__}, lacks __getitems__, which makes a batch of sample numbers; add it"
            )
        if stream.length_of(dataset) == 0:
            raise UserError(f"the {name} set is empty; give more data")
    return data


def total_steps(config: Any, samples: int | None) -> int:
    """Optimizer steps of the whole run: `max_steps`, or as many as `max_epochs` take, rounded up."""
    optimisation = config.optimisation
    if optimisation.max_steps:
        return optimisation.max_steps
    if samples is None:
        raise UserError("this data set has no end, so max_epochs means nothing; give --max_steps")
    return math.ceil(optimisation.max_epochs * samples / optimisation.effective_batch_size)


def cut_warmup(config: Any, typed: Container[str], steps: int, log: Log) -> Any:
    """The config of a fresh run, where a warm-up that was not typed is cut to a tenth of the run.

    The cut value is saved with the config, so that a resumed run keeps it, also if it is made longer.
    """
    optimisation = config.optimisation
    if "warmup_steps" in typed:
        return config
    warmup, message = warmup_for(optimisation.warmup_steps, steps)
    if message:
        log(message)
    return dataclasses.replace(config, optimisation=dataclasses.replace(optimisation, warmup_steps=warmup))


def describe(session: Session, step: int) -> list[str]:
    """The lines printed before the first step of a launch, step + 1."""
    network, config, launch = session.network, session.config, session.launch
    shapes = {entry.name: entry.shape for entry in session.backend.model_tensors()}
    sizes = [(math.prod(shapes[name]), p.requires_grad) for name, p in network.named_parameters()]
    parameters, trained = sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)
    precision = {"no": "fp32", "bf16": "bf16", "fp16": "fp16 with loss scaling"}[session.backend.precision]
    optimisation = config.optimisation
    by_name = f"{described(optimisation)} ({optimisation.schedule})"
    schedule = session.recipe.report.schedule(config) if optimisation.schedule == "recipe" else by_name
    return [
        f"Launch: {session.backend.name}, {launch.processes} x {launch.device.type}, {precision}, "
        f"{torch.get_num_threads()} CPU threads each",
        f"Parameters: {parameters:,} ({trained:,} trained)",
        *stream.describe(
            optimisation.batch_size,
            optimisation.gradient_accumulation_steps,
            launch.processes,
            session.total_steps,
            session.samples,
        ),
        f"Optimizer: {type(session.backend.optimizer).__name__}, {schedule}; "
        f"weight decay {optimisation.weight_decay:g}; clip {optimisation.grad_clip:g}"
        + (f"; evaluated is the average of the weights, decay {optimisation.ema:g}" if optimisation.ema else ""),
        *session.recipe.report.start_lines(step, session.total_steps, launch.device.type, parameters, trained),
    ]
