"""FSDP2: weights, gradients and moments are sharded along their first dimension, and a block is gathered while it computes.

The settings are those of Accelerate's launcher and plugin. torch's `fully_shard` is called directly, because Accelerate would
turn FSDP into DDP on CPUs. HSDP, for which a `parallelism_config` asks, keeps several replicas of the shards.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from trainer.backends import tensors
from trainer.backends.blocks import blocks, check_dimensions, named_blocks, tie_across
from trainer.backends.torch_backend import TorchBackend
from trainer.command_line.sections import Optimisation
from trainer.distributed.launch import DDP, Launch, switched_on
from trainer.errors import UserError, path_of
from trainer.initial_weights import Weights, replace_tensors

FSDP = "accelerate_configs/fsdp.yaml"
HSDP = "accelerate_configs/hsdp.yaml"


class FsdpBackend(TorchBackend):
    """Parameters are DTensors, under the names of the bare network."""

    def __init__(self, launch: Launch, precision: str, precision_flag: str, settings: Optimisation) -> None:
        super().__init__(launch, precision, precision_flag, settings)
        check_environment(os.environ)
        if precision == "fp16":
            raise UserError(f"mixed_precision fp16 is not for FSDP: use bf16 or no, or {path_of(DDP)}")
        self.mesh = device_mesh(os.environ, launch)

    @staticmethod
    def requested(environ: Mapping[str, str]) -> bool:
        """By the variable that Accelerate's launcher sets."""
        return switched_on(environ, "ACCELERATE_USE_FSDP")

    @staticmethod
    def before_connect(on_cpu: bool) -> None:
        """Turn off what the launcher turns on by default: transformers would load pretrained weights on rank 0 alone."""
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"

    @staticmethod
    def fill_for_evaluation(objective: nn.Module, weights: Weights, launch: Launch) -> None:
        """Sharded: a block is gathered while it computes."""
        check_environment(os.environ)
        shard_for_evaluation(objective, weights, device_mesh(os.environ, launch))

    @property
    def name(self) -> str:
        """As it is printed at start."""
        replicas = f" ({self.mesh.shape[0]} replicas x {self.mesh.shape[1]} shards)" if self.mesh.ndim == 2 else ""
        return ("HSDP" if replicas else "FSDP2") + replicas

    def prepare(
        self,
        objective: nn.Module,
        network: nn.Module,
        make_optimizer: Callable[[], Optimizer],
        weights: Weights | None = None,
    ) -> None:
        """Shard each block, then what is outside the blocks; the optimizer is made for the sharded parameters."""
        from accelerate import FullyShardedDataParallelPlugin
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

        check_dimensions(network)
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
        offload = switched_on(os.environ, "FSDP_OFFLOAD_PARAMS")
        policy = CPUOffloadPolicy(pin_memory=self.launch.device.type == "cuda") if offload else OffloadPolicy()
        if self.precision == "bf16":
            # Autocast over fp32 weights, as under DDP, for the same numbers. Its cache would keep a bf16 copy of all weights.
            autocast = torch.autocast(self.launch.device.type, torch.bfloat16, cache_enabled=False)
            objective.forward = autocast(objective.forward)
        found = blocks(network)  # by their classes, which `fully_shard` changes
        self.names_no_blocks = not found
        for block in found:
            fully_shard(block, mesh=self.mesh, reshard_after_forward=plugin.reshard_after_forward, offload_policy=policy)
        # Its weights are needed last in the forward and first in the backward: torch keeps them gathered in between.
        self.model = fully_shard(objective, mesh=self.mesh, offload_policy=policy)
        if weights is not None:
            allocate(objective, "cpu" if offload else self.launch.device, self.launch.device)
            fill_shards(network, weights)
        optimizer = make_optimizer()
        if getattr(optimizer, "needs_whole_matrices", False):
            raise UserError(
                f"optimizer {type(optimizer).__name__} needs whole matrices, and FSDP cuts them; use adamw, or {path_of(DDP)}"
            )
        if isinstance(optimizer, torch.optim.SGD):  # torch 2.13 has no fused SGD for DTensors
            for group in optimizer.param_groups:
                group |= {"fused": False, "foreach": True}
        self.use(network, optimizer)

    def compile(self, objective: nn.Module, mode: str) -> None:
        """Block by block: the hooks that gather weights run between blocks and would break one graph of the whole."""
        for block in blocks(objective.network) or [objective.network]:  # type: ignore[arg-type,list-item]
            block.compile(mode=mode)

    def notes(self) -> list[str]:
        """A line where the network names no blocks, so that FSDP has to gather all of it at once."""
        whole = f"FSDP gathers all of {type(self.network).__name__} at once: it names no blocks in _no_split_modules"
        return [whole] if self.names_no_blocks else []

    def release(self) -> None:
        """Also frees blocks that an evaluation has left gathered."""
        self._reshard()
        super().release()

    def swap_averages(self) -> None:
        """In this process's shards. Blocks that are still gathered would keep the values of before: they are freed first."""
        self._reshard()
        super().swap_averages()

    def _reshard(self) -> None:
        from torch.distributed.fsdp import FSDPModule

        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @contextlib.contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        """Gradients are reduced with the last micro-batch only; until then each process keeps its own, unsharded."""
        self.model.set_requires_gradient_sync(last)
        yield


