"""The kill campaign itself: it injects what it reports, and detects each kind of damage."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torture
from launching import FAULTY, ROOT, environment

from trainer.backends.tensors import TensorEntry
from trainer.checkpoints import writing


def run(*argv: str, timeout: float = 200) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "torture.py"), *argv]
    env = environment(PYTHONPATH=str(ROOT))
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def test_a_small_campaign_on_any_recipe(tmp_path: Path) -> None:
    flags = ["--max_steps", "60", "--batch_size", "8", "--dropout", "0.1", "--train_rows", "4000"]
    done = run(str(FAULTY), "--kills", "2", "--folder", str(tmp_path), "--", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    table = re.findall(r"^  (.+?) +(\d+)$", done.stdout, re.MULTILINE)
    counts = {name: int(number) for name, number in table}
    assert sum(counts[phase] for phase in torture.PHASES) == 2
    assert [counts[name] for name in ("lost", "different", "hung", "failed", "orphans")] == [0] * 5
    compared = re.search(r"^(\d+) runs came to their end", done.stdout, re.MULTILINE)
    assert compared
    assert int(compared[1]) >= 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["no_such_recipe"], "no_such_recipe.py"),
        (["gpt2_wikitext", "--kills", "0"], "--kills 0"),
        ([str(FAULTY)], "after `--`"),
    ],
)
def test_invalid_arguments_are_reported(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert torture.main(argv) == 2
    assert message in capsys.readouterr().out


def write(directory: Path, step: int, value: float = 0.0) -> Path:
    tensor = torch.full((8,), float(step) + value)
    entry = TensorEntry("w", (8,), torch.float32, lambda _: tensor)
    tensors = {"model": [entry], "optimizer": [entry]}
    return writing.write(directory / "checkpoints", f"checkpoint_step_{step}", tensors, {})


def test_damage_and_rolled_back_checkpoints_are_detected(tmp_path: Path) -> None:
    paths = [write(tmp_path, step) for step in (4, 8)]
    (tmp_path / "checkpoints" / "best_model").symlink_to("checkpoint_step_4")
    good, problems = torture.inspect_checkpoints(tmp_path)
    assert (sorted(good), problems) == ([4, 8], [])
    content = (paths[0] / "model.safetensors").read_bytes()
    (paths[0] / "model.safetensors").write_bytes(content[:-1] + b"\x77")
    (tmp_path / "checkpoints" / "rolled_back_1").mkdir()
    good, problems = torture.inspect_checkpoints(tmp_path)
    assert sorted(good) == [8]
    assert len(problems) == 3  # the checkpoint, the link to it, and what was set aside


def test_one_different_bit_and_a_step_logged_twice_are_detected(tmp_path: Path) -> None:
    campaign = torture.Campaign(FAULTY, "one", [], tmp_path, 0)
    for name, value in (("uninterrupted", 0.0), ("run_1", 0.0), ("run_2", 1e-6), ("run_3", 0.0), ("run_4", 0.0)):
        write(tmp_path / name, 8, value)
        (tmp_path / name / "checkpoints" / "checkpoint_final").symlink_to("checkpoint_step_8")
        row = json.dumps({"step": 8, "time": 1.0, "train/loss": 2.0 if name == "run_4" else 1.0}) + "\n"
        (tmp_path / name / "metrics.jsonl").write_text(row * (2 if name == "run_3" else 1))
        (tmp_path / f"{name}.log").touch()
    for number in (1, 2, 3, 4):
        campaign.compare(tmp_path / f"run_{number}", 0)
    assert [text.partition(":")[0] for text in campaign.tally.different] == ["run_2", "run_3", "run_4"]
    assert campaign.tally.has_problems()
    campaign.compare(tmp_path / "run_2", 1)
    assert len(campaign.tally.failed) == 1


def test_phases_are_derived_from_the_files_of_a_run(tmp_path: Path) -> None:
    since = time.time() - 1
    (tmp_path / "checkpoints").mkdir()
    assert torture.phase(tmp_path, since) == "start-up"
    metrics, row = tmp_path / "metrics.jsonl", {"time": since + 1, "train/loss": 1.0}
    metrics.write_text(json.dumps({**row, "step": 5}) + "\n")
    assert torture.phase(tmp_path, since) == "step"
    assert torture.phase(tmp_path, since + 5) == "start-up"  # of the next launch
    metrics.write_text(json.dumps({**row, "step": torture.EVAL_EVERY}) + "\n")
    assert torture.phase(tmp_path, since) == "inside an evaluation"
    (tmp_path / "checkpoints" / ".unfinished-checkpoint_step_6").mkdir()
    assert torture.phase(tmp_path, since) == "while it is written"
    shutil.rmtree(tmp_path / "checkpoints" / ".unfinished-checkpoint_step_6")
    (tmp_path / "copying").touch()
    assert torture.phase(tmp_path, since) == "inside the copy"
    assert torture.phase(tmp_path, time.time() + 5) == "start-up"  # left by a launch that was killed there
    (tmp_path / "copying").unlink()
    checkpoint = write(tmp_path, 6)
    for best_step, phase in ((3, "inside an evaluation"), (6, "before its links")):
        state = {"train_state": {"step": 6, "best_step": best_step}}
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
        assert torture.phase(tmp_path, since) == phase
    (tmp_path / "checkpoints" / "best_model").symlink_to(checkpoint.name)
    assert torture.phase(tmp_path, since) == "inside an evaluation"
    (tmp_path / "status.json").write_text(json.dumps({"state": "finished"}))
    assert torture.phase(tmp_path, since) == "after the last step"
