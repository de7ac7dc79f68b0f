"""Random numbers as a function of what they are for: no generator state is ever saved."""

from __future__ import annotations

import hashlib

import torch


def hash32(*parts: object) -> int:
    """32 well-mixed bits of `parts`: CPU generators use no more, and sums like a*step+rank collide."""
    text = ",".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little")


def seed_generators(device: torch.device, seed: int, *parts: object) -> None:
    """Seed torch's generators from a hash: dropout needs no generator state in a checkpoint, evaluation cannot disturb it."""
    value = hash32(seed, *parts)
    torch.default_generator.manual_seed(value)  # torch.manual_seed takes a hundred times longer
    if device.type == "cuda":
        index = torch.cuda.current_device()  # on a line of its own: it is what fills `default_generators`
        torch.cuda.default_generators[index].manual_seed(value)
