"""A Transformer on files of token ids: `accelerate launch recipes/tinystories_lm.py [train|evaluate|generate] ...`

A sample is a window of `context_length` + 1 ids: each but the last is an input, and the one after it its label.
tools/prepare_text.py makes the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from recipes.commands.language_model import MixtureReport, perplexity, sources_text, trained_network
from recipes.commands.token_language_model import Evaluate, Generate, bigram, evaluate, generate, sample_validation
from trainer.command_line import sections
from trainer.command_line.bounds import Positive
from trainer.command_line.locations import Tokenizer, Weighted, path_and_weight
from trainer.main import main
from trainer.recipe import Batch, Command, Data, Log, Recipe
from trainer.reporting.run_directory import RunDirectory
from trainer.reporting.trackers import read_metrics

if TYPE_CHECKING:
    from torch import Tensor

    from recipes.models.transformer_lm import TransformerLM


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    vocab_size: Annotated[int, Positive] = 10_000
    """entries of the tokenizer that produced the ids, or somewhat more"""
    context_length: Annotated[int, Positive] = 256
    """tokens of a window, and the most the model attends to"""
    d_model: Annotated[int, Positive] = 512
    num_heads: Annotated[int, Positive, arg(aliases=("--nhead",))] = 8
    d_ff: Annotated[int, Positive] = 2048
    """width inside the feed-forward"""
    num_layers: Annotated[int, Positive, arg(aliases=("--n_layers",))] = 6
    rope_theta: Annotated[float, Positive] = 10_000.0
    """base of the rotary frequencies"""
    norm_position: Literal["pre", "post"] = "pre"
    rope: bool = True
    """rotary positions; --no_rope: none at all"""
    ffn: Literal["swiglu", "silu"] = "swiglu"
    """silu: without the gate"""
    tie_embeddings: bool = False
    """one matrix for embedding and output layer"""
    qk_norm: bool = False
    """normalise queries and keys per head"""
    num_kv_heads: Annotated[int | None, Positive] = None
    """heads of keys and values, each shared by several of queries (default: num_heads)"""
    head_dim: Annotated[int | None, Positive] = None
    """width of a head (default: d_model / num_heads)"""
    norm_eps: Annotated[float, Positive] = 1e-5
    """added to the mean square in every norm"""


@dataclass(frozen=True)
class DataConfig:
    """The token ids."""

    train_data_path: Annotated[tuple[str, ...], Weighted] = ()
    """.ids, .bin or .npy, a 'pattern' or folder of shards, several as one; a mixture: PATH=WEIGHT (in YAML also {path: PATH,
    weight: WEIGHT}). Or text, of which ids are made here: files, a folder, OWNER/NAME of the hub, or `embedded`"""
    val_data_path: Annotated[tuple[str, ...], Weighted] = ()
    """likewise; each of several sets is also measured by itself"""
    column: str = "text"
    """of the text in JSONL, parquet and data sets"""
    tokenizer: Annotated[str | None, Tokenizer] = None
    """kept in checkpoints (default: tokenizer.json beside train_data_path; of text one that is trained on it)"""
    sampling: Literal["random", "sequential"] = "random"
    """windows at random starts, or every window once an epoch"""
    document_mask: bool = False
    """attention stays within a document, up to <|endoftext|>, and positions count from 0 in it; its first token has no loss"""


@dataclass(frozen=True)
class OptimisationConfig(sections.Optimisation):
    """What decides the weights, beside the model and the data."""

    decay_all: bool = False
    """decay norms and embeddings too"""


# A batch takes microseconds, so there are no data workers; every step checkpoint stays, to resume from any of them.
@dataclass(frozen=True)
class Config:
    """Train a Transformer language model on token ids in files."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimisation: OptimisationConfig = OptimisationConfig(
        batch_size=64, max_steps=100_000, learning_rate=6e-4, min_lr=6e-5, weight_decay=0.1
    )
    run: sections.Run = sections.Run(
        num_workers=0, eval_iters=100, save_every=5000, keep_last=0, wandb_project="transformer-lm"
    )


