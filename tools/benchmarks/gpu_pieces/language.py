"""Pieces (a) and (c): tokens per second of the two language models."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_pieces.contenders import Contender, allocated, free, interleave, wait_for
from benchmarks.gpu_pieces.hf_trainer import HfTrainerLoop, hf_gpt2
from benchmarks.gpu_pieces.nanogpt import PADDED_VOCABULARY, Shape, nanogpt_steps
from benchmarks.gpu_pieces.results import Result
from benchmarks.gpu_pieces.sessions import OurLoop, Place, bare_loop, configured, random_ids
from recipes.gpt2_wikitext import Gpt2Wikitext
from recipes.tinystories_lm import TinyStoriesLM
from trainer.distributed.hardware import peak_flops
from trainer.recipe import Data, Recipe

GPT2_VOCABULARY = 50_257
LARGEST_BATCH = 64


class SyntheticGpt2(Gpt2Wikitext):
    """The recipe on blocks of random ids instead of text, with the size of GPT-2's vocabulary but without its tokenizer."""

    def __init__(self, ids: Path, vocab_size: int = GPT2_VOCABULARY) -> None:
        super().__init__()
        self.ids, self.vocab_size = ids, vocab_size

    def build_data(self, config: Any) -> Data:
        """Training data of blocks of the file; no evaluation sets."""
        from recipes.data.text import Text, TokenSplit
        from recipes.data.token_samples import TokenBlocks

        split = TokenSplit(np.memmap(self.ids, np.uint16, "r"), np.array([], dtype=np.int64), 0, "random")
        text = Text("{}", self.vocab_size, self.vocab_size - 1, {})
        blocks = TokenBlocks(split, config.model.max_length, self.vocab_size, self.vocab_size - 1)
        return Data(blocks, {}, fingerprint="random", extra={"text": text})


def gpt2(place: Place, batch_size: int, **values: Any) -> tuple[SyntheticGpt2, Any]:
    """(recipe, configuration) of GPT-2 124M without dropout, compiled; a small one in a rehearsal. `values`: other flags."""
    ids, vocab_size = place.folder / "gpt2.ids", place.size(GPT2_VOCABULARY, 300)
    if not ids.exists():
        random_ids(ids, place.size(20_000_000, 5000), vocab_size)
    recipe = SyntheticGpt2(ids, vocab_size)
    small = {"d_model": 32, "num_layers": 2, "num_heads": 2, "max_length": 16}
    settings = place.size({}, small) | {"dropout": 0.0, "batch_size": batch_size, "compile": "yes"}
    return recipe, configured(recipe, **(settings | values))


