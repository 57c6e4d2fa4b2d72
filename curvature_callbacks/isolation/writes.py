"""Writes: what a loss changes in place, kept before it happens and put back."""

from collections.abc import Iterator
from typing import Any, Final, final

import torch
from torch import Tensor, UntypedStorage, nn
from torch.utils._python_dispatch import TorchDispatchMode

_PLAIN: Final = (Tensor, nn.Parameter, nn.Buffer)


@final
class WriteWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, whatever was there before and is written in place, through any view and `.data`, is copied first.

    Cost: some microseconds an operation, and a copy of each storage that is written.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: set[int] = set()  # storages that began inside
        self._kept: dict[int, tuple[UntypedStorage, UntypedStorage]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Keep what the operation is about to write, then run it."""
        kwargs = kwargs or {}
        if function._schema.is_mutable:
            for tensor in _written(function, args, kwargs):
                self._keep(tensor)
        result = function(*args, **kwargs)
        given = {_address(tensor) for tensor in _tensors((args, kwargs))}
        self._made |= {_address(tensor) for tensor in _tensors(result)} - given
        return result

    def changed(self, tensor: Tensor) -> bool:
        """Whether what `tensor` was before has been written, and to another content."""
        now_and_before = self._kept.get(_address(tensor))
        return now_and_before is not None and not _equal(*now_and_before)

    def put_back(self) -> None:
        """Everything written so far as it was, and again after later writes to the same."""
        for storage, before in self._kept.values():
            if storage.nbytes() != before.nbytes() and storage.resizable():
                storage.resize_(before.nbytes())
            if storage.nbytes() == before.nbytes() and not _equal(storage, before):
                storage.copy_(before)

    def _keep(self, tensor: Tensor) -> None:
        address = _address(tensor)
        if address and address not in self._made and address not in self._kept:
            storage = tensor.untyped_storage()
            self._kept[address] = storage, storage.clone()  # type: ignore[no-untyped-call]


def _written(function: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    for place, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _tensors(args[place] if place < len(args) else kwargs.get(argument.name))


def _tensors(value: Any) -> Iterator[Tensor]:
    if type(value) in _PLAIN:
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _address(tensor: Tensor) -> int:
    """Of its storage object, which keeps it when resized; 0 where there is none (sparse, meta)."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided and tensor.device.type != "meta" else 0


def _equal(one: UntypedStorage, other: UntypedStorage) -> bool:
    return torch.equal(*(torch.empty(0, dtype=torch.uint8, device=each.device).set_(each) for each in (one, other)))
