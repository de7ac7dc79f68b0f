"""Memory of each process by the way a model is spread: ZeRO's sums (Rajbhandari et al. 2020, section 3) in fp32, buffers too.

The numbers are of the backends as they are: weights, gradients and moments in fp32, also under bf16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

FP32_BYTES = 4
BUCKETS = {"reduce_bucket_size": 50_000_000, "stage3_max_live_parameters": 1_000_000_000}
"""of ds_configs/, in numbers of fp32"""


@dataclass(frozen=True)
class MicroStep:
    """A forward and backward pass of one process. Bytes at their highest, and work."""

    activations: int
    """beside weights and gradients: what is kept for the backward pass, and what lives for a moment"""
    with_gradients: int
    """beside weights, where the gradients come as the activations go"""
    flops: float
    """of matrix products and attention; what is recomputed is counted again"""


@dataclass(frozen=True)
class Footprint:
    """What of a network decides memory, in bytes of one whole copy."""

    weights: int
    trained: int
    """weights that have a gradient"""
    moments: int
    """all that the optimizer keeps"""
    block: tuple[int, int]
    """weights of the largest block that FSDP gathers at a time, and those of them that are trained"""
    around: tuple[int, int]
    """likewise of all that lies in no block"""
    micro_step: MicroStep
    uncached: MicroStep
    """likewise, where autocast keeps nothing: under FSDP"""
    accumulates: bool
    """several micro-steps in a step"""


@dataclass(frozen=True)
class Way:
    """A way to spread a model over processes."""

    name: str
    kind: str
    """plain, zero or fsdp"""
    processes: int
    shards: int
    """processes that hold one copy together, of what is cut"""
    stage: int = 0
    """of ZeRO"""
    offload: frozenset[str] = frozenset()
    """what lies in host memory: weights, moments (with gradients and master weights)"""
    stays_gathered: bool = False
    """FSDP keeps a block's weights between forward and backward"""
    half: bool = False
    """ZeRO's weights and gradients are fp16 or bf16, beside fp32 master weights"""
    buckets: Mapping[str, int] = field(default_factory=lambda: BUCKETS, hash=False)


@dataclass(frozen=True)
class Memory:
    """Bytes of a process: on its device, and in host memory (`host`; of a run on CPUs that is one)."""

    weights: float
    gradients: float
    moments: float
    buffers: float
    """what gathers and sends"""
    activations: float
    host: float = 0.0

    @property
    def device(self) -> float:
        """All that lies on the device."""
        return self.weights + self.gradients + self.moments + self.buffers + self.activations


def ways(processes: int) -> list[Way]:
    """Those to compare, the plainest first."""
    offloaded = frozenset({"weights", "moments"})
    zero3 = Way("ZeRO-3", "zero", processes, processes, 3)
    fsdp = Way("FSDP2", "fsdp", processes, processes)
    at_once = [
        Way("ZeRO-3, offload", "zero", processes, processes, 3, offloaded),
        Way("FSDP2, offload", "fsdp", processes, processes, offload=offloaded),
    ]
    if processes == 1:
        return [Way("one process", "plain", 1, 1), *at_once]
    hsdp = [Way("HSDP, 2 replicas", "fsdp", processes, processes // 2)] if processes > 2 and processes % 2 == 0 else []
    zeros = [Way(f"ZeRO-{stage}", "zero", processes, processes, stage) for stage in (1, 2)]
    return [Way("DDP", "plain", processes, 1), *zeros, zero3, *hsdp, fsdp, *at_once]


def memory_of(way: Way, net: Footprint) -> Memory:
    """What each process holds at the highest moment of a step."""
    return {"plain": _plain, "zero": _zero, "fsdp": _fsdp}[way.kind](way, net)


def _plain(way: Way, net: Footprint) -> Memory:
    """DDP keeps its buckets, which gradients are views of."""
    gradients = net.trained if way.processes > 1 else _gradients(net, net.micro_step, 1)
    return Memory(net.weights, gradients, net.moments, 0, net.micro_step.activations)


def _gradients(net: Footprint, count: MicroStep, share: float) -> float:
    """What a share of the gradients adds to the highest moment: new in each step, they come as activations of the last go."""
    if net.accumulates:
        return share * net.trained
    highest = count.activations + share * (count.with_gradients - count.activations)
    return max(highest, share * net.trained) - count.activations


def _zero(way: Way, net: Footprint) -> Memory:
    """Beside the weights each process has an fp32 master copy of its share of those that are trained."""
    share, part = 1 / way.shards, 0.5 if way.half else 1.0
    weights = part * net.weights * (share if way.stage == 3 else 1)
    # Stage 3 keeps a buffer for its share; the others let go of gradients with the step.
    gradients = part * (
        net.trained * share if way.stage == 3 else _gradients(net, net.micro_step, 1 if way.stage == 1 else share)
    )
    master, moments = net.trained * share, net.moments * share
    # Two buckets, one filled while the other is sent.
    buffers = part * 2 * min(FP32_BYTES * way.buckets["reduce_bucket_size"], net.trained)
    if way.stage == 3:
        buffers += part * min(FP32_BYTES * way.buckets["stage3_max_live_parameters"], net.weights)
    host = 0.0
    if "moments" in way.offload:
        host += master + moments + gradients
        master = moments = gradients = 0.0
    if "weights" in way.offload:
        host += weights
        weights = 0.0
    return Memory(weights + master, gradients, moments, buffers, net.micro_step.activations, host)


def _fsdp(way: Way, net: Footprint) -> Memory:
    """Gathered are what lies in no block, from the forward on, and two blocks, one of them for later; of their gradients as
    much until it is sent. Until the last micro-step of several, gradients are kept whole."""
    share = 1 / way.shards
    weights, moments, host, buffers = net.weights * share, net.moments * share, 0.0, 0.0
    gradients = net.trained if net.accumulates else _gradients(net, net.uncached, share)
    if way.offload:
        host = weights + net.trained * share + moments
        weights = moments = 0.0
        gradients = net.trained if net.accumulates else 0.0
    if way.shards > 1 or way.offload:
        blocks = net.weights - net.around[0] if way.stays_gathered else 2 * net.block[0]
        buffers = net.around[0] + blocks + (0 if net.accumulates else net.around[1] + net.block[1]) + net.block[1]
    return Memory(weights, gradients, moments, buffers, net.uncached.activations, host)