def tinystories(place: Place, **values: Any) -> tuple[TinyStoriesLM, Any]:
    """(recipe, configuration) of the defaults, compiled; small ones in a rehearsal. `values`: other flags."""
    ids = place.folder / "tinystories.ids"
    vocab_size = place.size(10_000, 60)
    if not ids.exists():
        random_ids(ids, place.size(20_000_000, 5000), vocab_size)
    recipe = TinyStoriesLM()
    small = {"d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 24, "context_length": 12, "batch_size": 4}
    settings = place.size({}, small) | {"train_data_path": (str(ids),), "val_data_path": (str(ids),), "vocab_size": vocab_size}
    return recipe, configured(recipe, **({"compile": "yes"} | settings | values))


def fitted_batch(place: Place) -> int:
    """The batch size, a multiple of 8, with which GPT-2 fits the GPU's memory beside the models of the peers.

    Computed from the memory of uncompiled steps with two batch sizes; compiled steps take less.
    """
    if place.device.type != "cuda":
        return place.size(8, 2)
    peaks = []
    for batch_size in (4, 8):
        free(place.device)
        torch.cuda.reset_peak_memory_stats(place.device)
        steps = bare_loop(*gpt2(place, batch_size), place.launch, compile_mode=None)
        steps.run(2)
        wait_for(place.device)
        peaks.append(torch.cuda.max_memory_allocated(place.device))
        held = allocated(place.device)
        steps.close()
    free(place.device)
    a_sample = max(1.0, (peaks[1] - peaks[0]) / 4)
    total = torch.cuda.get_device_properties(place.device).total_memory
    fitting = (0.85 * total - 5 * held) / a_sample
    return int(max(8, min(LARGEST_BATCH, 8 * math.floor(fitting / 8))))


def piece_a(place: Place) -> Result:
    """Tokens per second, MFU and memory of GPT-2 in four loops; with half the batch again after an out-of-memory error."""
    batch_size = fitted_batch(place)
    while True:
        try:
            return measure_gpt2(place, batch_size)
        except torch.OutOfMemoryError:
            if batch_size <= 8:
                raise
        free(place.device)  # outside `except`, where the traceback still holds the tensors
        batch_size //= 2


def measure_gpt2(place: Place, batch_size: int) -> Result:
    """Piece (a) with a given batch size."""
    recipe, config = gpt2(place, batch_size)
    m = config.model
    peer_vocabulary = place.size(PADDED_VOCABULARY, 320)
    shape = Shape(peer_vocabulary, m.max_length, m.num_layers, m.num_heads or m.d_model // 64, m.d_model)
    hf_shape = Shape(recipe.vocab_size, m.max_length, m.num_layers, shape.heads, m.d_model)
    makers: dict[str, Callable[[], Contender]] = {
        "ours": lambda: OurLoop(recipe, config, place.launch, place.new_folder()),
        "bare loop": lambda: bare_loop(recipe, config, place.launch),
        "bare loop again": lambda: bare_loop(recipe, config, place.launch),
        "nanoGPT's arrangement": lambda: nanogpt_steps(shape, batch_size, recipe.ids, place.device),
        "HF Trainer": lambda: HfTrainerLoop(
            hf_gpt2(hf_shape), m.max_length, batch_size, recipe.ids, place.new_folder(), place.device
        ),
    }
    return compare_tokens(place, makers, recipe, config, batch_size * m.max_length, 450_000)


def piece_c(place: Place) -> Result:
    """Tokens per second, MFU and memory of the TinyStories default model in two loops."""
    recipe, config = tinystories(place)
    makers: dict[str, Callable[[], Contender]] = {
        "ours": lambda: OurLoop(recipe, config, place.launch, place.new_folder()),
        "bare loop": lambda: bare_loop(recipe, config, place.launch),
    }
    tokens = config.optimisation.batch_size * config.model.context_length
    return compare_tokens(place, makers, recipe, config, tokens, 1_600_000)


def compare_tokens(
    place: Place, makers: dict[str, Callable[[], Contender]], recipe: Recipe, config: Any, tokens: int, goal: int
) -> Result:
    """Interleave the contenders. Figures: tokens per second, MFU, memory, and ours over each other one.

    `tokens`: tokens of a step. `goal`: tokens per second on an H100.
    """
    result = Result()
    rounds, steps = place.size((7, 8), (2, 2))
    measured = interleave(makers, place.device, rounds, steps, warmup=place.size(5, 1), required="ours", until=place.until)
    result.notes += measured.notes()
    data = recipe.build_data(config)
    with torch.device("meta"):
        flops = recipe.flops_per_item(config, recipe.build_model(config, data))
    peak = peak_flops(place.device, "bf16")
    for name in measured.seconds:
        rate = tokens / measured.median(name)
        result.add(f"{name}, tokens/s", rate, "", f"{goal:,} on an H100" if name == "ours" else "")
        if peak and flops:
            result.add(f"{name}, MFU", rate * flops / peak, "")
        if name in measured.peak_gib:
            result.add(f"{name}, peak memory", measured.peak_gib[name], "GiB")
    goals = {"bare loop": "0.995", "nanoGPT's arrangement": "1.25"}
    for name in measured.seconds:
        if name != "ours":
            result.add(f"ours / {name}, speed", measured.ratio("ours", name), "x", goals.get(name, ""))
    result.add("batch", config.optimisation.batch_size, "samples")
    result.details["ms per step: fastest, median, slowest"] = measured.spread()
    return result
