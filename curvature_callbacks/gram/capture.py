"""Capture: every use of the parameters in one forward pass, completed by backward passes."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from types import FunctionType
from typing import Any, Final, final

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from curvature_callbacks.gram.elementwise import Elementwise
from curvature_callbacks.gram.layout import Layout, layout_of
from curvature_callbacks.gram.provenance import Provenance
from curvature_callbacks.gram.rules import RULES, is_in_place, is_indexing, kind_without_rule
from curvature_callbacks.gram.sources import Placed, Pullback, Source, View, leaf_names, placed, view_of
from curvature_callbacks.gram.spread import spread, with_sample_letter
from curvature_callbacks.gram.uses import Tap

_MAKE_LEAF: Final = (Tensor.requires_grad_, Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
_SPREAD_BYTES: Final = 64 << 20  # most a parameter copied for every sample may take

Completed = Callable[[str, list[Placed]], None]


@final
class Capture(TorchFunctionMode):
    """Intercepts the operations that take a parameter and taps the gradient of their output.

    Keyed by the tensor, not the module, so that functional calls, tied weights, shared modules and raw parameters are all
    seen. The parameters themselves must not require gradients: no weight-gradient product is computed. Outputs that would
    otherwise be constants are tied to an anchor, so that the backward pass reaches them.

    An operation on parameters, buffers and literals alone gives another source: a view of a parameter keeps its place in it,
    anything else is differentiated on its own and its per-sample gradients are carried back. Where a source meets
    activations, the operation's rule says what its gradients are; without a rule an operation that broadcasts gets one copy of
    the source a sample.

    Args:
        parameters: name to the very tensor the forward pass will use.
        num_samples: rows of the microbatch.
        unruled: name to why the parameter has no valid rule; those known are not tapped, those met here are added.
        positions_first: parameters whose activations are to be read sequence-first where both ways are possible.
        constants: buffers and frozen parameters of the model.

    Attributes:
        completed: called in a backward pass with a parameter and its uses once all of them have their gradient.
        kinds: name to the kinds of operation seen, with or without a rule.
        positions: name to the positions per sample on axis 0 of each output with a rule (1: axis 0 is the sample).
        biases: weight to the biases its operations added, None for an operation without one.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        num_samples: int,
        *,
        unruled: dict[str, str],
        positions_first: Set[str] = frozenset(),
        constants: Iterable[Tensor] = (),
    ) -> None:
        super().__init__()
        self._parameters = parameters
        self._num_samples = num_samples
        self.completed: Completed = _nobody
        self._positions_first = positions_first
        self._provenance = Provenance(constants, num_samples)
        self._sources = {id(tensor): Source(tensor, view_of(name, tensor, tensor), None) for name, tensor in parameters.items()}
        self._leaves: dict[str, Tensor] = {}
        self._names: dict[int, list[str]] = {}  # of computed sources
        self._taps: Counter[str] = Counter()
        self._open: Counter[str] = Counter()
        self._uses: dict[str, list[Placed]] = {}
        self._pullback = Pullback()
        self._pulled: set[str] = set()
        self._anchors: list[Tensor] = []
        self.kinds: dict[str, list[str]] = {}
        self.positions: dict[str, list[int]] = {}
        self.biases: dict[str, set[str | None]] = {}
        self.unruled = unruled

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, record what it did with tracked parameters."""
        kwargs = kwargs or {}
        inputs = list(_tensors((*args, *kwargs.values())))
        tracked = {id(value): value for value in inputs if id(value) in self._sources}
        if not tracked:
            return self._of_activations(func, args, kwargs, inputs)
        if func in _OPENED:
            with self:
                return _OPENED[func](*args, **kwargs)
        if func is F.embedding:
            args, kwargs = self._with_sample_axis(args, kwargs)
            inputs = list(_tensors((*args, *kwargs.values())))
        elif func is Tensor.expand_as and id(args[0]) in tracked:
            func, args = Tensor.expand, (args[0], args[1].shape)
            inputs = [args[0]]
        elif is_indexing(func) and id(args[0]) in tracked:
            args = (args[0], _plain_index(args[1]))
            inputs = list(_tensors(args))
        if all(id(value) in tracked or self._provenance.is_constant(value) for value in inputs):
            return self._derive(func, args, kwargs)
        return self._meet(func, args, kwargs, inputs, tracked)

    def backward(self, total: Tensor, *, again: bool = False) -> None:
        """Send the gradient of `total` through the graph; `completed` is called on the way, and for what was not reached.

        Args:
            total: 0-d, a sum over samples.
            again: whether another backward pass will follow.

        Cost: one backward pass for activation gradients only.
        """
        self._open = Counter(self._taps)
        if self._anchors and total.requires_grad:
            torch.autograd.grad(total, self._anchors, allow_unused=True, retain_graph=again)
        for name, use in self._pullback.finish(self._leaves).items():
            parameter = self._parameters[name]
            view = View(name, 0, ((parameter.numel(), 1),), tuple(parameter.shape), True)
            self._uses.setdefault(name, []).append(Placed(view, use))
        waiting = {*self._pulled, *(name for name, count in self._open.items() if count > 0)}
        for name in sorted(waiting):
            self._finish(name)

    def _of_activations(self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor]) -> Any:
        output = func(*args, **kwargs)
        if func in _MAKE_LEAF and args[0].requires_grad:
            self._anchors.append(args[0])  # what follows is no constant, but leads to no anchor either
        outputs = [output] if isinstance(output, Tensor) else list(_tensors((output,)))
        self._provenance.mark(func, args, inputs, outputs)
        return output

    def _derive(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation on sources and constants alone: what it gives are sources again."""
        output = func(*_replaced(args, self._graph_of), **_replaced(kwargs, self._graph_of))
        if isinstance(output, Tensor):
            return self._source(func, args, output)
        if isinstance(output, list | tuple) and any(isinstance(value, Tensor) for value in output):
            found = [self._source(func, args, value) if isinstance(value, Tensor) else value for value in output]
            return type(output)(found) if type(output) in (list, tuple) else type(output)(*found)  # a named tuple
        return output

    def _graph_of(self, value: Tensor) -> Tensor:
        source = self._sources.get(id(value))
        if source is None:
            return value
        if source.graph is None:
            assert source.view is not None
            source.graph = self._leaves[source.view.name] = source.value.detach().requires_grad_()
        return source.graph

    def _source(self, func: Any, args: Any, graph: Tensor) -> Tensor:
        """Track `graph`; a copy of one row for every sample is an activation."""
        if not graph.requires_grad:  # detached, compared, counted
            self._provenance.mark(func, (), [], [graph])
            return graph
        single = self._single_row(func, args, graph)
        names = leaf_names(graph if single is None else single, self._leaves)
        if single is not None:
            base = self._new_source(single, names)
            rows = base.value.unsqueeze(0).expand(graph.shape)
            layout = layout_of(rows, self._num_samples, None, positions_first=False)
            if layout is not None and self._admits(base, names):
                return self._tap(rows, {name: [] for name in names}, [(base, Elementwise("spread", layout, base.value.shape))])
        source = self._new_source(graph, names)
        self._sources[id(source.value)] = source
        return source.value

    def _new_source(self, graph: Tensor, names: list[str]) -> Source:
        value = graph.detach()
        view = view_of(names[0], value, self._parameters[names[0]]) if len(names) == 1 else None
        source = Source(value, view, graph)
        self._names[id(source)] = names
        return source

    def _single_row(self, func: Any, args: Any, graph: Tensor) -> Tensor | None:
        """The row that `expand` or `repeat` copied once a sample (class tokens, queries, sinks)."""
        N = self._num_samples
        if N == 1 or graph.ndim == 0 or graph.shape[0] % N or graph.shape[0] == 0:
            return None
        repeated = func is Tensor.repeat and isinstance(args[0], Tensor) and _first(args[1:]) == graph.shape[0]
        return graph[0] if repeated or graph.stride(0) == 0 else None

    def _meet(self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], tracked: Mapping[int, Tensor]) -> Any:
        """Run an operation of sources with activations."""
        output = func(*args, **kwargs)
        operation = kind_without_rule(func, args, kwargs)
        if not isinstance(output, Tensor) or id(output) in tracked:
            if next(_tensors((output,)), None) is not None:
                self._unrule(tracked, operation)
            return output
        activations = [value for value in inputs if id(value) not in tracked]
        self._provenance.mark(func, args, activations, [output])
        if not torch.is_grad_enabled():
            return output
        taps = self._taps_of(func, args, kwargs, output, tracked)
        missing = {key: value for key, value in tracked.items() if key not in taps}
        if missing and is_in_place(func):  # has changed its operand and cannot be run again
            self._unrule(missing, operation)
        elif missing:
            output = self._with_copies(func, args, kwargs, output, missing)
            self._provenance.mark(func, args, activations, [output])
        return self._tap_sources(output, taps)

    def _with_copies(self, func: Any, args: Any, kwargs: Any, output: Tensor, missing: Mapping[int, Tensor]) -> Tensor:
        """The operation again with one copy a sample of the sources it has no rule for; as it was where that cannot be."""
        copies = {key: self._spread(func, args, value, output) for key, value in missing.items()}
        self._unrule({key: missing[key] for key, copy in copies.items() if copy is None}, kind_without_rule(func, args, kwargs))
        if all(copy is None for copy in copies.values()):
            return output

        def swap(value: Tensor) -> Tensor:
            copy = copies.get(id(value))
            return value if copy is None else copy

        if func is torch.einsum:
            args = with_sample_letter(
                args, {key for key, one in copies.items() if one is not None and one.ndim > missing[key].ndim}
            )
        again: Tensor = func(*_replaced(args, swap), **_replaced(kwargs, swap))
        return again

    def _taps_of(self, func: Any, args: Any, kwargs: Any, output: Tensor, tracked: Mapping[int, Tensor]) -> dict[int, Tap]:
        rule = RULES.get(func)
        if rule is None:
            return {}
        first = any(name in self._positions_first for key in tracked for name in self._named(self._sources[key]))

        def layout(tensor: Tensor) -> Layout | None:
            rows = self._provenance.rows(tensor)
            return layout_of(tensor, self._num_samples, rows, positions_first=first)

        try:
            taps = rule(layout, output, *args, **kwargs)
        except TypeError:  # an overload with other arguments (`out=`, a dtype): not what the rule describes
            return {}
        found = {id(tensor): tap for tensor, tap in taps if id(tensor) in tracked}
        self._note_layer([id(tensor) for tensor, _ in taps], found)
        return found

    def _note_layer(self, order: list[int], found: Mapping[int, Tap]) -> None:
        """Weight and bias of one operation, the first and second parameter a rule names."""
        views = [self._sources[key].view if key in found else None for key in order]
        if views and views[0] is not None and views[0].whole:
            bias = views[1] if len(views) > 1 else None
            self.biases.setdefault(views[0].name, set()).add(bias.name if bias is not None and bias.whole else None)

    def _tap_sources(self, output: Tensor, taps: Mapping[int, Tap]) -> Tensor:
        chosen: list[tuple[Source, Tap]] = []
        seen: dict[str, list[str]] = {}
        for key, tap in taps.items():
            source = self._sources[key]
            names = self._named(source)
            if source.view is None and not self._admits(source, names):
                continue
            kind = _kind(tap, source)
            for name in names:
                seen.setdefault(name, []).append(kind)
                self.positions.setdefault(name, []).append(max(output.shape[0] // self._num_samples, 1) if output.ndim else 1)
            chosen.append((source, tap))
        return self._tap(output, seen, chosen)

    def _tap(self, output: Tensor, kinds: Mapping[str, list[str]], chosen: list[tuple[Source, Tap]]) -> Tensor:
        for name, found in kinds.items():
            self.kinds.setdefault(name, []).extend(found or ["one copy a sample"])
        wanted = [(source, tap) for source, tap in chosen if any(name not in self.unruled for name in self._named(source))]
        if not wanted:
            return output
        if not output.requires_grad:
            anchor = torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
            self._anchors.append(anchor)
            output = output + anchor
        if not output.requires_grad:  # inside a transform of its own (vmap)
            for name in kinds:
                self.unruled.setdefault(name, "no gradient to tap")
            return output
        for source, _ in wanted:
            if source.view is not None:
                self._taps[source.view.name] += 1
            else:
                self._pulled.update(self._named(source))
        # On the tensor and now: a later in-place activation must not change what the gradient refers to. Such a one replaces
        # the history of a view (what `F.linear` gives for three axes), not that of its base.
        base: Any = output._base if output._is_view() else output
        if base.numel() != output.numel() or not (base.is_contiguous() and output.is_contiguous()):
            base = output = output.clone()
        shape = output.shape
        base.register_hook(lambda gradient: self._arrive(wanted, gradient.reshape(shape)))
        return output

    def _arrive(self, wanted: list[tuple[Source, Tap]], gradient: Tensor) -> None:
        with torch.no_grad():
            for source, tap in wanted:
                if source.view is None:
                    self._pullback.add(source, tap.completed(gradient))
                    continue
                name = source.view.name
                self._uses.setdefault(name, []).append(_placed(source, tap, gradient))
                self._open[name] -= 1
                if self._open[name] == 0 and name not in self._pulled:
                    self._finish(name)

    def _finish(self, name: str) -> None:
        self._open[name] = 0
        uses = self._uses.pop(name, [])
        if name not in self.unruled:
            self.completed(name, uses)

    def _spread(self, func: Any, args: Any, value: Tensor, output: Tensor) -> Tensor | None:
        """One copy of a source for every entry of the output's axis 0, as an activation; None where that cannot be."""
        source = self._sources[id(value)]
        names = self._named(source)
        layout = layout_of(output, self._num_samples, self._provenance.rows(output), positions_first=False)
        found = spread(func, args, value, output, layout, self._num_samples)
        if found is None:
            return None
        copies, tap = found
        if copies.numel() * copies.element_size() > _SPREAD_BYTES or not self._admits(source, names):
            return None
        kind = f"{kind_without_rule(func, (), {})} by copies"
        return self._tap(copies, {name: [kind] for name in names}, [(source, tap)])

    def _admits(self, source: Source, names: list[str]) -> bool:
        """Whether the per-sample gradients of a computed source fit; its parameters have no rule otherwise."""
        if source.view is not None or self._pullback.admits(source, names, self._leaves, self._num_samples):
            return True
        for name in names:
            self.kinds.setdefault(name, []).append("large function of the parameter")
            self.unruled.setdefault(name, "per-sample gradients of a large function of it")
        return False

    def _named(self, source: Source) -> list[str]:
        return [source.view.name] if source.view is not None else self._names[id(source)]

    def _unrule(self, tracked: Mapping[int, Tensor], operation: str) -> None:
        for key in tracked:
            for name in self._named(self._sources[key]):
                self.kinds.setdefault(name, []).append(operation)
                self.unruled.setdefault(name, f"no rule for `{operation}`")

    def _with_sample_axis(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Position indices of shape (1, T) expanded over the batch, over which their output would be broadcast anyway."""
        indices = args[0] if args else kwargs["input"]
        if self._num_samples == 1 or indices.ndim < 2:
            return args, kwargs
        copied = indices.shape[0] == self._num_samples and indices.stride(0) == 0
        if indices.shape[0] == 1 or copied:
            indices = indices[:1].expand(self._num_samples, *indices.shape[1:])
            return ((indices, *args[1:]), kwargs) if args else (args, {**kwargs, "input": indices})
        return args, kwargs


def _nobody(name: str, uses: list[Placed]) -> None:
    """Before a backward pass there is nothing to complete."""


def _placed(source: Source, tap: Tap, gradient: Tensor) -> Placed:
    assert source.view is not None
    view, turned = placed(source.view, tap, source.value)
    return Placed(view, turned.completed(gradient))


def _kind(tap: Tap, source: Source) -> str:
    if source.view is None:
        return f"{tap.kind} of a function of it"
    return tap.kind if source.view.whole else f"{tap.kind} of a part of it"


def _opened(func: Any) -> Callable[..., Any]:
    """`func` from torch's Python source without its own dispatch, so that the operations inside are seen."""
    scope = {**func.__globals__, "has_torch_function": lambda _: False}
    opened = FunctionType(func.__code__, scope, func.__name__, func.__defaults__, func.__closure__)
    opened.__kwdefaults__ = func.__kwdefaults__
    return opened


_OPENED: Final = {F.multi_head_attention_forward: _opened(F.multi_head_attention_forward)}


def _plain_index(index: Any) -> Any:
    """Integer tensors without axes as integers, so that what they pick is a view (an expert's weight)."""
    if isinstance(index, tuple):
        return tuple(_plain_index(part) for part in index)
    plain = isinstance(index, Tensor) and index.ndim == 0 and not index.is_floating_point() and index.dtype != torch.bool
    return int(index) if plain else index


def _first(args: Any) -> Any:
    return args[0][0] if isinstance(args[0], list | tuple | torch.Size) else args[0]


def _replaced(values: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(values, Tensor):
        return function(values)
    if isinstance(values, Mapping):
        return {key: _replaced(value, function) for key, value in values.items()}
    if isinstance(values, list | tuple) and not isinstance(values, torch.Size):
        return type(values)(_replaced(value, function) for value in values)
    return values


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
