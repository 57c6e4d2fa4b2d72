"""Self-check of products by double backward: `J v` against `J' u`, which needs first derivatives only."""

from typing import Final

import torch

from curvature_callbacks.errors import RefusedError
from curvature_callbacks.linalg.accumulate import dot
from curvature_callbacks.linalg.space import InnerProducts
from curvature_callbacks.operators.jacobian import HasJacobian

_DISAGREEMENT: Final = 1e-3  # rounding gives 1e-6 in float32, kinks no more; a dropped kernel its share of `||J'u||^2`
CHECK_PRODUCTS: Final = 2  # one and a half


def check_adjoint(operator: HasJacobian, *, seed: int) -> float:
    """Larger of `|u' J J' u - ||J'u||^2| / ||J'u||^2` and `||J'u - (J'u again)|| / ||J'u||` for a random u.

    `J'u` is one backward pass and trusted; `J v` differentiates it, and a kernel without a second derivative is taken as a
    constant there without a word. With `v = J'u` whatever is lost is lost from a sum of squares: nothing can cancel.

    Args:
        operator: a Fisher or the GGN, `J' A J`.
        seed: of u (S,), which has an entry for every loss or logit.

    Raises:
        RefusedError: above 1e-3.

    Cost: one and a half products.
    """
    products = InnerProducts(operator)
    norm = products.norm
    u = torch.randn(operator.num_outputs, generator=products.random(seed), dtype=operator.dtype).to(operator.device)  # (S,)
    v = operator.vjp(u)  # (P,)
    length = norm(v).item()
    if length == 0:
        return 0.0
    change = norm(operator.vjp(u) - v).item() / length
    disagreement = abs(products.total(dot(u, operator.jvp(v).to(u))).item() - length**2) / length**2
    if not change <= _DISAGREEMENT:
        raise RefusedError(
            f"two products with the same vector differ by {change:.1e}: a kernel of the model does not give the same answer "
            "twice, so the operator is not a fixed map. Ask for deterministic kernels."
        )
    if not disagreement <= _DISAGREEMENT:
        raise RefusedError(
            f"the products J v and J' u do not belong to the same Jacobian (relative error {disagreement:.1e}): an operation "
            "in the model has no second derivative and was taken as a constant (fused or custom kernels: flash attention, "
            "Liger, selective scan). Load the model with eager implementations of these."
        )
    return max(disagreement, change)
