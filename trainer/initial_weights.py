"""Initial weights, each drawn from (run seed, its name), one at a time and in any order.

`build_empty` builds a network as its author wrote it, but on fake tensors, which have shapes and no memory, and records the
calls on them. The values of a parameter or buffer come from replaying the calls that lead to it. So a process holds one whole
tensor at a time, and every process, under any launch, draws the same bits without the others.
"""

from __future__ import annotations

import contextlib
import copy
import heapq
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from trainer.data.seeding import hash32, seed_generators
from trainer.errors import UserError

OVERWRITE = ("normal_", "uniform_", "fill_", "zero_", "copy_")
"""in-place operations that overwrite a tensor without reading it, so that no earlier call on it matters"""


ALL_ROWS = slice(None)


class Weights(Protocol):
    """Reads values for a network's parameters and buffers by name: its initial ones, or those of a checkpoint."""

    def __call__(self, name: str, rows: slice = ALL_ROWS) -> Tensor:
        """A tensor on the host, or some rows of it (indices of its first dimension)."""


class _Call(NamedTuple):
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    result: Any
    reads: set[int]
    """ids (`_memory`) of the storages that it reads"""
    writes: set[int]
    """ids of the storages that it writes"""


class InitialWeights:
    """Replays the recorded `calls` for the parameters and buffers of a network, `tensors` by name."""

    def __init__(self, calls: list[_Call], tensors: Mapping[str, Tensor], seed: int) -> None:
        self._calls, self._tensors, self._seed = calls, tensors, seed
        self._writers: dict[int, list[int]] = defaultdict(list)
        """{storage: numbers of the calls that write to it}"""
        for number, call in enumerate(calls):
            for memory in call.writes:
                self._writers[memory].append(number)
        self._owners = {_memory(tensor): name for name, tensor in tensors.items()}

    def owner(self, name: str) -> str:
        """The last name among the tensors with the same storage: `name` itself, unless one is a view of another."""
        return self._owners[_memory(self._tensors[name])]

    def __call__(self, name: str, rows: slice = ALL_ROWS) -> Tensor:
        """See `Weights`. Computes the whole tensor, whatever `rows`, and seeds torch's CPU generator.

        A parameter that is copied from another one of the network gets that one's random numbers. What was drawn for no
        parameter of the network (a layer that was copied several times) is drawn anew for each copy.
        """
        needed = self._calls_behind(_memory(self._tensors[name]))
        if not needed and self._tensors[name].numel():
            raise UserError(f"{name} has no initial value: whoever builds the network leaves it empty; fill it there")
        memories: dict[int, Tensor] = {}
        draws: Counter[str] = Counter()

        def real(value: Any) -> Any:
            if not isinstance(value, FakeTensor):
                return value.clone() if isinstance(value, Tensor) else value
            if _memory(value) not in memories:
                memories[_memory(value)] = torch.empty(value.untyped_storage().nbytes(), dtype=torch.uint8)
            memory = memories[_memory(value)].untyped_storage()
            return torch.empty(0, dtype=value.dtype).set_(memory, value.storage_offset(), value.shape, value.stride())

        with torch.no_grad():
            for call in needed:
                owner = next((self._owners[memory] for memory in call.writes if memory in self._owners), name)
                draws[owner] += 1
                seed_generators(torch.device("cpu"), self._seed, "initial weights", owner, draws[owner])
                arguments, keywords = tree_map(real, (call.arguments, call.keywords))
                result = call.function(*arguments, **keywords)
                for planned, made in zip(tree_leaves(call.result), tree_leaves(result), strict=True):
                    if isinstance(planned, FakeTensor) and _memory(planned) not in memories:
                        assert (made.stride(), made.storage_offset()) == (planned.stride(), planned.storage_offset())
                        memories[_memory(planned)] = made
            whole = real(self._tensors[name])
        return rows_of(whole, rows)

    def _calls_behind(self, memory: int) -> list[_Call]:
        """The calls to replay, in order, for the final values of a storage."""
        wanted = {memory}
        needed: list[_Call] = []
        candidates = [-number for number in self._writers[memory]]  # the latest first
        heapq.heapify(candidates)
        while candidates:
            number = -heapq.heappop(candidates)
            call = self._calls[number]
            if call.writes & wanted and (not needed or needed[-1] is not call):
                needed.append(call)
                for other in call.reads - wanted:
                    for earlier in self._writers[other]:
                        if earlier < number:
                            heapq.heappush(candidates, -earlier)
                wanted = wanted - (call.writes - call.reads) | call.reads
        return needed[::-1]


class _Recorder(TorchDispatchMode):
    """Records the calls that create or change tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        keywords = kwargs or {}
        if any(isinstance(value, torch.Generator) for value in tree_leaves((args, keywords))):
            raise UserError(
                "building the network draws from a torch.Generator, whose numbers depend on what was drawn before; leave it "
                "out: each parameter is drawn from (seed, its name)"
            )
        result = func(*args, **keywords)
        reads, made = _memories((args, keywords)), _memories(result)
        writes = (made or reads) if func._schema.is_mutable else made - reads  # a view writes nothing
        name = func.overloadpacket.__name__
        if name in OVERWRITE and _fills_memory(args[0]):
            reads = _memories((args[1:], keywords))
        if writes and "empty" not in name:
            self.calls.append(_Call(func, args, keywords, result, reads, writes))
        return result

    def truncated_normal(self, tensor: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        """Records `trunc_normal_` as one call: torch's code looks at the numbers that it has drawn, and here there are none."""
        memories = _memories(tensor)
        reads = set() if _fills_memory(tensor) else memories
        self.calls.append(_Call(_truncated_normal, (tensor, *arguments), keywords, tensor, reads, memories))
        return tensor


