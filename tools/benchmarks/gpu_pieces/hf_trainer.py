"""A peer: transformers' Trainer, on transformers' GPT-2 or any model that takes `input_ids` and `labels` and returns a loss."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_pieces.contenders import Contender
from benchmarks.gpu_pieces.nanogpt import Shape


class Windows(torch.utils.data.Dataset):
    """Consecutive windows of a file of ids. Labels are the ids themselves, because transformers' models shift them."""

    def __init__(self, ids: Path, length: int) -> None:
        self.ids, self.length = np.memmap(ids, np.uint16, "r"), length

    def __len__(self) -> int:
        return len(self.ids) // self.length

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        window = self.ids[number * self.length : (number + 1) * self.length]
        tokens = torch.from_numpy(window.astype(np.int64))
        return {"input_ids": tokens, "labels": tokens}


def hf_gpt2(shape: Shape) -> torch.nn.Module:
    """transformers' own GPT-2, without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {
        "n_positions": shape.length,
        "n_embd": shape.width,
        "n_layer": shape.layers,
        "n_head": shape.heads,
    }
    dropouts: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    tokens: dict[str, Any] = {"vocab_size": shape.vocab_size, "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropouts, **tokens, use_cache=False))


class HfTrainerLoop(Contender):
    """`Trainer.train`, which a callback blocks between rounds."""

    def __init__(
        self, model: torch.nn.Module, length: int, batch_size: int, ids: Path, folder: Path, device: torch.device
    ) -> None:
        from transformers import Trainer, TrainerCallback, TrainingArguments

        loop = self

        class Steps(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                loop.step_done()

        before = dict(os.environ)
        on_gpu = device.type == "cuda"
        arguments = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=batch_size,
            max_steps=1_000_000,
            learning_rate=6e-4,
            weight_decay=0.1,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            bf16=on_gpu,
            torch_compile=on_gpu,
            use_cpu=not on_gpu,
            dataloader_pin_memory=on_gpu,
            logging_steps=100,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        self.trainer: Any = Trainer(model=model, args=arguments, train_dataset=Windows(ids, length), callbacks=[Steps()])
        # It leaves settings for Accelerate in the environment, which the next trainer of this process would read.
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        super().__init__(self.trainer.train)

    def close(self) -> None:
        """End the loop."""
        super().close()
        self.trainer = None
