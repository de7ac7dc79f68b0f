"""Weights that somebody else has written: a folder, or a name of the hub, of which a process reads what it will hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.errors import UserError, one_line
from trainer.initial_weights import ALL_ROWS

SINGLE, INDEX, PICKLE, CONFIG = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "config.json"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not read yet."""

    shape: tuple[int, ...]
    read: Callable[[slice], Tensor]
    """some rows of it (places in its first dimension), or all for `ALL_ROWS`, in memory of their own on the host"""


def stored_config(name: str) -> dict[str, Any]:
    """The config.json of a folder, or of a model of the hub. OSError if there is none, ValueError if it is no JSON object."""
    from transformers.utils import cached_file

    path = cached_file(name, CONFIG, _raise_exceptions_for_missing_entries=False)
    if path is None:
        raise ValueError(f"holds no {CONFIG}, which says what network its weights are of; put the one of its model there")
    with open(path, encoding="utf-8") as content:
        try:
            config = json.load(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON ({one_line(error)})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no JSON object; restore it")
    return config


def stored_tensors(name: str) -> dict[str, StoredTensor]:
    """The tensors of a folder that `save_pretrained` wrote, or of a model of the hub, by their names there.

    OSError if there is nothing, ValueError if it is no safetensors.
    """
    from transformers.utils import cached_file

    def path_of(file: str) -> str | None:
        return cached_file(name, file, _raise_exceptions_for_missing_entries=False)

    single, index = path_of(SINGLE), path_of(INDEX)
    if single:
        paths = [single]
    elif index:
        with open(index, encoding="utf-8") as content:
            paths = [str(cached_file(name, file)) for file in sorted(set(json.load(content)["weight_map"].values()))]
    elif path_of(PICKLE):
        raise ValueError(
            f"holds its weights as a pickle ({PICKLE}), which is never opened; convert it where you trust it: "
            f"AutoModel.from_pretrained({name!r}).save_pretrained(FOLDER)"
        )
    else:
        raise ValueError(f"holds neither {SINGLE} nor {INDEX}; give a folder that save_pretrained wrote, or a checkpoint")
    found: dict[str, StoredTensor] = {}
    for path in paths:
        try:
            file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file ({one_line(error)})") from error
        for key in file.keys():  # noqa: SIM118  (no mapping)
            found[key] = StoredTensor(tuple(file.get_slice(key).get_shape()), partial(_read, file, path, key))
    return found


def rows_in(file: Any, name: str, rows: slice) -> Tensor:
    """Rows of a tensor in an open safetensors file: in memory of their own, as the file may be deleted any time."""
    return (file.get_tensor(name) if rows == ALL_ROWS else file.get_slice(name)[rows]).clone()


def _read(file: Any, path: str, name: str, rows: slice) -> Tensor:
    tensor = rows_in(file, name, rows)
    if not bool(torch.isfinite(tensor).all()):
        raise UserError(f"{path} holds NaN or infinity in {name}; choose other weights")
    return tensor
