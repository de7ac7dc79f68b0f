"""A recipe of a few milliseconds a step with everything that breaks simpler trainers, for the property tests.

It has two loss terms with different item counts and weights, rows of unequal length, tied weights, two parameter groups, sizes
that no number of processes divides, a parameter of one element, and samples whose loss is NaN, which one rank alone meets.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.command_line import sections
from trainer.main import main
from trainer.recipe import Batch, Data, Measured, Recipe

IGNORED = -100
VOCABULARY = 32


@dataclass(frozen=True)
class Model:
    width: int = 16
    dropout: float = 0.0
    frozen: bool = False
    """whether the first block is not trained"""


@dataclass(frozen=True)
class Rows:
    train_rows: int = 64
    nan_samples: tuple[int, ...] = ()
    """samples whose loss is NaN, by their numbers in the endless stream: each occurs in one step, on one process"""


@dataclass(frozen=True)
class Config:
    """Train a toy."""

    model: Model = Model()
    data: Rows = Rows()
    optimisation: sections.Optimisation = sections.Optimisation()
    run: sections.Run = sections.Run(num_workers=0, log_every=1, eval_every=0, save_every=0)


def pace() -> float:
    """Seconds that reading a micro-batch takes, from the file that TOY_PACE names, so that a test can interrupt a slow run."""
    file = os.environ.get("TOY_PACE")
    return float(Path(file).read_text()) if file else 0.0


class ToyRows:
    """Row i: random tokens, 3 to 14 of them, and for two rows of three a number to predict; all from (salt, i)."""

    def __init__(self, rows: int, salt: int, nan_samples: Sequence[int] = ()) -> None:
        self.rows, self.salt, self.nan_samples = rows, salt, frozenset(nan_samples)

    def __len__(self) -> int:
        return self.rows

    def __getitems__(self, numbers: Sequence[int]) -> Batch:
        time.sleep(pace())
        generators = [np.random.RandomState(self.salt + number % self.rows) for number in numbers]
        rows = [torch.from_numpy(random.randint(0, VOCABULARY, random.randint(4, 16))) for random in generators]
        padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=IGNORED)
        return {
            "tokens": padded[:, :-1].clamp_min(0),
            "labels": padded[:, 1:],
            "value": torch.tensor([3 * random.rand() for random in generators], dtype=torch.float32),
            "has_value": torch.tensor([number % self.rows % 3 > 0 for number in numbers]),
            "health": torch.tensor([float("nan") if number in self.nan_samples else 1.0 for number in numbers]),
        }


class ToyNetwork(nn.Module):
    """tokens [batch, time] -> logits [batch, time, vocabulary], value [batch]."""

    _no_split_modules: ClassVar = ["Sequential"]
    """classes of the blocks that FSDP gathers one at a time, named as in transformers' models"""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 33), nn.GELU(), nn.Linear(33, width), nn.Dropout(dropout))
            for _ in range(2)
        )
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.value = nn.Linear(width, 1)  # its bias has one element

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(hidden), self.value(hidden[:, 0])[:, 0]


class ToyRecipe(Recipe[Config]):
    """A minimal implementation of the recipe interface."""

    name = "toy"
    config_class = Config
    best_metric = "val_loss"

    def build_data(self, config: Config) -> Data:
        train = ToyRows(config.data.train_rows, 0, config.data.nan_samples)
        return Data(train, {"val": ToyRows(9, 10_000)}, fingerprint="toy")

    def build_model(self, config: Config, data: Data) -> nn.Module:
        network = ToyNetwork(config.model.width, config.model.dropout)
        network.blocks[0].requires_grad_(not config.model.frozen)
        return network

    def items(self, batch: Batch) -> dict[str, int]:
        return {"token": int((batch["labels"] != IGNORED).sum()), "value": int(batch["has_value"].sum())}

    def loss(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return self._sums(network(batch["tokens"]), batch)

    def _sums(self, outputs: tuple[Tensor, Tensor], batch: Batch) -> dict[str, Tensor]:
        logits, value = outputs
        token = F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum")
        huber = F.huber_loss(value.float(), batch["value"], reduction="none") * batch["health"]
        return {"token": token, "value": (huber * batch["has_value"]).sum()}

    def loss_weights(self, config: Any) -> dict[str, float]:
        return {"value": 0.3}

    def measure(self, network: nn.Module, batch: Batch) -> dict[str, Measured]:
        """A loss term that is averaged over its items, one with an explicit count, and a metric that is no loss term."""
        outputs, counts = network(batch["tokens"]), self.items(batch)
        right = (outputs[0].argmax(-1) == batch["labels"]).sum()
        sums = self._sums(outputs, batch)
        return {"token": sums["token"], "value": (sums["value"], counts["value"]), "accuracy": (right, counts["token"])}


class InManyFiles(ToyRecipe):
    """Its checkpoints are sharded into small files, as those of large models are into large ones."""

    shard_bytes = 1_500


if __name__ == "__main__":
    main(ToyRecipe())
