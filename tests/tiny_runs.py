"""The smallest run of each recipe that still shows everything of it, for the properties that hold for all recipes.

A tiny run takes milliseconds a step: dropout off, no trackers, no data workers, no evaluation or save that is not asked for.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

Argv = list[str]
QUIET = ["--num_workers", "0", "--log_every", "1", "--eval_every", "0", "--save_every", "0", "--no_use_tensorboard"]


def text_folder(folder: Path) -> Path:
    """train, validation and test: rows of 1 to 12 words, so that micro-batches have unlike token counts."""
    dice, folder = random.Random(0), folder / "text"
    folder.mkdir(exist_ok=True)
    words = ["a", "of", "river", "stone", "walked", "quietly", "between", "seventeen", "lighthouses"]
    for name, rows in (("train", 60), ("validation", 9), ("test", 3)):
        lines = [" ".join(dice.choices(words, k=dice.randint(1, 12))) for _ in range(rows)]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return folder


def gpt2(folder: Path) -> Argv:
    """Padded rows: their token counts differ."""
    argv = ["--data_dir", str(text_folder(folder)), "--tokenizer", "train", "--vocab_size", "300", "--packing", "rows"]
    argv += ["--d_model", "16", "--num_layers", "2", "--num_heads", "2", "--max_length", "24", "--dropout", "0"]
    return [*argv, *QUIET, "--max_training_hours", "1"]


def vit(folder: Path) -> Argv:
    """Images cropped, mirrored and mixed at random: all of it must follow from the number of a sample."""
    argv = ["--num_samples", "60", "--val_samples", "9", "--num_classes", "6", "--in_channels", "1", "--patch_size", "2"]
    argv += ["--window_size", "3", "3", "--d_model", "16", "--num_layers", "2", "--num_heads", "2", "--dropout", "0"]
    return [*argv, "--crop_padding", "1", "--flip", "--mixup", "0.3", "--label_smoothing", "0.1", *QUIET]


TINY: dict[str, tuple[str, Callable[[Path], Argv]]] = {
    "gpt2": ("recipes.gpt2_wikitext:Gpt2Wikitext", gpt2),
    "vit": ("recipes.vit_relpos:VitRelpos", vit),
}
"""{name: (module:class of the recipe, its command line for a folder it may write data to)}; steps, batch and rates are added"""
