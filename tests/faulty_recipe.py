"""The toy recipe with faults in one process of a launch: `--fault NAME`, on rank `--fault_rank`, from step 3 on."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import toy_recipe
from torch import Tensor, nn
from toy_recipe import IGNORED, ToyRecipe, ToyRows

from trainer.main import main
from trainer.recipe import Batch, Data, Log, Report
from trainer.reporting.run_directory import RunDirectory

STEP, LATER = 3, 11


@dataclass(frozen=True)
class Rows(toy_recipe.Rows):
    fault: str = ""
    fault_rank: int = 1
    unlabelled: tuple[int, ...] = ()
    """samples, by their numbers in the endless stream, that have no labels"""
    damaged_rows: tuple[int, ...] = ()
    """rows that cannot be read"""
    evaluation_seconds: float = 0.0
    """how long each batch of an evaluation takes"""
    fits: int = 1_000_000
    """most samples that this rank has memory for in a forward pass"""
    fits_later: int = 1_000_000
    """the same, from forward pass LATER on"""
    data_seconds: float = 0.0
    """how long `build_data` takes"""
    report_seconds: float = 0.0
    """how long the report after training takes"""


@dataclass(frozen=True)
class Config(toy_recipe.Config):
    """Train a toy that fails."""

    data: Rows = Rows()


class FaultyRows(ToyRows):
    """Rows of which some cannot be read, or have no labels; `fails_at`: the call, counted from 1, that fails (0: none)."""

    def __init__(self, rows: int, salt: int, unlabelled: Sequence[int], damaged: Sequence[int], fails_at: int) -> None:
        super().__init__(rows, salt)
        self.unlabelled, self.damaged, self.fails_at, self.reads = frozenset(unlabelled), frozenset(damaged), fails_at, 0

    def __getitems__(self, numbers: Sequence[int]) -> Batch:
        self.reads += 1
        if self.reads == self.fails_at:
            raise OSError("row 7 of shard 2 is damaged")
        bad = [number for number in numbers if number % self.rows in self.damaged]
        if bad:
            raise OSError(f"row {bad[0] % self.rows} is damaged")
        batch = super().__getitems__(numbers)
        empty = torch.tensor([number in self.unlabelled for number in numbers])
        batch["labels"] = batch["labels"].masked_fill(empty[:, None], IGNORED)
        return {**batch, "has_value": batch["has_value"] & ~empty}


class FaultyReport(Report):
    """Simulates a full disk, and a slow report."""

    recipe: FaultyRecipe

    def log_line(self, step: int, metrics: Mapping[str, float]) -> str:
        if step == STEP and self.recipe.here(self.recipe.config, "disk"):  # large files fail, logs can still be written
            resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return super().log_line(step, metrics)

    def after_training(self, config: Config, data: Data, run: RunDirectory, checkpoint: Path, log: Log) -> None:
        if config.data.report_seconds:
            log("drawing the report")
            time.sleep(config.data.report_seconds)


class FaultyRecipe(ToyRecipe):
    """Fails as `--fault` says, on rank `--fault_rank`."""

    config_class = Config
    report_class = FaultyReport
    losses = 0

    def here(self, config: Config, fault: str) -> bool:
        """Whether this process has that fault."""
        return config.data.fault == fault and config.data.fault_rank == int(os.environ.get("RANK", 0))

    def build_data(self, config: Config) -> Data:
        self.config = config
        if config.data.data_seconds:
            print("preparing data", flush=True)
            time.sleep(config.data.data_seconds)
        fails_at = STEP + 2 if self.here(config, "data") else 0  # two samples are read before the first step
        train = FaultyRows(config.data.train_rows, 0, config.data.unlabelled, config.data.damaged_rows, fails_at)
        evaluation = FaultyRows(9, 10_000, (), (), 1 if self.here(config, "evaluation data") else 0)
        return Data(train, {"val": evaluation}, fingerprint="toy")

    def build_model(self, config: Config, data: Data) -> nn.Module:
        network = super().build_model(config, data)
        if self.here(config, "order"):
            value = network.value
            del network.value
            parts = dict(network._modules)
            network._modules.clear()
            network._modules.update({"value": value, **parts})
        return network

    def loss(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        self.losses += 1
        if self.losses == STEP and self.here(self.config, "clock"):
            true = time.monotonic
            time.monotonic = lambda: true() + 3600.0  # an hour later than on the other host
        fits = self.config.data.fits_later if self.losses >= LATER else self.config.data.fits
        if len(batch["tokens"]) > fits and self.here(self.config, "small memory"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if self.losses == STEP and self.here(self.config, "memory"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        if self.losses == STEP and self.here(self.config, "bug"):
            raise KeyError("weights_of_nothing")
        return super().loss(network, batch)

    def measure(self, network: nn.Module, batch: Batch) -> dict[str, tuple[Tensor | float, float]]:
        if self.config.data.evaluation_seconds:
            time.sleep(self.config.data.evaluation_seconds)
            print("measured a batch", flush=True)
        return super().measure(network, batch)


if __name__ == "__main__":
    main(FaultyRecipe())
