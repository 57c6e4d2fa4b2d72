"""Operator: a symmetric linear map known only by its products."""

from typing import Protocol, final, runtime_checkable

import torch
from torch import Tensor
from typing_extensions import override


@runtime_checkable
class Operator(Protocol):
    """A fixed symmetric linear map on flat vectors: same input, same output, bit for bit, no side effect."""

    @property
    def shape(self) -> tuple[int, int]:
        """`(P, P)`, P the length of the vectors that it takes here."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the vectors it takes and gives; float32 or float64."""
        ...

    @property
    def device(self) -> torch.device:
        """Device of the vectors it takes and gives."""
        ...

    @property
    def is_psd(self) -> bool:
        """Whether every eigenvalue is known to be non-negative."""
        ...

    def matmat(self, V: Tensor) -> Tensor:
        """`A V` for `V` (P, K), as (P, K)."""
        ...


class JacobianOperator(Operator, Protocol):
    """An operator `A = J' B J / normaliser` that gives away its J (S, P); B is positive semi-definite, of a Fisher 1."""

    @property
    def normaliser(self) -> int:
        """What `J' B J` is divided by."""
        ...

    @property
    def num_outputs(self) -> int:
        """S, the number of outputs that J differentiates."""
        ...

    def jvp(self, v: Tensor) -> Tensor:
        """`J v` (S,) for `v` (P,)."""
        ...

    def vjp(self, u: Tensor) -> Tensor:
        """`J' u` (P,) for `u` (S,)."""
        ...


@final
class MatrixOperator(Operator):
    """A symmetric matrix as an operator. Cost of one product: `P^2` multiplications.

    Args:
        matrix: (P, P), float32 or float64; taken as symmetric, unchecked.
        is_psd: whether every eigenvalue is known to be non-negative.

    Example:
        >>> import torch
        >>> MatrixOperator(torch.eye(3)).matmat(torch.ones(3, 1)).sum().item()
        3.0
    """

    def __init__(self, matrix: Tensor, *, is_psd: bool = False) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"`matrix` must be square, got shape {tuple(matrix.shape)}.")
        if matrix.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"`matrix` must be float32 or float64, got {matrix.dtype}: convert it first.")
        self._matrix = matrix
        self._is_psd = is_psd

    @property
    @override
    def shape(self) -> tuple[int, int]:
        return self._matrix.shape[0], self._matrix.shape[1]

    @property
    @override
    def dtype(self) -> torch.dtype:
        return self._matrix.dtype

    @property
    @override
    def device(self) -> torch.device:
        return self._matrix.device

    @property
    @override
    def is_psd(self) -> bool:
        return self._is_psd

    @override
    def matmat(self, V: Tensor) -> Tensor:
        return self._matrix @ V