def shard_for_evaluation(objective: nn.Module, weights: Weights, mesh: DeviceMesh) -> None:
    """Shard the network of an objective, which is on the meta device, over a mesh, and fill it. For forward passes alone, of
    which every process does as many.

    Works for any network: as one block where blocks are tied, and with scalar parameters whole on every process.
    """
    from torch.distributed.fsdp import fully_shard

    network: nn.Module = objective.network  # type: ignore[assignment]
    found = named_blocks(network)
    for module in [*([] if tie_across(network, found) else found), objective]:
        fully_shard(module, mesh=mesh, ignored_params={p for p in network.parameters() if not p.ndim})
    network.to_empty(device=mesh.device_type)
    fill_shards(network, weights)


def allocate(objective: nn.Module, for_parameters: torch.device | str, for_buffers: torch.device | str) -> None:
    """Allocate the tensors of an objective that is on the meta device, parameters and buffers each on their device."""
    objective.to_empty(device=for_parameters)
    replace_tensors(objective, lambda _, tensor: tensor if isinstance(tensor, nn.Parameter) else tensor.to(for_buffers))


@torch.no_grad()
def fill_shards(network: nn.Module, weights: Weights) -> None:
    """Fill parameters (this process's rows of each) and buffers, one at a time."""
    for name, p in network.named_parameters():
        if isinstance(p, DTensor):
            p.to_local().copy_(weights(name, tensors.own_rows(p, len(p))))
        else:
            p.copy_(weights(name))
    for name, buffer in network.named_buffers():
        buffer.copy_(weights(name))


def check_environment(environ: Mapping[str, str]) -> None:
    """UserError for FSDP settings of the launcher that this backend does not follow, with what to use instead."""
    ways = {
        "FSDP_ACTIVATION_CHECKPOINTING": "use --gradient_checkpointing",
        "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "use --gradient_checkpointing",
        "FSDP_FORWARD_PREFETCH": "leave it out: FSDP2 gathers the next block by itself",
    }
    for name, way in ways.items():
        if switched_on(environ, name):
            raise UserError(f"the launcher sets {name.lower()}: {way}")
    if environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise UserError("the launcher sets dynamo_backend: use --compile")
    if environ.get("FSDP_VERSION", "1") != "2":
        raise UserError(f"the launcher asks for FSDP version {environ.get('FSDP_VERSION', '1')}; use {path_of(FSDP)}")
    strategy = environ.get("FSDP_SHARDING_STRATEGY", "").upper()
    if strategy not in ("", "1", "FULL_SHARD"):
        raise UserError(
            f"the launcher sets fsdp_sharding_strategy {strategy}, which FSDP version 2 does not know; leave it out: "
            f"fsdp_reshard_after_forward false is SHARD_GRAD_OP, {path_of(HSDP)} HYBRID_SHARD, {path_of(DDP)} NO_SHARD"
        )
    if environ.get("FSDP_IGNORED_MODULES"):
        raise UserError("the launcher sets fsdp_ignored_modules, whose gradients nobody would reduce; leave it out")
    if environ.get("FSDP_AUTO_WRAP_POLICY", "").upper() == "SIZE_BASED_WRAP":
        raise UserError("the launcher sets fsdp_auto_wrap_policy SIZE_BASED_WRAP; use TRANSFORMER_BASED_WRAP: blocks are known")


def mesh_sizes(environ: Mapping[str, str], processes: int) -> tuple[int, int]:
    """(replicas, shards of each) from Accelerate's `parallelism_config`. UserError unless their product is `processes`."""
    replicas, shards = 1, processes
    if switched_on(environ, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        replicas, shards = (int(environ.get(f"PARALLELISM_CONFIG_DP_{part}_SIZE") or 1) for part in ("REPLICATE", "SHARD"))
    if replicas * shards != processes:
        raise UserError(
            f"dp_replicate_size {replicas} x dp_shard_size {shards} is not {processes} processes; set both in the "
            "parallelism_config of the --config_file, or by --parallelism_config_dp_replicate_size and ..._dp_shard_size"
        )
    return replicas, shards


def device_mesh(environ: Mapping[str, str], launch: Launch) -> DeviceMesh:
    """A mesh of all processes: (shard,), or (replicate, shard) for HSDP."""
    kind, (replicas, shards) = launch.device.type, mesh_sizes(environ, launch.processes)
    if replicas == 1:
        return init_device_mesh(kind, (shards,), mesh_dim_names=("shard",))
    mesh = init_device_mesh(kind, (replicas, shards), mesh_dim_names=("replicate", "shard"))
    for group in mesh.get_all_groups():  # made with torch's default time-out, ten minutes with NCCL
        _set_pg_timeout(launch.control.timeout, group)
    return mesh
