"""Self-check of an operator: the same answer twice, and symmetric."""

from typing import Final

import torch

from curvature_callbacks.errors import RefusedError
from curvature_callbacks.linalg.operator import Operator
from curvature_callbacks.linalg.space import InnerProducts

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
