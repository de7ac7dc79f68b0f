"""Commands for a language model of text (GPT-2): loss per token and per word beside n-gram baselines, and generation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from recipes.baselines.ngrams import bigram_loss, unigram_loss
from recipes.commands.language_model import Sampling, SplitEvaluation, check_sampling, continue_prompt, perplexity
from recipes.data.text import Text
from recipes.data.token_sets import windows_of
from trainer.command_line.bounds import NotNegative, Positive
from trainer.command_line.locations import Tokenizer
from trainer.errors import UserError
from trainer.evaluate import measured
from trainer.recipe import Data, Log, Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.distributed.launch import Launch

MOST_TOKENS = 500_000_000  # tokens that n-grams are counted on at most: memory grows with them


@dataclass(frozen=True)
class Evaluate(SplitEvaluation):
    """Measure a trained model: loss, perplexity per token and per word, beside n-gram baselines on the same tokens."""

    stride: Annotated[int | None, Positive] = None
    """tokens scored per window (default: all of it); smaller ones give each token more context"""
    tokenizer: Annotated[str | None, Tokenizer] = None


@dataclass(frozen=True)
class Generate(Sampling):
    """Continue a prompt with a trained model."""

    max_new_tokens: Annotated[int, Positive] = 100
    top_k: Annotated[int, NotNegative] = 50
    """sample from so many tokens (0: all)"""
    repetition_penalty: Annotated[float, Positive] = 1.2


def evaluate(recipe: Recipe, flags: Evaluate, launch: Launch, log: Log) -> None:
    """The `evaluate` sub-command: exact on any number of processes."""
    from recipes.data.token_samples import TokenBlocks
    from trainer.checkpoints.network import find_checkpoint
    from trainer.setup import load_data

    checkpoint, config = find_checkpoint(recipe, flags.model_path, launch)
    config = flags.applied_to(config, flags.tokenizer or str(checkpoint.path / "tokenizer.json"))
    data = load_data(recipe, config, launch)
    text, length = data.extra["text"], config.model.max_length
    split, dataset = flags.chosen(config, data)
    if flags.stride is not None:
        try:
            by_document = config.data.document_mask
            dataset = TokenBlocks(text.splits[split], length, text.vocab_size, text.end_of_text, flags.stride, by_document)
        except ValueError as reason:
            raise UserError(f"--{reason}") from None
        config = replace(config, data=replace(config.data, packing="blocks"))
    loss = measured(recipe, checkpoint, config, data, {split: dataset}, flags.batch_size, launch, log)[split]["loss"]
    if launch.is_main:
        log_perplexities(text, split, config, loss, log)


def generate(recipe: Recipe, flags: Generate, launch: Launch, log: Log) -> None:
    """The `generate` sub-command; rank 0 does the work, from the checkpoint alone."""
    from trainer.checkpoints.network import find_checkpoint, load_network

    check_sampling(flags)
    checkpoint, config = find_checkpoint(recipe, flags.model_path, launch)
    text = Text.without_data(checkpoint.text("tokenizer.json"))
    log(f"Generating with {checkpoint.path}")

    def act() -> None:
        network = load_network(recipe, checkpoint, config, Data(None, {}, extra={"text": text}), launch.device)
        log(sample(network, text, flags))

    launch.control.on_main(act)


def sample(network: Any, text: Text, flags: Generate) -> str:
    """Continue a prompt with `transformers`' generate. UserError if the flags do not fit the network."""
    from recipes.models.gpt2 import as_transformers

    def continuation(ids: Tensor) -> Tensor:
        free = network.config.n_positions - len(ids)
        if free < 1:
            raise UserError(f"the prompt has {len(ids)} tokens and the model reads {network.config.n_positions}; shorten it")
        random = {"do_sample": True, "temperature": flags.temperature, "top_k": flags.top_k, "top_p": flags.top_p}
        return as_transformers(network).generate(
            ids[None],
            attention_mask=ids[None].new_ones(1, len(ids)),
            max_new_tokens=min(flags.max_new_tokens, free),
            repetition_penalty=flags.repetition_penalty,
            pad_token_id=text.end_of_text,
            eos_token_id=text.end_of_text,
            use_cache=True,
            synced_gpus=False,  # this is a plain network on one process, even where ZeRO-3 trains in the same one
            **(random if flags.temperature else {"do_sample": False}),
        )[0]

    return continue_prompt(network, text, flags, continuation)


def sample_validation(network: Any, text: Text, max_length: int) -> str:
    """The first tokens of the validation split (at most 12, all of its first row) and their continuation."""
    validation = text.splits["validation"]
    count = min(12, max_length // 2, int(validation.row_ends[0]) - 1)
    prompt = text.tokenizer().decode(windows_of(validation.ids, count, np.zeros(1, np.int64))[0].tolist())
    return sample(network, text, Generate(prompt=prompt))


# ------------------------------------------------------------------------------------- losses of a split and its baselines


def scored_tokens(text: Text, split: str, config: Any) -> np.ndarray:
    """Which tokens of a split a model is scored on: bool [tokens]. All but the first of the split, document or row."""
    tokens, max_length = text.splits[split], config.model.max_length
    mask = np.ones(len(tokens.ids), dtype=bool)
    mask[0] = False
    if config.data.document_mask:
        mask[1:] = np.asarray(tokens.ids)[:-1] != text.end_of_text
    if config.data.packing == "rows":
        starts = np.concatenate([[0], tokens.row_ends[:-1]])
        # The position of each token in its row: tokens beyond max_length have been cut off.
        position = np.arange(len(mask)) - np.repeat(starts, np.diff(tokens.row_ends, prepend=0))
        mask = (position > 0) & (position <= max_length)
    return mask


def ngram_losses(text: Text, split: str, config: Any) -> dict[str, float]:
    """{name: nats per token} of n-gram models, on the same tokens as the network; empty where counting would take long."""
    sets = [text.splits[name].ids for name in ("train", split)]
    if max(map(len, sets)) > MOST_TOKENS:  # before any of them is read
        return {}
    train, tokens = map(np.asarray, sets)
    mask = scored_tokens(text, split, config)
    return {
        "Kneser-Ney bigram": bigram_loss(train, tokens, text.vocab_size, mask),
        "unigram": unigram_loss(train, tokens, text.vocab_size, mask),
    }


def log_perplexities(text: Text, split: str, config: Any, loss: float, log: Log) -> None:
    """Print the loss of a model on a split in every unit, beside the baselines on the same tokens."""
    scored, ids, words = scored_tokens(text, split, config), np.asarray(text.splits[split].ids), text.splits[split].words
    tokens = int(scored.sum())
    counted = f"over {words:,} words and line ends, blank lines' too, as published figures are"
    log(f"{split}: {loss:.4f} nats per token over {tokens:,} tokens, each once")
    # If rows were cut, some words were not scored. Uncut, only the first token of a row or document may be unscored.
    uncut = words and (scored[1:] | (ids[:-1] == text.end_of_text)).all()
    per_word = f", {perplexity(loss * tokens / words):.2f} per word ({counted})" if uncut else ""
    log(f"{split} perplexity: {perplexity(loss):.2f} per token{per_word}")
    for name, nats in ngram_losses(text, split, config).items():
        comparison = "the model is better" if nats > loss else "the model is still worse"
        log(f"  for scale, {name} perplexity on the same tokens: {perplexity(nats):.2f} per token ({comparison})")
