"""Pictures of relative position bias and of attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.plot import new_figure, save_figure

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes

DIVERGING = "RdBu_r"  # white is no bias, red attracts, blue repels


def draw_heat_maps(bias: torch.Tensor, out: Path, title: str) -> None:
    """The bias of one layer, [heads, N, N], one panel a head, all on one scale around 0."""
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
        shown = axis.imshow(values[head], cmap=DIVERGING, vmin=-limit, vmax=limit, interpolation="nearest")
        axis.set_title(f"head {head}", fontsize=9)
        axis.set(xlabel="key position", ylabel="query position")
        axis.tick_params(labelsize=7)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    figure.colorbar(shown, ax=axes.tolist(), label="bias added to the attention logit", shrink=0.8)
    figure.suptitle(title, fontsize=11)
    save_figure(figure, out)


def draw_offsets(tables: Sequence[torch.Tensor], out: Path, title: str) -> None:
    """The bias as a function of (dx, dy): a row of panels for each layer's [heads, 2 Wh - 1, 2 Ww - 1], a column for each head.

    Each layer has its own scale, printed beside it. Drawn is where the *key* lies as seen from the query, dx to the right.
    """
    heads, height, width = tables[0].shape
    figure = new_figure(1.6 * heads + 1.6, (1.6 if height > 1 else 1.2) * len(tables) + 0.9)
    axes = figure.subplots(len(tables), heads, squeeze=False, sharex=True, sharey=height > 1 or "row")
    for layer, table in enumerate(tables):
        # The table counts query - key: turned round it is key - query.
        values = table.detach().float().cpu().flip(1, 2).numpy()
        limit = max(float(abs(values).max()), 1e-12)
        for head, axis in enumerate(axes[layer]):
            if height > 1:
                edges = (-width / 2, width / 2, height / 2, -height / 2)
                image = axis.imshow(values[head], cmap=DIVERGING, vmin=-limit, vmax=limit, extent=edges)
                axis.plot(0, 0, "+", color="0.2", markersize=5, markeredgewidth=0.8)
            else:
                axis.plot(range(-(width // 2), width // 2 + 1), values[head, 0], linewidth=1)
                axis.axhline(0, color="0.7", linewidth=0.6)
            axis.tick_params(labelsize=7)
            if layer == 0:
                axis.set_title(f"head {head}", fontsize=9)
        axes[layer, 0].set_ylabel(f"layer {layer}" + ("\ndy" if height > 1 else "\nbias"), fontsize=9)
        if height > 1:
            figure.colorbar(image, ax=axes[layer].tolist(), shrink=0.9, aspect=12).ax.tick_params(labelsize=7)
    for axis in axes[-1]:
        axis.set_xlabel("dx" if height > 1 else "key - query", fontsize=9)
    figure.suptitle(title, fontsize=11)
    save_figure(figure, out)


def draw_attention(images: Any, maps: Any, titles: Sequence[str], out: Path, title: str) -> None:
    """Beside each image what each layer attends to there: `images` [batch, channels, height, width] with values of 0 to 1,
    `maps` [layers, batch, rows, columns] of patches.
    """
    figure = new_figure(1.7 * (len(maps) + 1) + 0.8, 1.9 * len(images) + 0.6)
    axes = figure.subplots(len(images), len(maps) + 1, squeeze=False)
    height, width = images.shape[2:]
    for row, image in enumerate(images):
        pixels = image.clip(0, 1).transpose(1, 2, 0)
        _show(axes[row, 0], pixels[..., 0] if pixels.shape[-1] == 1 else pixels, titles[row])
        for layer, weights in enumerate(maps[:, row]):
            axis = axes[row, layer + 1]
            share = weights / max(weights.sum(), 1e-12)
            shown = axis.imshow(
                share, cmap="viridis", vmin=0, extent=(0, width, height, 0), interpolation="nearest", aspect="equal"
            )
            axis.set(xticks=[], yticks=[])
            axis.set_title((f"layer {layer}\n" if row == 0 else "") + f"highest {share.max():.0%}", fontsize=8)
    whole, label = axes.flatten().tolist(), "share of attention: none to each panel's highest"
    figure.colorbar(shown, ax=whole, ticks=[], label=label, shrink=0.6)
    figure.suptitle(title, fontsize=11)
    save_figure(figure, out)


def _show(axis: Axes, pixels: Any, title: str) -> None:
    axis.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=8)
