"""Kept graphs: those of as many microbatches as fit the memory, the others built again for every use."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar, final

import torch
from torch import Tensor
from torch.autograd.graph import Node

from curvature_callbacks.device import device_budget
from curvature_callbacks.errors import ProbeError
from curvature_callbacks.library_internals.tensors import saved_tensors, sparse_parts
from curvature_callbacks.model.loss.sample_losses import SampleLosses
from curvature_callbacks.model.objective import Objective
from curvature_callbacks.operators.capabilities import SelfCheck
from curvature_callbacks.operators.fused.forward import fused
from curvature_callbacks.operators.vectors import accumulate, unflatten


class ProductGraph(Protocol):
    """What multiplies a vector by one microbatch's share of an operator."""

    def product(self, parts: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """The product leaf by leaf, None for zero, for a vector leaf by leaf; not yet normalised."""
        ...

    def nodes(self) -> Iterable[Node]:
        """The nodes at which its graphs start, for their size."""
        ...

    def tensors(self) -> Iterable[Tensor]:
        """Tensors that it holds beside its graphs, for their size."""
        ...


G = TypeVar("G", bound=ProductGraph)


@final
class KeptGraphs(Generic[G]):
    """The graphs of all microbatches, of which as many are kept as fit the budget by their measured size.

    Every graph is built once at the start. Where not all fit, room is left for the largest of those that are built again,
    each of which is freed before the next one is built.

    Args:
        build: builds the graph of microbatch `index`; the same graph every time.
        count: microbatches.
        device: where the graphs are.
        budget: bytes the kept ones and one built again may take.
        known: tensors that exist without the graphs: parameters and constants.
        note: called with every graph when it is built for the first time.
        size_of: a graph and its bytes, given what builds it, where asking the graph would disturb it.
    """

    def __init__(
        self,
        build: Callable[[int], G],
        count: int,
        *,
        device: torch.device,
        budget: int,
        known: Iterable[Tensor] = (),
        note: Callable[[G], None] = lambda _: None,
        size_of: Callable[[Callable[[], G]], tuple[G, int]] | None = None,
    ) -> None:
        self._kept: list[tuple[G, int] | None] = [None] * count
        known = list(known)
        reserve = 0
        for index in range(count):
            building = partial(build, index)
            graph, size = _measured(building, device, known) if size_of is None else size_of(building)
            note(graph)
            self._kept[index] = (graph, size)
            del graph
            reserve = self._fit(budget, reserve)

    def each(self, build: Callable[[int], G], function: Callable[[G], None]) -> None:
        """Call `function` with the graph of every microbatch in turn, built again where it is not kept.

        The function must not hold on to it. `build` is not kept either: as a method of what owns this object it would close a
        circle, and graphs would wait for the garbage collector.
        """
        for index, kept in enumerate(self._kept):
            function(build(index) if kept is None else kept[0])

    def _fit(self, budget: int, reserve: int) -> int:
        """Drop kept graphs, from the last, until the rest and the largest dropped one fit the budget; the size of that one."""
        for index in reversed(range(len(self._kept))):
            kept = self._kept[index]
            if kept is not None and self._num_bytes() + reserve > budget:
                reserve = max(reserve, kept[1])
                self._kept[index] = None
        return reserve

    def _num_bytes(self) -> int:
        """Measured size of the kept graphs."""
        return sum(kept[1] for kept in self._kept if kept is not None)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class GraphLimits:
    """What kept graphs may take. Products are the same, bit by bit, whatever is kept.

    Attributes:
        kept_bytes: of an operator's graphs on this process, with one that is built again; None for `device_budget`.
    """

    kept_bytes: int | None = None


class MicrobatchOperator(ABC, Generic[G]):
    """`A = scale * sum of products over microbatches`, restricted to named parameters, through graphs kept where they fit.

    It must not outlive its probe: fused optimizers change parameters without bumping their version, so a stale graph goes
    unnoticed. The graph of a microbatch that is not kept is built again for every call of `matmat`, for all columns at once.

    Attributes:
        shape: `(P, P)`.
        dtype: of vectors.
        device: of vectors.
        limits: how much memory kept graphs take; parameters and batches do not count.
    """

    limits = GraphLimits()
    _graphs: KeptGraphs[G]
    _scale: float

    def __init__(self, objective: Objective, microbatches: Sequence[Any], names: Iterable[str] | None) -> None:
        limit = self.limits.kept_bytes
        self._objective = objective
        self._microbatches = microbatches
        self._named_leaves = objective.leaves(names)
        self._leaves = list(self._named_leaves.values())
        self._shapes = [leaf.shape for leaf in self._leaves]
        self._budget = objective.least(device_budget(objective.device) if limit is None else limit)
        size = sum(shape.numel() for shape in self._shapes)
        self.shape = (size, size)
        self.dtype = objective.dtype
        self.device = objective.device
        self.space = objective.space

    def matmat(self, V: Tensor) -> Tensor:
        """`A V` for `V` (P, K), column by column: several at once gain nothing on CPU and cost memory."""
        columns = [unflatten(column.contiguous(), self._shapes) for column in V.T]
        return self._sum(V.shape[1], lambda graph: map(graph.product, columns), self._scale).T

    @abstractmethod
    def self_check(self, seed: int) -> SelfCheck:
        """The largest relative error of its products, with random vectors of this seed.

        Raises:
            RefusedError: the products are wrong.
        """

    @abstractmethod
    def _graph(self, index: int) -> G:
        """Build the graph of microbatch `index`."""

    def _keep(self, note: Callable[[G], None]) -> None:
        """Build all graphs, call `note` with each, and keep what fits."""
        self._graphs = KeptGraphs(
            self._saving_graph,
            len(self._microbatches),
            device=self.device,
            budget=self._budget,
            known=[*self._objective.parameters.values(), *self._objective.constants()],
            note=note,
            size_of=self._objective.size_of,
        )

    def _losses(self, index: int, *, curved: bool) -> SampleLosses:
        """Losses of microbatch `index`, with a graph for second derivatives or, not `curved`, for its Jacobian alone."""
        batch, leaves = self._microbatches[index], self._named_leaves
        return fused(lambda: self._objective(batch, leaves), self._objective.modules, curved=curved)

    def _saving_graph(self, index: int) -> G:
        with self._objective.saving():
            return self._graph(index)

    def _sum(self, K: int, products: Callable[[G], Iterable[Sequence[Tensor | None]]], scale: float) -> Tensor:
        """(K, P): `scale` times the sum over the graphs of each of the K products."""
        result = torch.zeros(K, self.shape[0], dtype=self.dtype, device=self.device)
        first = True

        def add(graph: G) -> None:
            nonlocal first
            for target, parts in zip(result, products(graph), strict=True):
                accumulate(target, parts, self._shapes, scale=scale, first=first)
            first = False

        self._graphs.each(self._saving_graph, add)
        return result


def checked_scale(totals: Sequence[Tensor], num_targets: int, *, is_part: bool) -> float:
    """`1 / num_targets`, if the mean of the `totals`, summed losses of microbatches, over so many is a loss.

    Args:
        totals: of microbatches.
        num_targets: of all of them.
        is_part: whether other processes have rows too: then this one may have none, and nothing to scale.

    Raises:
        ProbeError: no sample has a valid target, or the mean loss is not finite.
    """
    if num_targets == 0 and not is_part:
        raise ProbeError("no sample of this probe has a valid target: the loss is undefined.")
    mean = torch.stack([*totals]).sum() / max(num_targets, 1)
    if not mean.isfinite():
        raise ProbeError(f"the loss of this probe is {mean.item()}.")
    return 1 / max(num_targets, 1)


def _measured(build: Callable[[], G], device: torch.device, known: Sequence[Tensor]) -> tuple[G, int]:
    """A graph and its bytes: what CUDA's allocator gave out, elsewhere what the nodes have saved."""
    if device.type != "cuda":
        graph = build()
        return graph, held_bytes(graph, known)
    before = torch.cuda.memory_allocated(device)
    graph = build()
    return graph, max(0, torch.cuda.memory_allocated(device) - before)


def held_bytes(graph: ProductGraph, known: Iterable[Tensor] = ()) -> int:
    """Bytes of all storages that the graph's nodes have saved and `known` does not hold; each once.

    The nodes are asked rather than watched with `saved_tensors_hooks`: a hook would run in every later product. Assumed:
    operations written in C++ outside PyTorch save little; their nodes do not tell.

    Cost: no arithmetic; 3 ms for a GPT-2 of four layers.
    """
    sizes: dict[int, int] = {}
    kept = [tensor for node in graph_nodes(graph.nodes()) for tensor in saved_tensors(node)]
    for tensor in _dense([*graph.tensors(), *kept]):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
    for tensor in _dense(known):
        sizes.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def _dense(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Those with a storage: of sparse ones the parts, of other layouts nothing."""
    for tensor in tensors:
        if tensor.layout is torch.sparse_coo:
            yield from sparse_parts(tensor)
        elif tensor.layout is torch.strided:
            yield tensor


def graph_nodes(starts: Iterable[Node]) -> Iterator[Node]:
    """All nodes that can be reached, each once."""
    seen: set[Node] = set()
    waiting = list(starts)
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [following for following, _ in node.next_functions if following is not None]
