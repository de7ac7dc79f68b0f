"""The fine-tuning recipe as a user types it: trained, measured, asked; its errors in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from launching import ROOT, environment, run_in_turn
from tiny_models import model_folder, rows_folder

SCRIPT = ROOT / "recipes" / "finetune_lm.py"
SHORT = ["--max_length", "32", "--max_steps", "4", "--batch_size", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[int, str]]]:
    """(folder, {name: (exit status, output)}) of command lines, in turn."""
    folder = tmp_path_factory.mktemp("finetune")
    rows, chat = rows_folder(folder / "rows"), model_folder("llama", folder / "chat", chat=True)
    lora = ["--init_from", str(chat), "--data_dir", str(rows), *SHORT, "--lora_rank", "2", "--lr", "1e-2", "--run_name", "lora"]
    lines = {
        "quick": ["--preset", "quick", *SHORT, "--samples", "2", "--run_name", "quick"],
        "evaluate": ["evaluate", "--model_path", "runs/finetune_lm/quick/checkpoints/best_model", "--device", "cpu"],
        "lora": lora,
        "again": lora,
        "ask": ["generate", "--prompt", "river", "--temperature", "0", "--max_new_tokens", "5", "--device", "cpu"],
        "on from quick": ["--init_from", "runs/finetune_lm/quick/checkpoints/best_model", *SHORT, "--max_steps", "1"],
        "no model": [*SHORT],
        "another rank": ["--init_from", "runs/finetune_lm/lora/checkpoints/best_model", *SHORT, "--lora_rank", "3"],
        "no test rows": ["evaluate", "--split", "test", "--device", "cpu"],
        "long prompt": ["generate", "--prompt", "river " * 80, "--device", "cpu"],
    }
    return folder, run_in_turn(SCRIPT, lines, folder, environment(SAMECURVE_CACHE=str(folder / "cache"), HF_HUB_OFFLINE="1"))


def test_the_quick_preset_shows_answers_before_and_after(outputs: tuple[Path, dict[str, tuple[int, str]]]) -> None:
    code, text = outputs[1]["quick"]
    assert code == 0, text
    assert "Initial weights from tiny" in text
    assert re.search(r"validation: Kneser-Ney bigram on the same tokens has [12]\.\d{4} nats per predicted token", text)
    for name in ("given: Question: ", "reference: ", "before: ", "after: "):
        assert text.count(name) == 2, name


def test_evaluate_gives_the_loss_of_training_and_counts_predicted_tokens_alone(
    outputs: tuple[Path, dict[str, tuple[int, str]]],
) -> None:
    folder, texts = outputs
    code, text = texts["evaluate"]
    assert code == 0, text
    measured = re.search(r"validation: ([\d.]+) nats per predicted token", text)
    rows = [json.loads(row) for row in (folder / "runs/finetune_lm/quick/metrics.jsonl").read_text().splitlines()]
    assert measured is not None
    assert float(measured[1]) == pytest.approx(rows[-1]["final/val_loss"], abs=1e-4)


def test_an_adapter_is_trained_resumed_and_asked_through_the_chat_template(
    outputs: tuple[Path, dict[str, tuple[int, str]]],
) -> None:
    folder, texts = outputs
    assert texts["lora"][0] == 0, texts["lora"][1]
    assert re.search(r"Parameters: [\d,]+ \(\d,\d{3} trained\)", texts["lora"][1])
    assert "Already finished" in texts["again"][1]
    saved = folder / "runs/finetune_lm/lora/checkpoints/best_model"
    assert (saved / "chat_template.jinja").is_file()
    assert not (saved / "config.json").exists(), "transformers would open adapters as a network, and make up the rest"
    code, text = texts["ask"]
    assert code == 0, text
    assert "\nriver" in text
    assert "<|user|>" not in text


def test_a_model_goes_on_from_a_checkpoint(outputs: tuple[Path, dict[str, tuple[int, str]]]) -> None:
    code, text = outputs[1]["on from quick"]
    assert code == 0, text
    assert re.search("Initial weights from .*runs/finetune_lm/quick/checkpoints/best_model", text)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no model", "no model is named; give --init_from"),
        ("another rank", "lora_rank: "),
        ("no test rows", "has no test text; give --split validation"),
        ("long prompt", "tokens, and the model reads"),
    ],
)
def test_errors_are_one_line(name: str, words: str, outputs: tuple[Path, dict[str, tuple[int, str]]]) -> None:
    code, text = outputs[1][name]
    assert code == 2, text
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert words in errors[0]
