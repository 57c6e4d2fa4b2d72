"""Outer eigenpairs of `A x G` and of EKFAC from the factors' eigenvalues, without forming their products."""

import heapq
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from curvature_callbacks.linalg.kronecker import KroneckerFactors


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KroneckerPairs:
    """Eigenpairs of `A x G` or of EKFAC by the eigenvectors of the factors their vectors are products of.

    Attributes:
        eigenvalues: (k,) float64 on CPU.
        outputs: (k,) int64 on CPU, which eigenvector of G.
        inputs: (k,) int64 on CPU, which eigenvector of A.
    """

    eigenvalues: Tensor
    outputs: Tensor
    inputs: Tensor


def outer_pairs(factors: KroneckerFactors, k: int, *, corrected: bool = False, largest: bool = True) -> KroneckerPairs:
    """The k largest (smallest) of the r_A r_G eigenvalues within the factors' ranks, the outermost first.

    Best-first search over the two sorted lists: `(i, j)` is looked at after `(i, j - 1)`, or after `(i - 1, 0)` for j = 0.

    Args:
        factors: with `corrected` for EKFAC.
        k: wanted; at most r_A r_G are returned.
        corrected: EKFAC's eigenvalues rather than the products.
        largest: the largest, descending; else the smallest, ascending.

    Cost: O(k log k), the products are not formed; for EKFAC, whose eigenvalues follow no order, O(r_A r_G).
    """
    if corrected:
        assert factors.corrected is not None
        flat = factors.corrected.flatten()
        values, positions = (part.cpu() for part in flat.topk(min(k, len(flat)), largest=largest))
        width = max(factors.corrected.shape[1], 1)
        return KroneckerPairs(eigenvalues=values, outputs=positions // width, inputs=positions % width)
    a, g = (factor.eigenvalues if largest else factor.eigenvalues.flip(0) for factor in (factors.A, factors.G))
    outermost = _best_first(a[:k].tolist(), g[:k].tolist(), k, sign=-1.0 if largest else 1.0)
    inputs, outputs = (torch.tensor([item[axis] for item in outermost], dtype=torch.int64) for axis in (1, 2))
    return KroneckerPairs(
        eigenvalues=torch.tensor([item[0] for item in outermost], dtype=torch.float64),
        outputs=outputs if largest else len(g) - 1 - outputs,
        inputs=inputs if largest else len(a) - 1 - inputs,
    )


def _best_first(a: list[float], g: list[float], k: int, *, sign: float) -> list[tuple[float, int, int]]:
    """The first k of the products `a_i g_j` with i and j, in the order of `sign` times them; both lists are in it."""
    front = [(sign * a[0] * g[0], 0, 0)] if a and g else []
    outermost: list[tuple[float, int, int]] = []
    while front and len(outermost) < k:
        value, i, j = heapq.heappop(front)
        outermost.append((sign * value, i, j))
        if j + 1 < len(g):
            heapq.heappush(front, (sign * a[i] * g[j + 1], i, j + 1))
        if j == 0 and i + 1 < len(a):
            heapq.heappush(front, (sign * a[i + 1] * g[0], i + 1, 0))
    return outermost
