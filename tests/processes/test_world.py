"""The processes of a run: what they compute together, and that they fail together."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from curvature_callbacks.errors import ConfigurationError, ProbeError, RefusedError
from curvature_callbacks.processes.group import current_world
from curvature_callbacks.processes.world import SINGLE
from tests.processes.ranks import Ranks

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64]


def computed(length: int, dtype: torch.dtype) -> dict[str, Any]:
    """Every exchange of vectors of that length; entry i of process r's own is `10 r + i`."""
    world = current_world()
    own = (torch.arange(length) + 10 * world.rank).to(dtype)
    wide = torch.stack([own, own + 1]).T.contiguous().T  # not contiguous
    part = world.part(length)
    parcels = [[own[: rank + 1], own[None]] for rank in range(world.size)]
    sizes = [[((min(world.rank + 1, length),), dtype), ((1, length), dtype)] for _ in range(world.size)]
    return {
        "total": world.total(own),
        "assembled": world.assembled(torch.arange(length).to(dtype)[part][None], length),
        "joined": world.concatenated((torch.arange(2 * length).to(dtype).view(length, 2))[part], length),
        "reduced": (part, world.reduced(wide)),
        "delivered": world.delivered(parcels, sizes),
        "shared": world.broadcast([own], source=world.size - 1)[0],
        "gathered": world.gathered({"rank": world.rank}),
        "anywhere": (world.anywhere(world.rank == 1), world.anywhere(False)),
        "average": world.average(10.0 * world.rank),
        "seed": world.seed(3),
    }


@pytest.mark.parametrize("length", [1, 7])
def test_two_processes(length: int, two_processes: Ranks) -> None:
    for dtype in DTYPES:
        assert_computed(two_processes(computed, length, dtype), length, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 2, 4, 9])
def test_four_processes(length: int, four_processes: Ranks) -> None:
    for dtype in DTYPES:
        assert_computed(four_processes(computed, length, dtype), length, dtype)


def assert_computed(found: list[dict[str, Any]], length: int, dtype: torch.dtype) -> None:
    size, counted = len(found), torch.arange(length)
    owns = [(counted + 10 * rank).to(dtype) for rank in range(size)]
    total = torch.stack(owns).sum(0, dtype=dtype)
    pieces: list[Tensor] = []
    for rank, one in enumerate(found):
        assert torch.equal(one["total"], total)
        assert torch.equal(one["assembled"], counted.to(dtype)[None])
        assert torch.equal(one["joined"], torch.arange(2 * length).to(dtype).view(length, 2))
        part, reduced = one["reduced"]
        assert torch.equal(reduced, torch.stack([total, total + size])[:, part])
        pieces.append(counted[part])
        for source, (short, whole) in enumerate(one["delivered"]):
            assert torch.equal(short, owns[source][: rank + 1])
            assert torch.equal(whole, owns[source][None])
        assert torch.equal(one["shared"], owns[-1])
        assert one["gathered"] == [{"rank": other} for other in range(size)]
        assert one["anywhere"] == (True, False)
        assert one["average"] == 10.0 * (size - 1) / 2
    assert torch.equal(torch.cat(pieces), counted), "the parts follow each other and leave nothing out"
    assert len({one["seed"] for one in found}) == size


def test_one_process_keeps_the_same_contract() -> None:
    own = torch.arange(5.0)
    assert SINGLE.total(own) is own
    assert SINGLE.part(5) == slice(0, 5)
    assert SINGLE.gathered(1) == [1]
    assert SINGLE.delivered([[own]], [[]]) == [[own]]
    assert SINGLE.broadcast([own], source=0) == [own]
    assert (SINGLE.anywhere(True), SINGLE.average(2.0), SINGLE.seed(3)) == (True, 2.0, 3)
    assert current_world() is SINGLE


