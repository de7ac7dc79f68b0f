"""Tiny random models of transformers to fine-tune, each in a folder with a tokenizer; and examples to train them on."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

ENTRIES = 300
SMALL = {"vocab_size": ENTRIES, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"initializer_range": 0.1}  # with the default, 0.02, attention would hardly change the output
ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": ENTRIES, "initializer_range": 0.1}
    | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    "llama": SMALL | {"intermediate_size": 48, "max_position_embeddings": 64},
    "qwen3": SMALL | {"intermediate_size": 48, "head_dim": 16, "tie_word_embeddings": True},
    "mixtral": SMALL | {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
}
"""{model type: settings of its config.json}"""
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}<|endoftext|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = [
    "a",
    "of",
    "river",
    "stone",
    "walked",
    "quietly",
    "between",
    "seventeen",
    "lighthouses",
    "under",
    "the",
    "old",
    "bridge",
]


def model_folder(family: str, folder: Path, chat: bool = False) -> Path:
    """Write a model of FAMILIES and its tokenizer with `save_pretrained`; `chat`: with TEMPLATE. Returns `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    from recipes.data.tokenizer import END_OF_TEXT, train_tokenizer

    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family], **ENDS))
    network.save_pretrained(folder)
    trained = train_tokenizer([" ".join(WORDS)] * 3, ENTRIES)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
    if chat:
        tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def rows_folder(folder: Path) -> Path:
    """Write train.jsonl and validation.jsonl: prompts and completions of 1 to 8 words, so that token counts differ. Returns
    `folder`."""
    rng = random.Random(0)
    folder.mkdir(exist_ok=True)
    for name, count in (("train", 60), ("validation", 9)):
        texts = [[" ".join(rng.choices(WORDS, k=rng.randint(1, 8))) for _ in range(2)] for _ in range(count)]
        lines = [json.dumps({"prompt": prompt, "completion": f" {completion}"}) for prompt, completion in texts]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder
