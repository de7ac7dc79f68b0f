"""Collatz trajectories: `accelerate launch recipes/collatz.py [train|predict|analyse] ...`

A sample is the parity vector of a number. One head predicts the next parity, the other how many steps lead to 1.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from recipes.studies.collatz_analysis import Analyse, Predict, analyse, predict
from recipes.studies.collatz_errors import LEAK, Reports, held_out, layout
from trainer import sections
from trainer.errors import Refusal
from trainer.hardware import cores
from trainer.main import main
from trainer.recipe import Batch, Command, Data


@dataclass(frozen=True)
class Model:
    """The network, and what it may see."""

    d_model: int = 128
    num_layers: Annotated[int, arg(aliases=("--n_layers",))] = 4
    num_heads: Annotated[int, arg(aliases=("--nhead",))] = 4
    d_ff: int | None = None
    """width of the feed-forward layers (default: 4 x d_model)"""
    dropout: float = 0.1
    max_len: int = 500
    """parities a number has at most; longer vectors are cut"""
    mode: Literal["honest", "guide"] = "honest"
    """guide: attention in both directions over the whole vector, so that both heads see their answers"""
    input: Literal["parities", "digits"] = "parities"
    """what the stopping time is predicted from: the first prefix_len parities, or the binary digits of n"""
    prefix_len: int = 64


@dataclass(frozen=True)
class Numbers:
    """Which numbers are trained on."""

    start: int = 10
    """ordinary sample s is the number start + s"""
    hard_fraction: float = 0.5
    """share of numbers above 2^68"""
    curriculum: bool = False
    """raise that share from 0 over the run"""
    val_numbers: int = 2048
    """held-out numbers that evaluation measures"""
    val_span: int = 2**29
    """how far above start the ordinary ones among them lie at most (a million steps of 512)"""


@dataclass(frozen=True)
class Optimisation(sections.Optimisation):
    """The guide's defaults, and the weights of the two losses."""

    batch_size: Annotated[int, arg(aliases=("--batch",))] = 512
    """numbers of one micro-step, summed over all processes"""
    max_steps: Annotated[int, arg(aliases=("--max_iters", "--steps"))] = 1_000_000
    learning_rate: Annotated[float, arg(aliases=("--lr",))] = 1e-4
    min_lr: float = 1e-6
    warmup_steps: Annotated[int, arg(aliases=("--warmup_iters",))] = 0
    beta2: float = 0.999
    stopping_weight: float = 1.0
    """weight of the Huber loss of log1p(steps)"""
    sequence_weight: float = 1.0
    """weight of the cross entropy of the next parity"""


@dataclass(frozen=True)
class Run(sections.Run):
    """The defaults of the guide."""

    num_workers: int = max(0, min(20, cores() // int(os.environ.get("LOCAL_WORLD_SIZE") or 1) - 1))
    """data-loading processes per training process (default: its share of the cores less one, at most 20)"""
    prefetch_factor: int = 4
    eval_every: Annotated[int, arg(aliases=("--eval_interval",))] = 1000


@dataclass(frozen=True)
class Config:
    """Train a transformer on Collatz trajectories."""

    model: Model = field(default_factory=Model)
    data: Numbers = field(default_factory=Numbers)
    optimisation: Optimisation = field(default_factory=Optimisation)
    run: Run = field(default_factory=Run)


class Collatz(Reports):
    """Model, data and the two losses; what is said of them is in `Reports`."""

    name = "collatz"
    Config = Config
    presets = {"quick": Path(__file__).parent / "configs" / "collatz_quick.yaml"}
    commands = {"predict": Command(Predict, predict), "analyse": Command(Analyse, analyse)}
    checkpoint_prefix = "model_step_"

    def build_data(self, config: Config) -> Data:
        """An endless stream, and numbers that it never contains."""
        from recipes.data.collatz import CollatzStream

        d, o, shown = config.data, config.optimisation, layout(config.model)
        train = CollatzStream(o.seed, d.start, d.hard_fraction, o.max_steps * o.effective_batch_size * d.curriculum, shown)
        val = held_out("val", d.val_numbers, d.start, d.val_span, shown)
        notes = [LEAK] * shown.whole + [f"Curriculum: no hard numbers, then more, up to {d.hard_fraction:.0%}"] * d.curriculum
        return Data(train, {"val": val}, None, train.fingerprint() + val.fingerprint(), notes)

    def build_model(self, config: Config, data: Data | None) -> Any:
        """The transformer."""
        from recipes.models.collatz import CollatzTransformer

        return CollatzTransformer(**vars(config.model), recompute=config.run.gradient_checkpointing)

    def items(self, batch: Batch) -> dict[str, int]:
        """Numbers whose stopping time is scored, and predicted parities."""
        lengths = batch["steps"].clamp(max=batch["tokens"].shape[1])
        return {"stop": int(batch["scored"].sum()), "seq": int((lengths - 1).sum())}

    def loss(self, network: Any, batch: Batch) -> dict[str, Any]:
        """Summed Huber loss and cross entropy."""
        from recipes.models.collatz import next_token_loss, read, stopping_loss

        stopping, logits = read(network, batch)
        return {"stop": stopping_loss(stopping, batch).sum(), "seq": next_token_loss(logits, batch).sum()}

    def loss_weights(self, config: Config) -> dict[str, float]:
        """As the flags say."""
        stop, seq = config.optimisation.stopping_weight, config.optimisation.sequence_weight
        if min(stop, seq) < 0 or stop == seq == 0:
            raise Refusal(f"stopping_weight {stop:g} and sequence_weight {seq:g} must not be negative, nor both 0")
        return {"stop": stop, "seq": seq}

    def learning_rate(self, step: int, total_steps: int, config: Config) -> float:
        """Cosine annealing, behind a linear warm-up if one is asked for."""
        from trainer.schedule import ramp_cosine

        o = config.optimisation
        return ramp_cosine(step, total_steps, o.warmup_steps, o.learning_rate, o.min_lr, 1 / max(1, o.warmup_steps))


if __name__ == "__main__":
    main(Collatz())