with FakeTensorMode():
    _FAKES_OWN = {*vars(nn.Parameter(torch.empty(0)))}
_module_apply = nn.Module._apply
_truncated_normal = nn.init._no_grad_trunc_normal_  # what nn.init.trunc_normal_ calls; private, and held by a test


def build_empty(build: Callable[[], nn.Module], seed: int) -> tuple[nn.Module, InitialWeights]:
    """(the network that `build` returns, on the meta device; its initial weights). UserError if `build` reads tensor values."""
    random.seed(hash32("build", seed))  # what is drawn by Python or numpy is then the same in every process
    np.random.seed(hash32("build", seed))
    with _recorded() as recorder:
        try:
            network = build()
        except DataDependentOutputException as error:
            raise UserError(
                f"building the network reads the values of a tensor ({error.func}), and there are none yet: parameters are "
                "filled one by one later; compute with Python's numbers there"
            ) from error
        except RuntimeError as error:
            if "UninitializedParameter" not in str(error):
                raise
            raise UserError(
                "building the network makes a lazy module, whose shapes come with its first batch; give it its sizes"
            ) from error
    tensors: dict[str, Tensor] = {}

    def on_meta(name: str, tensor: Tensor) -> Tensor:
        tensors[name] = tensor.detach()
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")  # row-major, as it comes from a checkpoint

    replace_tensors(network, on_meta)
    values = InitialWeights(recorder.calls, tensors, seed)
    check(network, values)
    return network, values


def check(network: nn.Module, values: InitialWeights) -> None:
    """UserError for tensors that cannot be filled one by one: neither parameter nor buffer, empty, or sharing memory."""
    for name, module in network.named_modules():
        own = {key: value for key, value in vars(module).items() if key not in ("_parameters", "_buffers", "_modules")}
        for attribute in (key for key, value in own.items() if any(isinstance(x, FakeTensor) for x in tree_leaves(value))):
            raise UserError(
                f"{f'{name}.' if name else ''}{attribute} is a tensor that is neither parameter nor buffer, so nobody would "
                "fill or move it; register it as a buffer"
            )
    for name, p in network.named_parameters():
        if not p.numel():
            raise UserError(f"{name} is of shape {tuple(p.shape)}, without an element to train; leave it out")
        if values.owner(name) != name:
            raise UserError(f"{name} and {values.owner(name)} lie in the same memory; tie them (one Parameter), or copy")


@contextlib.contextmanager
def _recorded() -> Iterator[_Recorder]:
    recorder = _Recorder()
    nn.init._no_grad_trunc_normal_ = recorder.truncated_normal
    FakeTensor.__deepcopy__ = _deepcopy  # type: ignore[method-assign]
    nn.Module._apply = _apply  # type: ignore[method-assign]
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), recorder:
            yield recorder
    finally:
        nn.init._no_grad_trunc_normal_ = _truncated_normal
        del FakeTensor.__deepcopy__
        nn.Module._apply = _module_apply  # type: ignore[method-assign]


def _deepcopy(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """`copy.deepcopy` for fake tensors. The default would also copy the FakeTensorMode, whose bookkeeping of memory then exists
    twice in the process, which crashes at some garbage collection."""
    new = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        new = nn.Parameter(new, tensor.requires_grad)
    vars(new).update({key: copy.deepcopy(value, memo) for key, value in vars(tensor).items() if key not in _FAKES_OWN})
    memo[id(tensor)] = new
    return new


@torch.no_grad()
def _apply(module: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` (behind `module.to`) for fake tensors, which refuse the default's swap of two tensors' insides."""
    replace_tensors(module, lambda name, tensor: convert(tensor))
    return module


def rows_of(tensor: Tensor, rows: slice) -> Tensor:
    """Some rows of a tensor; for ALL_ROWS the tensor itself, which may then be a scalar."""
    return tensor if rows == ALL_ROWS else tensor[rows]


def replace_tensors(network: nn.Module, make: Callable[[str, Tensor], Tensor]) -> None:
    """Replace each parameter and buffer by `make(name, tensor)`, one at a time; tied ones stay tied.

    A new parameter keeps `requires_grad` and the attributes that the author of the network has set on the old one.
    """
    made: dict[Tensor, Tensor] = {}
    for prefix, module in network.named_modules():
        for own in (module._parameters, module._buffers):
            for key, tensor in own.items():
                if tensor is None:
                    continue
                if tensor not in made:
                    new = make(f"{prefix}.{key}" if prefix else key, tensor)
                    if isinstance(tensor, nn.Parameter) and new is not tensor:
                        new = nn.Parameter(new, tensor.requires_grad)
                        vars(new).update({key: value for key, value in vars(tensor).items() if key not in _FAKES_OWN})
                    made[tensor] = new
                own[key] = made[tensor]


def fill(network: nn.Module, weights: Weights, device: torch.device) -> None:
    """Fill a network on the meta device with whole tensors on `device`, one at a time."""
    replace_tensors(network, lambda name, tensor: weights(name).to(device, tensor.dtype).contiguous())


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _memories(values: Any) -> set[int]:
    return {_memory(value) for value in tree_leaves(values) if isinstance(value, FakeTensor)}


def _fills_memory(tensor: Tensor) -> bool:
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
