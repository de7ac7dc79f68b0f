"""The flags of the regression PFN, with the guide's defaults, and what they must satisfy."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from tyro.conf import arg

from trainer import sections
from trainer.errors import Refusal

POOL_NUMBERS = 2**31  # 8 GiB of task vectors


@dataclass(frozen=True)
class Model:
    """The network."""

    d_model: int = 128
    """width"""
    num_layers: Annotated[int, arg(aliases=("--n_layers",))] = 2
    num_heads: Annotated[int, arg(aliases=("--n_heads", "--nhead"))] = 2
    d_ff: Annotated[int | None, arg(aliases=("--d_mlp",))] = None
    """width of the MLP (default: 2 x d_model)"""
    d_vocab: int = 128
    """bins of y"""
    y_range: Literal["auto"] | float = "auto"
    """bins lie on [-y_range, y_range]; auto: 4 standard deviations of y, 4 sqrt(task_size + noise)"""
    y_min: float | None = None
    """lower end of the bins, instead of -y_range"""
    y_max: float | None = None
    """upper end of the bins"""


@dataclass(frozen=True)
class Tasks:
    """The tasks, and the sequences drawn from them."""

    num_tasks: int = 1024
    """size of the pool of pretraining tasks (0: infinitely many)"""
    task_size: int = 16
    """dimension of x and w"""
    examples: Annotated[int, arg(aliases=("--num_examples",))] = 64
    """pairs (x, y) in a sequence"""
    noise: float = 0.25
    """variance of y around w.x"""
    task_seed: int = 0
    """seed of the pool, which does not depend on the run's seed"""
    val_sequences: int = 1024
    """fresh sequences of each evaluation in training"""
    stack: tuple[int, ...] = ()
    """one model for each of these pool sizes, trained as one network (num_tasks is then unused); see `sweep --stacked`"""


@dataclass(frozen=True)
class Optimisation(sections.Optimisation):
    """The guide's: Adam without decay or clipping, and a one-cycle learning rate."""

    batch_size: Annotated[int, arg(aliases=("--batch",))] = 1024
    """sequences of one micro-step, summed over all processes"""
    max_steps: Annotated[int, arg(aliases=("--max_iters", "--steps"))] = 500_000
    """optimizer steps of the whole run, and of the one cycle"""
    learning_rate: Annotated[float, arg(aliases=("--lr",))] = 1e-3
    """peak of the one cycle, at half of max_steps"""
    warmup_steps: Annotated[int, arg(aliases=("--warmup_iters",))] = 0
    """not used: the one cycle follows from max_steps and learning_rate alone"""
    optimizer: Literal["adamw", "adam", "sgd", "muon"] = "adam"
    weight_decay: float = 0.0
    beta2: float = 0.999
    grad_clip: float = 0.0
    """largest global gradient norm (0: no clipping)"""


@dataclass(frozen=True)
class Run(sections.Run):
    """Checkpoints by number, and the comparison with exact baselines at the end."""

    checkpoints: int | None = None
    """checkpoints spread over the run, the final one included; wins over save_every (default: 10)"""
    save_every: Annotated[int | None, arg(aliases=("--checkpoint_interval",))] = None
    """optimizer steps between checkpoints"""
    eval_every: Annotated[int | None, arg(aliases=("--eval_interval",))] = None
    """optimizer steps between evaluations (default: at each checkpoint)"""
    keep_last: int = 0
    """step checkpoints to keep (0: all)"""
    eval_sequences: int = 10_000
    """fresh sequences per distribution for the comparison with ridge and dMMSE after training (0: none)"""
    eval_batch: int = 256
    """sequences of one forward there"""


@dataclass(frozen=True)
class Config:
    """Train a transformer on linear regression in context, with tasks from a pool."""

    model: Model = field(default_factory=Model)
    data: Tasks = field(default_factory=Tasks)
    optimisation: Optimisation = field(default_factory=Optimisation)
    run: Run = field(default_factory=Run)

    def resolved(self) -> Config:
        """With the values that follow from others. Refusal where they do not fit together.

        `checkpoints` becomes a `save_every`: what a saved run has in it was then typed anew, and acts when it is resumed.
        """
        _check(self)
        run, model = self.run, self.model
        save_every = run.save_every
        if run.checkpoints is not None or save_every is None:
            save_every = -(-self.optimisation.max_steps // (run.checkpoints or 10))
        eval_every = save_every if run.eval_every in (None, run.save_every) else run.eval_every
        model = replace(model, d_ff=model.d_ff or 2 * model.d_model)
        return replace(self, model=model, run=replace(run, checkpoints=None, save_every=save_every, eval_every=eval_every))

    def y_bounds(self) -> tuple[float, float]:
        """The ends of the bins."""
        m = self.model
        reach = 4 * math.sqrt(self.data.task_size + self.data.noise) if m.y_range == "auto" else float(m.y_range)
        return -reach if m.y_min is None else m.y_min, reach if m.y_max is None else m.y_max


def _check(config: Config) -> None:
    m, d, o, run = config.model, config.data, config.optimisation, config.run
    for name, value, least in (
        ("num_tasks", d.num_tasks, 0),
        ("task_size", d.task_size, 1),
        ("examples", d.examples, 1),
        ("val_sequences", d.val_sequences, 1),
        ("d_vocab", m.d_vocab, 3),
        ("checkpoints", run.checkpoints, 1),
        ("eval_sequences", run.eval_sequences, 0),
        ("eval_batch", run.eval_batch, 1),
        *(("stack", size, 0) for size in d.stack),
    ):
        if value is not None and value < least:
            raise Refusal(f"{name} {value} must be at least {least}")
    if run.eval_sequences == 1:
        raise Refusal("eval_sequences 1 gives no standard error; give at least 2, or 0 for no comparison")
    if d.noise < 1e-9:
        raise Refusal(f"noise {d.noise} must be at least 1e-9: it is a variance, and the exact baselines divide by it")
    if m.d_model % m.num_heads:
        raise Refusal(f"d_model {m.d_model} does not divide into {m.num_heads} heads; give a --num_heads that divides it")
    if (low := config.y_bounds()[0]) >= (high := config.y_bounds()[1]):
        raise Refusal(f"the bins of y would lie on [{low:g}, {high:g}]; give a y_min below y_max, and a y_range above 0")
    if o.max_steps < 6:
        raise Refusal(f"max_steps {o.max_steps} is too short for the one-cycle schedule; give at least 6")
    largest = max((d.num_tasks, *d.stack))
    if largest * d.task_size > POOL_NUMBERS:
        raise Refusal(f"a pool of {largest:,} tasks of size {d.task_size} takes over 8 GiB; lower num_tasks")
    if len(set(d.stack)) < len(d.stack):
        raise Refusal(f"stack {' '.join(map(str, d.stack))} names a number of tasks twice; give each once")
    if d.stack and o.optimizer == "muon":
        raise Refusal("muon takes matrices, and stacked models have them in one tensor of three dimensions; use adam")
    if d.stack and (run.patience or run.target_loss is not None):
        name = "patience" if run.patience else "target_loss"
        raise Refusal(f"{name} would watch the sum of all stacked models' losses; leave it out")
    if d.stack and o.grad_clip:
        raise Refusal(f"grad_clip {o.grad_clip:g} would couple the stacked models through their common norm; leave it at 0")
