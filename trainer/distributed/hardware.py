"""What the machine can do: cores, the peak of its GPU, and memory in use."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Dense bf16/fp16 tensor-core peaks, FLOP/s, from NVIDIA's data sheets (without sparsity).
_PEAK_16_BIT = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}


def cores() -> int:
    """CPU cores that this process may use (macOS does not tell: all there are)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of one GPU in the precision trained in; None where it is not known (CPUs, fp32, other cards)."""
    if device.type != "cuda" or precision == "no":
        return None
    import torch

    name = torch.cuda.get_device_name(device)
    return next((peak for card, peak in _PEAK_16_BIT.items() if re.search(rf"\b{card}\b", name)), None)


def sum_dtype(device: torch.device) -> torch.dtype:
    """What sums over many batches are kept in on a device: float64, which Apple's GPUs lack."""
    import torch

    return torch.float32 if device.type == "mps" else torch.float64


def gpu_memory(device: torch.device) -> dict[str, float]:
    """GiB of the GPU's memory: in tensors now and at most so far, and reserved for them. Empty without a GPU."""
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
    """Memory in use and at its highest, in GiB: of the GPU, or of this process."""
    memory = gpu_memory(device)
    if memory:
        return f"GPU memory {memory['allocated']:.2f} GiB, peak {memory['peak']:.2f} GiB"
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"process memory peak {peak / 2**30:.2f} GiB"
