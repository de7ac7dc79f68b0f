"""GPT-2 on WikiText-2: `accelerate launch recipes/gpt2_wikitext.py [train|evaluate|generate] ...`

A sample is a block of joined rows of text, or one padded row. The data set shifts the labels: that of position t is token t+1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from recipes.commands.language_model import MixtureReport, perplexity, sources_text, trained_network
from recipes.commands.text_language_model import (
    Evaluate,
    Generate,
    evaluate,
    generate,
    log_perplexities,
    ngram_losses,
    sample_validation,
)
from trainer.command_line import sections
from trainer.command_line.bounds import Fraction, Positive
from trainer.command_line.locations import Location, Tokenizer, path_and_weight
from trainer.main import main
from trainer.recipe import Batch, Command, Data, Log, Recipe
from trainer.reporting.run_directory import RunDirectory
from trainer.reporting.trackers import read_metrics

if TYPE_CHECKING:
    from torch import Tensor

    from recipes.data.token_sets import Mixture
    from recipes.data.token_windows import RandomBlocks
    from recipes.models.gpt2 import Gpt2
    from trainer.checkpoints.pretrained import StoredTensor
    from trainer.initial_weights import Weights


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    d_model: Annotated[int, Positive] = 768
    """width"""
    num_layers: Annotated[int, Positive, arg(aliases=("--n_layers",))] = 12
    num_heads: Annotated[int | None, Positive, arg(aliases=("--nhead",))] = None
    """attention heads (default: d_model / 64)"""
    d_ff: Annotated[int | None, Positive] = None
    """width of the MLP (default: 4 x d_model)"""
    max_length: Annotated[int, Positive] = 1024
    """tokens a sample has at most; positions of the model"""
    dropout: Annotated[float, Fraction] = 0.1


@dataclass(frozen=True)
class DataConfig:
    """The text and how it is cut."""

    dataset: str = "wikitext2"
    """wikitext2, wikitext103 or OWNER/NAME of the hub; embedded: English that is on every machine (Python's documentation)"""
    data_dir: Annotated[tuple[str, ...], Location(weighted=True)] = ()
    """text of this machine instead: folders, files or 'patterns' of .txt, .jsonl or .parquet, compressed or not; or what
    `datasets` saved. Names tell the splits; without a validation text a part is held out. Or prepare_text's folders of ids; a
    mixture of these: PATH=WEIGHT (in YAML also {path: PATH, weight: WEIGHT})"""
    column: str = "text"
    """of the text in JSONL, parquet and data sets"""
    tokenizer: Annotated[str, Tokenizer] = "gpt2"
    """gpt2 (hub), a folder with vocab.json and merges.txt, a tokenizer.json, or `train`: BPE trained on the train split"""
    vocab_size: Annotated[int, Positive] = 8192
    """entries of a trained tokenizer"""
    packing: Literal["blocks", "rows"] = "blocks"
    """blocks: rows joined and cut into max_length; rows: one padded row per sample"""
    document_mask: bool = False
    """in blocks: attention stays within a row, whose positions count from 0, and its first token is not predicted"""


@dataclass(frozen=True)
class Config:
    """Train GPT-2 on WikiText, or on text of your own."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimisation: sections.Optimisation = sections.Optimisation()
    run: sections.Run = sections.Run(max_training_hours=12.0, use_tensorboard=True, wandb_project="gpt2-wikitext")

    def resolved(self) -> Config:
        """The same. ValueError for a document mask with --packing rows, where every sample is one document already."""
        if self.data.document_mask and self.data.packing == "rows":
            raise ValueError("document_mask is for --packing blocks; with rows every sample is one document")
        return self


class Gpt2Report(MixtureReport):
    """What a run prints."""

    def log_line(self, step: int, metrics: Mapping[str, float]) -> str:
        """The console line of a log step."""
        return (
            f"Step {step:6d} | Loss: {metrics['train/loss']:.4f} | LR: {metrics['train/learning_rate']:.2e} | "
            f"Grad norm: {metrics['train/grad_norm']:.3f} | Time: {metrics['train/iter_time_ms']:.1f}ms | "
            f"Tokens/sec: {metrics['train/tokens_per_sec']:.0f}{sources_text(metrics)}"
        )

    def show_batch(self, batch: Batch, config: Config, data: Data, run: RunDirectory) -> str:
        """The text of the first sample."""
        return data.extra["text"].tokenizer().decode(batch["input_ids"][0].tolist())

    def evaluation_line(self, step: int, metrics: Mapping[str, float]) -> str:
        """The console line of an evaluation."""
        loss, per_token = metrics["eval/val_loss"], metrics["eval/val_perplexity"]
        return f"Evaluating at step {step}... val_loss: {loss:.4f} | val_perplexity: {per_token:.4f}"

    def baseline(self, config: Config, data: Data) -> tuple[str, float] | None:
        """Name and loss of a bigram on the validation split, which any language model should beat; None for large files."""
        losses = ngram_losses(data.extra["text"], "validation", config)
        return next(iter(losses.items()), None)

    def after_training(self, config: Config, data: Data, run: RunDirectory, checkpoint: Path, log: Log) -> None:
        """Log the validation perplexity beside the baselines, and a sample."""
        text, length = data.extra["text"], config.model.max_length
        loss = read_metrics(run.metrics)[-1]["final/val_loss"]
        samples = config.run.eval_iters * config.optimisation.effective_batch_size
        if 0 < samples < len(data.evaluation["val"]):
            log(f"validation: {loss:.4f} nats per token over the first {samples:,} samples (eval_iters) only")
        else:
            log_perplexities(text, "validation", config, loss, log)
        network = trained_network(self.recipe, config, data, checkpoint)
        log(f"Sample: {sample_validation(network, text, length)}")


class Gpt2Wikitext(Recipe[Config]):
    """GPT-2's next-token loss on text."""

    name = "gpt2_wikitext"
    config_class = Config
    report_class = Gpt2Report
    presets = {"quick": Path(__file__).parent / "configs" / "gpt2_wikitext_quick.yaml"}
    commands = {"evaluate": Command(Evaluate, evaluate), "generate": Command(Generate, generate)}
    throughput = ("tokens", "next_token")
    free_settings = ("dropout", "tokenizer")
    report: Gpt2Report

    def build_data(self, config: Config) -> Data:
        """Train, validation and test as blocks or rows of ids."""
        from recipes.data.text_of_ids import text_or_ids
        from recipes.data.token_samples import TokenBlocks, TokenRows

        flags, length, by_rows = config.data, config.model.max_length, config.data.packing == "rows"
        sources = [*map(path_and_weight, flags.data_dir)]
        text = text_or_ids(flags.dataset, sources, flags.tokenizer, flags.vocab_size, flags.column, by_rows)
        cut = TokenRows if by_rows else partial(TokenBlocks, by_document=flags.document_mask)
        sets = {name: cut(split, length, text.vocab_size, text.end_of_text) for name, split in text.splits.items()}
        return Data(
            train=self.mixture(text.mixture, text.end_of_text, config) if text.mixture else sets["train"],
            evaluation={f"val{s.removeprefix('validation')}": part for s, part in sets.items() if s.startswith("validation")},
            test=sets.get("test"),
            fingerprint=text.fingerprint,
            notes=[
                *text.notes,
                *(f"{name}: {part.truncated} of {len(part)} rows cut" for name, part in sets.items() if part.truncated),
            ],
            extra={"text": text},
        )

    def mixture(self, mixture: Mixture, end_of_text: int, config: Config) -> RandomBlocks:
        """Windows at random positions of weighted sets; the share of the samples that each set gave is logged."""
        from recipes.data.token_windows import RandomBlocks, SharesSoFar

        if config.data.packing == "rows":
            raise ValueError("packing rows visits every row once an epoch, whatever its weight; give blocks, or no weights")
        o = config.optimisation
        drawn = RandomBlocks(mixture, config.model.max_length, o.seed, end_of_text if config.data.document_mask else None)
        self.report.watch(SharesSoFar(drawn), o.effective_batch_size)
        return drawn

    def build_model(self, config: Config, data: Data) -> Gpt2:
        """GPT-2, with the vocabulary of the data."""
        from recipes.models.gpt2 import build_gpt2

        text = data.extra["text"]
        return build_gpt2(text.vocab_size, text.end_of_text, **vars(config.model))

    def items(self, batch: Batch) -> dict[str, int]:
        """The number of predicted tokens, padding left out; for a mixture also by set."""
        from recipes.models.next_token_loss import predicted_tokens

        return predicted_tokens(batch["labels"], batch.get("source"), self.monitored)

    def loss(self, network: Any, batch: Batch) -> dict[str, Tensor]:
        """Cross entropy, summed in fp32. Padding needs no mask: it is on the right, where causal attention never looks."""
        from recipes.models.next_token_loss import loss_terms

        inputs = {name: tensor for name, tensor in batch.items() if name != "source"}
        return loss_terms(partial(network, **inputs), batch.get("source"), self.monitored)

    def derive(self, means: Mapping[str, float]) -> dict[str, float]:
        """Perplexity per token."""
        return {"perplexity": perplexity(means["loss"])}

    def pretrained_settings(self, name: str, saved: Config | None) -> dict[str, Any]:
        """The model flags that config.json sets, and the tokenizer beside it if there is one."""
        from recipes.models.gpt2 import settings_of
        from trainer.checkpoints.pretrained import stored_config

        tokenizer = {"tokenizer": name} if Path(name, "tokenizer.json").exists() else {}
        return tokenizer | (settings_of(stored_config(name)) if saved is None else vars(saved.model))

    def pretrained(self, name: str, network: Any, initial: Weights) -> dict[str, StoredTensor]:
        """GPT-2 weights from the hub, or from a folder that transformers wrote. ValueError if the output layer is not tied."""
        from trainer.checkpoints.pretrained import stored_tensors
        from trainer.initial_weights import ALL_ROWS

        # The files of the original GPT-2s lack the prefix `transformer.`, and hold causal masks.
        named = {key.removeprefix("transformer."): stored for key, stored in stored_tensors(name).items()}
        head = named.pop("lm_head.weight", None)
        if head and "wte.weight" in named and not head.read(ALL_ROWS).equal(named["wte.weight"].read(ALL_ROWS)):
            raise ValueError("lm_head.weight and wte.weight differ, and here they are one; choose a model that ties them")
        masks = (".attn.bias", ".attn.masked_bias")
        return {f"transformer.{key}": stored for key, stored in named.items() if not key.endswith(masks)}

    def checkpoint_files(self, config: Config, network: Any, data: Data) -> dict[str, str | dict[str, Tensor]]:
        """The files that transformers needs beside the weights."""
        return {
            "config.json": network.config.to_json_string(),
            "generation_config.json": network.config.generation_json(),
            "tokenizer.json": data.extra["text"].tokenizer_json,
        }

    def flops_per_item(self, config: Config, network: Any) -> float:
        """Training FLOPs of a token."""
        return network.training_flops_per_token()


if __name__ == "__main__":
    main(Gpt2Wikitext())
