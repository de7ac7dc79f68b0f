"""Seeds that are hashes of what they are for (seed, step, rank), so that no generator state is ever saved."""

from __future__ import annotations

import hashlib

import torch


def hash32(*parts: object) -> int:
    """A 32-bit hash of `parts`. CPU generators use no more bits, and a sum such as a * step + rank would collide."""
    text = ",".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little")


def seed_generators(device: torch.device, seed: int, *parts: object) -> None:
    """Seed torch's generators (CPU, and GPU if `device` is one) from a hash of `seed` and `parts`."""
    value = hash32(seed, *parts)
    torch.default_generator.manual_seed(value)  # torch.manual_seed takes a hundred times longer
    if device.type == "cuda":
        index = torch.cuda.current_device()  # on a line of its own: it is what fills `default_generators`
        torch.cuda.default_generators[index].manual_seed(value)
