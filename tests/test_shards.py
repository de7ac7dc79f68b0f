"""FSDP2 and ZeRO-3 from the meta device: each process reads and holds its own part, and together they are the whole."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from forked import TIMEOUT, forked
from launching import ROOT
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from toy_recipe import ToyRecipe

from trainer.backends.blocks import check_dimensions
from trainer.backends.fsdp import FsdpBackend, allocate, fill_shards
from trainer.backends.tensors import restored_like, whole_entries
from trainer.backends.zero import ZeroBackend
from trainer.checkpoints import writing
from trainer.checkpoints.checkpoint import Checkpoint
from trainer.checkpoints.network import build_network, evaluate_objective, load_for_evaluation
from trainer.command_line import config
from trainer.distributed.control import Control
from trainer.distributed.launch import Launch
from trainer.errors import UserError
from trainer.evaluation.objective import Objective
from trainer.initial_weights import ALL_ROWS, build_empty
from trainer.recipe import Batch, Measured

PROCESSES = 3
SIZES = {"0.weight": 7, "0.bias": 7, "1.weight": 2, "1.bias": 2, "2.weight": 2, "2.bias": 2}  # rows; of 2, one has none


class Saved:
    """A checkpoint, and which rows of it were read."""

    rows: ClassVar = torch.arange(7.0)[:, None] * torch.ones(4)

    def __init__(self) -> None:
        self.read: list[tuple[int, int]] = []

    def names(self, stem: str) -> set[str]:
        return {"row.0.weight"}

    def form(self, stem: str, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        return tuple(self.rows.shape), self.rows.dtype

    def tensor(self, stem: str, name: str, *, rows: slice = ALL_ROWS) -> Tensor:
        self.read.append((rows.start, rows.stop))
        return self.rows[rows]


def shard(rank: int) -> dict[str, Any]:
    """What one process does, and what it has read."""
    network, initial = build_empty(lambda: nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 2), nn.BatchNorm1d(2)), 42)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    fully_shard(network, mesh=mesh)
    network.to_empty(device="cpu")
    read: dict[str, tuple[int, int]] = {}

    def weights(name: str, rows: slice = ALL_ROWS) -> Tensor:
        read[name] = (rows.start, rows.stop)
        return initial(name, rows)

    fill_shards(network, weights)
    parameters: dict[str, Any] = dict(network.named_parameters())
    same = all(torch.equal(p.full_tensor(), initial(name)) for name, p in parameters.items())
    same = same and all(torch.equal(buffer, initial(name)) for name, buffer in network.named_buffers())
    saved = Saved()
    state: Any = restored_like(parameters["0.weight"], saved, "row.0.weight")
    held = [len(state.to_local()), state.to_local().stride() == (4, 1)]
    return {
        "same": same,
        "read": read,
        "held": held,
        "whole": torch.equal(state.full_tensor(), saved.rows),
        "saved": saved.read,
    }


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By rank."""
    return forked(PROCESSES, tmp_path_factory.mktemp("shards"), shard)


def test_together_the_processes_hold_the_weights_and_buffers_of_one(outcomes: list[dict[str, Any]]) -> None:
    assert [outcome["same"] for outcome in outcomes] == [True] * PROCESSES


