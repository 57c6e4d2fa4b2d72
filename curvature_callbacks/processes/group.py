"""The processes of a run: how they compute together, agree before every exchange, and fail together.

All collectives of torch.distributed are issued here, but for one: the all-gather of a tensor that is not split evenly, which
FSDP2's own tensors know how to make (`unsharded` in processes/fsdp.py), behind an agreement made here.

Every method that exchanges something is called by all processes in the same order, and does three things in this order:

    process 0                                    process 1
    total(x)                                     total(x)
    1. allocate what the exchange needs          1. allocate
    2. agree:  all_reduce MAX (0, c, -c)   <->   2. agree:  all_reduce MAX (0, c, -c)
    3. all_reduce SUM of x                 <->   3. all_reduce SUM of x

c is a checksum of what a process is about to do: name, label, shape, dtype. If the largest c and the largest -c differ in size,
processes are about to do different things and nobody begins. Memory is allocated first because a process in which that fails
must not leave the others waiting in step 3.

A failure of one process:

    process 0                                    process 1
    with together():                             with together():
        total(x)                                     raises E
        agree: all_reduce MAX (0, c, -c)   <->       leaving: all_reduce MAX (1, 0, 0)
        both see that somebody failed                both see that somebody failed
        all_gather of None                 <->       all_gather of (category, message) of E
        raises the common failure F                  raises the same F, from E
    leaves with F, which is marked               leaves with F

It is told once: F carries a mark (`is_agreed`) by which every `together` around lets it pass without another exchange. Where
process 0 has nothing to exchange any more, it meets process 1 at the agreement with which each `together` ends. Allocation that
fails (step 1) is told in the same way. An interrupt is told as a failure, and stops its own process as itself.
"""

import pickle
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, final

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from curvature_callbacks.errors import ProbeError
from curvature_callbacks.processes.agreement import common_failure, failure_text
from curvature_callbacks.processes.world import SINGLE, World

_AGREED: Final = "_curvature_agreed"  # marks a failure that all processes know already


