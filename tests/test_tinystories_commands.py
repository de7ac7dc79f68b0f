"""Every documented command of the Transformer on token ids, and the use of a trained run."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from launching import ROOT, environment, free_port, run_in_turn
from safetensors.torch import load_file
from tokenizers import Tokenizer

from recipes.data.tokenizer import END_OF_TEXT, train_tokenizer
from recipes.tinystories_lm import Config, TinyStoriesLM
from trainer.command_line import config as configuration
from trainer.errors import BAD_INPUT
from trainer.main import read_command_line

RECIPE = ROOT / "recipes" / "tinystories_lm.py"
DATA = "--train_data_path data/TinyStoriesV2-GPT4-train.ids --val_data_path data/TinyStoriesV2-GPT4-valid.ids"
DOCUMENTED = {
    "basic": "--vocab_size 10000 --max_iters 10000",
    "full": """--vocab_size 10000 --context_length 512 --d_model 768 --num_heads 12 --d_ff 3072 --num_layers 12
        --lr 3e-4 --min_lr 3e-5 --weight_decay 0.1 --batch_size 32 --max_iters 100000
        --checkpoint_dir checkpoints/my_run --use_wandb --wandb_project my-project""",
    "resume": "--resume_from checkpoints/my_run/checkpoint_iter_5000.pt --max_iters 20000",
    "quick_test": "--vocab_size 10000 --d_model 256 --num_layers 4 --batch_size 32 --max_iters 1000",
    "production": """--vocab_size 10000 --context_length 1024 --d_model 1024 --num_heads 16 --d_ff 4096 --num_layers 24
        --lr 2e-4 --min_lr 2e-5 --batch_size 16 --max_iters 200000 --checkpoint_interval 2500 --eval_interval 250
        --checkpoint_dir checkpoints/large_model
        --use_wandb --wandb_project cs336-final --wandb_run_name large-model-v1""",
}
FILES = ("basic", "full", "quick_test", "production")  # those that are YAML files here too
# Flag and default, by turns.
DEFAULTS = """vocab_size 10000 context_length 256 d_model 512 num_heads 8 d_ff 2048 num_layers 6 rope_theta 10000.0
    lr 6e-4 min_lr 6e-5 weight_decay 0.1 beta1 0.9 beta2 0.95 eps 1e-8 batch_size 64 max_iters 100000 warmup_iters 2000
    grad_clip 1.0 checkpoint_interval 5000 eval_interval 500 log_interval 100 eval_iters 100 resume_from None device auto
    seed 42 use_wandb False wandb_project transformer-lm wandb_run_name None"""


def documented(name: str) -> list[str]:
    return [*DATA.split(), *shlex.split(DOCUMENTED[name])]


def parsed(argv: list[str]) -> Any:
    return read_command_line(TinyStoriesLM(), argv)[1]


def alias(name: str) -> str:
    return configuration.flag_names(Config)[name]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_documented_command_sets_its_values(name: str) -> None:
    argv = documented(name)
    values = configuration.values(parsed(argv).config)
    for flag, value in zip(argv, [*argv[1:], "--"], strict=True):
        if flag.startswith("--"):
            actual = values[alias(flag.removeprefix("--"))]
            same = actual is True if value.startswith("--") else actual == (value,) or str(actual) == value
            assert same or float(actual) == float(value)


def test_defaults() -> None:
    values = configuration.values(Config())
    pairs = DEFAULTS.split()
    for flag, default in zip(pairs[::2], pairs[1::2], strict=True):
        actual = values[alias(flag)]
        assert str(actual) == default or float(actual) == float(default), flag


@pytest.mark.parametrize("name", FILES)
def test_yaml_files_are_the_same_runs_as_the_commands(name: str) -> None:
    file = ROOT / "recipes" / "configs" / f"tinystories_{name}.yaml"
    ours, theirs = (configuration.values(parsed(argv).config) for argv in (["--config", str(file)], documented(name)))
    differ = {key for key in ours if ours[key] != theirs[key]}
    assert differ == {"config", "train_data_path", "val_data_path"} | ({"keep_last"} if name == "production" else set())


def test_a_mixture_says_its_shares_and_measures_each_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMECURVE_CACHE", str(tmp_path / "cache"))
    for name in ("web", "books"):
        (tmp_path / name).mkdir()
        for shard in ("0.ids", "1.ids"):
            np.arange(1, 200, dtype=np.uint16).tofile(tmp_path / name / shard)
    sets = [str(tmp_path / "web"), f"{tmp_path}/books/*.ids"]
    argv = [
        "--train_data_path",
        f"{sets[0]}=3",
        f"{sets[1]}=1",
        "--val_data_path",
        *sets,
        "--context_length",
        "8",
        "--batch_size",
        "4",
    ]
    recipe = TinyStoriesLM()
    config = parsed(argv).config
    data = recipe.build_data(config)
    sizes = {name: len(part) for name, part in data.evaluation.items()}
    assert sizes == {"train": 100, "val": 100, "val_web": 50, "val_books": 50}
    metrics = dict.fromkeys(("train/loss", "train/learning_rate", "train/iter_time_ms", "train/tokens_per_sec"), 1.0)
    assert " | So far" not in recipe.report.log_line(500, metrics)
    chosen, _ = data.train.places(range(4 * 500))
    shares = {"share/web": 1 - chosen.mean(), "share/books": chosen.mean()}
    assert 0.2 < chosen.mean() < 0.3
    assert recipe.report.step_metrics(500) == pytest.approx(shares)
    metrics |= {"train/share/web": 0.75125, "train/share/books": 0.24875, "train/loss_web": 2.0, "train/loss_books": 1.0}
    line = recipe.report.log_line(500, metrics)
    assert line.endswith(" | So far: web 75.12%, books 24.88% | Loss of web 2.0000, books 1.0000")
    with pytest.raises(ValueError, match="sampling sequential visits every window once"):
        recipe.build_data(parsed([*argv, "--sampling", "sequential"]).config)
    in_order = parsed([*argv[3:], "--train_data_path", *sets, "--sampling", "sequential"])  # without weights they are one set
    assert len(recipe.build_data(in_order.config).train) == 100


# ------------------------------------------------------------------------------------------------------------ trained runs

SIZES = ["--d_model", "32", "--num_heads", "2", "--d_ff", "48", "--num_layers", "2", "--context_length", "24"]
IDS = ["--train_data_path", "data/train.ids", "--val_data_path", "data/valid.ids", "--vocab_size", "300"]
COMMON = [*IDS, *SIZES, "--batch_size", "8", "--lr", "1e-2", "--log_interval", "10", "--device", "cpu"]
WHOLE = [*COMMON, "--max_iters", "60", "--eval_iters", "0", "--checkpoint_interval", "20"]
BASE = [*WHOLE, "--eval_interval", "20", "--run_name", "base"]
MODEL = "runs/tinystories_lm/base/checkpoints/checkpoint_final"
PROMPT = ["generate", "--model_path", MODEL, "--prompt", "Once upon a time", "--max_new_tokens", "40", "--device", "cpu"]
ENVIRONMENT = environment(PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="")
NEXT = ["--max_iters", "30", "--run_name", "next"]
RESUMED = "runs/tinystories_lm/base/checkpoints/checkpoint_iter_20.pt"
SCRIPT: dict[str, list[str]] = {
    "no data": ["--vocab_size", "300"],
    "no validation data": ["--train_data_path", "data/train.ids"],
    "text": [*COMMON, "--val_data_path", "data/text.ids"],
    "small vocabulary": [*COMMON, "--vocab_size", "100"],
    "long context": [*COMMON, "--context_length", "90000"],
    "no context": [*COMMON, "--context_length", "0"],
    "no theta": [*COMMON, "--rope_theta", "-1"],
    "heads": [*COMMON, "--num_heads", "3"],
    "base": BASE,
    "never evaluated": [*WHOLE, "--eval_interval", "0", "--run_name", "never_evaluated"],
    "again": ["--run_name", "base"],
    "evaluate": ["evaluate", "--model_path", MODEL, "--device", "cpu"],
    "evaluate in other batches": ["evaluate", "--model_path", MODEL, "--batch_size", "5", "--device", "cpu"],
    "evaluate training": ["evaluate", "--model_path", MODEL, "--data_path", "data/train.ids", "--device", "cpu"],
    "generate": PROMPT,
    "generate again": PROMPT,
    "generate otherwise": [*PROMPT, "--seed", "1", "--temperature", "1.5", "--top_p", "1"],
    "generate the likeliest": [*PROMPT, "--temperature", "0", "--max_new_tokens", "60"],
    "generate from a tiny nucleus": [*PROMPT, "--top_p", "1e-9", "--max_new_tokens", "60"],
    "generate from nothing": ["generate", "--model_path", MODEL, "--device", "cpu"],
    "generate with top_p 1.5": [*PROMPT, "--top_p", "1.5"],
    "evaluated in between": [*WHOLE, "--eval_interval", "4", "--max_iters", "40", "--run_name", "between"],
    "from one in between": ["--resume_from", "runs/tinystories_lm/between/checkpoints/checkpoint_iter_20.pt", *NEXT],
    # No flag of the model; fewer steps than the run had; then twice more, and raised.
    "lowered": [*IDS, "--resume_from", RESUMED, "--max_iters", "50", "--stop_at_step", "30", "--device", "cpu"],
    "lowered, to the end": [*IDS, "--resume_from", RESUMED, "--max_iters", "50", "--device", "cpu"],
    "raised": [
        "--resume_from",
        "runs/tinystories_lm/base/checkpoints/checkpoint_final",
        "--max_iters",
        "70",
        "--run_name",
        "raised",
    ],
    "sequential": [
        *[*COMMON, "--val_data_path", "data/valid.ids", "copy.ids", "--sampling", "sequential"],
        *["--max_steps", "0", "--max_epochs", "2", "--run_name", "sequential"],
    ],
    "evaluate sequential": ["evaluate", "--model_path", MODEL.replace("base", "sequential"), "--device", "cpu"],
    "from text": [
        *[*SIZES, "--train_data_path", "stories.txt", "--vocab_size", "300", "--batch_size", "8", "--max_iters", "5"],
        *["--device", "cpu", "--run_name", "from_text"],
    ],
    "evaluate from text": ["evaluate", "--model_path", MODEL.replace("base", "from_text"), "--device", "cpu"],
    "evaluate other text": ["evaluate", "--model_path", MODEL, "--data_path", "more.txt", "--device", "cpu"],
    "muon": [*WHOLE, "--optimizer", "muon", "--run_name", "muon"],
    "tied": [*WHOLE, "--tie_embeddings", "--run_name", "tied"],
    "ablated": [
        *[*WHOLE, "--norm_position", "post", "--no_rope", "--ffn", "silu", "--qk_norm"],
        *["--decay_all", "--gradient_checkpointing", "--max_iters", "20", "--run_name", "ablated"],
    ],
    "clipped": [
        *WHOLE,
        "--optimizer",
        "sgd",
        "--beta1",
        "0",
        "--grad_clip",
        "0.01",
        "--stop_at_step",
        "20",
        "--run_name",
        "clipped",
    ],
    "unclipped": [
        *WHOLE,
        "--optimizer",
        "sgd",
        "--beta1",
        "0",
        "--grad_clip",
        "0",
        "--stop_at_step",
        "20",
        "--run_name",
        "unclipped",
    ],
    "moved data": [*COMMON, "--train_data_path", "copy.ids", "--max_iters", "60", "--run_name", "base"],
    "other data": [*COMMON, "--train_data_path", "data/valid.ids", "--run_name", "base"],
    **{
        f"documented {name}": [*argv, *IDS, *SIZES, "--stop_at_step", "1", "--batch_size", "2", "--device", "cpu"]
        for name, argv in ((name, shlex.split(DOCUMENTED[name].replace("--use_wandb", ""))) for name in FILES)
    },
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A working directory in which SCRIPT has been run: its folder, and {name: (exit code, output)}."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "data").mkdir()
    tokenizer, streams = stories()
    for name, ids in streams.items():
        ids.tofile(folder / "data" / f"{name}.ids")
    streams["train"].tofile(folder / "copy.ids")
    (folder / "data" / "text.ids").write_text("1 2 3 4 5 6 7 8 9\n" * 90)
    tokenizer.save(str(folder / "data" / "tokenizer.json"))
    for name, split in (("stories", "train"), ("more", "valid")):
        (folder / f"{name}.txt").write_text(tokenizer.decode(streams[split].tolist(), skip_special_tokens=False))
    return SimpleNamespace(folder=folder, outputs=run_in_turn(RECIPE, SCRIPT, folder, ENVIRONMENT))


def stories() -> tuple[Tokenizer, dict[str, np.ndarray]]:
    """A tokenizer of 300 entries, and the ids of some hundred stories of one sentence."""
    random = np.random.RandomState(0)
    who, what, where = (
        ["a cat", "Lily", "the dog"],
        ["sat", "played", "slept quietly"],
        ["at home", "in the sun", "by the river"],
    )
    texts = [f"Once upon a time {random.choice(who)} {random.choice(what)} {random.choice(where)}." for _ in range(600)]
    tokenizer = train_tokenizer(texts, 300)
    end = tokenizer.token_to_id(END_OF_TEXT)
    rows = [[*tokenizer.encode(text).ids, end] for text in texts]
    split = {"train": rows[:540], "valid": rows[540:]}
    return tokenizer, {name: np.concatenate(part).astype(np.uint16) for name, part in split.items()}


def output(place: SimpleNamespace, name: str, code: int = 0) -> str:
    exit_code, text = place.outputs[name]
    assert exit_code == code, text[-3000:]
    assert "Traceback" not in text
    return text


def rows(place: SimpleNamespace, name: str) -> list[dict[str, float]]:
    lines = (place.folder / "runs" / "tinystories_lm" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def curve(place: SimpleNamespace, name: str, key: str) -> dict[int, float]:
    return {row["step"]: row[key] for row in rows(place, name) if key in row}


def weights(place: SimpleNamespace, name: str, checkpoint: str = "checkpoint_final") -> dict[str, torch.Tensor]:
    return load_file(place.folder / "runs" / "tinystories_lm" / name / "checkpoints" / checkpoint / "model.safetensors")


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("no data", ["train_data_path is missing", "--train_data_path FILE.ids", "embedded"]),
        ("no validation data", ["val_data_path is missing", "--val_data_path FILE.ids"]),
        ("text", ["data/text.ids holds numbers written as text", "python -c"]),
        ("small vocabulary", ["data/tokenizer.json has 300 entries, vocab_size is 100", "give --vocab_size 300"]),
        ("long context", ["data/train.ids holds", "90000 inputs", "--context_length"]),
        ("no context", ["context_length 0 must be above 0"]),
        ("no theta", ["rope_theta -1.0 must be above 0"]),
        ("heads", ["d_model 32 does not divide into 3 heads"]),
        ("generate with top_p 1.5", ["top_p"]),
        ("other data", ["data fingerprint"]),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(name: str, parts: list[str], place: SimpleNamespace) -> None:
    lines = [line for line in output(place, name, BAD_INPUT).splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    for part in parts:
        assert part in lines[0]


def test_it_trains_and_prints_its_lines(place: SimpleNamespace) -> None:
    text = output(place, "base")
    count = len(np.fromfile(place.folder / "data" / "train.ids", np.uint16))
    assert f"Train data size: {count:,} tokens\n" in text
    for pattern in (
        r"^Loading data with memory mapping\.\.\.$",
        r"^Validation data size: [\d,]+ tokens$",
        r"^Initializing model\.\.\.\nTotal parameters: [\d,]+\nTrainable parameters: [\d,]+\n$",
        r"^Starting training from iteration 0\.\.\.\nDevice: cpu\nMax iterations: \d+\n-{80}$",
        r"^Iter     10 \| Loss: \d\.\d{4} \| LR: \d\.\d\de-0\d \| Time: \d+\.\dms \| Tokens/sec: \d+$",
        r"^-{80}\nEvaluating at iteration 20\.\.\.\nTrain loss: \d\.\d{4} \| Val loss: \d\.\d{4}\n-{80}$",
        r"^Saved checkpoint to .*checkpoint_iter_20( |$)",
        r"^Sample: Once upon a time",
    ):
        assert re.search(pattern, text, re.MULTILINE), pattern
    keys = {key for row in rows(place, "base") for key in row}
    for group, names in {
        "train": ("loss", "learning_rate", "tokens_per_sec", "iter_time_ms", "grad_norm"),
        "eval": ("train_loss", "val_loss"),
        "final": ("train_loss", "val_loss"),
    }.items():
        assert {f"{group}/{name}" for name in names} <= keys
    folder = place.folder / "runs" / "tinystories_lm" / "base" / "checkpoints"
    assert {path.name for path in folder.iterdir()} >= {"checkpoint_iter_60", "checkpoint_final", "best_model"}
    assert "tokenizer.json" in {path.name for path in (folder / "checkpoint_final").iterdir()}
    # Three choices of three in every story, which no model can know: less would be a label in its input.
    rest = math.log(27) * 60 / len(np.fromfile(place.folder / "data" / "valid.ids", np.uint16))
    assert 0.9 * rest < rows(place, "base")[-1]["final/val_loss"] < math.log(300) - 2


def test_evaluating_more_or_less_often_changes_no_weight(place: SimpleNamespace) -> None:
    output(place, "never evaluated")
    assert same(weights(place, "base"), weights(place, "never_evaluated"))
    assert len(curve(place, "base", "eval/val_loss")) == 3
    assert len(curve(place, "never_evaluated", "eval/val_loss")) == 1
    assert rows(place, "never_evaluated")[-1]["final/val_loss"] == rows(place, "base")[-1]["final/val_loss"]


def measured(text: str) -> tuple[float, int]:
    match = re.search(r"([\d.]+) nats per token over ([\d,]+) tokens, each once; perplexity", text)
    assert match, text
    return float(match[1]), int(match[2].replace(",", ""))


def test_evaluate_measures_every_token_and_gives_what_training_logged(place: SimpleNamespace) -> None:
    last = rows(place, "base")[-1]
    count = len(np.fromfile(place.folder / "data" / "valid.ids", np.uint16))
    for name in ("evaluate", "evaluate in other batches"):
        loss, tokens = measured(output(place, name))
        assert tokens == count - 1
        assert loss == pytest.approx(last["final/val_loss"], abs=6e-5)
    loss, tokens = measured(output(place, "evaluate training"))
    assert tokens > 5 * count
    # In training only as many windows of it as validation has.
    assert loss == pytest.approx(last["final/train_loss"], abs=0.15)


def test_generate_continues_a_prompt_to_the_end_of_its_text(place: SimpleNamespace) -> None:
    one, two, other = (output(place, name) for name in ("generate", "generate again", "generate otherwise"))
    assert one == two != other
    assert "Once upon a time" in one
    likeliest = output(place, "generate the likeliest")
    story = likeliest[likeliest.index("Once upon") :].strip()
    assert re.fullmatch(r"Once upon a time [\w ]+\.", story), story  # ended by itself, and nothing behind it
    nucleus = output(place, "generate from a tiny nucleus")
    assert nucleus[nucleus.index("Once upon") :] == likeliest[likeliest.index("Once upon") :]
    assert len(output(place, "generate from nothing").strip()) > 5


def test_the_same_command_again_reports_that_it_has_finished(place: SimpleNamespace) -> None:
    assert "Already finished" in output(place, "again")


def test_resuming_needs_no_model_flags_and_may_change_the_number_of_steps(place: SimpleNamespace) -> None:
    text = output(place, "lowered")
    assert "max_steps: 60 -> 50" in text
    assert "Resumed from step 20" in text
    assert "Resumed from step 30" in output(place, "lowered, to the end")
    assert "Finished at step 50" in output(place, "lowered, to the end")
    text = output(place, "raised")
    assert "max_steps: 60 -> 70" in text
    assert "Resumed from step 60" in text
    assert "Finished at step 70" in text


def test_data_may_have_moved_if_they_are_the_same(place: SimpleNamespace) -> None:
    text = output(place, "moved data")
    assert re.search(r"train_data_path: /\S+/data/train.ids -> /\S+/copy.ids\n", text)
    assert "Already finished" in text


def test_new_bests_push_no_checkpoint_of_the_interval_out(place: SimpleNamespace) -> None:
    output(place, "evaluated in between")
    folder = place.folder / "runs" / "tinystories_lm" / "between" / "checkpoints"
    kept = {int(path.name.rpartition("_")[2]) for path in folder.glob("checkpoint_iter_*")}
    assert {20, 40} <= kept
    assert len(kept) <= 4, "those of bests that are none any more go"
    assert "Resumed from step 20" in output(place, "from one in between")


def test_two_processes_resume_what_one_began(place: SimpleNamespace) -> None:
    config = ROOT / "accelerate_configs" / "ddp.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--num_processes", "2", "--main_process_port", str(free_port()), str(RECIPE)]
    argv = ["--resume_from", RESUMED, "--run_name", "two", "--device", "cpu"]
    done = subprocess.run([*command, *argv], cwd=place.folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Resumed from step 20" in done.stdout
    assert "4 samples x 2 processes" in done.stdout
    one, two = (curve(place, name, "train/loss") for name in ("base", "two"))
    assert list(two) == [30, 40, 50, 60]
    assert [two[step] for step in two] == pytest.approx([one[step] for step in two], rel=1e-5)
    assert rows(place, "two")[-1]["final/val_loss"] == pytest.approx(rows(place, "base")[-1]["final/val_loss"], rel=1e-5)


def test_sequential_sampling_counts_epochs(place: SimpleNamespace) -> None:
    text = output(place, "sequential")
    count = len(np.fromfile(place.folder / "data" / "train.ids", np.uint16))
    windows = -(-(count - 1) // 24)
    assert f"epochs of {windows:,}" in text
    assert f"Finished at step {math.ceil(2 * windows / 8)}" in text


def test_sets_that_a_sequential_run_was_validated_on_are_evaluated(place: SimpleNamespace) -> None:
    text, final = output(place, "evaluate sequential"), rows(place, "sequential")[-1]
    for name in ("val", "val_data", "val_copy"):
        assert f"{final[f'final/{name}_loss']:.4f} nats per token" in text


def test_text_is_trained_on_and_evaluated(place: SimpleNamespace) -> None:
    assert "stories.txt has no validation text: 5.00% of it, spread over it, is held out" in output(place, "from text")
    loss, _ = measured(output(place, "evaluate from text"))
    assert loss == pytest.approx(rows(place, "from_text")[-1]["final/val_loss"], abs=1e-4)
    # Other text is read with the tokenizer of the checkpoint, all of it: these are the stories of valid.ids.
    assert measured(output(place, "evaluate other text")) == measured(output(place, "evaluate"))


def test_an_epoch_of_sequential_sampling_has_every_id_once(place: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.folder)
    recipe, config = TinyStoriesLM(), parsed([*COMMON, "--sampling", "sequential"]).config
    train = recipe.build_data(config).train
    labels = train.__getitems__(range(len(train)))["tokens"][:, 1:]
    ids = np.fromfile(place.folder / "data" / "train.ids", np.uint16)
    assert np.array_equal(np.sort(labels[labels >= 0].numpy()), np.sort(ids[1:]))


def test_flags_reach_the_network_and_its_optimizer() -> None:
    recipe = TinyStoriesLM()
    for flags, groups in (([], 2), (["--decay_all"], 1)):
        config = parsed([*COMMON, *flags]).config
        network = recipe.build_model(config, None)  # type: ignore[arg-type]
        decayed = [group for group in recipe.parameter_groups(network, config) if group["weight_decay"]]
        count = sum(p.numel() for group in decayed for p in group["params"])
        assert (count == sum(p.numel() for p in network.parameters())) == (groups == 1)


@pytest.mark.parametrize("name", ["muon", "tied"])
def test_other_ways_learn_too(name: str, place: SimpleNamespace) -> None:
    output(place, name)
    assert rows(place, name)[-1]["final/val_loss"] < math.log(300) - 2


def test_ablations_train_and_are_remembered(place: SimpleNamespace) -> None:
    output(place, "ablated")
    names = weights(place, "ablated").keys()
    assert "ln_final.weight" not in names
    assert "layers.0.ffn.w3.weight" not in names
    assert "layers.0.attn.q_norm.weight" in names


def test_clipping_acts(place: SimpleNamespace) -> None:
    """Plain gradient descent, so that a step is as long as the clipped gradient."""
    lengths = {}
    for name in ("clipped", "unclipped"):
        output(place, name)
        before, after = weights(place, "base", "checkpoint_iter_20"), weights(place, name, "checkpoint_iter_20")
        assert before.keys() == after.keys()
        lengths[name] = curve(place, name, "train/loss")[20]
        assert curve(place, name, "train/grad_norm")[10] > 0.1
    assert lengths["unclipped"] < lengths["clipped"] - 0.01


@pytest.mark.parametrize("name", FILES)
def test_the_documented_training_commands_start(name: str, place: SimpleNamespace) -> None:
    text = output(place, f"documented {name}")
    assert "Stopped at step 1: stop_at_step" in text
    if "--checkpoint_dir" in DOCUMENTED[name]:
        folder = place.folder / "checkpoints" / ("my_run" if name == "full" else "large_model")
        assert (folder / "checkpoint_iter_1" / "manifest.json").is_file()
