"""tools/plan.py: its plan is what the run then does, and what cannot be planned is refused in one line."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from launching import RECIPE, ROOT
from tiny_runs import TINY

spec = importlib.util.spec_from_file_location("plan", ROOT / "tools" / "plan.py")
assert spec is not None
assert spec.loader is not None
plan = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plan)


def test_the_plan_of_a_tiny_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SAMECURVE_CACHE", str(tmp_path))
    steps = ["--batch_size", "8", "--gradient_accumulation_steps", "2", "--max_steps", "50", "--save_every", "10"]
    plan.main([str(RECIPE), "--processes", "4", "--", *TINY["gpt2"][1](tmp_path), *steps])
    output = capsys.readouterr().out
    assert "Batch: 2 samples x 4 processes x 2 accumulation = 16 samples per optimizer step" in output
    assert "Plan: 50 optimizer steps = 800 samples = 13.33 epochs of 60" in output
    assert "after 5 steps" in output, "an untyped warm-up is cut to a tenth of the run"
    assert "5 step saves, with keep_last 3 at most 4 of them" in output
    assert "13 of epochs and the best model stay" in output


def test_memory_of_a_billion_parameters_with_adam() -> None:
    """16 bytes a parameter in one piece; ZeRO-3 splits all of it, and an fp32 master copy more."""
    gigabytes = {name: plan.bytes_of_state(10**9, 10**9, 2, name, 8, False) / 1e9 for name in plan.LAUNCHES}
    assert gigabytes == pytest.approx(
        {"one process or DDP": 16, "ZeRO-1": 9.5, "ZeRO-2": 6, "ZeRO-3": 2.5, "FSDP2": 2, "HSDP, 2 replicas": 4}
    )
    assert plan.bytes_of_state(10**9, 10**9, 2, "FSDP2", 8, True) / 1e9 == pytest.approx(5.5)


def test_what_is_frozen_has_neither_gradients_nor_moments() -> None:
    gigabytes = [plan.bytes_of_state(10**9, 10**7, 2, name, 8, False) / 1e9 for name in (plan.LAUNCHES[0], "ZeRO-3", "FSDP2")]
    assert gigabytes == pytest.approx([4 + 0.12, 0.5 + 0.02, 0.5 + 0.015])


def test_a_model_of_seven_billion_is_for_fsdp_on_eight_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Planned from its config.json alone."""
    monkeypatch.setenv("SAMECURVE_CACHE", str(tmp_path))
    llama = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008}
    llama |= {"num_hidden_layers": 32, "num_attention_heads": 32}
    (tmp_path / "config.json").write_text(json.dumps(llama))
    argv = [str(ROOT / "recipes" / "finetune_lm.py"), "--processes", "8", "--gpu_gb"]
    flags = ["--", "--init_from", str(tmp_path), "--tokenizer", "train", "--max_length", "256"]
    for gpu_gb, more, line in (
        ("80", [], "8 x 80 GB: FSDP2, 13 of 80 GB, and activations"),
        ("80", ["--lora_rank", "8"], "8 x 80 GB: one process or DDP, 27 of 80 GB, and activations"),
        ("16", [], "8 x 16 GB: too little even for FSDP2 (13 GB each); take more processes"),
    ):
        plan.main([*argv, gpu_gb, *flags, *more])
        assert line in capsys.readouterr().out


def test_a_checkpoint_is_dealt_out_in_files() -> None:
    """Of weights and two moments: 1.5 + 3 GB are files of 1, 0.5, 1, 1 and 1 GB."""
    assert [plan.largest_share(1_500_000_000, 3_000_000_000, n) / 1e9 for n in (1, 2, 3, 8)] == [4.5, 3.0, 2.0, 1.0]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["recipes/none.py"], "recipes/none.py is no file"),
        ([str(ROOT / "trainer" / "optimisation" / "schedule.py")], "defines 0 recipes"),
        ([str(RECIPE), "--processes", "17", "--", "--preset", "quick"], "batch_size 16 does not reach for 17 processes"),
        ([str(RECIPE), "--processes", "0", "--", "--preset", "quick"], "processes 0 must be at least 1"),
        ([str(RECIPE), "--", "--d_modle", "3"], "unknown flag --d_modle"),
    ],
)
def test_what_cannot_be_planned(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        plan.main(argv)
    assert caught.value.code == 2
    output = capsys.readouterr().err
    assert message in output
    assert output.count("\n") == 1
