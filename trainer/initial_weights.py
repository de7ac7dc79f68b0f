"""Initial weights, each drawn from (run seed, its name), one at a time and in any order.

`build_empty` runs the author's code on fake tensors, which have shapes but no memory, and records every operation that makes or
changes one. To fill a parameter or buffer, the operations behind its values are replayed on real tensors. So a process holds
one whole tensor at a time, and every process, under any launch, draws the same bits without the others.
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
"""in-place operations that do not read the tensor that they write: no earlier call on it matters"""
ALL_ROWS = slice(None)


class Weights(Protocol):
    """Returns values for a network's parameters and buffers by name: initial ones, or those of a checkpoint."""

    def __call__(self, name: str, rows: slice = ALL_ROWS) -> Tensor:
        """The tensor on the host, or some rows of it (indices of its first dimension)."""


class _Call(NamedTuple):
    """A recorded operation. Its tensors are fake; a storage is named by its id, see `_storage`."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    result: Any
    reads: set[int]
    """storages whose values the result depends on"""
    writes: set[int]
    """storages that it makes or changes"""


class InitialWeights:
    """`Weights` that replay the recorded `calls`. `tensors`: the network's fake parameters and buffers by name."""

    def __init__(self, calls: list[_Call], tensors: Mapping[str, Tensor], seed: int) -> None:
        self._calls, self._tensors, self._seed = calls, tensors, seed
        self._writers: dict[int, list[int]] = defaultdict(list)
        """{storage: indices of the calls that write to it}"""
        for number, call in enumerate(calls):
            for storage in call.writes:
                self._writers[storage].append(number)
        self._owners = {_storage(tensor): name for name, tensor in tensors.items()}

    def owner(self, name: str) -> str:
        """The last name among the tensors with the same storage: `name` itself, unless one is a view of another."""
        return self._owners[_storage(self._tensors[name])]

    def __call__(self, name: str, rows: slice = ALL_ROWS) -> Tensor:
        """See `Weights`. Computes the whole tensor, whatever `rows`, and seeds torch's CPU generator.

        A parameter that is copied from another one of the network gets that one's random numbers. What was drawn for no
        parameter of the network (a layer that was copied several times) is drawn anew for each copy.
        """
        calls = self._calls_behind(_storage(self._tensors[name]))
        if not calls and self._tensors[name].numel():
            raise UserError(f"{name} has no initial value: whoever builds the network leaves it empty; fill it there")
        storages: dict[int, torch.UntypedStorage] = {}
        """{fake storage: the real one in its place}"""
        draws: Counter[str] = Counter()

        def real(value: Any) -> Any:
            if not isinstance(value, FakeTensor):
                return value.clone() if isinstance(value, Tensor) else value  # a constant, which the call might change
            if _storage(value) not in storages:
                storages[_storage(value)] = torch.UntypedStorage(value.untyped_storage().nbytes())
            storage = storages[_storage(value)]
            return torch.empty(0, dtype=value.dtype).set_(storage, value.storage_offset(), value.shape, value.stride())

        with torch.no_grad():
            for call in calls:
                owner = next((self._owners[storage] for storage in call.writes if storage in self._owners), name)
                draws[owner] += 1
                seed_generators(torch.device("cpu"), self._seed, "initial weights", owner, draws[owner])
                arguments, keywords = tree_map(real, (call.arguments, call.keywords))
                result = call.function(*arguments, **keywords)
                for fake, made in zip(tree_leaves(call.result), tree_leaves(result), strict=True):
                    if isinstance(fake, FakeTensor) and _storage(fake) not in storages:  # the call has made it
                        assert (made.stride(), made.storage_offset()) == (fake.stride(), fake.storage_offset())
                        storages[_storage(fake)] = made.untyped_storage()
            whole = real(self._tensors[name])
        return rows_of(whole, rows)

    def _calls_behind(self, storage: int) -> list[_Call]:
        """The calls to replay, in order, for the final values of a storage. It looks for them from the last one backwards."""
        wanted = {storage}  # those whose values before the calls in `needed` decide the result
        needed: list[_Call] = []
        candidates = [-number for number in self._writers[storage]]  # a heap with the latest call on top
        heapq.heapify(candidates)
        while candidates:
            number = -heapq.heappop(candidates)
            call = self._calls[number]
            if not call.writes & wanted or (needed and needed[-1] is call):  # overwritten later; pushed twice
                continue
            needed.append(call)
            for other in call.reads - wanted:
                for earlier in self._writers[other]:
                    if earlier < number:
                        heapq.heappush(candidates, -earlier)
            wanted = wanted - (call.writes - call.reads) | call.reads
        return needed[::-1]


