"""The only module that speaks torch.distributed: the processes of a run, and how they compute, agree and fail together."""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Protocol, final

import torch
import torch.distributed as dist
from torch import Tensor

from curvature_callbacks.common_failure import common_failure, described
from curvature_callbacks.errors import ProbeError
from curvature_callbacks.linalg.space import Space


class World(Space, Protocol):
    """The processes that train one model on different rows. Every method is called by all of them, in the same order.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.
    """

    rank: int
    size: int

    def total(self, partial: Tensor) -> Tensor:
        """The sum over processes, the same bits on each; a new tensor."""
        ...

    def seed(self, seed: int) -> int:
        """What this process seeds its own part with."""
        ...

    def part(self, length: int) -> slice:
        """The part of a vector of that length that is held here; the parts follow each other by rank."""
        ...

    def assembled(self, part: Tensor, length: int) -> Tensor:
        """(K, length) whole vectors as rows, from the `part` (K, held here) of each."""
        ...

    def reduced(self, partial: Tensor) -> Tensor:
        """(K, held here): the part held here of the sum over processes of `partial` (K, length)."""
        ...

    def joined(self, rows: Tensor, length: int, *, label: str = "") -> Tensor:
        """(length, ...) the `rows` of all processes, of which `part(length)` are here. All must ask with the same `label`."""
        ...

    def gathered(self, item: Any) -> list[Any]:
        """What every process gave, by rank. For small things: they are pickled."""
        ...

    def delivered(self, parcels: Sequence[Sequence[Tensor]], sizes: Sequence[Sequence[Any]]) -> list[list[Tensor]]:
        """What every process sent here, by rank.

        Args:
            parcels: for each rank the tensors that go there.
            sizes: for each rank the (shape, dtype) of the tensors that come from there.
        """
        ...

    def shared(self, tensors: Sequence[Tensor], *, source: int) -> None:
        """Fill `tensors` with those of the process `source`, in place."""
        ...

    def together(self) -> Any:
        """A context that all processes leave normally, or all with an exception of the same kind."""
        ...

    def anywhere(self, flag: bool) -> bool:
        """Whether any process says so."""
        ...

    def average(self, number: float) -> float:
        """Over processes, the same on each: for clocks, which differ."""
        ...


@final
class SingleProcess:
    """A world of one."""

    rank = 0
    size = 1

    def total(self, partial: Tensor) -> Tensor:
        """`partial` itself."""
        return partial

    def seed(self, seed: int) -> int:
        """`seed` itself."""
        return seed

    def part(self, length: int) -> slice:
        """All of it."""
        return slice(0, length)

    def assembled(self, part: Tensor, length: int) -> Tensor:
        """`part` itself."""
        return part

    def reduced(self, partial: Tensor) -> Tensor:
        """`partial` itself."""
        return partial

    def joined(self, rows: Tensor, length: int, *, label: str = "") -> Tensor:
        """`rows` themselves."""
        return rows

    def gathered(self, item: Any) -> list[Any]:
        """`[item]`."""
        return [item]

    def delivered(self, parcels: Sequence[Sequence[Tensor]], sizes: Sequence[Sequence[Any]]) -> list[list[Tensor]]:
        """The parcel to itself."""
        return [list(parcels[0])]

    def shared(self, tensors: Sequence[Tensor], *, source: int) -> None:
        """Nothing: they are there."""

    @contextmanager
    def together(self) -> Iterator[None]:
        """Nothing to agree on."""
        yield

    def anywhere(self, flag: bool) -> bool:
        """`flag` itself."""
        return flag

    def average(self, number: float) -> float:
        """`number` itself."""
        return number


SINGLE: Final = SingleProcess()


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
        self._agreed: BaseException | None = None  # the failure that all know already

    def total(self, partial: Tensor) -> Tensor:
        """One all-reduce."""
        self._agree("total", partial.shape, partial.dtype)
        result = partial.detach().to(self._place(partial), copy=True).contiguous()
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
        return self.joined(part.T, length).T.contiguous()

    def joined(self, rows: Tensor, length: int, *, label: str = "") -> Tensor:
        """One all-gather."""
        self._agree("joined", label, length, rows.shape[1:], rows.dtype)
        parts = self._parts(length)
        own = rows.new_zeros(parts[0].stop, *rows.shape[1:], device=self._place(rows))
        own[: len(rows)] = rows
        found = [torch.empty_like(own) for _ in parts]
        dist.all_gather(found, own)
        pieces = [one[: piece.stop - piece.start] for one, piece in zip(found, parts, strict=True)]
        return torch.cat(pieces).to(rows.device)

    def reduced(self, partial: Tensor) -> Tensor:
        """One all-reduce; gloo knows no reduction that leaves each process its part."""
        return self.total(partial)[:, self.part(partial.shape[1])]

    def gathered(self, item: Any) -> list[Any]:
        """One gathering of pickled objects."""
        self._agree("gathered")
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, item)
        return found

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

    def shared(self, tensors: Sequence[Tensor], *, source: int) -> None:
        """One broadcast a tensor."""
        self._agree("shared", source, [(tensor.shape, tensor.dtype) for tensor in tensors])
        for tensor in tensors:
            there = tensor.to(self._place(tensor)).contiguous()
            dist.broadcast(there, source)
            if self.rank != source:
                tensor.copy_(there)

    @contextmanager
    def together(self) -> Iterator[None]:
        """May be nested; a failure is agreed on at the innermost."""
        try:
            yield
        except BaseException as error:
            if error is self._agreed:
                raise
            failure = self._failure(error)
            if not isinstance(error, Exception):  # an interrupt stops this process as it would have without a probe
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
        code = zlib.crc32(repr(action).encode())
        failed, highest, lowest = self._highest(0, code, -code)
        if failed:
            raise self._exchanged(None)
        if highest != -lowest:
            raise self._exchanged(ProbeError(f"processes take different paths, this one to {action}"))

    def _failure(self, error: BaseException) -> BaseException:
        """Tell the others, and hear from them."""
        self._highest(1, 0, 0)
        return self._exchanged(error)

    def _highest(self, *numbers: int) -> list[int]:
        found = torch.tensor(numbers, device=self._devices[0])
        dist.all_reduce(found, dist.ReduceOp.MAX)
        highest: list[int] = found.tolist()
        return highest

    def _exchanged(self, error: BaseException | None) -> Exception:
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, None if error is None else described(error))
        failure = common_failure(found)
        self._agreed = failure
        return failure


def _devices() -> list[torch.device]:
    """Where the group's collectives work, the fastest first."""
    pairs = dict(pair.split(":") for pair in str(dist.get_backend_config()).split(","))
    found = [torch.device("cuda", torch.cuda.current_device())] if pairs.get("cuda") == "nccl" else []
    return found or [torch.device("cpu")]


def current_world() -> World:
    """All processes of the default group, or this one alone where there is none.

    Assumed and unchecked here: all train the same model (`check_model_over_processes` looks).
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return ProcessGroup()
    return SINGLE