@final
class ProcessGroup(World):
    """All processes of the default group.

    | method | what it exchanges, beside the agreement before |
    | --- | --- |
    | `total`, `reduced` | one all-reduce; gloo knows no reduction that leaves each process its part |
    | `assembled`, `concatenated` | one all-gather |
    | `gathered` | one all-gather of pickled objects |
    | `delivered` | point to point, all at once |
    | `broadcast` | one broadcast a tensor, of its bits: backends do not know every dtype |
    | `anywhere`, `average` | one all-reduce of a number |
    | `together` | an agreement at its end, and a gathering of messages where somebody failed |

    Cost: a reduction of three integers, read by the host, beside every exchange.
    """

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._devices = _devices()

    @override
    def total(self, partial: Tensor, *, label: str = "") -> Tensor:
        with self._allocating():
            result = partial.detach().to(self._device_for(partial), copy=True).contiguous()
        self._agree("total", label, partial.shape, partial.dtype)
        dist.all_reduce(result)
        return result.to(partial.device)

    @override
    def seed(self, seed: int) -> int:
        # Another for every rank: parts of random vectors, augmentations and drawn labels must not repeat.
        return (seed + 0x9E3779B97F4A7C15 * self.rank) % (1 << 63)

    @override
    def part(self, length: int) -> slice:
        return self._parts(length)[self.rank]

    @override
    def assembled(self, part: Tensor, length: int) -> Tensor:
        return self.concatenated(part.T, length).T.contiguous()

    @override
    def concatenated(self, slices: Tensor, length: int, *, label: str = "") -> Tensor:
        longest = self._parts(length)[0].stop
        with self._allocating():
            padded = slices.new_zeros(longest, *slices.shape[1:], device=self._device_for(slices))
            padded[: len(slices)] = slices
            result = padded.new_empty(self.size * longest, *slices.shape[1:])
        self._agree("concatenated", label, length, slices.shape[1:], slices.dtype)
        dist.all_gather_into_tensor(result, padded)
        return result[:length].to(slices.device)  # all parts but the last ones are as long as the longest

    @override
    def reduced(self, partial: Tensor) -> Tensor:
        return self.total(partial)[:, self.part(partial.shape[1])]

    @override
    def gathered(self, item: Any) -> list[Any]:
        with self._allocating():  # what cannot be pickled fails before anybody waits for it
            pickled = pickle.dumps(item)
        self._agree("gathered")
        received: list[Any] = [None] * self.size
        dist.all_gather_object(received, pickled)
        return [pickle.loads(each) for each in received]

    @override
    def delivered(self, parcels: Sequence[Sequence[Tensor]], sizes: Sequence[Sequence[Any]]) -> list[list[Tensor]]:
        with self.together():
            sent = [[tensor.detach().to(self._devices[0]).contiguous() for tensor in parcel] for parcel in parcels]
            received = [[torch.empty(shape, dtype=dtype, device=self._devices[0]) for shape, dtype in part] for part in sizes]
        operations = []
        for other in range(self.size):
            if other != self.rank:
                operations += [dist.P2POp(dist.isend, tensor, other) for tensor in sent[other] if tensor.numel()]
                operations += [dist.P2POp(dist.irecv, tensor, other) for tensor in received[other] if tensor.numel()]
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        received[self.rank] = list(parcels[self.rank])
        return received

    @override
    def broadcast(self, tensors: Sequence[Tensor], *, source: int) -> list[Tensor]:
        is_source = self.rank == source
        with self._allocating():
            devices = [self._device_for(tensor) for tensor in tensors]
            copies = [
                tensor.detach().to(device).contiguous()
                if is_source
                else torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                for tensor, device in zip(tensors, devices, strict=True)
            ]
            bits = [copy.view(-1).view(torch.uint8) for copy in copies]
        self._agree("broadcast", source, [(tensor.shape, tensor.dtype) for tensor in tensors])
        for sent in filter(torch.Tensor.numel, bits):
            dist.broadcast(sent, source)
        return [tensor if is_source else copy.to(tensor.device) for tensor, copy in zip(tensors, copies, strict=True)]

    @contextmanager
    def _allocating(self) -> Iterator[None]:
        """Before an agreement: memory that runs out here is told to the others, who do not begin without this process."""
        try:
            yield
        except Exception as error:
            raise self._failure(error) from error

    @override
    @contextmanager
    def together(self) -> Iterator[None]:
        # May be nested; a failure is agreed on at the innermost.
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

    @override
    def anywhere(self, flag: bool) -> bool:
        return self._sum(flag) > 0

    @override
    def average(self, number: float) -> float:
        return self._sum(number) / self.size

    def _device_for(self, tensor: Tensor) -> torch.device:
        """Where a collective on `tensor` works: on its own device, if the group can."""
        return tensor.device if tensor.device in self._devices else self._devices[0]

    def _sum(self, number: float) -> float:
        return float(self.total(torch.tensor(number, dtype=torch.float64)))

    def _parts(self, length: int) -> list[slice]:
        """By rank, equal parts of a vector but the last ones."""
        longest = -(-length // self.size)
        ends = [min(longest * (rank + 1), length) for rank in range(self.size)]
        return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]

    def _agree(self, *action: object) -> None:
        """Raise what all raise, where somebody failed or is about to do something else than `action`."""
        text = repr(action)
        code = zlib.crc32(text.encode())
        failed, highest, lowest = self._highest(0, code, -code)
        if failed:
            raise self._exchanged(None)
        if highest != -lowest:
            error = ProbeError(f"processes take different paths, this one to {text[:200]}")
            raise self._exchanged(failure_text(error))

    def _failure(self, error: BaseException) -> BaseException:
        """Tell the others that this process failed by `error`; the failure of all."""
        own = failure_text(error)  # before they listen
        self._highest(1, 0, 0)
        return self._exchanged(own)

    def _highest(self, *numbers: int) -> list[int]:
        """Of each number the largest over processes."""
        reduced = torch.tensor(numbers, device=self._devices[0])
        dist.all_reduce(reduced, dist.ReduceOp.MAX)
        highest: list[int] = reduced.tolist()
        return highest

    def _exchanged(self, own: tuple[str, str] | None) -> Exception:
        """The failure of all from the (category, message) of this process, None where it did not fail, and those of others."""
        failures: list[Any] = [None] * self.size
        dist.all_gather_object(failures, own)
        failure = common_failure(failures)
        setattr(failure, _AGREED, True)
        return failure


def is_agreed(error: BaseException) -> bool:
    """Whether all processes raise it: who catches it goes on alone."""
    return getattr(error, _AGREED, False)


def _devices() -> list[torch.device]:
    """Where the group's collectives work, the fastest first."""
    pairs = dict(pair.split(":") for pair in str(dist.get_backend_config()).split(","))
    nccl = pairs.get("cuda") == "nccl" and torch.cuda.is_available()
    return [torch.device("cuda", torch.cuda.current_device())] if nccl else [torch.device("cpu")]


def current_world() -> World:
    """All processes of the default group, or this one alone where there is none.

    Assumed and unchecked here: all train the same model (`check_model_over_processes` looks).
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return ProcessGroup()
    return SINGLE
