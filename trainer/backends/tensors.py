"""The tensors of a checkpoint by name, whatever backend holds them.

Parameters have their names in the bare network. Optimizer state is called `{key}.{parameter}` (`exp_avg.blocks.0.weight`), and
a count that all parameters share just `{key}` (`step`). Which keys there are is read from the optimizer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from trainer.errors import UserError
from trainer.initial_weights import ALL_ROWS

TRIAL_SIZES = (2, 3, 5, 7, 11, 13)
"""sizes of a trial parameter's dimensions: all different, so that a dimension of its state is known by its size"""
WHOLE = "parameters are flattened and cut here, so use another optimizer, or DDP"


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a checkpoint, and how to read it.

    `read(writer)` is collective: every process calls it, for all entries in the same order. It returns the whole tensor, on any
    device, on rank `writer` (the live tensor, not a copy, where it is whole anyway); what it returns elsewhere means nothing.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    """in the file; `read` may return another"""
    read: Callable[[int], Tensor | None]

    @property
    def size_bytes(self) -> int:
        """Bytes it takes in a file."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class TensorForm:
    """Shape and dtype that a tensor of a checkpoint should have; None for a size that may be anything."""

    shape: tuple[int | None, ...]
    dtype: torch.dtype

    def fits(self, shape: Sequence[int], dtype: torch.dtype | None) -> bool:
        """Whether a tensor of this shape and dtype has this form."""
        pairs = zip(self.shape, shape, strict=False)
        return dtype == self.dtype and len(shape) == len(self.shape) and all(mine in (None, size) for mine, size in pairs)


@dataclass(frozen=True)
class StateLayout:
    """The state that an optimizer keeps after its first step."""

    optimizer: str
    """name of its class"""
    tensors: Mapping[str, Mapping[str, TensorForm]]
    """{trained parameter: {key: form}} of tensors, such as moments"""
    counts: Mapping[str, Mapping[str, TensorForm]]
    """{trained parameter: {key: form}} of counts, such as `step`"""


class TensorSource(Protocol):
    """Where saved tensors are read from: a checkpoint."""

    def names(self, stem: str) -> set[str]:
        """Names of the tensors of `stem`: `model` or `optimizer`."""

    def form(self, stem: str, name: str) -> tuple[tuple[int, ...], torch.dtype | None]:
        """Shape and dtype of a tensor; None for a dtype that no checkpoint has."""

    def tensor(self, stem: str, name: str, *, rows: slice = ALL_ROWS) -> Tensor:
        """One tensor on the host, or some rows of it (indices of its first dimension)."""


def whole_entry(name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> TensorEntry:
    """The entry of a DTensor, or of a tensor that is whole on this process. `dtype`: in the file (default: its own)."""
    read = partial(gathered, tensor) if isinstance(tensor, DTensor) else lambda _: tensor
    return TensorEntry(name, tuple(tensor.shape), dtype or tensor.dtype, read)


def gathered(tensor: DTensor, writer: int) -> Tensor | None:
    """A DTensor, which may be sharded along one dimension, whole on rank `writer`; elsewhere it may be None. Collective.

    The shards come from the writer's own group of ranks: under HSDP other replicas take no part.
    """
    mesh, local = tensor.device_mesh, tensor.to_local().detach()
    cut = next((i for i, placement in enumerate(tensor.placements) if placement.is_shard()), None)
    if cut is None:
        return local
    group, dim = mesh.get_group(cut), tensor.placements[cut].dim  # type: ignore[attr-defined]
    if writer not in dist.get_process_group_ranks(group):
        return None
    part = local.movedim(dim, 0).to(mesh.device_type).contiguous()
    size, parts = tensor.shape[dim], mesh.size(cut)
    most = -(-size // parts)
    if len(part) < most:  # torch.chunk leaves the last shards smaller, or empty
        part = torch.cat([part, part.new_zeros(most - len(part), *part.shape[1:])])
    whole = part.new_empty(parts * most, *part.shape[1:]) if dist.get_rank() == writer else None
    dist.gather(part, None if whole is None else list(whole.split(most)), dst=writer, group=group)
    return None if whole is None else whole[:size].movedim(0, dim)


def own_rows(p: DTensor, rows: int) -> slice:
    """Which of `rows` rows this process holds of a tensor that is sharded like `p`: as `torch.chunk` cuts them."""
    dimension = p.placements.index(Shard(0))  # of the mesh, whose first one is that of replicas under HSDP
    size = -(-rows // p.device_mesh.size(dimension))
    start = size * p.device_mesh.get_local_rank(dimension)
    return slice(min(start, rows), min(start + size, rows))


def restored_like(p: Tensor, saved: TensorSource, name: str) -> Tensor:
    """A saved optimizer tensor on the device of `p`, and sharded as `p` is: a process reads only the rows that it will hold."""
    if not isinstance(p, DTensor):
        return saved.tensor("optimizer", name).to(p.device)
    shape, _ = saved.form("optimizer", name)
    own = saved.tensor("optimizer", name, rows=own_rows(p, shape[0])).to(p.device)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(own, p.device_mesh, p.placements, run_check=False, shape=torch.Size(shape), stride=stride)


def whole_entries(tensors: Mapping[str, Tensor]) -> list[TensorEntry]:
    """Entries for tensors that are whole on this process, as they are."""
    return [whole_entry(name, tensor) for name, tensor in tensors.items()]


def saved_buffers(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers a state_dict holds (not the ones registered with persistent=False)."""
    kept = network.state_dict(keep_vars=True)
    return ((name, buffer) for name, buffer in network.named_buffers() if name in kept)


