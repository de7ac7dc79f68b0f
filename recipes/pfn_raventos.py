"""Linear regression in context: `accelerate launch recipes/pfn_raventos.py [train|sweep|plot|evaluate|predict] ...`

A sample is a sequence of pairs (x, y) of one linear task; a prior-data fitted network (Müller et al. 2022, arXiv 2112.10510)
predicts each y from the pairs before it and its own x. `sweep` trains it on more and more tasks (Raventós et al. 2023, arXiv
2306.15063).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from recipes.commands.predictive_resampling import Predict, predict
from recipes.commands.regression_evaluation import Evaluate, evaluate, evaluate_after_training
from recipes.experiments.sweep_models import check_stack
from recipes.experiments.task_diversity import Plot, Sweep, plot, sweep
from trainer.command_line import sections
from trainer.command_line.bounds import AtLeast, NotNegative, Positive
from trainer.errors import UserError
from trainer.main import main
from trainer.optimisation.schedule import one_cycle
from trainer.recipe import Batch, Command, Data, Log, Recipe, Report
from trainer.reporting.run_directory import RunDirectory

if TYPE_CHECKING:
    from torch import Tensor, nn

CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    d_model: Annotated[int, Positive] = 128
    num_layers: Annotated[int, Positive, arg(aliases=("--n_layers",))] = 2
    num_heads: Annotated[int, Positive, arg(aliases=("--n_heads", "--nhead"))] = 2
    d_ff: Annotated[int | None, Positive, arg(aliases=("--d_mlp",))] = None
    """width of the MLP (default: 2 x d_model)"""
    d_vocab: Annotated[int, AtLeast(3)] = 128
    """bins of y"""
    y_range: Literal["auto"] | float = "auto"
    """bins lie on [-y_range, y_range]; auto: 4 standard deviations of y, 4 sqrt(task_size + noise)"""
    y_min: float | None = None
    """lower end of the bins, instead of -y_range"""
    y_max: float | None = None
    """upper end of the bins"""


@dataclass(frozen=True)
class DataConfig:
    """The tasks, and the sequences drawn from them."""

    num_tasks: Annotated[int, NotNegative] = 1024
    """size of the pool of pretraining tasks (0: infinitely many)"""
    task_size: Annotated[int, Positive] = 16
    """dimension of x and w"""
    examples: Annotated[int, Positive, arg(aliases=("--num_examples",))] = 64
    """pairs (x, y) in a sequence"""
    noise: Annotated[float, AtLeast(1e-9)] = 0.25
    """variance of y around w.x"""
    task_seed: int = 0
    """seed of the pool, which does not depend on the run's seed"""
    val_sequences: Annotated[int, Positive] = 1024
    """fresh sequences of each evaluation in training"""
    stack: Annotated[tuple[int, ...], NotNegative] = ()
    """one model for each of these pool sizes, trained as one network (num_tasks is then unused); see `sweep --stacked`"""


@dataclass(frozen=True)
class RunConfig(sections.Run):
    """Checkpoints by number, and the comparison with exact baselines at the end."""

    checkpoints: Annotated[int | None, Positive] = None
    """checkpoints spread over the run, the final one included; wins over save_every (default: 10)"""
    save_every: Annotated[int | None, NotNegative, arg(aliases=("--checkpoint_interval",))] = None  # type: ignore[assignment]
    """optimizer steps between checkpoints"""
    eval_every: Annotated[int | None, NotNegative, arg(aliases=("--eval_interval",))] = None  # type: ignore[assignment]
    """optimizer steps between evaluations (default: at each checkpoint)"""
    eval_sequences: Annotated[int, NotNegative] = 10_000
    """fresh sequences per distribution for the comparison with ridge and dMMSE after training (0: none)"""
    eval_batch: Annotated[int, Positive] = 256
    """sequences of one forward in that comparison"""


