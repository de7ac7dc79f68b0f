"""The recipe in CONTRIBUTING.md trains, and common mistakes in a recipe give a clear error."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, environment
from launching import run as launched

RECIPE = re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)[1]  # type: ignore[index]
FLAGS = ["--device", "cpu", "--max_steps", "40", "--learning_rate", "0.1", "--log_every", "20", "--num_workers", "1"]


def run(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    (folder / "line.py").write_text(text)
    command = [sys.executable, str(folder / "line.py"), *FLAGS, "--output_dir", str(folder / "run")]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=100, check=False)


def test_the_example_trains(tmp_path: Path) -> None:
    done = run(tmp_path, RECIPE)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"val_loss: ([\d.]+)", done.stdout)]
    assert losses[-1] < 0.1
    assert "Finished at step 40" in done.stdout
    text = launched("fsdp", tmp_path / "line.py", *FLAGS, "--output_dir", str(tmp_path / "fsdp"), log=tmp_path / "log")
    assert "FSDP gathers all of Linear at once: it names no blocks in _no_split_modules" in text
    assert re.findall(r"val_loss: ([\d.]+)", text) == re.findall(r"val_loss: ([\d.]+)", done.stdout)


@pytest.mark.parametrize(
    ("kind", "why"),
    [("ddp", "DDP waits for each gradient")]
    + [(kind, "ZeRO would take zeros for their gradients") for kind in ("zero1", "zero2", "zero3")],
)
def test_a_parameter_without_gradient_is_named(kind: str, why: str, tmp_path: Path) -> None:
    network = "torch.nn.Linear(config.model.d_model, 1)"
    spare = RECIPE.replace(
        f"return {network}", f"network = {network}\n        network.spare = torch.nn.Linear(2, 2)\n        return network"
    )
    (tmp_path / "line.py").write_text(spare)
    arguments = [*FLAGS, "--output_dir", str(tmp_path / "run")]
    text = launched(kind, tmp_path / "line.py", *arguments, log=tmp_path / "log", expect=1)
    assert f"the loss of the last micro-batch does not depend on spare.weight, spare.bias, and {why}" in text
    assert "line.py" not in text.partition("error: ")[0].partition("Optimizer:")[2]  # a line, before what the launcher says
    assert not list(tmp_path.glob("run/checkpoints/checkpoint_step_*"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('return {"error": len', 'return {"mistake": len', "loss gives the terms error, items counts mistake"),
        (
            "    def loss(",
            '    def measure(self, network: Any, batch: Any) -> Any:\n        return {"size": (1.0, 1.0)}\n\n    def loss(',
            "measure gives size without error; give the loss terms as well",
        ),
        ('{"val": Line', '{"dev": Line', "val_loss is to be watched, but the evaluation sets are called dev"),
        ('name = "line"', 'name = "line"\n    best_metric = "val_accuracy"', "eval/val_accuracy is to be watched, but"),
        ("self.x[[number % len(self) for number in numbers]]", "self.x[list(numbers)]", ", epoch 1: take number % len"),
        ("def __getitems__", "def __getitem__", "the train set, a Line, lacks __getitems__"),
        (".square().sum()}", ".square()}", "loss gives error as [8]; sum it over the batch"),
        ('fingerprint=f"line {x.sum()}"', 'fingerprint=""', "build_data gives no fingerprint"),
        ('if __name__ == "__main__":', "if True:", "must stand below `if __name__"),
    ],
)
def test_a_mistake_is_reported(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in RECIPE
    done = run(tmp_path, RECIPE.replace(old, new))
    assert done.returncode != 0
    assert message in done.stderr
    steps = sorted(path.name for path in tmp_path.glob("run/checkpoints/checkpoint_step_*"))
    assert steps == (["checkpoint_step_8"] if "best_metric" in new else [])  # whose steps are not lost
