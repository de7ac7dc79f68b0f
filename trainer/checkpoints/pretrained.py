"""Reads weights that other programs wrote, from a folder or the Hugging Face hub; each process only those that it will hold."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.errors import UserError, one_line
from trainer.initial_weights import ALL_ROWS

SINGLE, INDEX, PICKLE, CONFIG = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "config.json"
WAY_OUT = "give a folder, or OWNER/NAME of the hub"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, which `read` reads."""

    shape: tuple[int, ...]
    read: Callable[[slice], Tensor]
    """returns some rows (indices of the first dimension) or ALL_ROWS, on the host, in memory of their own"""


def stored_config(name: str) -> dict[str, Any]:
    """The config.json of a folder, or of a model on the hub.

    ValueError if there is none, or it is no JSON object; OSError if the hub refuses.
    """
    path = _file(name, CONFIG)
    if path is None and not Path(name).is_dir():
        raise ValueError(f"there is no such folder, and the hub gives no {CONFIG} of it; {WAY_OUT}")
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


def weight_files(name: str) -> list[str]:
    """Paths of the safetensors files of a folder that `save_pretrained` wrote, or of a model on the hub.

    ValueError if there are none; OSError if the hub refuses.
    """
    single, index = _file(name, SINGLE), _file(name, INDEX)
    if single:
        return [single]
    if index:
        from transformers.utils import cached_file

        with open(index, encoding="utf-8") as content:
            return [str(cached_file(name, file)) for file in sorted(set(json.load(content)["weight_map"].values()))]
    if _file(name, PICKLE):
        raise ValueError(
            f"holds its weights as a pickle ({PICKLE}), which is never opened; convert it where you trust it: "
            f"AutoModel.from_pretrained({name!r}).save_pretrained(FOLDER)"
        )
    raise ValueError(f"holds neither {SINGLE} nor {INDEX}; give a folder that save_pretrained wrote, or a checkpoint")


def _file(name: str, file: str) -> str | None:
    """The path of a file of a folder, or of a model on the hub, which is downloaded; None if it has no such file.

    ValueError if `name` is neither a folder nor a possible name on the hub; OSError if the hub refuses.
    """
    from transformers.utils import cached_file

    if not Path(name).is_dir() and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise ValueError(f"there is no such folder; {WAY_OUT}")
    return cached_file(name, file, _raise_exceptions_for_missing_entries=False)


def stored_tensors(name: str) -> dict[str, StoredTensor]:
    """{name in the files: tensor} of such a folder or model. Errors: those of `weight_files`; ValueError for a damaged file."""
    found: dict[str, StoredTensor] = {}
    for path in weight_files(name):
        try:
            file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file ({one_line(error)})") from error
        for key in file.keys():  # noqa: SIM118  (`file` cannot be iterated over)
            found[key] = StoredTensor(tuple(file.get_slice(key).get_shape()), partial(_read, file, path, key))
    return found


def rows_in(file: Any, name: str, rows: slice) -> Tensor:
    """Rows of a tensor in an open safetensors file, copied out of the mapped file, which may be deleted at any time."""
    return (file.get_tensor(name) if rows == ALL_ROWS else file.get_slice(name)[rows]).clone()


def _read(file: Any, path: str, name: str, rows: slice) -> Tensor:
    tensor = rows_in(file, name, rows)
    if not bool(torch.isfinite(tensor).all()):
        raise UserError(f"{path} holds NaN or infinity in {name}; choose other weights")
    return tensor
