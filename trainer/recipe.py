"""The contract between a recipe and the trainer: everything the trainer asks of a recipe, and nothing else.

`Recipe` is what is trained. `Report`, optional, is what is printed and drawn of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar, Union

from trainer.command_line.sections import Optimisation, Run

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from trainer.checkpoints.pretrained import StoredTensor
    from trainer.distributed.launch import Launch
    from trainer.initial_weights import Weights
    from trainer.reporting.run_directory import RunDirectory

Batch = dict[str, "Tensor"]
Measured = Union["Tensor", float, tuple["Tensor | float", "Tensor | float"]]
"""a sum and its count, or a sum alone"""
Log = Callable[[str], None]
"""prints a line to stdout and train.log, on rank 0 alone"""


class RecipeConfig(Protocol):
    """A recipe's configuration: a frozen dataclass of four sections, each a frozen dataclass, flat on the command line.

    It may have a method `resolved() -> config` that fills in values which follow from others (ValueError or UserError where
    they contradict each other), and a class attribute `yaml_sections`, see `trainer.command_line.yaml_file.read_yaml`.
    """

    @property
    def model(self) -> Any:
        """The network."""

    @property
    def data(self) -> Any:
        """The data sets."""

    @property
    def optimisation(self) -> Optimisation:
        """What else decides the trained weights."""

    @property
    def run(self) -> Run:
        """Where and how the run happens."""


ConfigT = TypeVar("ConfigT", bound=RecipeConfig)


class Dataset(Protocol):
    """Returns whole batches, by sample numbers.

    A finite set has `__len__`. Its sample s is item `s % len` in epoch `s // len`, and random choices about it (crop, flip) are
    to be drawn from (seed, s). A set without `__len__` generates sample s from (seed, s). The first dimension of every tensor
    is the batch. A set with `on_device = True` generates on the model's device: `to(device)` is called once, and then it is
    used in the training process. Any other set must be picklable, as data-loading workers get a copy.

    A sample that cannot be read is a ValueError or OSError that names it: `--bad_samples skip` reads the next one instead.
    """

    def __getitems__(self, numbers: Sequence[int]) -> Batch: ...


@dataclass
class Data:
    """What `build_data` returns. The sets of `evaluation`, {name: set}, are measured during training as `eval/{name}_...`; one
    is usually called `val`. `test` is measured by the sub-command `evaluate`."""

    train: Any
    evaluation: dict[str, Any]
    test: Any = None
    fingerprint: str = ""
    """hash of the contents, required for training: a resumed run refuses data with another one"""
    notes: list[str] = field(default_factory=list)
    """lines about the data for the user (how many samples were cut), printed at start"""
    extra: dict[str, Any] = field(default_factory=dict)
    """whatever the recipe itself needs later (a tokenizer, task vectors)"""


@dataclass(frozen=True)
class Command:
    """A sub-command: a flat dataclass of its flags, and the function to run on every process of the launch."""

    flags: type
    run: Callable[[Any, Any, Launch, Log], None]
    """called as run(recipe, flags, launch, log)"""
    presets: Mapping[str, Path] = field(default_factory=dict)
    """YAML files by short name; the flags need a field `preset`"""


class Report(Generic[ConfigT]):
    """What a run prints and draws. Overriding is optional; a recipe names its subclass as `report_class`."""

    loss_unit: str = ""
    """unit of the loss, for the axis of plots"""

    def __init__(self, recipe: Recipe[ConfigT]) -> None:
        self.recipe = recipe

    def schedule(self, config: ConfigT) -> str:
        """A description of the learning-rate schedule, printed at start."""
        from trainer.optimisation.schedule import described

        return described(config.optimisation)

    def start_lines(self, step: int, total_steps: int, device: str, parameters: int, trained: int) -> list[str]:
        """Lines to print before the first step of a launch, step + 1; `trained`: how many of the parameters are trained."""
        return []

    def step_metrics(self, step: int) -> dict[str, float]:
        """Further metrics of a log step, logged as `train/{name}`. They may depend on its number alone, so that a resumed run
        logs the same."""
        return {}

    def log_line(self, step: int, metrics: Mapping[str, float]) -> str:
        """The console line of a log step."""
        rate = next(name for name in metrics if name.endswith("_per_sec"))
        unit = rate.removeprefix("train/").removesuffix("_per_sec").capitalize()
        return (
            f"Step {step:6d} | Loss: {metrics['train/loss']:.4f} | LR: {metrics['train/learning_rate']:.2e} | "
            f"Grad norm: {metrics['train/grad_norm']:.3f} | Time: {metrics['train/iter_time_ms']:.1f}ms | "
            f"{unit}/sec: {metrics[rate]:.0f}"
        )

    def show_batch(self, batch: Batch, config: ConfigT, data: Data, run: RunDirectory) -> str:
        """A batch for people to look at, with `--debug`: its first text, or the path of a picture. Empty: nothing."""
        return ""

    def evaluation_line(self, step: int, metrics: Mapping[str, float]) -> str:
        """The console line of an evaluation; the keys of `metrics` are full names, such as `eval/val_loss`."""
        return f"Evaluating at step {step}... " + " | ".join(f"{k.removeprefix('eval/')}: {v:.4f}" for k, v in metrics.items())

    def warnings(self) -> list[str]:
        """Lines on what a person should look at in this process's part of the last evaluation. The call clears them."""
        return []

    def baseline(self, config: ConfigT, data: Data) -> tuple[str, float] | None:
        """(name, loss) of a trivial model on the `val` set, drawn as a line in the loss plot; None: no line."""
        return None

    def after_training(self, config: ConfigT, data: Data, run: RunDirectory, checkpoint: Path, log: Log) -> None:
        """Called on rank 0 when the run has finished: baselines, samples, pictures. `checkpoint`: the folder of the last one.

        Everything is saved by then, and a request to stop or the time limit ends the process at once: replace files atomically.
        """


