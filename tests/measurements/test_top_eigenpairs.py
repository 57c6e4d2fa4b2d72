from typing import Any

import pytest
import torch
from torch import nn

from curvature_callbacks import ConfigurationError, MatrixOperator, RefusedError, TopEigenpairs, compute_spectrum
from curvature_callbacks.measurements.base import offline_problem
from tests.cases import CASES
from tests.reference import case_loss, dense_hessian

CASE = CASES["mlp"]


def truth(model: nn.Module, names: list[str] | None = None) -> torch.Tensor:
    names = names or [name for name, _ in model.named_parameters()]
    return torch.linalg.eigvalsh(dense_hessian(model, case_loss(CASE, CASE.microbatches()), names)).flip(0)


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
def test_the_ends_asked_for(which: str):
    model = CASE.model()
    values = truth(model)
    pairs = compute_spectrum(model, CASE.microbatches(), loss=CASE.loss, k=4, which=which, tol=1e-8)
    by_size = values[values.abs().argsort(descending=True)[:4]].sort(descending=True).values
    ends = torch.cat([values[:2], values[-2:]])
    expected = {"LA": values[:4], "SA": values[-4:], "LM": by_size, "BE": ends}[which]
    assert torch.allclose(pairs.eigenvalues, expected, atol=1e-9 * values[0].item())


def test_eigenvectors_follow_named_parameters():
    model, microbatches = CASE.model(), CASE.microbatches()
    names = [name for name, _ in model.named_parameters()]
    H = dense_hessian(model, case_loss(CASE, microbatches), names)
    pairs = compute_spectrum(model, microbatches, loss=CASE.loss, k=3, tol=1e-8, return_eigenvectors=True, true_residuals=True)
    residuals = (H @ pairs.eigenvectors - pairs.eigenvectors * pairs.eigenvalues).norm(dim=0)
    assert residuals.max() <= 1e-7 * pairs.eigenvalues[0]
    assert pairs.eigenvectors.shape == (len(H), 3)


def test_the_measurement_reports_the_whole_model_and_its_blocks():
    model = CASE.model()
    measurement = TopEigenpairs(k=4, tol=1e-8, max_matvecs=95, per_block=True)
    with offline_problem(model, CASE.microbatches(), loss=CASE.loss, params_filter=None) as problem:
        (whole, *blocks), state = measurement.measure(problem, measurement.init(problem))
        names = dict(problem.blocks)
        again, _ = measurement.measure(problem, state)
    assert whole.scalars["lambda_max"] == pytest.approx(truth(model)[0].item())
    assert whole.scalars["lambda_min"] == pytest.approx(truth(model)[-1].item())
    assert [record.block for record in blocks] == list(names)
    for record in blocks:
        values = truth(model, list(names[record.block]))
        assert record.scalars["lambda_max"] == pytest.approx(values[0].item())
        assert record.scalars["lambda_min"] == pytest.approx(values[-1].item(), abs=1e-10)
    assert state < 1e-10
    assert again[0].num_matvecs == whole.num_matvecs - 3  # the self-check runs once


@pytest.mark.parametrize(
    "options", [{"k": 0}, {"which": "SM"}, {"tol": 0.0}, {"k": 8, "max_matvecs": 7}, {"operator": "gauss_newton"}]
)
def test_the_measurement_names_its_bad_option(options: dict[str, Any]):
    with pytest.raises(ConfigurationError, match=f"`{list(options)[-1]}`"):
        TopEigenpairs(**options)


@pytest.mark.parametrize(
    "options", [{"k": 0}, {"which": "SM"}, {"tol": 0.0}, {"k": 8, "max_matvecs": 7}, {"operator": "fisher"}]
)
def test_the_function_names_its_bad_option(options: dict[str, Any]):
    with pytest.raises(ValueError, match=f"`{list(options)[-1]}`"):
        compute_spectrum(CASE.model(), CASE.microbatches(), loss=CASE.loss, **options)


def test_an_operator_of_ones_own():
    A = torch.diag(torch.arange(-3.0, 5.0, dtype=torch.float64))
    pairs = compute_spectrum(CASE.model(), CASE.microbatches(), operator=MatrixOperator(A), k=2, which="BE")
    assert pairs.eigenvalues.tolist() == pytest.approx([4.0, -3.0])
    with pytest.raises(RefusedError, match="not symmetric"):
        compute_spectrum(CASE.model(), None, operator=MatrixOperator(torch.triu(torch.ones(8, 8).double())), k=2)
    with pytest.raises(ConfigurationError, match="operator"):
        compute_spectrum(CASE.model(), None, operator=object(), k=2)


def test_the_same_bits_twice():
    model, microbatches = CASES["gpt2"].model(torch.float32), CASES["gpt2"].microbatches()
    first, second = (compute_spectrum(model, microbatches, k=3, max_matvecs=12, seed=4) for _ in range(2))
    assert torch.equal(first.eigenvalues, second.eigenvalues)
    assert torch.equal(first.residuals, second.residuals)


def test_bfloat16_models_are_measured_in_float32():
    case = CASES["gpt2"]
    model, microbatches = case.model(torch.bfloat16), case.microbatches((2,))
    names = [name for name, _ in model.named_parameters() if "h.1.attn.c_proj" in name]
    values = torch.linalg.eigvalsh(dense_hessian(model, case_loss(case, microbatches), names))
    pairs = compute_spectrum(model, microbatches, k=2, which="BE", params_filter=lambda name, _: name in names)
    assert pairs.eigenvalues.tolist() == pytest.approx([values[-1].item(), values[0].item()], rel=1e-4)
