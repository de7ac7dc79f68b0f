"""Command lines of the smallest run of each recipe that still uses all of its parts, for tests of properties of all recipes.

A step takes milliseconds: dropout is off; there are no trackers or data workers, and no evaluation or save unless requested.
The functions take a folder for data, write these there, and return the command line.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tiny_models import rows_folder

Argv = list[str]
NOT_AT_EPOCHS = ["--eval_epochs", "0", "--save_epochs", "0"]
QUIET = ["--num_workers", "0", "--log_every", "1", "--eval_every", "0", "--save_every", "0", "--no_use_tensorboard"]


def text_folder(folder: Path) -> Path:
    """Write train.txt, validation.txt and test.txt: rows of 1 to 12 words, so that micro-batches differ in tokens. Returns the
    folder of these files."""
    rng, folder = random.Random(0), folder / "text"
    folder.mkdir(exist_ok=True)
    words = ["a", "of", "river", "stone", "walked", "quietly", "between", "seventeen", "lighthouses"]
    for name, rows in (("train", 60), ("validation", 9), ("test", 3)):
        lines = [" ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(rows)]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return folder


def gpt2(folder: Path) -> Argv:
    """Padded rows, whose token counts differ.

    Width 32: in narrower networks some token at some position is nearly constant over its features, so that the layer norm
    amplifies rounding errors.
    """
    argv = ["--data_dir", str(text_folder(folder)), "--tokenizer", "train", "--vocab_size", "300", "--packing", "rows"]
    argv += ["--d_model", "32", "--num_layers", "2", "--num_heads", "2", "--max_length", "24", "--dropout", "0"]
    return [*argv, *QUIET, "--max_training_hours", "1"]


def tinystories(folder: Path) -> Argv:
    """Windows at random starts of 2,000 ids in a file."""
    rng, folder = random.Random(1), folder / "ids"
    folder.mkdir(exist_ok=True)
    for name, count in (("train", 2000), ("valid", 150)):
        ids = array("H", (min(rng.randrange(60), rng.randrange(60)) for _ in range(count)))
        (folder / f"{name}.ids").write_bytes(ids.tobytes())
    argv = ["--train_data_path", str(folder / "train.ids"), "--val_data_path", str(folder / "valid.ids"), "--vocab_size", "60"]
    argv += ["--d_model", "16", "--num_layers", "2", "--num_heads", "2", "--d_ff", "24", "--context_length", "12", "--qk_norm"]
    return [*argv, *QUIET]


def mixture(folder: Path) -> Argv:
    """Three of four windows from one set of ids, the others from another."""
    return [*tinystories(folder), "--train_data_path", f"{folder}/ids/train.ids=3", f"{folder}/ids/valid.ids=1"]


def gpt2_mixture(folder: Path) -> Argv:
    """Three of four blocks from one set of ids, the others from another; attention stays within documents."""
    from recipes.data.text import prepare_text

    argv = gpt2(folder)
    text = prepare_text("", argv[1:2], "train", 300, folder / "cache")
    for name, splits in (("web", ("train", "validation")), ("books", ("validation", "test"))):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "tokenizer.json").write_text(text.tokenizer_json)
        for file, split in zip(("train", "valid"), splits, strict=True):
            np.asarray(text.splits[split].ids).tofile(folder / name / f"{file}.ids")
    sets = ["--data_dir", f"{folder}/web=3", f"{folder}/books=1"]
    return [*argv, "--packing", "blocks", "--max_length", "12", "--document_mask", *sets]


def collatz(folder: Path) -> Argv:
    """Short vectors, some of which end within the prefix, so that the two losses have different counts.

    The errors of a handful of stopping times nearly cancel, so that bf16 rounds their gradient by 1e-2, and by more in deeper
    networks. The small weight keeps that gradient from dominating the norm.
    """
    argv = ["--d_model", "16", "--num_layers", "1", "--num_heads", "2", "--d_ff", "24", "--dropout", "0"]
    return [*argv, *QUIET, "--max_len", "60", "--prefix_len", "12", "--val_numbers", "9", "--stopping_weight", "0.1"]


def pfn(folder: Path) -> Argv:
    """One model on a pool of tasks. Width 48: in narrower models bf16 rounds the gradient norm by more than a thousandth."""
    argv = ["--d_model", "48", "--num_layers", "2", "--num_heads", "2", "--d_vocab", "16", "--examples", "12"]
    return [*argv, "--task_size", "3", "--num_tasks", "5", "--eval_sequences", "0", *QUIET]


def pfn_stack(folder: Path) -> Argv:
    """Three models in one network, with a loss term each."""
    return [*pfn(folder), "--stack", "1", "7", "0"]


def vit(folder: Path) -> Argv:
    """Images cropped, mirrored and mixed at random, all of which must follow from the number of a sample.

    The patches are averaged: with a class token the gradient goes through one row, and twenty steps in bf16 differ by 1e-3.
    """
    argv = ["--num_samples", "60", "--val_samples", "9", "--num_classes", "20", "--in_channels", "1", "--patch_size", "2"]
    argv += ["--window_size", "3", "3", "--d_model", "16", "--num_layers", "2", "--num_heads", "2", "--dropout", "0"]
    return [*argv, "--pool", "mean", "--crop_padding", "1", "--flip", "--mixup", "0.3", "--label_smoothing", "0.1", *QUIET]


def finetune(folder: Path) -> Argv:
    """A Llama with fresh weights, on prompts and completions; only the completions are predicted."""
    argv = ["--init_from", "tiny", "--data_dir", str(rows_folder(folder / "examples")), "--max_length", "32"]
    return [*argv, *QUIET, *NOT_AT_EPOCHS, "--samples", "0"]


TINY: dict[str, tuple[str, Callable[[Path], Argv]]] = {
    "tinystories": ("recipes.tinystories_lm:TinyStoriesLM", tinystories),
    "gpt2": ("recipes.gpt2_wikitext:Gpt2Wikitext", gpt2),
    "collatz": ("recipes.collatz:Collatz", collatz),
    "pfn": ("recipes.pfn_raventos:PFNRaventos", pfn),
    "pfn_stack": ("recipes.pfn_raventos:PFNRaventos", pfn_stack),
    "finetune": ("recipes.finetune_lm:FinetuneLM", finetune),
    "vit": ("recipes.vit_relpos:VitRelpos", vit),
}
"""{name: (module:class of the recipe, function that returns the command line)}; tests add steps, batch sizes and rates"""
