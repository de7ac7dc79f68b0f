"""GPT-2 as `transformers` has it, built from flags: tanh GELU, tied embeddings, pre-norm (Radford et al. 2019)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import GPT2LMHeadModel


CAUSAL_ATTENTION = "causal_sdpa"


def build_gpt2(
    vocab_size: int,
    end_of_text: int,
    *,
    max_length: int,
    d_model: int,
    num_layers: int,
    num_heads: int | None,
    d_ff: int | None,
    dropout: float,
    gradient_checkpointing: bool = False,
) -> GPT2LMHeadModel:
    """A GPT2LMHeadModel with fresh weights; `num_heads` None means heads of 64, `d_ff` None 4 x d_model.

    Residual projections start with a standard deviation of 0.02 / sqrt(2 x layers). ValueError where sizes do not fit.
    """
    from transformers import AttentionInterface, GPT2Config, GPT2LMHeadModel
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    heads = num_heads or max(1, d_model // 64)
    if d_model % heads:
        raise ValueError(f"d_model {d_model} does not divide into {heads} heads; give a --num_heads that divides it")
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=max_length,
        n_embd=d_model,
        n_layer=num_layers,
        n_head=heads,
        n_inner=d_ff or 4 * d_model,
        activation_function="gelu_pytorch_tanh",  # `gelu_new` by its other name: one operation instead of seven
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config)
    # Purely causal attention without a mask tensor. transformers would look for packed sequences in every forward, which
    # reads the device on the host, and under torch.compile would hand over a mask that keeps flash attention away.
    AttentionInterface.register(CAUSAL_ATTENTION, sdpa_attention_forward)
    model.config._attn_implementation = CAUSAL_ATTENTION
    if gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def pretrained_gpt2(name: str) -> dict[str, Tensor]:
    """Weights of a pretrained GPT-2 by the names of `build_gpt2`'s model. OSError where the hub or folder has none."""
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(name, use_safetensors=True).state_dict()


def training_flops_per_token(config: Any) -> float:
    """Forward and backward FLOPs for one token: 6 per weight in a matrix product, 12 x layers x width x length for attention.

    Kaplan et al. 2020, section 2.1, with the output layer counted and the embedding lookups not; PaLM (2022), appendix B.
    """
    width, inner = config.n_embd, config.n_inner
    per_layer = 4 * width * width + 2 * width * inner
    weights = config.n_layer * per_layer + config.vocab_size * width
    return 6.0 * weights + 12.0 * config.n_layer * width * config.n_positions
