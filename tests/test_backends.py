"""One optimizer step: clipping, steps that are not finite, the fp16 loss scale, and what a DeepSpeed file is filled with."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest
import torch
from launching import ROOT
from scenarios import planned, recipe_of
from tiny_runs import TINY
from torch import Tensor, nn
from toy_recipe import ToyRecipe

from trainer.backends import backend_of
from trainer.backends.backend import layers
from trainer.backends.deepspeed_config import check_deepspeed_file, check_filled, fill_deepspeed_config
from trainer.backends.fsdp import FsdpBackend, blocks, check_environment, named_blocks, tie_across
from trainer.backends.plain import PlainBackend
from trainer.backends.zero import ZeroBackend
from trainer.checkpoints.network import build_network
from trainer.command_line import config
from trainer.command_line.sections import Optimisation
from trainer.distributed.launch import connect
from trainer.errors import UserError
from trainer.optimisation import optimizers as optimizer
from trainer.optimisation.finite import BadSteps, LossScale
from trainer.setup import set_up

NAMES = get_args(get_type_hints(Optimisation)["optimizer"])
CPU = torch.device("cpu")
ONE = torch.ones(())


def network(width: int = 6) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 2))


def make_backend(
    name: str, grad_clip: float = 1.0, scale: LossScale | None = None, width: int = 6
) -> tuple[nn.Module, PlainBackend]:
    net, settings = network(width), Optimisation(optimizer=name, grad_clip=grad_clip)
    net.embeddings_and_heads = lambda: list(net[3].parameters())
    backend = PlainBackend(connect("cpu", 1.0), "no", "no", settings)
    backend.prepare(net, net, lambda: optimizer.build(optimizer.decay_groups(net, 0.1), net, settings))
    backend.scale = scale
    return net, backend


def take(net: nn.Module, update: PlainBackend, factor: float = 1.0, rate: float = 0.01, seed: int = 0) -> Any:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
    update.backward((net(x).square().mean()) * factor, ONE)
    return update.step(rate)


def snapshot(net: nn.Module, update: PlainBackend) -> list[Tensor]:
    names = {p: name for name, p in net.named_parameters()}
    states = sorted((names[p], key, value) for p, own in update.optimizer.state.items() for key, value in own.items())
    kept = [torch.as_tensor(value) for _, _, value in states if value is not None]
    return [t.detach().clone() for t in [*net.parameters(), *kept]]


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_released_model_leaves_no_memory_behind() -> None:
    net, backend = make_backend("adamw")
    take(net, backend)
    held = [*net.parameters(), *(value for state in backend.optimizer.state.values() for value in state.values())]
    assert len(held) == 3 * 6 + 6  # weights, two moments and a count of each of six parameters
    assert all(tensor.numel() for tensor in held)
    backend.release()
    assert not any(tensor.untyped_storage().nbytes() for tensor in held)


# ----------------------------------------------------------------------------------------------------------- clipping


def test_the_norm_is_that_before_clipping_and_the_update_that_after() -> None:
    results = {}
    for clip in (0.0, 0.05, 1e9):
        net, update = make_backend("sgd", clip)
        before = [p.detach().clone() for p in net.parameters()]
        for group in update.optimizer.param_groups:
            group["momentum"] = group["weight_decay"] = 0.0
        step = take(net, update, rate=1.0)
        moved = sum((p.detach() - b).square().sum() for p, b in zip(net.parameters(), before, strict=True)) ** 0.5
        results[clip] = (float(step.grad_norm), float(moved))
    norm = results[0.0][0]
    assert norm > 0.06
    assert {result[0] for result in results.values()} == {norm}
    assert results[0.0][1] == pytest.approx(norm, rel=1e-4)
    assert results[1e9][1] == pytest.approx(norm, rel=1e-4)
    assert results[0.05][1] == pytest.approx(0.05, rel=1e-3)


def test_gradients_are_cleared_and_micro_batches_add_up() -> None:
    net, update = make_backend("sgd", 0.0)
    x = torch.randn(8, 6)
    with update.micro_step(last=False):
        update.backward(net(x[:4]).square().sum() / 16, ONE)
    with update.micro_step(last=True):
        update.backward(net(x[4:]).square().sum() / 16, ONE)
    halves = update.step(0.0).grad_norm
    assert all(p.grad is None for p in net.parameters())
    update.backward(net(x).square().mean(), ONE)
    assert float(update.step(0.0).grad_norm) == pytest.approx(float(halves), rel=1e-5)


def test_what_ddp_averages_is_multiplied_back() -> None:
    _, update = make_backend("sgd", 0.0)
    assert update.gradient_divisor == 1
    update.launch = replace(update.launch, processes=4)
    assert update.gradient_divisor == 4


def test_the_learning_rate_reaches_every_group_times_its_own_scale() -> None:
    net, update = make_backend("adamw")
    update.optimizer.param_groups[1]["lr_scale"] = 0.5
    take(net, update, rate=0.25)
    assert [group["lr"] for group in update.optimizer.param_groups] == [0.25, 0.125]


# --------------------------------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_is_not_finite_changes_nothing(name: str, factor: float) -> None:
    net, update = make_backend(name)
    for seed in range(3):
        assert not take(net, update, seed=seed).bad
    before = snapshot(net, update)
    step = take(net, update, factor)
    assert step.bad
    assert not torch.isfinite(step.grad_norm)
    assert same(snapshot(net, update), before)
    assert all(p.grad is None for p in net.parameters())
    assert not take(net, update).bad
    assert not same(snapshot(net, update), before)


@pytest.mark.parametrize("name", NAMES)
def test_training_goes_on_as_if_a_bad_first_step_had_not_been(name: str) -> None:
    """Some optimizers make their moments in the first step: a skipped one must not leave what memory happened to hold."""
    ends = []
    for bad_first in (False, True):
        net, update = make_backend(name)
        litter = [torch.full(p.shape, 1e3) for p in net.parameters() for _ in range(20)]
        del litter  # freed memory that the next allocations may get
        if bad_first:
            assert take(net, update, float("nan")).bad
        for seed in range(3):
            take(net, update, seed=seed)
        ends.append([p.detach().clone() for p in net.parameters()])
    assert same(*ends)


def test_one_bad_element_is_enough() -> None:
    net, update = make_backend("adamw")
    before = [p.detach().clone() for p in net.parameters()]
    update.backward(net(torch.randn(5, 6)).square().mean(), ONE)
    net[0].weight.grad[0, 0] = float("nan")
    assert update.step(0.1).bad
    assert same([p.detach() for p in net.parameters()], before)


def test_bad_steps_are_counted_one_step_late() -> None:
    count = BadSteps()
    seen = []
    for step, bad in enumerate((1.0, 1.0, 0.0, 1.0, 0.0), start=1):
        count.add(torch.tensor(bad), step)
        seen.append((count.in_a_row, count.total, count.last_step))
    assert seen == [(0, 0, 0), (1, 1, 1), (2, 2, 2), (0, 2, 2), (1, 3, 4)]
    count.read()
    assert (count.in_a_row, count.total) == (0, 3)
    count.read()
    assert (count.in_a_row, count.total) == (0, 3)


def test_the_first_bad_step_is_warned_of_once() -> None:
    count = BadSteps(total=5)
    assert count.take_warning() is None  # those of earlier launches have been told
    for step in (7, 8):
        count.add(torch.tensor(1.0), step)
        count.read()
    assert "step 8 was not finite" in (count.take_warning() or "")
    assert count.take_warning() is None


def test_bad_steps_go_on_from_a_checkpoint() -> None:
    count = BadSteps(in_a_row=2, total=5)
    count.add(torch.tensor(1.0), 1)
    count.read()
    assert (count.in_a_row, count.total) == (3, 6)


# --------------------------------------------------------------------------------------------------------- loss scale


def test_the_scale_halves_at_an_overflow_and_doubles_after_clean_steps() -> None:
    scale = LossScale(CPU, 1024.0)
    scale.update(torch.tensor(1.0))
    assert (float(scale.scale), int(scale.growth)) == (512.0, 0)
    for _ in range(LossScale.GROWTH_INTERVAL - 1):
        scale.update(torch.tensor(0.0))
    assert (float(scale.scale), int(scale.growth)) == (512.0, 1999)
    scale.update(torch.tensor(0.0))
    assert (float(scale.scale), int(scale.growth)) == (1024.0, 0)
    for _ in range(5):
        scale.update(torch.tensor(0.0))
    scale.update(torch.tensor(1.0))
    assert (float(scale.scale), int(scale.growth)) == (512.0, 0)


def test_a_scaled_step_is_the_unscaled_one() -> None:
    ends = []
    for scale in (None, LossScale(CPU, 1024.0)):
        net, update = make_backend("adamw", scale=scale)
        norms = [float(take(net, update, seed=seed).grad_norm) for seed in range(3)]
        ends.append((norms, [p.detach().clone() for p in net.parameters()]))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-6)
    for one, two in zip(ends[0][1], ends[1][1], strict=True):
        assert torch.allclose(one, two, rtol=0, atol=1e-6)


def test_overflows_are_not_bad_steps_until_the_scale_is_at_one() -> None:
    net, update = make_backend("adamw", scale=LossScale(CPU, 8.0))
    take(net, update)
    before = snapshot(net, update)
    bad_steps = [float(take(net, update, float("inf")).bad) for _ in range(6)]
    assert bad_steps == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]  # at 8, 4, 2, 1, 1/2, 1/4
    assert same(snapshot(net, update), before)
    net, update = make_backend("adamw", scale=LossScale(CPU, 8.0))
    assert not take(net, update).bad


class Scaler:
    """The fields of DeepSpeed's DynamicLossScaler that a checkpoint keeps."""

    dynamic = True

    def __init__(self) -> None:
        self.cur_scale, self.cur_iter, self.last_overflow_iter = 65536.0, 0, -1
        self.cur_hysteresis, self.delayed_shift, self.scale_window = 2, 2, 2000


