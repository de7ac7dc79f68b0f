"""Sizes of a network, its optimizer state and its checkpoints, computed from shapes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from trainer.backends.blocks import named_blocks
from trainer.backends.tensors import StateLayout, TensorEntry, buffer_entries
from trainer.checkpoints.network import is_kept
from trainer.checkpoints.tensor_file import header_of
from trainer.checkpoints.writing import files_of
from trainer.planning.memory import FP32_BYTES, Footprint, MicroStep


def footprint(network: nn.Module, layout: StateLayout, counts: tuple[MicroStep, MicroStep], accumulates: bool) -> Footprint:
    """The sizes that `memory_of` needs. `counts`: a micro-step with autocast's cache of cast weights, and one without."""
    everything = list(network.parameters())
    blocks = [list(block.parameters()) for block in named_blocks(network)]
    inside = {p for block in blocks for p in block}
    weights, trained = _both(everything)
    return Footprint(
        weights=weights,
        trained=trained,
        moments=sum(entry.size_bytes for entry in _optimizer_entries(network, layout)),
        block=max(map(_both, blocks), default=(0, 0)),
        outside_blocks=_both(p for p in everything if p not in inside),
        micro_step=counts[0],
        uncached=counts[1],
        accumulates=accumulates,
    )


def _both(parameters: Iterable[Tensor]) -> tuple[int, int]:
    """(bytes in fp32 of all parameters, of those that are trained)."""
    sizes = [(FP32_BYTES * p.numel(), p.requires_grad) for p in parameters]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def checkpoint_files(network: nn.Module, layout: StateLayout) -> list[int]:
    """Bytes of each safetensors file of a checkpoint; file f is written by rank f mod (number of processes)."""
    kept = [(name, tuple(p.shape)) for name, p in network.named_parameters() if is_kept(network, name)]
    model = [TensorEntry(name, shape, torch.float32, lambda _: None) for name, shape in kept]
    files, _ = files_of({"model": model + buffer_entries(network), "optimizer": _optimizer_entries(network, layout)})
    return [len(header_of(entries)) + sum(entry.size_bytes for entry in entries) for entries in files.values()]


def _optimizer_entries(network: nn.Module, layout: StateLayout) -> list[TensorEntry]:
    entries = []
    for name, _ in network.named_parameters():
        for key, form in sorted(layout.tensors.get(name, {}).items()):
            shape = tuple(size or 0 for size in form.shape)
            entries.append(TensorEntry(f"{key}.{name}", shape, form.dtype, lambda _: None))
    return entries


def save_buffers(files: Sequence[int], processes: int, pinned: bool) -> int:
    """The most bytes of host memory that one process needs to copy its files, of `files` bytes, for a save.

    torch rounds `pinned` (page-locked) blocks up to powers of two.
    """
    blocks = [1 << (size - 1).bit_length() if pinned else size for size in files]
    return max(sum(blocks[rank::processes]) for rank in range(processes))
