"""The four sections of tinystories_lm's configuration, with the guide's defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import arg

from trainer import sections
from trainer.errors import Refusal


@dataclass(frozen=True)
class Model:
    """The network."""

    vocab_size: int = 10_000
    """entries of the tokenizer that made the ids"""
    context_length: int = 256
    """tokens of a window, and the most the model looks at"""
    d_model: int = 512
    """width"""
    num_heads: Annotated[int, arg(aliases=("--nhead",))] = 8
    d_ff: int = 2048
    """width inside the feed-forward"""
    num_layers: Annotated[int, arg(aliases=("--n_layers",))] = 6
    rope_theta: float = 10_000.0
    """base of the rotary frequencies"""
    norm_position: Literal["pre", "post"] = "pre"
    rope: bool = True
    """rotary positions; --no_rope: none at all"""
    ffn: Literal["swiglu", "silu"] = "swiglu"
    """silu: without the gate"""
    tie_embeddings: bool = False
    """one matrix for embedding and output layer"""
    qk_norm: bool = False
    """normalise queries and keys per head"""


@dataclass(frozen=True)
class Ids:
    """The token ids."""

    train_data_path: str | None = None
    """.ids, .bin or .npy; or `embedded`: English that is on every machine (Python's documentation)"""
    val_data_path: str | None = None
    tokenizer: str | None = None
    """kept in checkpoints, for generate (default: tokenizer.json beside train_data_path)"""
    sampling: Literal["random", "sequential"] = "random"
    """windows at random starts, or every window once an epoch"""


@dataclass(frozen=True)
class Optimisation(sections.Optimisation):
    """The guide's defaults."""

    batch_size: Annotated[int, arg(aliases=("--batch",))] = 64
    max_steps: Annotated[int, arg(aliases=("--max_iters", "--steps"))] = 100_000
    learning_rate: Annotated[float, arg(aliases=("--lr",))] = 6e-4
    min_lr: float = 6e-5
    weight_decay: float = 0.1
    decay_all: bool = False
    """decay norms and embeddings too"""


@dataclass(frozen=True)
class Run(sections.Run):
    """The guide's defaults."""

    num_workers: int = 0  # a batch takes microseconds
    eval_iters: int = 100
    """batches per evaluation (0: the whole validation stream, and as many training windows)"""
    save_every: Annotated[int, arg(aliases=("--checkpoint_interval",))] = 5000
    keep_last: int = 0
    """step checkpoints to keep (0: all, as the guide does, to resume from any of them)"""
    wandb_project: str = "transformer-lm"


@dataclass(frozen=True)
class Config:
    """Train a Transformer language model on token ids in files."""

    model: Model = field(default_factory=Model)
    data: Ids = field(default_factory=Ids)
    optimisation: Optimisation = field(default_factory=Optimisation)
    run: Run = field(default_factory=Run)

    def resolved(self) -> Config:
        """As it is, if its sizes mean something."""
        for name in ("context_length", "rope_theta"):
            if getattr(self.model, name) <= 0:
                raise Refusal(f"{name} {getattr(self.model, name)} must be above 0")
        return self