def zero_backend(scaler: Any) -> ZeroBackend:
    backend = object.__new__(ZeroBackend)
    inner = type("ZeroOptimizer", (), {"loss_scaler": scaler})()
    backend.engine = type("Engine", (), {"optimizer": inner})()
    return backend


def test_the_loss_scale_travels_between_both_forms() -> None:
    _, plain = make_backend("adamw", scale=LossScale(CPU, 512.0, 77))
    state = plain.loss_scale_state()
    assert state == {"scale": 512.0, "growth": 77}
    assert json.loads(json.dumps(state)) == state

    scaler = Scaler()
    zero_backend(scaler).restore_loss_scale(state)
    assert scaler.cur_scale == 512.0
    assert scaler.cur_hysteresis == 2
    # What DeepSpeed's scaler calls its stable interval.
    assert scaler.cur_iter - scaler.last_overflow_iter - 1 == 77
    back = zero_backend(scaler).loss_scale_state()
    assert back == {**state, "hysteresis": 2}

    _, other = make_backend("adamw", scale=LossScale(CPU))
    other.restore_loss_scale(back)
    assert other.loss_scale_state() == state
    scaler.cur_hysteresis = 1
    kept = zero_backend(scaler).loss_scale_state()
    fresh = Scaler()
    zero_backend(fresh).restore_loss_scale(kept)
    assert fresh.cur_hysteresis == 1


