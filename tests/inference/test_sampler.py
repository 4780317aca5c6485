"""Samplers, held against a plain implementation of the same, row by row."""

import math
import random

import numpy as np
import pytest
import torch

from yuzogpt.inference.requests import SamplingParams
from yuzogpt.inference.sampler import sample_tokens, uniform


def probabilities(logits, settings, seen):
    """Return the probability of each token: a plain implementation of the papers."""
    logits = logits.tolist()
    for token in seen:
        penalty = settings.repetition_penalty
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    if settings.temperature == 0:
        return [float(i == logits.index(max(logits))) for i in range(len(logits))]
    most = max(logits)
    weights = [math.exp((value - most) / settings.temperature) for value in logits]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])
    if settings.top_k:
        order = order[: settings.top_k]
    total, so_far, nucleus = sum(weights[i] for i in order), 0.0, []
    for i in order:
        if so_far < settings.top_p * total:
            nucleus.append(i)
        so_far += weights[i]
    kept = {i for i in nucleus if weights[i] >= settings.min_p * weights[order[0]]}
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(weights))]


def plain_draw(probs, number):
    """Return the token in whose share of the line the number falls."""
    so_far = 0.0
    for token, probability in enumerate(probs):
        so_far += probability
        if number < so_far:
            return token
    raise AssertionError("nothing drawn")


def some_settings(chance):
    return SamplingParams(
        repetition_penalty=chance.choice([1.0, 1.0, 1.3, 0.8]),
        temperature=chance.choice([0, 0.5, 1.0, 2.0]),
        top_k=chance.choice([0, 1, 5, 40, 10_000]),
        top_p=chance.choice([1.0, 0.9, 0.3, 0.05]),
        min_p=chance.choice([0.0, 0.02, 0.3]),
    )


@pytest.mark.slow
@pytest.mark.parametrize(("vocabulary", "spread"), [(50, 3.0), (3000, 2.0), (3000, 0.1)])
def test_every_mix_of_settings_draws_what_the_plain_way_draws(vocabulary, spread):
    chance = random.Random(vocabulary)
    rounds = 15 if vocabulary < 100 else 4
    generator = torch.Generator().manual_seed(1)
    for _ in range(rounds):
        R = chance.randint(1, 9)
        rows = [some_settings(chance) for _ in range(R)]
        logits = torch.randn(R, vocabulary, generator=generator) * spread
        seen = torch.rand(R, vocabulary, generator=generator) < 0.2
        numbers = [chance.random() for _ in rows]
        before = logits.clone()
        drawn = sample_tokens(logits, rows, numbers, seen).tolist()
        assert torch.equal(logits, before)
        for row, settings in enumerate(rows):
            tokens = seen[row].nonzero().flatten().tolist()
            expected = probabilities(logits[row], settings, tokens)
            assert expected[drawn[row]] > 0
            # float32 against Python's floats: only a number at a border may give the next token
            borders = [min(max(numbers[row] + e, 0), 1 - 1e-9) for e in (-1e-5, 0, 1e-5)]
            assert drawn[row] in {plain_draw(expected, number) for number in borders}
            # Alone as in a batch.
            alone = sample_tokens(
                logits[row : row + 1], [settings], [numbers[row]], seen[row : row + 1]
            )
            assert alone.tolist() == [drawn[row]]


def test_draws_have_the_probabilities_of_the_model():
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]])
    draws = 4000
    rows = [SamplingParams(temperature=0.7)] * draws
    numbers = [uniform(9, index) for index in range(draws)]
    drawn = sample_tokens(logits.expand(draws, -1), rows, numbers, None)
    share = torch.bincount(drawn, minlength=4) / draws
    torch.testing.assert_close(share, (logits[0] / 0.7).softmax(-1), rtol=0, atol=0.03)


def test_random_numbers_are_even_and_depend_on_seed_and_index():
    numbers = np.array([[uniform(seed, index) for index in range(300)] for seed in range(30)])
    assert len(np.unique(numbers)) == numbers.size
    assert numbers.min() > 0
    assert numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=10, range=(0, 1))
    assert abs(counts / numbers.size - 0.1).max() < 0.015
    for shifted in (numbers[1:, :] * numbers[:-1, :], numbers[:, 1:] * numbers[:, :-1]):
        assert abs(shifted.mean() - 0.25) < 0.01  # neighbours know nothing of each other
    assert uniform(2**63 - 1, 10**9) != uniform(0, 0)


def test_numbers_at_the_ends_draw_what_may_be_drawn():
    logits = torch.full((2, 1000), -torch.inf)
    logits[:, 400] = 1.0
    logits[:, 600] = 1.0
    rows = [SamplingParams()] * 2
    assert sample_tokens(logits, rows, [2**-49, 1 - 2**-49], None).tolist() == [400, 600]


def test_equal_logits_pass_together():
    logits = torch.tensor([[2.0, 2.0, 2.0, 0.0]])
    drawn = {
        sample_tokens(logits, [SamplingParams(top_k=1)], [n / 10], None).item() for n in range(10)
    }
    assert drawn == {0, 1, 2}