def buffer_entries(network: nn.Module) -> list[TensorEntry]:
    """Buffers as a checkpoint keeps them: floating-point ones as fp32."""
    return [whole_entry(name, b, torch.float32 if b.is_floating_point() else b.dtype) for name, b in saved_buffers(network)]


def count_keys(states: Mapping[Any, Mapping[str, Any]]) -> set[str]:
    """The keys of an optimizer's state {parameter: {key: value}} whose values are counts: numbers, or tensors of one number."""
    numbers = {
        key
        for parameter, state in states.items()
        for key, value in state.items()
        if not isinstance(value, Tensor) or (value.ndim == 0 and parameter.ndim > 0)
    }
    return numbers | {"step"}  # named here, as the moments of a scalar parameter look just like it


def state_entries(parameter_name: str, state: Mapping[str, Any], counts: set[str]) -> list[TensorEntry]:
    """Entries for the tensors that an optimizer keeps for a parameter: floats as fp32, integers as they are."""
    return [
        whole_entry(f"{key}.{parameter_name}", value, torch.float32 if value.is_floating_point() else value.dtype)
        for key, value in sorted(state.items())
        if key not in counts and value is not None
    ]


def count_entries(states: Iterable[Mapping[str, Any]], counts: set[str]) -> list[TensorEntry]:
    """One entry for each count: the counts of all parameters advance together.

    Only those of a parameter that is not always used lag behind, so they are taken from the first one with the most steps. A
    tensor is saved as fp32 and a Python number in 64 bits, by which `restored_count` tells them apart.
    """
    ahead = max(states, key=lambda state: sum(float(state[key]) for key in counts if key in state), default={})
    tensors = {key: value for key, value in sorted(ahead.items()) if key in counts}
    return [
        whole_entry(key, torch.tensor(float(value)) if isinstance(value, Tensor) else _number(value))
        for key, value in tensors.items()
    ]


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)


def restored_count(tensor: Tensor, device: torch.device) -> Any:
    """A count as the optimizer keeps it, from its saved tensor (see `count_entries`)."""
    return tensor.to(device) if tensor.dtype == torch.float32 else tensor.item()


