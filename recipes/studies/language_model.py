"""What is done with a trained language model: evaluation in several units beside n-gram baselines, and generation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from tyro.conf import arg

from recipes.data.text import Text
from recipes.models.gpt2 import perplexity
from recipes.studies.ngram_baseline import bigram_loss, unigram_loss
from trainer.errors import Refusal
from trainer.recipe import Data, Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.launch import Launch
    from trainer.run_directory import RunDirectory

Say = Callable[[str], None]


@dataclass(frozen=True)
class Evaluate:
    """Measure a trained model: loss, perplexity per token and per word, beside n-gram baselines on the same tokens."""

    model_path: str = "checkpoints/best_model"
    """checkpoint folder, as given or below the latest run"""
    split: Literal["train", "validation", "test"] = "test"
    stride: int | None = None
    """tokens scored per window (default: all of it); smaller ones give each token more context"""
    dataset: Literal["wikitext2", "wikitext103", "embedded"] | None = None
    """another data set than the checkpoint's"""
    data_dir: str | None = None
    tokenizer: str | None = None
    batch_size: Annotated[int, arg(aliases=("--batch",))] = 8
    """samples of one micro-step, summed over all processes"""
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True)
class Sampling:
    """Continue a prompt with a trained model."""

    model_path: str = "checkpoints/best_model"
    """checkpoint folder, as given or below the latest run"""
    prompt: str = ""
    max_new_tokens: int = 100
    temperature: float = 0.8
    """0: the likeliest token each time"""
    top_p: float = 0.95
    """sample from the smallest set of tokens with this mass"""
    seed: int = 42
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True)
class Generate(Sampling):
    """Continue a prompt with a trained model."""

    top_k: int = 50
    """sample from so many tokens (0: all)"""
    repetition_penalty: float = 1.2


def evaluate(recipe: Recipe, flags: Evaluate, launch: Launch, say: Say) -> None:
    """The `evaluate` sub-command: exact on any number of processes."""
    from recipes.data.token_samples import TokenBlocks
    from trainer.inference import evaluate_trained, find, load
    from trainer.setup import load_data

    if flags.batch_size < 1:
        raise Refusal(f"batch_size {flags.batch_size} must be above 0")
    found, config = find(recipe, flags.model_path, launch)
    # The checkpoint's own tokenizer: one trained anew on other data would give other ids.
    tokenizer = flags.tokenizer or str(found.path / "tokenizer.json")
    given = {"dataset": flags.dataset, "data_dir": flags.data_dir, "tokenizer": tokenizer}
    if flags.dataset and not flags.data_dir:
        given["data_dir"] = ""
    given = {key: value for key, value in given.items() if value is not None}
    config = replace(config, data=replace(config.data, **given))
    data = load_data(recipe, config, launch)
    text, length, packing = data.extra["text"], config.model.max_length, config.data.packing
    dataset = {"train": data.train, "validation": data.evaluation["val"], "test": data.test}[flags.split]
    if flags.stride is not None:
        try:
            dataset = TokenBlocks(text.splits[flags.split], length, text.vocab_size, text.end_of_text, flags.stride)
        except ValueError as reason:
            raise Refusal(f"--{reason}") from None
        packing = "blocks"
    say(f"Evaluating {found.path} on {launch.processes} process{'es' if launch.processes > 1 else ''}")
    network = load(recipe, found, config, data, launch)
    result = evaluate_trained(recipe, network, config, dataset, launch, flags.batch_size)
    if launch.is_main:
        report(text, flags.split, packing, length, result["loss"], say)


def generate(recipe: Recipe, flags: Generate, launch: Launch, say: Say) -> None:
    """The `generate` sub-command: on rank 0 only, from the checkpoint alone."""
    from trainer.inference import find, load, on_main

    check_sampling(flags)
    found, config = find(recipe, flags.model_path, launch)
    text = Text.without_data(found.text("tokenizer.json"))
    network = load(recipe, found, config, Data(None, {}, extra={"text": text}), launch)
    say(f"Generating with {found.path}")
    on_main(launch, lambda: say(sample(network, text, flags)))


