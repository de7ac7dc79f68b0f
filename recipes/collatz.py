"""Collatz trajectories: `accelerate launch recipes/collatz.py [train|evaluate|predict|analyse] ...`

A sample is the parity vector of a number. One head predicts the next parity, the other how many steps lead to 1.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from recipes.baselines.collatz import Anomalies, beside_baselines, held_out_with_baselines, steps_of
from recipes.commands.collatz import Analyse, Predict, analyse, predict
from trainer.command_line import sections
from trainer.command_line.bounds import Bound, Fraction, NotNegative, Positive
from trainer.distributed.hardware import cores, sum_dtype
from trainer.errors import UserError
from trainer.main import main
from trainer.optimisation.schedule import ramp_cosine
from trainer.recipe import Batch, Command, Data, Log, Recipe, Report
from trainer.reporting.run_directory import RunDirectory
from trainer.reporting.trackers import read_metrics

if TYPE_CHECKING:
    from torch import Tensor, nn

# This process's share of the cores but one, at most 20.
NUM_WORKERS = max(0, min(20, cores() // int(os.environ.get("LOCAL_WORLD_SIZE") or 1) - 1))


@dataclass(frozen=True)
class ModelConfig:
    """The network, and what it predicts from."""

    d_model: Annotated[int, Positive] = 128
    num_layers: Annotated[int, Positive, arg(aliases=("--n_layers",))] = 4
    num_heads: Annotated[int, Positive, arg(aliases=("--nhead",))] = 4
    d_ff: Annotated[int | None, Positive] = None
    """width of the feed-forward layers (default: 4 x d_model)"""
    dropout: Annotated[float, Fraction] = 0.1
    max_len: Annotated[int, Positive] = 500
    """parities a number has at most; longer vectors are cut"""
    mode: Literal["honest", "guide"] = "honest"
    """guide: attention in both directions over the whole vector, so that both heads see their answers (honest: causal)"""
    input: Literal["parities", "digits"] = "parities"
    """what the stopping time is predicted from: the first prefix_len parities, or the binary digits of n"""
    prefix_len: Annotated[int, Positive] = 64


@dataclass(frozen=True)
class DataConfig:
    """The numbers."""

    start: int = 10
    """ordinary sample s is the number start + s"""
    hard_fraction: Annotated[float, Bound(0, most=1)] = 0.5
    """share of numbers above 2^68"""
    curriculum: bool = False
    """raise that share from 0 over the run"""
    val_numbers: int = 2048
    """held-out numbers that evaluation measures"""
    val_span: int = 2**29
    """how far above start the ordinary ones among them lie at most (a million steps of 512)"""


@dataclass(frozen=True)
class OptimisationConfig(sections.Optimisation):
    """What decides the weights, beside the model and the data."""

    stopping_weight: Annotated[float, NotNegative] = 1.0
    """weight of the Huber loss of log1p(steps)"""
    sequence_weight: Annotated[float, NotNegative] = 1.0
    """weight of the cross entropy of the next parity"""


@dataclass(frozen=True)
class Config:
    """Train a transformer on Collatz trajectories."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimisation: OptimisationConfig = OptimisationConfig(
        batch_size=512, max_steps=1_000_000, learning_rate=1e-4, min_lr=1e-6, warmup_steps=0, beta2=0.999
    )
    run: sections.Run = sections.Run(num_workers=NUM_WORKERS, prefetch_factor=4, eval_every=1000)
    unused = {"max_epochs": "numbers never run out; give --max_steps"}

    def resolved(self) -> Config:
        """The same. UserError if both losses have weight 0."""
        if self.optimisation.stopping_weight == self.optimisation.sequence_weight == 0:
            raise UserError("stopping_weight and sequence_weight are both 0; give one of them")
        return self


def stopping_loss(predicted: Tensor, batch: Batch) -> Tensor:
    """Huber loss of log1p(steps), [batch]; 0 for numbers that are not scored."""
    from torch.nn.functional import huber_loss

    return huber_loss(predicted, batch["steps"].float().log1p(), reduction="none") * batch["scored"]


