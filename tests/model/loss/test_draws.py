"""Draws: labels by the softmax, targets without replacement; in bounded memory."""

import torch

from curvature_callbacks.model.loss.draws import drawn_labels
from tests.model.loss.surrogate_cases import generator, randn


def test_draws_follow_the_softmax():
    logits = torch.tensor([[0.3, -1.0, 2.0, -torch.inf], [-torch.inf, 1.0, 1.0, 0.0]])[:, None].double()
    count = 20_000
    rows = torch.arange(2).repeat_interleave(count)
    labels = drawn_labels(logits, rows, torch.zeros_like(rows), generator()).reshape(2, count)
    for i in range(2):
        p = logits[i, 0].softmax(0)
        share = labels[i].bincount(minlength=4) / count
        assert ((share - p).abs() <= 4 * (p * (1 - p) / count).sqrt()).all()


def test_labels_are_drawn_in_bounded_memory_with_the_same_result():
    logits = randn(6, 7, 5)
    rows, positions = torch.ones(6, 7, dtype=torch.bool).nonzero(as_tuple=True)
    at_once = drawn_labels(logits, rows, positions, generator())
    assert torch.equal(drawn_labels(logits, rows, positions, generator(), max_elements=23), at_once)
    assert len(at_once.unique()) == 5
