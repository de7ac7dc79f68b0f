"""Any causal language model of transformers: built from its config.json, frozen or adapted, filled from its own files."""

from __future__ import annotations

import json
import re
import sys
import tempfile
import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

ALL_ROWS = slice(None)
BASE = ".base_layer"
"""peft inserts this into the name of a weight that has an adapter"""


def config_of(architecture: str) -> PretrainedConfig:
    """transformers' configuration of a config.json, given as text. ValueError for other models, and for quantized ones."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    given = json.loads(architecture)
    if "quantization_config" in given:
        raise ValueError("its weights are quantized (quantization_config), and cannot be trained; choose the original ones")
    config = AutoConfig.for_model(**given) if given.get("model_type") in CONFIG_MAPPING else None
    if config is None or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"model_type {given.get('model_type')!r} is no causal language model of transformers; choose another")
    return config


def build_causal_lm(architecture: str, *, train_last: int, lora_rank: int, lora_alpha: float) -> PreTrainedModel:
    """The network of a config.json, given as text, with fresh weights in fp32; names are those of transformers.

    `train_last` N: all but the last N blocks are frozen (0: none is). `lora_rank` R: all is frozen, and every linear layer but
    the head gets an adapter of rank R, scaled by alpha / R (Hu et al. 2021, section 4.1). ValueError for what cannot be built.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = config_of(architecture)
    # The class itself: under ZeRO-3 `from_config` would partition the parameters, and their shapes would be lost.
    network: PreTrainedModel = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)  # type: ignore[operator]
    if train_last and lora_rank:
        raise ValueError(f"train_last {train_last} and lora_rank {lora_rank} are two ways to train a part; keep one")
    if train_last:
        blocks = blocks_of(network)
        if train_last > len(blocks):
            raise ValueError(f"train_last {train_last} is more than the {len(blocks)} blocks of the network")
        network.requires_grad_(False)
        for block in blocks[-train_last:]:
            block.requires_grad_(True)
    if lora_rank:
        from peft import LoraConfig, inject_adapter_in_model

        alpha: Any = lora_alpha  # peft annotates it as an int, and only divides it
        adapters = LoraConfig(r=lora_rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        with warnings.catch_warnings(action="ignore"):  # about settings that peft chooses for this network
            inject_adapter_in_model(adapters, network)
        # Checkpoints hold the adapters alone: frozen weights are read again from --init_from.
        frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
        network.non_persistent_parameters = frozen  # type: ignore[assignment]
    return network


def blocks_of(network: PreTrainedModel) -> list[nn.Module]:
    """The Transformer blocks of a network, first to last."""
    return [module for module in network.modules() if type(module).__name__ in (network._no_split_modules or ())]


def keeps_examples_apart(network: PreTrainedModel) -> bool:
    """Whether position ids that restart with each example keep packed examples apart.

    transformers derives a mask from them in attention layers; other kinds of layers would carry state into the next example.
    """
    kinds = {*(getattr(network.config, "layer_types", None) or ["full_attention"])}
    attends = kinds <= {"full_attention", "sliding_attention", "chunked_attention"}
    return attends and hasattr(sys.modules[type(network).__module__], "create_causal_mask")


def config_json(architecture: str, network: PreTrainedModel) -> str:
    """The config.json of a checkpoint folder, for transformers and tools built on it; it says that weights are fp32."""
    given = {key: value for key, value in json.loads(architecture).items() if key != "torch_dtype"}
    named = {"architectures": [type(network).__name__], "dtype": "float32", "use_cache": True}
    return json.dumps(given | named, indent=2) + "\n"


def named_as_in(network: PreTrainedModel, stored: Mapping[str, Any]) -> dict[str, Any]:
    """{name in the network: tensor} of a published model. Tensors have a `shape`, and are read later, by `read(rows)`.

    They are renamed, and some are merged (the experts of a mixture), as transformers does on loading. Those that it ignores,
    and the second name of a tied one, are left out.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    state = network.state_dict()
    own = [name for name, _ in [*network.named_parameters(), *network.named_buffers()] if name in state]
    ours = {name.replace(BASE, ""): name for name in own}
    known = {name.replace(BASE, ""): tensor for name, tensor in state.items()}
    mapping = get_model_conversion_mapping(network)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    left_out = [*(network._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", r"attn\.masked_bias"]
    found: dict[str, Any] = {}
    parts: dict[str, list[tuple[str, str]]] = {}
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, network.base_model_prefix, known)
        if name not in known and key in known:
            name, pattern = key, None
        if name in known and name not in ours:
            continue  # tied to one that has a parameter
        if name not in known and any(re.search(ignored, key) for ignored in left_out):
            continue
        if pattern is None:
            found[ours.get(name, name)] = stored[key]
        else:
            parts.setdefault(name, []).append((key, pattern))

    def merged(name: str, rows: slice) -> Tensor:
        converter = deepcopy(by_pattern[parts[name][0][1]])
        for key, pattern in parts[name]:
            converter.add_tensor(name, key, pattern, stored[key].read(ALL_ROWS))
        whole = converter.convert(name, model=network, config=network.config)[name]
        return (whole[0] if isinstance(whole, list) else whole)[rows]

    for name, ((key, _), *_) in parts.items():
        found[ours[name]] = replace(stored[key], shape=tuple(known[name].shape), read=partial(merged, name))
    return found


def files_of(tokenizer: Any) -> dict[str, str]:
    """{file name: content} of a tokenizer and of generation_config.json, as transformers reads them."""
    from transformers import GenerationConfig

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        GenerationConfig(**ids).save_pretrained(folder)
        return {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(folder).iterdir()) if path.is_file()}


def save_merged(network: Any, architecture: str, folder: Path) -> None:
    """Merge the adapters into the weights, and write the plain network with `save_pretrained`."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in network.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
    weights = {name.replace(BASE, ""): tensor for name, tensor in network.state_dict().items() if ".lora_" not in name}
    with torch.device("meta"):
        plain = build_causal_lm(architecture, train_last=0, lora_rank=0, lora_alpha=1.0)
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    plain.config.use_cache = True
    plain.save_pretrained(folder)


def save_adapters(network: Any, base: str, folder: Path) -> None:
    """Write adapter_config.json, which names the `base` model, and adapter_model.safetensors, as `PeftModel` reads them."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    network.peft_config["default"].base_model_name_or_path = base
    network.peft_config["default"].save_pretrained(folder)
    tensors = get_peft_model_state_dict(network, adapter_name="default", save_embedding_layers=False)
    save_file({f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
