"""Exports a checkpoint as a folder that transformers (and libraries built on it, such as vLLM) can load.

python tools/export_hf.py runs/tinystories_lm/NAME/checkpoints/best_model --out exported
python tools/export_hf.py runs/finetune_lm/NAME/checkpoints/best_model --out exported --push_to_hub OWNER/NAME

A tinystories_lm model becomes a Llama checkpoint. A gpt2_wikitext model is a GPT-2 already and stays as it is. A finetune_lm
model keeps the architecture that it began with; its adapters are merged into it, or exported alone (--adapter). The folder also
has the tokenizer, generation_config.json and a model card (README.md) with data, losses and command.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from model_card import model_card
from safetensors.torch import save_file

from recipes.data.hub import hub_is_reachable
from recipes.data.tokenizer import END_OF_TEXT, end_of_text_id, vocabulary_size
from recipes.finetune_lm import FinetuneLM
from recipes.models.causal_lm import save_adapters, save_merged
from recipes.models.llama_form import ROTATED, by_halves, their_name
from trainer.checkpoints.checkpoint import Checkpoint, resolve
from trainer.checkpoints.network import load_network
from trainer.command_line import config as configuration
from trainer.command_line.locations import argument_path
from trainer.errors import UserError, one_line
from trainer.recipe import Data


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line, exports, prints the folder. Exits with 2 (5: a damaged checkpoint) and one line if it cannot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="checkpoint folder, such as runs/RECIPE/NAME/checkpoints/best_model")
    parser.add_argument("--out", type=argument_path, required=True, help="folder to write; it must not exist, or be empty")
    parser.add_argument("--tokenizer", help="a folder or tokenizer.json (default: the checkpoint's)")
    parser.add_argument("--adapter", action="store_true", help="of a LoRA run, the adapters alone, as peft loads them")
    parser.add_argument("--push_to_hub", metavar="OWNER/NAME", help="upload the folder too, as this model of the hub")
    options = parser.parse_args(arguments)
    try:
        if options.push_to_hub:
            check_hub(options.push_to_hub)
        export(options.checkpoint, options.out, options.tokenizer, options.adapter)
        if options.push_to_hub:
            print(push(options.out, options.push_to_hub))
    except UserError as error:
        parser.exit(error.exit_code, f"export_hf: {error}\n")
    except (OSError, ValueError) as error:
        parser.exit(2, f"export_hf: {' '.join(str(error).split())}\n")
    print(options.out)


def export(checkpoint_path: str, out: Path, tokenizer: str | None = None, adapter: bool = False) -> None:
    """Write the folder `out`, completely or not at all. Raises UserError, OSError or ValueError.

    `tokenizer`: a folder or tokenizer.json in place of the checkpoint's. `adapter`: write the LoRA adapters alone.
    """
    checkpoint, out = Checkpoint(resolve(checkpoint_path, {})), out.resolve()
    checkpoint.verify()
    recipe, config = checkpoint.state["recipe"], checkpoint.config
    if recipe not in ("tinystories_lm", "gpt2_wikitext", "finetune_lm"):
        known = "only tinystories_lm, gpt2_wikitext and finetune_lm have a form in transformers"
        raise UserError(f"{checkpoint.path} was written by {recipe!r}; {known}")
    if adapter and not config["model"].get("lora_rank"):
        raise UserError(f"{checkpoint.path} has no adapters: it was trained without --lora_rank; leave out --adapter")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=out.parent) as temporary:
        folder = Path(temporary, out.name)
        folder.mkdir()
        if recipe == "finetune_lm":
            _write_finetuned(folder, checkpoint, adapter)
        else:
            tokenizer_json = _tokenizer(checkpoint, tokenizer)
            _check_entries(checkpoint, tokenizer_json)
            length = config["model"].get("context_length") or config["model"]["max_length"]
            end_of_text = _write_tokenizer(folder, tokenizer_json, length)
            if recipe == "tinystories_lm":
                _write_llama(folder, checkpoint, config["model"], end_of_text)
            else:
                _copy_gpt2(folder, checkpoint)
        (folder / "README.md").write_text(model_card(checkpoint), encoding="utf-8")
        for file in folder.iterdir():
            file.chmod((folder / "README.md").stat().st_mode)  # safetensors writes 0600 whatever the umask
        os.replace(folder, out)


def check_hub(name: str) -> None:
    """UserError if an upload to `name` cannot work. Called first, because an export may take an hour."""
    from huggingface_hub import get_token

    if "/" not in name:
        raise UserError(f"push_to_hub {name!r} names no owner; give OWNER/NAME")
    if not hub_is_reachable():
        raise UserError(f"push_to_hub {name}: the hub does not answer; leave it out, and upload later: hf upload {name} FOLDER")
    if get_token() is None:
        raise UserError(f"push_to_hub {name}: nobody is logged in at the hub; `hf auth login`, or set HF_TOKEN")


def push(folder: Path, name: str) -> str:
    """Upload an exported folder, to a new private model if there is none. Returns its URL. UserError on failure."""
    from huggingface_hub import HfApi

    try:
        hub = HfApi()
        hub.create_repo(name, private=True, exist_ok=True)
        return str(hub.upload_folder(folder_path=folder, repo_id=name, commit_message="Upload by samecurve"))
    except Exception as error:  # the library raises a dozen types; to the user all mean the same
        raise UserError(
            f"push_to_hub {name} failed ({one_line(error, 300)}); {folder} is whole: hf upload {name} {folder}"
        ) from error


def _tokenizer(checkpoint: Checkpoint, path: str | None) -> str:
    """The text of tokenizer.json: of `path` if given, else of the checkpoint. UserError if there is none."""
    from recipes.data.tokenizer import existing_tokenizer

    if path:
        return existing_tokenizer(path).to_str()
    if "tokenizer.json" not in checkpoint.files:
        raise UserError(f"{checkpoint.path} holds no tokenizer.json, as there was none beside its data; give --tokenizer PATH")
    return checkpoint.text("tokenizer.json")


def _check_entries(checkpoint: Checkpoint, tokenizer_json: str) -> None:
    """UserError if the tokenizer has ids that the model has no embedding for."""
    from tokenizers import Tokenizer

    name = "token_embeddings.weight" if checkpoint.state["recipe"] == "tinystories_lm" else "transformer.wte.weight"
    (rows, _), _ = checkpoint.form("model", name)
    entries = vocabulary_size(Tokenizer.from_str(tokenizer_json))
    if entries > rows:
        raise UserError(f"the tokenizer has {entries} entries, {checkpoint.path} {rows}; give the one it was trained with")


def _write_tokenizer(folder: Path, tokenizer_json: str, length: int) -> int:
    """Write tokenizer.json and tokenizer_config.json; `length`: most tokens of a sequence. Returns the id of END_OF_TEXT."""
    from tokenizers import Tokenizer

    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # a name that every version of transformers knows
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=1), encoding="utf-8")
    return end_of_text_id(Tokenizer.from_str(tokenizer_json))


def _write_llama(folder: Path, checkpoint: Checkpoint, model: dict[str, Any], end_of_text: int) -> None:
    """Write config.json, generation_config.json and model.safetensors of a LlamaForCausalLM that has the same logits; of a
    Qwen3ForCausalLM if the model norms queries and keys. UserError if neither can express the model."""
    from transformers import GenerationConfig, LlamaForCausalLM, Qwen3ForCausalLM

    for key, supported, flag in (
        ("norm_position", "pre", "--norm_position post"),
        ("ffn", "swiglu", "--ffn silu"),
        ("rope", True, "--no_rope"),
    ):
        if model[key] != supported:
            raise UserError(f"{checkpoint.path} was trained with {flag}, which a Llama checkpoint cannot express")
    width = model["head_dim"] or model["d_model"] // model["num_heads"]
    kind: Any = Qwen3ForCausalLM if model["qk_norm"] else LlamaForCausalLM
    config = kind.config_class(
        vocab_size=model["vocab_size"],
        hidden_size=model["d_model"],
        intermediate_size=model["d_ff"],
        num_hidden_layers=model["num_layers"],
        num_attention_heads=model["num_heads"],
        num_key_value_heads=model["num_kv_heads"] or model["num_heads"],
        head_dim=width,
        max_position_embeddings=model["context_length"],
        rms_norm_eps=model["norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": model["rope_theta"]},
        tie_word_embeddings=model["tie_embeddings"],
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )
    network = kind(config)
    weights = _weights(checkpoint)
    weights = {their_name(name): by_halves(t, width) if name.endswith(ROTATED) else t for name, t in weights.items()}
    if model["tie_embeddings"]:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    network.load_state_dict(weights)
    network.generation_config = GenerationConfig(
        bos_token_id=end_of_text, eos_token_id=end_of_text, do_sample=True, temperature=0.8, top_p=0.95
    )
    network.save_pretrained(folder)
    config_json = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config_json["rope_theta"] = model["rope_theta"]  # where transformers before 5 looks for it
    (folder / "config.json").write_text(json.dumps(config_json, indent=1), encoding="utf-8")


def _write_finetuned(folder: Path, checkpoint: Checkpoint, adapter: bool) -> None:
    """Write the network with adapters merged into it, as `save_pretrained` does; with `adapter`, the adapters as peft does."""
    recipe = FinetuneLM()
    config = configuration.from_mapping(recipe.config_class, checkpoint.config, str(checkpoint.path))
    network = load_network(recipe, checkpoint, config, Data(None, {}), torch.device("cpu"))
    if adapter:
        base = config.optimisation.init_from
        save_adapters(network, Path(base).name if Path(base).exists() else base, folder)
    else:
        save_merged(network, config.model.architecture, folder)
    for name in checkpoint.files:
        if name.startswith(("tokenizer", "chat_template", "generation_config", "special_tokens")):
            shutil.copyfile(checkpoint.path / name, folder / name)


def _copy_gpt2(folder: Path, checkpoint: Checkpoint) -> None:
    """Copy the files that transformers reads; of a run with `--ema`, write the averaged weights instead of the weights."""
    for name in checkpoint.files:
        if name in ("config.json", "generation_config.json") or (name.startswith("model") and not checkpoint.averaged):
            shutil.copyfile(checkpoint.path / name, folder / name)
    if checkpoint.averaged:
        save_file(_weights(checkpoint), folder / "model.safetensors", metadata={"format": "pt"})


def _weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """{name: weight}; the averaged weights of a run with `--ema`."""
    averaged = checkpoint.averaged
    return {
        name: checkpoint.tensor("optimizer", averaged[name]) if name in averaged else checkpoint.tensor("model", name)
        for name in checkpoint.names("model")
    }


if __name__ == "__main__":
    main()
