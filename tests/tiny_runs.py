"""The smallest run of each recipe that still shows everything of it, for the properties that hold for all recipes.

A tiny run takes milliseconds a step: dropout off, no trackers, no data workers, no evaluation or save unless requested.
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
    """train, validation and test: rows of 1 to 12 words, so that micro-batches have unlike token counts."""
    rng, folder = random.Random(0), folder / "text"
    folder.mkdir(exist_ok=True)
    words = ["a", "of", "river", "stone", "walked", "quietly", "between", "seventeen", "lighthouses"]
    for name, rows in (("train", 60), ("validation", 9), ("test", 3)):
        lines = [" ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(rows)]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return folder


def gpt2(folder: Path) -> Argv:
    """Padded rows: their token counts differ.

    Of width 32, for in narrower networks some token at some position is nearly constant, and its layer norm amplifies rounding.
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
    """Three windows of four from one set of ids, the others from another."""
    return [*tinystories(folder), "--train_data_path", f"{folder}/ids/train.ids=3", f"{folder}/ids/valid.ids=1"]


def gpt2_mixture(folder: Path) -> Argv:
    """The same of ids, in blocks, with attention within documents."""
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
    """Short vectors, some of which end within the prefix: the two losses have different counts.

    bf16 rounds the gradient of a handful of stopping times, whose errors nearly cancel, to 1e-2, and more so through more
    layers: the weight keeps it from being most of the norm.
    """
    argv = ["--d_model", "16", "--num_layers", "1", "--num_heads", "2", "--d_ff", "24", "--dropout", "0"]
    return [*argv, *QUIET, "--max_len", "60", "--prefix_len", "12", "--val_numbers", "9", "--stopping_weight", "0.1"]


def pfn(folder: Path) -> Argv:
    """One model on a pool of tasks; of width 48, for in narrower ones bf16 rounds away a thousandth of the gradient norm."""
    argv = ["--d_model", "48", "--num_layers", "2", "--num_heads", "2", "--d_vocab", "16", "--examples", "12"]
    return [*argv, "--task_size", "3", "--num_tasks", "5", "--eval_sequences", "0", *QUIET]


def pfn_stack(folder: Path) -> Argv:
    """Three models in one network: a loss term each."""
    return [*pfn(folder), "--stack", "1", "7", "0"]


def vit(folder: Path) -> Argv:
    """Images cropped, mirrored and mixed at random: all of it must follow from the number of a sample.

    With the mean of the patches: the gradient of a class token goes through one row, and twenty steps in bf16 apart by 1e-3.
    """
    argv = ["--num_samples", "60", "--val_samples", "9", "--num_classes", "20", "--in_channels", "1", "--patch_size", "2"]
    argv += ["--window_size", "3", "3", "--d_model", "16", "--num_layers", "2", "--num_heads", "2", "--dropout", "0"]
    return [*argv, "--pool", "mean", "--crop_padding", "1", "--flip", "--mixup", "0.3", "--label_smoothing", "0.1", *QUIET]


def finetune(folder: Path) -> Argv:
    """A Llama with fresh weights, on prompts and completions of which only these are predicted."""
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
"""{name: (module:class of the recipe, its command line for a folder it may write data to)}; steps, batch and rates are added"""
