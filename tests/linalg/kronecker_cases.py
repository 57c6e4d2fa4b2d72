"""Random Kronecker factors beside their dense matrices."""

import torch
from torch import Tensor

from curvature_callbacks.linalg.kronecker import KroneckerFactors, factor_of_matrix

D = torch.float64


def semidefinite(d: int, *, rank: int | None = None, seed: int = 0) -> Tensor:
    """(d, d)."""
    X = torch.randn(rank or 2 * d, d, generator=torch.Generator().manual_seed(seed), dtype=D)
    return X.T @ X / len(X)


def random_factors(d_in: int = 4, d_out: int = 3, *, rank: int | None = None) -> tuple[KroneckerFactors, Tensor]:
    """With the dense (P, P) product for row-major matrices (d_out, d_in)."""
    A, G = semidefinite(d_in, rank=rank), semidefinite(d_out, seed=1)
    return KroneckerFactors(A=factor_of_matrix(A, dtype=D), G=factor_of_matrix(G, dtype=D)), torch.kron(G, A)
