"""The exact generalised Gauss-Newton matrix of the mean loss, by one product with J and one with J' of the logits."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd.graph import Node
from typing_extensions import override

from curvature_callbacks.errors import ConfigurationError
from curvature_callbacks.model.checks import refusing_single_derivatives
from curvature_callbacks.model.loss.sample_losses import Predictive, SampleLosses
from curvature_callbacks.model.objective import Objective
from curvature_callbacks.operators.capabilities import SelfCheck
from curvature_callbacks.operators.graphs import MicrobatchOperator, ProductGraph, checked_scale
from curvature_callbacks.operators.jacobian import Jacobian
from curvature_callbacks.operators.self_checks import ADJOINT_PRODUCTS, check_adjoint
from curvature_callbacks.operators.vectors import unflatten


@final
class GGNOperator(MicrobatchOperator["_LogitGraph"]):
    """`G = (1 / sum_i n_i) sum_it J_it' H_it J_it` of `L = sum_i l_i / sum_i n_i`, restricted to the named parameters.

    J_it is the Jacobian of the logits of target t of sample i, H_it the Hessian of its loss in them: `diag(p) - p p'` for
    cross-entropy, `2/D` for the mean squared error of D outputs, `diag(p (1 - p)) / D` for their mean binary cross-entropy.
    Targets that do not count have H = 0. It equals the exact Fisher over targets. Assumed and unchecked here: every operation
    is twice differentiable (`check_adjoint` tests it).

    Args:
        objective: the loss of a microbatch.
        microbatches: weighted by their valid targets.
        names: parameters to differentiate by, default all; only their part of the graph is built.

    Attributes:
        num_targets: `sum_i n_i`.
        num_outputs: S, the number of logits in all microbatches: the length of `J v`.

    Raises:
        ConfigurationError: the loss does not tell its logits and likelihood.
        ProbeError: the loss is not finite, or no target is valid.

    Cost: 1.5 gradients to build, 1.1 to 1.3 a product (half of it for J v), 2.2 with convolutions; as much as to build once
    more for microbatches whose graph is not kept. Memory: about a gradient's for every kept one, of it one buffer as large as
    the logits themselves; three more while a product is formed. Probabilities are computed from the logits every time: that
    took 1 % of a product at 5000 classes.
    """

    is_psd = True

    def __init__(
        self,
        objective: Objective,
        microbatches: Sequence[Any],
        names: Iterable[str] | None = None,
    ) -> None:
        super().__init__(objective, microbatches, names)
        self._counts: list[int] = []
        self.num_targets = 0
        totals: list[Tensor] = []

        def note(graph: _LogitGraph) -> None:
            self._counts.append(graph.jacobian.num_outputs)
            self.num_targets += graph.num_targets
            totals.append(graph.total)

        self._keep(note)
        self.num_targets = objective.summed(self.num_targets)
        self._scale = checked_scale(totals, self.num_targets, is_part=objective.is_part)

    @property
    def num_outputs(self) -> int:
        """S, the number of logits in all microbatches."""
        return sum(self._counts)

    @property
    def normaliser(self) -> int:
        """`sum_i n_i`, at least 1: a process may have no target."""
        return max(self.num_targets, 1)

    def jvp(self, v: Tensor) -> Tensor:
        """`J v` (S,) for `v` (P,), each logit with weight 1. Cost: half a product."""
        parts, pieces = unflatten(v.contiguous(), self._shapes), []
        self._graphs.each(self._saving_graph, lambda graph: pieces.append(graph.jacobian.jvp(parts).flatten()))
        return torch.cat(pieces)

    def vjp(self, u: Tensor) -> Tensor:
        """`J' u` (P,) for `u` (S,). Cost: half a product."""
        pieces = iter(torch.split(u, self._counts))
        return self._sum(1, lambda graph: [graph.vjp(next(pieces))], 1.0)[0]

    @override
    def self_check(self, seed: int) -> SelfCheck:
        with refusing_single_derivatives():
            return SelfCheck(check_adjoint(self, seed=seed), ADJOINT_PRODUCTS)

    @override
    def _graph(self, index: int) -> "_LogitGraph":
        return _LogitGraph(self._losses(index, curved=False), self._leaves)


@final
class _LogitGraph(ProductGraph):
    """One microbatch's logits and their Jacobian; its product is `J' H J v`, summed over targets.

    Attributes:
        jacobian: of the logits (N, M, C).
        total: the summed loss, detached.
        num_targets: its valid targets.
    """

    def __init__(self, losses: SampleLosses, leaves: Sequence[Tensor]) -> None:
        predictive = known_predictive(losses)
        self.jacobian = Jacobian(predictive.logits, leaves)
        self.total = losses.total.detach()
        self.num_targets = int(losses.num_targets.sum())
        self._likelihood = predictive.likelihood
        self._logits = predictive.logits.detach()  # (N, M, C)
        self._ignored = (~predictive.valid).nonzero(as_tuple=True)  # rows and positions of targets that do not count

    @override
    def product(self, parts: Sequence[Tensor]) -> list[Tensor | None]:
        return self.jacobian.vjp(self._curved(self.jacobian.jvp(parts)))

    def vjp(self, u: Tensor) -> list[Tensor | None]:
        """`J' u` leaf by leaf for `u` (N M C,)."""
        return self.jacobian.vjp(u.to(self._logits).reshape(self._logits.shape))

    @override
    def nodes(self) -> Iterator[Node]:
        return self.jacobian.nodes()

    @override
    def tensors(self) -> tuple[Tensor, ...]:
        return self._logits, *self._ignored

    def _curved(self, u: Tensor) -> Tensor:
        """`H u` (N, M, C), zero where targets do not count."""
        D = u.shape[-1]
        curved: Tensor
        if self._likelihood == "categorical":
            p = self._logits.softmax(-1)
            curved = (u - torch.linalg.vecdot(p, u)[..., None]).mul_(p)  # p (u - <p, u>): rounding keeps its sum at zero
        elif self._likelihood == "gaussian":
            curved = u * (2 / D)
        else:
            p = self._logits.sigmoid()
            curved = u * (p * (1 - p) / D)
        curved[self._ignored] = 0  # by both axes: with classes on axis 1 of the model's output, flattening them would copy
        return curved


def known_predictive(losses: SampleLosses) -> Predictive:
    """The logits and the likelihood of a loss; a `ConfigurationError` where they are not known."""
    if losses.predictive is None:
        raise ConfigurationError(
            "the GGN needs the logits and the likelihood of the loss: a loss function gives a mean or one loss per row, and "
            "the model's own `.loss` may match no standard form. Use the Hessian or the empirical Fisher, or let the loss be "
            "the model's own or a named one (cross_entropy, mse, bce)."
        )
    return losses.predictive
