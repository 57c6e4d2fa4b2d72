"""What an operator may bring along: a check of its own products, and eigenpairs by a shorter way than Lanczos."""

from typing import NamedTuple, Protocol, final, runtime_checkable

from torch import Tensor

from curvature_callbacks.linalg.eigenpairs import Eigenpairs
from curvature_callbacks.linalg.lanczos.options import LanczosOptions
from curvature_callbacks.linalg.lanczos.solver import solve
from curvature_callbacks.linalg.operator import Operator
from curvature_callbacks.operators.self_checks import SYMMETRY_PRODUCTS, check_symmetric


@final
class SelfCheck(NamedTuple):
    """What a self-check that passed has seen: the largest relative error, and the products it spent."""

    error: float
    num_matvecs: int


@runtime_checkable
class ChecksItself(Protocol):
    """An operator that knows how its products may be wrong."""

    def self_check(self, seed: int) -> SelfCheck:
        """The largest relative error of its products, with random vectors of this seed.

        Raises:
            RefusedError: the products are wrong.
        """
        ...


@runtime_checkable
class SolvesItself(Protocol):
    """An operator that has its eigenpairs by a shorter way than Lanczos, or more to say about them."""

    def eigenpairs(self, options: LanczosOptions, *, initial_vectors: Tensor | None = None) -> Eigenpairs:
        """The outer eigenpairs; `initial_vectors` (P, j) are those of a similar operator."""
        ...


def self_check(operator: Operator, seed: int) -> SelfCheck:
    """The operator's own check; symmetry and the same answer twice where it has none.

    Raises:
        RefusedError: the products are wrong.
    """
    if isinstance(operator, ChecksItself):
        return operator.self_check(seed)
    return SelfCheck(check_symmetric(operator, seed=seed), SYMMETRY_PRODUCTS)


def eigenpairs(operator: Operator, options: LanczosOptions, *, initial_vectors: Tensor | None = None) -> Eigenpairs:
    """The operator's own eigenpairs; by Lanczos where it has no way of its own."""
    if isinstance(operator, SolvesItself):
        return operator.eigenpairs(options, initial_vectors=initial_vectors)
    return solve(operator, options, initial_vectors=initial_vectors)