def split_names(names: Iterable[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Split names of optimizer tensors into ({parameter: its sorted keys}, [keys of counts])."""
    keys_of: dict[str, list[str]] = defaultdict(list)
    counts = []
    for name in sorted(names):
        key, dot, parameter = name.partition(".")
        if dot:
            keys_of[parameter].append(key)
        else:
            counts.append(key)
    return keys_of, counts


def trial_state(optimizer: Optimizer, group: int, dimensions: int, like: Tensor) -> dict[str, Any]:
    """{key: value} that `optimizer` keeps for a parameter of a group after one step with a gradient of 0.

    A copy of the optimizer takes the step, on a small parameter made for it with so many dimensions (`TRIAL_SIZES`).
    """
    copy: Any = object.__new__(type(optimizer))
    copy.__dict__.update(optimizer.__dict__)
    parameter = nn.Parameter(torch.zeros(TRIAL_SIZES[: max(1, dimensions)], device=like.device, dtype=like.dtype))
    parameter.grad = torch.zeros_like(parameter)
    copy.state, copy.param_groups = defaultdict(dict), [{**optimizer.param_groups[group], "params": [parameter]}]
    copy.step()
    return {key: value for key, value in copy.state[parameter].items() if value is not None}


def state_layout(optimizer: Optimizer, network: nn.Module) -> StateLayout:
    """What `optimizer` will keep for each parameter of `network`: found by a trial step per group and number of dimensions."""
    names = {p: name for name, p in network.named_parameters()}
    tensors: dict[str, dict[str, TensorForm]] = {}
    counts: dict[str, dict[str, TensorForm]] = {}
    for number, group in enumerate(optimizer.param_groups):
        trials: dict[int, dict[str, Any]] = {}
        for p in group["params"]:
            shape = whole_shape(p)
            if len(shape) not in trials:
                trials[len(shape)] = trial_state(optimizer, number, len(shape), p)
            state = trials[len(shape)]
            keys_of_counts = count_keys({torch.empty(1): state})
            tensors[names[p]] = {
                key: TensorForm(_shape_like(value.shape, shape), torch.float32 if value.is_floating_point() else value.dtype)
                for key, value in state.items()
                if key not in keys_of_counts
            }
            counts[names[p]] = {e.name: TensorForm((), e.dtype) for e in count_entries([state], keys_of_counts)}
    return StateLayout(type(optimizer).__name__, tensors, counts)


def _shape_like(trial: Sequence[int], shape: Sequence[int]) -> tuple[int | None, ...]:
    """The shape of a state tensor of a parameter of shape `shape`, from its shape in the trial; None where it does not tell."""
    size_of = {1: 1} | dict(zip(TRIAL_SIZES, shape, strict=False))
    return tuple(size_of.get(size) for size in trial) if shape else ()


def whole_shape(p: Any) -> tuple[int, ...]:
    """Full shape of a parameter, also where ZeRO-3 has partitioned it."""
    return tuple(getattr(p, "ds_shape", p.shape))


def elementwise_initial_state(optimizer: Optimizer, like: Tensor) -> dict[str, Any]:
    """{key: initial state} for backends that flatten and cut parameters: two zeros for a moment, 0 for a count.

    UserError for an optimizer whose state does not start at zero, or depends on the shape of its parameter.
    """
    name = type(optimizer).__name__
    try:
        state, of_a_matrix = (trial_state(optimizer, 0, dimensions, like) for dimensions in (1, 2))
    except Exception as error:
        raise UserError(
            f"optimizer {name} cannot be sharded: {type(error).__name__} in a trial step ({error}); {WHOLE}"
        ) from error
    for key, value in state.items():
        is_count = not isinstance(value, Tensor) or value.ndim == 0
        if key not in of_a_matrix or (not is_count and value.shape != (2,)):
            raise UserError(f"optimizer {name} keeps a {key} that depends on the shape of a parameter; {WHOLE}")
        if (is_count and float(value) != 1) or (not is_count and bool(value.any())):
            raise UserError(f"optimizer {name} keeps a {key} that does not start at 0; {WHOLE}")
    if set(of_a_matrix) != set(state):
        raise UserError(f"optimizer {name} treats matrices otherwise than vectors; {WHOLE}")
    return {key: torch.zeros_like(v) if isinstance(v, Tensor) else type(v)(0) for key, v in state.items()}
