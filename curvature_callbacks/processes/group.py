"""The only module that speaks torch.distributed: the processes of a run, and how they compute, agree and fail together."""

import pickle
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, final

import torch
import torch.distributed as dist
from torch import Tensor

from curvature_callbacks.errors import ProbeError
from curvature_callbacks.processes.agreement import common_failure, failure_text
from curvature_callbacks.processes.world import SINGLE, World

_AGREED: Final = "_curvature_agreed"  # marks a failure that all processes know already


@final
class ProcessGroup:
    """All processes of the default group.

    Every collective begins with an agreement: whether somebody failed since the last one, and whether all are about to do the
    same. A process that failed says so once, on its way out of `together`; the others hear it at their next collective, and
    all leave `together` with the same kind of exception. Nobody is left waiting, and nothing that differs is added up.

    Cost: a reduction of three integers, read by the host, beside every collective.
    """

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._devices = _devices()

    def total(self, partial: Tensor, *, label: str = "") -> Tensor:
        """One all-reduce."""
        with self._allocating():
            result = partial.detach().to(self._place(partial), copy=True).contiguous()
        self._agree("total", label, partial.shape, partial.dtype)
        dist.all_reduce(result)
        return result.to(partial.device)

    def seed(self, seed: int) -> int:
        """Another for every rank: parts of random vectors, augmentations and drawn labels must not repeat."""
        return (seed + 0x9E3779B97F4A7C15 * self.rank) % (1 << 63)

    def part(self, length: int) -> slice:
        """Equal parts but the last ones."""
        return self._parts(length)[self.rank]

    def assembled(self, part: Tensor, length: int) -> Tensor:
        """One all-gather."""
        return self.concatenated(part.T, length).T.contiguous()

    def concatenated(self, rows: Tensor, length: int, *, label: str = "") -> Tensor:
        """One all-gather."""
        longest = self._parts(length)[0].stop
        with self._allocating():
            own = rows.new_zeros(longest, *rows.shape[1:], device=self._place(rows))
            own[: len(rows)] = rows
            found = own.new_empty(self.size * longest, *rows.shape[1:])
        self._agree("concatenated", label, length, rows.shape[1:], rows.dtype)
        dist.all_gather_into_tensor(found, own)
        return found[:length].to(rows.device)  # all parts but the last ones are as long as the longest

    def reduced(self, partial: Tensor) -> Tensor:
        """One all-reduce; gloo knows no reduction that leaves each process its part."""
        return self.total(partial)[:, self.part(partial.shape[1])]

    def gathered(self, item: Any) -> list[Any]:
        """One gathering of pickled objects."""
        with self._allocating():  # what cannot be pickled fails before anybody waits for it
            sent = pickle.dumps(item)
        self._agree("gathered")
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, sent)
        return [pickle.loads(one) for one in found]

    def delivered(self, parcels: Sequence[Sequence[Tensor]], sizes: Sequence[Sequence[Any]]) -> list[list[Tensor]]:
        """Point to point, all at once."""
        with self.together():
            sent = [[tensor.detach().to(self._devices[0]).contiguous() for tensor in parcel] for parcel in parcels]
            found = [[torch.empty(shape, dtype=dtype, device=self._devices[0]) for shape, dtype in part] for part in sizes]
        operations = []
        for other in range(self.size):
            if other != self.rank:
                operations += [dist.P2POp(dist.isend, tensor, other) for tensor in sent[other] if tensor.numel()]
                operations += [dist.P2POp(dist.irecv, tensor, other) for tensor in found[other] if tensor.numel()]
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        found[self.rank] = list(parcels[self.rank])
        return found

    def broadcast(self, tensors: Sequence[Tensor], *, source: int) -> list[Tensor]:
        """One broadcast a tensor, of its bits: backends do not know every dtype."""
        own = self.rank == source
        with self._allocating():
            places = [self._place(tensor) for tensor in tensors]
            there = [
                tensor.detach().to(place).contiguous() if own else torch.empty(tensor.shape, dtype=tensor.dtype, device=place)
                for tensor, place in zip(tensors, places, strict=True)
            ]
            bits = [sent.view(-1).view(torch.uint8) for sent in there]
        self._agree("broadcast", source, [(tensor.shape, tensor.dtype) for tensor in tensors])
        for sent in filter(torch.Tensor.numel, bits):
            dist.broadcast(sent, source)
        return [tensor if own else sent.to(tensor.device) for tensor, sent in zip(tensors, there, strict=True)]

    @contextmanager
    def _allocating(self) -> Iterator[None]:
        """Before an agreement: memory that runs out here is told to the others, who do not begin without this process."""
        try:
            yield
        except Exception as error:
            raise self._failure(error) from error

    @contextmanager
    def together(self) -> Iterator[None]:
        """May be nested; a failure is agreed on at the innermost."""
        try:
            yield
        except BaseException as error:
            if is_agreed(error):
                raise
            failure = self._failure(error)
            if not isinstance(error, Exception):  # an interrupt stops this process as it would have without a probe
                setattr(error, _AGREED, True)
                raise
            raise failure from error
        self._agree()

    def anywhere(self, flag: bool) -> bool:
        """One reduction of a number."""
        return self._sum(flag) > 0

    def average(self, number: float) -> float:
        """One reduction of a number."""
        return self._sum(number) / self.size

    def _place(self, tensor: Tensor) -> torch.device:
        """Where a collective on `tensor` takes place: there, if it can."""
        return tensor.device if tensor.device in self._devices else self._devices[0]

    def _sum(self, number: float) -> float:
        return float(self.total(torch.tensor(number, dtype=torch.float64)))

    def _parts(self, length: int) -> list[slice]:
        longest = -(-length // self.size)
        ends = [min(longest * (rank + 1), length) for rank in range(self.size)]
        return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    def _agree(self, *action: object) -> None:
        """Raise what all raise, where somebody failed or is about to do something else than `action`."""
        told = repr(action)
        code = zlib.crc32(told.encode())
        failed, highest, lowest = self._highest(0, code, -code)
        if failed:
            raise self._exchanged(None)
        if highest != -lowest:
            error = ProbeError(f"processes take different paths, this one to {told[:200]}")
            raise self._exchanged(failure_text(error))

    def _failure(self, error: BaseException) -> BaseException:
        """Tell the others, and hear from them."""
        told = failure_text(error)  # before they listen
        self._highest(1, 0, 0)
        return self._exchanged(told)

    def _highest(self, *numbers: int) -> list[int]:
        found = torch.tensor(numbers, device=self._devices[0])
        dist.all_reduce(found, dist.ReduceOp.MAX)
        highest: list[int] = found.tolist()
        return highest

    def _exchanged(self, own: tuple[str, str] | None) -> Exception:
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, own)
        failure = common_failure(found)
        setattr(failure, _AGREED, True)
        return failure


def is_agreed(error: BaseException) -> bool:
    """Whether all processes raise it: who catches it goes on alone."""
    return getattr(error, _AGREED, False)


def _devices() -> list[torch.device]:
    """Where the group's collectives work, the fastest first."""
    pairs = dict(pair.split(":") for pair in str(dist.get_backend_config()).split(","))
    nccl = pairs.get("cuda") == "nccl" and torch.cuda.is_available()
    found = [torch.device("cuda", torch.cuda.current_device())] if nccl else []
    return found or [torch.device("cpu")]


def current_world() -> World:
    """All processes of the default group, or this one alone where there is none.

    Assumed and unchecked here: all train the same model (`check_model_over_processes` looks).
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return ProcessGroup()
    return SINGLE
