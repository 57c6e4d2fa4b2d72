"""Checks of an operator's products: a kernel whose derivatives are wrong is caught, never measured.

An operator says in its `self_check` which of these is its own.
"""

from typing import Final

import torch

from curvature_callbacks.errors import RefusedError
from curvature_callbacks.linalg.accumulate import dot
from curvature_callbacks.linalg.inner_products import InnerProducts
from curvature_callbacks.linalg.operator import JacobianOperator, Operator

ADJOINT_PRODUCTS: Final = 2  # what `check_adjoint` spends: 1.5, rounded up
SYMMETRY_PRODUCTS: Final = 3  # what `check_symmetric` spends

_ADJOINT_DISAGREEMENT: Final = 1e-3  # rounding gives 1e-6 in float32, kinks no more; a dropped kernel its share of `||J'u||^2`


def check_adjoint(operator: JacobianOperator, *, seed: int) -> float:
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
    if not change <= _ADJOINT_DISAGREEMENT:
        raise RefusedError(
            f"two products with the same vector differ by {change:.1e}: a kernel of the model does not give the same answer "
            "twice, so the operator is not a fixed map. Ask for deterministic kernels."
        )
    if not disagreement <= _ADJOINT_DISAGREEMENT:
        raise RefusedError(
            f"the products J v and J' u do not belong to the same Jacobian (relative error {disagreement:.1e}): an operation "
            "in the model has no second derivative and was taken as a constant (fused or custom kernels: flash attention, "
            "Liger, selective scan). Load the model with eager implementations of these."
        )
    return max(disagreement, change)


_ASYMMETRY: Final = 1e-2  # rounding gives 1e-6 in float32; a kernel without a second derivative gave 2.5


def check_symmetric(operator: Operator, *, seed: int) -> float:
    """Largest of `|u'Av - v'Au|` and `||Au - (Au again)||`, relative to `max ||Au||, ||Av||` for random u, v of unit entries.

    A kernel that cannot be differentiated twice does not raise under `torch.autograd.grad(inputs=...)`: it is taken as a
    constant, and the product is wrong without a word. It is then almost never symmetric, which this sees.

    Raises:
        RefusedError: above 1e-2.

    Cost: three products.
    """
    products = InnerProducts(operator)
    norm = products.norm
    U = torch.randn(operator.shape[0], 2, generator=products.random(seed), dtype=operator.dtype).to(operator.device)  # (P, 2)
    u, v = U.T
    Au, Av = operator.matmat(u[:, None])[:, 0], operator.matmat(v[:, None])[:, 0]
    scale = max(norm(Au).item(), norm(Av).item())
    if scale == 0:
        return 0.0
    change = norm(operator.matmat(u[:, None])[:, 0] - Au).item() / scale
    asymmetry = abs((products.dot(u, Av) - products.dot(v, Au)).item()) / scale
    if not change <= _ASYMMETRY:
        raise RefusedError(
            f"two products with the same vector differ by {change:.1e}: the loss is not a fixed function (dropout outside "
            "evaluation mode, random kernels), so it has no spectrum."
        )
    if not asymmetry <= _ASYMMETRY:
        raise RefusedError(
            f"the operator is not symmetric (relative asymmetry {asymmetry:.1e}): an operation in the model has no second "
            "derivative and was taken as a constant (fused or custom kernels: flash attention, Liger, selective scan). Load "
            "the model with eager implementations of these."
        )
    return max(asymmetry, change)
