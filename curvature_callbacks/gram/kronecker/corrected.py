"""EKFAC's corrected eigenvalues: mean squares of the per-sample gradients' coordinates in the factors' eigenbases."""

from collections.abc import Iterable

import torch
from torch import Tensor

from curvature_callbacks.gram.kronecker.positions import Positions
from curvature_callbacks.linalg.kronecker import KroneckerFactors


def squared_coordinates(factors: KroneckerFactors, pieces: Iterable[Positions], chunk_bytes: int) -> Tensor:
    """`sum_s (U_G' g_s U_A)^2`, (r_G, r_A) float64, by the cheaper of two ways; see `kronecker_factors` for the cost.

    Args:
        factors: A and G by their eigenpairs.
        pieces: inputs and output gradients of all samples.
        chunk_bytes: of per-sample gradients held at a time.
    """
    A, G = factors.A, factors.G
    total = torch.zeros(len(G.eigenvalues), len(A.eigenvalues), dtype=torch.float64, device=A.eigenvalues.device)
    for piece in pieces:
        for outputs in piece.outputs:
            if gradients_are_smaller(piece.inputs, outputs, chunk_bytes):
                add_by_gradients(total, factors, piece.inputs, outputs, chunk_bytes)
            else:
                add_by_positions(total, factors, piece.inputs, outputs, chunk_bytes)
    return total


def gradients_are_smaller(inputs: Tensor, outputs: Tensor, chunk_bytes: int) -> bool:
    """Whether rotating a sample's gradient takes fewer operations than rotating its positions (convolutions)."""
    T, d_in, d_out = inputs.shape[1], inputs.shape[2], outputs.shape[2]
    fits = d_in * d_out * inputs.element_size() <= chunk_bytes
    return fits and d_in * d_out * (d_in + d_out) < T * (d_in**2 + d_out**2)


def add_by_gradients(total: Tensor, factors: KroneckerFactors, inputs: Tensor, outputs: Tensor, chunk_bytes: int) -> None:
    """Add the squared coordinates of `sum_t b_t a_t'` to `total`: the gradient of each sample is formed, then rotated."""
    size = inputs.shape[2] * outputs.shape[2] * inputs.element_size()
    step = max(1, chunk_bytes // size)
    for a, b in zip(torch.split(inputs, step), torch.split(outputs, step), strict=True):
        gradients = factors.A.rotated(b.mT @ a)  # (n, d_out, r_A)
        total += factors.G.rotated(gradients.mT).mT.square().sum(0, dtype=torch.float64)


def add_by_positions(total: Tensor, factors: KroneckerFactors, inputs: Tensor, outputs: Tensor, chunk_bytes: int) -> None:
    """Add the same to `total`, each position rotated first: `sum_s (left_s' right_s)^2` of (n, T, r_G) and (n, T, r_A)."""
    left, right = factors.G.rotated(outputs), factors.A.rotated(inputs)
    if left.shape[1] == 1:  # the square of a product is the product of squares
        total += left[:, 0].double().square().T @ right[:, 0].double().square()
        return
    step = max(1, chunk_bytes // max(len(right) * right.shape[2] * right.element_size(), 1))
    for start in range(0, left.shape[2], step):
        gradients = left[:, :, start : start + step].mT @ right
        total[start : start + step] += gradients.square_().sum(0, dtype=torch.float64)
