"""Taps: hooks on activations that collect a parameter's uses in the backward pass."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from curvature_callbacks.gram.capture.derived import Derived, DerivedTensors, Placed, in_memory_order, parameter_view
from curvature_callbacks.gram.capture.pullback import Pullback
from curvature_callbacks.gram.uses.operation import Operation
from curvature_callbacks.gram.uses.uses import Tap
from curvature_callbacks.library_internals.tensors import base_of

Completed = Callable[[str, list[Placed]], None]
Tapped = tuple[Derived, Tap]


@final
class Taps:
    """Gradients of the outputs of tapped operations, gathered until a parameter has those of all its uses.

    Args:
        derived: the tensors that depend on parameters alone.
        num_samples: N of the microbatch.
        unruled: parameter to why it has no valid rule; it is not tapped.

    Attributes:
        completed: called in a backward pass with a parameter and its uses once all of them have their gradient.
        operations: parameter to the operations seen.
        unruled: parameter to why it has no valid rule: those known before, then those met here.
    """

    def __init__(self, derived: DerivedTensors, num_samples: int, unruled: Mapping[str, str]) -> None:
        self.completed: Completed = _ignore
        self.operations: dict[str, list[Operation]] = {}
        self.unruled = dict(unruled)
        self._derived = derived
        self._num_samples = num_samples
        self._expected: Counter[str] = Counter()
        self._open: Counter[str] = Counter()
        self._again = False
        self._is_sent = False  # whether a gradient of ours is on its way
        self._uses: dict[str, list[Placed]] = {}
        self._pullback = Pullback()
        self._pulled: set[str] = set()
        self._anchors: list[Tensor] = []

    def tap(self, output: Tensor, chosen: Sequence[Tapped]) -> Tensor:
        """Hook the gradient of `output`; returns the tensor to use in its place (possibly a copy)."""
        layer = self._operands(chosen)
        chosen = [(derived, tap) for derived, tap in chosen if self.admits(derived)]
        for derived, tap in chosen:
            for name in self._derived.names(derived):
                self.operations.setdefault(name, []).append(_operation(tap, derived, layer))
        wanted = [pair for pair in chosen if any(name not in self.unruled for name in self._derived.names(pair[0]))]
        if not wanted:
            return output
        if not output.requires_grad:
            output = self._anchored(output)
        if not output.requires_grad:  # inside a transform of its own (vmap)
            self.refuse([derived for derived, _ in wanted], "no gradient to tap")
            return output
        for derived, _ in wanted:
            if derived.view is not None:
                self._expected[derived.view.name] += 1
            else:
                self._pulled.update(self._derived.names(derived))
        return self._hooked(output, wanted)

    def anchor(self, leaf: Tensor) -> None:
        """Send the gradient to `leaf` too: what follows from it is no constant, but leads to no other anchor."""
        self._anchors.append(leaf)

    def admits(self, derived: Derived) -> bool:
        """Whether the per-sample gradients of a computed tensor fit in memory; its parameters have no rule otherwise."""
        names = self._derived.names(derived)
        if derived.view is not None or self._pullback.admits(derived, names, self._derived.leaves, self._num_samples):
            return True
        self.refuse([derived], "per-sample gradients of a large function of it", Operation("large function of the parameter"))
        return False

    def refuse(self, operands: Sequence[Derived], reason: str, operation: Operation | None = None) -> None:
        """Note that the parameters behind `operands` have no valid rule, and because of which operation."""
        for name in [name for derived in operands for name in self._derived.names(derived)]:
            if operation is not None:
                self.operations.setdefault(name, []).append(operation)
            self.unruled.setdefault(name, reason)

    def backward(self, total: Tensor, *, again: bool) -> None:
        """Send the gradient of `total`, 0-d, through the graph and finish what it does not reach; see `Capture.backward`."""
        self._open, self._again, self._is_sent = Counter(self._expected), again, True
        if self._anchors and total.requires_grad:
            torch.autograd.grad(total, self._anchors, allow_unused=True, retain_graph=again)
        for name, use in self._pullback.finish(self._derived.leaves).items():
            self._uses.setdefault(name, []).append(Placed(parameter_view(name, self._derived.parameters[name]), use))
        for name in sorted({*self._pulled, *(name for name, count in self._open.items() if count > 0)}):
            self._finish(name)

    def _operands(self, chosen: Sequence[Tapped]) -> "_Operands":
        """The parameters of one operation: a bias among them belongs to the others."""
        views = [derived.view for derived, tap in chosen if tap.operation.is_bias]
        bias = next((view.name for view in views if view is not None and view.is_parameter), None)
        weights = [name for derived, tap in chosen if not tap.operation.is_bias for name in self._derived.names(derived)]
        return _Operands(bias, tuple(weights))

    def _anchored(self, output: Tensor) -> Tensor:
        anchor = torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
        self._anchors.append(anchor)
        return output + anchor

    def _hooked(self, output: Tensor, wanted: list[Tapped]) -> Tensor:
        # On the tensor and now: a later in-place activation must not change what the gradient refers to. Such a one replaces
        # the history of a view (what `F.linear` gives for three axes), not that of its base.
        base = base_of(output)
        if base.numel() != output.numel() or not (base.is_contiguous() and output.is_contiguous()):
            base = output = output.clone()
        shape = output.shape
        base.register_hook(lambda gradient: self._arrive(wanted, gradient.reshape(shape)))  # type: ignore[no-untyped-call]
        return output

    def _arrive(self, wanted: list[Tapped], gradient: Tensor) -> None:
        """Complete the taps of one operation, whose output has got its `gradient`.

        One that comes before ours is sent belongs to a derivative that the loss takes of itself: its graph uses the parameters
        again, where no tap sees it.
        """
        if not self._is_sent:
            self.refuse([derived for derived, _ in wanted], "the loss takes a derivative through its operation")
            return
        with torch.no_grad():
            for derived, tap in reversed(wanted):
                if derived.view is None:
                    self._pullback.add(derived, tap.completed(gradient))
                    continue
                name = derived.view.name
                view, tap = in_memory_order(derived.view, tap, derived.value)
                self._uses.setdefault(name, []).append(Placed(view, tap.completed(gradient)))
                self._open[name] -= 1
                if self._open[name] == 0 and name not in self._pulled:
                    self._finish(name)
        if not self._again:  # let go of the operation's input now, as a plain pass does, and not with the whole graph
            wanted.clear()

    def _finish(self, name: str) -> None:
        self._open[name] = 0
        uses = self._uses.pop(name, [])
        if name not in self.unruled:
            self.completed(name, uses)


def _ignore(name: str, uses: list[Placed]) -> None:
    """Before a backward pass there is nothing to complete."""


@final
@dataclass(frozen=True, slots=True)
class _Operands:
    """The trained parameters of one operation, as its `Operation`s name them."""

    bias: str | None
    weights: tuple[str, ...]


def _operation(tap: Tap, derived: Derived, layer: _Operands) -> Operation:
    if derived.view is None:
        return tap.operation.on("a function of it")
    if not derived.view.is_parameter:
        return tap.operation.on("a part of it")
    is_bias = tap.operation.is_bias
    return replace(tap.operation, weights=layer.weights) if is_bias else replace(tap.operation, bias=layer.bias)
