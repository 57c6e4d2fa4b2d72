"""Gradients scaled down to a norm before the spectrum."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from curvature_callbacks import FisherSpectrum, Problem, compute_fisher_spectrum
from curvature_callbacks.isolation.model import isolated
from tests.cases import CASES
from tests.measurements.fisher_type_cases import TYPES
from tests.reference import gradients_of, relative_error, rows, stacked


def test_clipped_gradients():
    case = CASES["mlp"]
    model, microbatches = case.model(), case.microbatches()
    G = stacked(gradients_of(model, [lambda m, row=row: F.cross_entropy(m(row[0]), row[1]) for row in rows(microbatches)]))
    norms = G.norm(dim=1)
    limit = float(norms.sort().values[2:4].mean())
    shorter = G * (limit / norms).clamp(max=1.0)[:, None]
    found = compute_fisher_spectrum(model, microbatches, loss=case.loss, max_sample_grad_norm=limit)
    assert relative_error(found.full.eigenvalues, torch.linalg.svdvals(shorter) ** 2 / 6) < 1e-9
    first = sum(p.numel() for name, p in model.named_parameters() if name.startswith("0."))
    assert relative_error(found.blocks["0"].eigenvalues, torch.linalg.svdvals(shorter[:, :first]) ** 2 / 6) < 1e-9
    assert (found.metadata["num_clipped"], found.metadata["max_sample_grad_norm"]) == (3, limit)
    centred = compute_fisher_spectrum(model, microbatches, loss=case.loss, max_sample_grad_norm=limit, center_gradients=True)
    assert relative_error(centred.full.eigenvalues, torch.linalg.svdvals(shorter - shorter.mean(0)) ** 2 / 6) < 1e-9


@pytest.mark.parametrize(("fisher", "unit"), TYPES[:4])
def test_gradients_of_one_length(fisher: str, unit: str):
    """A limit below all of them: whatever the weights, the mean squared norm is its square."""
    model, microbatches = CASES["gpt2"].model(), CASES["gpt2"].microbatches()[1:]
    found = compute_fisher_spectrum(
        model, microbatches, fisher=fisher, sample_unit=unit, num_targets=2, max_sample_grad_norm=1e-3
    )
    assert found.full.trace == pytest.approx(1e-6, rel=1e-9)
    assert found.metadata["num_clipped"] == found.full.num_samples


def test_the_record_counts_clipped_gradients():
    case = CASES["mlp"]
    model = case.model()
    with isolated(model, seed=0):
        problem = Problem(model, case.microbatches(), loss=case.loss)
        some, none = (FisherSpectrum(max_sample_grad_norm=limit).measure(problem, ())[0][0] for limit in (1e-3, 1e6))
        off = FisherSpectrum().measure(problem, ())[0][0]
    assert (some.scalars["num_clipped"], none.scalars["num_clipped"]) == (6.0, 0.0)
    assert "num_clipped" not in off.scalars
    assert none.scalars["full_trace"] == off.scalars["full_trace"]


def test_clipping_of_precomputed_gradients():
    model = nn.Linear(2, 1, bias=False)
    given = [{"weight": torch.tensor([[3.0, 4.0]])}, {"weight": torch.tensor([[0.0, 1.0]])}]
    found = compute_fisher_spectrum(model, None, precomputed_gradients=given, max_sample_grad_norm=2.5)
    assert found.full.trace == pytest.approx((2.5**2 + 1) / 2)
    assert found.metadata["num_clipped"] == 1
