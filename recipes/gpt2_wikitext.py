"""GPT-2 on WikiText-2: `accelerate launch recipes/gpt2_wikitext.py [train|evaluate|generate] ...`

Labels are shifted once, by the data set: position t learns token t+1. A sample is a block of joined rows, or one padded row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from recipes.studies.language_model import Evaluate, Generate, baselines, evaluate, generate, show_trained
from trainer import sections
from trainer.main import main
from trainer.recipe import Batch, Command, Data, Recipe


@dataclass(frozen=True)
class Model:
    """The network."""

    d_model: int = 768
    """width"""
    num_layers: Annotated[int, arg(aliases=("--n_layers",))] = 12
    num_heads: Annotated[int | None, arg(aliases=("--nhead",))] = None
    """attention heads (default: d_model / 64)"""
    d_ff: int | None = None
    """width of the MLP (default: 4 x d_model)"""
    max_length: int = 1024
    """tokens a sample has at most; positions of the model"""
    dropout: float = 0.1


@dataclass(frozen=True)
class TextData:
    """The text and how it is cut."""

    dataset: Literal["wikitext2", "wikitext103", "embedded"] = "wikitext2"
    """WikiText from the hub, or English that is on every machine (Python's documentation)"""
    data_dir: str | None = None
    """local wiki.{train,valid,test}.tokens|raw or {train,validation,test}.txt, instead of the hub"""
    tokenizer: str = "gpt2"
    """gpt2 (hub), a folder with vocab.json and merges.txt, a tokenizer.json, or `train`: BPE trained on the train split"""
    vocab_size: int = 8192
    """entries of a trained tokenizer"""
    packing: Literal["blocks", "rows"] = "blocks"
    """blocks: rows joined and cut into max_length; rows: one padded row per sample"""


@dataclass(frozen=True)
class Run(sections.Run):
    """The guide's defaults."""

    max_training_hours: float | None = 12.0
    """end this launch, checkpoint included, within so many hours of its start"""
    use_tensorboard: bool = True
    wandb_project: str = "gpt2-wikitext"


@dataclass(frozen=True)
class Config:
    """Train GPT-2 on WikiText, or on text of your own."""

    model: Model = field(default_factory=Model)
    data: TextData = field(default_factory=TextData)
    optimisation: sections.Optimisation = field(default_factory=sections.Optimisation)
    run: Run = field(default_factory=Run)


class Gpt2Wikitext(Recipe):
    """Model, data and loss of GPT-2 on text."""

    name = "gpt2_wikitext"
    Config = Config
    presets = {"quick": Path(__file__).parent / "configs" / "gpt2_wikitext_quick.yaml"}
    commands = {"evaluate": Command(Evaluate, evaluate), "generate": Command(Generate, generate)}
    speed = ("tokens", "next_token")
    paths = ("data_dir", "tokenizer")
    loss_unit = "nats per token"

    def build_data(self, config: Config) -> Data:
        """Train, validation and test as blocks or rows of ids."""
        from recipes.data.text import prepare_text
        from recipes.data.token_samples import TokenBlocks, TokenRows

        flags, length = config.data, config.model.max_length
        text = prepare_text(flags.dataset, flags.data_dir, flags.tokenizer, flags.vocab_size)
        cut = TokenBlocks if flags.packing == "blocks" else TokenRows
        sets = {name: cut(split, length, text.vocab_size, text.end_of_text) for name, split in text.splits.items()}
        data = Data(sets["train"], {"val": sets["validation"]}, sets["test"], text.fingerprint, extra={"text": text})
        cuts = {name: getattr(rows, "truncated", 0) for name, rows in sets.items()}
        data.notes += [f"{n} of {len(sets[name])} {name} rows cut to {length} tokens" for name, n in cuts.items() if n]
        return data

    def build_model(self, config: Config, data: Data) -> Any:
        """GPT2LMHeadModel with the vocabulary of the data."""
        from recipes.models.gpt2 import build_gpt2

        text, recompute = data.extra["text"], config.run.gradient_checkpointing
        return build_gpt2(text.vocab_size, text.end_of_text, gradient_checkpointing=recompute, **vars(config.model))

    def items(self, batch: Batch) -> dict[str, int]:
        """Predicted tokens."""
        return {"next_token": int((batch["labels"] != -100).sum())}

    def loss(self, network: Any, batch: Batch) -> dict[str, Any]:
        """Summed cross entropy. No attention mask: padding is on the right, where causal attention does not look."""
        from recipes.models.gpt2 import loss_sum

        return {"next_token": loss_sum(network(input_ids=batch["input_ids"]).logits, batch["labels"])}

    def derive(self, means: Mapping[str, float]) -> dict[str, float]:
        """Perplexity per token."""
        from recipes.models.gpt2 import perplexity

        return {"perplexity": perplexity(means["loss"])}

    def pretrained(self, name: str) -> dict[str, Any]:
        """GPT-2 weights from the hub, or a local folder of transformers'."""
        from recipes.models.gpt2 import pretrained_gpt2

        return pretrained_gpt2(name)

    def documents(self, config: Config, network: Any, data: Data) -> dict[str, str]:
        """What transformers needs beside the weights."""
        return {"config.json": network.config.to_json_string(), "tokenizer.json": data.extra["text"].tokenizer_json}

    def flops_per_item(self, config: Config, network: Any) -> float:
        """For MFU."""
        from recipes.models.gpt2 import training_flops_per_token

        return training_flops_per_token(network.config)

    def baseline(self, config: Config, data: Data) -> tuple[str, float]:
        """A bigram on the validation split, which any language model should beat."""
        nats = baselines(data.extra["text"], "validation", config.data.packing, config.model.max_length)
        return "Kneser-Ney bigram", nats["Kneser-Ney bigram"]

    def after_training(self, config: Config, data: Data, run: Any, checkpoint: Any, say: Callable[[str], None]) -> None:
        """Validation perplexity beside the baselines, and a sample."""
        show_trained(self, config, data, run, checkpoint, say)


if __name__ == "__main__":
    main(Gpt2Wikitext())
