"""Mistakes of users, typed as commands: the exit status, a one-line error with the problem and the remedy, no traceback."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest
from launching import RECIPE, ROOT, environment, obey_permissions, run_in_turn

from trainer.errors import BAD_INPUT, CHECKPOINT, FINISHED

RUN = "--tokenizer train --vocab_size 300 --d_model 16 --num_layers 1 --num_heads 2 --max_length 32 --batch_size 4"
RUN += " --max_steps 4 --save_every 2 --eval_every 0 --num_workers 0 --no_use_tensorboard --device cpu"
GOOD = [*RUN.split(), "--data_dir", "text", "--output_dir", "good"]


def changed(*flags: str, output_dir: str = "new") -> list[str]:
    """The good command with other flags, into a directory of its own."""
    return [*GOOD, "--output_dir", output_dir, *flags]


CASES: dict[str, tuple[list[str], int, list[str]]] = {
    # Limits of time
    "no hours": (changed("--max_training_hours", "0"), BAD_INPUT, ["max_training_hours 0"]),
    "negative hours": (changed("--max_training_hours", "-1"), BAD_INPUT, ["max_training_hours -1"]),
    "nan hours": (changed("--max_training_hours", "nan"), BAD_INPUT, ["max_training_hours nan"]),
    "8h": (changed("--max_training_hours", "8h"), BAD_INPUT, ["max_training_hours", "8h"]),
    # Names
    "unknown flag": (changed("--d_modle", "4"), BAD_INPUT, ["--d_modle", "d_model"]),
    "unknown sub-command": (["trian"], BAD_INPUT, ["trian", "train"]),
    "cuda": (changed("--device", "cuda"), BAD_INPUT, ["device cuda", "--device cpu"]),
    # YAML
    "yaml key": (changed("--config", "key.yaml"), BAD_INPUT, ["key.yaml", "dropuot", "dropout"]),
    "yaml twice": (changed("--config", "twice.yaml"), BAD_INPUT, ["twice.yaml", "dropout"]),
    "yaml type": (changed("--config", "type.yaml"), BAD_INPUT, ["dropout", "much"]),
    "yaml tab": (changed("--config", "tab.yaml"), BAD_INPUT, ["tab.yaml, line 2"]),
    "yaml bytes": (changed("--config", "bytes.yaml"), BAD_INPUT, ["bytes.yaml", "UTF-8"]),
    "yaml tag": (changed("--config", "tag.yaml"), BAD_INPUT, ["tag.yaml", "python/object"]),
    # Data
    "no such folder": (changed("--data_dir", "nowhere"), BAD_INPUT, ["nowhere"]),
    "empty file": (changed("--data_dir", "empty"), BAD_INPUT, ["train.txt"]),
    "not text": (changed("--data_dir", "binary"), BAD_INPUT, ["train.txt", "UTF-8"]),
    "tokenizer": (changed("--tokenizer", "text/train.txt"), BAD_INPUT, ["text/train.txt"]),
    # Where it is to go
    "below a file": (changed(output_dir="text/train.txt/run"), CHECKPOINT, ["cannot write", "--output_dir"]),
    "read-only checkpoints": (changed("--checkpoint_dir", "/proc/here"), CHECKPOINT, ["cannot write", "--checkpoint_dir"]),
    # Resuming
    "another model": (
        [*GOOD, "--d_model", "32", "--dropout", "0.2"],
        BAD_INPUT,
        ["d_model: checkpoint_step_4 has 16, asked for 32", "dropout: checkpoint_step_4 has 0.1, asked for 0.2", "--init_from"],
    ),
    "another seed": ([*GOOD, "--seed", "1"], BAD_INPUT, ["seed", "has 42, asked for 1", "--run_name"]),
    "another effective batch": ([*GOOD, "--batch_size", "8"], BAD_INPUT, ["4 x 1 = 4", "8 x 1 = 8"]),
    "other data": ([*GOOD, "--output_dir", "replaced"], BAD_INPUT, ["data fingerprint", "--init_from"]),
    "no such checkpoint": (
        [*GOOD, "--resume_from", "checkpoint_step_9"],
        BAD_INPUT,
        ["checkpoint_step_9", "checkpoint_step_2"],
    ),
    "damaged checkpoint": (changed("--resume_from", "damaged"), CHECKPOINT, ["damaged: model.safetensors", "hash"]),
    "newer format": (changed("--resume_from", "newer"), CHECKPOINT, ["checkpoint format 7", "update samecurve"]),
    "index elsewhere": (changed("--resume_from", "elsewhere"), CHECKPOINT, ["'../model.safetensors'", "manifest"]),
    "in use": ([*GOOD, "--output_dir", "held"], BAD_INPUT, [f"in use by process {os.getpid()} on", "started", "--run_name"]),
    # No mistakes
    "finished already": (GOOD, FINISHED, ["Already finished (last step) at step 4"]),
    "smaller than a batch": (changed("--batch_size", "512", "--max_steps", "1"), FINISHED, ["Finished at step 1"]),
    "shorter than a window": (changed("--data_dir", "short", output_dir="short_run"), FINISHED, ["Finished at step 4"]),
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """{case: (exit status, output)}."""
    from trainer.reporting.lock import Lock

    folder = tmp_path_factory.mktemp("bad")
    words = ["the", "quality", "of", "mercy", "is", "not", "strained", "it", "droppeth", "as", "gentle", "rain"]
    for name, rows in (("text", 60), ("short", 1), ("other", 60)):
        (folder / name).mkdir()
        for split in ("train", "validation", "test"):
            picked = words[1:] if name == "other" else words
            lines = (" ".join(picked[(i * i + 5 * k) % len(picked)] for k in range(12)) for i in range(rows))
            (folder / name / f"{split}.txt").write_text("\n".join(lines) + "\n")
    for name, content in (("empty", b""), ("binary", b"\xff\xfe\x00\x01" * 9)):
        shutil.copytree(folder / "text", folder / name)
        (folder / name / "train.txt").write_bytes(content)
    yaml = {
        "key": b"dropuot: 0\n",
        "twice": b"dropout: 0\ndropout: 0\n",
        "type": b"dropout: much\n",
        "tab": b"model:\n\td_ff: 4\n",
    }
    yaml |= {"bytes": b"run_name: \xff\n", "tag": b"run_name: !!python/object/apply:os.system ['true']\n"}
    for name, content in yaml.items():
        (folder / f"{name}.yaml").write_bytes(content)
    env = environment(SAMECURVE_CACHE=str(folder / "cache"), CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")
    (folder / "first").mkdir()
    (folder / "first" / "text").symlink_to("../text")
    good = run_in_turn(RECIPE, {"good": GOOD}, folder / "first", env)["good"]
    assert good[0] == FINISHED, good[1]

    for name in ("good", "replaced"):
        shutil.copytree(folder / "first" / "good", folder / name, symlinks=True)
    newest = folder / "good" / "checkpoints" / "checkpoint_step_4"
    for name in ("damaged", "newer", "elsewhere"):
        shutil.copytree(newest, folder / name)
    weights = folder / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    manifest = json.loads((newest / "manifest.json").read_text())
    (folder / "newer" / "manifest.json").write_text(json.dumps({**manifest, "format": 7}))
    manifest["files"]["../model.safetensors"] = manifest["files"].pop("model.safetensors")
    (folder / "elsewhere" / "manifest.json").write_text(json.dumps(manifest))
    lock = Lock(folder / "held")
    lock.path.parent.mkdir()
    lock.acquire()
    try:
        lines = {name: argv for name, (argv, _, _) in CASES.items() if name != "other data"}
        results = run_in_turn(RECIPE, lines, folder, env)
    finally:
        lock.release()
    # The same path, other words: the file was replaced between two runs.
    (folder / "later").mkdir()
    (folder / "later" / "text").symlink_to("../other")
    (folder / "later" / "replaced").symlink_to("../replaced")
    return {**results, **run_in_turn(RECIPE, {"other data": CASES["other data"][0]}, folder / "later", env)}


@pytest.mark.parametrize("name", CASES)
def test_the_error_names_the_problem_and_the_remedy(name: str, outputs: dict[str, tuple[int, str]]) -> None:
    _, expected, parts = CASES[name]
    code, text = outputs[name]
    assert code == expected, text
    assert "Traceback" not in text
    if expected == FINISHED:
        shown = text
    else:
        errors = re.findall(r"^error: .*$", text, re.MULTILINE)
        assert len(errors) == 1, text
        assert text.rstrip().endswith(errors[0])  # the last thing that is read, in one line
        shown = errors[0]
    for part in parts:
        assert part in shown, shown


FORBIDDEN: dict[str, tuple[list[str], str, list[str]]] = {
    "run directory": (["--output_dir", "run"], "run", ["run", "Permission denied"]),
    "its checkpoints": (["--output_dir", "run"], "run/checkpoints", ["run/checkpoints", "Permission denied"]),
    "its lock": (["--output_dir", "run"], "run/.lock", ["run/.lock", "Permission denied"]),
    "parent of it": (["--output_dir", "parent/run"], "parent", ["parent/run", "Permission denied"]),
    "parent of resume_from": (["--output_dir", "a", "--resume_from", "parent/x"], "parent", ["parent/x", "Permission denied"]),
    "config": (["--output_dir", "b", "--config", "mine.yaml"], "mine.yaml", ["mine.yaml", "Permission denied"]),
    "nobody's home": (["--output_dir", "c", "--resume_from", "~nobody-of-that-name/x"], "", ["home directory", "HOME"]),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_may_not_be_read_is_named_in_one_line(name: str, forbidden: dict[str, tuple[int, str]]) -> None:
    code, text = forbidden[name]
    errors = re.findall(r"^error: .*$", text, re.MULTILINE)
    assert "Traceback" not in text
    assert len(errors) == 1, text
    assert code == (BAD_INPUT if name in ("config", "nobody's home") else CHECKPOINT), text
    for part in FORBIDDEN[name][2]:
        assert part in errors[0]


@pytest.fixture(scope="module")
def forbidden(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """{case: (exit status, output)}, each where one path has the mode 0."""
    folder, toy = tmp_path_factory.mktemp("forbidden"), ROOT / "tests" / "toy_recipe.py"
    short = ["--device", "cpu", "--max_steps", "2"]
    (folder / "parent").mkdir()
    (folder / "mine.yaml").write_text("width: 8\n")
    driven = {"first": [*short, "--output_dir", "run"]}
    for name, (argv, path, _) in FORBIDDEN.items():
        driven |= {f"forbid {name}": ["chmod", path, "0"], name: [*short, *argv], f"allow {name}": ["chmod", path, "0o755"]}
    script = folder / "toy.py"
    script.write_text(CHMOD_OR_TRAIN.format(toy=str(toy)))
    results = run_in_turn(script, driven, folder, environment(CUDA_VISIBLE_DEVICES=""), obey_permissions)
    assert results["first"][0] == FINISHED, results["first"][1]
    return results


# The modes change in between, in the one process that pays the imports.
CHMOD_OR_TRAIN = """
import os, runpy, sys
if sys.argv[1] == "chmod":
    if sys.argv[2]:
        os.chmod(sys.argv[2], int(sys.argv[3], 0))
else:
    sys.path.insert(0, os.path.dirname({toy!r}))
    runpy.run_path({toy!r}, run_name="__main__")
"""
