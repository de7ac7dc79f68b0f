"""--plan and tools/plan.py: what they say is what the run then does, and what cannot be planned is refused in one line."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import RECIPE, ROOT, environment
from tiny_runs import TINY
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from recipes.finetune_lm import Config, FinetuneLM
from recipes.gpt2_wikitext import Gpt2Wikitext
from recipes.vit_relpos import VitRelpos
from trainer.command_line import config as configuration
from trainer.command_line.sections import Optimisation, Run
from trainer.distributed.hardware import card_named
from trainer.errors import UserError
from trainer.evaluation.objective import Objective
from trainer.main import main
from trainer.planning.activations import count_micro_step
from trainer.planning.flags import PlanFlags, take_plan_flags
from trainer.planning.launch import place_of, strategy_of
from trainer.planning.memory import Footprint, MicroStep, memory_of, strategies
from trainer.planning.plan import checkpoint_lines, measure, plan, time_text
from trainer.planning.sizes import save_buffers
from trainer.recipe import Recipe


def planned(recipe: Recipe, argv: list[str], folder: Path, gpu: str | None = None, **environ: str) -> list[str]:
    argv = [*argv, "--output_dir", str(folder / "run")]
    parsed = configuration.parse(recipe.config_class, recipe.presets, argv, recipe.name)
    return plan(recipe, parsed, argv, PlanFlags(gpu, 0.4), environ)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMECURVE_CACHE", str(tmp_path))


def test_the_plan_of_a_tiny_run(tmp_path: Path) -> None:
    steps = ["--batch_size", "8", "--gradient_accumulation_steps", "2", "--max_steps", "50", "--save_every", "10"]
    output = "\n".join(planned(Gpt2Wikitext(), [*TINY["gpt2"][1](tmp_path), *steps], tmp_path, "h100", WORLD_SIZE="4"))
    assert "Launch: DDP, 4 x H100, bf16" in output
    assert "Batch: 2 samples x 4 processes x 2 accumulation = 16 samples per optimizer step" in output
    assert "Plan: 50 optimizer steps = 800 samples = 13.33 epochs of 60" in output
    assert "after 5 steps" in output, "an untyped warm-up is cut to a tenth of the run"
    assert "5 step saves, with keep_last 3 at most 4 of them" in output
    assert "13 of epochs and the best model stay" in output
    assert re.search(r"4 x 80 GB: DDP, 0\.00\d+ of 80 GB; what is cut or offloaded would be slower", output)
    assert "Memory of each process at its highest, in MB:" in output
    assert (tmp_path / "run_learning_rate.png").stat().st_size > 10_000
    assert not (tmp_path / "run").exists(), "nothing is trained"


def test_a_plan_needs_no_place_for_its_picture(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    lines = planned(Gpt2Wikitext(), [*TINY["gpt2"][1](tmp_path), "--max_steps", "50"], tmp_path / "file")
    (optimizer,) = (line for line in lines if line.startswith("Optimizer"))
    assert optimizer.endswith(f"not drawn in {tmp_path}/file/run_learning_rate.png (File exists)")
    assert lines[-1].startswith("1 x"), "the rest is there"


def of_a_billion(accumulates: bool = False, trained: int = 4_000_000_000) -> Footprint:
    count = MicroStep(0, 0, 0.0)
    return Footprint(4_000_000_000, trained, 2 * trained, (0, 0), (0, 0), count, count, accumulates)


def held(net: Footprint) -> dict[str, float]:
    """Gigabytes of weights, gradients and moments of each of 8 processes, on device and host."""
    memories = {strategy.name: memory_of(strategy, net) for strategy in strategies(8)}
    return {name: (m.weights + m.gradients + m.moments + m.host) / 1e9 for name, m in memories.items()}


def test_memory_of_a_billion_parameters_with_adam() -> None:
    """16 bytes a parameter in one piece; ZeRO splits, and has an fp32 master copy more."""
    whole = {"DDP": 16, "ZeRO-1": 9.5, "ZeRO-2": 6, "ZeRO-3": 2.5, "FSDP2": 2, "HSDP, 2 replicas": 4}
    assert held(of_a_billion()) == pytest.approx(whole | {"ZeRO-3, offload": 2.5, "FSDP2, offload": 2})
    assert held(of_a_billion(accumulates=True))["FSDP2"] == pytest.approx(1.5 + 4), "gradients whole until the last micro-step"
    assert memory_of(strategies(8)[-1], of_a_billion()).weights == 0, "on the host"


def test_what_is_frozen_has_neither_gradients_nor_moments() -> None:
    gigabytes = held(of_a_billion(trained=40_000_000))
    assert [gigabytes[name] for name in ("DDP", "ZeRO-3", "FSDP2")] == pytest.approx([4.12, 0.52, 0.515])


def test_gradients_that_come_as_activations_go_take_less() -> None:
    net = Footprint(100, 100, 200, (0, 0), (0, 0), MicroStep(1000, 1010, 0.0), MicroStep(1000, 1010, 0.0), False)
    assert memory_of(strategies(1)[0], net).device == 100 + 200 + 1010
    assert memory_of(strategies(2)[0], net).device == 100 + 200 + 1000 + 100, "DDP keeps its buckets"


class Deep(Recipe[Any]):
    """`Layers` on [batch, 64], whose results are widest where the forward pass ends."""

    name = "deep"

    def loss(self, network: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {"loss": network(batch["x"]).repeat(1, 40).sum()}


class Layers(nn.Module):
    def __init__(self, depth: int, recompute: bool) -> None:
        super().__init__()
        layers = (nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Tanh()) for _ in range(depth))
        self.layers, self.recompute = nn.ModuleList(layers), recompute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
        return x


def counted(depth: int, recompute: bool = False, precision: str = "no") -> tuple[MicroStep, MicroStep]:
    objective = Objective(Layers(depth, recompute), Deep(), ["loss"])
    return count_micro_step(objective, {"x": torch.empty(1024, 64)}, precision, on_gpu=False)


def test_every_layer_adds_what_the_backward_pass_reads_and_its_work() -> None:
    """The results of ReLU and tanh; a matrix product and two in the backward pass."""
    (less, _), (more, _) = counted(8), counted(9)
    assert more.activations - less.activations == 2 * 1024 * 64 * 4
    assert more.flops - less.flops == 6 * 1024 * 64 * 64
    assert more.with_gradients >= more.activations


def test_recomputing_keeps_the_input_of_a_layer_and_works_more() -> None:
    (less, _), (more, _) = counted(8, recompute=True), counted(9, recompute=True)
    assert more.activations - less.activations == 1024 * 64 * 4
    assert more.flops - less.flops == 8 * 1024 * 64 * 64


def test_autocast_keeps_weights_that_are_recomputed_only_where_it_has_a_cache() -> None:
    (less_cached, less), (more_cached, more) = (counted(depth, recompute=True, precision="bf16") for depth in (8, 9))
    layer, weight = 1024 * 64 * 2, 64 * 64 * 2
    assert more.activations - less.activations == layer
    assert more_cached.activations - less_cached.activations == layer + weight


class NextToken(Recipe[Any]):
    """A causal language model of transformers."""

    name = "next_token"

    def loss(self, network: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {"loss": network(input_ids=batch["ids"], use_cache=False).logits.float().sum()}


@pytest.mark.skipif(not hasattr(nn.functional, "grouped_mm"), reason="torch 2.9 counts no groups")
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_row_of_a_mixture_of_experts_counts_for_each_expert_it_goes_to(family: str, precision: str) -> None:
    """Chosen by the router, rows pass three matrices each, in fp32 whatever autocast says; how many experts there are to choose
    from makes the router alone wider."""

    def count(experts: int, chosen: int) -> MicroStep:
        sizes = {"num_local_experts" if family == "mixtral" else "num_experts": experts, "num_experts_per_tok": chosen}
        sizes |= {"intermediate_size": inner, "moe_intermediate_size": inner, "vocab_size": 100, "hidden_size": width}
        sizes |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
        network = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
        batch = {"ids": torch.zeros(2, rows // 2, dtype=torch.int64)}
        return count_micro_step(Objective(network, NextToken(), ["loss"]), batch, precision, on_gpu=False)[0]

    width, inner, rows = 32, 48, 256
    one, two, of_more = count(4, 1), count(4, 2), count(8, 2)
    assert two.flops - one.flops == 6 * rows * 3 * width * inner
    assert of_more.flops - two.flops == 6 * rows * width * 4
    kept = rows * (width + 2 * inner + inner + inner + width) * 4  # into and out of the first product, the gate, the second
    assert kept <= two.activations - one.activations <= 1.2 * kept


@pytest.mark.parametrize("gpu", [None, "h100"])
@pytest.mark.parametrize("name", sorted(TINY))
def test_a_step_of_every_recipe_can_be_counted(name: str, gpu: str | None, tmp_path: Path) -> None:
    module, _, recipe_class = TINY[name][0].partition(":")
    recipe = getattr(importlib.import_module(module), recipe_class)()
    output = planned(recipe, [*TINY[name][1](tmp_path), "--max_steps", "9", "--batch_size", "4"], tmp_path, gpu)
    assert not [line for line in output if "NOT" in line], output
    assert float(next(line for line in output if line.startswith("Work:")).split()[1]) > 0


def test_what_fits_is_advised(tmp_path: Path) -> None:
    """Of a 7B planned from its config.json alone, under the launches that do not hold it too."""
    llama = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008}
    llama |= {"num_hidden_layers": 32, "num_attention_heads": 32}
    (tmp_path / "config.json").write_text(json.dumps(llama))
    argv = ["--init_from", str(tmp_path), "--tokenizer", "train", "--max_length", "2048", "--gradient_checkpointing"]
    output = planned(FinetuneLM(), argv, tmp_path, "h100", WORLD_SIZE="8")
    assert output[-1] == "8 x 80 GB: FSDP2, 21 of 80 GB; DDP takes 123"
    assert "Parameters: 6,738,415,616 (6,738,415,616 trained)" in output
    assert any(line.startswith("Checkpoint: 80.86 GB.") for line in output)


def test_a_plan_of_adapters_reads_no_weights_and_a_run_names_the_folder_that_has_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 512, "num_hidden_layers": 1}))
    argv = ["--init_from", str(tmp_path), "--tokenizer", "train", "--max_length", "64", "--lora_rank", "4"]
    assert "ZeRO" in "".join(planned(FinetuneLM(), argv, tmp_path, WORLD_SIZE="2"))
    config = configuration.parse(Config, {}, [*argv, "--architecture", json.dumps({"model_type": "llama"})], "x").config
    with pytest.raises(ValueError, match=f"--init_from {tmp_path}: holds neither"):
        FinetuneLM().build_data(config)


def test_what_may_be_written() -> None:
    """A save each 100 steps, at the end and after 2 epochs; new bests at 150, 300 - a save - and 450."""
    run = Run(save_every=100, eval_every=150)
    lines = [checkpoint_lines(r, 500, 10, 2500, 10**9, h)[0] for r in (run, replace(run, save_best=False)) for h in (2.0, 0.5)]
    assert ["up to 9.00 GB are written, 4.50 GB an hour" in line for line in lines] == [True, False, False, False]
    assert lines[1].endswith("up to 9.00 GB are written")
    assert lines[2].endswith("up to 7.00 GB are written, 3.50 GB an hour")
    assert "1 step save, " in checkpoint_lines(Run(), 9, 1, None, 1, None)[0]
    assert [time_text(hours) for hours in (2, 0.5, 0.001)] == ["2.0 hours", "30.0 minutes", "3.6 seconds"]


def test_a_batch_to_be_fitted_is_said_to_be_counted_as_typed(tmp_path: Path) -> None:
    argv = [*TINY["gpt2"][1](tmp_path), "--max_steps", "9", "--batch_size", "4"]
    note = "--fit_batch: counted as typed; the run splits its 4 samples a step so that they just fit"
    assert [note in planned(Gpt2Wikitext(), [*argv, *more], tmp_path) for more in ([], ["--fit_batch"])] == [False, True]


def test_what_fits_nowhere_is_told_the_ways_out(tmp_path: Path) -> None:
    argv = [*TINY["vit"][1](tmp_path), "--max_steps", "9", "--batch_size", "4"]
    line = planned(VitRelpos(), argv, tmp_path, "0.0001", WORLD_SIZE="2")[-1]
    assert line.startswith("2 x 0.0001 GB: too little even for ")
    assert "--gradient_checkpointing" in line
    assert "more processes" in line


def test_a_checkpoint_is_dealt_out_in_files() -> None:
    """In turn; torch's page-locked blocks are powers of two."""
    files = [1000, 600, 1000, 700]
    assert [save_buffers(files, n, pinned=False) for n in (1, 2, 3, 8)] == [3300, 2000, 1700, 1000]
    assert save_buffers(files, 2, pinned=True) == 2048


