"""What is done with a trained Vision Transformer: measure it, look at its bias and attention; and the study beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from recipes.studies.position_study import Compare, compare
from trainer.errors import Refusal
from trainer.recipe import Recipe

if TYPE_CHECKING:
    import torch

    from trainer.launch import Launch
    from trainer.run_directory import RunDirectory

__all__ = ["Compare", "Evaluate", "Visualise", "compare", "evaluate", "show_trained", "visualise"]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Evaluate:
    """Measure a trained model: loss, top-1 and top-5 accuracy."""

    model_path: str = "checkpoints/best_model"
    """checkpoint folder, as given or below the latest run"""
    split: Literal["train", "validation", "test"] | None = None
    """default: test where the data have one, else validation"""
    data_dir: str | None = None
    """another folder of images with the same classes than the checkpoint's"""
    batch_size: Annotated[int, arg(aliases=("--batch",))] = 64
    """samples of one micro-step, summed over all processes"""
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True)
class Visualise:
    """Draw the bias of a trained model (as a matrix, and as a function of the offset) and its attention; print statistics."""

    model_path: str = "checkpoints/best_model"
    """checkpoint folder, as given or below the latest run"""
    plots_dir: str | None = None
    """where the pictures go (default: plots/ of the run)"""
    images: int = 4
    """validation images to draw attention on"""
    device: Literal["auto", "cpu", "cuda"] = "auto"


def evaluate(recipe: Recipe, flags: Evaluate, launch: Launch, say: Say) -> None:
    """The `evaluate` sub-command: exact on any number of processes."""
    from trainer.inference import evaluate_trained, find, load
    from trainer.setup import load_data

    if flags.batch_size < 1:
        raise Refusal(f"batch_size {flags.batch_size} must be above 0")
    found, config = find(recipe, flags.model_path, launch)
    if flags.data_dir:
        other = {"dataset": "folder", "data_dir": flags.data_dir, "num_samples": None, "val_samples": None}
        config = replace(config, data=replace(config.data, **other))
    data = load_data(recipe, config, launch)
    trained_on, classes = json.loads(found.text("classes.json")), data.extra["sets"].classes
    if classes != trained_on:
        raise Refusal(f"{flags.data_dir} has the classes {_list(classes)}; {found.path} was trained on {_list(trained_on)}")
    split = flags.split or ("test" if data.test else "validation")
    dataset = {"train": data.train.plain(), "validation": data.evaluation["val"], "test": data.test}[split]
    if dataset is None:
        raise Refusal(f"{config.data.dataset} has no test split; use --split validation")
    network = load(recipe, found, config, data, launch)
    say(f"Evaluating {found.path} on {launch.processes} process{'es' if launch.processes > 1 else ''}")
    result = evaluate_trained(recipe, network, config, dataset, launch, flags.batch_size)
    say(f"{split}: {_accuracy(result)}, loss {result['loss']:.4f} nats per image over {len(dataset):,} images, each once")


def _list(classes: list[str]) -> str:
    return ", ".join(classes[:6]) + (f" and {len(classes) - 6} more" if len(classes) > 6 else "")


def _accuracy(result: Any, prefix: str = "") -> str:
    return f"top-1 {result[f'{prefix}accuracy']:.2%}, top-5 {result[f'{prefix}top5']:.2%}"


def show_trained(run: RunDirectory, say: Say) -> None:
    """At the end of training: top-1 and top-5 of the last and the best weights, and a picture of the accuracy."""
    from trainer.metrics import read_metrics
    from trainer.plot import plot_metric

    rows = read_metrics(run.metrics)
    measured = [row for row in rows if row.get("eval/val_accuracy") is not None]
    best = max(measured, key=lambda row: (row["eval/val_accuracy"], -row["step"]))
    say(f"validation, last weights: {_accuracy(measured[-1], 'eval/val_')}")
    say(f"validation, best weights (step {best['step']:,}, best_model): {_accuracy(best, 'eval/val_')}")
    picture = run.plots / "accuracy.png"
    plot_metric({"validation top-1": run.metrics}, "eval/val_accuracy", picture)
    say(f"Plot: {picture}")


