"""The Hessian of the mean loss by differences of the gradient, for models that cannot be differentiated twice."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Protocol, final

import torch
from torch import Tensor

from curvature_callbacks.errors import ConfigurationError, ProbeError, RefusedError
from curvature_callbacks.linalg.eigenpairs import Eigenpairs
from curvature_callbacks.linalg.inner_products import InnerProducts
from curvature_callbacks.linalg.lanczos.options import LanczosOptions
from curvature_callbacks.linalg.lanczos.solver import solve
from curvature_callbacks.linalg.operator import Operator
from curvature_callbacks.model.gradients import gradients
from curvature_callbacks.model.objective import Objective
from curvature_callbacks.operators.capabilities import SelfCheck
from curvature_callbacks.operators.vectors import flatten, unflatten

# Longest step as a share of ||theta||: the best fixed one for random vectors on seven small models (largest error 1.1e-4 in
# float32, where 3e-3 gave 1.1e-3 and 3e-4 gave 2.8e-4; in float64 longer than the best, 1e-5, for models that compute their
# norms and loss in float32: Llama's error is 1.6e-4 at 1e-4, 1.8e-3 at 1e-5).
_LONGEST: Final[Mapping[torch.dtype, float]] = {torch.float32: 1e-3, torch.float64: 1e-4}
# Vectors that move few parameters take shorter steps. On a briefly trained GPT-2 of 0.9 M parameters the best step was 1e-3
# ||theta|| along a random vector and along the layer norms, whose reach is 0.6 and 0.3, but 1e-5 along the largest
# eigenvectors, that move about 150 parameters and reach 2e-3: there 1e-3 was off by 0.17.
_SHORTEST: Final = 1e-2
_EVEN: Final = 0.1
_ESTIMATE_PRODUCTS: Final = 2  # what `error_estimate` spends
_STEP_DISAGREEMENT: Final = 0.1  # of two steps; smooth models had 1e-3, a ResNet with max pooling at too long a step 0.8


@final
class FiniteDifferenceHessianOperator:
    """`H v ~ (g(theta + h v) - g(theta - h v)) / (2 h)` of `L = sum_i l_i / sum_i n_i` over all microbatches.

    For models with kernels that have no second derivative (flash attention, Liger, selective scan). The step is a share of the
    norm of the named parameters, a shorter one for vectors that move few of them. It depends on v and the parameters alone,
    so that the same vector gives the same bits. Microbatch by microbatch; no graph outlives its gradient.

    The map is symmetric and linear only up to its accuracy. Errors relative to dense float64 Hessians of blocks of six small
    models: in float32 4e-5 to 5e-4 along random vectors and the eigenvectors at both ends, 2e-4 to 3e-3 for the matrix put
    together from single parameters; in float64 up to 3e-6, but 2e-4 to 4e-3 where the model computes in float32 inside. On a
    briefly trained GPT-2 of 0.9 M parameters in float32, relative to the double backward: 3e-5 along a random vector and the
    layer norms, 1e-4 along the largest eigenvector. `error_estimate` tells for a vector at hand.

    Kinks (ReLU, max pooling) have no second derivative: a difference counts those it steps over, the double backward none, and
    the two do not agree; where it steps over many, no digit is right (a small ResNet with max pooling: error 4e-5 at a step of
    3e-3, 0.8 at 1e-2).

    Args:
        objective: the loss of a microbatch.
        microbatches: weighted by their valid targets.
        names: parameters to differentiate by, default all.
        step: length `h ||v||` of all steps, relative to `||theta||`; None for 1e-3 in float32 and 1e-4 in float64, down to a
            hundredth of it for vectors that move few parameters.

    Raises:
        ConfigurationError: `step` is not a positive number.
        ProbeError: by the products, where a gradient is not finite or no target is valid.

    Cost: nothing to build; two gradients a product. Memory: a gradient's for one microbatch, and six vectors.
    """

    is_psd = False

    def __init__(
        self,
        objective: Objective,
        microbatches: Sequence[Any],
        names: Iterable[str] | None = None,
        *,
        step: float | None = None,
    ) -> None:
        if step is not None and not 0 < step < float("inf"):
            raise ConfigurationError(
                f"`step` must be a positive share of the parameters' norm, got {step!r}: leave it out for the default."
            )
        leaves = objective.leaves(names)
        self._objective = objective
        self._microbatches = microbatches
        self._names = list(leaves)
        self._shapes = [leaf.shape for leaf in leaves.values()]
        self._theta = flatten(leaves.values()).detach()
        self._step = step
        self.shape = (len(self._theta), len(self._theta))
        self.dtype = objective.dtype
        self.device = objective.device
        self.space = objective.space
        self._norm = InnerProducts(self).norm

    def matmat(self, V: Tensor) -> Tensor:
        """`H V` for `V` (P, K), column by column."""
        return torch.stack([self._product(column) for column in V.T], dim=1)

    def error_estimate(self, v: Tensor) -> float:
        """`||D_h v - D_2h v|| / ||D_h v||` for v (P,), `D_h` the product with step h; 0 for a product of 0.

        Where the step is too long, the error of `D_h` is a third of it; where too short, both are rounding and it is about
        the error. Kinks show too. Cost: four gradients.
        """
        product, longer = self._product(v), self._product(v, 2.0)
        scale = self._norm(product).item()
        return self._norm(product - longer).item() / scale if scale else 0.0

    def eigenpairs(self, options: LanczosOptions, *, initial_vectors: Tensor | None = None) -> Eigenpairs:
        """The outer pairs by Lanczos, with the error of the products along the outermost of them."""
        return eigenpairs_with_product_error(self, options, initial_vectors)

    def self_check(self, seed: int) -> SelfCheck:
        """How far the products of two steps are apart along a random vector, relative to one; 0 for a product of 0.

        Raises:
            RefusedError: above 0.1: kinks or rounding, not curvature.

        Cost: four gradients, two products.
        """
        generator = InnerProducts(self).random(seed)
        v = torch.randn(self.shape[0], generator=generator, dtype=self.dtype).to(self.device)
        error = self.error_estimate(v)
        if not error <= _STEP_DISAGREEMENT:
            raise RefusedError(
                f"finite differences with two steps are {error:.1e} apart: the loss has kinks that they step over (ReLU, max "
                "pooling), or its gradient is noisy. Use `operator`='hessian' with eager implementations of the model's "
                "kernels."
            )
        return SelfCheck(error, _ESTIMATE_PRODUCTS)

    def _product(self, v: Tensor, multiple: float = 1.0) -> Tensor:
        """`H v` with that multiple of its step."""
        length = self._norm(v).item()
        if length == 0:
            return torch.zeros_like(v)
        unit = v / length
        h = multiple * self._share(unit) * (self._norm(self._theta).item() or 1.0)
        above, below = (self._leaves_at(self._theta + sign * h * unit) for sign in (1, -1))
        return self._difference(above, below) * (length / (2 * h))

    def _share(self, v: Tensor) -> float:
        """Length of the step along a unit v, relative to `||theta||`."""
        if self._step is not None:
            return self._step
        return _LONGEST[self.dtype] * min(1.0, max(_SHORTEST, self._reach(v) / _EVEN))

    def _reach(self, v: Tensor) -> float:
        """Norm of the parameters that a unit v moves, relative to all: 1 where it moves each by the same share of its size.

        Their mean square is `||theta v||^2` (v^2 weighs them), their number `1 / ||v^2||^2`.
        """
        scale = self._norm(v * v).item() * self._norm(self._theta).item()
        return self._norm(self._theta * v).item() / scale if scale else 1.0

    def _leaves_at(self, theta: Tensor) -> dict[str, Tensor]:
        return {name: part.requires_grad_() for name, part in zip(self._names, unflatten(theta, self._shapes), strict=True)}

    def _difference(self, above: dict[str, Tensor], below: dict[str, Tensor]) -> Tensor:
        """(P,) `g(above) - g(below)`, of every microbatch first: the small number is the one to add up."""
        total, num_targets = torch.zeros_like(self._theta), 0
        for batch in self._microbatches:
            upper, count = self._gradient(batch, above)
            total += upper.sub_(self._gradient(batch, below)[0])
            num_targets += count
        num_targets = self._objective.summed(num_targets)
        if num_targets == 0 and not self._objective.is_part:
            raise ProbeError("no sample of this probe has a valid target: the loss is undefined.")
        if not total.isfinite().all():
            raise ProbeError("the gradient of this probe is not finite a step away from the parameters: no difference of it.")
        return total / max(num_targets, 1)

    def _gradient(self, batch: Any, leaves: dict[str, Tensor]) -> tuple[Tensor, int]:
        """(P,) gradient of the summed loss of one microbatch, and its valid targets."""
        with self._objective.saving():
            losses = self._objective(batch, leaves)
        return flatten(gradients(losses.total, leaves).values()), int(losses.num_targets.sum())


class ApproximateOperator(Operator, Protocol):
    """An operator that tells how far off its products are."""

    def error_estimate(self, v: Tensor) -> float:
        """Relative error of the product with v (P,). Cost: two products."""
        ...


def eigenpairs_with_product_error(
    operator: ApproximateOperator, options: LanczosOptions, initial_vectors: Tensor | None
) -> Eigenpairs:
    """The pairs by Lanczos, and how far off the products are along the outermost of them. Cost: four products more."""
    pairs = solve(operator, replace(options, return_eigenvectors=True), initial_vectors=initial_vectors)
    assert pairs.eigenvectors is not None
    outermost = {0, pairs.eigenvectors.shape[1] - 1}
    error = max(operator.error_estimate(pairs.eigenvectors[:, column].contiguous()) for column in outermost)
    vectors = pairs.eigenvectors if options.return_eigenvectors else None
    spent = _ESTIMATE_PRODUCTS * len(outermost)
    return replace(pairs, eigenvectors=vectors, product_error=error, num_matvecs=pairs.num_matvecs + spent)