class TinyStoriesReport(MixtureReport):
    """What a run prints."""

    def start_lines(self, step: int, total_steps: int, device: str, parameters: int, trained: int) -> list[str]:
        """Lines before the first step of a launch."""
        sizes = ["Initializing model...", f"Total parameters: {parameters:,}", f"Trainable parameters: {trained:,}", ""]
        plan = [f"Starting training from iteration {step}...", f"Device: {device}", f"Max iterations: {total_steps}", "-" * 80]
        return sizes + plan

    def log_line(self, step: int, metrics: Mapping[str, float]) -> str:
        """The console line of a log step."""
        return (
            f"Iter {step:6d} | Loss: {metrics['train/loss']:.4f} | LR: {metrics['train/learning_rate']:.2e} | "
            f"Time: {metrics['train/iter_time_ms']:.1f}ms | Tokens/sec: {metrics['train/tokens_per_sec']:.0f}"
            f"{sources_text(metrics)}"
        )

    def evaluation_line(self, step: int, metrics: Mapping[str, float]) -> str:
        """The console lines of an evaluation."""
        losses = f"Train loss: {metrics['eval/train_loss']:.4f} | Val loss: {metrics['eval/val_loss']:.4f}"
        return f"{'-' * 80}\nEvaluating at iteration {step}...\n{losses}\n{'-' * 80}"

    def baseline(self, config: Config, data: Data) -> tuple[str, float] | None:
        """Name and loss of a bigram on all validation tokens, which any language model should beat; None for large files."""
        return bigram(data.extra["streams"], config.model.vocab_size, config.data.document_mask)

    def after_training(self, config: Config, data: Data, run: RunDirectory, checkpoint: Path, log: Log) -> None:
        """Log the validation loss beside the bigram's, and a sample."""
        loss = read_metrics(run.metrics)[-1]["final/val_loss"]
        samples, windows = config.run.eval_iters * config.optimisation.effective_batch_size, len(data.evaluation["val"])
        part = f"{samples:,} of {windows:,} windows (eval_iters) spread over it" if 0 < samples < windows else "every token"
        baseline = self.baseline(config, data)
        beside = f"; {baseline[0]} on every token: {baseline[1]:.4f}" if baseline else ""
        log(f"Validation: {loss:.4f} nats per token over {part}{beside}")
        if data.extra["streams"].tokenizer_json is not None:
            log(f"Sample: {sample_validation(trained_network(self.recipe, config, data, checkpoint), data.extra['streams'])}")


