"""Pullback: per-sample gradients of tensors computed from parameters, carried back to these parameters."""

from collections.abc import Iterable, Mapping
from typing import Final, final

import torch
from torch import Tensor

from curvature_callbacks.gram.capture.derived import Derived, leaf_names
from curvature_callbacks.gram.uses.operation import Operation
from curvature_callbacks.gram.uses.uses import Dense, Use

_FUNCTION: Final = Operation("function of the parameter")
_HELD_BYTES: Final = 256 << 20  # per-sample gradients of computed tensors and of the parameters behind them, one microbatch


@final
class Pullback:
    """Per-sample gradients of computed tensors, carried back to the parameters they are computed from.

    One vector-Jacobian product a sample through the graph of the parameters alone, which holds no activations.
    """

    def __init__(self) -> None:
        self._admitted: list[Derived] = []
        self._gradients: dict[int, Tensor] = {}
        self._held = 0

    def admits(self, derived: Derived, names: Iterable[str], leaves: Mapping[str, Tensor], num_samples: int) -> bool:
        """Whether the per-sample gradients of `derived` and its parameters fit in memory; counts them if so."""
        if any(known is derived for known in self._admitted):
            return True
        size = derived.value.numel() + sum(leaves[name].numel() for name in names)
        needed = num_samples * size * derived.value.element_size()
        if self._held + needed > _HELD_BYTES:
            return False
        self._held += needed
        self._admitted.append(derived)
        return True

    def add(self, derived: Derived, use: Use) -> None:
        """Add the per-sample gradients of one use of `derived`."""
        shape = derived.value.shape
        gradients = use.slices(0, shape[0] if shape else 1).reshape(use.num_samples, *shape)
        before = self._gradients.get(id(derived))
        self._gradients[id(derived)] = gradients if before is None else before + gradients

    def finish(self, leaves: Mapping[str, Tensor]) -> dict[str, Dense]:
        """Parameter to its per-sample gradients through all tensors added so far, which are forgotten."""
        reached = [derived for derived in self._admitted if id(derived) in self._gradients]
        graphs = [derived.graph for derived in reached if derived.graph is not None]
        gradients, self._gradients = [self._gradients[id(derived)] for derived in reached], {}
        if not graphs:
            return {}
        needed = {name: leaves[name] for name in sorted({name for graph in graphs for name in leaf_names(graph, leaves)})}
        by_sample: dict[str, list[Tensor]] = {name: [] for name in needed}
        for sample in zip(*gradients, strict=True):
            products = torch.autograd.grad(graphs, list(needed.values()), sample, retain_graph=True, allow_unused=True)
            for name, gradient in zip(needed, products, strict=True):
                if gradient is not None:
                    by_sample[name].append(gradient)
        return {
            name: Dense(_FUNCTION, torch.stack(parts).reshape(len(parts), *(needed[name].shape or (1,))))
            for name, parts in by_sample.items()
            if parts
        }
