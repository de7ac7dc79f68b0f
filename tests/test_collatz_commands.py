"""The Collatz recipe as it is used: started, its status requested, stopped, resumed, used for predictions."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from launching import DRIVER, ROOT, environment
from PIL import Image

from trainer.errors import BAD_INPUT

RECIPE = ROOT / "recipes" / "collatz.py"
SMALL = ["--d_model", "16", "--num_layers", "1", "--nhead", "2", "--d_ff", "16", "--max_len", "90", "--prefix_len", "30"]
SMALL += ["--val_numbers", "200", "--batch", "4", "--num_workers", "0", "--log_every", "10", "--device", "cpu", "--lr", "1e-3"]
TRAIN = ["train", *SMALL, "--run_name", "typed"]
OF_TARGET = ["--model_path", "runs/collatz/target/checkpoints/best_model"]
HUGE = str(3**7000)
SCRIPT = {
    "nothing trained": ["predict", "27"],
    "target": ["train", *SMALL, "--run_name", "target", "--target_loss", "100", "--log_every", "3", "--curriculum"],
    "digits": ["train", *SMALL, "--input", "digits", "--steps", "30", "--run_name", "digits", "--mixed_precision", "bf16"],
    "guide mode": ["train", *SMALL, "--mode", "guide", "--steps", "2", "--gradient_checkpointing"],
    "predict": [
        "predict",
        "27",
        "837799",
        "1",
        "16",
        str(2**100 - 1),
        HUGE,
        "--model_path",
        "runs/collatz/target/checkpoints/best_model",
    ],
    "predict by digits": ["predict", "16", "27", HUGE, "--model_path", "runs/collatz/digits/checkpoints/checkpoint_final"],
    **{f"predict {word}": ["predict", "27", word] for word in ("0", "-5", "abc", "1.5", "9" * 20_000, "")},
    "predict nothing": ["predict"],
    "analyse": ["analyse", "--numbers", "300", "--model_path", "runs/collatz/digits/checkpoints/checkpoint_final"],
    "analyse too few": ["analyse", "--numbers", "1"],
    "bad start": ["train", *SMALL, "--start", "1"],
    "bad prefix": ["train", *SMALL, "--prefix_len", "90"],
    "bad weights": ["train", *SMALL, "--stopping_weight", "-2"],
    "bad share": ["train", *SMALL, "--hard_fraction", "1.2"],
    "huge start": ["train", *SMALL, "--start", "9" * 400],
}


def wait_for(log: Path, text: str, process: subprocess.Popen[bytes]) -> None:
    """Until a line of the log holds `text`."""
    for _ in range(1200):
        if text in log.read_text():
            return
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.05)
    raise AssertionError(f"no {text!r} in a minute:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A folder in which a run was started, stopped and resumed by typing, and then SCRIPT."""
    folder = tmp_path_factory.mktemp("collatz")
    env = environment(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    logs = []
    for number in range(2):
        logs.append(folder / f"launch{number}.log")
        with logs[-1].open("wb") as out:
            command = [sys.executable, "-u", str(RECIPE), *TRAIN]
            process = subprocess.Popen(
                command, cwd=folder, env=env, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT
            )
        assert process.stdin
        try:
            wait_for(logs[-1], "Step ", process)
            process.stdin.write(b"status\n")
            process.stdin.flush()
            wait_for(logs[-1], "h trained", process)
            process.stdin.write(b"stop\n")
            process.stdin.close()
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()
            process.wait()
    (folder / "logs").mkdir()
    commands = json.dumps(list(SCRIPT.values()))
    command = [sys.executable, "-c", DRIVER, str(RECIPE), str(folder / "logs"), commands]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, stdin=subprocess.DEVNULL, timeout=200)
    assert (folder / "logs" / "codes.json").exists(), done.stderr.decode()[-3000:]
    codes = json.loads((folder / "logs" / "codes.json").read_text())
    outputs = [(folder / "logs" / f"{number}.log").read_text() for number in range(len(SCRIPT))]
    return SimpleNamespace(
        folder=folder,
        launches=[log.read_text() for log in logs],
        outputs=dict(zip(SCRIPT, zip(codes, outputs, strict=True), strict=True)),
    )


def output(place: SimpleNamespace, name: str, code: int = 0) -> str:
    exit_code, text = place.outputs[name]
    assert exit_code == code, text[-3000:]
    assert "Traceback" not in text
    return text


