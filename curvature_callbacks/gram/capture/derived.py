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
    """A rearranged part of one parameter, by its elements in memory.

    Attributes:
        name: the parameter.
        start: first element.
        layout: (size, stride) of every axis, axes that run on merged; equal layouts list elements in the same order.
        shape: of the view.
        whole: whether it is the parameter as it is.
    """

    name: str
    start: int
    layout: tuple[tuple[int, int], ...]
    shape: tuple[int, ...]
    whole: bool

    @property
    def size(self) -> int:
        """Number of elements."""
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
    """The sources of one forward pass, by the identity of the tensor the model sees.

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
        """Whether one of them is a source."""
        return not self._known.keys().isdisjoint(map(id, values))

    def __getitem__(self, value: Tensor) -> Derived:
        return self._known[id(value)]

    def adopt(self, name: str, whole: Tensor) -> None:
        """The parameter `name` is `whole` from now on."""
        self.parameters[name] = whole
        self._known[id(whole)] = Derived(whole, view_of(name, whole, whole), None)

    def forget(self, whole: Tensor) -> None:
        """`whole` is let go: of what was computed from it the graph stays, of itself the shape."""
        source = self._known.pop(id(whole), None)
        if source is not None and source.view is not None:
            source.value = torch.empty_strided(whole.shape, whole.stride(), dtype=whole.dtype, device="meta")
            self.parameters[source.view.name] = source.value

    def names(self, source: Derived) -> list[str]:
        """Parameters that `source` is computed from."""
        return [source.view.name] if source.view is not None else self._names[id(source)]

    def graph(self, value: Tensor) -> Tensor:
        """`value` as a differentiable function of the leaves, where it is a source."""
        source = self._known.get(id(value))
        if source is None:
            return value
        if source.graph is None:
            assert source.view is not None
            source.graph = self.leaves[source.view.name] = source.value.detach().requires_grad_()
        return source.graph

    def computed(self, graph: Tensor) -> Derived:
        """A new source with the value of `graph`, not yet among those the model sees."""
        names = leaf_names(graph, self.leaves)
        value = graph.detach()
        view = view_of(names[0], value, self.parameters[names[0]]) if len(names) == 1 else None
        source = Derived(value, view, graph)
        self._names[id(source)] = names
        return source

    def add(self, source: Derived) -> Tensor:
        """The value of `source`, for the model to see."""
        self._known[id(source.value)] = source
        return source.value


@final
@dataclass(frozen=True, slots=True)
class Placed:
    """A completed use of a view of a parameter."""

    view: View
    use: Use


def view_of(name: str, tensor: Tensor, parameter: Tensor) -> View | None:
    """`tensor` as a view of the contiguous `parameter`, or None where it is not one (a copy, overlapping elements)."""
    if tensor.shape == parameter.shape and tensor.stride() == parameter.stride() and _same_place(tensor, parameter):
        return View(name, 0, ((parameter.numel(), 1),), tuple(tensor.shape), True)
    if not parameter.is_contiguous() or not _shares_storage(tensor, parameter):
        return None
    axes = [(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]
    if not _covers_an_interval(axes):
        return None
    start = int(tensor.storage_offset() - parameter.storage_offset())
    return View(name, start, _merged(axes), tuple(tensor.shape), False)


def placed(view: View, tap: Tap, value: Tensor) -> tuple[View, Tap]:
    """View and tap, a transposed matrix turned round so that all uses of a matrix list its elements in one order."""
    if isinstance(tap, OuterProduct) and value.ndim == 2 and value.stride(0) == 1 and value.stride(1) == value.shape[0]:
        rows, columns = value.shape
        if rows > 1 and columns > 1:
            turned = View(view.name, view.start, ((rows * columns, 1),), (columns, rows), view.whole)
            return turned, tap.transposed()
    return view, tap


def leaf_names(graph: Tensor, leaves: Mapping[str, Tensor]) -> list[str]:
    """Names of the leaves that `graph` was computed from. Cost: one traversal of its graph."""
    names = {id(leaf): name for name, leaf in leaves.items()}
    if id(graph) in names:
        return [names[id(graph)]]
    found: set[str] = set()
    pending, seen = [graph.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = names.get(id(getattr(node, "variable", None)))
        if name is not None:
            found.add(name)
        pending += [parent for parent, _ in node.next_functions]
    return sorted(found)


def _same_place(tensor: Tensor, parameter: Tensor) -> bool:
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
