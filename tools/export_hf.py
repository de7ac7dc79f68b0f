"""Exports a checkpoint as a folder that transformers (and libraries built on it, such as vLLM) can load.

python tools/export_hf.py runs/tinystories_lm/NAME/checkpoints/best_model --out exported

A tinystories_lm model becomes a Llama checkpoint; a gpt2_wikitext one is GPT-2 already and stays as it is. With tokenizer,
generation_config.json and a model card (README.md) that holds the measured loss.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml

from recipes.data.tokenizer import END_OF_TEXT, end_of_text_id, vocabulary_size
from trainer.checkpoints.checkpoint import Checkpoint, resolve
from trainer.command_line.locations import argument_path
from trainer.errors import UserError
from trainer.reporting.trackers import read_metrics


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line, exports, prints the folder. Exits with 2 (5: a damaged checkpoint) and one line if it cannot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="checkpoint folder, such as runs/RECIPE/NAME/checkpoints/best_model")
    parser.add_argument("--out", type=argument_path, required=True, help="folder to write; it must not exist, or be empty")
    parser.add_argument("--tokenizer", help="a folder or tokenizer.json (default: the checkpoint's)")
    options = parser.parse_args(arguments)
    try:
        export(options.checkpoint, options.out, options.tokenizer)
    except UserError as error:
        parser.exit(error.exit_code, f"export_hf: {error}\n")
    except (OSError, ValueError) as error:
        parser.exit(2, f"export_hf: {' '.join(str(error).split())}\n")
    print(options.out)


def export(checkpoint_path: str, out: Path, tokenizer: str | None = None) -> None:
    """Write the folder, completely or not at all. Raises UserError, OSError or ValueError."""
    checkpoint, out = Checkpoint(resolve(checkpoint_path, [])), out.resolve()
    checkpoint.verify()
    recipe = checkpoint.state.get("recipe")
    if recipe not in ("tinystories_lm", "gpt2_wikitext"):
        raise UserError(
            f"{checkpoint.path} was written by {recipe!r}; only tinystories_lm and gpt2_wikitext have a form in transformers"
        )
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; choose another --out")
    tokenizer_json = _tokenizer(checkpoint, tokenizer)
    _check_entries(checkpoint, tokenizer_json)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=out.parent) as temporary:
        folder = Path(temporary, out.name)
        folder.mkdir()
        config = yaml.safe_load(checkpoint.text("config.yaml"))
        if recipe == "tinystories_lm":
            _write_llama(
                folder, checkpoint, config["model"], _write_tokenizer(folder, tokenizer_json, config["model"]["context_length"])
            )
        else:
            _write_tokenizer(folder, tokenizer_json, config["model"]["max_length"])
            _copy_gpt2(folder, checkpoint)
        (folder / "README.md").write_text(_card(checkpoint, recipe, config), encoding="utf-8")
        for file in folder.iterdir():
            file.chmod((folder / "README.md").stat().st_mode)  # safetensors writes 0600 whatever the umask
        os.replace(folder, out)


def _tokenizer(checkpoint: Checkpoint, path: str | None) -> str:
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
    entries, rows = vocabulary_size(Tokenizer.from_str(tokenizer_json)), checkpoint.form("model", name)[0][0]
    if entries > rows:
        raise UserError(f"the tokenizer has {entries} entries, {checkpoint.path} {rows}; give the one it was trained with")


def _write_tokenizer(folder: Path, tokenizer_json: str, length: int) -> int:
    """tokenizer.json and tokenizer_config.json; the id of END_OF_TEXT."""
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
    """config.json, generation_config.json and model.safetensors of a LlamaForCausalLM with the same logits."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    for key, supported, flag in (
        ("norm_position", "pre", "--norm_position post"),
        ("ffn", "swiglu", "--ffn silu"),
        ("qk_norm", False, "--qk_norm"),
        ("rope", True, "--no_rope"),
    ):
        if model[key] != supported:
            raise UserError(f"{checkpoint.path} was trained with {flag}, which a Llama checkpoint cannot express")
    config = LlamaConfig(
        vocab_size=model["vocab_size"],
        hidden_size=model["d_model"],
        intermediate_size=model["d_ff"],
        num_hidden_layers=model["num_layers"],
        num_attention_heads=model["num_heads"],
        max_position_embeddings=model["context_length"],
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": model["rope_theta"]},
        tie_word_embeddings=model["tie_embeddings"],
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )
    network = LlamaForCausalLM(config)
    weights = {_llama_name(name): _paired_by_halves(checkpoint, name, model["num_heads"]) for name in checkpoint.names("model")}
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


