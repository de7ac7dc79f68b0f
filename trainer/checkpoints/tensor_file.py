"""A .safetensors file, assembled tensor by tensor in a host buffer that is reused, then hashed and written from there.

The format (github.com/huggingface/safetensors, "Format"): the length of the header as 8 bytes, little-endian; the header, JSON
with dtype, shape and offsets of every tensor, padded with spaces to 8 bytes; then the tensors, one after the other. The
library's own writer needs all tensors at once and gives no hash. Its reader is used: it checks what it reads.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.backends.tensors import TensorEntry

TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.complex64: "C64",
}

DTYPES = {name: dtype for dtype, name in TYPES.items()}


def in_file_order(entries: Sequence[TensorEntry]) -> list[TensorEntry]:
    """The order of the tensors in a file: wide dtypes first, so that each starts at a multiple of its width."""
    return sorted(entries, key=lambda entry: -entry.dtype.itemsize)


def header_of(entries: Sequence[TensorEntry]) -> bytes:
    """The bytes before the first tensor of a file that holds these tensors in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        start, end = end, end + entry.size_bytes
        header[entry.name] = {"dtype": TYPES[entry.dtype], "shape": entry.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class TensorFile:
    """A file in host memory, which may be filled and written many times. `entries` are `in_file_order`.

    `pinned`: in page-locked memory, so that a GPU copies into it asynchronously.
    """

    def __init__(self, entries: Sequence[TensorEntry], pinned: bool = False) -> None:
        self.header = header_of(entries)
        sizes = [len(self.header), *(entry.size_bytes for entry in entries)]
        self._content = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=pinned)
        self._content[: len(self.header)] = torch.frombuffer(bytearray(self.header), dtype=torch.uint8)
        parts = zip(entries, self._content.split(sizes)[1:], strict=True)
        self._places = {entry.name: part.view(entry.dtype).view(entry.shape) for entry, part in parts}

    def fill(self, name: str, tensor: Tensor) -> None:
        """Copy a tensor from any device to its place, as the dtype of its entry. From a GPU the copy is asynchronous."""
        place = self._places[name]
        assert tensor.shape == place.shape, f"{name}: {tuple(tensor.shape)} instead of {tuple(place.shape)}"
        place.copy_(tensor.detach(), non_blocking=True)

    def write(self, path: Path) -> dict[str, Any]:
        """Write and fsync the file; its size and hash, as in the manifest. Raises OSError."""
        content = memoryview(self._content.numpy().data)
        with path.open("xb", buffering=0) as file:
            left = content
            while left:  # one call writes 2 GB at most, and on a nearly full disk less than asked before it fails
                left = left[file.write(left) :]
            digest = hashlib.sha256(content).hexdigest()  # meanwhile the system starts to write it back
            os.fsync(file.fileno())
        return {"size": len(content), "sha256": digest}
