"""What is done with a language model that was trained on files of token ids: measured in full, and asked to continue a text."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from recipes.studies.language_model import Sampling, continue_text
from trainer.errors import Refusal
from trainer.recipe import Data, Recipe

if TYPE_CHECKING:
    from recipes.data.text import Text
    from recipes.data.token_windows import Streams
    from trainer.launch import Launch
    from trainer.run_directory import RunDirectory

Say = Callable[[str], None]
BIGRAM_TOKENS = 20_000_000  # a bigram of more than this takes longer to count than it is worth


@dataclass(frozen=True)
class Evaluate:
    """Measure a trained model on every token of a file of ids."""

    model_path: str = "checkpoints/best_model"
    """checkpoint folder, as given or below the latest run"""
    data_path: str | None = None
    """.ids, .bin or .npy of the same tokenizer, or `embedded` (default: the checkpoint's val_data_path)"""
    batch_size: Annotated[int, arg(aliases=("--batch",))] = 64
    """windows of one micro-step, summed over all processes"""
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True)
class Generate(Sampling):
    """Continue a prompt with a trained model, up to <|endoftext|>."""

    max_new_tokens: int = 256
    tokenizer: str | None = None
    """a folder or tokenizer.json (default: the checkpoint's)"""


def windows_of(config: Any) -> Data:
    """The windows a run is trained on, and fixed ones to measure: all of validation, and as many of training."""
    from recipes.data.token_windows import RandomWindows, TokenWindows, open_streams

    flags, length = config.data, config.model.context_length
    streams = open_streams(flags.train_data_path, flags.val_data_path, flags.tokenizer, config.model.vocab_size, length)
    validation = TokenWindows(streams.validation, length)
    measured = {"train": TokenWindows(streams.train, length, limit=len(validation)), "val": validation}
    if flags.sampling == "sequential":
        train: Any = TokenWindows(streams.train, length)
    else:
        train = RandomWindows(streams.train, length, config.optimisation.seed)
    sizes = {"Train": streams.train.count, "Validation": streams.validation.count}
    notes = ["Loading data with memory mapping...", *(f"{name} data size: {n:,} tokens" for name, n in sizes.items())]
    return Data(train, measured, fingerprint=streams.fingerprint, notes=notes, extra={"streams": streams})


def evaluate(recipe: Recipe, flags: Evaluate, launch: Launch, say: Say) -> None:
    """The `evaluate` sub-command: exact on any number of processes."""
    from trainer.inference import evaluate_trained, find, load
    from trainer.setup import load_data

    if flags.batch_size < 1:
        raise Refusal(f"batch_size {flags.batch_size} must be above 0")
    found, config = find(recipe, flags.model_path, launch)
    # Of `embedded` the validation part; of any other, that file alone: the training data may be elsewhere.
    path = flags.data_path or config.data.val_data_path or "embedded"
    tokenizer = str(found.path / "tokenizer.json") if "tokenizer.json" in found.files else None
    if path == "embedded" and tokenizer is None:
        raise Refusal(f"{found.path} holds no tokenizer.json to read `embedded` with; give a --data_path of its own ids")
    config = replace(config, data=replace(config.data, train_data_path=path, val_data_path=path, tokenizer=tokenizer))
    data = load_data(recipe, config, launch)
    say(f"Evaluating {found.path} on {launch.processes} process{'es' if launch.processes > 1 else ''}")
    network = load(recipe, found, config, data, launch)
    result = evaluate_trained(recipe, network, config, data.evaluation["val"], launch, flags.batch_size)
    tokens = data.extra["streams"].validation.count - 1
    say(f"{path}: {result['loss']:.4f} nats per token over {tokens:,} tokens, each once; perplexity {result['perplexity']:.2f}")


def generate(recipe: Recipe, flags: Generate, launch: Launch, say: Say) -> None:
    """The `generate` sub-command: on rank 0 only, from the checkpoint alone."""
    from recipes.data.text import Text
    from recipes.data.tokenizer import existing_tokenizer
    from trainer.inference import find, load, on_main

    found, config = find(recipe, flags.model_path, launch)
    if flags.tokenizer:
        try:
            text = Text.without_data(existing_tokenizer(flags.tokenizer).to_str())
        except (ValueError, OSError) as reason:
            raise Refusal(str(reason)) from reason
    elif "tokenizer.json" in found.files:
        text = Text.without_data(found.text("tokenizer.json"))
    else:
        raise Refusal(f"{found.path} holds no tokenizer.json, as there was none beside its data; give --tokenizer PATH")
    if text.vocab_size > config.model.vocab_size:
        raise Refusal(
            f"the tokenizer has {text.vocab_size} entries, {found.path} {config.model.vocab_size}; give the one it had"
        )
    network = load(recipe, found, config, Data(None, {}), launch)
    say(f"Generating with {found.path}")
    on_main(launch, lambda: say(sample(network, text, flags)))


def sample(network: Any, text: Text, flags: Sampling) -> str:
    """Continue a prompt. Refusal where the settings cannot work."""
    from recipes.models import transformer_lm

    settings = (flags.max_new_tokens, flags.temperature, flags.top_p, text.end_of_text)
    return continue_text(network, text, flags, lambda ids: transformer_lm.generate(network, ids, *settings))


@functools.lru_cache(1)  # the plot and the report want it
def bigram(streams: Streams, vocab_size: int) -> tuple[str, float] | None:
    """(name, nats per token) of a bigram on the whole validation stream; None where there is much to count."""
    import numpy as np

    from recipes.studies.ngram_baseline import bigram_loss

    if max(streams.train.count, streams.validation.count) > BIGRAM_TOKENS:
        return None
    predicted = np.arange(streams.validation.count) > 0
    return "Kneser-Ney bigram", bigram_loss(streams.train.ids(), streams.validation.ids(), vocab_size, predicted)


def show_trained(recipe: Recipe, config: Any, data: Data, run: RunDirectory, checkpoint: Path, say: Say) -> None:
    """At the end of training: the validation loss beside the bigram's, and a sample."""
    from recipes.data.text import Text
    from trainer.checkpoint import Checkpoint
    from trainer.metrics import read_metrics
    from trainer.setup import build_network, load_weights

    streams: Streams = data.extra["streams"]
    loss = read_metrics(run.metrics)[-1]["final/val_loss"]
    batches, windows = config.run.eval_iters, len(data.evaluation["val"])
    whole = not batches or batches * config.optimisation.batch_size >= windows
    part = "every token" if whole else f"{batches} batches (eval_iters) spread over it"
    counted = bigram(streams, config.model.vocab_size)
    beside = f"; {counted[0]} on every token: {counted[1]:.4f}" if counted else ""
    say(f"Validation: {loss:.4f} nats per token over {part}{beside}")
    if streams.tokenizer_json is None:
        return
    network = build_network(recipe, config, data)
    load_weights(network, Checkpoint(checkpoint))
    text = Text.without_data(streams.tokenizer_json)
    opening = text.tokenizer().decode(streams.validation.ids()[:8].tolist())
    say(f"Sample: {sample(network.eval(), text, Sampling(str(checkpoint), prompt=opening)).strip()}")
