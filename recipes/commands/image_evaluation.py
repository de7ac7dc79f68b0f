"""`evaluate` of the image recipe, and its summary at the end of training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from trainer.command_line.bounds import Positive
from trainer.command_line.locations import Existing
from trainer.command_line.sections import Device
from trainer.errors import UserError
from trainer.evaluate import measured
from trainer.recipe import Batch, Data, Log, Recipe

if TYPE_CHECKING:
    from trainer.distributed.launch import Launch
    from trainer.reporting.run_directory import RunDirectory


@dataclass(frozen=True)
class Evaluate:
    """Measure a trained model: loss, top-1 and top-5 accuracy."""

    model_path: Annotated[str, Existing] = "checkpoints/best_model"
    """checkpoint folder, as given or of the latest run"""
    split: Literal["train", "validation", "test"] | None = None
    """default: test where the data have one, else validation"""
    data_dir: Annotated[str | None, Existing] = None
    """another folder of images, with the classes of the model"""
    batch_size: Annotated[int, Positive, arg(aliases=("--batch",))] = 64
    """samples of one forward, summed over all processes"""
    device: Device = "auto"


def evaluate(recipe: Recipe, flags: Evaluate, launch: Launch, log: Log) -> None:
    """The `evaluate` sub-command: exact on any number of processes."""
    from trainer.checkpoints.network import find_checkpoint
    from trainer.setup import load_data

    checkpoint, config = find_checkpoint(recipe, flags.model_path, launch)
    if flags.data_dir:
        folder = {"dataset": "folder", "data_dir": flags.data_dir, "num_samples": None, "val_samples": None}
        config = replace(config, data=replace(config.data, **folder))
    data = load_data(recipe, config, launch)
    trained_classes, classes = json.loads(checkpoint.text("classes.json")), data.extra["classes"]
    if classes != trained_classes:
        raise UserError(
            f"{flags.data_dir} has the classes {_names(classes)}; {checkpoint.path} was trained on {_names(trained_classes)}"
        )
    split = flags.split or ("test" if data.test else "validation")
    dataset = {"train": data.train.without_augmentation(), "validation": data.evaluation["val"], "test": data.test}[split]
    if dataset is None:
        raise UserError(f"{config.data.dataset} has no test split; use --split validation")
    result = measured(recipe, checkpoint, config, data, {split: dataset}, flags.batch_size, launch, log)[split]
    log(f"{split}: {accuracies_in(result)}, loss {result['loss']:.4f} nats per image over {len(dataset):,} images, each once")


def _names(classes: Sequence[str]) -> str:
    return ", ".join(classes[:6]) + (f" and {len(classes) - 6} more" if len(classes) > 6 else "")


def accuracies_in(metrics: Mapping[str, float], prefix: str = "", is_: str = " ", separator: str = ", ") -> str:
    """The text of top-1 and, if it was measured, top-5 accuracy."""
    shares = {"top-1": metrics[f"{prefix}accuracy"], "top-5": metrics.get(f"{prefix}top5")}
    return separator.join(f"{name}{is_}{share:.2%}" for name, share in shares.items() if share is not None)


def draw_images(batch: Batch, classes: Sequence[str], out: Path) -> str:
    """Draw up to 16 images of a batch with their classes into `out`; returns a line that names the picture."""
    from recipes.data.image_batches import mixed
    from recipes.data.image_pixels import from_0_to_1
    from trainer.reporting.plot import new_figure, save_figure

    count = min(16, len(batch["images"]))
    pixels = from_0_to_1(mixed(batch)[:count]).clip(0, 1).permute(0, 2, 3, 1).numpy()
    columns = min(8, count)
    figure = new_figure(1.5 * columns, 1.8 * -(-count // columns))
    axes = figure.subplots(-(-count // columns), columns, squeeze=False).flatten()
    for axis in axes:
        axis.set_axis_off()
    for axis, image, label in zip(axes, pixels, batch["labels"].tolist(), strict=False):
        axis.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(classes[label][:16], fontsize=8)
    save_figure(figure, out)
    return f"Picture: {out}"


def summarise_run(data: Data, run: RunDirectory, log: Log) -> None:
    """Log top-1 and top-5 of the last and the best weights of a finished run beside a linear classifier, and plot them."""
    from recipes.baselines.images import logistic_regression
    from trainer.reporting.plot import draw_runs, save_figure
    from trainer.reporting.trackers import read_metrics

    evaluations = [row for row in read_metrics(run.metrics) if row.get("eval/val_accuracy") is not None]
    best = max(evaluations, key=lambda row: (row["eval/val_accuracy"], -row["step"]))
    log(f"validation, last weights: {accuracies_in(evaluations[-1], 'eval/val_')}")
    log(f"validation, best weights (step {best['step']:,}, best_model): {accuracies_in(best, 'eval/val_')}")
    baseline = None
    try:
        known = logistic_regression(data.train.without_augmentation(), data.evaluation["val"])
        log(f"validation, logistic regression on the pixels: top-1 {known.accuracy:.2%}, loss {known.nats:.4f} nats per image")
        baseline = ("logistic regression", known.accuracy)
    except (ValueError, OSError) as error:
        log(f"No logistic regression on the pixels to compare with: {error}")
    plot, title = run.plots / "accuracy.png", f"vit_relpos: {run.path.name}"
    save_figure(draw_runs({"": run.metrics}, "eval/val_accuracy", title=title, baseline=baseline), plot)
    log(f"Plot: {plot}")
