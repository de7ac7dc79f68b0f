"""Any causal language model of transformers, fine-tuned: `accelerate launch recipes/finetune_lm.py --init_from NAME ...`

A sample is a row of examples packed side by side. Each attends to itself alone; its prompt is read but not predicted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from recipes.commands.finetuned_lm import Evaluate, Generate, bigram, compare_answers, evaluate, generate
from recipes.commands.language_model import perplexity
from trainer.command_line import sections
from trainer.command_line.bounds import NotNegative, Positive
from trainer.command_line.locations import Existing
from trainer.main import main
from trainer.recipe import Batch, Command, Data, Log, Recipe, Report
from trainer.reporting.run_directory import RunDirectory

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from trainer.checkpoints.pretrained import StoredTensor
    from trainer.initial_weights import Weights

TINY = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
"""`--init_from tiny`: a network with fresh weights, and a tokenizer trained on the rows"""


@dataclass(frozen=True)
class ModelConfig:
    """The network, and which part of it is trained."""

    architecture: str = ""
    """text of the config.json of the network (default: that of --init_from)"""
    max_length: Annotated[int, Positive] = 1024
    """tokens of a sample"""
    train_last: Annotated[int, NotNegative] = 0
    """train the last N blocks alone (0: everything)"""
    lora_rank: Annotated[int, NotNegative] = 0
    """train an adapter of this rank beside every linear layer, and nothing else (0: off)"""
    lora_alpha: Annotated[float, Positive] = 16.0
    """the adapters' share is scaled by lora_alpha / lora_rank"""


@dataclass(frozen=True)
class DataConfig:
    """The rows: {"messages"}, {"prompt", "completion"}, or text."""

    dataset: str = "embedded"
    """OWNER/NAME of the hub; embedded: small questions and answers, made on the spot"""
    data_dir: Annotated[tuple[str, ...], Existing] = ()
    """rows of this machine instead: folders, files or 'patterns' of .jsonl, .parquet or .txt, compressed or not; or what
    `datasets` saved. Names tell the splits; without validation rows a part is held out"""
    column: str = "text"
    """of text, in rows that have neither messages nor prompt and completion"""
    tokenizer: Annotated[str | None, Existing] = None
    """a folder or hub name (default: that of --init_from); train: BPE trained on the rows"""
    packing: bool = True
    """as many examples in a sample as max_length holds, else one"""


@dataclass(frozen=True)
class RunConfig(sections.Run):
    """Where and how the run happens."""

    samples: Annotated[int, NotNegative] = 3
    """validation examples whose answers are shown in the end, before and after, by one process on the host (0: none)"""


@dataclass(frozen=True)
class Config:
    """Fine-tune a causal language model of transformers."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimisation: sections.Optimisation = sections.Optimisation(
        batch_size=8, max_epochs=3.0, learning_rate=2e-5, warmup_steps=100, weight_decay=0.0, beta2=0.999
    )
    run: RunConfig = RunConfig(num_workers=0, eval_every=0, eval_epochs=1, wandb_project="finetune-lm")


class FinetuneReport(Report[Config]):
    """What a run prints."""

    loss_unit = "nats per predicted token"

    def baseline(self, config: Config, data: Data) -> tuple[str, float] | None:
        """Name and loss of a bigram of the training examples on the same tokens: it knows the form of answers. None for large
        files."""
        from recipes.models.causal_lm import config_of

        assert config.model.architecture
        return bigram(data.train, data.evaluation["val"], config_of(config.model.architecture).vocab_size)

    def after_training(self, config: Config, data: Data, run: RunDirectory, checkpoint: Path, log: Log) -> None:
        """Log the bigram's loss, and answers to some validation examples before and after training, beside the reference."""
        if baseline := self.baseline(config, data):
            log(f"validation: {baseline[0]} on the same tokens has {baseline[1]:.4f} nats per predicted token")
        if config.run.samples:
            compare_answers(self.recipe, config, data, checkpoint, log)


