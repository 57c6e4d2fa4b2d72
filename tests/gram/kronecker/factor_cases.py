"""Inputs and output gradients of one layer, and what its Kronecker factors must be by loops over samples and positions."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from curvature_callbacks.gram.capture.rules import LINEAR, TRANSPOSED_LINEAR
from curvature_callbacks.gram.kronecker.factors import kronecker_factors
from curvature_callbacks.gram.kronecker.positions import CHUNK_BYTES, MicrobatchUses
from curvature_callbacks.gram.uses.uses import OuterProduct
from curvature_callbacks.linalg.kronecker import Factor, KroneckerFactors
from curvature_callbacks.model.loss.sharing import Sharing
from curvature_callbacks.statistics.kronecker_quality import Approximation, approximation
from tests.reference import dense_fisher

D = torch.float64
SHARINGS: tuple[Sharing, ...] = ("expand", "reduce")

# What a test gives: for each microbatch the inputs (N, T, d_in), for each pass the output gradients (N, T, d_out), and counts.
Data = list[tuple[Tensor, list[Tensor], Tensor]]


def random_data(
    sizes: Sequence[tuple[int, int]] = ((3, 4), (2, 5)), d_in: int = 4, d_out: int = 3, passes: int = 1, *, seed: int = 0
) -> Data:
    """Microbatches (N, T) of correlated inputs and gradients; the last position of the first row has no gradient."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=D)

    data = []
    for N, T in sizes:
        a = randn(N, T, d_in) + 0.5
        b = [randn(N, T, d_out) + a[..., :1] for _ in range(passes)]
        for one in b:
            one[0, T - 1 :] = 0.0 if T > 1 else one[0, T - 1 :]
        data.append((a, b, torch.ones(N)))
    return data


def uses_of(data: Data, *, transposed: bool = False) -> list[MicrobatchUses]:
    operation = TRANSPOSED_LINEAR if transposed else LINEAR
    return [
        MicrobatchUses(passes=[[OuterProduct(operation, len(a), a).completed(one)] for one in b], counts=counts)
        for a, b, counts in data
    ]


def with_ones(data: Data) -> Data:
    return [(torch.cat([a, torch.ones_like(a[..., :1])], -1), b, counts) for a, b, counts in data]


def row_gradients(data: Data) -> Tensor:
    """(S, P) of row-major (d_out, d_in) matrices, one position at a time."""
    found = []
    for a, b, counts in data:
        used = [i for i in range(len(a)) if counts[i] > 0]
        found += [sum(torch.outer(one[i, t], a[i, t]) for t in range(a.shape[1])).flatten() for one in b for i in used]
    return torch.stack(found)


def total_count(data: Data) -> float:
    return float(sum(counts.sum() for _, _, counts in data))


def dense_fisher_of(data: Data) -> Tensor:
    g = row_gradients(data)
    return dense_fisher(g) * len(g) / total_count(data)


def loop_factors(data: Data, sharing: Sharing) -> tuple[Tensor, Tensor]:
    """A and G by their definition."""
    A = torch.zeros(data[0][0].shape[2], data[0][0].shape[2], dtype=D)
    G = torch.zeros(data[0][1][0].shape[2], data[0][1][0].shape[2], dtype=D)
    positions = 0.0
    for a, b, counts in data:
        for i in range(len(a)):
            c = float(counts[i])
            live = [t for t in range(a.shape[1]) if any(one[i, t].abs().max() > 0 for one in b)]
            if c == 0 or not live:
                continue
            if sharing == "reduce":
                mean = sum(a[i, t] for t in live) / len(live)
                A += c * torch.outer(mean, mean)
                positions += c
                for one in b:
                    summed = sum(one[i, t] for t in live)
                    G += torch.outer(summed, summed)
                continue
            positions += c * len(live)
            for t in live:
                A += c * torch.outer(a[i, t], a[i, t])
                for one in b:
                    G += torch.outer(one[i, t], one[i, t])
    return A / total_count(data), G / positions


def as_matrix(factor: Factor) -> Tensor:
    assert factor.basis is not None
    basis = factor.basis.double()
    return basis @ torch.diag(factor.eigenvalues) @ basis.T


def found_of(
    data: Data, sharing: Sharing = "expand", *, bias: bool = False, transposed: bool = False, chunk_bytes: int = CHUNK_BYTES
) -> KroneckerFactors:
    uses = uses_of(data, transposed=transposed)
    found = kronecker_factors(uses, bias=bias, sharing=sharing, chunk_bytes=chunk_bytes)
    assert found is not None
    return found


def quality_of(found: KroneckerFactors, data: Data) -> Approximation:
    g = row_gradients(data)
    return approximation(found, g @ g.T, normaliser=total_count(data))


def assert_correct(found: KroneckerFactors, data: Data, sharing: Sharing) -> None:
    """Factors, corrected eigenvalues and quality against dense matrices."""
    A, G = loop_factors(data, sharing)
    F = dense_fisher_of(data)
    assert torch.allclose(as_matrix(found.A), A)
    assert torch.allclose(as_matrix(found.G), G)
    assert found.A.basis is not None
    assert found.G.basis is not None
    assert found.corrected is not None
    U = torch.kron(found.G.basis, found.A.basis)
    diagonal = torch.stack([u @ F @ u for u in U.T])
    assert torch.allclose(found.corrected.flatten(), diagonal)
    K, E = torch.kron(G, A), U @ torch.diag(diagonal) @ U.T
    judged = quality_of(found, data)
    assert judged.kfac_cosine == pytest.approx(float((F * K).sum() / (F.norm() * K.norm())))
    assert judged.kfac_relative_error == pytest.approx(float((F - K).norm() / F.norm()))
    assert judged.ekfac_relative_error == pytest.approx(float((F - E).norm() / F.norm()), abs=1e-7)
    assert judged.ekfac_relative_error <= judged.kfac_relative_error + 1e-12
    assert 0 <= judged.kfac_cosine <= judged.ekfac_cosine <= 1 + 1e-12
