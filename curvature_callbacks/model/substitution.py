"""Other tensors in place of a model's parameters and buffers, for as long as a loss is computed."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, final

from torch import Tensor, nn

from curvature_callbacks.library_internals.modules import buffers_of, parameters_of
from curvature_callbacks.model.loss.resolve import LossFunction

R = TypeVar("R")


@final
class LossModule(nn.Module):
    """Model and loss as one module, so that parameters are substituted in both.

    Args:
        model: known by the name `model`.
        loss: of a microbatch, called with `model`.
    """

    def __init__(self, model: nn.Module, loss: LossFunction) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Any, function: Callable[[nn.Module, Any], R]) -> R:
        """What `function` returns for the model and `batch`: its losses, or what tells how these come about."""
        return function(self.model, batch)


@contextmanager
def substituted(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, these tensors stand wherever `model` knows the parameters and buffers of the same names; then it is as found.

    Every entry of a module is set once and put back once. `torch.func.functional_call` goes by all names of a tensor: of a
    module that is registered under two it saves at the second name what it wrote at the first, and leaves that in the model.

    Args:
        model: in which a module or a tensor may have several names.
        tensors: by names as in `named_parameters()` and `named_buffers()`, of tied tensors the first one.
    """
    of_model = dict(model.named_buffers()) | dict(model.named_parameters())
    stand_ins = {id(of_model[name]): tensor for name, tensor in tensors.items()}
    registries = [registry for module in model.modules() for registry in (parameters_of(module), buffers_of(module))]
    entries = [
        (registry, attribute, tensor)
        for registry in registries
        for attribute, tensor in registry.items()
        if tensor is not None and id(tensor) in stand_ins
    ]
    try:
        for registry, attribute, tensor in entries:
            registry[attribute] = stand_ins[id(tensor)]  # type: ignore[assignment]
        yield
    finally:
        for registry, attribute, tensor in entries:
            registry[attribute] = tensor  # type: ignore[assignment]