class FinetuneLM(Recipe[Config]):
    """The next-token loss on completions and answers, or on all of a plain text."""

    name = "finetune_lm"
    config_class = Config
    report_class = FinetuneReport
    presets = {"quick": Path(__file__).parent / "configs" / "finetune_lm_quick.yaml"}
    commands = {"evaluate": Command(Evaluate, evaluate), "generate": Command(Generate, generate)}
    throughput = ("tokens", "next_token")
    needs = "--init_from OWNER/NAME"
    other_weights = "choose other weights (of adapters, what tools/export_hf.py merges)"
    free_settings = ("max_length", "tokenizer")

    def build_data(self, config: Config) -> Data:
        """Train, validation and test as packed examples."""
        from recipes.data.cache import content_hash
        from recipes.data.examples import PackedExamples, encode_rows, find_rows, load_chat_tokenizer
        from recipes.models.causal_lm import config_of

        flags, model = config.data, config.model
        if not model.architecture or not flags.tokenizer:
            raise ValueError("no model is named; give --init_from a folder, a name of the hub, or tiny")
        corpus = find_rows(flags.dataset, flags.data_dir)
        tokenizer = load_chat_tokenizer(flags.tokenizer, corpus)
        splits, notes = encode_rows(corpus, tokenizer, flags.column)
        vocab_size = config_of(model.architecture).vocab_size
        sets = {name: PackedExamples(part, model.max_length, vocab_size, flags.packing) for name, part in splits.items()}
        for name, part in sets.items():
            notes.append(f"{name}: {len(part.split.row_ends):,} examples in {len(part):,} samples")
            if part.cut:
                notes.append(f"{name}: {part.cut:,} examples cut at max_length {model.max_length}, {part.left_out:,} left out")
        return Data(
            train=sets["train"],
            evaluation={"val": sets["validation"]},
            test=sets.get("test"),
            fingerprint=content_hash(*(part.fingerprint for part in splits.values()), *frozen_weights(config)),
            notes=notes,
            extra={"tokenizer": tokenizer},
        )

    def build_model(self, config: Config, data: Data) -> PreTrainedModel:
        """The network of a config.json, all but its trained part frozen. ValueError if it cannot take such samples."""
        from recipes.models.causal_lm import build_causal_lm, keeps_examples_apart

        m = config.model
        network = build_causal_lm(m.architecture, train_last=m.train_last, lora_rank=m.lora_rank, lora_alpha=m.lora_alpha)
        positions = getattr(network.config, "max_position_embeddings", m.max_length)
        if m.max_length > positions:
            raise ValueError(f"max_length {m.max_length} is more than the {positions} positions of the network; lower it")
        if config.data.packing and not keeps_examples_apart(network):
            raise ValueError(f"{type(network).__name__} would mix examples that are packed into one sample; add --no_packing")
        return network

    def items(self, batch: Batch) -> dict[str, int]:
        """The number of predicted tokens: neither prompts nor padding."""
        from recipes.data.token_samples import IGNORED

        return {"next_token": int((batch["labels"] != IGNORED).sum())}

    def loss(self, network: Any, batch: Batch) -> dict[str, Tensor]:
        """Cross entropy, summed in fp32. Padding needs no mask: it is on the right, where causal attention never looks."""
        from torch.nn.functional import cross_entropy

        from recipes.data.token_samples import IGNORED

        inputs = {name: values for name, values in batch.items() if name != "labels"}
        logits = network(**inputs, use_cache=False).logits.flatten(0, 1).float()
        return {"next_token": cross_entropy(logits, batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum")}

    def derive(self, means: Mapping[str, float]) -> dict[str, float]:
        """Perplexity per predicted token."""
        return {"perplexity": perplexity(means["loss"])}

    def pretrained_settings(self, name: str, saved: Config | None) -> dict[str, Any]:
        """The config.json of the network, and the tokenizer beside it."""
        from trainer.checkpoints.pretrained import stored_config

        if saved is not None and saved.model.lora_rank:
            return {**vars(saved.model), "tokenizer": name}
        if saved is not None:  # not train_last: which part was trained is no property of the weights
            return {"architecture": saved.model.architecture, "max_length": saved.model.max_length, "tokenizer": name}
        if name == "tiny":
            return {"architecture": json.dumps(TINY), "tokenizer": "train"}
        return {"architecture": json.dumps(stored_config(name)), "tokenizer": name}

    def pretrained(self, name: str, network: Any, initial: Weights) -> dict[str, StoredTensor]:
        """Weights as transformers would load them; adapters start as `peft` initialises them."""
        from recipes.models.causal_lm import named_as_in
        from trainer.checkpoints.pretrained import StoredTensor, stored_tensors

        shapes = {key: tuple(parameter.shape) for key, parameter in network.named_parameters()}
        fresh = {key: StoredTensor(shape, partial(initial, key)) for key, shape in shapes.items()}
        if name == "tiny":
            return fresh
        adapters = {key: stored for key, stored in fresh.items() if ".lora_" in key}
        return adapters | named_as_in(network, stored_tensors(name))

    def checkpoint_files(self, config: Config, network: Any, data: Data) -> dict[str, str | dict[str, Tensor]]:
        """The files that transformers needs beside the weights. Adapters get no config.json: they are no network to open."""
        from recipes.models.causal_lm import config_json, files_of

        of_network = {} if config.model.lora_rank else {"config.json": config_json(config.model.architecture, network)}
        return {**of_network, **files_of(data.extra["tokenizer"])}


def frozen_weights(config: Config) -> list[str]:
    """Hashes of the files of frozen weights beside adapters: no checkpoint holds these, and a resumed run needs the same."""
    from recipes.data.cache import remembered_hash
    from trainer.checkpoints.init_from import own_checkpoint
    from trainer.checkpoints.pretrained import weight_files

    name = config.optimisation.init_from
    if not config.model.lora_rank or name in (None, "tiny"):
        return []
    try:
        return [remembered_hash(Path(file)) for file in weight_files(str(own_checkpoint(name) or name))]
    except ValueError as error:
        raise ValueError(f"--init_from {name}: {error}") from error


if __name__ == "__main__":
    main(FinetuneLM())
