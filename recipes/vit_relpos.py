"""Vision Transformer with relative position bias: `recipes/vit_relpos.py [train|evaluate|visualise|compare] ...`"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from recipes.commands.attention_visualisation import Visualise, visualise
from recipes.commands.image_evaluation import Evaluate, accuracies_in, draw_images, evaluate, summarise_run
from recipes.commands.timm_weights import timm_settings, timm_weights
from recipes.experiments.position_encodings import Compare, compare
from recipes.models.patch_grid import YAML_SECTIONS, resolve_sizes
from trainer.command_line import sections
from trainer.command_line.bounds import Bound, Fraction, NotNegative, Positive
from trainer.command_line.locations import Existing
from trainer.distributed.hardware import cores
from trainer.main import main
from trainer.optimisation.schedule import ramp_cosine
from trainer.recipe import Batch, Command, Data, Log, Recipe, Report
from trainer.reporting.run_directory import RunDirectory

if TYPE_CHECKING:
    from torch import Tensor, nn

WORKERS = min(4, cores())


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    d_model: Annotated[int, Positive, arg(aliases=("--embed_dim",))] = 96
    num_layers: Annotated[int, Positive, arg(aliases=("--n_layers", "--depth"))] = 4
    num_heads: Annotated[int, Positive, arg(aliases=("--nhead",))] = 4
    head_dim: Annotated[int | None, Positive] = None
    """width of a head (default: d_model / num_heads)"""
    d_ff: Annotated[int | None, Positive] = None
    """width of the MLP (default: 4 x d_model)"""
    dropout: Annotated[float, Fraction] = 0.1
    """of attention weights, the output of attention, and the MLP"""
    attention_scale: bool = True
    """attention logits divided by sqrt(head_dim)"""
    pool: Literal["cls", "mean", "mean_then_norm"] = "cls"
    """what the head reads: a class token; or, without one, the mean of the patches, behind or before the last norm"""
    patch_size: Annotated[int | None, Positive] = None
    """pixels along a side of a patch (default: 16; digits 2, cifar10 4)"""
    window_size: Annotated[tuple[int, int] | None, Positive] = None
    """patches of an image, down and across (default: what image_size gives)"""
    sequence_length: Annotated[int | None, Positive] = None
    """patches of an image: the product of the window"""
    absolute_position: Annotated[bool, arg(aliases=("--use_absolute_position",))] = True
    """a learnt embedding for each position"""
    relative_position: Annotated[bool, arg(aliases=("--use_relative_position",))] = True
    """a learnt bias for each offset between two positions, in every layer and head"""
    bias_type: Literal["2d", "1d"] = "2d"
    """offsets down and across, or in the sequence of patches"""
    learnable_bias: bool = True
    """train the bias tables, or keep their initial values"""
    init_std: Annotated[float, NotNegative] = 0.02
    """standard deviation of the initial bias tables"""


@dataclass(frozen=True)
class DataConfig:
    """The images and what is done to them."""

    dataset: str = "synthetic"
    """synthetic, digits (no network), folder (with --data_dir), cifar10, or OWNER/NAME of a hub image set"""
    data_dir: Annotated[str | None, Existing] = None
    """folder of images: CLASS/*.png, or train/CLASS/*.png beside val and test"""
    image_size: Annotated[int | None, Positive, arg(aliases=("--img_size",))] = None
    """pixels along a side (default: window x patch; without a window 112, digits 8, cifar10 32, others 224)"""
    in_channels: int | None = None
    """1 (grey) or 3 (default: 3, digits 1)"""
    num_classes: Annotated[int | None, Positive] = None
    """classes of the synthetic set (default: 10); the others have theirs"""
    num_samples: Annotated[int | None, Positive] = None
    """training images of the synthetic set (default: 1000)"""
    val_samples: Annotated[int | None, Positive] = None
    """validation images (default: a fifth), where a set has no validation split of its own"""
    crop_padding: Annotated[int, NotNegative] = 0
    """pixels of grey around a training image before a random crop back to its size"""
    flip: bool = False
    """mirror half of the training images (not where left and right matter: digits, synthetic)"""
    mixup: Annotated[float, NotNegative] = 0.0
    """alpha of mixup (0: off)"""
    label_smoothing: Annotated[float, Fraction] = 0.0
    image_mean: Annotated[tuple[float, ...], Bound(0, most=1)] = (0.5,)
    """subtracted from pixels of 0 to 1: one number, or one for each channel"""
    image_std: Annotated[tuple[float, ...], Positive] = (0.5,)
    """what they are then divided by"""


@dataclass(frozen=True)
class OptimisationConfig(sections.Optimisation):
    """The optimizer and its schedule."""

    warmup_fraction: Annotated[float, Fraction] = 0.1
    """part of the run that is warm-up, if warmup_steps is 0"""


@dataclass(frozen=True)
class Config:
    """Train a Vision Transformer on images, with or without relative position bias."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimisation: OptimisationConfig = OptimisationConfig(
        batch_size=32, max_epochs=100.0, learning_rate=1e-3, warmup_steps=0, weight_decay=0.05, beta2=0.999
    )
    run: sections.Run = sections.Run(
        num_workers=WORKERS, log_every=50, eval_every=0, save_epochs=10, use_tensorboard=True, wandb_project="vit-relpos"
    )
    yaml_sections = YAML_SECTIONS

    def resolved(self) -> Config:
        """With the sizes that follow from others, and channels. ValueError, naming both, for two that contradict each other."""
        grid, channels = resolve_sizes(self.model, self.data)
        model = replace(self.model, patch_size=grid.patch, window_size=grid.window)
        return replace(self, model=model, data=replace(self.data, in_channels=channels))


class VitReport(Report[Config]):
    """What a run prints and plots."""

    loss_unit = "nats per image"

    def schedule(self, config: Config) -> str:
        """A description of warm-up and cosine."""
        o = config.optimisation
        warmup = f"{o.warmup_steps:,} steps" if o.warmup_steps else f"{o.warmup_fraction:.0%} of the run"
        return f"learning rate from {0.1 * o.learning_rate:g} to {o.learning_rate:g} in {warmup}, by a cosine to {o.min_lr:g}"

    def log_line(self, step: int, metrics: Mapping[str, float]) -> str:
        """The console line of a log step, with the training accuracy."""
        return super().log_line(step, metrics).replace(" | LR", f" | Accuracy: {metrics['train/accuracy']:.2%} | LR", 1)

    def evaluation_line(self, step: int, metrics: Mapping[str, float]) -> str:
        """Validation loss, top-1 and, if there are more than five classes, top-5 accuracy."""
        accuracies = accuracies_in(metrics, "eval/val_", ": ", " | ")
        return f"Evaluating at step {step}... val_loss: {metrics['eval/val_loss']:.4f} | {accuracies}"

    def show_batch(self, batch: Batch, config: Config, data: Data, run: RunDirectory) -> str:
        """Draw the augmented images; a line that names the picture."""
        return draw_images(batch, data.extra["classes"], run.plots / "first_batch.png")

    def baseline(self, config: Config, data: Data) -> tuple[str, float]:
        """The loss of a uniform guess."""
        return "uniform guess", math.log(len(data.extra["classes"]))

    def after_training(self, config: Config, data: Data, run: RunDirectory, checkpoint: Path, log: Log) -> None:
        """Log top-1 and top-5 of the last and the best weights beside a linear classifier, and plot them."""
        summarise_run(data, run, log)


class VitRelpos(Recipe[Config]):
    """Image classification."""

    name = "vit_relpos"
    config_class, report_class = Config, VitReport
    presets = {name: Path(__file__).with_name("configs") / f"vit_relpos_{name}.yaml" for name in ("quick", "compare")}
    commands = {
        "evaluate": Command(Evaluate, evaluate),
        "visualise": Command(Visualise, visualise),
        "compare": Command(Compare, compare),
    }
    best_metric, best_is = "val_accuracy", "higher"
    patience_metric = ("val_loss", "lower")
    monitored, throughput = ("accuracy",), ("images", "class")
    free_settings = ("dropout", "relative_position", "image_mean", "image_std")

    def build_data(self, config: Config) -> Data:
        """Train, validation and, where there is one, test; the training images augmented."""
        from recipes.data.image_batches import Augmentation, ImageBatches
        from recipes.data.images import image_sets

        d, seed = config.data, config.optimisation.seed
        grid, channels = resolve_sizes(config.model, d)
        sizes = (grid.image, grid.patch, channels, d.num_classes, d.num_samples, d.val_samples)
        sets = image_sets(d.dataset, d.data_dir, *sizes, seed)
        augmentation = Augmentation(d.crop_padding, d.flip, d.mixup, d.label_smoothing, sum(d.image_mean) / len(d.image_mean))
        train = ImageBatches(sets.train, len(sets.classes), augmentation, seed)
        validation, test = (ImageBatches(part, len(sets.classes)) if part else None for part in (sets.validation, sets.test))
        return Data(train, {"val": validation}, test, sets.fingerprint, sets.notes, {"classes": sets.classes})

    def build_model(self, config: Config, data: Data) -> nn.Module:
        """A VisionTransformer with as many classes as the data."""
        from recipes.models.vit import build_vit

        return build_vit(config.model, config.data, len(data.extra["classes"]))

    def items(self, batch: Batch) -> dict[str, int]:
        """The number of images, of which both the loss and the accuracy are means."""
        return dict.fromkeys(("class", "accuracy"), len(batch["labels"]))

    def loss(self, network: Any, batch: Batch) -> dict[str, Tensor]:
        """Summed cross entropy with the (smoothed, mixed) targets, and the number of correct predictions."""
        from torch.nn.functional import cross_entropy

        from recipes.data.image_batches import mixed

        logits, labels = network(mixed(batch)).float(), batch["labels"]
        nats = cross_entropy(logits, batch.get("targets", labels), reduction="sum")
        return {"class": nats, "accuracy": (logits.detach().argmax(-1) == labels).sum()}

    def measure(self, network: Any, batch: Batch) -> dict[str, tuple[Tensor | float, Tensor | float]]:
        """Cross entropy, top-1 and, if there are more than five classes, top-5 accuracy."""
        from torch.nn.functional import cross_entropy

        logits, labels = network(batch["images"]).float(), batch["labels"]
        hits = logits.topk(min(5, logits.shape[-1])).indices == labels[:, None]  # [batch, 5]
        sums = {"class": cross_entropy(logits, labels, reduction="sum"), "accuracy": hits[:, 0].sum(), "top5": hits.sum()}
        return {name: (total, len(labels)) for name, total in sums.items() if name != "top5" or logits.shape[-1] > 5}

    def parameter_groups(self, network: Any, config: Config) -> list[dict[str, Any]]:
        """No weight decay on biases, norms, bias tables, class token and position embedding."""
        return network.weight_decay_groups(config.optimisation.weight_decay)

    def learning_rate(self, step: int, total_steps: int, config: Config) -> float:
        """Warm-up from a tenth of the peak, then a cosine."""
        o = config.optimisation
        return ramp_cosine(step, total_steps, o.warmup_steps or o.warmup_fraction * total_steps, o.learning_rate, o.min_lr, 0.1)

    def pretrained_settings(self, name: str, saved: Config | None) -> Mapping[str, Any]:
        """The flags of one of our own checkpoints, or those that describe a timm ViT."""
        return vars(saved.model) if saved else timm_settings(name)

    def pretrained(self, name: str, network: Any, initial: Any) -> Any:
        """Weights of a timm ViT, interpolated to our grid; a classifier of other classes, and biases it lacks, start anew."""
        return timm_weights(name, network, initial, self.notes)

    def checkpoint_files(self, config: Config, network: Any, data: Data) -> dict[str, str | dict[str, Tensor]]:
        """The arguments of VisionTransformer, and the names of the classes."""
        classes = json.dumps(data.extra["classes"], ensure_ascii=False)
        return {"config.json": json.dumps(network.arguments, indent=2), "classes.json": classes}

    def flops_per_item(self, config: Config, network: Any) -> float:
        """Training FLOPs of an image."""
        return network.training_flops()


if __name__ == "__main__":
    main(VitRelpos())
