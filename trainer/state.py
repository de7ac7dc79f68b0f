"""The state of a run beside its tensors."""

from __future__ import annotations

import typing
from dataclasses import dataclass, field
from typing import Any

from trainer.fields import problem_of


@dataclass
class TrainState:
    """Saved in trainer_state.json of every checkpoint. Only the loop changes it."""

    step: int = 0
    """optimizer steps done"""
    evaluated_step: int = 0
    """step of the last evaluation"""
    evaluated_metric: float | None = None
    """the best-model metric at that step"""
    best_metric: float | None = None
    best_step: int = 0
    patience_best: float | None = None
    """best value so far of the metric that patience waits for"""
    evaluations_without_improvement: int = 0
    train_loss: float | None = None
    """of the last log interval"""
    hours: float = 0.0
    """hours trained, over all launches"""
    bad_steps: int = 0
    """steps skipped because their gradient was not finite"""
    bad_steps_in_a_row: int = 0
    replaced_samples: int = 0
    """unreadable samples that were replaced by others"""
    data_changes: list[tuple[int, str]] = field(default_factory=list)
    """where the run went on with other data by `--data_changed accept`: (step, fingerprint of the data before)"""
    loss_sums: list[float | None] = field(default_factory=list)
    """loss sums of the log interval so far, over all ranks, by term; None where not finite, which JSON lacks"""
    item_counts: list[float] = field(default_factory=list)
    """items of the log interval so far, over all ranks, by term"""

    @classmethod
    def from_json(cls, value: Any) -> TrainState:
        """From the output of `dataclasses.asdict`, through JSON. ValueError for anything else."""
        hints = typing.get_type_hints(cls)
        problem = problem_of(hints, value)
        if problem:
            raise ValueError(problem)
        for key in (key for key, hint in hints.items() if hint is int and value[key] < 0):
            raise ValueError(f"has {key} {value[key]}")
        if len(value["loss_sums"]) != len(value["item_counts"]):
            raise ValueError(f"has {len(value['loss_sums'])} loss_sums and {len(value['item_counts'])} item_counts")
        return cls(**value)
