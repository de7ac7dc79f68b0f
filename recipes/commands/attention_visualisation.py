"""`visualise` of the image recipe: relative position bias and attention of a trained model, as pictures and statistics."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from trainer.command_line.bounds import NotNegative
from trainer.command_line.locations import Existing, ToMake
from trainer.command_line.sections import Device
from trainer.errors import UserError
from trainer.recipe import Data, Log, Recipe
from trainer.reporting.plot import new_figure, save_figure

if TYPE_CHECKING:
    import numpy as np
    import torch
    from matplotlib.axes import Axes

    from trainer.distributed.launch import Launch

LOOKED_AT = 256
"""validation images that those in the picture are chosen from"""
COLOURS = "RdBu_r"  # white: no bias; red: more attention; blue: less
NAME_CHARACTERS = 14  # of a class, above its picture


@dataclass(frozen=True)
class Visualise:
    """Plot the bias of a trained model (as a matrix, and by offset) and its attention; print statistics of the bias."""

    model_path: Annotated[str, Existing] = "checkpoints/best_model"
    """checkpoint folder, as given or of the latest run"""
    plots_dir: Annotated[str | None, ToMake] = None
    """folder of the plots (default: plots/ of the run)"""
    images: Annotated[int, NotNegative] = 4
    """validation images whose attention is plotted: one of each class, wrongly classified ones first"""
    device: Device = "auto"


def visualise(recipe: Recipe, flags: Visualise, launch: Launch, log: Log) -> None:
    """The `visualise` sub-command; rank 0 does the work."""
    import torch

    from trainer.checkpoints.network import find_checkpoint, load_network
    from trainer.setup import load_data

    checkpoint, config = find_checkpoint(recipe, flags.model_path, launch)
    data = load_data(recipe, config, launch)
    network = load_network(recipe, checkpoint, config, data, launch.device)
    of_run = checkpoint.path.parent.name == "checkpoints"
    folder = Path(flags.plots_dir or (checkpoint.path.parent.parent / "plots" if of_run else "plots"))

    def on_main() -> None:
        try:
            with torch.no_grad():
                _plot_bias(network, folder, log)
                count = min(flags.images, len(data.evaluation["val"]))
                if count:
                    _plot_attention(network, data, config, folder, count, launch.device, log)
        except OSError as error:
            raise UserError(f"{folder}: {error}; choose another --plots_dir") from error

    launch.control.on_main(on_main)


def bias_statistics(network: Any) -> list[str]:
    """A line for each bias table: mean, standard deviation and range of its values."""
    return [
        f"{name}: mean={p.mean():.4f}, std={p.std():.4f}, min={p.min():.4f}, max={p.max():.4f}"
        for name, p in network.named_parameters()
        if "relative_position_bias" in name
    ]


def _plot_bias(network: Any, folder: Path, log: Log) -> None:
    lines = bias_statistics(network)
    if not lines:
        log("This model has no relative position bias (--relative_position was off): no plots of it")
        return
    for line in lines:
        log(line)
    layers = [block.attn.relative_position_bias for block in network.blocks]
    for number, layer in enumerate(layers):
        path = folder / f"bias_layer_{number}.png"
        visualize_relative_position_bias(layer(), path, f"relative position bias, layer {number}")
        log(f"Plot: {path}")
    path = folder / "bias_by_offset.png"
    plot_offsets([layer.by_offset() for layer in layers], path, "bias by where the key lies from the query, in patches")
    log(f"Plot: {path}")


def _plot_attention(network: Any, data: Data, config: Any, folder: Path, count: int, device: torch.device, log: Log) -> None:
    """Plot the attention of the class token, or without one the average of all patches'; the mean over heads."""
    from recipes.data.image_pixels import from_0_to_1
    from trainer.data.bad_samples import first_batch

    dataset, classes = data.evaluation["val"], data.extra["classes"]
    batch = first_batch(dataset, range(min(LOOKED_AT, len(dataset))), config.run)
    predicted = network(batch["images"].to(device)).argmax(-1).tolist()
    chosen = one_of_each_class(batch["labels"].tolist(), predicted, count)
    images, labels = batch["images"][chosen].to(device), batch["labels"][chosen].tolist()
    predictions = [predicted[number] for number in chosen]
    attention = network.attention_maps(images).mean(2)  # [layers, batch, N, N]
    with_class_token = network.pool == "cls"
    attention = attention[:, :, 0, 1:] if with_class_token else attention.mean(2)
    names = [name if len(name) <= NAME_CHARACTERS else f"{name[: NAME_CHARACTERS - 1]}…" for name in classes]
    titles = [f"class {names[label]}\npredicted {names[p]}" for label, p in zip(labels, predictions, strict=True)]
    query = "the class token attends to" if with_class_token else "the patches attend to, on average"
    pixels = from_0_to_1(images.cpu()).numpy()
    maps = attention.unflatten(-1, network.grid).cpu().numpy()
    path = folder / "attention.png"
    plot_attention(pixels, maps, titles, path, f"what {query}; mean over heads")
    log(f"Plot: {path}")


