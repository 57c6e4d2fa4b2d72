"""An operator between square roots of a positive diagonal."""

from typing import final

import torch
from torch import Tensor

from curvature_callbacks.errors import ProbeError
from curvature_callbacks.linalg.operator import Operator
from curvature_callbacks.operators.capabilities import SelfCheck, self_check
from curvature_callbacks.space import LOCAL


@final
class PreconditionedOperator:
    """`D^1/2 (A + C) D^1/2` for a positive diagonal D and a diagonal C: symmetric, with the eigenvalues of `D (A + C)`.

    `D = P^-1` makes it `P^-1/2 A P^-1/2`, the Hessian as a preconditioner P sees it; its eigenvectors v are those of `P^-1 A`
    as `D^1/2 v`.

    Args:
        inner: A.
        scale: (P,) the diagonal of D, positive, in the operator's order of parameters.
        shift: (P,) the diagonal of C, a weight decay for instance, at least 0; None for none.

    Attributes:
        inner: A.

    Raises:
        ProbeError: an entry of D is not a positive number.

    Cost: that of `inner`, one pass over two vectors and one over `shift`; memory one vector, and one to build it.

    Example:
        >>> import torch
        >>> from curvature_callbacks.linalg.operator import MatrixOperator
        >>> A, D = torch.tensor([[2.0, 1.0], [1.0, 3.0]]), torch.tensor([4.0, 9.0])
        >>> PreconditionedOperator(MatrixOperator(A), D).matmat(torch.eye(2)).tolist()
        [[8.0, 6.0], [6.0, 27.0]]
    """

    def __init__(self, inner: Operator, scale: Tensor, *, shift: Tensor | None = None) -> None:
        for parameter, vector in (("scale", scale), ("shift", shift)):
            if vector is not None and vector.shape != inner.shape[:1]:
                raise ValueError(f"`{parameter}` must have shape {inner.shape[:1]}, got {tuple(vector.shape)}.")
        wrong = int((~((scale > 0) & (scale < torch.inf))).sum())
        if wrong:
            raise ProbeError(f"{wrong} of {len(scale)} entries of the preconditioner are not positive numbers.")
        self.inner = inner
        self.space = getattr(inner, "space", LOCAL)
        self._root = scale.to(inner.device, inner.dtype).sqrt()[:, None]  # (P, 1)
        self._shift = None if shift is None else shift.to(inner.device, inner.dtype)[:, None]  # (P, 1)
        self.shape = inner.shape
        self.dtype = inner.dtype
        self.device = inner.device
        self.is_psd = inner.is_psd

    def self_check(self, seed: int) -> SelfCheck:
        """That of A: a product with a diagonal cannot be wrong."""
        return self_check(self.inner, seed)

    def matmat(self, V: Tensor) -> Tensor:
        """`D^1/2 (A + C) D^1/2 V` for `V` (P, K)."""
        scaled = self._root * V
        product = self.inner.matmat(scaled)
        return self._root * (product if self._shift is None else product + self._shift * scaled)
