"""Spectra of gradients that the user already has."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from curvature_callbacks import (
    ConfigurationError,
    compute_fisher_spectrum,
)
from tests.cases import CASES
from tests.reference import fisher_eigenvalues, relative_error, sample_gradients, stacked


def as_precomputed(gradients: Mapping[str, Tensor], dtype: torch.dtype, model: nn.Module) -> list[dict[str, Tensor]]:
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    N = len(next(iter(gradients.values())))
    return [{name: g[i].reshape(shapes[name]).to(dtype) for name, g in gradients.items()} for i in range(N)]


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_precomputed_gradients(dtype: torch.dtype, centred: bool):
    case = CASES["mlp"]
    model = case.model()
    given = as_precomputed(sample_gradients(model, case.microbatches(), case.kind), dtype, model)
    spectra = compute_fisher_spectrum(model, None, precomputed_gradients=given, center_gradients=centred)
    G = torch.stack([torch.cat([g.double().flatten() for g in sample.values()]) for sample in given])
    cut = 6 * 2**-8 if dtype == torch.bfloat16 else 0.0
    expected = fisher_eigenvalues(G, centred=centred)
    assert relative_error(spectra.full.eigenvalues, expected[expected > cut * expected[0]]) < 1e-5
    assert (spectra.metadata["fisher"], spectra.metadata["num_samples"]) == ("precomputed", 6)
    assert set(spectra.blocks) == {"0", "2", "4"}


def test_precomputed_gradients_of_some_parameters():
    case = CASES["mlp"]
    model = case.model()
    truth = sample_gradients(model, case.microbatches(), case.kind)
    some = {name: g for name, g in truth.items() if name.startswith("2")}
    spectra = compute_fisher_spectrum(model, None, precomputed_gradients=as_precomputed(some, torch.float64, model))
    assert list(spectra.blocks) == ["2"]
    assert relative_error(spectra.full.eigenvalues, fisher_eigenvalues(stacked(some))) < 1e-12


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("bad", [False, True])
def test_too_few_usable_gradients_give_a_warning_and_an_empty_result(count: int, bad: bool):
    model = CASES["mlp"].model()
    given = [{name: torch.ones_like(p) for name, p in model.named_parameters()} for _ in range(count)]
    if bad:
        given += [{name: torch.full_like(p, float("nan")) for name, p in model.named_parameters()} for _ in range(3)]
    with pytest.warns(UserWarning, match="a spectrum needs two"):
        spectra = compute_fisher_spectrum(model, None, precomputed_gradients=given)
    for spectrum in (spectra.full, spectra.block_diagonal):
        assert spectrum.eigenvalues.shape == (0,)
        assert spectrum.eigenvalues.dtype == torch.float64
        assert spectrum.metrics()["rank"] == 0
    assert spectra.blocks == {}
    assert spectra.metadata["num_samples_requested"] == len(given)


def test_one_bad_precomputed_gradient_is_left_out():
    case = CASES["mlp"]
    model = case.model()
    truth = sample_gradients(model, case.microbatches(), case.kind)
    given = as_precomputed(truth, torch.float64, model)
    given[2]["4.bias"][1] = float("inf")
    with pytest.warns(UserWarning, match="1 of 6"):
        spectra = compute_fisher_spectrum(model, None, precomputed_gradients=given)
    G = stacked(truth)[[0, 1, 3, 4, 5]]
    assert relative_error(spectra.full.eigenvalues, fisher_eigenvalues(G)) < 1e-12


def test_precomputed_gradients_that_fit_no_parameter():
    with pytest.raises(ConfigurationError, match="precomputed_gradients"):
        compute_fisher_spectrum(CASES["mlp"].model(), None, precomputed_gradients=[{"weight": torch.ones(3)}] * 3)
