"""Attention within documents: the mask, and the two forms of it against each other."""

from __future__ import annotations

import warnings

import pytest
import torch

from recipes.models.causal_attention import block_mask, causal_attention, document_mask

POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])


def test_a_token_sees_itself_and_what_is_before_it_in_its_document() -> None:
    mask = document_mask(POSITIONS, 16)
    assert isinstance(mask, torch.Tensor)
    assert mask.shape == (2, 1, 6, 6)
    seen = [{key for key in range(6) if mask[0, 0, query, key]} for query in range(6)]
    assert seen == [{0}, {0, 1}, {0, 1, 2}, {3}, {3, 4}, {5}]
    assert torch.equal(mask[1, 0], torch.ones(6, 6).tril().bool())


def test_without_a_mask_a_token_sees_all_before_it() -> None:
    q, k, v = torch.randn(3, 1, 2, 6, 16)
    whole = document_mask(POSITIONS[1:], 16)
    torch.testing.assert_close(causal_attention(q, k, v), causal_attention(q, k, v, whole))


def test_flex_attention_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU takes, here as plain operations: on a CPU it has no backward pass."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 200, 16)  # more than one block of FlexAttention
    lengths = [[90, 1, 109], [200]]
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it is not compiled
        flexible = causal_attention(q, k, v, block_mask((positions == 0).cumsum(1)))
    torch.testing.assert_close(flexible, causal_attention(q, k, v, document_mask(positions, 16)))
    assert not torch.allclose(flexible, causal_attention(q, k, v), atol=1e-3)