def test_growth_counts_from_the_last_doubling_in_both_forms() -> None:
    """DeepSpeed counts on from the last overflow: after 4,500 clean steps the next doubling is 1,500 away."""
    scaler = Scaler()
    scaler.cur_iter = 4500
    _, plain = make_backend("adamw", scale=LossScale(CPU))
    plain.restore_loss_scale(zero_backend(scaler).loss_scale_state())
    before = float(plain.scale.scale)
    plain.scale.update(torch.tensor(0.0))
    assert float(plain.scale.scale) == before
    assert int(plain.scale.growth) == 501


def test_without_fp16_there_is_no_scale_to_save_or_restore() -> None:
    _, update = make_backend("adamw")
    assert update.loss_scale_state() == {}
    update.restore_loss_scale({"scale": 2.0, "growth": 0})
    assert update.scale is None
    _, scaled = make_backend("adamw", scale=LossScale(CPU, 4.0))
    scaled.restore_loss_scale({})
    assert float(scaled.scale.scale) == 4.0
    assert zero_backend(None).loss_scale_state() == {}


# ------------------------------------------------------------------------------------------------------- DeepSpeed file


@pytest.fixture
def from_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "mine.json")


SETTINGS = Optimisation(batch_size=8, gradient_accumulation_steps=3, grad_clip=0.5)
ZERO = {"zero_optimization": {"stage": 2}}


