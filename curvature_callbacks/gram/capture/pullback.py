"""Derived tensors: tensors that depend on parameters only, and what a use of them means for the parameters."""

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
        self._sources: list[Derived] = []
        self._gradients: dict[int, Tensor] = {}
        self._held = 0

    def admits(self, source: Derived, names: Iterable[str], leaves: Mapping[str, Tensor], num_samples: int) -> bool:
        """Whether the per-sample gradients of `source` and its parameters fit in memory; counts them if so."""
        if any(known is source for known in self._sources):
            return True
        size = source.value.numel() + sum(leaves[name].numel() for name in names)
        needed = num_samples * size * source.value.element_size()
        if self._held + needed > _HELD_BYTES:
            return False
        self._held += needed
        self._sources.append(source)
        return True

    def add(self, source: Derived, use: Use) -> None:
        """Add the per-sample gradients of one use of `source`."""
        shape = source.value.shape
        rows = use.rows(0, shape[0] if shape else 1).reshape(use.num_samples, *shape)
        found = self._gradients.get(id(source))
        self._gradients[id(source)] = rows if found is None else found + rows

    def finish(self, leaves: Mapping[str, Tensor]) -> dict[str, Dense]:
        """Parameter to its per-sample gradients through all tensors added so far, which are forgotten."""
        reached = [source for source in self._sources if id(source) in self._gradients]
        graphs = [source.graph for source in reached if source.graph is not None]
        gradients, self._gradients = [self._gradients[id(source)] for source in reached], {}
        if not graphs:
            return {}
        needed = {name: leaves[name] for name in sorted({name for graph in graphs for name in leaf_names(graph, leaves)})}
        rows: dict[str, list[Tensor]] = {name: [] for name in needed}
        for sample in zip(*gradients, strict=True):
            found = torch.autograd.grad(graphs, list(needed.values()), sample, retain_graph=True, allow_unused=True)
            for name, gradient in zip(needed, found, strict=True):
                if gradient is not None:
                    rows[name].append(gradient)
        return {
            name: Dense(_FUNCTION, torch.stack(found).reshape(len(found), *(needed[name].shape or (1,))))
            for name, found in rows.items()
            if found
        }
