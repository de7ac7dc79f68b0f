"""--init_from reads the configuration of what it loads: flags that were not given follow it, others are refused by name."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from scenarios import planned as planned_by
from scenarios import recipe_of
from small_checkpoints import trainer_state
from tiny_runs import TINY

from recipes.gpt2_wikitext import Config, DataConfig, Gpt2Wikitext, ModelConfig
from trainer.checkpoints import writing
from trainer.command_line import config as configuration
from trainer.errors import UserError

OF_TRANSFORMERS = {"model_type": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 3, "n_positions": 64, "resid_pdrop": 0.2}
OF_TRANSFORMERS |= {"embd_pdrop": 0.2, "attn_pdrop": 0.2}


def folder_of(config: dict[str, Any], folder: Path) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def planned(*argv: str) -> Config:
    """The configuration that a run of this command line begins with."""
    return planned_by(Gpt2Wikitext(), list(argv))


def test_flags_that_were_not_given_take_the_values_of_the_weights(tmp_path: Path) -> None:
    config = planned("--init_from", folder_of(OF_TRANSFORMERS, tmp_path), "--batch_size", "3")
    assert config.model == ModelConfig(d_model=48, num_layers=2, num_heads=3, d_ff=192, max_length=64, dropout=0.2)
    assert config.optimisation.batch_size == 3
    assert config.data.tokenizer == "gpt2"
    (tmp_path / "tokenizer.json").touch()
    assert planned("--init_from", str(tmp_path)).data.tokenizer == str(tmp_path)
    assert planned("--init_from", str(tmp_path), "--tokenizer", "train").data.tokenizer == "train"


def test_what_a_config_leaves_out_is_what_transformers_takes(tmp_path: Path) -> None:
    from transformers import GPT2Config

    config, theirs = planned("--init_from", folder_of({"model_type": "gpt2"}, tmp_path)).model, GPT2Config()
    assert (config.d_model, config.num_layers, config.num_heads) == (theirs.n_embd, theirs.n_layer, theirs.n_head)
    assert (config.max_length, config.d_ff, config.dropout) == (theirs.n_positions, 4 * theirs.n_embd, theirs.resid_pdrop)


def test_flags_that_contradict_the_weights_are_refused_by_name_and_dropout_is_free(tmp_path: Path) -> None:
    init_from = ["--init_from", folder_of(OF_TRANSFORMERS, tmp_path)]
    with pytest.raises(UserError) as refused:
        planned(*init_from, "--num_heads", "1", "--d_model", "32")
    for words in (f"d_model: {tmp_path} has 48, asked for 32", f"num_heads: {tmp_path} has 3, asked for 1"):
        assert words in str(refused.value)
    assert planned(*init_from, "--num_heads", "3", "--dropout", "0").model.dropout == 0.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"activation_function": "relu"}, "activation_function is 'relu', and this network has 'gelu_new' alone"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"attn_pdrop": 0.0}, "resid_pdrop is 0.2, embd_pdrop is 0.2, attn_pdrop is 0.0, and this network has one dropout"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"model_type": None}, "model_type is None"),
    ],
)
def test_what_this_network_has_not_is_refused_by_name(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--init_from") as refused:
        planned("--init_from", folder_of(OF_TRANSFORMERS | change, tmp_path))
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("content", "words"), [(None, "holds no config.json"), ("{", "is not JSON"), ("[]", "is no JSON object")]
)
def test_a_folder_without_a_configuration_is_refused(content: str | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=words):
        planned("--init_from", str(tmp_path))


@pytest.mark.parametrize("name", ["nosuch", "nobody/nosuch", "./nosuch", "/no/such/folder"])
def test_what_is_no_folder_is_said_to_be_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.hub._is_offline_mode", True, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="there is no such folder"):
        planned("--init_from", name)


def test_a_checkpoint_of_ours_brings_its_flags(tmp_path: Path) -> None:
    trained = Config(ModelConfig(d_model=32, num_layers=3, num_heads=2, max_length=40), DataConfig(dataset="embedded"))
    texts = {"config.yaml": configuration.to_yaml(trained), "tokenizer.json": "{}"}
    texts["trainer_state.json"] = trainer_state(4, recipe="gpt2_wikitext")
    saved = writing.write(tmp_path, "checkpoint_step_4", {"model": []}, texts)
    config = planned("--init_from", f"{saved}.pt")
    assert config.model == trained.model
    assert asdict(config.data) == asdict(DataConfig()) | {"tokenizer": str(saved)}
    with pytest.raises(UserError, match=r"num_layers: .* has 3, asked for 2"):
        planned("--init_from", str(saved), "--num_layers", "2")


@pytest.mark.parametrize("name", TINY)
def test_every_recipe_takes_the_network_of_its_own_checkpoint(name: str, tmp_path: Path) -> None:
    recipe, argv = recipe_of(TINY[name][0]), TINY[name][1](tmp_path)
    trained = planned_by(recipe, argv)
    state = trainer_state(4, recipe=recipe.name)
    texts = {"config.yaml": configuration.to_yaml(trained), "trainer_state.json": state}
    saved = writing.write(tmp_path, "checkpoint_step_4", {"model": []}, texts)
    assert planned_by(recipe, ["--init_from", str(saved)]).model == trained.model != recipe.config_class().model
