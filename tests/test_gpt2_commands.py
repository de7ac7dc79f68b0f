"""Every documented command of the GPT-2 recipe, and the use of a trained run."""

import json
import math
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from launching import RECIPE, environment, run_in_turn
from safetensors.torch import load_file
from torch import Tensor

from recipes.commands.language_model import trained_network
from recipes.commands.text_language_model import Evaluate, Generate, generate
from recipes.data.text import Text, TokenSplit
from recipes.data.token_samples import TokenBlocks
from recipes.gpt2_wikitext import Config, Gpt2Wikitext
from recipes.models.next_token_loss import next_token_loss
from trainer.checkpoints.checkpoint import Checkpoint
from trainer.checkpoints.network import evaluate_objective
from trainer.command_line import config as configuration
from trainer.command_line.config import Parsed
from trainer.distributed.control import Control
from trainer.distributed.launch import Launch
from trainer.errors import BAD_INPUT, UserError
from trainer.evaluation.objective import Objective
from trainer.main import read_command_line
from trainer.recipe import Data

DOCUMENTED = r"""
python recipes/gpt2_wikitext.py train --max_training_hours 8.0
python recipes/gpt2_wikitext.py train --max_training_hours 2.0
python recipes/gpt2_wikitext.py train \
    --resume_from checkpoints/checkpoint_epoch_5.pth
python recipes/gpt2_wikitext.py train
python recipes/gpt2_wikitext.py train --max_training_hours 10.0
python recipes/gpt2_wikitext.py train \
    --max_epochs 20 \
    --max_training_hours 12.0 \
    --batch_size 16 \
    --learning_rate 5e-4 \
    --d_model 1024 \
    --num_layers 16 \
    --checkpoint_dir my_checkpoints
python recipes/gpt2_wikitext.py train \
    --d_model 512 \
    --num_layers 6 \
    --num_heads 8 \
    --d_ff 2048 \
    --batch_size 16
python recipes/gpt2_wikitext.py train \
    --d_model 1024 \
    --num_layers 24 \
    --num_heads 16 \
    --d_ff 4096 \
    --batch_size 4
python recipes/gpt2_wikitext.py evaluate \
    --model_path checkpoints/best_model.pth
"""
COMMANDS = [shlex.split(line)[2:] for line in DOCUMENTED.replace("\\\n", " ").strip().splitlines()]
TRAIN = [argv for argv in COMMANDS if argv[0] == "train"]
SMALL = next(argv for argv in TRAIN if "512" in argv)

TEXT = ["--data_dir", "text", "--tokenizer", "train", "--vocab_size", "300"]
TINY = [*TEXT, "--max_length", "32", "--num_workers", "0", "--device", "cpu"]
MODEL = ["--d_model", "32", "--num_layers", "1", "--num_heads", "2", "--d_ff", "64", "--dropout", "0"]
DEFAULT = ["--run_name", "default", "--max_epochs", "6", "--batch_size", "16", "--keep_last", "0"]
DEFAULT += ["--learning_rate", "1e-2", "--log_every", "20"]
SAMPLED = ["generate", "--model_path", "checkpoints/best_model.pth", "--prompt", "The value of", "--max_new_tokens", "8"]
FINAL = ["evaluate", "--model_path", "checkpoints/checkpoint_final", "--device", "cpu"]

SCRIPT: dict[str, list[str]] = {
    "no network": ["train"],
    "base": ["train", *TINY, *MODEL, *DEFAULT],
    "evaluate": ["evaluate", "--model_path", "checkpoints/best_model.pth"],
    "validation": [*FINAL, "--split", "validation"],
    "other batch": [*FINAL, "--split", "validation", "--batch_size", "3"],
    "stride 32": [*FINAL, "--split", "validation", "--stride", "32"],
    "stride 5": [*FINAL, "--split", "validation", "--stride", "5"],
    "stride 33": [*FINAL, "--split", "validation", "--stride", "33"],
    "missing": ["evaluate", "--model_path", "checkpoints/best_modle.pth"],
    "generate": SAMPLED,
    "generate again": SAMPLED,
    "generate greedily": [*SAMPLED, "--temperature", "0", "--top_k", "0", "--repetition_penalty", "1"],
    "generate with top_p 0": [*SAMPLED, "--top_p", "0"],
    "resume": ["train", "--resume_from", "checkpoints/checkpoint_epoch_5.pth"],
    "again": ["train", "--run_name", "default"],
    "short": ["train", *TINY, *MODEL, "--max_length", "8", "--max_steps", "1", "--run_name", "short"],
    **{
        f"documented {number}": [*argv, *TINY, *([] if argv == SMALL else MODEL), "--stop_at_step", "1"]
        for number, argv in enumerate(TRAIN)
        if any(flag in argv for flag in ("--batch_size", "--max_training_hours"))
    },
}


