"""Kronecker: the eigenbasis of `A x G` from its factors, and how well it stands for a Fisher matrix, with nothing P x P.

A layer's parameters are the matrix (d_out, d_in), with the bias as a last column; `A` (d_in, d_in) acts on its columns, `G`
(d_out, d_out) on its rows: `(A x G) vec(V) = vec(G V A)`. The eigenvalues of `A x G` are the products of those of the factors.
"""

import heapq
import math
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

_CHUNK: Final = 1 << 12  # columns cast to float64 at a time


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Factor:
    """A symmetric positive semi-definite matrix (d, d) of rank r by its non-zero eigenpairs.

    Attributes:
        eigenvalues: (r,) float64, descending, positive.
        basis: (d, r) eigenvectors as columns, in the dtype of the data; None for a diagonal factor.
        axes: (r,) int64 for a diagonal factor: which coordinate has the eigenvalue.
    """

    eigenvalues: Tensor
    basis: Tensor | None = None
    axes: Tensor | None = None

    def rotated(self, vectors: Tensor) -> Tensor:
        """Coordinates (..., r) of `vectors` (..., d) in the eigenbasis. Cost: `2 d r` operations a vector."""
        if self.basis is not None:
            return vectors @ self.basis
        assert self.axes is not None
        return vectors[..., self.axes]

    def restored(self, coordinates: Tensor, size: int) -> Tensor:
        """The vectors (..., d) with these `coordinates` (..., r) in the eigenbasis, d = `size`. Cost: as `rotated`."""
        if self.basis is not None:
            return coordinates @ self.basis.T
        assert self.axes is not None
        vectors = coordinates.new_zeros(*coordinates.shape[:-1], size)
        vectors[..., self.axes] = coordinates
        return vectors

    def to(self, device: torch.device, dtype: torch.dtype) -> "Factor":
        """The same on `device`, the basis in `dtype`."""
        return Factor(
            eigenvalues=self.eigenvalues.to(device),
            basis=None if self.basis is None else self.basis.to(device, dtype),
            axes=None if self.axes is None else self.axes.to(device),
        )


def factor_of_matrix(matrix: Tensor, *, dtype: torch.dtype) -> Factor:
    """Eigenpairs of a symmetric positive semi-definite `matrix` (d, d), the basis in `dtype`; one of nan if it is not finite.

    Cost: one d x d symmetric eigensolve in float64.
    """
    if not matrix.isfinite().all():
        return _unknown(len(matrix), matrix.to(dtype))
    values, vectors = torch.linalg.eigh(matrix.to(torch.float64))
    kept = _kept(values)
    return Factor(eigenvalues=values[kept].flip(0), basis=vectors[:, kept].flip(1).to(dtype))


def factor_of_rows(rows: Tensor, *, scale: float) -> Factor:
    """Eigenpairs of `scale rows' rows` (d, d) from the Gram of its `rows` (n, d): for n < d, where d x d may not fit at all.

    One pair of nan where they are not finite. Products in float64: the eigenvectors `rows' v / sqrt(lambda)` of small
    eigenvalues would not be orthonormal otherwise.

    Cost: `2 n^2 d` operations and one n x n symmetric eigensolve in float64. Memory: n x n and the basis, d x r.
    """
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for part in torch.split(rows, _CHUNK, dim=1):
        gram.addmm_(part.double(), part.double().T)
    if not gram.isfinite().all():
        return _unknown(rows.shape[1], rows)
    values, vectors = torch.linalg.eigh(gram)
    kept = _kept(values)
    values, vectors = values[kept].flip(0), vectors[:, kept].flip(1)
    basis = torch.cat([part.double().T @ vectors for part in torch.split(rows, _CHUNK, dim=1)]) / values.sqrt()
    return Factor(eigenvalues=values * scale, basis=basis.to(rows.dtype))


