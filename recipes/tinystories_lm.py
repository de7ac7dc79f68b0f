"""A Transformer on files of token ids: `accelerate launch recipes/tinystories_lm.py [train|evaluate|generate] ...`

A sample is a window of `context_length` inputs and the id after each. tools/prepare_text.py makes the files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from recipes.models.gpt2 import loss_sum, perplexity
from recipes.studies.story_config import Config
from recipes.studies.story_model import Evaluate, Generate, bigram, evaluate, generate, show_trained, windows_of
from trainer.main import main
from trainer.recipe import Batch, Command, Data, Recipe


class TinyStoriesLM(Recipe):
    """Model, data and loss of a language model on token ids."""

    name = "tinystories_lm"
    Config = Config
    presets = {"quick": Path(__file__).parent / "configs" / "tinystories_lm_quick.yaml"}
    commands = {"evaluate": Command(Evaluate, evaluate), "generate": Command(Generate, generate)}
    speed = ("tokens", "next_token")
    paths = ("train_data_path", "val_data_path", "tokenizer")
    loss_unit = "nats per token"
    checkpoint_prefix = "checkpoint_iter_"

    def build_data(self, config: Config) -> Data:
        """Windows of the training stream, and fixed ones of both streams to measure."""
        return windows_of(config)

    def build_model(self, config: Config, data: Data) -> Any:
        """The network, from flags alone."""
        from recipes.models.transformer_lm import TransformerLM

        return TransformerLM(gradient_checkpointing=config.run.gradient_checkpointing, **vars(config.model))

    def items(self, batch: Batch) -> dict[str, int]:
        """Predicted tokens."""
        return {"next_token": int((batch["tokens"][:, 1:] >= 0).sum())}

    def loss(self, network: Any, batch: Batch) -> dict[str, Any]:
        """Summed cross entropy of each id given those before it in its window."""
        inputs, labels = batch["tokens"][:, :-1].clamp_min(0), batch["tokens"][:, 1:].long()
        return {"next_token": loss_sum(network(inputs), labels)}

    def derive(self, means: Mapping[str, float]) -> dict[str, float]:
        """Perplexity per token."""
        return {"perplexity": perplexity(means["loss"])}

    def parameter_groups(self, network: Any, config: Config) -> list[dict[str, Any]]:
        """No weight decay on norms and embeddings, unless `decay_all`."""
        from recipes.models.transformer_lm import decay_groups

        return decay_groups(network, config.optimisation.weight_decay, config.optimisation.decay_all)

    def documents(self, config: Config, network: Any, data: Data) -> dict[str, str]:
        """The tokenizer, where there is one."""
        return {"tokenizer.json": data.extra["streams"].tokenizer_json} if data.extra["streams"].tokenizer_json else {}

    def flops_per_item(self, config: Config, network: Any) -> float:
        """For MFU."""
        from recipes.models.transformer_lm import training_flops_per_token

        return training_flops_per_token(network)

    def start_lines(self, step: int, total_steps: int, device: str, parameters: int, trained: int) -> list[str]:
        """As in the guide."""
        sizes = ["Initializing model...", f"Total parameters: {parameters:,}", f"Trainable parameters: {trained:,}", ""]
        plan = [f"Starting training from iteration {step}...", f"Device: {device}", f"Max iterations: {total_steps}", "-" * 80]
        return sizes + plan

    def log_line(self, step: int, metrics: Mapping[str, float]) -> str:
        """As in the guide."""
        return (
            f"Iter {step:6d} | Loss: {metrics['train/loss']:.4f} | LR: {metrics['train/learning_rate']:.2e} | "
            f"Time: {metrics['train/iter_time_ms']:.1f}ms | Tokens/sec: {metrics['train/tokens_per_sec']:.0f}"
        )

    def evaluation_line(self, step: int, metrics: Mapping[str, float]) -> str:
        """As in the guide."""
        losses = f"Train loss: {metrics['eval/train_loss']:.4f} | Val loss: {metrics['eval/val_loss']:.4f}"
        return f"{'-' * 80}\nEvaluating at iteration {step}...\n{losses}\n{'-' * 80}"

    def baseline(self, config: Config, data: Data) -> tuple[str, float] | None:
        """A bigram on the whole validation stream, which any language model should beat; none for large files."""
        return bigram(data.extra["streams"], config.model.vocab_size)

    def after_training(self, config: Config, data: Data, run: Any, checkpoint: Any, say: Callable[[str], None]) -> None:
        """Validation loss beside the bigram, and a sample."""
        show_trained(self, config, data, run, checkpoint, say)


if __name__ == "__main__":
    main(TinyStoriesLM())
