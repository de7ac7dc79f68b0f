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
"""prints a line: on stdout and in train.log, on rank 0"""


class RecipeConfig(Protocol):
    """A recipe's configuration: a frozen dataclass of four sections, each a frozen dataclass, flat on the command line.

    It may have a method `resolved() -> config` that fills in what follows from other values, with ValueError or UserError for
    values that contradict each other; and a class attribute `yaml_sections`, see `trainer.command_line.flags.read_yaml`.
    """

    @property
    def model(self) -> Any:
        """The network."""

    @property
    def data(self) -> Any:
        """The data sets."""

    @property
    def optimisation(self) -> Optimisation:
        """What decides the weights, beside the two."""

    @property
    def run(self) -> Run:
        """Where and how the run happens."""


ConfigT = TypeVar("ConfigT", bound=RecipeConfig)


class Dataset(Protocol):
    """Samples by number, a whole batch at a time.

    A finite set has `__len__`; for sample number s its item is `s % len` and its epoch `s // len`, so every random choice
    about a sample (crop, flip) may be drawn from (seed, s). A set without `__len__` generates sample s from (seed, s).
    Tensors of a batch have the batch as their first dimension. A set with `on_device = True` generates where the model is:
    it is called in the training process, after one call of its `to(device)`. Any other must be picklable: data-loading
    workers get a copy.

    A sample that cannot be read is a ValueError or OSError that names it: `--bad_samples skip` reads the next one instead.
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
    run: Callable[[Any, Any, Launch, Log], None]
    """called as run(recipe, flags, launch, log)"""
    presets: Mapping[str, Path] = field(default_factory=dict)
    """YAML files by short name; the flags need a field `preset`"""


class Report(Generic[ConfigT]):
    """What is printed and drawn of a run. Every method is optional; a recipe names its subclass as `report_class`."""

    loss_unit: str = ""
    """of the loss, in plots"""

    def __init__(self, recipe: Recipe[ConfigT]) -> None:
        self.recipe = recipe

    def schedule(self, config: ConfigT) -> str:
        """A description of the learning-rate schedule, printed at start."""
        from trainer.optimisation.schedule import described

        return described(config.optimisation)

    def start_lines(self, step: int, total_steps: int, device: str, parameters: int, trained: int) -> list[str]:
        """Lines before the first step of a launch, which is step + 1; `trained`: how many of the parameters are."""
        return []

    def step_metrics(self, step: int) -> dict[str, float]:
        """Further metrics of a log step, as `train/{name}`. Of its number alone, which is all that a resumed run knows."""
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
        """A batch as a person reads it, for `--debug`: its first text, or where a picture of it is. Empty: nothing to add."""
        return ""

    def evaluation_line(self, step: int, metrics: Mapping[str, float]) -> str:
        """The console line of an evaluation; `metrics` have their full names, `eval/val_loss`."""
        return f"Evaluating at step {step}... " + " | ".join(f"{k.removeprefix('eval/')}: {v:.4f}" for k, v in metrics.items())

    def warnings(self) -> list[str]:
        """What this process saw in the last evaluation that somebody should look at, a line each; emptied by the call."""
        return []

    def baseline(self, config: ConfigT, data: Data) -> tuple[str, float] | None:
        """(name, loss) of a trivial model on the `val` set, a line in the loss plot."""
        return None

    def after_training(self, config: ConfigT, data: Data, run: RunDirectory, checkpoint: Path, log: Log) -> None:
        """On rank 0, once the run has finished: baselines, samples, pictures. `checkpoint` is the folder of the last one.

        All is saved by then, and a request to stop, or the time limit, ends the process in the middle of it: replace files
        whole.
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
    """sub-commands beside `train` and `evaluate`, by name; one called `evaluate` takes the place of the usual one"""
    needs: str = ""
    """flags that a command line without a preset cannot do without, for the examples of `--help`"""
    checkpoint_prefix: str = "checkpoint_step_"
    """the name of a step checkpoint, before its number"""
    best_metric: str = "val_loss"
    best_is: Literal["lower", "higher"] = "lower"
    patience_metric: tuple[str, Literal["lower", "higher"]] | None = None
    """(metric, which way is better) that `--patience` waits for; None: the best metric"""
    monitored: tuple[str, ...] = ()
    """terms of `loss` that are no losses (an accuracy): logged under their own names, with weight 0 in the objective"""
    throughput: tuple[str, str] | None = None
    """(unit, loss term): `train/{unit}_per_sec` counts that term's items; None counts samples"""
    free_settings: tuple[str, ...] = ("dropout",)
    """of `pretrained_settings`, the flags that may be given another value: weights do not depend on them"""
    other_weights: str = "choose other weights"
    """what to do where those flags are to be others"""

    def __init__(self) -> None:
        self.report: Report[ConfigT] = self.report_class(self)
        self.notes: list[str] = []
        """what the user should know of the weights that `pretrained` has found, printed with their name"""

    # ---- what is trained on what

    def build_data(self, config: ConfigT) -> Data:
        """The data sets. ValueError or OSError with a one-line text for what a user can mend."""
        raise TypeError(f"{type(self).__name__} lacks build_data")

    def build_model(self, config: ConfigT, data: Data) -> nn.Module:
        """The bare network; `data` may decide its vocabulary.

        It initialises itself as usual, with any of torch's functions. These are recorded, and done for one parameter at a time,
        drawn from (seed, its name); so nothing here can look at a tensor's values.
        """
        raise TypeError(f"{type(self).__name__} lacks build_model")

    # ---- with which loss

    def items(self, batch: Batch) -> dict[str, int]:
        """{loss term: how many items it averages over}, from a host batch alone."""
        raise TypeError(f"{type(self).__name__} lacks items")

    def loss(self, network: Any, batch: Batch) -> dict[str, Tensor]:
        """{loss term: sum over its items}, scalars, under the names of `items`."""
        raise TypeError(f"{type(self).__name__} lacks loss")

    def loss_weights(self, config: ConfigT) -> dict[str, float]:
        """Weights of the terms in the objective, sum of weight x sum / items; a term not named has 1.0."""
        return {}

    # ---- measured how

    def measure(self, network: Any, batch: Batch) -> Mapping[str, Measured]:
        """{name: (sum, count)} of one evaluation batch: the loss terms, which are the default, and whatever else.

        A sum alone, under the name of a loss term, is one over its `items`, which the host counts.
        """
        return self.loss(network, batch)

    def derive(self, means: Mapping[str, float]) -> dict[str, float]:
        """Metrics that follow from means (perplexity from a loss); for training and evaluation alike."""
        return {}

    def flops_per_item(self, config: ConfigT, network: Any) -> float | None:
        """Training FLOPs (forward and backward) for each item of `throughput`, for MFU; None: not known."""
        return None

    # ---- updated how

    def parameter_groups(self, network: Any, config: ConfigT) -> list[dict[str, Any]]:
        """Optimizer groups. Default: no weight decay on parameters of fewer than two dimensions (biases, norms)."""
        from trainer.optimisation.optimizers import decay_groups

        return decay_groups(network, config.optimisation.weight_decay)

    def optimizer(self, network: Any, config: ConfigT) -> Optimizer:
        """Default: the one `--optimizer` names. Any torch optimizer will do: what state it keeps is read from it.

        Under ZeRO, which flattens parameters and cuts them, its state must start at zero and not depend on their shapes; under
        FSDP it computes on DTensors.
        """
        from trainer.optimisation.optimizers import build

        return build(self.parameter_groups(network, config), network, config.optimisation)

    def learning_rate(self, step: int, total_steps: int, config: ConfigT) -> float:
        """Learning rate of optimizer step `step` (1 .. total_steps). Default: linear warm-up, cosine to `min_lr`."""
        from trainer.optimisation.schedule import warmup_cosine

        o = config.optimisation
        return warmup_cosine(step, total_steps, o.warmup_steps, o.learning_rate, o.min_lr)

    def scheduled_rate(self, step: int, total_steps: int, config: ConfigT) -> float:
        """The learning rate of a step: by `--schedule`, or the recipe's own."""
        from trainer.optimisation.schedule import named

        o = config.optimisation
        if o.schedule == "recipe":
            return self.learning_rate(step, total_steps, config)
        return named(o.schedule, step, total_steps, o.warmup_steps, o.learning_rate, o.min_lr, o.cooldown_fraction)

    # ---- kept with the weights

    def pretrained_settings(self, name: str, saved: ConfigT | None) -> Mapping[str, Any]:
        """{flag: the value that the weights of an `--init_from` belong to}, for flags that are not given.

        `name` is a checkpoint folder of this recipe, with its configuration `saved`, or a folder or hub name of somebody
        else's (None). Default: the flags of the model. ValueError or OSError, in one line, for what this network has not.
        """
        if saved is None:
            raise ValueError(f"is no checkpoint of {self.name}, and it reads no others")
        return vars(saved.model)

    def pretrained(self, name: str, network: Any, initial: Weights) -> Mapping[str, StoredTensor]:
        """Weights for an `--init_from` that is no checkpoint of this recipe, by the names of the network; each process reads
        what it will hold. ValueError or OSError in one line if there are none.

        The network has no memory yet; `initial` are the values that it begins with on its own.
        """
        raise ValueError(f"init_from {name!r} is not a checkpoint of {self.name}; give the path of one")

    def checkpoint_files(self, config: ConfigT, network: Any, data: Data) -> Mapping[str, str | Mapping[str, Tensor]]:
        """{file name: its content} to stand beside the weights in every checkpoint.

        Text (config.json, tokenizer.json), or named tensors for a name that ends in .safetensors.
        """
        return {}