class TinyStoriesLM(Recipe[Config]):
    """The next-token loss of a Transformer on token ids."""

    name = "tinystories_lm"
    config_class = Config
    report_class = TinyStoriesReport
    presets = {"quick": Path(__file__).parent / "configs" / "tinystories_lm_quick.yaml"}
    commands = {"evaluate": Command(Evaluate, evaluate), "generate": Command(Generate, generate)}
    throughput = ("tokens", "next_token")
    checkpoint_prefix = "checkpoint_iter_"
    free_settings = ("context_length",)
    report: TinyStoriesReport

    def build_data(self, config: Config) -> Data:
        """Training windows, and fixed ones to evaluate on: the whole validation stream, and as many of the training stream."""
        from recipes.data.token_streams import open_streams
        from recipes.data.token_windows import FixedWindows, RandomWindows, SharesSoFar, TokenWindows

        flags, length, seed = config.data, config.model.context_length, config.optimisation.seed
        train_paths, val_paths = ([*map(path_and_weight, paths)] for paths in (flags.train_data_path, flags.val_data_path))
        streams = open_streams(train_paths, val_paths, flags.tokenizer, config.model.vocab_size, length, flags.column)
        end = streams.end_of_text() if flags.document_mask else None
        drawn = RandomWindows(streams.train, length, seed, end)
        train = TokenWindows(streams.train.whole, length, end_of_text=end) if flags.sampling == "sequential" else drawn
        validation = {"val": TokenWindows(streams.validation.whole, length, end_of_text=end)}
        if len(streams.validation.sets) > 1:
            named = zip(streams.validation.labels, streams.validation.sets, strict=True)
            validation |= {f"val_{label}": TokenWindows(part, length, end_of_text=end) for label, part in named}
        train_part: FixedWindows | TokenWindows = TokenWindows(streams.train.whole, length, len(validation["val"]), end)
        if len(streams.train.sets) > 1:
            if flags.sampling == "sequential":
                raise ValueError("sampling sequential visits every window once an epoch, whatever its weight; give one set")
            train_part = FixedWindows(streams.train, length, seed + 1, len(validation["val"]), end)
            self.report.watch(SharesSoFar(drawn), config.optimisation.effective_batch_size)
        notes = ["Loading data with memory mapping...", *streams.notes]
        return Data(train, {"train": train_part, **validation}, None, streams.fingerprint, notes, {"streams": streams})

    def build_model(self, config: Config, data: Data) -> TransformerLM:
        """The network, which follows from the flags alone."""
        from recipes.models.transformer_lm import TransformerLM

        return TransformerLM(**vars(config.model))

    def items(self, batch: Batch) -> dict[str, int]:
        """The number of predicted tokens; for a mixture also by set."""
        from recipes.models.next_token_loss import predicted_tokens

        return predicted_tokens(_labels(batch), batch.get("source"), self.monitored)

    def loss(self, network: Any, batch: Batch) -> dict[str, Tensor]:
        """Cross entropy of each id given the ids before it in its window, summed in fp32."""
        from recipes.models.next_token_loss import loss_terms

        positions = batch["positions"][:, :-1] if "positions" in batch else None
        inputs = (batch["tokens"][:, :-1].clamp_min(0), _labels(batch).long(), positions)
        return loss_terms(partial(network, *inputs), batch.get("source"), self.monitored)

    def derive(self, means: Mapping[str, float]) -> dict[str, float]:
        """Perplexity per token."""
        return {"perplexity": perplexity(means["loss"])}

    def parameter_groups(self, network: Any, config: Config) -> list[dict[str, Any]]:
        """No weight decay on norms and embeddings (nor on an output layer tied to them), unless `decay_all`."""
        o, embedding = config.optimisation, network.token_embeddings.weight
        decayed = [p for p in network.parameters() if o.decay_all or (p.ndim >= 2 and p is not embedding)]
        others = [p for p in network.parameters() if not o.decay_all and (p.ndim < 2 or p is embedding)]
        groups = [{"params": decayed, "weight_decay": o.weight_decay}, {"params": others, "weight_decay": 0.0}]
        return [group for group in groups if group["params"]]

    def pretrained_settings(self, name: str, saved: Config | None) -> dict[str, Any]:
        """The model flags that the config.json of a Llama or a Qwen3 sets."""
        from recipes.models.llama_form import settings_of
        from trainer.checkpoints.pretrained import stored_config

        return vars(saved.model) if saved is not None else settings_of(stored_config(name))

    def pretrained(self, name: str, network: Any, initial: Any) -> dict[str, Any]:
        """Weights of a Llama or Qwen3, with their names and the order of their rows changed to this network's."""
        from recipes.models.llama_form import named_as_ours
        from trainer.checkpoints.pretrained import stored_tensors

        return named_as_ours(network, stored_tensors(name))

    def checkpoint_files(self, config: Config, network: Any, data: Data) -> dict[str, str | dict[str, Tensor]]:
        """The tokenizer, if there is one."""
        tokenizer_json = data.extra["streams"].tokenizer_json
        return {"tokenizer.json": tokenizer_json} if tokenizer_json else {}

    def flops_per_item(self, config: Config, network: Any) -> float:
        """Training FLOPs of a token."""
        return network.training_flops_per_token()


def _labels(batch: Batch) -> Tensor:
    """The id after each input [batch, length]; IGNORED past the end of the file and, with a document mask, where one begins."""
    from recipes.data.token_samples import IGNORED

    labels = batch["tokens"][:, 1:]
    return labels.masked_fill(batch["positions"][:, 1:] == 0, IGNORED) if "positions" in batch else labels


if __name__ == "__main__":
    main(TinyStoriesLM())
