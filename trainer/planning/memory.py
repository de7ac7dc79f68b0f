"""The memory of one process under each strategy, after Rajbhandari et al. 2020, section 3, with communication buffers.

As in the backends, weights, gradients and moments are fp32, under bf16 autocast too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

FP32_BYTES = 4
BUCKETS = {"reduce_bucket_size": 50_000_000, "stage3_max_live_parameters": 1_000_000_000}
"""the values in ds_configs/, in elements"""


@dataclass(frozen=True)
class MicroStep:
    """The peak memory, in bytes, and the work of a forward and backward pass of one process."""

    activations: int
    """the peak of all but weights and gradients: what is kept for the backward pass, and temporary tensors"""
    with_gradients: int
    """the peak of all but weights, if gradients are allocated while the backward pass frees activations"""
    flops: float
    """of matrix products and attention, those that are recomputed included"""


@dataclass(frozen=True)
class Footprint:
    """The sizes of a network that decide its memory, in bytes of one unsharded copy."""

    weights: int
    trained: int
    """those of the weights that have a gradient"""
    moments: int
    """all state of the optimizer"""
    block: tuple[int, int]
    """weights of the largest block, which FSDP gathers as one, and those of them that are trained"""
    outside_blocks: tuple[int, int]
    """weights that lie in no block, and those of them that are trained"""
    micro_step: MicroStep
    uncached: MicroStep
    """`micro_step` where autocast keeps no casts of the weights, as under FSDP"""
    accumulates: bool
    """whether a step has several micro-steps"""


@dataclass(frozen=True)
class Strategy:
    """How a launch spreads a model over its processes."""

    name: str
    kind: Literal["plain", "zero", "fsdp"]
    processes: int
    shards: int
    """how many processes share one copy of what is sharded"""
    stage: int = 0
    """ZeRO's stage"""
    offload: frozenset[str] = frozenset()
    """what is kept in host memory: "weights", "moments" (which includes ZeRO's gradients and master weights)"""
    stays_gathered: bool = False
    """FSDP keeps a block's weights between forward and backward"""
    half: bool = False
    """ZeRO's weights and gradients are fp16 or bf16, with fp32 master weights beside them"""
    buckets: Mapping[str, int] = field(default_factory=lambda: BUCKETS, hash=False)


@dataclass(frozen=True)
class Memory:
    """Bytes of one process: `host` in host memory, all others on its device, which on a CPU is the same memory."""

    weights: float
    gradients: float
    moments: float
    buffers: float
    """of communication: gathered weights, buckets of gradients"""
    activations: float
    host: float = 0.0

    @property
    def device(self) -> float:
        """All bytes on the device."""
        return self.weights + self.gradients + self.moments + self.buffers + self.activations


def strategies(processes: int) -> list[Strategy]:
    """The strategies to compare for so many processes, the plainest first."""
    sharded = partial(Strategy, processes=processes, shards=processes)
    everything = frozenset({"weights", "moments"})
    offloaded = [
        sharded("ZeRO-3, offload", "zero", stage=3, offload=everything),
        sharded("FSDP2, offload", "fsdp", offload=everything),
    ]
    if processes == 1:
        return [Strategy("one process", "plain", 1, 1), *offloaded]
    zeros = [sharded(f"ZeRO-{stage}", "zero", stage=stage) for stage in (1, 2, 3)]
    hsdp = [Strategy("HSDP, 2 replicas", "fsdp", processes, processes // 2)] if processes > 2 and processes % 2 == 0 else []
    return [Strategy("DDP", "plain", processes, 1), *zeros, *hsdp, sharded("FSDP2", "fsdp"), *offloaded]


def memory_of(strategy: Strategy, net: Footprint) -> Memory:
    """What one process holds at the peak of a step."""
    return {"plain": _plain, "zero": _zero, "fsdp": _fsdp}[strategy.kind](strategy, net)


def _plain(strategy: Strategy, net: Footprint) -> Memory:
    """One process, or DDP, whose gradients are views of buckets that it keeps from step to step."""
    gradients = net.trained if strategy.processes > 1 else _gradients(net, net.micro_step, 1)
    return Memory(net.weights, gradients, net.moments, 0, net.micro_step.activations)


def _gradients(net: Footprint, count: MicroStep, share: float) -> float:
    """Bytes that `share` of the gradients add to the activations at the peak.

    Allocated in each backward pass while it frees activations, they add less than their size, unless they accumulate.
    """
    if net.accumulates:
        return share * net.trained
    highest = count.activations + share * (count.with_gradients - count.activations)
    return max(highest, share * net.trained) - count.activations


def _zero(strategy: Strategy, net: Footprint) -> Memory:
    """ZeRO, where each process also has an fp32 master copy of its share of the trained weights."""
    share, part = 1 / strategy.shards, 0.5 if strategy.half else 1.0
    weights = part * net.weights * (share if strategy.stage == 3 else 1)
    # Stage 3 keeps a buffer for its share of the gradients; stages 1 and 2 free gradients after each step.
    gradients = part * (
        net.trained * share if strategy.stage == 3 else _gradients(net, net.micro_step, 1 if strategy.stage == 1 else share)
    )
    master, moments = net.trained * share, net.moments * share
    # Two buckets: one is filled while the other is sent.
    buffers = part * 2 * min(FP32_BYTES * strategy.buckets["reduce_bucket_size"], net.trained)
    if strategy.stage == 3:
        buffers += part * min(FP32_BYTES * strategy.buckets["stage3_max_live_parameters"], net.weights)
    host = 0.0
    if "moments" in strategy.offload:
        host += master + moments + gradients
        master = moments = gradients = 0.0
    if "weights" in strategy.offload:
        host += weights
        weights = 0.0
    return Memory(weights + master, gradients, moments, buffers, net.micro_step.activations, host)


def _fsdp(strategy: Strategy, net: Footprint) -> Memory:
    """FSDP2. At the peak the weights of two blocks (one is prefetched) and of all that is outside blocks are gathered, and the
    gradients of as much are unsharded. Gradients that accumulate are unsharded, all of them, until the last micro-step."""
    share = 1 / strategy.shards
    weights, moments, host, buffers = net.weights * share, net.moments * share, 0.0, 0.0
    gradients = net.trained if net.accumulates else _gradients(net, net.uncached, share)
    if strategy.offload:
        host = weights + net.trained * share + moments
        weights = moments = 0.0
        gradients = net.trained if net.accumulates else 0.0
    if strategy.shards > 1 or strategy.offload:
        blocks = net.weights - net.outside_blocks[0] if strategy.stays_gathered else 2 * net.block[0]
        new_gradients = 0 if net.accumulates else net.outside_blocks[1] + net.block[1]
        buffers = net.outside_blocks[0] + blocks + new_gradients + net.block[1]
    return Memory(weights, gradients, moments, buffers, net.uncached.activations, host)