class Recipe(Generic[ConfigT]):
    """A model, its data and its loss. Subclass it, set the attributes, and hand an instance to `trainer.main.main`.

    A subclass with an `__init__` of its own calls `super().__init__()`.
    """

    name: str
    config_class: type[ConfigT]
    report_class: type[Report] = Report
    presets: Mapping[str, Path] = {}
    """YAML files by short name, for `--preset NAME`"""
    commands: Mapping[str, Command] = {}
    """{name: sub-command} beside `train` and `evaluate`; one called `evaluate` replaces the default one"""
    needs: str = ""
    """flags without which nothing but a preset can be trained, for the examples of `--help`"""
    checkpoint_prefix: str = "checkpoint_step_"
    """a step checkpoint is called this and the step's number"""
    best_metric: str = "val_loss"
    best_is: Literal["lower", "higher"] = "lower"
    patience_metric: tuple[str, Literal["lower", "higher"]] | None = None
    """(metric, which way is better) that `--patience` waits for; None: the best metric"""
    monitored: tuple[str, ...] = ()
    """terms of `loss` that are not trained on (an accuracy): logged under their own names, with weight 0 in the objective"""
    throughput: tuple[str, str] | None = None
    """(unit, loss term): `train/{unit}_per_sec` counts that term's items; None: samples"""
    free_settings: tuple[str, ...] = ("dropout",)
    """flags of `pretrained_settings` that may be given another value, because the weights do not depend on them"""
    other_weights: str = "choose other weights"
    """the advice in the error for any other of these flags"""

    def __init__(self) -> None:
        self.report: Report[ConfigT] = self.report_class(self)
        self.notes: list[str] = []
        """lines about the weights that `pretrained` has found, printed with their name"""

    # ---- what is trained on what

    def build_data(self, config: ConfigT) -> Data:
        """The data sets. Raise ValueError or OSError, with one line of text, for what a user can mend."""
        raise TypeError(f"{type(self).__name__} lacks build_data")

    def build_model(self, config: ConfigT, data: Data) -> nn.Module:
        """The bare network, whose sizes may depend on `data` (a vocabulary).

        It initialises itself as usual, with any of torch's functions. They are only recorded here, and executed later for one
        parameter at a time, with random numbers from (seed, its name); so this method cannot read a tensor's values.
        """
        raise TypeError(f"{type(self).__name__} lacks build_model")

    # ---- with which loss

    def items(self, batch: Batch) -> dict[str, int]:
        """{loss term: how many items it averages over}, from a batch on the host, before the forward pass."""
        raise TypeError(f"{type(self).__name__} lacks items")

    def loss(self, network: Any, batch: Batch) -> dict[str, Tensor]:
        """{loss term: sum over its items, a scalar}, with the names of `items`."""
        raise TypeError(f"{type(self).__name__} lacks loss")

    def loss_weights(self, config: ConfigT) -> dict[str, float]:
        """{loss term: its weight} in the objective, the sum over terms of weight x sum / items. Default weight: 1.0."""
        return {}

    # ---- measured how

    def measure(self, network: Any, batch: Batch) -> Mapping[str, Measured]:
        """{name: (sum, count)} of an evaluation batch: the loss terms (the default), and any other measures.

        A loss term may be a sum alone; its count is then that of `items`.
        """
        return self.loss(network, batch)

    def derive(self, means: Mapping[str, float]) -> dict[str, float]:
        """Metrics computed from means (perplexity from the loss), in training and evaluation alike."""
        return {}

    def flops_per_item(self, config: ConfigT, network: Any) -> float | None:
        """Training FLOPs (forward and backward) per item of `throughput`, for MFU; None: unknown."""
        return None

    # ---- updated how

    def parameter_groups(self, network: Any, config: ConfigT) -> list[dict[str, Any]]:
        """Optimizer groups. Default: no weight decay on parameters of fewer than two dimensions (biases, norms)."""
        from trainer.optimisation.optimizers import decay_groups

        return decay_groups(network, config.optimisation.weight_decay)

    def optimizer(self, network: Any, config: ConfigT) -> Optimizer:
        """The optimizer; default: the one that `--optimizer` names. Any torch optimizer will do, whatever state it keeps.

        ZeRO flattens and cuts parameters, so there the state must start at zero and not depend on shapes; under FSDP the
        optimizer has to work on DTensors.
        """
        from trainer.optimisation.optimizers import build

        return build(self.parameter_groups(network, config), network, config.optimisation)

    def learning_rate(self, step: int, total_steps: int, config: ConfigT) -> float:
        """Learning rate of optimizer step `step` (1 .. total_steps). Default: linear warm-up, cosine to `min_lr`."""
        from trainer.optimisation.schedule import warmup_cosine

        o = config.optimisation
        return warmup_cosine(step, total_steps, o.warmup_steps, o.learning_rate, o.min_lr)

    def scheduled_rate(self, step: int, total_steps: int, config: ConfigT) -> float:
        """The learning rate of a step: that of `--schedule`, or `learning_rate` by default."""
        from trainer.optimisation.schedule import named

        o = config.optimisation
        if o.schedule == "recipe":
            return self.learning_rate(step, total_steps, config)
        return named(o.schedule, step, total_steps, o.warmup_steps, o.learning_rate, o.min_lr, o.cooldown_fraction)

    # ---- kept with the weights

    def pretrained_settings(self, name: str, saved: ConfigT | None) -> Mapping[str, Any]:
        """{flag: value} of the network whose weights `--init_from` names: they hold where these flags are not typed.

        `name` is a checkpoint folder of this recipe, whose configuration is `saved`, or a folder or hub name in another format
        (`saved` is None). Default: all flags of the model. Raise ValueError or OSError, with one line, if this recipe cannot
        build that network.
        """
        if saved is None:
            raise ValueError(f"is no checkpoint of {self.name}, and it reads no others")
        return vars(saved.model)

    def pretrained(self, name: str, network: Any, initial: Weights) -> Mapping[str, StoredTensor]:
        """{name in the network: stored tensor} of an `--init_from` that is no checkpoint of this recipe. Each process reads
        what it will hold. Raise ValueError or OSError, with one line, if there are none.

        The network is on the meta device; `initial` are its own initial weights.
        """
        raise ValueError(f"init_from {name!r} is not a checkpoint of {self.name}; give the path of one")

    def checkpoint_files(self, config: ConfigT, network: Any, data: Data) -> Mapping[str, str | Mapping[str, Tensor]]:
        """{file name: content} of further files of every checkpoint.

        Text (config.json, tokenizer.json), or {name: tensor} for a file name that ends in .safetensors.
        """
        return {}
