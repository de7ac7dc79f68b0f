"""A Vision Transformer with relative position bias:

    accelerate launch recipes/vit_relpos.py [train|evaluate|visualise|compare] ...

Where the guide's functions went: `train_epoch` is `trainer.loop`, `evaluate` is `trainer.evaluation`, `save_checkpoint` is
`trainer.saving`; `SyntheticImageDataset` is in `recipes.data.images`, `VisionTransformer` in `recipes.models.vit`, and
`visualize_relative_position_bias` in `recipes.studies.relative_bias`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from recipes.studies.relative_bias import Compare, Evaluate, Visualise, compare, evaluate, show_trained, visualise
from recipes.studies.vit_config import Config, image_shape, vit_arguments
from trainer.main import main
from trainer.recipe import Batch, Command, Data, Recipe
from trainer.schedule import ramp_cosine

CONFIGS = Path(__file__).parent / "configs"


class VitRelpos(Recipe):
    """Model, data and loss."""

    name = "vit_relpos"
    Config = Config
    presets = {"quick": CONFIGS / "vit_relpos_quick.yaml", "compare": CONFIGS / "vit_relpos_compare.yaml"}
    commands = {
        "evaluate": Command(Evaluate, evaluate),
        "visualise": Command(Visualise, visualise),
        "compare": Command(Compare, compare),
    }
    best_metric, best_is = "val_accuracy", "higher"
    patience_metric = ("val_loss", "lower")
    monitored = ("accuracy",)
    speed = ("images", "class")
    loss_unit = "nats per image"

    def build_data(self, config: Config) -> Data:
        """Train, validation and, where there is one, test; the training images augmented."""
        from recipes.data.image_batches import Augmentation, ImageBatches
        from recipes.data.images import image_sets

        d, m, seed = config.data, config.model, config.optimisation.seed
        sizes = (image_shape(m), m.patch_size, d.in_channels, d.num_classes, d.num_samples, d.val_samples)
        found = image_sets(d.dataset, d.data_dir, *sizes, seed)
        augmentation = Augmentation(d.crop_padding, d.flip, d.mixup, d.label_smoothing)
        rest = (len(found.classes), d.image_mean, d.image_std)
        train = ImageBatches(*found.train, *rest, augmentation, seed)
        test = ImageBatches(*found.test, *rest) if found.test else None
        return Data(train, {"val": ImageBatches(*found.validation, *rest)}, test, found.fingerprint, extra={"sets": found})

    def build_model(self, config: Config, data: Data) -> Any:
        """VisionTransformer with as many classes as the data."""
        from recipes.models.vit import VisionTransformer

        arguments = vit_arguments(config.model, config.data, len(data.extra["sets"].classes))
        return VisionTransformer(**arguments, gradient_checkpointing=config.run.gradient_checkpointing)

    def items(self, batch: Batch) -> dict[str, int]:
        """Images, for the loss and for the accuracy beside it."""
        return dict.fromkeys(("class", "accuracy"), len(batch["labels"]))

    def loss(self, network: Any, batch: Batch) -> dict[str, Any]:
        """Summed cross entropy with the (smoothed, mixed) targets, and how many labels are right."""
        from torch.nn.functional import cross_entropy

        logits, targets = network(batch["images"]).float(), batch.get("targets", batch["labels"])
        right = (logits.detach().argmax(-1) == batch["labels"]).sum()
        return {"class": cross_entropy(logits, targets, reduction="sum"), "accuracy": right}

    def loss_weights(self, config: Config) -> dict[str, float]:
        """The accuracy is only looked at."""
        return {"accuracy": 0.0}

    def measure(self, network: Any, batch: Batch) -> dict[str, tuple[Any, float]]:
        """Cross entropy, top-1 and top-5 accuracy."""
        from torch.nn.functional import cross_entropy

        logits, labels = network(batch["images"]).float(), batch["labels"]
        hits = logits.topk(min(5, logits.shape[-1])).indices == labels[:, None]  # [batch, 5]
        found = {"class": cross_entropy(logits, labels, reduction="sum"), "accuracy": hits[:, 0].sum(), "top5": hits.sum()}
        return {name: (total, len(labels)) for name, total in found.items()}

    def parameter_groups(self, network: Any, config: Config) -> list[dict[str, Any]]:
        """No weight decay on biases, norms, bias tables, class token and position embedding."""
        from recipes.models.vit import weight_decay_groups

        return weight_decay_groups(network, config.optimisation.weight_decay)

    def learning_rate(self, step: int, total_steps: int, config: Config) -> float:
        """Warm-up from a tenth of the peak, then a cosine: the guide's two schedulers at the start of each epoch."""
        o = config.optimisation
        warmup = o.warmup_steps or o.warmup_fraction * total_steps
        return ramp_cosine(step, total_steps, warmup, o.learning_rate, o.min_lr, start_factor=0.1)

    def schedule_text(self, config: Config) -> str:
        """The schedule in words."""
        o = config.optimisation
        warmup = f"{o.warmup_steps:,} steps" if o.warmup_steps else f"{o.warmup_fraction:.0%} of the run"
        return f"learning rate from {0.1 * o.learning_rate:g} to {o.learning_rate:g} in {warmup}, by a cosine to {o.min_lr:g}"

    def documents(self, config: Config, network: Any, data: Data) -> dict[str, str]:
        """The arguments of VisionTransformer, and the names of the classes."""
        classes = data.extra["sets"].classes
        return {
            "config.json": json.dumps(vit_arguments(config.model, config.data, len(classes)), indent=2),
            "classes.json": json.dumps(classes, ensure_ascii=False),
        }

    def flops_per_item(self, config: Config, network: Any) -> float:
        """For MFU."""
        from recipes.models.vit import training_flops_per_image

        return training_flops_per_image(network)

    def log_line(self, step: int, metrics: Mapping[str, float]) -> str:
        """With the training accuracy."""
        return super().log_line(step, metrics).replace(" | LR", f" | Accuracy: {metrics['train/accuracy']:.2%} | LR", 1)

    def evaluation_line(self, step: int, metrics: Mapping[str, float]) -> str:
        """Loss, top-1 and top-5 of the validation set."""
        loss, top1, top5 = (metrics[f"eval/val_{name}"] for name in ("loss", "accuracy", "top5"))
        return f"Evaluating at step {step}... val_loss: {loss:.4f} | top-1: {top1:.2%} | top-5: {top5:.2%}"

    def baseline(self, config: Config, data: Data) -> tuple[str, float]:
        """The loss of a uniform guess."""
        return "uniform guess", math.log(len(data.extra["sets"].classes))

    def after_training(self, config: Config, data: Data, run: Any, checkpoint: Any, say: Callable[[str], None]) -> None:
        """Top-1 and top-5 of the last and the best weights, and a picture of the accuracy."""
        show_trained(run, say)


if __name__ == "__main__":
    main(VitRelpos())