FAILURES: dict[str, tuple[BaseException, type[Exception]]] = {
    "configuration": (ConfigurationError("of the user's"), ConfigurationError),
    "refused": (RefusedError("no derivative"), RefusedError),
    "memory": (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError),
    "host memory": (RuntimeError("DefaultCPUAllocator: can't allocate"), torch.OutOfMemoryError),
    "linalg": (torch.linalg.LinAlgError("did not converge"), torch.linalg.LinAlgError),  # type: ignore[attr-defined]
    "probe": (ProbeError("not finite"), ProbeError),
    "other": (KeyError("layer"), ProbeError),
}
WAITING: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda world: None,
    "total": lambda world: world.total(torch.ones(3)),
    "gathered": lambda world: world.gathered(1),
    "assembled": lambda world: world.assembled(torch.ones(1, world.part(5).stop - world.part(5).start), 5),
    "joined": lambda world: world.concatenated(torch.ones(world.part(5).stop - world.part(5).start, 2), 5),
    "reduced": lambda world: world.reduced(torch.ones(1, 5)),
    "shared": lambda world: world.broadcast([torch.ones(2)], source=0),
    "delivered": lambda world: world.delivered([[]] * world.size, [[]] * world.size),
    "average": lambda world: world.average(1.0),
}


def failing(failure: str, waiting: str, nested: bool) -> tuple[str, str, float]:
    """The second process fails while the first waits: what is raised, and what a sum is afterwards."""
    world = current_world()
    raised: BaseException | None = None
    try:
        with world.together():
            world.total(torch.ones(1))
            if nested:
                with world.together():
                    act(world, failure, waiting)
            else:
                act(world, failure, waiting)
    except BaseException as error:
        raised = error
    return type(raised).__name__, str(raised), world.total(torch.ones(1)).item()


def act(world: Any, failure: str, waiting: str) -> None:
    if world.rank == 1:
        raise FAILURES[failure][0]
    WAITING[waiting](world)


@pytest.mark.parametrize("waiting", WAITING)
@pytest.mark.parametrize("nested", [False, True], ids=["", "nested"])
def test_a_failure_is_everybodys_wherever_the_others_wait(waiting: str, nested: bool, two_processes: Ranks) -> None:
    for raised, message, total in two_processes(failing, "memory", waiting, nested):
        assert raised == "OutOfMemoryError"
        assert message == "process 1: CUDA out of memory"
        assert total == 2.0, "the next exchange works"


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_is_of_the_same_kind_on_all(failure: str, two_processes: Ranks) -> None:
    error, expected = FAILURES[failure]
    for raised, message, total in two_processes(failing, failure, "total", False):
        assert raised == expected.__name__
        assert message.startswith("process 1: ")
        assert str(error) in message
        assert total == 2.0


def failing_everywhere() -> str:
    try:
        with current_world().together():
            raise RefusedError("no derivative")
    except RefusedError as error:
        return str(error)


def test_what_all_say_is_said_once(two_processes: Ranks) -> None:
    assert two_processes(failing_everywhere) == ["no derivative"] * 2


def interrupted() -> tuple[str, float]:
    world = current_world()
    try:
        with world.together(), world.together():
            if world.rank == 0:
                raise KeyboardInterrupt
            world.total(torch.ones(2))
    except BaseException as error:
        return type(error).__name__, world.total(torch.ones(1)).item()
    return "", 0.0


def test_an_interrupt_stops_its_process_and_leaves_the_others_to_go_on(two_processes: Ranks) -> None:
    assert two_processes(interrupted) == [("KeyboardInterrupt", 2.0), ("ProbeError", 2.0)]


def apart(difference: str) -> tuple[str, float]:
    world = current_world()
    try:
        with world.together():
            if difference == "shapes":
                world.total(torch.ones(2 + world.rank))
            elif difference == "labels":
                world.total(torch.ones(2), label=str(world.rank))
            elif difference == "exchanges":
                world.total(torch.ones(2)) if world.rank else world.gathered(1)
            elif world.rank == 0:
                world.total(torch.ones(2))
    except ProbeError as error:
        return str(error), world.total(torch.ones(1)).item()
    return "", 0.0


@pytest.mark.parametrize("difference", ["shapes", "labels", "exchanges", "one leaves"])
def test_processes_about_to_do_different_things_are_told_so(difference: str, two_processes: Ranks) -> None:
    for message, total in two_processes(apart, difference):
        assert "different paths" in message
        assert total == 2.0