def test_the_files_planned_are_those_written(tmp_path: Path) -> None:
    recipe = Gpt2Wikitext()
    argv = [*TINY["gpt2"][1](tmp_path), "--max_steps", "1", "--batch_size", "4", "--output_dir", str(tmp_path / "run")]
    command = [sys.executable, str(RECIPE), *argv, "--device", "cpu"]
    subprocess.run(command, cwd=ROOT, env=environment(), check=True, capture_output=True, timeout=200)
    saved = str(tmp_path / "run" / "checkpoints" / "checkpoint_final")
    for more in (["--output_dir", str(tmp_path / "run")], ["--output_dir", str(tmp_path / "other"), "--resume_from", saved]):
        output = plan(recipe, configuration.parse(recipe.config_class, {}, more, "x"), more, PlanFlags(None, 0.4), {})
        assert output[1].startswith(f"Resumes {tmp_path / 'run'}")
        assert "Batch: 4 samples" in "".join(output), "its flags"
    config = configuration.parse(recipe.config_class, recipe.presets, argv, recipe.name).config
    files = measure(recipe, config, recipe.build_data(config), strategies(1)[0], "no", on_gpu=False).files
    folder = tmp_path / "run" / "checkpoints" / "checkpoint_final"
    written = [(folder / f"{stem}.safetensors").stat().st_size for stem in ("model", "optimizer")]
    assert files == [written[0], pytest.approx(written[1], abs=200)], "but for the count of steps"


