"""Facts about the machine: CPU cores, the GPU's peak FLOP/s, and the memory in use."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class Card(NamedTuple):
    """A model of GPU."""

    memory_gb: float
    flops: float | None
    """peak dense FLOP/s in bf16 (fp16 on cards without bf16); None: not known"""
    has_bf16: bool = True


# From NVIDIA's data sheets: FLOP/s of the tensor cores without sparsity, and the larger memory where a card comes in two sizes.
CARDS = {
    "H200": Card(141, 989e12),
    "H100 PCIe": Card(80, 756e12),
    "H100 NVL": Card(94, 835e12),
    "H100": Card(80, 989e12),
    "A100": Card(80, 312e12),
    "L40S": Card(48, 362e12),
    "L4": Card(24, 121e12),
    "A10": Card(24, 125e12),
    "RTX 4090": Card(24, 165e12),
    "RTX 3090": Card(24, 71e12),
    "V100": Card(32, 125e12, has_bf16=False),
    "T4": Card(16, 65e12, has_bf16=False),
}


def card_named(text: str) -> str | None:
    """The key of CARDS that a driver's or a user's name for a GPU means, or None. Compares whole words: an L40 is not an L4."""
    words = set(re.split(r"[^a-z0-9]+", text.lower()))
    return next((name for name in CARDS if set(name.lower().split()) - {"rtx"} <= words), None)


def cores() -> int:
    """Number of CPU cores that this process may use; on macOS, which has no affinity, of all cores."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of a GPU for training in bf16 or fp16; None for CPUs, fp32 and cards that CARDS lacks."""
    if device.type != "cuda" or precision == "no":
        return None
    import torch

    name = card_named(torch.cuda.get_device_name(device))
    return CARDS[name].flops if name else None


def sum_dtype(device: torch.device) -> torch.dtype:
    """The dtype for sums over many batches: float64, or float32 on Apple's GPUs, which have no float64."""
    import torch

    return torch.float32 if device.type == "mps" else torch.float64


def gpu_memory(device: torch.device) -> dict[str, float]:
    """GiB of GPU memory: `allocated` to tensors now, the `peak` of that, and `reserved` by torch. Empty for other devices."""
    if device.type != "cuda":
        return {}
    import torch

    sizes = {
        "allocated": torch.cuda.memory_allocated(device),
        "reserved": torch.cuda.memory_reserved(device),
        "peak": torch.cuda.max_memory_allocated(device),
    }
    return {name: size / 2**30 for name, size in sizes.items()}


def memory_text(device: torch.device) -> str:
    """Memory in GiB, as text: of the GPU now and at its peak, or the peak of this process."""
    memory = gpu_memory(device)
    if memory:
        return f"GPU memory {memory['allocated']:.2f} GiB, peak {memory['peak']:.2f} GiB"
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"process memory peak {peak / 2**30:.2f} GiB"
