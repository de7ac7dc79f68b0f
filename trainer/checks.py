"""Checks of a recipe, its data and its network before the first step: these mistakes would show hours later, or never."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from trainer.checkpoints.init_from import own_checkpoint
from trainer.checkpoints.resume import LaunchPlan
from trainer.data import stream
from trainer.data.bad_samples import first_batch
from trainer.distributed.launch import Launch
from trainer.errors import UserError
from trainer.recipe import Batch, Data, Log, Recipe


def check_data(recipe: Recipe, data: Data, plan: LaunchPlan, launch: Launch, log: Log) -> None:
    """UserError for data without a fingerprint, metrics that no evaluation set gives, and other data than a resumed run's."""
    if not data.fingerprint:
        raise UserError("build_data gives no fingerprint; give a hash of what decides the samples, to know the data again")
    watched = [recipe.best_metric, *([recipe.patience_metric[0]] if recipe.patience_metric else [])]
    for metric in watched if data.evaluation else ():
        if not any(metric.startswith(f"{name}_") for name in data.evaluation):
            sets = ", ".join(data.evaluation)
            raise UserError(
                f"{metric} is to be watched, but the evaluation sets are called {sets}; a metric is SET_NAME, val_loss"
            )
    resumed = plan.checkpoint
    if resumed is not None:
        trained_on, here = resumed.state["data_fingerprint"], data.fingerprint
        text = f"data fingerprint: {resumed.path} was trained on {trained_on[:12]}, this is {here[:12]}"
        accepted = plan.config.run.data_changed == "accept"
        if trained_on != here and accepted:
            log(
                f"WARNING: {text}; going on with these (--data_changed accept). The best so far was measured on the data before"
            )
        way_out = (
            f"restore the data, go on with these by --data_changed accept, or take the weights only: --init_from {resumed.path}"
        )
        launch.control.raise_if_any(None if trained_on == here or accepted else UserError(f"{text}; {way_out}"))


def check_same_everywhere(network: nn.Module, data: Data, launch: Launch) -> None:
    """UserError unless every process has built the same model and data sets: gradients are summed by the order of parameters,
    and samples are shared out by number."""
    sets = {"train": data.train, **data.evaluation}
    text = data.fingerprint + ";".join(f"{name}{stream.length_of(dataset)}" for name, dataset in sets.items())
    text += ";".join(f"{name}{tuple(p.shape)}" for name, p in network.named_parameters())
    digest = hashlib.sha256(text.encode()).hexdigest()
    same = launch.control.broadcast(digest) == digest
    differs = f"rank {launch.rank} built another model or data set than rank 0 (names, shapes or order of parameters, contents)"
    launch.control.raise_if_any(None if same else UserError(f"{differs}; are versions and files the same on every host?"))


def check_batch_norm(network: nn.Module, launch: Launch) -> None:
    """UserError for batch statistics under several processes: they would depend on which samples each process gets."""
    for name, module in network.train().named_modules() if launch.processes > 1 else ():
        own = isinstance(module, _BatchNorm) or (isinstance(module, _NormBase) and module.track_running_stats)
        if own and not isinstance(module, nn.SyncBatchNorm) and module.training:
            raise UserError(
                f"{name} is a {type(module).__name__}, whose statistics would be those of each process's own samples: take "
                "GroupNorm, or on GPUs torch.nn.SyncBatchNorm.convert_sync_batchnorm in build_model, or train in one process"
            )


def first_sample(config: Any, data: Data) -> Batch:
    """A batch of the first sample. Reads the same item of the second epoch too, as a set may forget to take `number % len`."""
    samples = stream.length_of(data.train) or 0
    first = stream.sample_numbers([0], config.optimisation.seed, samples or None).tolist()
    way_on = "mend the data" + (", or add --bad_samples skip" if config.run.bad_samples == "stop" else "")
    batch = first_batch(data.train, first, config.run, way_on)
    try:
        if samples:
            first_batch(data.train, [first[0] + samples], config.run, way_on)
    except IndexError as error:
        raise UserError(
            f"sample {first[0] + samples} of the train set is item {first[0]}, epoch 1: take number % len"
        ) from error
    return batch


def warn_of_other_tokenizer(init_from: str, tokenizer_json: str, log: Log) -> None:
    """Say so where the weights of `--init_from` come with a tokenizer of other entries than this run's, if as many."""
    try:
        path = (own_checkpoint(init_from) or Path(init_from)) / "tokenizer.json"
        theirs, ours = (json.loads(text)["model"]["vocab"] for text in (path.read_text(encoding="utf-8"), tokenizer_json))
    except (OSError, ValueError, LookupError, TypeError):  # it brings none, or none of this form
        return
    if theirs != ours:
        log(f"WARNING: {path} is another tokenizer than this run's, whose ids mean other text to these weights")