def fill(
    config: dict[str, Any], precision: str = "no", settings: Optimisation = SETTINGS, processes: int = 2
) -> dict[str, Any]:
    return fill_deepspeed_config(config, precision, settings, processes)


@pytest.mark.usefixtures("from_file")
@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_auto_is_filled_from_our_own_flags(name: str) -> None:
    given = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
    before = json.dumps(given)
    filled = fill(given)
    assert filled["train_micro_batch_size_per_gpu"] == 4
    assert filled["gradient_accumulation_steps"] == 3
    assert filled["train_batch_size"] == 24
    assert filled["gradient_clipping"] == 0.5
    assert json.dumps(given) == before
    assert filled["zero_optimization"] == given["zero_optimization"]
    assert "auto" not in json.dumps(filled)


@pytest.mark.usefixtures("from_file")
def test_a_key_the_file_leaves_out_is_filled_too() -> None:
    filled = fill(ZERO)
    assert (filled["gradient_accumulation_steps"], filled["gradient_clipping"]) == (3, 0.5)


@pytest.mark.usefixtures("from_file")
@pytest.mark.parametrize(
    ("key", "value", "flag", "ours"),
    [
        ("train_batch_size", 64, "--batch_size", "24"),
        ("train_micro_batch_size_per_gpu", 8, "--batch_size", "4"),
        ("gradient_accumulation_steps", 1, "--gradient_accumulation_steps", "3"),
        ("gradient_clipping", 1.0, "--grad_clip", "0.5"),
    ],
)
def test_a_file_that_contradicts_a_flag_is_refused(key: str, value: float, flag: str, ours: str) -> None:
    with pytest.raises(UserError) as caught:
        fill({**ZERO, key: value})
    for word in (key, str(value), flag, ours, "auto"):
        assert word in str(caught.value)