def test_each_reads_its_own_rows_of_a_parameter_and_no_other(outcomes: list[dict[str, Any]]) -> None:
    for name, rows in SIZES.items():
        parts = [range(*outcome["read"][name]) for outcome in outcomes]
        assert [row for part in parts for row in part] == list(range(rows)), name
        assert max(map(len, parts)) == -(-rows // PROCESSES)


def test_a_state_of_another_shape_is_cut_likewise(outcomes: list[dict[str, Any]]) -> None:
    assert [outcome["saved"] for outcome in outcomes] == [[[0, 3]], [[3, 6]], [[6, 7]]]
    assert [outcome["held"] for outcome in outcomes] == [[3, True], [3, True], [1, True]]
    assert all(outcome["whole"] for outcome in outcomes)


class MeasuresWeights(ToyRecipe):
    """Looks at more than what the network gives out, and before that, when nothing has gathered the weights for it."""

    def measure(self, network: nn.Module, batch: Batch) -> dict[str, Measured]:
        rows = len(batch["tokens"])
        size = rows * network.value.weight.square().sum()  # type: ignore
        return super().measure(network, batch) | {"size": (size, rows)}


def evaluate_toy(folder: Path, rank: int, processes: int) -> dict[str, float]:
    """What `evaluate` does of a checkpoint of the toy, in one of some processes; and how many weights it holds."""
    launch = Launch(rank, processes, rank, torch.device("cpu"), Control(rank, processes, TIMEOUT))
    recipe = MeasuresWeights()
    settings = config.parse(recipe.config_class, {}, [], recipe.name).config
    data = recipe.build_data(settings)
    objective = load_for_evaluation(recipe, Checkpoint(folder / "saved"), settings, data, launch)
    held = [p.to_local() if isinstance(p, DTensor) else p for p in objective.parameters()]
    result = evaluate_objective(recipe, objective, settings, data.evaluation["val"], launch, 4)
    return {**result, "weights": sum(p.numel() for p in held)}


@pytest.mark.parametrize(
    "launcher_sets", [{"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, {"ACCELERATE_USE_DEEPSPEED": "true"}]
)
def test_evaluation_holds_a_share_and_measures_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher_sets: dict[str, str]
) -> None:
    recipe = ToyRecipe()
    settings = config.parse(recipe.config_class, {}, ["--seed", "7"], recipe.name).config
    trained = build_network(recipe, settings, recipe.build_data(settings))
    tensors = {"model": whole_entries({name: p.detach() for name, p in trained.named_parameters()})}
    writing.write(tmp_path, "saved", tensors, {"config.yaml": config.to_yaml(settings)})
    alone = evaluate_toy(tmp_path, 0, 1)
    for name, value in launcher_sets.items():
        monkeypatch.setenv(name, value)
    shared = forked(PROCESSES, tmp_path, lambda rank: evaluate_toy(tmp_path, rank, PROCESSES))
    assert alone["size"] > 0
    assert sum(outcome.pop("weights") for outcome in shared) == alone.pop("weights")
    assert shared == [{name: pytest.approx(value, rel=1e-6) for name, value in alone.items()}] * PROCESSES


def test_buffers_stay_where_an_offloaded_network_computes() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).to("meta")
    allocate(network, "cpu", "meta")
    assert {p.device.type for p in network.parameters()} == {"cpu"}
    assert {buffer.device.type for buffer in network.buffers()} == {"meta"}


def test_a_parameter_without_dimensions_is_refused_by_name() -> None:
    network = nn.Linear(2, 2)
    network.scale = nn.Parameter(torch.ones(()))
    with pytest.raises(UserError, match="scale has no dimension to cut it along"):
        check_dimensions(network)


def cut_by_zero(folder: Path, rank: int) -> dict[str, Any]:
    """In one of some processes: how much of each parameter DeepSpeed's engine is given, and the weights that come of it."""
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(ROOT / "ds_configs/zero3.json")}
    os.environ |= {"LOCAL_RANK": str(rank)}
    ZeroBackend.before_connect(True)
    from accelerate import PartialState
    from deepspeed.utils import safe_get_full_fp32_param

    PartialState(cpu=True)
    launch = Launch(rank, PROCESSES, rank, torch.device("cpu"), Control(rank, PROCESSES, TIMEOUT))
    recipe = ToyRecipe()
    settings = config.parse(recipe.config_class, {}, ["--batch_size", str(PROCESSES)], recipe.name).config
    network, initial = build_empty(lambda: recipe.build_model(settings, recipe.build_data(settings)), 7)
    backend = ZeroBackend(launch, "no", "auto", settings.optimisation)
    prepare, given = backend.accelerator.prepare, {}

    def watched(objective: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        given.update({name: p.numel() for name, p in network.named_parameters()})
        given["groups"] = [len(group["params"]) for group in optimizer.param_groups]
        return prepare(objective, optimizer)

    backend.accelerator.prepare = watched
    backend.prepare(Objective(network, recipe), network, lambda: recipe.optimizer(network, settings), initial)
    same = {name: bool(safe_get_full_fp32_param(p).equal(initial(name))) for name, p in network.named_parameters()}
    return {"given": given, "same": same}


def test_zero_3_is_given_parameters_that_are_cut_already(tmp_path: Path) -> None:
    recipe = ToyRecipe()
    settings = config.parse(recipe.config_class, {}, [], recipe.name).config
    whole = build_network(recipe, settings, recipe.build_data(settings))
    groups = [len(group["params"]) for group in recipe.optimizer(whole, settings).param_groups]
    for outcome in forked(PROCESSES, tmp_path, lambda rank: cut_by_zero(tmp_path, rank)):
        assert outcome["given"].pop("groups") == groups  # of matrices and of vectors, though a part of either is flat
        assert outcome["given"] == dict.fromkeys((name for name, _ in whole.named_parameters()), 0)
        assert all(outcome["same"].values())


class Blocks(nn.Module):
    """Three linear layers, the blocks, two of them tied or not; and what is around them."""

    _no_split_modules: ClassVar = ["Linear"]

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(6, 6) for _ in range(3)])
        self.around = nn.Parameter(torch.ones(6, 100))
        if tied:
            self.layers[2].weight = self.layers[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return (self.layers(x) @ self.around).sum()


def memory() -> dict[int, tuple[int, list[int]]]:
    """{storage: (its bytes, the shape of a tensor in it)} of all tensors of this process."""
    gc.collect()
    found = [value for value in gc.get_objects() if isinstance(value, Tensor) and not isinstance(value, DTensor)]
    return {t.untyped_storage()._cdata: (t.untyped_storage().nbytes(), list(t.shape)) for t in found}


def more_bytes(now: dict[int, tuple[int, list[int]]], before: dict[int, tuple[int, list[int]]]) -> int:
    return sum(size for size, _ in now.values()) - sum(size for size, _ in before.values())


def train_and_release(rank: int) -> dict[str, Any]:
    """What an FSDP run holds in tensors before, during and after it; and what a tied model is told."""
    launch = Launch(rank, 2, rank, torch.device("cpu"), Control(rank, 2, TIMEOUT))
    optimisation = ToyRecipe.config_class().optimisation

    def prepared(tied: bool) -> Any:
        network, weights = build_empty(lambda: Blocks(tied), 0)
        backend = FsdpBackend(launch, "no", "auto", optimisation)
        backend.prepare(network, network, lambda: torch.optim.AdamW(network.parameters()), weights)
        return backend

    try:
        prepared(tied=True)
    except UserError as error:
        refusal = str(error)
    before = memory()
    backend = prepared(tied=False)
    with backend.micro_step(last=True):
        backend.backward(backend.model(torch.ones(2, 6))[None], torch.ones(1))
    backend.step(0.1)
    with torch.no_grad():
        backend.model(torch.ones(2, 6))  # an evaluation, after which nothing was given back
    during = more_bytes(memory(), before)
    backend.release()
    left = memory()
    shapes = [shape for storage, (size, shape) in left.items() if size and storage not in before]
    return {"during": during, "after": more_bytes(left, before), "shapes": shapes, "refusal": refusal}


def test_a_run_under_fsdp_ends_with_no_weight_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 makes the report from a model of its own."""
    monkeypatch.setenv("FSDP_VERSION", "2")
    numbers = 3 * (36 + 6) + 600
    for outcome in forked(2, tmp_path, train_and_release):
        assert "layers.2.weight is tied to a parameter outside its block" in outcome["refusal"]
        assert outcome["during"] > 3 * 4 * numbers / 2
        assert outcome["after"] < 200, outcome["shapes"]  # counts and the like
