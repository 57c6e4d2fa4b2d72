"""Capture: every use of the parameters in one forward pass, completed by one backward pass."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from curvature_callbacks.gram.rules import RULES, is_shifted_copy, kind_without_rule
from curvature_callbacks.gram.uses import Use

_MAKE_LEAF = (Tensor.requires_grad_, Tensor.requires_grad.__set__)  # type: ignore[attr-defined]
Completed = Callable[[str, list[Use]], None]


@final
class Capture(TorchFunctionMode):
    """Intercepts the operations that take a parameter and taps the gradient of their output.

    Keyed by the tensor, not the module, so that functional calls, tied weights, shared modules and raw parameters are all
    seen. The parameters themselves must not require gradients: no weight-gradient product is computed. Outputs that would
    otherwise be constants are tied to an anchor, so that the backward pass reaches them.

    Args:
        parameters: name to the very tensor the forward pass will use.
        num_samples: rows of the microbatch.
        completed: called in the backward pass with a parameter and its uses once all of them have their gradient.
        unruled: name to why the parameter has no valid rule; those known are not tapped, those met here are added.

    Attributes:
        kinds: name to the kinds of operation seen, with or without a rule.
        positions: name to the positions per sample on axis 0 of each output with a rule (1: axis 0 is the sample).
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], num_samples: int, completed: Completed, *, unruled: dict[str, str]
    ) -> None:
        super().__init__()
        self._names = {id(tensor): name for name, tensor in parameters.items()}
        self._num_samples = num_samples
        self._completed = completed
        self._uses: dict[str, list[Use]] = {}
        self._open: Counter[str] = Counter()
        self._anchors: list[Tensor] = []
        self._derived: list[Tensor] = []  # kept, so that no other tensor takes their identity
        self.kinds: dict[str, list[str]] = {}
        self.positions: dict[str, list[int]] = {}
        self.unruled = unruled

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, record what it did with tracked parameters."""
        kwargs = kwargs or {}
        tracked = {id(value): value for value in _tensors((*args, *kwargs.values())) if id(value) in self._names}
        if not tracked:
            output = func(*args, **kwargs)
            if func in _MAKE_LEAF and args[0].requires_grad:
                self._anchors.append(args[0])  # what follows is no constant, but leads to no anchor either
            return output
        if func is torch.nn.functional.embedding:
            args, kwargs = self._with_sample_axis(args, kwargs)
        output = func(*args, **kwargs)
        if not isinstance(output, Tensor) or id(output) in tracked:
            self._refuse_containers(output, kind_without_rule(func, args, kwargs), tracked)
            return output
        if is_shifted_copy(func, args) and id(args[0]) in tracked:
            self._names[id(output)] = self._names[id(args[0])]
            self._derived.append(output)
            return output
        return self._record(func, output, tracked, args, kwargs)

    def backward(self, total: Tensor) -> None:
        """Send the gradient of `total` through the graph; `completed` is called on the way, and for what was not reached.

        Cost: one backward pass for activation gradients only.
        """
        if self._anchors and total.requires_grad:
            torch.autograd.grad(total, self._anchors, allow_unused=True)
        for name in [name for name, count in self._open.items() if count > 0]:
            self._finish(name)

    def _record(
        self, func: Any, output: Tensor, tracked: Mapping[int, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        rule = RULES.get(func)
        try:
            uses = rule(self._num_samples, output, *args, **kwargs) if rule else []
        except TypeError:  # an overload with other arguments (`out=`, a dtype): not what the rule describes
            uses = []
        valid = {id(tensor): use for tensor, use in uses if id(tensor) in tracked} if torch.is_grad_enabled() else {}
        operation = kind_without_rule(func, args, kwargs)
        for key in tracked:
            name = self._names[key]
            use = valid.get(key)
            self.kinds.setdefault(name, []).append(use.kind if use else operation)
            if use is not None:
                self.positions.setdefault(name, []).append(output.shape[0] // self._num_samples)
            else:
                self.unruled.setdefault(name, f"no rule for `{operation}`")
        return self._tap(output, {self._names[key]: use for key, use in valid.items()})

    def _tap(self, output: Tensor, uses: Mapping[str, Use]) -> Tensor:
        uses = {name: use for name, use in uses.items() if name not in self.unruled}
        if not uses:
            return output
        if not output.requires_grad:
            anchor = torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
            self._anchors.append(anchor)
            output = output + anchor
        for name, use in uses.items():
            self._uses.setdefault(name, []).append(use)
            self._open[name] += 1
        # On the tensor and now: a later in-place activation must not change what the gradient refers to.
        tapped: Any = output
        tapped.register_hook(lambda gradient: self._arrive(uses, gradient))
        return output

    def _arrive(self, uses: Mapping[str, Use], gradient: Tensor) -> None:
        with torch.no_grad():
            for name, use in uses.items():
                use.complete(gradient)
                self._open[name] -= 1
                if self._open[name] == 0:
                    self._finish(name)

    def _finish(self, name: str) -> None:
        self._open[name] = 0
        uses = self._uses.pop(name, [])
        if name not in self.unruled:
            self._completed(name, [use for use in uses if use.gradient is not None])

    def _with_sample_axis(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Position indices of shape (1, T) expanded over the batch, over which their output would be broadcast anyway."""
        indices = args[0] if args else kwargs["input"]
        if self._num_samples > 1 and indices.ndim > 1 and indices.shape[0] == 1:
            indices = indices.expand(self._num_samples, *indices.shape[1:])
            return ((indices, *args[1:]), kwargs) if args else (args, {**kwargs, "input": indices})
        return args, kwargs

    def _refuse_containers(self, output: Any, operation: str, tracked: Mapping[int, Tensor]) -> None:
        if not isinstance(output, list | tuple) or next(_tensors(output), None) is None:
            return
        for key in tracked:
            name = self._names[key]
            self.kinds.setdefault(name, []).append(operation)
            self.unruled.setdefault(name, f"no rule for `{operation}`")


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
