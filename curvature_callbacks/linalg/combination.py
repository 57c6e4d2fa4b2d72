"""LinearCombination: sums, multiples and shifts of operators."""

import math
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from curvature_callbacks.errors import ConfigurationError
from curvature_callbacks.linalg.operator import Operator
from curvature_callbacks.space import Space


@final
class LinearCombination(Operator):
    """`sum_i c_i A_i + shift I` as an operator: differences of curvatures, means, damping.

    Its use is a matrix of one's own for `TopEigenpairs` and `compute_spectrum`, made of those of a `Problem`. So what the
    Gauss-Newton matrix leaves of the Hessian, through which alone it can have negative eigenvalues
    (`examples/residual_hessian.py` logs it while a network trains):

        def residual_hessian(problem, names):
            return LinearCombination([(1.0, problem.hessian(names)), (-1.0, problem.ggn(names))])

        TopEigenpairs(operator=residual_hessian, k=2)

    Cost of one product: one product of every part, `P K` multiplications each beside it, and a second (P, K).

    Args:
        parts: (c_i, A_i), at least one; all operators of the same shape, dtype, device and space.
        shift: multiple of the identity.

    Attributes:
        space: that of the parts, where one has it: how inner products of vectors add up over processes.

    Raises:
        ConfigurationError: no part, parts that do not fit together, a number that is not finite.

    Example:
        >>> import torch
        >>> from curvature_callbacks.linalg.operator import MatrixOperator
        >>> A = MatrixOperator(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        >>> LinearCombination([(0.5, A)], shift=1.0).matmat(torch.eye(2)).tolist()
        [[2.0, 0.5], [0.5, 2.0]]
    """

    def __init__(self, parts: Sequence[tuple[float, Operator]], *, shift: float = 0.0) -> None:
        if not parts:
            raise ConfigurationError("`parts` must hold at least one (weight, operator), got none.")
        _require_finite([weight for weight, _ in parts], shift)
        first = parts[0][1]
        for i, (_, operator) in enumerate(parts):
            _require_same("shape", i, tuple(operator.shape), tuple(first.shape))
            _require_same("dtype", i, operator.dtype, first.dtype)
            _require_same("device", i, operator.device, first.device)
        spaces = [operator.space for _, operator in parts if hasattr(operator, "space")]
        for i, space in enumerate(spaces):
            _require_same("space", i, space, spaces[0])
        if spaces:
            self.space: Space = spaces[0]
        self._parts = tuple(parts)
        self._shift = shift

    @property
    @override
    def shape(self) -> tuple[int, int]:
        return self._parts[0][1].shape

    @property
    @override
    def dtype(self) -> torch.dtype:
        return self._parts[0][1].dtype

    @property
    @override
    def device(self) -> torch.device:
        return self._parts[0][1].device

    @property
    @override
    def is_psd(self) -> bool:
        # A difference may be semi-definite as well, but nothing says so.
        return self._shift >= 0 and all(weight >= 0 and operator.is_psd for weight, operator in self._parts)

    @override
    def matmat(self, V: Tensor) -> Tensor:
        total = self._shift * V
        for weight, operator in self._parts:
            total.add_(operator.matmat(V), alpha=weight)
        return total


def _require_finite(weights: Sequence[float], shift: float) -> None:
    for name, value in (*((f"weight {i} of `parts`", weight) for i, weight in enumerate(weights)), ("`shift`", shift)):
        if not math.isfinite(value):
            raise ConfigurationError(f"{name} must be a finite number, got {value!r}: leave the part out to drop it.")


def _require_same(what: str, i: int, value: object, expected: object) -> None:
    if value != expected:
        raise ConfigurationError(
            f"all operators in `parts` must have the same {what}: number {i} has {value}, the first has {expected}. Build them "
            "of the same parameters of the same model."
        )
