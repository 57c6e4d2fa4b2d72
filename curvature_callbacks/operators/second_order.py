"""Self-check of the Hessian: a kernel without a second derivative is caught, never measured."""

from typing import Final

import torch

from curvature_callbacks.errors import RefusedError
from curvature_callbacks.linalg.space import InnerProducts
from curvature_callbacks.linalg.symmetry import check_symmetric
from curvature_callbacks.operators.hessian import HessianOperator

_DISAGREEMENT: Final = 2e-2  # central differences are good to 5e-5 on smooth models; a dropped kernel missed by 0.7


def check_second_order(hessian: HessianOperator, *, seed: int) -> float:
    """Largest relative error the self-checks found: repeatability, symmetry, and agreement with central differences.

    Symmetry catches a kernel in the middle of the model. One at its end (a fused loss) leaves a symmetric, wrong product: so
    models with operations whose derivative was written outside PyTorch are also compared with differences of the gradient.

    Raises:
        RefusedError: one of the three fails.

    Cost: three products; with such operations one more and two gradients.
    """
    error = check_symmetric(hessian, seed=seed)
    if not hessian.custom_functions:
        return error
    products = InnerProducts(hessian)
    norm = products.norm
    v = torch.randn(hessian.shape[0], generator=products.random(seed), dtype=hessian.dtype).to(hessian.device)
    product, difference = hessian.matmat(v[:, None])[:, 0], hessian.difference_product(v)
    scale = max(norm(product).item(), norm(difference).item())
    disagreement = norm(product - difference).item() / scale if scale > 0 else 0.0
    if not disagreement <= _DISAGREEMENT:
        raise RefusedError(
            f"the Hessian product differs from finite differences by {disagreement:.1e}: one of the custom operations "
            f"{', '.join(hessian.custom_functions)} has no second derivative and was taken as a constant (or the loss has "
            "kinks that differences cannot resolve). Load the model with eager implementations of these."
        )
    return max(error, disagreement)
