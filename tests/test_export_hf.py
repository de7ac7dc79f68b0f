"""tools/export_hf.py: the folder loads in transformers and gives the logits of the checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import export_hf
import pytest
import torch
from fake_hub import FakeHub
from launching import ROOT, environment
from safetensors.torch import load_file
from scenarios import planned
from small_checkpoints import trainer_state
from tiny_models import model_folder, rows_folder

from recipes.data.tokenizer import END_OF_TEXT, train_tokenizer
from recipes.finetune_lm import FinetuneLM
from recipes.gpt2_wikitext import Config as Gpt2Config
from recipes.models.gpt2 import build_gpt2
from recipes.models.transformer_lm import TransformerLM
from recipes.tinystories_lm import Config, ModelConfig
from trainer.backends.tensors import TensorEntry
from trainer.checkpoints import writing
from trainer.checkpoints.network import build_empty_network, first_weights
from trainer.command_line.config import to_yaml
from trainer.distributed.launch import alone
from trainer.errors import BAD_INPUT, CHECKPOINT
from trainer.initial_weights import fill
from trainer.state import TrainState

SMALL = ModelConfig(vocab_size=320, context_length=32, d_model=32, num_heads=4, d_ff=48, num_layers=3, rope_theta=500.0)
TOKENIZER = train_tokenizer(["Once upon a time there was a cat.", "It slept in the sun, she said."], 320)


def saved(folder: Path, recipe: str, network: Any, config: Any, documents: dict[str, str] | None = None) -> Path:
    """A checkpoint of step 20 in a run that measured itself at that step, as the trainer writes it."""
    measured = TrainState(20, evaluated_step=20, evaluated_metric=1.3333, best_metric=1.25, best_step=10, train_loss=1.5)
    state = trainer_state(20, recipe=recipe, train_state=asdict(measured))
    written = {"trainer_state.json": state, "config.yaml": to_yaml(config), **(documents or {})}
    entries = [
        TensorEntry(n, tuple(p.shape), torch.float32, lambda _, p=p: p.detach().clone()) for n, p in network.named_parameters()
    ]
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    rows = [{"step": 10, "eval/val_loss": 1.25}, {"step": 20, "eval/val_loss": 1.3333, "eval/train_loss": 1.1111}]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return writing.write(folder / "checkpoints", "checkpoint_iter_20", {"model": entries}, written)


def story_checkpoint(folder: Path, model: ModelConfig = SMALL, **documents: str) -> tuple[Path, TransformerLM]:
    torch.manual_seed(0)
    network = TransformerLM(**vars(model)).eval()
    for p in network.parameters():
        if p.ndim == 1:  # trained norms are not ones
            torch.nn.init.uniform_(p, 0.5, 1.5)
    kept = {"tokenizer.json": TOKENIZER.to_str(), **documents}
    data = replace(Config().data, train_data_path=("/somewhere/stories/train.ids",))
    return saved(folder, "tinystories_lm", network, Config(model=model, data=data), kept), network


@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_from_the_folder_has_the_same_logits(tied: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

    path, ours = story_checkpoint(tmp_path, replace(SMALL, tie_embeddings=tied))
    export_hf.main([str(path), "--out", str(tmp_path / "out")])
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert isinstance(theirs, LlamaForCausalLM)
    assert not any(info.values())
    tokens = torch.randint(320, (2, 32))
    with torch.no_grad():
        one, two = ours(tokens), theirs.eval()(tokens).logits
    assert float(one.std()) > 0.1
    assert float((one - two).abs().max()) < 1e-4
    assert (theirs.lm_head.weight is theirs.model.embed_tokens.weight) == tied

    text = "Once upon a time there was a cat."
    for kind in (AutoTokenizer, PreTrainedTokenizerFast):
        tokenizer = kind.from_pretrained(tmp_path / "out")
        assert tokenizer(text).input_ids == TOKENIZER.encode(text).ids
        assert tokenizer.eos_token == END_OF_TEXT
    generated = theirs.generate(torch.tensor([TOKENIZER.encode(text).ids]), max_new_tokens=3)
    assert generated.shape[1] > len(TOKENIZER.encode(text).ids)
    assert theirs.generation_config.eos_token_id == TOKENIZER.token_to_id(END_OF_TEXT)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_theta"] == 500.0
    assert {oct(file.stat().st_mode & 0o777) for file in (tmp_path / "out").iterdir()} == {oct(path.stat().st_mode & 0o666)}


def test_without_the_permutation_the_logits_would_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    path, ours = story_checkpoint(tmp_path)
    monkeypatch.setattr(export_hf, "_paired_by_halves", lambda loaded, name, heads: loaded.tensor("model", name))
    export_hf.main([str(path), "--out", str(tmp_path / "out")])
    tokens = torch.randint(320, (2, 32))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens).logits
        assert float((ours(tokens) - theirs).abs().max()) > 1e-2


def test_the_model_card_holds_the_loss_of_this_very_step(tmp_path: Path) -> None:
    path, _ = story_checkpoint(tmp_path)
    export_hf.main([str(path), "--out", str(tmp_path / "out")])
    card = (tmp_path / "out" / "README.md").read_text()
    for part in (
        "step 20",
        "`train.ids`",
        "| validation loss | 1.3333 |",
        "| 1.1111 |",
        "| 1.5000 |",
        "on at most 6,400 windows",
    ):
        assert part in card, part
    assert "1.25" not in card  # the best loss of the run is another step's
    assert str(tmp_path) not in card
    assert "/somewhere" not in card


def test_a_checkpoint_that_left_its_run_remembers_its_loss(tmp_path: Path) -> None:
    path, _ = story_checkpoint(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    export_hf.main([str(path), "--out", str(tmp_path / "out")])
    assert "| validation loss | 1.3333 |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"norm_position": "post"}, "--norm_position post"),
        ({"ffn": "silu"}, "--ffn silu"),
        ({"qk_norm": True}, "--qk_norm"),
        ({"rope": False}, "--no_rope"),
    ],
)
def test_what_a_llama_cannot_express_is_refused_by_its_flag(
    change: dict[str, Any], flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = story_checkpoint(tmp_path, replace(SMALL, **change))
    with pytest.raises(SystemExit) as end:
        export_hf.main([str(path), "--out", str(tmp_path / "out")])
    assert end.value.code == BAD_INPUT
    assert flag in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert {entry.name for entry in tmp_path.iterdir()} == {"checkpoints", "metrics.jsonl"}


def test_gpt2_stays_as_it_is(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    end = TOKENIZER.token_to_id(END_OF_TEXT)
    network = build_gpt2(320, end, max_length=32, d_model=32, num_layers=2, num_heads=2, d_ff=None, dropout=0.0).eval()
    config = network.config
    documents = {"config.json": config.to_json_string(), "generation_config.json": config.generation_json()}
    documents["tokenizer.json"] = TOKENIZER.to_str()
    path = saved(tmp_path, "gpt2_wikitext", network, Gpt2Config(), documents)
    export_hf.main([str(path), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    tokens = torch.randint(320, (2, 32))
    with torch.no_grad():
        assert torch.allclose(network(tokens), theirs.eval()(tokens).logits, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == end
    assert theirs.generation_config.eos_token_id == end
    assert "| validation loss | 1.3333 |" in (tmp_path / "out" / "README.md").read_text()


def test_refusals_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = story_checkpoint(tmp_path / "good")
    damaged, _ = story_checkpoint(tmp_path / "damaged")
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(content)
    other = saved(tmp_path / "other", "collatz", torch.nn.Linear(2, 2), Config())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for argv, code, problem in (
        ([tmp_path / "nowhere", "--out", tmp_path / "out"], BAD_INPUT, "no checkpoint folder"),
        ([damaged, "--out", tmp_path / "out"], CHECKPOINT, "damaged"),
        ([other, "--out", tmp_path / "out"], BAD_INPUT, "'collatz'"),
        ([path, "--out", tmp_path / "full"], BAD_INPUT, "is not empty"),
        ([path, "--out", tmp_path / "out", "--tokenizer", tmp_path / "none.json"], BAD_INPUT, "does not exist"),
    ):
        with pytest.raises(SystemExit) as end:
            export_hf.main([str(argument) for argument in argv])
        assert end.value.code == code, problem
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert problem in line
    assert load_file(path / "model.safetensors")


# ---------------------------------------------------------------------------------------------- fine-tuned models, and the hub


@pytest.fixture
def adapted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, Any]:
    """(the folder of a mixture of experts, a checkpoint with adapters beside its weights, the network of that)."""
    monkeypatch.setenv("SAMECURVE_CACHE", str(tmp_path / "cache"))
    base, rows, recipe = model_folder("mixtral", tmp_path / "base"), rows_folder(tmp_path / "rows"), FinetuneLM()
    config = planned(recipe, ["--init_from", str(base), "--data_dir", str(rows), "--max_length", "32", "--lora_rank", "2"])
    network, initial = build_empty_network(recipe, config, None)  # type: ignore[arg-type]
    weights = first_weights(recipe, network, initial, None, str(base), alone().control, lambda _: None)
    fill(network, weights, torch.device("cpu"))
    for name, p in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    files = recipe.checkpoint_files(config, network, recipe.build_data(config))
    (tmp_path / "run").mkdir()
    return base, saved(tmp_path / "run", "finetune_lm", network, config, files), network.eval()  # type: ignore[arg-type]


@torch.no_grad()
def logits(network: Any) -> torch.Tensor:
    return network.eval()(input_ids=torch.arange(48).view(2, 24)).logits


def test_adapters_are_merged_or_alone(adapted: tuple[Path, Path, Any], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, path, network = adapted
    expected = logits(network)
    for argv in ([], ["--adapter"]):
        export_hf.main([str(path), "--out", str(tmp_path / f"out{len(argv)}"), *argv])
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out0", output_loading_info=True)
    assert not any(info.values())
    assert torch.allclose(logits(merged), expected, atol=1e-5)
    written = json.loads((tmp_path / "out0" / "config.json").read_text())
    assert (written["architectures"], written["dtype"], written["use_cache"]) == (["MixtralForCausalLM"], "float32", True)
    assert "experts.0.w1.weight" in " ".join(load_file(tmp_path / "out0" / "model.safetensors")), "not as others name them"
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert not torch.allclose(logits(plain), expected, atol=1e-2)
    assert torch.allclose(logits(PeftModel.from_pretrained(plain, tmp_path / "out1")), expected, atol=1e-5)
    assert not (tmp_path / "out1" / "model.safetensors").exists()
    assert json.loads((tmp_path / "out1" / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    for out in ("out0", "out1"):
        assert AutoTokenizer.from_pretrained(tmp_path / out)("a river").input_ids
        assert "from the weights of `base`" in (tmp_path / out / "README.md").read_text()


def test_the_card_holds_baseline_and_command_without_a_path(tmp_path: Path) -> None:
    path, _ = story_checkpoint(tmp_path)
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "baseline.json").write_text(json.dumps({"name": "bigram", "loss": 2.5}))
    (tmp_path / "command.txt").write_text(f"old\ntinystories_lm --train_data_path {tmp_path}/ids/train.ids --seed 3\n")
    export_hf.main([str(path), "--out", str(tmp_path / "out")])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| for scale: bigram on the same tokens | 2.5000 |" in card
    assert "    tinystories_lm --train_data_path train.ids --seed 3\n" in card
    assert str(tmp_path) not in card


def pushed(path: Path, out: Path, endpoint: str, token: str | None = "secret", name: str = "owner/name") -> tuple[int, str]:
    """(exit status, output) of an export that is to be pushed, in a process that takes `endpoint` for the hub."""
    env = environment(HF_ENDPOINT=endpoint, HF_HUB_DISABLE_XET="1", HF_HOME=str(out.parent / "hf"), NO_PROXY="127.0.0.1")
    env |= {"HF_TOKEN": token} if token else {}
    argv = [sys.executable, str(ROOT / "tools" / "export_hf.py"), str(path), "--out", str(out), "--push_to_hub", name]
    done = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, text=True, timeout=200)
    return done.returncode, done.stdout + done.stderr


def test_an_export_is_pushed_to_the_hub(tmp_path: Path) -> None:
    path, _ = story_checkpoint(tmp_path)
    with FakeHub() as hub:
        code, text = pushed(path, tmp_path / "out", hub.url)
        assert code == 0, text
        assert f"{hub.url}/owner/name" in text
        assert hub.created == {"name": "name", "organization": "owner", "visibility": "private"}
        assert hub.files == {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}


def test_what_cannot_be_pushed_is_said_before_the_export_or_leaves_it_whole(tmp_path: Path) -> None:
    path, _ = story_checkpoint(tmp_path)
    with FakeHub(refuses=True) as hub:
        for token, name, endpoint, words in (
            ("secret", "name", hub.url, "names no owner; give OWNER/NAME"),
            ("secret", "owner/name", "http://127.0.0.1:9", "the hub does not answer"),
            (None, "owner/name", hub.url, "nobody is logged in at the hub"),
        ):
            code, text = pushed(path, tmp_path / "out", endpoint, token, name)
            assert (code, words in text, (tmp_path / "out").exists()) == (BAD_INPUT, True, False), text
        code, text = pushed(path, tmp_path / "out", hub.url)
    assert code == BAD_INPUT
    assert "push_to_hub owner/name failed" in text
    assert "hf upload owner/name" in text
    assert (tmp_path / "out" / "model.safetensors").is_file()