def one_of_each_class(labels: Sequence[int], predicted: Sequence[int], count: int) -> list[int]:
    """Indices of `count` images: one of each class, then a second one, and so on; wrongly classified ones first."""
    order = sorted(range(len(labels)), key=lambda i: (labels[i] == predicted[i], i))
    so_far: Counter[int] = Counter()
    rounds = {}
    for number in order:
        rounds[number] = so_far[labels[number]]
        so_far[labels[number]] += 1
    return sorted(order, key=rounds.__getitem__)[:count]


def visualize_relative_position_bias(bias: torch.Tensor, save_path: str | Path, title: str = "relative position bias") -> None:
    """Plot the bias of one layer, [heads, N, N], into `save_path`: one heat map a head, all on one scale around 0. OSError."""
    from matplotlib.ticker import MaxNLocator

    values = bias.detach().float().cpu().numpy()
    columns = math.ceil(math.sqrt(len(values)))
    rows = math.ceil(len(values) / columns)
    figure = new_figure(2.6 * columns + 1, 2.6 * rows + 0.6)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    limit = max(float(abs(values).max()), 1e-12)
    for head, axis in enumerate(axes):
        if head >= len(values):
            axis.set_axis_off()
            continue
        image = axis.imshow(values[head], cmap=COLOURS, vmin=-limit, vmax=limit, interpolation="nearest")
        axis.set_title(f"head {head}", fontsize=9)
        axis.set(xlabel="key position", ylabel="query position")
        axis.tick_params(labelsize=7)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    figure.colorbar(image, ax=axes.tolist(), label="bias added to the attention logit", shrink=0.8)
    figure.suptitle(title, fontsize=11)
    save_figure(figure, Path(save_path))


def plot_offsets(tables: Sequence[torch.Tensor], out: Path, title: str) -> None:
    """The bias as a function of (dx, dy): a row of panels for each layer's [heads, 2 Wh - 1, 2 Ww - 1], a column for each head.

    Each layer has its own scale, printed beside it. (dx, dy) is the offset of the *key* from the query, dx to the right.
    """
    from matplotlib.ticker import MaxNLocator

    heads, height, width = tables[0].shape
    figure = new_figure(1.6 * heads + 1.6, (1.6 if height > 1 else 1.2) * len(tables) + 0.9)
    axes = figure.subplots(len(tables), heads, squeeze=False, sharex=True, sharey=height > 1 or "row")
    for layer, table in enumerate(tables):
        # The table is by query - key: flipped, it is by key - query.
        values = table.detach().float().cpu().flip(1, 2).numpy()
        limit = max(float(abs(values).max()), 1e-12)
        for head, axis in enumerate(axes[layer]):
            if height > 1:
                edges = (-width / 2, width / 2, height / 2, -height / 2)
                image = axis.imshow(values[head], cmap=COLOURS, vmin=-limit, vmax=limit, extent=edges)
                axis.plot(0, 0, "+", color="0.2", markersize=5, markeredgewidth=0.8)
            else:
                axis.plot(range(-(width // 2), width // 2 + 1), values[head, 0], linewidth=1)
                axis.axhline(0, color="0.7", linewidth=0.6)
            axis.tick_params(labelsize=7)
            axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))  # no half patches
            if height > 1:
                axis.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            if layer == 0:
                axis.set_title(f"head {head}", fontsize=9)
        axes[layer, 0].set_ylabel(f"layer {layer}" + ("\ndy" if height > 1 else "\nbias"), fontsize=9)
        if height > 1:
            figure.colorbar(image, ax=axes[layer].tolist(), shrink=0.9, aspect=12).ax.tick_params(labelsize=7)
    for axis in axes[-1]:
        axis.set_xlabel("dx" if height > 1 else "key - query", fontsize=9)
    figure.suptitle(title, fontsize=11)
    save_figure(figure, out)


def plot_attention(images: np.ndarray, maps: np.ndarray, titles: Sequence[str], out: Path, title: str) -> None:
    """Plot each image, and beside it the attention of each layer: `images` [batch, channels, height, width] from 0 to 1, `maps`
    [layers, batch, rows of patches, columns of patches].
    """
    figure = new_figure(1.7 * (len(maps) + 1) + 0.8, 1.9 * len(images) + 0.6)
    axes = figure.subplots(len(images), len(maps) + 1, squeeze=False)
    height, width = images.shape[2:]
    for row, image in enumerate(images):
        pixels = image.clip(0, 1).transpose(1, 2, 0)
        _plot_image(axes[row, 0], pixels[..., 0] if pixels.shape[-1] == 1 else pixels, titles[row])
        for layer, weights in enumerate(maps[:, row]):
            axis = axes[row, layer + 1]
            share = weights / max(weights.sum(), 1e-12)
            heat_map = axis.imshow(
                share, cmap="viridis", vmin=0, extent=(0, width, height, 0), interpolation="nearest", aspect="equal"
            )
            axis.set(xticks=[], yticks=[])
            axis.set_title((f"layer {layer}\n" if row == 0 else "") + f"highest {share.max():.0%}", fontsize=8)
    label = "share of attention: none to each panel's highest"
    figure.colorbar(heat_map, ax=axes.flatten().tolist(), ticks=[], label=label, shrink=0.6)
    figure.suptitle(title, fontsize=11)
    save_figure(figure, out)


def _plot_image(axis: Axes, pixels: Any, title: str) -> None:
    axis.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=8)
