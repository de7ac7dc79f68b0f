"""Apple's GPUs, as far as a machine without one can tell: what is asked of them, and that no float64 is, which they lack."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import TIMEOUT
from scenarios import TOY, planned, recipe_of
from tiny_runs import TINY
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.checkpoints.network import build_network
from trainer.data import loader
from trainer.distributed.control import Control
from trainer.distributed.launch import Launch, connect, resolve_precision
from trainer.distributed.rendezvous import Rendezvous
from trainer.errors import UserError
from trainer.evaluation.objective import Objective

MPS = Launch(0, 1, 0, torch.device("mps"), Control(0, 1, TIMEOUT))


@pytest.fixture
def apple(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose torch says that it has such a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr("accelerate.state.is_mps_available", lambda: True)
    monkeypatch.setattr("accelerate.PartialState", FakeState)


class FakeState:
    """What Accelerate says on a Mac."""

    process_index, num_processes, local_process_index = 0, 1, 0

    def __init__(self, cpu: bool = False, **_: object) -> None:
        self.device = torch.device("cpu" if cpu else "mps")


@pytest.mark.usefixtures("apple")
@pytest.mark.parametrize(
    ("flag", "environment", "kind"), [("auto", "", "mps"), ("mps", "", "mps"), ("cpu", "", "cpu"), ("auto", "true", "cpu")]
)
def test_one_process_takes_it_unless_the_cpu_is_asked_for(
    flag: str, environment: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", environment)
    assert connect(flag, 1.0).device.type == kind


@pytest.mark.usefixtures("apple")
def test_several_processes_are_refused_and_so_is_a_machine_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.distributed import launch

    with pytest.raises(UserError, match="device mps is for one process that python starts"):
        launch._join("mps", timedelta(minutes=1), lambda on_cpu: None, Rendezvous(0, 2, None))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="device mps: torch sees no Apple GPU here; use --device cpu"):
        connect("mps", 1.0)


def test_it_computes_in_fp32_or_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert [resolve_precision(flag, MPS) for flag in ("auto", "no", "bf16")] == ["no", "no", "bf16"]
    with pytest.raises(UserError, match="fp16 needs a CUDA GPU"):
        resolve_precision("fp16", MPS)


class NoFloat64(TorchDispatchMode):
    """An error where an operation gives numbers in float64."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            assert not (isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64), f"{function} gives float64"
        return result


def as_sent(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What `loader.to_device` makes of a batch, but for the way."""
    with pytest.MonkeyPatch.context() as patch:
        there = torch.Tensor.to
        patch.setattr(torch.Tensor, "to", lambda t, *a, **k: t if a and a[0] == MPS.device else there(t, *a, **k))
        return loader.to_device(batch, MPS.device)


@pytest.mark.parametrize("name", ["toy", *TINY])
def test_no_recipe_computes_in_float64_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training step and an evaluation batch, as on a device that has no such numbers."""
    monkeypatch.setitem(os.environ, "SAMECURVE_CACHE", str(tmp_path / "cache"))
    recipe_name, argv = (TOY, lambda _: []) if name == "toy" else TINY[name]
    recipe: Any = recipe_of(recipe_name)
    settings = planned(recipe, argv(tmp_path))
    data = recipe.build_data(settings)
    batches = [as_sent(dataset.__getitems__(range(4))) for dataset in (data.train, data.evaluation["val"])]
    objective = Objective(build_network(recipe, settings, data), recipe, list(recipe.items(batches[0])))
    for module in ("trainer.evaluation.objective", "recipes.collatz"):
        monkeypatch.setattr(f"{module}.sum_dtype", lambda device: torch.float32)
    with NoFloat64():
        objective(batches[0]).sum().backward()
        with torch.no_grad():
            objective.eval()(batches[1], measuring=True)
