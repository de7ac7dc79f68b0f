"""Writing a .safetensors file tensor by tensor, hashed on its way to the disk: no second copy in memory, no second reading.

The format (github.com/huggingface/safetensors, "Format"): the length of the header as 8 bytes, little-endian; the header, JSON
with type, shape and place of every tensor, padded with spaces to 8 bytes; then the tensors, one after the other. The library
writes such a file only from tensors that are all in memory. Reading is left to it: it checks what it reads.
"""

from __future__ import annotations

import contextlib
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
    """The order in which a file holds its tensors: wide types first, so that each starts at a multiple of its width."""
    return sorted(entries, key=lambda entry: -entry.dtype.itemsize)


class TensorFile:
    """One file under way. Its tensors are announced first, `in_file_order`, and then added in that order. Raises OSError."""

    def __init__(self, path: Path, entries: Sequence[TensorEntry]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for entry in entries:
            start, end = end, end + entry.size_bytes
            header[entry.name] = {"dtype": TYPES[entry.dtype], "shape": entry.shape, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._size, self._hash = 0, hashlib.sha256()
        self._file = path.open("xb", buffering=0)
        self._write(memoryview(len(text).to_bytes(8, "little") + text))

    def add(self, entry: TensorEntry, tensor: Tensor) -> None:
        """Write the next tensor, from any device, as the type that was announced."""
        assert tuple(tensor.shape) == entry.shape, f"{entry.name}: {tuple(tensor.shape)} instead of {entry.shape}"
        host = tensor.detach().to("cpu", entry.dtype).contiguous()
        if entry.size_bytes:
            self._write(memoryview(host.reshape(-1).view(torch.uint8).numpy().data))

    def _write(self, content: memoryview) -> None:
        self._hash.update(content)
        while content:  # a write takes 2 GB at most, and a nearly full disk takes less than asked before it fails
            written = self._file.write(content)
            self._size += written
            content = content[written:]

    def finish(self) -> dict[str, Any]:
        """Bring the file to the disk; its size and hash, as a manifest has them."""
        os.fsync(self._file.fileno())
        return {"size": self._size, "sha256": self._hash.hexdigest()}

    def close(self) -> None:
        """Let the file go, finished or not."""
        with contextlib.suppress(OSError):  # what matters was said by `finish`
            self._file.close()
