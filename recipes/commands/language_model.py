"""What the commands of every language model share: sampling flags, continuing a prompt, perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from trainer.command_line.bounds import Bound, NotNegative, Positive
from trainer.command_line.locations import Existing
from trainer.command_line.sections import Device
from trainer.errors import UserError
from trainer.recipe import Report

if TYPE_CHECKING:
    from torch import Tensor, nn

    from recipes.data.text import Text
    from recipes.data.token_windows import SharesSoFar
    from trainer.recipe import Data, Recipe


@dataclass(frozen=True)
class Sampling:
    """How to continue a prompt, for any language model."""

    model_path: Annotated[str, Existing] = "checkpoints/best_model"
    """checkpoint folder, as given or of the latest run"""
    prompt: str = ""
    temperature: Annotated[float, NotNegative] = 0.8
    """0: the likeliest token each time"""
    top_p: Annotated[float, Bound(0, most=1, exclusive=True)] = 0.95
    """sample from the smallest set of tokens with this mass"""
    seed: int = 42
    device: Device = "auto"


@dataclass(frozen=True)
class SplitEvaluation:
    """Which split of which data a language model of text is measured on."""

    model_path: Annotated[str, Existing] = "checkpoints/best_model"
    """checkpoint folder, as given or of the latest run"""
    split: Literal["train", "validation", "test"] | None = None
    """default: test, or validation where there is no test text"""
    dataset: str | None = None
    """another data set than the checkpoint's"""
    data_dir: Annotated[tuple[str, ...], Existing] = ()
    batch_size: Annotated[int, Positive, arg(aliases=("--batch",))] = 8
    """samples of one micro-step, summed over all processes"""
    device: Device = "auto"

    def applied_to(self, config: Any, tokenizer: str) -> Any:
        """A checkpoint's configuration with these data and the given tokenizer: one trained on them would give other ids."""
        changes: dict[str, str | tuple[str, ...]] = {"tokenizer": tokenizer}
        if self.dataset:
            changes |= {"dataset": self.dataset, "data_dir": ()}
        if self.data_dir:
            changes |= {"data_dir": self.data_dir}
        return replace(config, data=replace(config.data, **changes))

    def chosen(self, config: Any, data: Data) -> tuple[str, Any]:
        """(name of the split, its samples). UserError where there is no such split."""
        split = self.split or ("test" if data.test else "validation")
        dataset = {"train": data.train, "validation": data.evaluation["val"], "test": data.test}[split]
        if dataset is None:
            raise UserError(
                f"{', '.join(config.data.data_dir) or config.data.dataset} has no test text; give --split validation"
            )
        if not hasattr(dataset, "__len__"):
            raise UserError("a mixture draws its training samples and has no end of them; give --split validation")
        return split, dataset


class MixtureReport(Report[Any]):
    """Logs the loss and, for a mixture, the share and the loss of each set."""

    loss_unit = "nats per token"
    shares_at: Callable[[int], dict[str, float]] | None = None
    """step -> {label of a set: its share of the samples up to that step}"""

    def watch(self, shares: SharesSoFar, effective_batch_size: int) -> None:
        """Log the shares of this mixture, and the loss of each set."""
        self.recipe.monitored = tuple(f"loss_{label}" for label in shares.windows.mixture.labels)
        self.shares_at = lambda step: shares.at(step * effective_batch_size)

    def step_metrics(self, step: int) -> dict[str, float]:
        """The share of each set so far; empty without a mixture."""
        return {f"share/{label}": share for label, share in self.shares_at(step).items()} if self.shares_at else {}


def sources_text(metrics: Mapping[str, float]) -> str:
    """The shares so far and the loss of each set, for the log line; empty without a mixture."""
    shares = [f"{k.removeprefix('train/share/')} {v:.2%}" for k, v in metrics.items() if k.startswith("train/share/")]
    losses = [f"{k.removeprefix('train/loss_')} {v:.4f}" for k, v in metrics.items() if k.startswith("train/loss_")]
    return f" | So far: {', '.join(shares)} | Loss of {', '.join(losses)}" if shares else ""


def check_sampling(flags: Sampling) -> None:
    """UserError for a prompt that is not UTF-8, or a seed above 64 bits."""
    try:
        flags.prompt.encode()
    except UnicodeEncodeError as reason:  # Python passes bytes of another encoding on as surrogates
        raise UserError(f"the prompt is not UTF-8 from character {reason.start + 1} on; give it in UTF-8") from None
    if not -(2**63) <= flags.seed < 2**63:
        raise UserError(f"seed {flags.seed} does not fit into 64 bits; give a smaller one")


def continue_prompt(network: Any, text: Text, flags: Sampling, generate: Callable[[Tensor], Tensor]) -> str:
    """The prompt and its continuation by `generate` (ids [time] -> the same and more ids). UserError if flags do not fit."""
    import torch

    check_sampling(flags)
    tokenizer = text.tokenizer()
    ids = tokenizer.encode(flags.prompt, add_special_tokens=False).ids or [text.end_of_text]
    torch.manual_seed(flags.seed)
    output = generate(torch.tensor(ids, device=next(network.parameters()).device))
    return tokenizer.decode(output.tolist(), skip_special_tokens=True)


def trained_network(recipe: Recipe, config: Any, data: Data, checkpoint: Path) -> nn.Module:
    """The plain network with a checkpoint's weights, on the CPU and in evaluation mode."""
    import torch

    from trainer.checkpoints.checkpoint import Checkpoint
    from trainer.checkpoints.network import load_network

    return load_network(recipe, Checkpoint(checkpoint), config, data, torch.device("cpu"))


def perplexity(nats: float) -> float:
    """exp(nats); infinite where that overflows."""
    return math.exp(nats) if nats < 700 else math.inf