@pytest.mark.usefixtures("from_file")
@pytest.mark.parametrize("value", ["many", None, True, [8], {}])
@pytest.mark.parametrize("key", ["train_batch_size", "gradient_clipping"])
def test_what_is_no_number_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=f'{key} is .*write "auto"'):
        fill({**ZERO, key: value})


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("null", "expected an object {...}, found null"),
        ("[]", "expected an object"),
        ("", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        (b"\xff\xfe", "is no JSON"),
        ('{"bf16": {}, "bf16": {}}', "key 'bf16' is given twice"),
        ('{"bf16": true}', "bf16 takes a section {...}, found true"),
        ('{"fp16": []}', "fp16 takes a section"),
        ('{"zero_optimization": [2]}', "zero_optimization takes a section"),
        (
            '{"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}',
            'offload_optimizer takes a section {...}, found "cpu"',
        ),
        ('{"zero_optimization": {"stage": "auto"}}', 'stage is "auto"; write 1, 2 or 3'),
        ('{"zero_optimization": {"stage": true}}', "stage is true"),
        ('{"zero_optimization": {"stage": 2.5}}', "stage is 2.5"),
        ('{"zero_optimization": {"stage": null}}', "stage is null"),
        ('{"bf16": {"enabled": "yes"}}', 'bf16.enabled is "yes"'),
        (None, "No such file"),
    ],
)
def test_a_malformed_deepspeed_file_is_refused_in_one_line(content: str | bytes | None, part: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        check_deepspeed_file({"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)})
    assert str(path) in str(caught.value)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("from_file")
@pytest.mark.parametrize(
    ("zero", "part"),
    [
        ({"reduce_bucket_size": "big"}, "reduce_bucket_size"),
        ({"reduce_buket_size": 5}, "reduce_buket_size"),
        ({"offload_param": {"device": "gpu"}}, "offload_param.device"),
    ],
)
def test_what_deepspeed_refuses_is_one_line(zero: dict[str, Any], part: str) -> None:
    check_filled(fill({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}))
    with pytest.raises(UserError, match=rf"DeepSpeed file mine.json: {part}: [^\n]*$"):
        check_filled(fill({"zero_optimization": {"stage": 3, **zero}}))


@pytest.mark.usefixtures("from_file")
def test_a_file_that_agrees_is_taken() -> None:
    numbers = {"train_batch_size": 24, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3}
    assert fill({**ZERO, **numbers, "gradient_clipping": 0.5})["train_batch_size"] == 24


def test_what_accelerate_puts_in_without_a_file_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", raising=False)
    assert fill({**ZERO, "gradient_accumulation_steps": 1})["gradient_accumulation_steps"] == 3


@pytest.mark.usefixtures("from_file")
def test_precision_sections() -> None:
    plain = fill(ZERO, "no")
    assert not plain.keys() & {"bf16", "fp16", "torch_autocast"}
    autocast = fill({**ZERO, "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, "bf16")
    assert autocast["torch_autocast"] == {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    knowingly = fill({**ZERO, "torch_autocast": {"lower_precision_safe_modules": ["torch.nn.Linear"]}}, "bf16")
    assert knowingly["torch_autocast"]["lower_precision_safe_modules"] == ["torch.nn.Linear"]
    assert not autocast.keys() & {"bf16", "fp16"}
    half = fill({**ZERO, "fp16": {"enabled": "auto", "initial_scale_power": 9}}, "fp16")
    assert half["fp16"] == {"enabled": True, "initial_scale_power": 9, "loss_scale_window": 2000}
    assert "torch_autocast" not in half
    pure = fill({**ZERO, "bf16": {"enabled": True}}, "no")
    assert pure["bf16"]["enabled"] is True
    assert pure["bf16"]["check_grad_overflow"] is True
    assert "torch_autocast" not in pure
    with pytest.raises(UserError, match=r"fp16.*--mixed_precision"):
        fill({**ZERO, "fp16": {"enabled": True}}, "no")


@pytest.mark.usefixtures("from_file")
@pytest.mark.parametrize(("section", "precision"), [("fp16", "bf16"), ("bf16", "fp16")])
def test_a_precision_in_the_file_that_contradicts_ours_is_never_dropped_in_silence(section: str, precision: str) -> None:
    with pytest.raises(UserError, match=rf"{section}.*mixed_precision"):
        fill({**ZERO, section: {"enabled": True}}, precision)


@pytest.mark.usefixtures("from_file")
@pytest.mark.parametrize(
    ("config", "settings", "parts"),
    [
        ({**ZERO, "optimizer": {"type": "Adam"}}, SETTINGS, ["optimizer", "remove"]),
        ({**ZERO, "scheduler": {"type": "WarmupLR"}}, SETTINGS, ["scheduler", "remove"]),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, SETTINGS, ["zero_hpz_partition_size", "hsdp.yaml"]),
        ({"zero_optimization": {"stage": 0}}, SETTINGS, ["stage 0", "ddp.yaml"]),
        ({}, SETTINGS, ["stage 0", "ddp.yaml"]),
    ],
)
def test_what_cannot_be_had_is_refused(config: dict[str, Any], settings: Optimisation, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        fill(config, settings=settings)
    for part in parts:
        assert part in str(caught.value)


# ------------------------------------------------------------------------------------------------------ norms by layer


def test_layers_are_blocks_or_the_modules_outside_them() -> None:
    net = nn.Module()
    net.token, net.embed, net.blocks = nn.Parameter(torch.zeros(1)), nn.Linear(2, 2), nn.ModuleList([network(), network()])
    net.frozen = nn.Linear(2, 2).requires_grad_(False)
    by_layer = layers(net)
    assert list(by_layer) == ["token", "embed", "blocks.0", "blocks.1"]
    assert [len(own) for own in by_layer.values()] == [1, 2, 6, 6]


@pytest.mark.parametrize("scale", [None, LossScale(CPU, 8.0)])
def test_norms_by_layer_are_those_before_clipping_and_make_up_the_whole(scale: LossScale | None) -> None:
    net, update = make_backend("sgd", 1e-4, scale)
    right, _ = make_backend("sgd", 0.0)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    right(x).square().mean().backward()
    update.backward(net(x).square().mean(), ONE)
    norms = update.layer_norms(layers(net))
    step = update.step(0.01)
    assert list(norms) == ["0", "2", "3"]
    for name, norm in norms.items():
        own = [p.grad for p in right.get_submodule(name).parameters()]
        assert float(norm) == pytest.approx(float(torch.cat([g.flatten() for g in own]).norm()), rel=1e-6)
    whole = sum(float(norm) ** 2 for norm in norms.values()) ** 0.5
    assert whole == pytest.approx(float(step.grad_norm), rel=1e-6)


def test_norms_by_layer_are_refused_under_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    settings = config.parse(ToyRecipe.config_class, {}, ["--log_grad_norms"], "toy").config
    plan = SimpleNamespace(config=settings, checkpoint=None)
    with pytest.raises(UserError, match=r"--log_grad_norms.*ZeRO"):
        set_up(ToyRecipe(), plan, SimpleNamespace(rank=0, processes=2), print)


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "MEGATRON_LM"),
        ({"ACCELERATE_USE_OF_TOMORROW": "1"}, "OF_TOMORROW"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "PARALLELISM_CONFIG without FSDP"),
        ({"PJRT_DEVICE": "TPU"}, "TPU"),
        *(
            (
                {
                    "ACCELERATE_USE_FSDP": "true",
                    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
                    f"PARALLELISM_CONFIG_{k}_SIZE": "2",
                },
                k,
            )
            for k in ("TP", "CP", "SP")
        ),
    ],
)
def test_a_launch_that_no_backend_is_for_is_refused(environ: dict[str, str], named: str) -> None:
    with pytest.raises(UserError, match=rf"asks for {named}.*not supported.*accelerate_configs"):
        backend_of(environ)
    assert backend_of(dict.fromkeys(environ, "false")) is PlainBackend


@pytest.mark.parametrize(
    ("setting", "way"),
    [
        ({"FSDP_VERSION": "1"}, "FSDP version 1; use .*fsdp.yaml"),
        ({}, "FSDP version 1; use"),
        ({"FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "--gradient_checkpointing"),
        ({"FSDP_VERSION": "2", "FSDP_IGNORED_MODULES": "head"}, "leave it out"),
        ({"FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "TRANSFORMER_BASED_WRAP"),
        ({"FSDP_VERSION": "2", "FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}, "hsdp.yaml HYBRID_SHARD"),
        ({"FSDP_VERSION": "2", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "use --compile"),
    ],
)
def test_settings_of_fsdp_that_would_be_another_launch_are_refused(setting: dict[str, str], way: str) -> None:
    with pytest.raises(UserError, match=way):
        check_environment(setting)
    check_environment({"FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_OFFLOAD_PARAMS": "true"})
    check_environment({"FSDP_VERSION": "2", "FSDP_SHARDING_STRATEGY": "FULL_SHARD", "ACCELERATE_DYNAMO_BACKEND": "NO"})


@pytest.mark.parametrize("recipe", ["toy", *TINY])
def test_every_network_of_ours_names_its_blocks(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMECURVE_CACHE", str(tmp_path))
    built = ToyRecipe() if recipe == "toy" else recipe_of(TINY[recipe][0])
    settings = planned(built, [] if recipe == "toy" else TINY[recipe][1](tmp_path))
    network = build_network(built, settings, built.build_data(settings))
    found = blocks(network)
    inside = sum(p.numel() for block in found for p in block.parameters())
    assert len(found) >= 1
    assert inside < sum(p.numel() for p in network.parameters())


def test_blocks_are_those_that_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert blocks(network) == []
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "Linear")
    assert blocks(network) == [network[0]]
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "Linaer")
    with pytest.raises(UserError, match="Sequential has no block called Linaer: name the classes of its blocks in"):
        blocks(network)


def test_blocks_of_fsdp_come_from_the_inside_out_and_share_no_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = [nn.Linear(2, 2) for _ in range(3)]
    network = nn.ModuleList([nn.Sequential(inner[0]), nn.Sequential(inner[1]), inner[2]])
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "Sequential, Linear")
    found = named_blocks(network)
    assert found.index(inner[0]) < found.index(network[0])
    assert tie_across(network, found) is None
    inner[0].bias = inner[1].bias
    assert tie_across(network, found) == "1.0.bias"
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "Sequential")
    inner[0].bias = nn.Parameter(torch.zeros(2))
    inner[1].bias = inner[2].bias
    assert tie_across(network, named_blocks(network)) == "2.bias"
    network[2] = network[1]  # the same block twice
    assert tie_across(network, named_blocks(network)) is None


def test_the_backend_of_each_launch() -> None:
    assert backend_of({"ACCELERATE_USE_FSDP": "true"}) is FsdpBackend
    assert backend_of({"ACCELERATE_USE_CPU": "true"}) is PlainBackend
    assert backend_of({"ACCELERATE_USE_DEEPSPEED": "true"}) is ZeroBackend
