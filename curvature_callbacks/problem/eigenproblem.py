"""Eigenproblem: an operator of one probe, checked and solved in its own way, and its vectors between probes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

from torch import Tensor

from curvature_callbacks.linalg.eigenpairs import Eigenpairs
from curvature_callbacks.linalg.inner_products import InnerProducts
from curvature_callbacks.linalg.lanczos.options import LanczosOptions
from curvature_callbacks.linalg.operator import Operator
from curvature_callbacks.operators.capabilities import SelfCheck, eigenpairs, self_check


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Eigenproblem:
    """An operator together with what its self-check and solver need, on every process.

    Attributes:
        operator: the operator; its graphs live as long as this.
        about: what it is made of, for records.
    """

    operator: Operator
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_params(self) -> int:
        """P, the dimension over all processes."""
        return InnerProducts(self.operator).dimension(self.operator.shape[0])

    def assembled(self, part: Tensor) -> Tensor:
        """(P,) on the host: the vector of which this process holds `part`."""
        return InnerProducts(self.operator).assembled(part).cpu()

    def start(self, kept: Tensor | None) -> Tensor | None:
        """The part that this process holds of a vector that `assembled` gave at an earlier probe.

        None where it was of other parameters, and on all processes where one of them has none (its checkpoint was not read).
        """
        products, num_params = InnerProducts(self.operator), self.num_params
        part = products.part(kept) if kept is not None and len(kept) == num_params else kept
        missing = part is None or len(part) != self.operator.shape[0]
        return None if products.anywhere(missing) else part

    def check(self, *, seed: int) -> SelfCheck:
        """The operator's self-check; raises a `RefusedError` where its products are wrong."""
        return self_check(self.operator, seed)

    def checked_once(self, error: float | None, *, seed: int) -> SelfCheck:
        """The operator's self-check, at the first probe of a run: where an earlier one gave its `error`, that and no products.

        Raises:
            RefusedError: the products are wrong.
        """
        return self.check(seed=seed) if error is None else SelfCheck(error, 0)

    def solve(self, options: LanczosOptions, *, initial_vectors: Tensor | None = None) -> Eigenpairs:
        """The outer eigenpairs, by the operator's own way where it has one, else by Lanczos."""
        return eigenpairs(self.operator, options, initial_vectors=initial_vectors)
