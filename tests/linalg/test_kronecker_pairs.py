"""Outer eigenpairs of `A x G` and of EKFAC against dense products."""

import pytest
import torch

from curvature_callbacks.linalg.kronecker import Factor, KroneckerFactors, factor_of_matrix
from curvature_callbacks.linalg.kronecker_pairs import outer_pairs
from tests.linalg.kronecker_cases import D, random_factors


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("k", [1, 2, 5, 12, 50])
def test_top_eigenvalues_are_those_of_the_dense_product(k: int, rank: int | None):
    found, product = random_factors(rank=rank)
    values = torch.linalg.eigvalsh(product).flip(0)
    values = values[values > 1e-12][:k]
    assert torch.allclose(outer_pairs(found, k).eigenvalues, values)


def test_top_eigenvalues_of_long_lists_form_no_product():
    """200 000 x 200 000 pairs; the k largest lie in the first k of each list."""
    values = torch.linspace(3, 0.001, 200_000, dtype=D)
    axes = torch.arange(len(values))
    found = KroneckerFactors(A=Factor(eigenvalues=values, axes=axes), G=Factor(eigenvalues=values.square(), axes=axes))
    expected = torch.outer(values[:300], values[:300].square()).flatten().sort(descending=True).values[:300]
    assert torch.allclose(outer_pairs(found, 300).eigenvalues, expected)


def test_corrected_eigenvalues_are_sorted():
    found, _ = random_factors()
    values = torch.rand(3, 4, generator=torch.Generator().manual_seed(0), dtype=D)
    corrected = KroneckerFactors(A=found.A, G=found.G, corrected=values)
    for k in (1, 5, 99):
        assert torch.equal(
            outer_pairs(corrected, k, corrected=True).eigenvalues, values.flatten().sort(descending=True).values[:k]
        )


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("k", [1, 5, 50])
def test_outer_pairs_name_the_eigenvectors_of_the_dense_product(k: int, rank: int | None, largest: bool):
    found, product = random_factors(rank=rank)
    values = torch.linalg.eigvalsh(product)
    values = values[values > 1e-12]
    pairs = outer_pairs(found, k, largest=largest)
    assert torch.allclose(pairs.eigenvalues, (values.flip(0) if largest else values)[:k])
    for value, j, i in zip(pairs.eigenvalues, pairs.outputs, pairs.inputs, strict=True):
        u = torch.outer(found.G.basis[:, j], found.A.basis[:, i]).flatten()
        assert torch.allclose(product @ u, value * u, atol=1e-12)
    assert len({(int(j), int(i)) for j, i in zip(pairs.outputs, pairs.inputs, strict=True)}) == len(pairs.eigenvalues)


@pytest.mark.parametrize("largest", [True, False])
def test_outer_pairs_of_ekfac_are_the_entries_they_name(largest: bool):
    plain, _ = random_factors()
    values = torch.rand(3, 4, generator=torch.Generator().manual_seed(0), dtype=D)
    pairs = outer_pairs(KroneckerFactors(A=plain.A, G=plain.G, corrected=values), 5, corrected=True, largest=largest)
    assert torch.equal(pairs.eigenvalues, values[pairs.outputs, pairs.inputs])
    assert torch.equal(pairs.eigenvalues, values.flatten().sort(descending=largest).values[:5])


@pytest.mark.parametrize("corrected", [False, True])
def test_a_zero_factor_has_no_pairs(corrected: bool):
    zero = factor_of_matrix(torch.zeros(2, 2), dtype=D)
    found = KroneckerFactors(A=zero, G=factor_of_matrix(torch.eye(2), dtype=D), corrected=torch.zeros(2, 0, dtype=D))
    assert len(outer_pairs(found, 3, corrected=corrected).eigenvalues) == 0
