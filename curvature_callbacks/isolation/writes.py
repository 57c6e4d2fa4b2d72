"""Writes: what a loss changes in place, kept before it happens and put back."""

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self, final

import torch
from torch import Tensor, UntypedStorage, nn

from curvature_callbacks.library_internals.tensors import dispatch_mode, storage_address, written_arguments

_TENSOR_CLASSES: Final = (Tensor, nn.Parameter, nn.Buffer)


@final
class WriteWatch:
    """Inside, whatever was there before and is written in place, through any view and `.data`, is copied first.

    Cost: some microseconds an operation, and a copy of each storage that is written.
    """

    def __init__(self) -> None:
        self._made: set[int] = set()  # addresses of storages that began inside
        self._kept: dict[int, tuple[UntypedStorage, UntypedStorage]] = {}  # address to a storage, and a copy of it
        self._mode = dispatch_mode(self._watched)

    def __enter__(self) -> Self:
        self._mode.__enter__()
        return self

    def __exit__(self, cls: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._mode.__exit__(cls, error, traceback)

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

    def _watched(self, operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        for tensor in _tensors(list(written_arguments(operation, args, kwargs))):
            self._keep(tensor)
        result = operation(*args, **kwargs)
        given = {_address(tensor) for tensor in _tensors((args, kwargs))}
        self._made |= {_address(tensor) for tensor in _tensors(result)} - given
        return result

    def _keep(self, tensor: Tensor) -> None:
        address = _address(tensor)
        if address and address not in self._made and address not in self._kept:
            storage = tensor.untyped_storage()
            self._kept[address] = storage, storage.clone()  # type: ignore[no-untyped-call]


def _tensors(value: Any) -> Iterator[Tensor]:
    if type(value) in _TENSOR_CLASSES:
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _address(tensor: Tensor) -> int:
    """Of its storage; 0 where there is none (sparse, meta)."""
    has_storage = tensor.layout is torch.strided and tensor.device.type != "meta"
    return storage_address(tensor.untyped_storage()) if has_storage else 0


def _equal(first: UntypedStorage, second: UntypedStorage) -> bool:
    return torch.equal(*(torch.empty(0, dtype=torch.uint8, device=each.device).set_(each) for each in (first, second)))
