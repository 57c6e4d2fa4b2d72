"""Kronecker factors of layers: `A x G` by the eigenpairs of A and G, with nothing P x P.

A layer's parameters are the matrix (d_out, d_in), with the bias as a last column; `A` (d_in, d_in) acts from the right, `G`
(d_out, d_out) from the left: `(A x G) vec(V) = vec(G V A)`. The eigenvalues of `A x G` are the products of the factors'.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor


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
        return _nan_factor(len(matrix), matrix.to(dtype))
    values, vectors = torch.linalg.eigh(matrix.to(torch.float64))
    kept = _kept(values)
    return Factor(eigenvalues=values[kept].flip(0), basis=vectors[:, kept].flip(1).to(dtype))


def factor_of_vectors(vectors: Tensor, *, scale: float, chunk: int = 1 << 12) -> Factor:
    """Eigenpairs of `scale V' V` (d, d) from the Gram of the `vectors` V (n, d): for n < d, where d x d may not fit at all.

    One pair of nan where they are not finite. Products in float64: the eigenvectors `V' u / sqrt(lambda)` of small
    eigenvalues would not be orthonormal otherwise.

    Args:
        vectors: (n, d).
        scale: of the products.
        chunk: columns cast to float64 at a time.

    Cost: `2 n^2 d` operations and one n x n symmetric eigensolve in float64. Memory: n x n and the basis, d x r.
    """
    gram = torch.zeros(len(vectors), len(vectors), dtype=torch.float64, device=vectors.device)
    for part in torch.split(vectors, chunk, dim=1):
        gram.addmm_(part.double(), part.double().T)
    if not gram.isfinite().all():
        return _nan_factor(vectors.shape[1], vectors)
    values, combinations = torch.linalg.eigh(gram)
    kept = _kept(values)
    values, combinations = values[kept].flip(0), combinations[:, kept].flip(1)
    basis = torch.cat([part.double().T @ combinations for part in torch.split(vectors, chunk, dim=1)]) / values.sqrt()
    return Factor(eigenvalues=values * scale, basis=basis.to(vectors.dtype))


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


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerKronecker:
    """Kronecker factors of one layer, the parameters they belong to, and the Gram that tells how good they are.

    Attributes:
        factors: of the matrix (d_out, d_in), the bias as its last column; a convolution's kernel is flattened into d_in. With
            EKFAC's eigenvalues.
        weight: parameter name.
        bias: parameter name, or None without one.
        transposed: whether the weight is stored as (d_in, d_out): Hugging Face's Conv1D and embedding tables.
        gram: (S, S) float64, of the per-sample gradients of weight and bias, over the pseudo-samples the factors count.
        normaliser: of the Fisher, `F = (1 / normaliser) sum_s g_s g_s'`.
    """

    factors: KroneckerFactors
    weight: str
    bias: str | None
    transposed: bool
    gram: Tensor
    normaliser: float

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the weight and, where there is one, of the bias."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)


def _nan_factor(size: int, like: Tensor) -> Factor:
    nan = torch.full((1,), torch.nan, dtype=torch.float64, device=like.device)
    return Factor(eigenvalues=nan, basis=nan.to(like.dtype).expand(size, 1))


def _kept(values: Tensor) -> Tensor:
    """Eigenvalues (ascending) above the rounding of a float64 eigensolve."""
    floor = len(values) * torch.finfo(torch.float64).eps * values[-1:].clamp_min(0.0)
    return values > floor
