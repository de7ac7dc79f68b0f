"""Commands for a fine-tuned language model: its loss on completions, its answers, and answers before and after training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from recipes.commands.language_model import Sampling, SplitEvaluation, check_sampling, perplexity, trained_network
from trainer.command_line.bounds import NotNegative, Positive
from trainer.errors import UserError
from trainer.evaluate import measured
from trainer.recipe import Data, Log, Recipe

if TYPE_CHECKING:
    from recipes.data.examples import PackedExamples
    from trainer.distributed.launch import Launch

BIGRAM_TOKENS = 20_000_000  # a bigram of more than this takes longer to count than it is worth


@dataclass(frozen=True)
class Evaluate(SplitEvaluation):
    """Measure a trained model: loss and perplexity on completions and answers."""


@dataclass(frozen=True)
class Generate(Sampling):
    """Answer a prompt with a trained model; through its chat template, if it has one."""

    max_new_tokens: Annotated[int, Positive] = 100
    top_k: Annotated[int, NotNegative] = 50
    """sample from so many tokens (0: all)"""


def evaluate(recipe: Recipe, flags: Evaluate, launch: Launch, log: Log) -> None:
    """The `evaluate` sub-command: exact on any number of processes."""
    from trainer.checkpoints.network import find_checkpoint
    from trainer.setup import load_data

    checkpoint, config = find_checkpoint(recipe, flags.model_path, launch)
    config = flags.applied_to(config, str(checkpoint.path))
    data = load_data(recipe, config, launch)
    split, dataset = flags.chosen(config, data)
    loss = measured(recipe, checkpoint, config, data, {split: dataset}, flags.batch_size, launch, log)[split]["loss"]
    log(f"{split}: {loss:.4f} nats per predicted token, perplexity {perplexity(loss):.2f}, over {len(dataset):,} samples")


def bigram(train: PackedExamples, validation: PackedExamples, vocab_size: int) -> tuple[str, float] | None:
    """(name, nats per predicted token) of a bigram of the training examples; None if examples are cut, or counting would take
    long."""
    from recipes.baselines.ngrams import bigram_loss

    if validation.cut or validation.left_out or max(len(train.ids), len(validation.ids)) > BIGRAM_TOKENS:
        return None
    ids, mask = validation.predicted()
    return "Kneser-Ney bigram", bigram_loss(train.predicted()[0], ids, vocab_size, mask)


def generate(recipe: Recipe, flags: Generate, launch: Launch, log: Log) -> None:
    """The `generate` sub-command; rank 0 does the work, from the checkpoint alone."""
    import torch
    from transformers import AutoTokenizer

    from trainer.checkpoints.network import find_checkpoint, load_network

    check_sampling(flags)
    checkpoint, config = find_checkpoint(recipe, flags.model_path, launch)
    log(f"Generating with {checkpoint.path}")

    def act() -> None:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
        network = load_network(recipe, checkpoint, config, Data(None, {}), launch.device)
        text: Any = flags.prompt
        if tokenizer.chat_template:
            turns = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=not tokenizer.chat_template).input_ids or [tokenizer.eos_token_id]
        torch.manual_seed(flags.seed)
        log(flags.prompt + answer(network, tokenizer, ids, flags))

    launch.control.on_main(act)


def answer(network: Any, tokenizer: Any, ids: list[int], flags: Generate) -> str:
    """The network's continuation of `ids`, as text. UserError if they leave it no position."""
    import torch

    free = getattr(network.config, "max_position_embeddings", len(ids) + flags.max_new_tokens) - len(ids)
    if free < 1:
        raise UserError(f"the prompt has {len(ids)} tokens, and the model reads {len(ids) + free}; shorten it")
    random = {"do_sample": True, "temperature": flags.temperature, "top_k": flags.top_k, "top_p": flags.top_p}
    inputs = torch.tensor([ids], device=network.device)
    output = network.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=min(flags.max_new_tokens, free),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        use_cache=True,
        synced_gpus=False,  # this is a plain network on one process, even where ZeRO-3 trains in the same one
        **(random if flags.temperature else {"do_sample": False}),
    )
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


def compare_answers(recipe: Recipe, config: Any, data: Data, checkpoint: Path, log: Log) -> None:
    """Print the prompts of some validation examples, the reference, and the likeliest answers before and after training."""
    tokenizer, examples = data.extra["tokenizer"], data.evaluation["val"]
    count = len(examples.split.row_ends)
    pairs = [examples.text_of(number) for number in range(0, count, -(-count // config.run.samples))]
    flags = Generate(temperature=0.0, max_new_tokens=max(len(completion) for _, completion in pairs) + 10)
    answers = {}
    for when in ("before", "after"):
        network = first_network(recipe, config, data) if when == "before" else trained_network(recipe, config, data, checkpoint)
        answers[when] = [answer(network, tokenizer, prompt, flags) for prompt, _ in pairs]
    for number, (prompt, completion) in enumerate(pairs):
        texts = {"given": tokenizer.decode(prompt), "reference": tokenizer.decode(completion, skip_special_tokens=True)}
        texts |= {when: answers[when][number] for when in answers}
        for name, text in texts.items():
            log(f"{name:>10}: {' '.join(text.split())}")


def first_network(recipe: Recipe, config: Any, data: Data) -> Any:
    """The network with the weights that training began with, on the CPU and in evaluation mode."""
    import torch

    from trainer.checkpoints.network import build_empty_network, first_weights
    from trainer.distributed.launch import alone
    from trainer.initial_weights import fill

    network, initial = build_empty_network(recipe, config, data)
    init_from, control = config.optimisation.init_from, alone().control
    fill(network, first_weights(recipe, network, initial, None, init_from, control, lambda _: None), torch.device("cpu"))
    return network.eval()