def test_status_stop_and_resume(place: SimpleNamespace) -> None:
    first, second = place.launches
    steps = []
    for text in (first, second):
        assert "of 1,000,000;" in text  # the output of `status`
        line = next(line for line in text.splitlines() if ": stop_typed. Checkpoint: " in line)
        steps.append(int(line.split()[3].rstrip(":").replace(",", "")))
        assert f"model_step_{steps[-1]}" in line
        assert "Loss: " in text
        assert " | LR: 1.00e-03 | Time: " in text
    assert "Loading checkpoint:" not in first
    assert f"Loading checkpoint: runs/collatz/typed/checkpoints/model_step_{steps[0]}\nResumed from step {steps[0]}\n" in second
    assert steps[1] > steps[0] > 0


def test_a_target_ends_the_run_with_a_message(place: SimpleNamespace) -> None:
    text = output(place, "target")
    assert "Target loss reached!\n" in text
    assert "Finished at step 1: target loss" in text
    assert (place.folder / "runs" / "collatz" / "target" / "checkpoints" / "checkpoint_final").is_symlink()


def test_a_finished_run_shows_its_metrics_beside_the_baselines(place: SimpleNamespace) -> None:
    text = output(place, "digits")
    for part in ("first-order rule", "10.43 ln n", "mean of the magnitude", "Training loss:", "left out", "cut"):
        assert part in text, part
    run = place.folder / "runs" / "collatz" / "digits"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = {name for row in rows for name in row}
    assert names >= {"eval/val_loss", "eval/val_rule", "eval/val_stop_magnitude", "final/val_mae", "train/loss_stop"}
    assert (run / "plots" / "loss.png").stat().st_size > 1000


def test_guide_mode_warns_that_it_leaks(place: SimpleNamespace) -> None:
    lines = [line for line in output(place, "guide mode").splitlines() if "leaks" in line]
    assert len(lines) == 1


def test_predict_prints_true_and_predicted(place: SimpleNamespace) -> None:
    lines = output(place, "predict").splitlines()
    assert len(lines) == 6
    for line, start in zip(lines, ("27: 111 steps", "837799: 524 steps", "1: 0 steps", "16: 4 steps"), strict=False):
        assert line.startswith(start)
    assert lines[4].startswith(f"{2**100 - 1}: 1465 steps; predicted ")
    assert lines[5].startswith(f"{HUGE[:20]}...{HUGE[-20:]} ({len(HUGE):,} digits): ")
    for number, line in enumerate(lines):
        assert ("not predicted" in line) == (number in (2, 3))
        assert "10.43 ln n" in line
    digits = output(place, "predict by digits").splitlines()
    assert "predicted " in digits[0]
    assert "not predicted" not in digits[0] + digits[1]
    assert "not predicted, the model reads at most 128 binary digits" in digits[2]


@pytest.mark.parametrize("name", [name for name, argv in SCRIPT.items() if name.startswith("predict ") and name[8:9] != "b"])
def test_predict_refuses_what_is_no_number_in_one_line(place: SimpleNamespace, name: str) -> None:
    (line,) = output(place, name, BAD_INPUT).splitlines()
    assert line.startswith("error: ")
    assert len(line) < 200


def test_analyse_measures_and_draws(place: SimpleNamespace) -> None:
    text = output(place, "analyse")
    assert "on 300 numbers held out of training" in text
    assert "mean error in steps by binary digits" in text
    pictures = [line.removeprefix("Picture: ") for line in text.splitlines() if line.startswith("Picture: ")]
    assert [Path(path).name for path in pictures] == [f"collatz_{n}.png" for n in ("errors", "confusion", "states")]
    for path in pictures:
        with Image.open(place.folder / path) as picture:
            assert min(picture.size) > 300


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("nothing trained", "best_model"),
        ("analyse too few", "--numbers: 1"),
        ("bad start", "start 1 "),
        ("bad prefix", "prefix_len 90"),
        ("bad weights", "stopping_weight"),
        ("bad share", "hard_fraction 1.2"),
        ("huge start", "start 9999"),
    ],
)
def test_bad_input_is_one_line(place: SimpleNamespace, name: str, word: str) -> None:
    lines = [line for line in output(place, name, BAD_INPUT).splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert word in lines[0]


def test_the_command_line_needs_no_torch() -> None:
    script = "import recipes.collatz, sys; print(sorted({'torch', 'numba', 'matplotlib'} & set(sys.modules)))"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr
