"""Writes checkpoints without a training run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from trainer.backends.backend import Backend
from trainer.backends.tensors import split_names
from trainer.checkpoints import writing
from trainer.checkpoints.checkpoint import Checkpoint
from trainer.state import TrainState


def trainer_state(step: int, **changes: object) -> str:
    """The text of a trainer_state.json; `changes` replace entries."""
    state = {
        "recipe": "toy",
        "train_state": dataclasses.asdict(TrainState(step=step)),
        "epoch": 0,
        "only_best": False,
        "processes": 1,
        "loss_scale": {},
        "optimizer": "AdamW",
        "parameters_without_state": [],
        "data_fingerprint": "f",
        "versions": {},
    }
    return json.dumps(state | changes)


def saved(backend: Backend, folder: Path, step: int) -> Checkpoint:
    """Write the tensors of a backend as the checkpoint of a step."""
    tensors = {"model": backend.model_tensors(), "optimizer": backend.optimizer_tensors()}
    layout = backend.state_layout
    without = sorted(layout.tensors.keys() - split_names(entry.name for entry in tensors["optimizer"])[0].keys())
    text = trainer_state(step, optimizer=layout.optimizer, parameters_without_state=without)
    return Checkpoint(writing.write(folder, f"checkpoint_step_{step}", tensors, {"trainer_state.json": text}))