def visualise(recipe: Recipe, flags: Visualise, launch: Launch, say: Say) -> None:
    """The `visualise` sub-command: on rank 0 only."""
    from trainer.inference import find, load, on_main
    from trainer.setup import load_data

    if flags.images < 0:
        raise Refusal(f"images {flags.images} must not be negative")
    found, config = find(recipe, flags.model_path, launch)
    data = load_data(recipe, config, launch)
    network = load(recipe, found, config, data, launch)
    folder = found.path.parent.parent / "plots" if found.path.parent.name == "checkpoints" else Path("plots")
    folder = Path(flags.plots_dir) if flags.plots_dir else folder

    def draw() -> None:
        try:
            _draw_bias(network, folder, say)
            count = min(flags.images, len(data.evaluation["val"]))
            if count:
                _draw_attention(network, data, config, folder, count, launch.device, say)
        except OSError as error:
            raise Refusal(f"{folder}: {error}; choose another --plots_dir") from error

    on_main(launch, draw)


def visualize_relative_position_bias(bias: torch.Tensor, save_path: str | Path, title: str = "relative position bias") -> None:
    """Draw the bias of one layer, [heads, N, N], a heat map for each head, into `save_path`; makes its folder. OSError."""
    from recipes.studies.bias_pictures import draw_heat_maps

    draw_heat_maps(bias, Path(save_path), title)


def bias_statistics(network: Any) -> list[str]:
    """A line for each bias table: mean and standard deviation of its values, as the guide prints them, and their range."""
    return [
        f"{name}: mean={p.mean():.4f}, std={p.std():.4f}, min={p.min():.4f}, max={p.max():.4f}"
        for name, p in network.named_parameters()
        if "relative_position_bias" in name
    ]


def _draw_bias(network: Any, folder: Path, say: Say) -> None:
    from recipes.studies.bias_pictures import draw_offsets

    lines = bias_statistics(network)
    if not lines:
        say("This model has no relative position bias (--relative_position was off): nothing to draw of it")
        return
    for line in lines:
        say(line)
    layers = [block.attn.relative_position_bias for block in network.blocks]
    for number, layer in enumerate(layers):
        path = folder / f"bias_layer_{number}.png"
        visualize_relative_position_bias(layer(), path, f"relative position bias, layer {number}")
        say(f"Plot: {path}")
    path = folder / "bias_by_offset.png"
    draw_offsets([layer.by_offset() for layer in layers], path, "bias by where the key lies from the query, in patches")
    say(f"Plot: {path}")


def _draw_attention(network: Any, data: Any, config: Any, folder: Path, count: int, device: Any, say: Say) -> None:
    """What the class token attends to (without one: what the patches attend to on average), as a mean over heads."""
    import torch

    from recipes.studies.bias_pictures import draw_attention

    dataset, classes = data.evaluation["val"], data.extra["sets"].classes
    batch = dataset.__getitems__(range(count))
    images, labels = batch["images"].to(device), batch["labels"].tolist()
    guesses = network(images).argmax(-1).tolist()
    maps = network.attention_maps(images).mean(2)  # [layers, batch, N, N]
    with_class = network.pool == "cls"
    maps = maps[:, :, 0, 1:] if with_class else maps.mean(2)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (config.data.image_mean, config.data.image_std))
    titles = [f"{classes[i]}\nguessed {classes[j]}" for i, j in zip(labels, guesses, strict=True)]
    path, whose = folder / "attention.png", "the class token" if with_class else "the patches, on average,"
    pixels = (images.cpu() * std + mean).numpy()
    grids = maps.unflatten(-1, network.grid).cpu().numpy()
    draw_attention(pixels, grids, titles, path, f"what {whose} attends to, mean over heads")
    say(f"Plot: {path}")
