"""Calls: one intercepted operation with its operands told apart."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from curvature_callbacks.gram.capture.derived import Derived


@final
@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """An operation in which tensors that depend on parameters alone meet activations.

    Attributes:
        function: the operation.
        args: its positional arguments.
        kwargs: its keyword arguments.
        derived: the operands that depend on parameters alone, each once.
        activations: the other tensors among the operands.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    derived: Sequence[Derived]
    activations: Sequence[Tensor]

    def run(self) -> Any:
        """The operation's output. Cost: that of the operation."""
        return self.function(*self.args, **self.kwargs)