def parsed(argv: list[str]) -> Any:
    return read_command_line(Gpt2Wikitext(), argv)


@pytest.mark.parametrize("argv", COMMANDS, ids=" ".join)
def test_every_documented_command_sets_its_values(argv: list[str]) -> None:
    command, flags = parsed(argv)
    assert command == argv[0]
    values = configuration.values(flags.config if isinstance(flags, Parsed) else flags)
    before = configuration.values(Config()) if command == "train" else vars(Evaluate(""))
    given = {name.lstrip("-"): value for name, value in zip(argv[1::2], argv[2::2], strict=True)}
    for name, value in given.items():
        assert str(values[name]) == value or float(values[name]) == float(value)
    assert {name for name, value in values.items() if value != before[name]} <= set(given)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["evaluate", "--batch_size", "0"], "batch_size 0 must be above 0"),
        (["evaluate", "--stride", "-1"], "stride -1 must be above 0"),
        (["generate", "--max_new_tokens", "0"], "max_new_tokens 0 must be above 0"),
        (["generate", "--temperature", "-0.5"], "temperature -0.5 must not be negative"),
        (["generate", "--top_k", "-1"], "top_k -1 must not be negative"),
        (["generate", "--repetition_penalty", "0"], "repetition_penalty 0.0 must be above 0"),
        (["generate", "--repetition_penalty", "inf"], "repetition_penalty inf is not a finite number"),
    ],
)
def test_numbers_that_no_command_can_mean(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        parsed(argv)


@pytest.mark.parametrize(
    ("argv", "parameters", "heads"),
    [
        (["train"], 124_439_808, 12),
        (TRAIN[5], None, 16),
        (TRAIN[6], None, 8),
        (TRAIN[7], 354_823_168, 16),
    ],
    ids=["default", "custom", "small", "large"],
)
def test_the_documented_models_can_be_built(argv: list[str], parameters: int | None, heads: int) -> None:
    config = parsed(argv)[1].config
    data = SimpleNamespace(extra={"text": SimpleNamespace(vocab_size=50257, end_of_text=50256)})
    with torch.device("meta"):
        network = Gpt2Wikitext().build_model(config, data)
    assert network.config.n_head == heads
    m = config.model
    d, inner = m.d_model, m.d_ff or 4 * m.d_model
    block = 4 * d * d + 2 * d * inner + (3 * d + d + d + inner) + 4 * d
    expected = 50257 * d + m.max_length * d + m.num_layers * block + 2 * d
    assert sum(p.numel() for p in network.parameters()) == expected
    assert parameters in (None, expected)


# ------------------------------------------------------------------------------------------------------- a trained run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """A working directory in which SCRIPT has been run: its folder, and {name: (exit code, output)}."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "text").mkdir()
    rows = [" ".join(block.split()) for name in sorted(topics) for block in topics[name].split("\n\n")]
    rows = [row for row in rows if len(row) > 60 and row.isascii()]
    for name, part in (("train", rows[:110]), ("validation", rows[110:140]), ("test", rows[140:170])):
        (folder / "text" / f"{name}.txt").write_text("\n".join(part) + "\n")
    env = environment(
        SAMECURVE_CACHE=str(folder / "cache"),
        HF_HOME=str(folder / "hub"),
        HF_HUB_OFFLINE="1",
        CUDA_VISIBLE_DEVICES="",
    )
    yield SimpleNamespace(folder=folder, outputs=run_in_turn(RECIPE, SCRIPT, folder, env))
    for checkpoints in ("runs", "my_checkpoints"):  # a quarter of a gigabyte
        shutil.rmtree(folder / checkpoints, ignore_errors=True)


def output(place: SimpleNamespace, name: str, code: int = 0) -> str:
    exit_code, text = place.outputs[name]
    assert exit_code == code, text[-3000:]
    assert "Traceback" not in text
    return text


def scored(text: str, split: str) -> tuple[float, int]:
    """(nats per token, tokens) that `evaluate` printed."""
    match = re.search(rf"^{split}: ([\d.]+) nats per token over ([\d,]+) tokens, each once$", text, re.MULTILINE)
    assert match, text
    return float(match[1]), int(match[2].replace(",", ""))


def run_folder(place: SimpleNamespace) -> Path:
    return place.folder / "runs" / "gpt2_wikitext" / "default"


def metrics(place: SimpleNamespace) -> dict[str, float]:
    lines = (run_folder(place) / "metrics.jsonl").read_text().splitlines()
    return json.loads(next(line for line in reversed(lines) if "final/val_loss" in line))


def test_without_a_network_the_first_command_names_the_ways_out(place: SimpleNamespace) -> None:
    text = output(place, "no network", BAD_INPUT)
    lines = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    for way in ("Salesforce/wikitext", "--data_dir", "--dataset embedded"):
        assert way in lines[0]


def test_it_trains_and_leaves_checkpoints_metrics_and_a_plot(place: SimpleNamespace) -> None:
    text = output(place, "base")
    for part in ("Loss:", "LR:", "Parameters:", "Warm-up cut from 2000", "Sample:"):
        assert part in text, part
    assert re.search(r"^Elapsed: 0\.0\dh \| Remaining: 1[12]\.\d\dh$", text, re.MULTILINE)
    folder = run_folder(place)
    names = {path.name for path in (folder / "checkpoints").iterdir() if path.is_symlink()}
    assert names >= {"best_model", "checkpoint_final", *(f"checkpoint_epoch_{epoch}" for epoch in range(1, 6))}
    assert (folder / "plots" / "loss.png").stat().st_size > 1000
    assert list((folder / "tensorboard").glob("**/events.out.tfevents*"))
    saved = {path.name for path in (folder / "checkpoints" / "best_model").iterdir()}
    assert saved >= {"model.safetensors", "optimizer.safetensors", "config.json", "tokenizer.json", "manifest.json"}
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {key for line in logged for key in line} >= {
        "train/loss",
        "train/perplexity",
        "train/learning_rate",
        "train/tokens_per_sec",
        "train/grad_norm",
        "train/iter_time_ms",
        "train/data_wait_fraction",
        "eval/val_loss",
        "eval/val_perplexity",
        "final/val_loss",
    }
    assert metrics(place)["final/val_loss"] < math.log(300) - 1


def test_resuming_goes_on_from_epoch_5_and_ends_where_the_run_did(place: SimpleNamespace) -> None:
    text = output(place, "resume")
    folder = run_folder(place) / "checkpoints"
    step = int((folder / "checkpoint_epoch_5").resolve().name.removeprefix("checkpoint_step_"))
    assert f"Resumed from step {step}\n" in text
    assert "set aside" in text
    final = (folder / "checkpoint_final").resolve()
    before = folder / "rolled_back_1" / final.name
    for file in ("model.safetensors", "optimizer.safetensors"):
        one, two = load_file(before / file), load_file(final / file)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_same_command_again_reports_that_it_has_finished(place: SimpleNamespace) -> None:
    assert "Already finished" in output(place, "again")


def test_a_model_that_reads_few_tokens_finishes_too(place: SimpleNamespace) -> None:
    """The sample at the end of training starts from words of the text: not from more of them than the model can read."""
    text = output(place, "short")
    assert "Sample:" in text
    assert "error:" not in text
    status = json.loads((place.folder / "runs" / "gpt2_wikitext" / "short" / "status.json").read_text())
    assert status["state"] == "finished"


def test_evaluate_measures_the_test_split(place: SimpleNamespace) -> None:
    text = output(place, "evaluate")
    loss, tokens = scored(text, "test")
    assert 1 < loss < math.log(300)
    assert tokens > 1000
    for part in ("test perplexity:", "per token", "per word", "Kneser-Ney bigram"):
        assert part in text
    perplexities = re.search(r"test perplexity: ([\d.]+) per token, ([\d.]+) per word", text)
    assert perplexities
    assert float(perplexities[1]) == pytest.approx(math.exp(loss), rel=1e-3)


def test_evaluate_gives_the_number_training_logged_for_any_batch_size(place: SimpleNamespace) -> None:
    logged = metrics(place)["final/val_loss"]
    for name in ("validation", "other batch", "stride 32"):
        loss, tokens = scored(output(place, name), "validation")
        assert loss == pytest.approx(logged, abs=6e-5), name
        assert tokens == scored(output(place, "validation"), "validation")[1]


class KnowsThePast(torch.nn.Module):
    """On a text that repeats every 12 tokens: certain where it has seen 12 tokens, else guessing among 50."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        certain = torch.zeros(*input_ids.shape, 50)
        certain[:, 11:] = 50.0 * torch.nn.functional.one_hot(input_ids[:, :-11], 50).float()
        return next_token_loss(certain, torch.eye(50), labels)


def test_a_smaller_stride_gives_every_token_more_context() -> None:
    ids = np.tile(np.arange(12), 40).astype(np.uint16)
    split = TokenSplit(ids, np.array([len(ids)]), 1, "")
    launch = Launch(0, 1, 0, torch.device("cpu"), Control(0, 1, timedelta(minutes=1)))
    config, recipe = parsed(["train", "--num_workers", "0"])[1].config, Gpt2Wikitext()
    losses, guessed = [], []
    for stride in (32, 20, 5, 1):
        dataset = TokenBlocks(split, 32, 50, 0, stride)
        batch = dataset.__getitems__(range(len(dataset)))
        assert int((batch["labels"] != -100).sum()) == len(ids) - 1
        # Every block guesses at its first 11 tokens, unless the block before it has scored them.
        guessed.append(11 + (len(dataset) - 1) * max(0, 11 - (32 - stride)))
        result = evaluate_objective(recipe, Objective(KnowsThePast(), recipe), config, dataset, launch, 8)
        losses.append(result["loss"])
    assert losses == sorted(losses, reverse=True)
    for loss, number in zip(losses, guessed, strict=True):
        assert loss == pytest.approx(number * math.log(50) / (len(ids) - 1), rel=1e-5)


def test_a_stride_scores_every_token_once(place: SimpleNamespace) -> None:
    whole, strided = (scored(output(place, name), "validation") for name in ("validation", "stride 5"))
    assert strided[1] == whole[1]
    assert strided[0] != whole[0]
    assert strided[0] == pytest.approx(whole[0], abs=0.3)
    message = output(place, "stride 33", BAD_INPUT)
    assert "--stride 33" in message
    assert "32" in message.partition("--stride 33")[2]


def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(place: SimpleNamespace) -> None:
    message = output(place, "missing", BAD_INPUT)
    assert "best_modle" in message
    assert "there are: " in message


def test_generate_continues_the_prompt_the_same_way_for_a_seed(place: SimpleNamespace) -> None:
    one, two = output(place, "generate"), output(place, "generate again")
    assert "The value of" in one
    assert one == two
    assert len(one.partition("The value of")[2].strip()) > 0
    assert "The value of" in output(place, "generate greedily")
    assert "top_p" in output(place, "generate with top_p 0", BAD_INPUT)


@pytest.mark.parametrize("name", [name for name in SCRIPT if name.startswith("documented ")])
def test_the_documented_training_commands_start(place: SimpleNamespace, name: str) -> None:
    """As documented, plus a small text (and small sizes, but for the command that has some), stopped after one step."""
    text = output(place, name)
    if "Already finished" not in text:
        assert "Stopped at step 1: stop_at_step" in text
    argv = SCRIPT[name]
    if "--checkpoint_dir" in argv:
        assert (place.folder / "my_checkpoints" / "checkpoint_step_1" / "manifest.json").is_file()
    if "--batch_size" in argv:
        assert f"= {argv[argv.index('--batch_size') + 1]} samples per optimizer step" in text


# -------------------------------------------------------------------------------------------------------- transformers


def test_a_prompt_that_is_not_utf8_is_refused_before_anything_is_read() -> None:
    prompt = os.fsdecode(b"na\xefve")  # Latin-1, as it comes from the command line
    with pytest.raises(UserError, match="the prompt is not UTF-8 from character 3 on"):
        generate(Gpt2Wikitext(), Generate("nowhere", prompt=prompt), Launch(0, 1, 0, torch.device("cpu"), None), print)


def test_transformers_opens_a_checkpoint_and_gives_the_same_logits(place: SimpleNamespace) -> None:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = run_folder(place) / "checkpoints" / "best_model"
    checkpoint = Checkpoint(folder.resolve())
    text = Text.without_data(checkpoint.text("tokenizer.json"))
    config = parsed(SCRIPT["base"])[1].config
    ours = trained_network(Gpt2Wikitext(), config, Data(None, {}, extra={"text": text}), folder.resolve())
    theirs, info = GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in info)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    row = (place.folder / "text" / "validation.txt").read_text().splitlines()[0]
    ids = tokenizer(row, return_tensors="pt").input_ids[:, :32]
    assert ids[0].tolist() == text.tokenizer().encode(row).ids[:32]
    with torch.no_grad():
        one, two = ours(ids), theirs.eval()(input_ids=ids).logits
        assert torch.equal(one, two)
        loss = theirs(input_ids=ids, labels=ids).loss.item()
    assert loss < math.log(300)