def test_the_launch_is_read_from_its_environment(tmp_path: Path) -> None:
    settings = Optimisation(batch_size=8)
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}
    assert strategy_of(fsdp, settings, 4, "bf16", "auto").name == "FSDP2, offload"
    sizes = {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "3"}
    with pytest.raises(UserError, match="dp_replicate_size 2 x dp_shard_size 3 is not 4 processes"):
        strategy_of(fsdp | sizes | {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, settings, 4, "bf16", "auto")
    with pytest.raises(UserError, match="mixed_precision fp16 is not for FSDP"):
        strategy_of(fsdp, settings, 4, "fp16", "auto")


def test_a_deepspeed_file_that_contradicts_a_flag_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "ds.json"
    zero = {"stage": 2, "reduce_bucket_size": 1000, "offload_optimizer": {"device": "cpu"}}
    file.write_text(json.dumps({"gradient_clipping": 0.5, "zero_optimization": zero}))
    for name, value in (("USE_DEEPSPEED", "true"), ("DEEPSPEED_CONFIG_FILE", str(file))):
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(UserError, match=r"gradient_clipping 0\.5 contradicts --grad_clip"):
        strategy_of(os.environ, Optimisation(), 4, "no", "auto")
    strategy = strategy_of(os.environ, Optimisation(grad_clip=0.5), 4, "no", "auto")
    assert (strategy.name, strategy.buckets["reduce_bucket_size"]) == ("ZeRO-2, offload", 1000)


def test_cards() -> None:
    assert place_of("4090", "auto", {}, 1).gigabytes == 24
    assert place_of("40", "auto", {}, 1).gigabytes == 40
    assert place_of(None, "cpu", {}, 1).gigabytes == pytest.approx(2 * place_of(None, "cpu", {}, 2).gigabytes)
    for gpu in ("h1000", "-5", "0", "nan", "inf"):
        with pytest.raises(UserError, match=f"gpu '{gpu}' is unknown; give its gigabytes, or one of h200"):
            place_of(gpu, "auto", {}, 1)


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("h100-nvl", "H100 NVL"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("RTX 4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L40", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA T400 4GB", None),
    ],
)
def test_a_card_is_known_by_whole_words(name: str, card: str | None) -> None:
    assert card_named(name) == card


def test_flags_of_a_plan_are_no_flags_of_a_run() -> None:
    assert take_plan_flags(["--gpu", "h100"]) == (None, ["--gpu", "h100"]), "refused later, as unknown"
    flags, rest = take_plan_flags(["--lr", "1e-3", "--plan", "--mfu=0.5", "--no_compile"])
    assert (flags, rest) == (PlanFlags(None, 0.5), ["--lr", "1e-3", "--no_compile"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--plan", "--preset", "quick", "--d_modle", "3"], "unknown flag --d_modle"),
        (["--plan", "--gpu"], "--plan --gpu h100"),
        (["--plan", "--mfu", "2"], "mfu 2 is a part of the peak"),
        (["evaluate", "--model_path", "x", "--plan"], "leave the sub-command out"),
        (["--plan", "--preset", "quick", "--gpu", "h1"], "gpu 'h1' is unknown"),
    ],
)
def test_what_cannot_be_planned(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(Gpt2Wikitext(), argv)
    assert caught.value.code == 2
    output = capsys.readouterr().err
    assert message in output
    assert output.count("\n") == 1


def test_a_batch_that_does_not_reach_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="batch_size 16 does not reach for 17 processes"):
        planned(Gpt2Wikitext(), ["--preset", "quick"], tmp_path, WORLD_SIZE="17")


def test_an_optimizer_that_the_launch_would_cut_is_refused(tmp_path: Path) -> None:
    argv = [*TINY["gpt2"][1](tmp_path), "--max_steps", "9", "--optimizer", "muon"]
    with pytest.raises(UserError, match=r"Muon.* needs whole matrices, and FSDP2 cuts them"):
        planned(Gpt2Wikitext(), argv, tmp_path, WORLD_SIZE="2", ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    whole = planned(Gpt2Wikitext(), argv, tmp_path, WORLD_SIZE="2")
    assert not [line for line in whole if line.startswith(("  ZeRO", "  FSDP2"))], "nor offered"


def test_the_tool_reads_the_file_of_the_launcher(tmp_path: Path) -> None:
    """One process stands for all eight."""
    command = [sys.executable, str(ROOT / "tools" / "plan.py"), "--config_file", "accelerate_configs/hsdp.yaml", str(RECIPE)]
    argv = [*TINY["gpt2"][1](tmp_path), "--output_dir", str(tmp_path / "run"), "--max_steps", "9", "--gpu", "a100"]
    done = subprocess.run([*command, *argv], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "Launch: HSDP, 2 replicas, 8 x A100, bf16" in done.stdout
    assert "> HSDP, 2 replicas" in done.stdout


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--num_processes", "2"], "plan: the following arguments are required: training_script"),
        (
            ["--gpu", "h100", "recipes/collatz.py"],
            "plan: unrecognized arguments: --gpu; give the launcher's flags, a recipe's file,",
        ),
    ],
)
def test_the_tool_says_in_one_line_what_the_launcher_cannot_read(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        importlib.import_module("plan").main(argv)
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith(words)
    assert message.count("\n") == 1


def test_the_tool_wants_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    tool = importlib.import_module("plan")
    with pytest.raises(SystemExit) as caught:
        tool.main(["--num_processes", "2", "recipes/none.py"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "plan: recipes/none.py is no file; give a recipe's, such as recipes/gpt2_wikitext.py\n"