def show_trained(recipe: Recipe, config: Any, data: Data, run: RunDirectory, checkpoint: Path, say: Say) -> None:
    """At the end of training: validation perplexity beside the baselines, and a sample."""
    from trainer.checkpoint import Checkpoint
    from trainer.metrics import read_metrics
    from trainer.setup import build_network, load_weights

    network = build_network(recipe, config, data)
    load_weights(network, Checkpoint(checkpoint))
    text, length = data.extra["text"], config.model.max_length
    loss = read_metrics(run.metrics)[-1]["final/val_loss"]
    if config.run.eval_iters:
        say(f"validation: {loss:.4f} nats per token over the first {config.run.eval_iters} batches (eval_iters) only")
    else:
        report(text, "validation", config.data.packing, length, loss, say)
    row = text.splits["validation"]
    opening = text.tokenizer().decode(np.asarray(row.ids[: min(12, length // 2, int(row.row_ends[0]) - 1)]).tolist())
    say(f"Sample: {sample(network.eval(), text, Generate(str(checkpoint), prompt=opening))}")


def scored(text: Text, split: str, packing: str, max_length: int) -> np.ndarray:
    """Which tokens of a split a model is scored on: bool [tokens]. All but the first, or all but the first of each row."""
    tokens = text.splits[split]
    mask = np.ones(len(tokens.ids), dtype=bool)
    mask[0] = False
    if packing == "rows":
        starts = np.concatenate([[0], tokens.row_ends[:-1]])
        # Position in its row, of each token: what lies beyond max_length has been cut off.
        position = np.arange(len(mask)) - np.repeat(starts, np.diff(tokens.row_ends, prepend=0))
        mask = (position > 0) & (position <= max_length)
    return mask


def baselines(text: Text, split: str, packing: str, max_length: int) -> dict[str, float]:
    """{name: nats per token} of models that only count, on the same tokens as the network."""
    train, tokens = np.asarray(text.splits["train"].ids), np.asarray(text.splits[split].ids)
    mask = scored(text, split, packing, max_length)
    return {
        "Kneser-Ney bigram": bigram_loss(train, tokens, text.vocab_size, mask),
        "unigram": unigram_loss(train, tokens, text.vocab_size, mask),
    }


def report(text: Text, split: str, packing: str, max_length: int, loss: float, say: Say) -> None:
    """Print the loss of a model on a split in every unit, beside the baselines on the same tokens."""
    tokens = int(scored(text, split, packing, max_length).sum())
    words = text.splits[split].words
    say(f"{split}: {loss:.4f} nats per token over {tokens:,} tokens, each once")
    # Where rows were cut, the words of the split are more than those that were scored.
    whole = tokens == len(text.splits[split].ids) - (1 if packing == "blocks" else len(text.splits[split].row_ends))
    per_word = f", {perplexity(loss * tokens / words):.2f} per word" if whole else ""
    say(f"{split} perplexity: {perplexity(loss):.2f} per token{per_word}")
    for name, nats in baselines(text, split, packing, max_length).items():
        side = "the model is better" if nats > loss else "the model is still worse"
        say(f"  for scale, {name} perplexity on the same tokens: {perplexity(nats):.2f} per token ({side})")


def check_sampling(flags: Sampling) -> None:
    """Refuse settings that no generation can work with."""
    try:
        flags.prompt.encode()
    except UnicodeEncodeError as reason:  # bytes of another encoding, as Python hands them on
        raise Refusal(f"the prompt is not UTF-8 from character {reason.start + 1} on; give it in UTF-8") from None
    if not -(2**63) <= flags.seed < 2**63:
        raise Refusal(f"seed {flags.seed} does not fit into 64 bits; give a smaller one")
    if not (flags.temperature >= 0 and math.isfinite(flags.temperature)):
        raise Refusal(f"temperature {flags.temperature} must be 0 (the likeliest token) or above")
    if not 0 < flags.top_p <= 1 or flags.max_new_tokens < 1:
        raise Refusal(
            f"generation needs 0 < top_p <= 1 and max_new_tokens >= 1, not {flags.top_p:g} and {flags.max_new_tokens}"
        )


def continue_text(network: Any, text: Text, flags: Sampling, produce: Callable[[Tensor], Tensor]) -> str:
    """The prompt and what `produce` (ids [time] -> longer ids) makes of it. Refusal where the settings cannot work."""
    import torch

    check_sampling(flags)
    tokenizer = text.tokenizer()
    ids = tokenizer.encode(flags.prompt, add_special_tokens=False).ids or [text.end_of_text]
    torch.manual_seed(flags.seed)
    output = produce(torch.tensor(ids, device=next(network.parameters()).device))
    return tokenizer.decode(output.tolist(), skip_special_tokens=True)


def sample(network: Any, text: Text, flags: Generate) -> str:
    """Continue a prompt with `transformers`' generate. Refusal where the settings cannot work."""
    if flags.top_k < 0 or not 0 < flags.repetition_penalty < math.inf:
        raise Refusal("generation needs top_k >= 0 and repetition_penalty > 0")

    def produce(ids: Tensor) -> Tensor:
        room = network.config.n_positions - len(ids)
        if room < 1:
            raise Refusal(f"the prompt has {len(ids)} tokens and the model reads {network.config.n_positions}; shorten it")
        random = {"do_sample": True, "temperature": flags.temperature, "top_k": flags.top_k, "top_p": flags.top_p}
        return network.generate(
            ids[None],
            attention_mask=ids[None].new_ones(1, len(ids)),
            max_new_tokens=min(flags.max_new_tokens, room),
            repetition_penalty=flags.repetition_penalty,
            pad_token_id=text.end_of_text,
            eos_token_id=text.end_of_text,
            use_cache=True,
            synced_gpus=False,  # this is a plain network on one process, even where ZeRO-3 trains in the same one
            **(random if flags.temperature else {"do_sample": False}),
        )[0]

    return continue_text(network, text, flags, produce)
