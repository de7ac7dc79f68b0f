"""Commands for a language model that was trained on files of token ids: its loss on every token of a file, and generation."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from tyro.conf import arg

from recipes.commands.language_model import Sampling, check_sampling, continue_prompt
from trainer.command_line.bounds import Positive
from trainer.command_line.locations import Existing, Location, Tokenizer
from trainer.command_line.sections import Device
from trainer.errors import UserError
from trainer.evaluate import measured
from trainer.recipe import Data, Log, Recipe

if TYPE_CHECKING:
    from recipes.data.text import Text
    from recipes.data.token_streams import Streams
    from trainer.distributed.launch import Launch

BIGRAM_TOKENS = 20_000_000  # a bigram of more than this takes longer to count than it is worth


@dataclass(frozen=True)
class Evaluate:
    """Measure a trained model on every token of a file of ids."""

    model_path: Annotated[str, Existing] = "checkpoints/best_model"
    """checkpoint folder, as given or of the latest run"""
    data_path: Annotated[str | None, Location(words=("embedded",))] = None
    """.ids, .bin or .npy of the same tokenizer, a pattern, a folder, text, or `embedded` (default: what it was validated on)"""
    batch_size: Annotated[int, Positive, arg(aliases=("--batch",))] = 64
    """windows of one micro-step, summed over all processes"""
    device: Device = "auto"


@dataclass(frozen=True)
class Generate(Sampling):
    """Continue a prompt with a trained model, up to <|endoftext|>."""

    max_new_tokens: Annotated[int, Positive] = 256
    tokenizer: Annotated[str | None, Tokenizer] = None
    """a folder or tokenizer.json (default: the checkpoint's)"""


def evaluate(recipe: Recipe, flags: Evaluate, launch: Launch, log: Log) -> None:
    """The `evaluate` sub-command: exact on any number of processes."""
    from trainer.checkpoints.network import find_checkpoint
    from trainer.setup import load_data

    checkpoint, config = find_checkpoint(recipe, flags.model_path, launch)
    # Load the validation data only, as the training data may be elsewhere; without any, a part of the training text is it.
    validation = (flags.data_path,) if flags.data_path else config.data.val_data_path
    tokenizer = str(checkpoint.path / "tokenizer.json") if "tokenizer.json" in checkpoint.files else None
    paths = {"train_data_path": validation or config.data.train_data_path, "val_data_path": validation}
    if tokenizer is None and (paths["train_data_path"] == ("embedded",) or not validation):
        raise UserError(f"{checkpoint.path} holds no tokenizer.json to read text with; give a --data_path of its own ids")
    config = replace(config, data=replace(config.data, **paths, tokenizer=tokenizer, sampling="random"))
    data = load_data(recipe, config, launch)
    but = " but those that begin a document" if config.data.document_mask else ""
    sets = {name: dataset for name, dataset in data.evaluation.items() if name != "train"}
    for name, result in measured(recipe, checkpoint, config, data, sets, flags.batch_size, launch, log).items():
        ids = sets[name].ids
        losses = f"{result['loss']:.4f} nats per token over {ids.count - 1:,} tokens{but}"
        log(f"{ids.name}: {losses}, each once; perplexity {result['perplexity']:.2f}")


def generate(recipe: Recipe, flags: Generate, launch: Launch, log: Log) -> None:
    """The `generate` sub-command; rank 0 does the work, from the checkpoint alone."""
    from recipes.data.text import Text
    from recipes.data.tokenizer import existing_tokenizer
    from trainer.checkpoints.network import find_checkpoint, load_network

    check_sampling(flags)
    checkpoint, config = find_checkpoint(recipe, flags.model_path, launch)
    if flags.tokenizer:
        try:
            text = Text.without_data(existing_tokenizer(flags.tokenizer).to_str())
        except (ValueError, OSError) as reason:
            raise UserError(str(reason)) from reason
    elif "tokenizer.json" in checkpoint.files:
        text = Text.without_data(checkpoint.text("tokenizer.json"))
    else:
        raise UserError(f"{checkpoint.path} holds no tokenizer.json, as there was none beside its data; give --tokenizer PATH")
    if text.vocab_size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer has {text.vocab_size} entries, {checkpoint.path} {config.model.vocab_size}; give the one it had"
        )
    log(f"Generating with {checkpoint.path}")

    def act() -> None:
        network = load_network(recipe, checkpoint, config, Data(None, {}), launch.device)
        log(sample(network, text, flags))

    launch.control.on_main(act)


def sample(network: Any, text: Text, flags: Generate) -> str:
    """Continue a prompt. UserError if the flags do not fit."""
    from recipes.models import transformer_lm

    settings = (flags.max_new_tokens, flags.temperature, flags.top_p, text.end_of_text)
    return continue_prompt(network, text, flags, lambda ids: transformer_lm.generate(network, ids, *settings))


def sample_validation(network: Any, streams: Streams) -> str:
    """The first 8 tokens of the validation stream and their continuation. Needs the streams' tokenizer."""
    from recipes.data.text import Text

    assert streams.tokenizer_json is not None
    text = Text.without_data(streams.tokenizer_json)
    first = streams.validation.sets[0].windows(min(8, streams.validation.sets[0].count), np.zeros(1, np.int64))[0]
    prompt = text.tokenizer().decode(first.tolist())
    return sample(network, text, Generate(prompt=prompt, max_new_tokens=100)).strip()


@functools.lru_cache(1)  # the plot and the report both ask for it
def bigram(streams: Streams, vocab_size: int, by_document: bool) -> tuple[str, float] | None:
    """(name, nats per token) of a bigram on the whole validation stream, or on all but the first tokens of its documents.

    None if that takes long to count.
    """
    from recipes.baselines.ngrams import bigram_loss

    if max(streams.train.count, streams.validation.count) > BIGRAM_TOKENS:
        return None
    train, validation = (mixture.whole.ids() for mixture in (streams.train, streams.validation))
    predicted = np.arange(len(validation)) > 0
    if by_document:
        predicted[1:] = validation[:-1] != streams.end_of_text()
    return "Kneser-Ney bigram", bigram_loss(train, validation, vocab_size, predicted)