@dataclass(frozen=True)
class Config:
    """Train a transformer on linear regression in context, with tasks from a pool."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimisation: sections.Optimisation = sections.Optimisation(
        batch_size=1024,
        max_steps=500_000,
        learning_rate=1e-3,
        warmup_steps=0,
        optimizer="adam",
        weight_decay=0.0,
        beta2=0.999,
        grad_clip=0.0,
    )
    run: RunConfig = RunConfig(keep_last=0)

    unused = {"max_epochs": "tasks never run out; give --max_steps"} | dict.fromkeys(
        ("warmup_steps", "min_lr"), "the learning rate follows one cycle; give --schedule"
    )

    def resolved(self) -> Config:
        """With the values that follow from others. UserError where they contradict each other.

        `checkpoints` becomes a `save_every` and is then None: it acts on a resumed run only if it is typed again.
        """
        m, d, o, run = self.model, self.data, self.optimisation, self.run
        (low, high), largest = self.y_bounds(), max((d.num_tasks, *d.stack))
        if m.d_model % m.num_heads:
            raise UserError(f"d_model {m.d_model} does not divide into {m.num_heads} heads; give a --num_heads that divides it")
        if low >= high:
            raise UserError(f"the bins of y would lie on [{low:g}, {high:g}]; give a y_min below y_max, and a y_range above 0")
        if o.max_steps < 6:
            raise UserError(f"max_steps {o.max_steps} is too short for the one-cycle schedule; give at least 6")
        if run.eval_sequences == 1:
            raise UserError("eval_sequences 1 gives no standard error; give at least 2, or 0 for no comparison")
        if largest * d.task_size > 2**31:
            raise UserError(f"a pool of {largest:,} tasks of size {d.task_size} takes over 8 GiB; lower num_tasks")
        if d.stack:
            check_stack(self)
        spread = math.ceil(o.max_steps / (run.checkpoints or 10))
        save_every = spread if run.checkpoints or run.save_every is None else run.save_every
        eval_every = save_every if run.eval_every in (None, run.save_every) else run.eval_every
        run = replace(run, checkpoints=None, save_every=save_every, eval_every=eval_every)
        return replace(self, model=replace(m, d_ff=m.d_ff or 2 * m.d_model), run=run)

    def y_bounds(self) -> tuple[float, float]:
        """The lower end of the first bin, and the upper end of the last."""
        m, d = self.model, self.data
        reach = 4 * math.sqrt(d.task_size + d.noise) if m.y_range == "auto" else float(m.y_range)
        return -reach if m.y_min is None else m.y_min, reach if m.y_max is None else m.y_max


class PFNReport(Report[Config]):
    """What a run prints, and its comparison with ridge and dMMSE."""

    loss_unit = "nats per y"

    def schedule(self, config: Config) -> str:
        """A description of the one cycle."""
        o = config.optimisation
        first, last = (self.recipe.learning_rate(step, o.max_steps, config) for step in (1, o.max_steps))
        return f"one cycle, learning rate from {first:.3g} to {o.learning_rate:g} at half and down to {last:.3g}"

    def evaluation_line(self, step: int, metrics: Mapping[str, float]) -> str:
        """The console line of an evaluation; the metrics of each model of a stack are in metrics.jsonl only."""
        return super().evaluation_line(step, {name: value for name, value in metrics.items() if "_model_" not in name})

    def after_training(self, config: Config, data: Data, run: RunDirectory, checkpoint: Path, log: Log) -> None:
        """Compare squared errors and likelihoods with those of ridge and dMMSE, in evaluation.json."""
        evaluate_after_training(self.recipe, config, run, checkpoint, log)


class PFNRaventos(Recipe[Config]):
    """One model, or a stack of them as one network, with a loss term for each."""

    name = "pfn_raventos"
    config_class = Config
    report_class = PFNReport
    presets = {"quick": CONFIGS / "pfn_raventos_quick.yaml"}
    commands = {
        "sweep": Command(Sweep, sweep, {"quick": CONFIGS / "pfn_raventos_sweep_quick.yaml"}),
        "plot": Command(Plot, plot),
        "evaluate": Command(Evaluate, evaluate),
        "predict": Command(Predict, predict),
    }
    checkpoint_prefix = "model_checkpoint_"

    def build_data(self, config: Config) -> Data:
        """An endless stream from the pool (or pools), and fresh sequences to evaluate on, of the same tasks and of new ones."""
        from recipes.data.regression import RegressionSample, RegressionStream, task_pool

        d, seed = config.data, config.optimisation.seed
        pools = [task_pool(size, d.task_size, d.task_seed) for size in d.stack or (d.num_tasks,)]
        shape = (d.task_size, d.examples, d.noise)
        train = RegressionStream("train", seed, pools, *shape)
        same = RegressionSample(d.val_sequences, "validation", seed, pools, *shape)
        new = RegressionSample(d.val_sequences, "validation, true tasks", seed, [pool[:0] for pool in pools], *shape)
        notes = [f"{len(pools)} models as one network: the losses of a stack are sums over its models"] if d.stack else []
        # The samples depend on flags alone, and a resumed run cannot change these.
        return Data(train, {"val": same, "true": new}, fingerprint=train.VERSION, notes=notes, extra={"pools": pools})

    def build_model(self, config: Config, data: Data) -> nn.Module:
        """AutoregressivePFN; every model of a stack starts with the weights it would have alone."""
        from recipes.models.pfn import AutoregressivePFN, repeat_weights

        m, d = config.model, config.data
        y_min, y_max = config.y_bounds()
        sizes: dict[str, Any] = {"d_model": m.d_model, "num_layers": m.num_layers, "num_heads": m.num_heads, "d_ff": m.d_ff}
        sizes |= {"d_x": d.task_size, "d_vocab": m.d_vocab, "y_min": y_min, "y_max": y_max, "examples": d.examples}
        single = AutoregressivePFN(**sizes)
        return repeat_weights(single, AutoregressivePFN(**sizes, models=len(d.stack))) if d.stack else single

    def items(self, batch: Batch) -> dict[str, int]:
        """The number of predictions of each model: one for every example."""
        sequences, models, examples = batch["y"].shape
        return {f"model_{i}": sequences * examples for i in range(1, models + 1)}

    def loss(self, network: Any, batch: Batch) -> dict[str, Tensor]:
        """Summed cross entropy of the bins of y, of each model."""
        y = network.per_model(batch["y"])
        return dict(zip(self.items(batch), network.cross_entropy(network(batch["x"], y), y).unbind(), strict=True))

    def measure(self, network: Any, batch: Batch) -> dict[str, tuple[Tensor | float, Tensor | float]]:
        """Cross entropy, and the squared error of the mean prediction over the dimension of the task, of each model."""
        y, counts = network.per_model(batch["y"]), self.items(batch)
        logits = network(batch["x"], y)
        errors = (network.mean(logits) - y).square().view(len(counts), -1).sum(1) / batch["x"].shape[-1]
        measured: dict[str, tuple[Tensor | float, Tensor | float]] = {}
        for (term, count), nats, error in zip(counts.items(), network.cross_entropy(logits, y), errors, strict=True):
            measured |= {term: (nats, count), f"mse_{term}" if len(counts) > 1 else "mse": (error, count)}
        return measured

    def parameter_groups(self, network: nn.Module, config: Config) -> list[dict[str, Any]]:
        """No weight decay on biases and norms, which have one more dimension in a stack."""
        from trainer.optimisation.optimizers import decay_groups

        return decay_groups(network, config.optimisation.weight_decay, dimensions=3 if config.data.stack else 2)

    def learning_rate(self, step: int, total_steps: int, config: Config) -> float:
        """One cycle: a triangle with its peak at half."""
        return one_cycle(step, total_steps, config.optimisation.learning_rate)

    def checkpoint_files(self, config: Config, network: Any, data: Data) -> dict[str, str | dict[str, Tensor]]:
        """The task vectors, so that a model is evaluated on the tasks it was trained on."""
        return {"tasks.safetensors": {f"model_{i}": pool for i, pool in enumerate(data.extra["pools"], start=1)}}

    def flops_per_item(self, config: Config, network: Any) -> float:
        """Training FLOPs of a sequence."""
        return network.training_flops(config.data.examples)


if __name__ == "__main__":
    main(PFNRaventos())
