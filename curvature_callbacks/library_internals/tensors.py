"""Private names about tensors: what they are views of, their storages, the operations on them and their graphs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from types import CodeType, FunctionType
from typing import Any, final

import torch
from torch import Tensor, UntypedStorage
from torch.autograd.graph import Node


def version_of(tensor: Tensor) -> int:
    """How often it has been written to in place, as autograd counts it."""
    return tensor._version


def base_of(tensor: Tensor) -> Tensor:
    """The tensor that it is a view of; itself where it is none."""
    base: Tensor | None = tensor._base if tensor._is_view() else tensor
    assert base is not None
    return base


def has_gradient_hooks(tensor: Tensor) -> bool:
    """Whether something runs when its gradient is computed (`register_hook`)."""
    return bool(tensor._backward_hooks)


def sparse_parts(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Indices and values of a sparse (COO) tensor, also of one that is not coalesced."""
    return tensor._indices(), tensor._values()


def storage_address(storage: UntypedStorage) -> int:
    """Address of the storage object: unchanged when the storage is resized, reused once it is freed."""
    address: int = storage._cdata
    return address


@final
class WeakStorage:
    """A reference to a storage that does not keep it alive."""

    def __init__(self, storage: UntypedStorage) -> None:
        from torch.multiprocessing.reductions import StorageWeakRef

        self._reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]

    def is_freed(self) -> bool:
        """Whether nobody holds the storage any more."""
        return bool(self._reference.expired())  # type: ignore[no-untyped-call]

    def refers_to(self, storage: UntypedStorage) -> bool:
        """Whether it is this storage, alive: addresses are used again."""
        return not self.is_freed() and self._reference.cdata == storage._cdata


def functorch_is_active() -> bool:
    """Whether the code runs inside `torch.func.vmap`, `grad` or `jvp`."""
    return torch._C._are_functorch_transforms_active()


def without_torch_function() -> AbstractContextManager[None]:
    """A context in which no `TorchFunctionMode` and no subclass of tensors sees the operations."""
    return torch._C.DisableTorchFunction()


def dispatch_mode(intercept: Callable[[Any, Sequence[Any], Mapping[str, Any]], Any]) -> AbstractContextManager[Any]:
    """A context in which every operation of PyTorch runs as `intercept(operation, args, kwargs)`."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return intercept(function, args, kwargs or {})

    return Mode()  # type: ignore[no-untyped-call]


def argument_of(operation: Any, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What an operation of PyTorch is called with for the argument of this name; None where it has none."""
    for place, argument in enumerate(operation._schema.arguments):
        if argument.name == name:
            return args[place] if place < len(args) else kwargs.get(name, argument.default_value)
    return None


def written_arguments(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """Of the arguments of an operation that a `dispatch_mode` sees, those that it writes to."""
    if not operation._schema.is_mutable:
        return
    for index, argument in enumerate(operation._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield args[index] if index < len(args) else kwargs.get(argument.name)


def saved_tensors(node: Node) -> Iterator[Tensor]:
    """What a node of a graph keeps for its derivative."""
    for name in _saved_names(type(node)):
        saved: Any = getattr(node, name)
        yield from (value for value in (saved if isinstance(saved, tuple) else (saved,)) if isinstance(value, Tensor))


@cache
def _saved_names(cls: type) -> tuple[str, ...]:
    return tuple(name for name in dir(cls) if name.startswith("_saved_") or name == "saved_tensors")


def layer_norm_statistics(output: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and reciprocal standard deviation that a layer norm keeps for its derivative; None where they cannot be read."""
    mean, scale = (getattr(output.grad_fn, f"_saved_result{number}", None) for number in (1, 2))
    return (mean, scale) if isinstance(mean, Tensor) and isinstance(scale, Tensor) else None


def custom_module(node: Node) -> str | None:
    """The Python module of the custom operation whose derivative `node` is, "" for one of C++; None for PyTorch's own."""
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        return str(getattr(getattr(type(node), "_forward_cls", None), "__module__", ""))
    return "" if node.name().startswith("torch::autograd::CppNode") else None


def unsafe_view(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """`tensor` in another shape, as a tensor that autograd does not know for a view: it may be changed in place."""
    result: Tensor = torch.ops.aten._unsafe_view(tensor, shape)
    return result


def layer_norm_backward(*args: Any) -> Any:
    """Gradients by input, weight and bias of a layer norm; arguments as of `aten::native_layer_norm_backward`."""
    return torch.ops.aten.native_layer_norm_backward(*args)


def convolution_backward(*args: Any) -> Any:
    """Gradients by input, weight and bias of a convolution; arguments as of `aten::convolution_backward`."""
    return torch.ops.aten.convolution_backward(*args)


def without_dispatch(function: Callable[..., Any]) -> Callable[..., Any] | None:
    """A function of torch's Python source that does not ask for a `TorchFunctionMode`, which then sees the operations inside.

    None where torch has it in another form: a mode would meet the function itself again and again.
    """
    code, scope = getattr(function, "__code__", None), getattr(function, "__globals__", {})
    if not isinstance(code, CodeType) or "has_torch_function" not in code.co_names or "has_torch_function" not in scope:
        return None
    opened = FunctionType(
        code,
        {**scope, "has_torch_function": lambda _: False},
        function.__name__,
        getattr(function, "__defaults__", None),
        getattr(function, "__closure__", None),
    )
    opened.__kwdefaults__ = getattr(function, "__kwdefaults__", None)
    return opened
