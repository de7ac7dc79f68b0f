"""Weights of others: found in one file or several, read row by row, refused by name where they do not fit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from recipes.collatz import Collatz
from recipes.gpt2_wikitext import Gpt2Wikitext
from recipes.models.gpt2 import build_gpt2
from trainer.checkpoints.network import first_weights
from trainer.checkpoints.pretrained import stored_tensors
from trainer.distributed.launch import alone
from trainer.errors import UserError
from trainer.initial_weights import build_empty, fill

SHAPE = {"max_length": 8, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 64}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[GPT2LMHeadModel, Path]:
    """transformers' GPT-2, and the folder it is saved in, in several files."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=8, n_embd=16, n_layer=2, n_head=2, activation_function="gelu_pytorch_tanh")
    network, folder = GPT2LMHeadModel(config).eval(), tmp_path_factory.mktemp("theirs")
    network.save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return network, folder


def ours(folder: Path, **changes: Any) -> torch.nn.Module:
    """Our GPT-2 as a run begins with --init_from."""
    network, initial = build_empty(lambda: build_gpt2(50, 0, dropout=0.0, **SHAPE | changes), 0)
    weights = first_weights(Gpt2Wikitext(), network, initial, None, str(folder), alone().control, lambda _: None)
    fill(network, weights, torch.device("cpu"))
    return network.eval()


def test_a_gpt2_of_transformers_gives_its_logits(theirs: tuple[GPT2LMHeadModel, Path]) -> None:
    network, folder = theirs
    ids = torch.arange(8).view(1, 8)
    with torch.no_grad():
        assert torch.allclose(ours(folder)(ids), network(ids).logits, atol=1e-5)


def test_rows_are_read_alone_and_outlive_their_file(theirs: tuple[GPT2LMHeadModel, Path], tmp_path: Path) -> None:
    network, folder = theirs
    shutil.copytree(folder, tmp_path / "copy")
    stored = stored_tensors(str(tmp_path / "copy"))["transformer.wte.weight"]
    assert stored.shape == (50, 16)
    rows = stored.read(slice(10, 20))
    for file in (tmp_path / "copy").iterdir():
        file.write_bytes(b"")
    assert rows.equal(network.transformer.wte.weight[10:20])
    assert rows.untyped_storage().nbytes() == 10 * 16 * 4


def rewritten(folder: Path, target: Path, change: Any) -> Path:
    """The tensors of a folder, changed, in one file with the names of the first GPT-2s."""
    target.mkdir()
    tensors = {
        key.removeprefix("transformer."): t for file in folder.glob("*.safetensors") for key, t in load_file(file).items()
    }
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return target


def test_the_first_files_of_gpt2(theirs: tuple[GPT2LMHeadModel, Path], tmp_path: Path) -> None:
    """Without a prefix, with masks in every layer, and a head of its own that is the embedding."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {"h.0.attn.bias": torch.ones(1, 1, 8, 8).tril(), "lm_head.weight": tensors["wte.weight"].clone()}

    network, folder = theirs
    assert ours(rewritten(folder, tmp_path / "old", change)).lm_head.weight.equal(network.lm_head.weight)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("wpe.weight"), "transformer.wpe.weight: missing instead of (8, 16)"),
        (lambda t: t.update({"more": torch.ones(1)}), "transformer.more: not in this model"),
        (lambda t: t.update({"ln_f.bias": torch.ones(3)}), "transformer.ln_f.bias: (3,) instead of (16,)"),
        (lambda t: t["ln_f.bias"].fill_(float("nan")), "holds NaN or infinity in ln_f.bias"),
        (lambda t: t.update({"lm_head.weight": torch.ones(50, 16)}), "lm_head.weight and wte.weight differ"),
    ],
)
def test_what_does_not_fit_is_named(theirs: tuple[GPT2LMHeadModel, Path], tmp_path: Path, change: Any, words: str) -> None:
    with pytest.raises(UserError) as refused:
        ours(rewritten(theirs[1], tmp_path / "other", change))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_no_weights_and_weights_of_a_kind_that_is_never_opened(tmp_path: Path) -> None:
    for file, content, words in [
        (None, b"", "holds neither model.safetensors nor"),
        ("pytorch_model.bin", b"cos\nsystem\n", "as a pickle (pytorch_model.bin), which is never opened"),
        ("model.safetensors", b"cos\nsystem\n", "is not a safetensors file"),
    ]:
        if file:
            (tmp_path / file).write_bytes(content)
        with pytest.raises(UserError, match="--init_from") as refused:
            ours(tmp_path)
        assert words in str(refused.value)


def test_a_recipe_without_pretrained_weights_says_what_it_takes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a checkpoint of collatz; give the path of one"):
        Collatz().pretrained(str(tmp_path), None, None)  # type: ignore[arg-type]
