"""Factors of embeddings, whose input is the unit vector of the index."""

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from curvature_callbacks.gram.kronecker.factors import kronecker_factors
from curvature_callbacks.gram.kronecker.positions import MicrobatchUses
from curvature_callbacks.gram.uses.uses import Lookup
from curvature_callbacks.model.loss.sharing import Sharing
from tests.gram.kronecker.factor_cases import SHARINGS, D, Data, as_matrix, dense_fisher_of, loop_factors, quality_of

VOCABULARY = 6
PADDING = 2


def lookup_data(
    sizes: Sequence[tuple[int, int]], passes: int = 1, *, padding: bool = False
) -> tuple[list[MicrobatchUses], Data]:
    """The uses and the same data with dense unit vectors."""
    generator = torch.Generator().manual_seed(0)
    uses, data = [], []
    for N, T in sizes:
        indices = torch.randint(VOCABULARY - 1, (N, T), generator=generator)
        indices[0, 0] = PADDING if padding else 0
        b = [torch.randn(N, T, 3, generator=generator, dtype=D) for _ in range(passes)]
        counts = torch.arange(1.0, N + 1)
        lookup = Lookup(N, indices, PADDING if padding else None)
        uses.append(MicrobatchUses(passes=[[lookup.completed(one)] for one in b], counts=counts))
        seen = (indices != PADDING) | (not padding)
        data.append(
            (nn.functional.one_hot(indices, VOCABULARY).double(), [one * seen[..., None] for one in b], counts),
        )
    return uses, data


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 26])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("sizes", [((4, 5), (2, 3)), ((6, 1),)])
@pytest.mark.parametrize("sharing", SHARINGS)
def test_embeddings_are_linear_layers_of_unit_vectors(
    sharing: Sharing, sizes: Sequence[tuple[int, int]], padding: bool, chunk_bytes: int
):
    uses, data = lookup_data(sizes, passes=2, padding=padding)
    found = kronecker_factors(uses, bias=False, sharing=sharing, chunk_bytes=chunk_bytes)
    assert found is not None
    A, G = loop_factors(data, sharing)
    axes = found.A.axes
    assert axes is not None
    assert found.A.basis is None
    assert torch.allclose(found.A.eigenvalues, A.diagonal()[axes])
    assert set(axes.tolist()) == set(A.diagonal().nonzero()[:, 0].tolist())
    assert sharing == "reduce" or torch.equal(A, torch.diag(A.diagonal()))
    assert torch.allclose(as_matrix(found.G), G)
    F, K = dense_fisher_of(data), torch.kron(G, torch.diag(A.diagonal()))
    assert found.G.basis is not None
    U = torch.kron(found.G.basis, torch.eye(VOCABULARY, dtype=D)[:, axes])
    assert found.corrected is not None
    assert torch.allclose(found.corrected.flatten(), torch.stack([u @ F @ u for u in U.T]))
    judged = quality_of(found, data)
    assert judged.kfac_cosine == pytest.approx(float((F * K).sum() / (F.norm() * K.norm())))
    assert judged.kfac_relative_error == pytest.approx(float((F - K).norm() / F.norm()))
    assert judged.ekfac_relative_error <= judged.kfac_relative_error


def test_an_embedding_of_a_large_vocabulary_sees_the_indices_looked_up_only():
    indices = torch.tensor([[10**12, 7, 7]])
    lookup = Lookup(1, indices, None).completed(torch.ones(1, 3, 2, dtype=D))
    found = kronecker_factors([MicrobatchUses(passes=[[lookup]], counts=torch.ones(1))], bias=False, sharing="expand")
    assert found is not None
    assert found.A.axes is not None
    assert found.A.axes.tolist() == [7, 10**12]
    assert found.A.eigenvalues.tolist() == [2.0, 1.0]
    assert found.corrected is not None
    assert found.corrected[0].tolist() == pytest.approx([8.0, 2.0])


def test_an_embedding_used_twice():
    uses, _ = lookup_data(((3, 6),))
    (use,) = uses[0].passes[0]
    assert isinstance(use, Lookup)
    assert use.gradient is not None
    halves = [Lookup(3, use.indices[:, part], None).completed(use.gradient[:, part]) for part in (slice(2), slice(2, 6))]
    once = kronecker_factors(uses, bias=False, sharing="expand")
    twice = kronecker_factors([MicrobatchUses(passes=[halves], counts=uses[0].counts)], bias=False, sharing="expand")
    assert once is not None
    assert twice is not None
    assert torch.equal(once.A.eigenvalues, twice.A.eigenvalues)
    assert torch.allclose(once.corrected, twice.corrected)
