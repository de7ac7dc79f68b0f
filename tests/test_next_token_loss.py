"""The loss of a language model's head: chunks and padding change nothing."""

import pytest
import torch
import torch.nn.functional as F

from recipes.models import next_token_loss as module
from recipes.models.next_token_loss import IGNORED, chunk_loss, loss_terms, next_token_loss, predicted_tokens

VOCAB = 50


def example() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(hidden [3, 7, 16], weight, labels [3, 7]), a few labels ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 7, 16, generator=generator, requires_grad=True)
    weight = torch.randn(VOCAB, 16, generator=generator, requires_grad=True)
    labels = torch.randint(0, VOCAB, (3, 7), generator=generator)
    labels[0, 2:5] = IGNORED
    return hidden, weight, labels


def plain(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")


@pytest.mark.parametrize("chunk_tokens", [1, 4, 20, 21, 1000])
def test_chunks_give_the_loss_and_gradients_of_the_whole(chunk_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_LOGITS", chunk_tokens * VOCAB)
    values = example()
    losses = [loss(*values) for loss in (next_token_loss, plain)]
    of_each = next_token_loss(*values, "none")
    assert (of_each.shape, of_each[0, 2:5].tolist()) == ((3, 7), [0, 0, 0])
    hidden, weight, labels = values
    alone = [plain(hidden[1:2, place : place + 1], weight, labels[1:2, place : place + 1]) for place in range(7)]
    torch.testing.assert_close(of_each[1], torch.stack(alone))
    losses.append(of_each.sum())
    gradients = [torch.autograd.grad(loss, values[:2]) for loss in losses]
    for loss, gradient in zip(losses, gradients, strict=True):
        torch.testing.assert_close(loss, losses[1])
        for one, other in zip(gradient, gradients[1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_logits_are_held_a_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    linear = F.linear

    def watched(*arguments: torch.Tensor) -> torch.Tensor:
        sizes.append(linear(*arguments).numel())
        return linear(*arguments)

    monkeypatch.setattr(module, "CHUNK_LOGITS", 4 * VOCAB)
    monkeypatch.setattr(F, "linear", watched)
    next_token_loss(*example()).backward()
    assert max(sizes) == 4 * VOCAB
    assert sum(sizes) == 2 * 21 * VOCAB  # again in the backward pass


def test_rows_that_pad_the_weight_have_no_share() -> None:
    hidden, weight, labels = example()
    hidden, labels = hidden.flatten(0, 1), labels.flatten()
    losses = [chunk_loss(hidden, F.pad(weight, (0, 0, 0, more)), labels, VOCAB) for more in (0, 14)]
    assert losses[0].item() == losses[1].item()
    for one, other in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in losses), strict=True):
        torch.testing.assert_close(one, other)


def test_the_sum_is_in_fp32_whatever_the_weights_are() -> None:
    hidden, weight, labels = example()
    low = next_token_loss(hidden.bfloat16(), weight.bfloat16(), labels)
    assert low.dtype == torch.float32
    logits = F.linear(hidden.bfloat16(), weight.bfloat16()).double().flatten(0, 1)
    exact = F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="sum")
    assert low.item() == pytest.approx(exact.item(), rel=1e-6)


def test_nothing_but_ignored_labels_is_a_loss_of_0() -> None:
    hidden, weight, labels = example()
    loss = next_token_loss(hidden, weight, torch.full_like(labels, IGNORED))
    assert loss.item() == 0.0
    assert all(not gradient.any() for gradient in torch.autograd.grad(loss, (hidden, weight)))


def test_sums_of_sets_are_of_their_own_rows_and_carry_no_gradient() -> None:
    values = torch.tensor([[1.0, 2.0], [torch.nan, 4.0], [5.0, 6.0]], requires_grad=True)
    terms = loss_terms(lambda reduction: values * 10, torch.tensor([0, 2, 0]), ("a", "b", "c"))
    assert [terms["a"].item(), terms["b"].item()] == [140.0, 0.0]
    assert terms["c"].isnan()
    assert [name for name, term in terms.items() if term.requires_grad] == ["next_token"]
    labels = torch.tensor([[1, IGNORED], [IGNORED, IGNORED], [3, 4]])
    assert predicted_tokens(labels, torch.tensor([0, 2, 0]), ("a", "b", "c")) == {"next_token": 3, "a": 3, "b": 0, "c": 0}
    assert predicted_tokens(labels, None, ()) == {"next_token": 3}
