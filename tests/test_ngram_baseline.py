"""Counting baselines: true distributions, the formula by hand, and the same tokens as a model is scored on."""

import math

import numpy as np
import pytest

from recipes.baselines.ngrams import KneserNeyBigram, bigram_loss, unigram_loss

VOCAB_SIZE = 40


@pytest.fixture
def stream() -> np.ndarray:
    """A stream with structure; ids from 30 on never occur."""
    generator = np.random.default_rng(0)
    steps = generator.geometric(0.3, 5000)
    return (np.cumsum(steps) % 30).astype(np.uint16)


def test_probabilities_sum_to_one_after_any_context(stream: np.ndarray) -> None:
    model = KneserNeyBigram(stream, VOCAB_SIZE)
    contexts, tokens = np.divmod(np.arange(VOCAB_SIZE**2), VOCAB_SIZE)
    probabilities = np.exp(model.log_probability(contexts, tokens)).reshape(VOCAB_SIZE, VOCAB_SIZE)
    assert probabilities.min() > 0
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-12)


def test_sums_to_one_without_singletons_too() -> None:
    model = KneserNeyBigram(np.array([0, 1] * 50), 3)
    for context in range(3):
        probabilities = np.exp(model.log_probability(np.full(3, context), np.arange(3)))
        assert probabilities.min() > 0
        assert math.isclose(probabilities.sum(), 1.0, rel_tol=1e-12)


def test_formula_by_hand() -> None:
    # Pairs: 01 twice; 10, 02, 20 once each: D = 3 / (3 + 2) = 0.6.
    # Seen before 0: {1, 2}; before 1: {0}; before 2: {0}: D' = 2 / (2 + 2) = 0.5.
    model = KneserNeyBigram(np.array([0, 1, 0, 2, 0, 1]), 4)
    spread = 0.5 * 3 / 4 / 4
    continuation = np.array([1.5, 0.5, 0.5, 0.0]) / 4 + spread
    np.testing.assert_allclose(model.continuation, continuation)
    left_over = 0.6 * 2 / 3  # two different tokens follow 0, which is a context three times
    expected = [1.4 / 3 + left_over * continuation[1], left_over * continuation[3], continuation[2]]
    got = np.exp(model.log_probability(np.array([0, 0, 3]), np.array([1, 3, 2])))
    np.testing.assert_allclose(got, expected)


def test_structure_is_learned_and_unigram_matches_entropy(stream: np.ndarray) -> None:
    train, held_out = stream[:4000], stream[4000:]
    bigram, unigram = (loss(train, held_out, VOCAB_SIZE) for loss in (bigram_loss, unigram_loss))
    # The stream's own entropy per token is that of the geometric steps: 2.04 nats; its tokens are uniform over 30.
    assert 1.95 < bigram < 2.3
    assert abs(unigram - math.log(30)) < 0.05


def test_mask_leaves_tokens_out_and_the_first_is_never_scored(stream: np.ndarray) -> None:
    train, held_out = stream[:4000], stream[4000:4003]
    model = KneserNeyBigram(train, VOCAB_SIZE)
    each = -model.log_probability(held_out[:-1], held_out[1:])
    assert math.isclose(bigram_loss(train, held_out, VOCAB_SIZE), each.mean())
    assert math.isclose(bigram_loss(train, held_out, VOCAB_SIZE, np.array([True, False, True])), each[1])
    with pytest.raises(ValueError, match="no token to predict"):
        bigram_loss(train, held_out, VOCAB_SIZE, np.array([True, False, False]))


def test_errors(stream: np.ndarray) -> None:
    for loss in (bigram_loss, unigram_loss):
        with pytest.raises(ValueError, match="eval_ids holds id 40, not below vocab_size 40"):
            loss(stream, np.array([1, 40]), VOCAB_SIZE)
        with pytest.raises(ValueError, match="train_ids has 1 tokens"):
            loss(stream[:1], stream, VOCAB_SIZE)