class _Recorder(TorchDispatchMode):
    """Records the operations that make or change fake tensors, in `calls`."""

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
        inputs, outputs = _storages((args, keywords)), _storages(result)
        # An in-place operation may return nothing; a view writes nothing, as it lies in the storage of its input.
        writes = (outputs or inputs) if func._schema.is_mutable else outputs - inputs
        name = func.overloadpacket.__name__
        overwrites = name in OVERWRITE and _fills_storage(args[0])
        reads = _storages((args[1:], keywords)) if overwrites else inputs
        if writes and "empty" not in name:  # an empty tensor has no values yet
            self.calls.append(_Call(func, args, keywords, result, reads, writes))
        return result

    def truncated_normal(self, tensor: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        """Takes the place of `trunc_normal_`, and records it as one call: torch's own code reads the numbers that it draws."""
        storages = _storages(tensor)
        reads = set() if _fills_storage(tensor) else storages
        self.calls.append(_Call(_truncated_normal, (tensor, *arguments), keywords, tensor, reads, storages))
        return tensor


with FakeTensorMode():
    _FAKE_ATTRIBUTES = {*vars(nn.Parameter(torch.empty(0)))}  # which every fake parameter has
_module_apply = nn.Module._apply
_truncated_normal = nn.init._no_grad_trunc_normal_  # private; nn.init.trunc_normal_ calls it, which a test checks


def build_empty(build: Callable[[], nn.Module], seed: int) -> tuple[nn.Module, InitialWeights]:
    """(the network that `build` returns, moved to the meta device; its initial weights).

    UserError if `build` reads a tensor's values, or if a tensor of the network cannot be filled by itself, see `check`.
    """
    random.seed(hash32("build", seed))  # every process draws the same where `build` draws with Python or numpy
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
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")  # contiguous, as tensors of checkpoints are

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
    """Makes every new tensor a fake one, and records what is done to it. Patches three functions that cannot handle these."""
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
    """`copy.deepcopy` for fake tensors. The default copies the FakeTensorMode too: with its bookkeeping of memory there twice,
    some later garbage collection crashes."""
    new = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        new = nn.Parameter(new, tensor.requires_grad)
    vars(new).update(copy.deepcopy(_added_attributes(tensor), memo))
    memo[id(tensor)] = new
    return new


@torch.no_grad()
def _apply(module: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` (what `module.to` calls) for fake tensors, which refuse the default's `swap_tensors`."""
    replace_tensors(module, lambda name, tensor: convert(tensor))
    return module


def _added_attributes(tensor: Tensor) -> dict[str, Any]:
    """The attributes that the network's author has set on a tensor."""
    return {key: value for key, value in vars(tensor).items() if key not in _FAKE_ATTRIBUTES}


def rows_of(tensor: Tensor, rows: slice) -> Tensor:
    """Some rows of a tensor; for ALL_ROWS the tensor itself, which may be a scalar."""
    return tensor if rows == ALL_ROWS else tensor[rows]


def replace_tensors(network: nn.Module, make: Callable[[str, Tensor], Tensor]) -> None:
    """Replace each parameter and buffer by `make(name, tensor)`, one at a time; tied ones stay tied.

    A new parameter keeps `requires_grad` of the old one, and the attributes that the network's author has set on it.
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
                        vars(new).update(_added_attributes(tensor))
                    made[tensor] = new
                own[key] = made[tensor]


def fill(network: nn.Module, weights: Weights, device: torch.device) -> None:
    """Replace the tensors of a network on the meta device by those of `weights`, whole and on `device`, one at a time."""
    replace_tensors(network, lambda name, tensor: weights(name).to(device, tensor.dtype).contiguous())


def _storage(tensor: Tensor) -> int:
    """An id of the tensor's storage, the same for all its views."""
    return tensor.untyped_storage()._cdata


def _storages(values: Any) -> set[int]:
    return {_storage(value) for value in tree_leaves(values) if isinstance(value, FakeTensor)}


def _fills_storage(tensor: Tensor) -> bool:
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