def next_token_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Cross entropy of each token but the first, [batch, time]; 0 at padding."""
    from torch.nn.functional import cross_entropy

    from recipes.models.collatz import PADDING

    return cross_entropy(logits.transpose(1, 2), batch["tokens"][:, 1:].long(), ignore_index=PADDING, reduction="none")


class CollatzReport(Report[Config]):
    """What a run prints: each figure beside baselines that need no network."""

    recipe: Collatz
    loss_unit = "Huber of log1p(steps) + nats per parity"

    def log_line(self, step: int, metrics: Mapping[str, float]) -> str:
        """The console line of a log step; the time is that of the whole log interval."""
        losses = f"Stop: {metrics['train/loss_stop']:.4f}, Seq: {metrics['train/loss_seq']:.4f}"
        loss, rate, norm, seconds = (metrics[f"train/{x}"] for x in ("loss", "learning_rate", "grad_norm", "interval_seconds"))
        return f"Step {step} | Loss: {loss:.4f} ({losses}) | LR: {rate:.2e} | Time: {seconds:.2f}s | Grad norm: {norm:.3f}"

    def evaluation_line(self, step: int, metrics: Mapping[str, float]) -> str:
        """The console lines of an evaluation."""
        means = {name.removeprefix("eval/val_"): value for name, value in metrics.items()}
        return f"Evaluating at step {step}... {beside_baselines(means)}"

    def warnings(self) -> list[str]:
        """Held-out numbers whose prediction was far off in the last evaluation; emptied by the call."""
        return self.recipe.anomalies.take()

    def baseline(self, config: Config, data: Data) -> tuple[str, float]:
        """Name and objective of two baselines together: the mean steps of each magnitude, and the first-order rule."""
        batch = data.evaluation["val"].as_batch()
        sums = {"stop": stopping_loss(batch["magnitude"].float(), batch).sum(), "seq": batch["rule_nats"].sum()}
        counts, weights = self.recipe.items(batch), self.recipe.loss_weights(config)
        objective = sum(weights[term] * float(sums[term]) / max(1, counts[term]) for term in sums)
        return "mean of the magnitude + first-order rule", objective

    def after_training(self, config: Config, data: Data, run: RunDirectory, checkpoint: Path, log: Log) -> None:
        """Log how far the training loss fell, and the loss on held-out numbers beside the baselines."""
        rows = read_metrics(run.metrics)
        losses = [row["train/loss"] for row in rows if "train/loss" in row]
        name, baseline = self.baseline(config, data)
        log(f"Training loss: {losses[0]:.4f} in the first log interval, {losses[-1]:.4f} in the last")
        log(f"Held-out numbers: {rows[-1]['final/val_loss']:.4f}; for scale, {name}: {baseline:.4f}")


class Collatz(Recipe[Config]):
    """Two losses of one transformer: the number of steps to 1, and the next parity."""

    name = "collatz"
    config_class = Config
    report_class = CollatzReport
    presets = {"quick": Path(__file__).parent / "configs" / "collatz_quick.yaml"}
    commands = {"predict": Command(Predict, predict), "analyse": Command(Analyse, analyse)}
    checkpoint_prefix = "model_step_"

    def __init__(self) -> None:
        super().__init__()
        self.anomalies = Anomalies()

    def build_data(self, config: Config) -> Data:
        """An endless stream of numbers, and held-out numbers that it never contains."""
        from recipes.data.collatz import CollatzStream, Layout

        d, o, layout = config.data, config.optimisation, Layout.of(config.model)
        curriculum_samples = o.max_steps * o.effective_batch_size if d.curriculum else 0
        train = CollatzStream(o.seed, d.start, d.hard_fraction, curriculum_samples, layout)
        val = held_out_with_baselines("val", d.val_numbers, d.start, d.val_span, layout)
        notes = []
        if config.model.mode == "guide":
            notes.append(
                "--mode guide leaks: every position sees the next parity, and all of them together the number of steps"
            )
        if d.curriculum:
            notes.append(f"Curriculum: no hard numbers, then more, up to {d.hard_fraction:.0%}")
        return Data(train, {"val": val}, fingerprint=train.fingerprint() + val.fingerprint(), notes=notes)

    def build_model(self, config: Config, data: Data) -> nn.Module:
        """The transformer."""
        from recipes.models.collatz import CollatzTransformer

        return CollatzTransformer(**vars(config.model))

    def items(self, batch: Batch) -> dict[str, int]:
        """How many stopping times are scored, and how many parities are predicted."""
        parities = batch["steps"].clamp(max=batch["tokens"].shape[1]) - 1
        return {"stop": int(batch["scored"].sum()), "seq": int(parities.sum())}

    def loss(self, network: Any, batch: Batch) -> dict[str, Tensor]:
        """Summed Huber loss of the stopping time, and summed cross entropy of the next parity."""
        from recipes.models.collatz import predict_batch

        stopping, logits = predict_batch(network, batch)
        return {"stop": stopping_loss(stopping, batch).sum(), "seq": next_token_loss(logits, batch).sum()}

    def loss_weights(self, config: Config) -> dict[str, float]:
        """The weight of each loss, from its flag."""
        return {"stop": config.optimisation.stopping_weight, "seq": config.optimisation.sequence_weight}

    def measure(self, network: Any, batch: Batch) -> dict[str, tuple[Tensor | float, Tensor | float]]:
        """Both losses, errors in steps, and accuracy; `..._magnitude`, `..._formula` and `rule...` are those of baselines."""
        from recipes.data.collatz import KINDS
        from recipes.models.collatz import PADDING, predict_batch

        predicted, logits = predict_batch(network, batch)
        self.anomalies.record(predicted, batch)
        scored, steps, targets = batch["scored"], batch["steps"], batch["tokens"][:, 1:]
        real, exact = targets != PADDING, sum_dtype(targets.device)
        nats, count = next_token_loss(logits, batch).to(exact).sum(1), real.sum(1)
        right = ((logits.argmax(-1) == targets) & real).sum(1)
        cut = steps > batch["tokens"].shape[1]
        sums: dict[str, tuple[Tensor | float, Tensor | float]] = {
            "seq": (nats.sum(), count.sum()),
            "rule": (batch["rule_nats"].sum(), count.sum()),
            "accuracy": (right.sum(), count.sum()),
            "rule_accuracy": (batch["rule_right"].sum(), count.sum()),
            "unscored": ((~scored).sum(), len(steps)),
            "cut": ((scored & cut).sum(), scored.sum()),
        }
        guesses = {"": predicted, "_magnitude": batch["magnitude"].float(), "_formula": batch["formula"].float()}
        for suffix, guess in guesses.items():
            error = (steps_of(guess) - steps).abs().to(exact)
            sums[f"stop{suffix}"] = (stopping_loss(guess, batch).to(exact).sum(), scored.sum())
            sums[f"mae{suffix}"] = ((error * (scored & ~cut)).sum(), (scored & ~cut).sum())
            sums[f"mae_cut{suffix}"] = ((error * (scored & cut)).sum(), (scored & cut).sum())
        for number, kind in enumerate(KINDS):
            rows = batch["kind"] == number
            sums[f"seq_{kind}"] = ((nats * rows).sum(), (count * rows).sum())
            sums[f"rule_{kind}"] = ((batch["rule_nats"] * rows).sum(), (count * rows).sum())
        return sums

    def learning_rate(self, step: int, total_steps: int, config: Config) -> float:
        """Cosine annealing, after a linear warm-up if there is one."""
        o = config.optimisation
        return ramp_cosine(step, total_steps, o.warmup_steps, o.learning_rate, o.min_lr, 1 / max(1, o.warmup_steps))

    def flops_per_item(self, config: Config, network: Any) -> float:
        """Training FLOPs of a number."""
        return network.training_flops(config.model.max_len - 1)


if __name__ == "__main__":
    main(Collatz())