def factor_of_diagonal(diagonal: Tensor) -> Factor:
    """Eigenpairs of `diag(diagonal)` (d,): its positive entries, and where they stand."""
    values, axes = diagonal.to(torch.float64).sort(descending=True, stable=True)
    kept = values > 0
    return Factor(eigenvalues=values[kept], axes=axes[kept])


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KroneckerFactors:
    """K-FAC's approximation `A x G` of a layer's Fisher block, and EKFAC's in the same eigenbasis.

    Attributes:
        A: of the inputs, (d_in, d_in); with the bias, the last coordinate is the constant 1 it is multiplied with.
        G: of the output gradients, (d_out, d_out).
        corrected: (r_G, r_A) float64, EKFAC's eigenvalues `u_j' F u_j` for the pairs of eigenvectors, in the factors' order;
            outside these the Fisher vanishes (`expand`) or is left out (`reduce`). None where it was not computed.
    """

    A: Factor
    G: Factor
    corrected: Tensor | None = None

    def metrics(self, *, rank_cut: float) -> dict[str, float]:
        """The numbers of `A x G` and its factors, from their two lists of eigenvalues.

        `lambda_max`, `trace`, `frobenius_norm` of `A x G`; `condition_number` (largest over smallest eigenvalue above
        `rank_cut` times the largest) and `effective_rank` (exp of the entropy of those, Roy and Vetterli 2007) of A (`input_`),
        of G (`output_`) and of `A x G`: products of the two, since entropies add. Empty where a factor is zero.
        """
        if min(len(self.A.eigenvalues), len(self.G.eigenvalues)) == 0:
            return {}
        a, g = self.A.eigenvalues, self.G.eigenvalues
        conditions, ranks = zip(*(_condition_and_rank(values, rank_cut) for values in (a, g)), strict=True)
        return {
            "lambda_max": (a[0] * g[0]).item(),
            "trace": (a.sum() * g.sum()).item(),
            "frobenius_norm": (a.norm() * g.norm()).item(),
            "condition_number": math.prod(conditions),
            "effective_rank": math.prod(ranks),
            "input_condition_number": conditions[0],
            "output_condition_number": conditions[1],
            "input_effective_rank": ranks[0],
            "output_effective_rank": ranks[1],
        }


def top_eigenvalues(factors: KroneckerFactors, k: int) -> Tensor:
    """The k largest eigenvalues of `A x G`, (min(k, r_A r_G),) float64 on CPU, descending; see `outer_pairs`."""
    return outer_pairs(factors, k).eigenvalues


def top_corrected_eigenvalues(factors: KroneckerFactors, k: int) -> Tensor:
    """The k largest EKFAC eigenvalues, (min(k, r_A r_G),) float64 on CPU, descending."""
    return outer_pairs(factors, k, corrected=True).eigenvalues


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
        values, places = (part.cpu() for part in flat.topk(min(k, len(flat)), largest=largest))
        width = max(factors.corrected.shape[1], 1)
        return KroneckerPairs(eigenvalues=values, outputs=places // width, inputs=places % width)
    a, g = (factor.eigenvalues if largest else factor.eigenvalues.flip(0) for factor in (factors.A, factors.G))
    found = _best_first(a[:k].tolist(), g[:k].tolist(), k, sign=-1.0 if largest else 1.0)
    inputs, outputs = (torch.tensor([item[axis] for item in found], dtype=torch.int64) for axis in (1, 2))
    return KroneckerPairs(
        eigenvalues=torch.tensor([item[0] for item in found], dtype=torch.float64),
        outputs=outputs if largest else len(g) - 1 - outputs,
        inputs=inputs if largest else len(a) - 1 - inputs,
    )


def _best_first(a: list[float], g: list[float], k: int, *, sign: float) -> list[tuple[float, int, int]]:
    """The first k of the products `a_i g_j` with i and j, in the order of `sign` times them; both lists are in it."""
    front = [(sign * a[0] * g[0], 0, 0)] if a and g else []
    found: list[tuple[float, int, int]] = []
    while front and len(found) < k:
        value, i, j = heapq.heappop(front)
        found.append((sign * value, i, j))
        if j + 1 < len(g):
            heapq.heappush(front, (sign * a[i] * g[j + 1], i, j + 1))
        if j == 0 and i + 1 < len(a):
            heapq.heappush(front, (sign * a[i + 1] * g[0], i + 1, 0))
    return found


def _unknown(size: int, like: Tensor) -> Factor:
    nan = torch.full((1,), torch.nan, dtype=torch.float64, device=like.device)
    return Factor(eigenvalues=nan, basis=nan.to(like.dtype).expand(size, 1))


def _kept(values: Tensor) -> Tensor:
    """Eigenvalues (ascending) above the rounding of a float64 eigensolve."""
    floor = len(values) * torch.finfo(torch.float64).eps * values[-1:].clamp_min(0.0)
    return values > floor


def _condition_and_rank(eigenvalues: Tensor, rank_cut: float) -> tuple[float, float]:
    kept = eigenvalues[eigenvalues > rank_cut * eigenvalues[0]]
    share = kept / kept.sum()
    return (kept[0] / kept[-1]).item(), math.exp(-(share * share.log()).sum().item())
