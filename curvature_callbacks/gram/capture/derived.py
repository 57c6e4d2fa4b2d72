"""Derived tensors: tensors that depend on parameters only, and what a use of them means for the parameters."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from curvature_callbacks.gram.uses.uses import OuterProduct, Tap, Use


@final
@dataclass(frozen=True, slots=True)
class View:
    """Part of one parameter, perhaps with its axes in another order, by where its elements lie in the parameter's memory.

    Attributes:
        name: the parameter.
        start: offset of the first element.
        layout: (size, stride) of every axis, axes that run on merged; equal layouts list elements in the same order.
        shape: of the view, as the operation sees it.
        is_parameter: whether it is the parameter itself.
    """

    name: str
    start: int
    layout: tuple[tuple[int, int], ...]
    shape: tuple[int, ...]
    is_parameter: bool

    @property
    def size(self) -> int:
        """Number of elements, the product of `shape`."""
        size = 1
        for length in self.shape:
            size *= length
        return size


@final
class Derived:
    """A tensor that is a function of parameters.

    Args:
        value: the tensor the model sees, cut off from any graph.
        view: where it is a mere rearrangement of (part of) one parameter.
        graph: the same value as a differentiable function of the leaves, where it had to be computed.
    """

    def __init__(self, value: Tensor, view: View | None, graph: Tensor | None) -> None:
        self.value = value
        self.view = view
        self.graph = graph


@final
class DerivedTensors:
    """The tensors of one forward pass that depend on parameters alone, by the identity of the tensor the model sees.

    Args:
        parameters: name to the very tensor the forward pass will use.

    Attributes:
        parameters: the same.
        leaves: those that something was computed from, as differentiable leaves.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.parameters = dict(parameters)
        self.leaves: dict[str, Tensor] = {}
        self._known = {id(tensor): Derived(tensor, view_of(name, tensor, tensor), None) for name, tensor in parameters.items()}
        self._names: dict[int, list[str]] = {}

    def __contains__(self, value: Tensor) -> bool:
        return id(value) in self._known

    def any_of(self, values: Iterable[Tensor]) -> bool:
        """Whether one of them depends on parameters alone."""
        return not self._known.keys().isdisjoint(map(id, values))

    def __getitem__(self, value: Tensor) -> Derived:
        return self._known[id(value)]

    def adopt(self, name: str, parameter: Tensor) -> None:
        """Take the gathered `parameter` for the one called `name` from now on."""
        self.parameters[name] = parameter
        self._known[id(parameter)] = Derived(parameter, view_of(name, parameter, parameter), None)

    def forget(self, parameter: Tensor) -> None:
        """Drop the gathered parameter; keep its shape and the graphs computed from it."""
        derived = self._known.pop(id(parameter), None)
        if derived is not None and derived.view is not None:
            derived.value = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device="meta")
            self.parameters[derived.view.name] = derived.value

    def names(self, derived: Derived) -> list[str]:
        """Parameters that `derived` is computed from."""
        return [derived.view.name] if derived.view is not None else self._names[id(derived)]

    def graph(self, value: Tensor) -> Tensor:
        """`value` as a differentiable function of the leaves; as it is where it does not depend on them."""
        derived = self._known.get(id(value))
        if derived is None:
            return value
        if derived.graph is None:
            assert derived.view is not None
            derived.graph = self.leaves[derived.view.name] = derived.value.detach().requires_grad_()
        return derived.graph

    def computed(self, graph: Tensor) -> Derived:
        """The derived tensor with the value of `graph`; the model does not see it yet."""
        names = leaf_names(graph, self.leaves)
        value = graph.detach()
        view = view_of(names[0], value, self.parameters[names[0]]) if len(names) == 1 else None
        derived = Derived(value, view, graph)
        self._names[id(derived)] = names
        return derived

    def add(self, derived: Derived) -> Tensor:
        """Track `derived`; returns its value, for the model to see."""
        self._known[id(derived.value)] = derived
        return derived.value


@final
@dataclass(frozen=True, slots=True)
class Placed:
    """A completed use of a parameter or of a part of it, and which part that is.

    Attributes:
        view: the part of the parameter that the operation saw.
        use: gives the per-sample gradients of that part, (N, *view.shape).
    """

    view: View
    use: Use


def parameter_view(name: str, parameter: Tensor) -> View:
    """The view of a parameter that is the parameter itself."""
    return View(name, 0, ((parameter.numel(), 1),), tuple(parameter.shape), True)


def view_of(name: str, tensor: Tensor, parameter: Tensor) -> View | None:
    """`tensor` as a view of the contiguous `parameter`, or None where it is not one (a copy, overlapping elements)."""
    if tensor.shape == parameter.shape and tensor.stride() == parameter.stride() and _start_together(tensor, parameter):
        return parameter_view(name, parameter)
    if not parameter.is_contiguous() or not _shares_storage(tensor, parameter):
        return None
    axes = [(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]
    if not _covers_an_interval(axes):
        return None
    start = int(tensor.storage_offset() - parameter.storage_offset())
    return View(name, start, _merged(axes), tuple(tensor.shape), False)


def in_memory_order(view: View, tap: Tap, value: Tensor) -> tuple[View, Tap]:
    """View and tap, a transposed part turned round so that all uses of it list its elements in one order.

    The parameter itself stays as it is, however its own memory is laid out: its slices are counted along its first axis.
    """
    by_columns = value.ndim == 2 and value.stride(0) == 1 and value.stride(1) == value.shape[0] and min(value.shape) > 1
    if view.is_parameter or not isinstance(tap, OuterProduct) or not by_columns:
        return view, tap
    return View(view.name, view.start, ((value.numel(), 1),), (value.shape[1], value.shape[0]), False), tap.transposed()


def leaf_names(graph: Tensor, leaves: Mapping[str, Tensor]) -> list[str]:
    """Names of the leaves that `graph` was computed from. Cost: one traversal of its graph."""
    names = {id(leaf): name for name, leaf in leaves.items()}
    if id(graph) in names:
        return [names[id(graph)]]
    reached: set[str] = set()
    pending, seen = [graph.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = names.get(id(getattr(node, "variable", None)))
        if name is not None:
            reached.add(name)
        pending += [parent for parent, _ in node.next_functions]
    return sorted(reached)


def _start_together(tensor: Tensor, parameter: Tensor) -> bool:
    return _shares_storage(tensor, parameter) and tensor.storage_offset() == parameter.storage_offset()


def _shares_storage(tensor: Tensor, parameter: Tensor) -> bool:
    return tensor.dtype == parameter.dtype and tensor.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()


def _covers_an_interval(axes: list[tuple[int, int]]) -> bool:
    """Whether the elements fill an interval of the memory, each once."""
    expected = 1
    for size, stride in sorted(axes, key=lambda axis: axis[1]):
        if stride != expected:
            return False
        expected *= size
    return True


def _merged(axes: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    merged: list[tuple[int, int]] = []
    for size, stride in axes:
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return tuple(merged) or ((1, 1),)
