"""The contract between a recipe and the trainer: everything the loop asks of a recipe, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Batch = dict[str, "Tensor"]


class Dataset(Protocol):
    """Samples by number, a whole batch at a time.

    A finite set has `__len__`; for sample number s its item is `s % len` and its epoch `s // len`, so every random choice
    about a sample (crop, flip) may be drawn from (seed, s). A set without `__len__` generates sample s from (seed, s).
    Tensors of a batch have the batch as their first dimension. A set with `on_device = True` generates where the model is:
    it is called in the training process, after one call of its `to(device)`. Any other must be picklable: data-loading
    workers get a copy.
    """

    def __getitems__(self, numbers: Sequence[int]) -> Batch: ...


@dataclass
class Data:
    """What `build_data` gives. `evaluation` sets are measured in training as `eval/{name}_...`, one of them usually as `val`;
    `test` by `evaluate`."""

    train: Any
    evaluation: dict[str, Any]
    test: Any = None
    fingerprint: str = ""
    """hash of the contents, which training needs: a resumed run refuses other data"""
    notes: list[str] = field(default_factory=list)
    """what the user should know of the data (how many samples were cut), printed at start"""
    extra: dict[str, Any] = field(default_factory=dict)
    """what the recipe itself wants to find again (a tokenizer, task vectors)"""


@dataclass(frozen=True)
class Command:
    """A sub-command: a flat dataclass of its flags, and the function that does it, on every process of the launch."""

    flags: type
    run: Callable[..., None]
    presets: Mapping[str, Path] = field(default_factory=dict)
    """YAML files by short name; the flags need a field `preset`"""


class Recipe:
    """A model, its data and its loss. Subclass it, set the attributes, and hand an instance to `trainer.main.main`."""

    name: str
    Config: type
    presets: Mapping[str, Path] = {}
    """YAML files by short name, for `--preset NAME`"""
    commands: Mapping[str, Command] = {}
    best_metric: str = "val_loss"
    best_is: Literal["lower", "higher"] = "lower"
    patience_metric: tuple[str, Literal["lower", "higher"]] | None = None
    """(metric, which way is better) that `--patience` waits for; None: the best metric"""
    monitored: tuple[str, ...] = ()
    """terms of `loss` that are no losses (an accuracy): logged under their own names. Give them the weight 0"""
    speed: tuple[str, str] | None = None
    """(unit, loss term): `train/{unit}_per_sec` counts that term's items; None counts samples"""
    paths: tuple[str, ...] = ()
    """data flags that say where the data are, not what: a run may be resumed with others if the fingerprint is the same"""
    loss_unit: str = ""
    """of the loss, in plots"""
    checkpoint_prefix: str = "checkpoint_step_"
    """what this recipe's guide calls a step checkpoint"""

    def build_model(self, config: Any, data: Data) -> nn.Module:
        """The bare network, with fresh weights from torch's (seeded) generator; `data` may decide its vocabulary."""
        raise TypeError(f"{type(self).__name__} lacks build_model")

    def build_data(self, config: Any) -> Data:
        """The data sets. ValueError or OSError with a one-line text for what a user can mend."""
        raise TypeError(f"{type(self).__name__} lacks build_data")

    def items(self, batch: Batch) -> dict[str, int]:
        """{loss term: how many items it averages over}, from a host batch alone."""
        raise TypeError(f"{type(self).__name__} lacks items")

    def loss(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """{loss term: sum over its items}, scalars, under the names of `items`."""
        raise TypeError(f"{type(self).__name__} lacks loss")

    def loss_weights(self, config: Any) -> dict[str, float]:
        """Weights of the terms in the objective, sum of weight x sum / items; a term not named has 1.0."""
        return {}

    def measure(self, network: nn.Module, batch: Batch) -> dict[str, tuple[Tensor | float, float]]:
        """{name: (sum, count)} of one evaluation batch. Default: the loss terms."""
        counts = self.items(batch)
        return {term: (total, counts[term]) for term, total in self.loss(network, batch).items()}

    def derive(self, means: Mapping[str, float]) -> dict[str, float]:
        """Metrics that follow from means (perplexity from a loss); for training and evaluation alike."""
        return {}

    def parameter_groups(self, network: nn.Module, config: Any) -> list[dict[str, Any]]:
        """Optimizer groups. Default: no weight decay on parameters of fewer than two dimensions (biases, norms)."""
        decayed = [p for p in network.parameters() if p.requires_grad and p.ndim >= 2]
        others = [p for p in network.parameters() if p.requires_grad and p.ndim < 2]
        groups = [
            {"params": decayed, "weight_decay": config.optimisation.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def learning_rate(self, step: int, total_steps: int, config: Any) -> float:
        """Learning rate of optimizer step `step` (1 .. total_steps). Default: linear warm-up, cosine to `min_lr`."""
        from trainer.schedule import warmup_cosine

        o = config.optimisation
        return warmup_cosine(step, total_steps, o.warmup_steps, o.learning_rate, o.min_lr)

    def schedule_text(self, config: Any) -> str:
        """The schedule in words, printed at start."""
        o = config.optimisation
        return f"peak learning rate {o.learning_rate:g} after {o.warmup_steps:,} steps, down to {o.min_lr:g}"

    def pretrained(self, name: str) -> dict[str, Tensor]:
        """Weights for an `--init_from` that is not a checkpoint folder. ValueError or OSError in one line if there are none."""
        raise ValueError(f"init_from {name!r} is not a checkpoint folder; give the path of one")

    def documents(self, config: Any, network: nn.Module, data: Data) -> dict[str, str]:
        """{file name: text} to be kept in every checkpoint (config.json, tokenizer.json)."""
        return {}

    def tensors(self, config: Any, data: Data) -> dict[str, dict[str, Tensor]]:
        """{stem: {name: tensor}} to be kept in every checkpoint as `stem.safetensors`, beside `model` and `optimizer`."""
        return {}

    def flops_per_item(self, config: Any, network: nn.Module) -> float | None:
        """Training FLOPs (forward and backward) for each item of `speed`, for MFU; None: not known."""
        return None

    def start_lines(self, step: int, total_steps: int, device: str, parameters: int, trained: int) -> list[str]:
        """What the recipe itself says before the first step of a launch, which is step + 1: lines of its guide."""
        return []

    def log_line(self, step: int, metrics: Mapping[str, float]) -> str:
        """The console line of a log step."""
        unit = self.speed[0] if self.speed else "samples"
        return (
            f"Step {step:6d} | Loss: {metrics['train/loss']:.4f} | LR: {metrics['train/learning_rate']:.2e} | "
            f"Grad norm: {metrics['train/grad_norm']:.3f} | Time: {metrics['train/iter_time_ms']:.1f}ms | "
            f"{unit.capitalize()}/sec: {metrics[f'train/{unit}_per_sec']:.0f}"
        )

    def evaluation_line(self, step: int, metrics: Mapping[str, float]) -> str:
        """The console line of an evaluation."""
        return f"Evaluating at step {step}... " + " | ".join(f"{k.removeprefix('eval/')}: {v:.4f}" for k, v in metrics.items())

    def noticed(self) -> list[str]:
        """What this process has seen in the last evaluation that somebody should hear of, a line each; emptied by the call."""
        return []

    def baseline(self, config: Any, data: Data) -> tuple[str, float] | None:
        """(name, loss) of a trivial model on the first evaluation set, for the loss plot."""
        return None

    def after_training(self, config: Any, data: Data, run: Any, checkpoint: Any, say: Callable[[str], None]) -> None:
        """On rank 0, once the run has finished: baselines, samples, pictures. `checkpoint` is the folder of the last one."""


def move(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`; asynchronous from page-locked memory."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