def _llama_name(name: str) -> str:
    """Llama's name of one of our weights."""
    parts = {
        "attn.output_proj": "self_attn.o_proj",
        "attn.": "self_attn.",
        "ffn.w1": "mlp.gate_proj",
        "ffn.w2": "mlp.down_proj",
        "ffn.w3": "mlp.up_proj",
        "ln1": "input_layernorm",
        "ln2": "post_attention_layernorm",
        "token_embeddings": "embed_tokens",
        "ln_final": "norm",
    }
    if name == "lm_head.weight":
        return name
    ours = next(part for part in parts if part in name)
    return "model." + name.replace(ours, parts[ours])


def _paired_by_halves(checkpoint: Checkpoint, name: str, num_heads: int) -> Any:
    """A weight in Llama's layout: of queries and keys, the rows of each head reordered, the first of
    each pair before the second. We rotate rows (2i, 2i + 1) together, transformers' Llama rows (i, i + d_head / 2).
    """
    weight = checkpoint.tensor("model", name)
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return weight
    pairs = weight.unflatten(0, (num_heads, -1, 2))  # [heads, d_head / 2, 2, d_model]
    return pairs.transpose(1, 2).flatten(0, 2)


def _copy_gpt2(folder: Path, checkpoint: Checkpoint) -> None:
    """The files of a GPT-2 checkpoint that transformers reads, byte for byte."""
    from transformers import GenerationConfig, GPT2Config

    for name in checkpoint.files:
        if name == "config.json" or name.startswith("model"):
            shutil.copyfile(checkpoint.path / name, folder / name)
    config = GPT2Config.from_json_file(folder / "config.json")
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, do_sample=True, temperature=0.8, top_p=0.95
    ).save_pretrained(folder)


def _card(checkpoint: Checkpoint, recipe: str, config: dict[str, Any]) -> str:
    """The model card: what was measured, on which text, and how it was trained."""
    progress, o = checkpoint.state["train_state"], config["optimisation"]
    step, samples = progress["step"], o["batch_size"] * o["gradient_accumulation_steps"]
    length = config["model"].get("context_length") or config["model"]["max_length"]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
        f"# {recipe}, step {step:,}",
        "",
        f"Trained by samecurve on {_trained_on(config['data'])}: {step:,} steps of {samples} samples of up to {length} tokens, "
        f"{o['optimizer']}, peak learning rate {o['learning_rate']:g}, seed {o['seed']}.",
        "",
        "| measured | nats per token |",
        "|---|---|",
        *(f"| {name} | {value:.4f} |" for name, value in _measured(checkpoint).items()),
        "",
    ]
    if config["run"]["eval_iters"]:
        lines += [f"Measured on at most {config['run']['eval_iters'] * samples:,} windows of each set, spread over it.", ""]
    return "\n".join(lines)


def _trained_on(data: dict[str, Any]) -> str:
    paths = data.get("train_data_path") or [data.get("data_dir") or data["dataset"]]
    return ", ".join(f"`{Path(path).name}`" for path in paths)


def _measured(checkpoint: Checkpoint) -> dict[str, float]:
    """Losses of this very step, from the run's metrics.jsonl; without it, those in the checkpoint."""
    progress = checkpoint.state["train_state"]
    step = progress["step"]
    measured: dict[str, float] = {}
    for folder in (checkpoint.path.parent.parent, checkpoint.path.parent):
        if (folder / "metrics.jsonl").is_file():
            rows = [row for row in read_metrics(folder / "metrics.jsonl") if row["step"] == step]
            for key, name in (("eval/val_loss", "validation loss"), ("eval/train_loss", "training loss, in evaluation")):
                values = [value for row in rows if (value := row.get(key)) is not None]
                measured |= {name: values[-1]} if values else {}
    if not measured and progress["evaluated_step"] == step and progress["evaluated_metric"] is not None:
        measured["validation loss"] = progress["evaluated_metric"]
    if progress["train_loss"] is not None:
        measured["training loss of the last log interval"] = progress["train_loss"]
    return measured


if __name__ == "__main__":
    main()
