"""Capture: every use of the parameters in one forward pass, completed by backward passes."""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from typing import Any, Final, final

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from curvature_callbacks.gram.capture.arguments import first_size, opened_attention, plain_index, replaced, tensors_in
from curvature_callbacks.gram.capture.call import Call
from curvature_callbacks.gram.capture.copies import Copies, copies_for, run_with
from curvature_callbacks.gram.capture.derived import Derived, DerivedTensors
from curvature_callbacks.gram.capture.hooks import Completed, Tapped, Taps
from curvature_callbacks.gram.capture.rules import is_in_place, is_indexing, operation_without_rule, rule_for
from curvature_callbacks.gram.uses.elementwise import Elementwise
from curvature_callbacks.gram.uses.operation import Operation
from curvature_callbacks.gram.uses.sample_axis import Layout, Provenance, layout_of
from curvature_callbacks.model.loss.cross_entropy_kernel import fused_cross_entropy

_MAKE_LEAF: Final = (Tensor.requires_grad_, Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
_COPIED: Final = Operation("copy for each sample")
ROUTED: Final = -1
POSITIONS_FIRST: Final = -2


@final
class Capture(TorchFunctionMode):
    """Intercepts the operations that take a parameter and taps the gradient of their output.

    Keyed by the tensor, not the module, so that functional calls, tied weights, shared modules and raw parameters are all
    seen. The parameters themselves must not require gradients: no weight-gradient product is computed. Outputs that would
    otherwise be constants are tied to an anchor, so that the backward pass reaches them.

    An operation on parameters, buffers and literals alone gives another tensor that depends on parameters alone (`derived`): a
    view of a parameter stays a part of it, anything else is differentiated on its own and its per-sample gradients are carried
    back. Where a derived tensor meets activations, the operation's rule says what its gradients are; without a rule an
    operation that broadcasts gets one copy of the tensor a sample.

    Args:
        parameters: name to the very tensor the forward pass will use.
        num_samples: N of the microbatch.
        unruled: name to why the parameter has no valid rule, as known before; it is not tapped.
        positions_first: parameters whose activations are to be read sequence-first where both ways are possible.
        constants: buffers and frozen parameters of the model.
        sharded: names of parameters that are put together on the way, see `adopt`.

    Attributes:
        positions: name to the positions per sample on axis 0 of each output with a rule (1: axis 0 is the sample), or how else
            the samples were found (`ROUTED`, `POSITIONS_FIRST`).
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        num_samples: int,
        *,
        unruled: Mapping[str, str],
        positions_first: Set[str] = frozenset(),
        constants: Iterable[Tensor] = (),
        sharded: Set[str] = frozenset(),
    ) -> None:
        super().__init__()
        self._num_samples = num_samples
        self._positions_first = positions_first
        self._sharded = sharded
        self._provenance = Provenance(constants, num_samples)
        self._derived = DerivedTensors(parameters)
        self._taps = Taps(self._derived, num_samples, unruled)
        self.positions: dict[str, list[int]] = {}

    def adopt(self, name: str, parameter: Tensor) -> None:
        """Take `parameter`, gathered from its shards while its module runs, for the one called `name`."""
        if name in self._sharded:
            self._derived.adopt(name, parameter)
        else:
            self._provenance.add(parameter)

    def forget(self, parameter: Tensor) -> None:
        """Drop a gathered parameter, whose module has run."""
        self._derived.forget(parameter)

    @property
    def operations(self) -> Mapping[str, list[Operation]]:
        """Name to the operations seen, with or without a rule."""
        return self._taps.operations

    @property
    def unruled(self) -> Mapping[str, str]:
        """Name to why the parameter has no valid rule: those known before, then those met by this capture."""
        return self._taps.unruled

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, record what it did with tracked parameters."""
        kwargs = kwargs or {}
        inputs = tensors_in((*args, *kwargs.values()))
        if not self._derived.any_of(inputs):
            return self._of_activations(func, args, kwargs, inputs)
        if func is F.multi_head_attention_forward and (opened := opened_attention()) is not None:
            with self:
                return opened(*args, **kwargs)
        func, args, kwargs = self._prepared(func, args, kwargs)
        inputs = tensors_in((*args, *kwargs.values()))
        if all(value in self._derived or self._provenance.is_constant(value) for value in inputs):
            return self._derive(func, args, kwargs)
        return self._meet(self._call(func, args, kwargs, inputs))

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
        if func is Tensor.expand_as and args[0] in self._derived:
            return Tensor.expand, (args[0], args[1].shape), {}
        if is_indexing(func) and args[0] in self._derived:
            return func, (args[0], plain_index(args[1])), {}
        return func, args, kwargs

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

    def _derive(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation on derived tensors and constants alone: what it gives is derived as well."""
        output = func(*replaced(args, self._derived.graph), **replaced(kwargs, self._derived.graph))
        if isinstance(output, Tensor):
            return self._tracked(func, args, output)
        if isinstance(output, list | tuple) and any(isinstance(value, Tensor) for value in output):
            values = [self._tracked(func, args, value) if isinstance(value, Tensor) else value for value in output]
            return type(output)(values) if type(output) in (list, tuple) else type(output)(*values)  # a named tuple
        return output

    def _tracked(self, func: Any, args: Any, graph: Tensor) -> Tensor:
        """The value of `graph` as a derived tensor; copies of one slice for every sample are an activation."""
        if not graph.requires_grad:  # detached, compared, counted
            self._provenance.mark(func, (), [], [graph])
            return graph
        original = self._copied_slice(func, args, graph)
        if original is not None:
            derived = self._derived.computed(original)
            copies = derived.value.unsqueeze(0).expand(graph.shape)
            layout = layout_of(copies, self._num_samples, None, positions_first=False)
            if layout is not None and self._taps.admits(derived):
                return self._taps.tap(copies, [(derived, Elementwise(_COPIED, layout, derived.value.shape))])
        return self._derived.add(self._derived.computed(graph))

    def _copied_slice(self, func: Any, args: Any, graph: Tensor) -> Tensor | None:
        """The slice that `expand` or `repeat` copied once a sample (class tokens, queries, sinks)."""
        N = self._num_samples
        if N == 1 or graph.ndim == 0 or graph.shape[0] % N or graph.shape[0] == 0:
            return None
        repeated = func is Tensor.repeat and isinstance(args[0], Tensor) and first_size(args[1:]) == graph.shape[0]
        return graph[0] if repeated or graph.stride(0) == 0 else None

    def _call(self, func: Any, args: Any, kwargs: Any, inputs: Sequence[Tensor]) -> Call:
        """The operation, its tensors split into derived ones and activations."""
        derived = {id(value): self._derived[value] for value in inputs if value in self._derived}
        return Call(func, args, kwargs, list(derived.values()), [value for value in inputs if id(value) not in derived])

    def _meet(self, call: Call) -> Any:
        """Run an operation of derived tensors with activations, and tap its output.

        The operation's rule makes the taps of the operands it knows. The others enter as one copy a sample, where the operation
        can take copies: it runs a second time then, with the copies tapped in place of its output. What has neither a rule nor
        copies is refused, and its parameters' gradients are taken row by row.
        """
        output = call.run()
        if not isinstance(output, Tensor) or any(output is derived.value for derived in call.derived):
            if tensors_in((output,)):
                self._refuse(call, call.derived)
            return output
        self._mark(call, output)
        if not torch.is_grad_enabled():
            return output
        taps = self._taps_by_rule(call, output)
        without = [derived for derived in call.derived if all(derived is not tapped for tapped, _ in taps)]
        if without:
            output = self._without_rule(call, output, without)
        self._note_layout(output, [derived for derived, _ in taps])
        tapped = self._taps.tap(output, taps)
        if tapped is not output:
            self._mark(call, tapped)
        return tapped

    def _mark(self, call: Call, output: Tensor) -> None:
        """Note which activations `output` depends on; a copy of it must be noted again."""
        self._provenance.mark(call.function, call.args, call.activations, [output])

    def _taps_by_rule(self, call: Call, output: Tensor) -> list[Tapped]:
        """The derived operands that the operation's rule knows, each with its tap; none without a rule."""
        rule = rule_for(call.function, call.args, call.kwargs)
        if rule is None:
            return []
        taps = rule(partial(self._layout, operands=call.derived), output, *call.args, **call.kwargs)
        return [(self._derived[tensor], tap) for tensor, tap in taps if tensor in self._derived]

    def _without_rule(self, call: Call, output: Tensor, operands: Sequence[Derived]) -> Tensor:
        """The output from copies of the `operands`; as it was, and the operands refused, where there can be none."""
        if is_in_place(call.function):  # has changed its operand and cannot be run again
            self._refuse(call, operands)
            return output
        copies = [copy for derived in operands if (copy := self._tapped_copies(call, derived, output)) is not None]
        self._refuse(call, [derived for derived in operands if all(derived is not copy.original for copy in copies)])
        if copies:
            output = run_with(call, copies)
        self._mark(call, output)
        return output

    def _tapped_copies(self, call: Call, derived: Derived, output: Tensor) -> Copies | None:
        layout = layout_of(output, self._num_samples, self._provenance.samples(output), positions_first=False)
        copies = copies_for(call, derived, output, layout, self._num_samples)
        if copies is None or not self._taps.admits(derived):
            return None
        return replace(copies, tensor=self._taps.tap(copies.tensor, [(derived, copies.tap)]))

    def _layout(self, tensor: Tensor, *, operands: Iterable[Derived]) -> Layout | None:
        first = any(name in self._positions_first for derived in operands for name in self._derived.names(derived))
        return layout_of(tensor, self._num_samples, self._provenance.samples(tensor), positions_first=first)

    def _note_layout(self, output: Tensor, operands: Sequence[Derived]) -> None:
        """Where the samples were read; a microbatch of one sample tells nothing."""
        layout = self._layout(output, operands=operands)
        if self._num_samples == 1 or layout is None:
            return
        count = output.shape[0] // self._num_samples
        code = ROUTED if layout.samples is not None else POSITIONS_FIRST if layout.positions_first else count
        for name in [name for derived in operands for name in self._derived.names(derived)]:
            self.positions.setdefault(name, []).append(code)

    def _refuse(self, call: Call, operands: Sequence[Derived]) -> None:
        operation = operation_without_rule(call.function)
        self._taps.refuse(operands, f"no rule for `{operation.name}`", operation)
