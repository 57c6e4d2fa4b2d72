"""Capture: every use of the parameters in one forward pass, completed by backward passes."""

from collections.abc import Iterable, Mapping, Sequence, Set
from functools import partial
from typing import Any, Final, final

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from curvature_callbacks.gram.capture.arguments import OPENED, first_size, plain_index, replaced, tensors_in
from curvature_callbacks.gram.capture.copies import spread, with_sample_letter
from curvature_callbacks.gram.capture.derived import Derived, DerivedTensors
from curvature_callbacks.gram.capture.hooks import Completed, Taps
from curvature_callbacks.gram.capture.rules import RULES, is_in_place, is_indexing, operation_without_rule
from curvature_callbacks.gram.uses.elementwise import Elementwise
from curvature_callbacks.gram.uses.operation import Operation
from curvature_callbacks.gram.uses.sample_axis import Layout, Provenance, layout_of
from curvature_callbacks.gram.uses.uses import Tap
from curvature_callbacks.model.loss.cross_entropy_kernel import fused_cross_entropy

_MAKE_LEAF: Final = (Tensor.requires_grad_, Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
ROUTED: Final = -1
POSITIONS_FIRST: Final = -2
_COPIED: Final = Operation("copy for each sample")
_SPREAD_BYTES: Final = 64 << 20  # most a parameter copied for every sample may take


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
        sharded: names of parameters that are put together on the way, see `adopt`.

    Attributes:
        positions: name to the positions per sample on axis 0 of each output with a rule (1: axis 0 is the sample), or how else
            the samples were found (`ROUTED`, `POSITIONS_FIRST`).
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
        sharded: Set[str] = frozenset(),
    ) -> None:
        super().__init__()
        self._num_samples = num_samples
        self._positions_first = positions_first
        self._sharded = sharded
        self._provenance = Provenance(constants, num_samples)
        self._sources = DerivedTensors(parameters)
        self._taps = Taps(self._sources, num_samples, unruled)
        self.positions: dict[str, list[int]] = {}
        self.biases: dict[str, set[str | None]] = {}

    def adopt(self, name: str, whole: Tensor) -> None:
        """The parameter `name`, sharded over processes, is `whole` while its module runs."""
        if name in self._sharded:
            self._sources.adopt(name, whole)
        else:
            self._provenance.add(whole)

    def forget(self, whole: Tensor) -> None:
        """Its module has run."""
        self._sources.forget(whole)

    @property
    def operations(self) -> Mapping[str, list[Operation]]:
        """Name to the operations seen, with or without a rule."""
        return self._taps.operations

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, record what it did with tracked parameters."""
        kwargs = kwargs or {}
        inputs = tensors_in((*args, *kwargs.values()))
        if not self._sources.any_of(inputs):
            return self._of_activations(func, args, kwargs, inputs)
        if func in OPENED:
            with self:
                return OPENED[func](*args, **kwargs)
        func, args, kwargs = self._prepared(func, args, kwargs)
        inputs = tensors_in((*args, *kwargs.values()))
        if all(value in self._sources or self._provenance.is_constant(value) for value in inputs):
            return self._derive(func, args, kwargs)
        return self._meet(func, args, kwargs, inputs)

    def backward(self, total: Tensor, completed: Completed, *, again: bool = False) -> None:
        """Send the gradient of `total` through the graph; `completed` is called on the way, and for what was not reached.

        Args:
            total: 0-d, a sum over samples.
            completed: gets a parameter and its uses once all of them have their gradient.
            again: whether another backward pass will follow.

        Cost: one backward pass for activation gradients only.
        """
        self._taps.completed = completed
        self._taps.backward(total, again=again)

    def _of_activations(self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor]) -> Any:
        output = (fused_cross_entropy if func is F.cross_entropy else func)(*args, **kwargs)
        if func in _MAKE_LEAF and args[0].requires_grad:
            self._taps.anchor(args[0])
        outputs = [output] if isinstance(output, Tensor) else tensors_in((output,))
        if outputs or func is Tensor.__setitem__:
            self._provenance.mark(func, args, inputs, outputs)
        return output

    def _prepared(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
        """The operation in the form in which it keeps parameters and samples apart."""
        if func is F.embedding:
            return func, *self._with_sample_axis(args, kwargs)
        if func is Tensor.expand_as and args[0] in self._sources:
            return Tensor.expand, (args[0], args[1].shape), {}
        if is_indexing(func) and args[0] in self._sources:
            return func, (args[0], plain_index(args[1])), {}
        return func, args, kwargs

    def _derive(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation on sources and constants alone: what it gives are sources again."""
        output = func(*replaced(args, self._sources.graph), **replaced(kwargs, self._sources.graph))
        if isinstance(output, Tensor):
            return self._source(func, args, output)
        if isinstance(output, list | tuple) and any(isinstance(value, Tensor) for value in output):
            found = [self._source(func, args, value) if isinstance(value, Tensor) else value for value in output]
            return type(output)(found) if type(output) in (list, tuple) else type(output)(*found)  # a named tuple
        return output

    def _source(self, func: Any, args: Any, graph: Tensor) -> Tensor:
        """Track `graph`; a copy of one row for every sample is an activation."""
        if not graph.requires_grad:  # detached, compared, counted
            self._provenance.mark(func, (), [], [graph])
            return graph
        single = self._single_row(func, args, graph)
        if single is not None:
            base = self._sources.computed(single)
            rows = base.value.unsqueeze(0).expand(graph.shape)
            layout = layout_of(rows, self._num_samples, None, positions_first=False)
            if layout is not None and self._taps.admits(base):
                return self._taps.tap(rows, [(base, Elementwise(_COPIED, layout, base.value.shape))])
        return self._sources.add(self._sources.computed(graph))

    def _single_row(self, func: Any, args: Any, graph: Tensor) -> Tensor | None:
        """The row that `expand` or `repeat` copied once a sample (class tokens, queries, sinks)."""
        N = self._num_samples
        if N == 1 or graph.ndim == 0 or graph.shape[0] % N or graph.shape[0] == 0:
            return None
        repeated = func is Tensor.repeat and isinstance(args[0], Tensor) and first_size(args[1:]) == graph.shape[0]
        return graph[0] if repeated or graph.stride(0) == 0 else None

    def _meet(self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor]) -> Any:
        """Run an operation of sources with activations."""
        output = func(*args, **kwargs)
        tracked = {id(value): value for value in inputs if value in self._sources}
        if not isinstance(output, Tensor) or id(output) in tracked:
            if tensors_in((output,)):
                self._refuse(func, tracked.values())
            return output
        activations = [value for value in inputs if id(value) not in tracked]
        self._provenance.mark(func, args, activations, [output])
        if not torch.is_grad_enabled():
            return output
        taps = self._taps_of(func, args, kwargs, output, tracked)
        missing = {key: value for key, value in tracked.items() if key not in taps}
        if missing and is_in_place(func):  # has changed its operand and cannot be run again
            self._refuse(func, missing.values())
        elif missing:
            output = self._with_copies(func, args, kwargs, output, missing)
            self._provenance.mark(func, args, activations, [output])
        self._note_layout(output, [self._sources[tracked[key]] for key in taps])
        tapped = self._taps.tap(output, [(self._sources[tracked[key]], tap) for key, tap in taps.items()])
        if tapped is not output:
            self._provenance.mark(func, args, activations, [tapped])
        return tapped

    def _with_copies(self, func: Any, args: Any, kwargs: Any, output: Tensor, missing: Mapping[int, Tensor]) -> Tensor:
        """The operation again with one copy a sample of the sources it has no rule for; as it was where that cannot be."""
        copies = {key: copy for key, value in missing.items() if (copy := self._spread(func, args, value, output)) is not None}
        self._refuse(func, [value for key, value in missing.items() if key not in copies])
        if not copies:
            return output
        if func is torch.einsum:
            args = with_sample_letter(args, {key for key, copy in copies.items() if copy.ndim > missing[key].ndim})

        def swap(value: Tensor) -> Tensor:
            return copies.get(id(value), value)

        again: Tensor = func(*replaced(args, swap), **replaced(kwargs, swap))
        return again

    def _spread(self, func: Any, args: Any, value: Tensor, output: Tensor) -> Tensor | None:
        """One copy of a source for every entry of the output's axis 0, as an activation; None where that cannot be."""
        layout = layout_of(output, self._num_samples, self._provenance.rows(output), positions_first=False)
        found = spread(func, args, value, output, layout, self._num_samples)
        if found is None:
            return None
        copies, tap = found
        if copies.numel() * copies.element_size() > _SPREAD_BYTES or not self._taps.admits(self._sources[value]):
            return None
        return self._taps.tap(copies, [(self._sources[value], tap)])

    def _taps_of(self, func: Any, args: Any, kwargs: Any, output: Tensor, tracked: Mapping[int, Tensor]) -> dict[int, Tap]:
        rule = RULES.get(func)
        if rule is None:
            return {}
        sources = [self._sources[value] for value in tracked.values()]
        try:
            taps = rule(partial(self._layout, sources=sources), output, *args, **kwargs)
        except TypeError:  # an overload with other arguments (`out=`, a dtype): not what the rule describes
            return {}
        self._note_layer([tensor for tensor, _ in taps])
        return {id(tensor): tap for tensor, tap in taps if id(tensor) in tracked}

    def _layout(self, tensor: Tensor, *, sources: Iterable[Derived]) -> Layout | None:
        first = any(name in self._positions_first for source in sources for name in self._sources.names(source))
        return layout_of(tensor, self._num_samples, self._provenance.rows(tensor), positions_first=first)

    def _note_layout(self, output: Tensor, sources: Sequence[Derived]) -> None:
        """Where the samples were read; a microbatch of one row tells nothing."""
        layout = self._layout(output, sources=sources)
        if self._num_samples == 1 or layout is None:
            return
        count = output.shape[0] // self._num_samples
        code = ROUTED if layout.rows is not None else POSITIONS_FIRST if layout.positions_first else count
        for name in [name for source in sources for name in self._sources.names(source)]:
            self.positions.setdefault(name, []).append(code)

    def _note_layer(self, order: Sequence[Tensor]) -> None:
        """Weight and bias of one operation, the first and second tensor a rule names."""
        views = [self._sources[tensor].view if tensor in self._sources else None for tensor in order]
        if views and views[0] is not None and views[0].whole:
            bias = views[1] if len(views) > 1 else None
            self.biases.setdefault(views[0].name, set()).add(bias.name if bias is not None and bias.whole else None)

    def _refuse(self, func: Any, values: Iterable[Tensor]) -> None:
        operation = operation_without_rule(func)
        self._taps.refuse([self._sources[value] for value in values], f"no rule for `{operation.name}`", operation)

    def _with_sample_axis(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Position indices of shape (1, T) expanded over the batch, over which their output would be broadcast anyway."""
        indices = args[0] if args else kwargs["input"]
        if indices.ndim < 2:
            return args, kwargs
        copied = indices.shape[0] == self._num_samples and indices.stride(0) == 0
        if indices.shape[0] == 1 or copied:
            indices = indices[:1].expand(self._num_samples, *indices.shape[1:])
            return ((indices, *args[1:]), kwargs) if args else (args, {**kwargs, "input": indices})
        return args, kwargs
