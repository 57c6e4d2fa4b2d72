"""The Hessian of the mean loss, by double backward through graphs that are built once."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, final

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from typing_extensions import override

from curvature_callbacks.errors import RefusedError
from curvature_callbacks.library_internals.tensors import custom_module
from curvature_callbacks.linalg.inner_products import InnerProducts
from curvature_callbacks.model.checks import refusing_single_derivatives
from curvature_callbacks.model.objective import Objective
from curvature_callbacks.operators.capabilities import SelfCheck
from curvature_callbacks.operators.difference import FiniteDifferenceHessianOperator
from curvature_callbacks.operators.graphs import MicrobatchOperator, ProductGraph, checked_scale, graph_nodes
from curvature_callbacks.operators.self_checks import SYMMETRY_PRODUCTS, check_symmetric

_PACKAGE: Final = __name__.partition(".")[0]
_KERNEL_DISAGREEMENT: Final = 2e-2  # central differences are good to 5e-5 on smooth models; a dropped kernel missed by 0.7


@final
class HessianOperator(MicrobatchOperator["_GradientGraph"]):
    """`H = d^2 L / d theta^2` of `L = sum_i l_i / sum_i n_i` over all microbatches, restricted to the named parameters.

    The gradient's graph of a microbatch is built once and kept where it fits; a product is one backward pass through it.
    Assumed and unchecked here: every operation is twice differentiable (`check_second_order` tests it).

    Args:
        objective: the loss of a microbatch.
        microbatches: weighted by their valid targets.
        names: parameters to differentiate by, default all; only their part of the graph is built.

    Attributes:
        num_targets: `sum_i n_i`.
        custom_functions: names of the operations in the loss whose derivative was written outside PyTorch.

    Raises:
        ProbeError: the loss is not finite, or no target is valid.

    Cost: about 2 gradients to build, 1.6 to 2.5 gradients a product, 2 more for microbatches whose graph is not kept; memory
    1.2 (GPT-2) to 2.2 times (ViT) a gradient's for every kept one.
    """

    is_psd = False

    def __init__(
        self,
        objective: Objective,
        microbatches: Sequence[Any],
        names: Iterable[str] | None = None,
    ) -> None:
        super().__init__(objective, microbatches, names)
        custom: set[str] = set()
        totals: list[Tensor] = []
        self.num_targets = 0

        def note(graph: _GradientGraph) -> None:
            self.num_targets += graph.num_targets
            totals.append(graph.total)
            custom.update(_custom_functions(graph.loss_nodes()))

        self._keep(note)
        self.num_targets = objective.summed(self.num_targets)
        self.custom_functions = tuple(sorted(custom))
        self._scale = checked_scale(totals, self.num_targets, is_part=objective.is_part)

    def difference_product(self, v: Tensor) -> Tensor:
        """`H v` (P,) by differences of the gradient: coarse, but blind to no kernel. Cost: two gradients."""
        differences = FiniteDifferenceHessianOperator(self._objective, self._microbatches, self._named_leaves)
        return differences.matmat(v[:, None])[:, 0]

    @override
    def self_check(self, seed: int) -> SelfCheck:
        with refusing_single_derivatives():
            return SelfCheck(check_second_order(self, seed=seed), SYMMETRY_PRODUCTS)

    @override
    def _graph(self, index: int) -> "_GradientGraph":
        losses = self._losses(index, curved=True)
        return _GradientGraph(losses.total, int(losses.num_targets.sum()), self._leaves)


@final
class _GradientGraph(ProductGraph):
    """The graph of the gradient of one microbatch's summed loss; its product is the Hessian of that loss times a vector.

    Attributes:
        total: that loss, detached.
        num_targets: its valid targets.
    """

    def __init__(self, total: Tensor, num_targets: int, leaves: Sequence[Tensor]) -> None:
        self.total = total.detach()
        self.num_targets = num_targets
        self._leaves = leaves
        self._loss = get_gradient_edge(total) if total.requires_grad else None
        parts: Sequence[Tensor | None] = [None] * len(leaves)
        if total.requires_grad:
            parts = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True)
        # Only gradients that still depend on a leaf: the others have a zero block. Their values, P numbers, are let go.
        self._gradients = [
            (index, get_gradient_edge(part)) for index, part in enumerate(parts) if part is not None and part.requires_grad
        ]

    @override
    def product(self, parts: Sequence[Tensor]) -> Sequence[Tensor | None]:
        if not self._gradients:
            return [None] * len(self._leaves)
        edges = [edge for _, edge in self._gradients]
        weights = [parts[index] for index, _ in self._gradients]
        return torch.autograd.grad(edges, self._leaves, weights, retain_graph=True, allow_unused=True)

    @override
    def nodes(self) -> Iterator[Node]:
        return (edge.node for _, edge in self._gradients)

    def loss_nodes(self) -> list[Node]:
        """The nodes at which the graph of the loss starts, behind that of its gradient."""
        return [] if self._loss is None else [self._loss.node]

    @override
    def tensors(self) -> tuple[Tensor]:
        return (self.total,)


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
    if not disagreement <= _KERNEL_DISAGREEMENT:
        raise RefusedError(
            f"the Hessian product differs from finite differences by {disagreement:.1e}: one of the custom operations "
            f"{', '.join(hessian.custom_functions)} has no second derivative and was taken as a constant (or the loss has "
            "kinks that differences cannot resolve). Load the model with eager implementations of these."
        )
    return max(error, disagreement)


def _custom_functions(starts: Iterable[Node]) -> set[str]:
    """Names of the operations in a graph whose derivative was written outside PyTorch and outside this package."""
    named = ((node.name(), custom_module(node)) for node in graph_nodes(starts))
    return {name for name, module in named if module is not None and not module.startswith(f"{_PACKAGE}.")}
