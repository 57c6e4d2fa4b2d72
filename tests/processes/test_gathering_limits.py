"""Sharded parameters that no process can hold: how much of them is gathered at a time, and what cannot be measured then."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from curvature_callbacks import CurvatureMonitor, FisherSpectrum, KFACCoverage, TopEigenpairs
from curvature_callbacks.errors import ConfigurationError
from curvature_callbacks.isolation.model import isolated
from curvature_callbacks.library_internals.tensors import WeakStorage
from curvature_callbacks.operators.graphs import GraphLimits
from curvature_callbacks.operators.hessian import HessianOperator
from curvature_callbacks.problem.problem import Problem
from curvature_callbacks.processes.group import current_world
from curvature_callbacks.processes.world import World
from tests.processes.ranks import Ranks
from tests.processes.training import Net, hsdp, nothing_fits


def sharded(model: Any, *parts: str) -> nn.Module:
    """Under FSDP2 at these parts and at the root."""
    for part in parts:
        fully_shard(model.get_submodule(part))
    return fully_shard(model)


def stack(width: int, depth: int) -> nn.Module:
    layers = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)))
    return sharded(layers.double(), *map(str, range(depth)))


class Noting:
    """A world that notes how many elements of gathered parameters are alive at one time."""

    def __init__(self, world: World, names: set[str]) -> None:
        self._world = world
        self._names = names
        self._alive: list[tuple[WeakStorage, int]] = []
        self.most = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._world, name)

    def concatenated(self, slices: Tensor, length: int, *, label: str = "") -> Tensor:
        gathered = self._world.concatenated(slices, length, label=label)
        if label in self._names:
            self._alive = [(storage, size) for storage, size in self._alive if not storage.is_freed()]
            self._alive.append((WeakStorage(gathered.untyped_storage()), gathered.numel()))
            self.most = max(self.most, sum(size for _, size in self._alive))
        return gathered


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """What hangs in a cycle of references stays alive."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def most_gathered(measurement: Any) -> int:
    """Most elements of parameters that were gathered at one time, of twelve layers of 72."""
    model = stack(8, depth=12)
    batch = torch.randn(4, 8, dtype=torch.float64), torch.randint(8, (4,))
    world: Any = Noting(current_world(), set(dict(model.named_parameters())))
    with no_garbage_collection(), nothing_fits(), isolated(model, seed=0):
        problem = Problem(model, [batch], loss="cross_entropy", world=world)
        measurement.measure(problem, measurement.init(problem))
    return int(world.most)


@pytest.mark.slow
@pytest.mark.parametrize(
    "measurement",
    [
        FisherSpectrum(),
        TopEigenpairs(k=1, which="LA", max_matvecs=5),
        TopEigenpairs(operator="ggn", k=1, which="LA"),
    ],
    ids=["gram", "hessian", "ggn"],
)
def test_no_more_than_a_few_layers_are_gathered_at_a_time(measurement: Any, two_processes: Ranks) -> None:
    for most in two_processes(most_gathered, measurement):
        assert 72 <= most <= 3 * 72


class Branching(nn.Module):
    """The second process leaves a layer out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.skips = False

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return hidden if self.skips else self.second(hidden)


class Experts(nn.Module):
    """Two layers of one shape, of which each process uses another: their gradients must not be added up."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.skips = False

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x) if self.skips else self.first(x)


class Last(nn.Module):
    """Of what an LSTM returns the last output."""

    def forward(self, returned: tuple[Tensor, Any]) -> Tensor:
        return returned[0][:, -1]


@dataclass(frozen=True, kw_only=True)
class Impossible:
    """What cannot be measured where only shards fit.

    Attributes:
        model: makes it, sharded, in every process.
        messages: parts of the errors of the records in their order, or of the refusal at the start.
        inputs: shape of a batch.
        measure: what is asked for.
        diverges: whether the second process takes another path through the model than the first.
    """

    model: Callable[[], nn.Module]
    messages: tuple[str, ...]
    inputs: tuple[int, ...] = (4, 3)
    measure: tuple[Any, ...] = (FisherSpectrum(), TopEigenpairs(k=1))
    diverges: bool = False


IMPOSSIBLE = {
    "other paths": Impossible(
        model=lambda: sharded(Branching(), "first", "second"),
        messages=("different paths", "different paths"),
        diverges=True,
    ),
    "other experts": Impossible(
        model=lambda: sharded(Experts()),
        messages=("different paths", "different paths"),
        measure=(TopEigenpairs(k=1), KFACCoverage()),
        diverges=True,
    ),
    "unsharded root": Impossible(
        model=lambda: head_sharded(Net()),
        messages=("`first.weight` is not sharded while others are",),
        inputs=(4, 6),
    ),
    "two dimensions": Impossible(
        model=lambda: hsdp(Net()),
        messages=("shard over a mesh of one dimension",),
        inputs=(4, 6),
    ),
    "no rule": Impossible(
        model=lambda: sharded(nn.Sequential(nn.LSTM(3, 3, batch_first=True), Last()), "0"),
        messages=("cannot be taken row by row",),
        inputs=(4, 2, 3),
    ),
    "options": Impossible(
        model=lambda: sharded(nn.Sequential(nn.Linear(3, 3))),
        messages=("`max_params_per_block` needs unsharded parameters", "K-FAC's matrix needs unsharded parameters"),
        measure=(FisherSpectrum(max_params_per_block=2), TopEigenpairs(operator="kfac", k=1)),
    ),
}


def head_sharded(model: Any) -> nn.Module:
    fully_shard(model.head)
    return model  # type: ignore[no-any-return]


def errors_of(name: str) -> list[str]:
    """What the records of a probe say went wrong; or the refusal at the start."""
    torch.manual_seed(0)
    case = IMPOSSIBLE[name]
    model: Any = case.model()
    batch = torch.randn(case.inputs), torch.randint(3, case.inputs[:1])
    monitor = CurvatureMonitor(model, probes=[batch], loss="cross_entropy", measure=list(case.measure))
    with nothing_fits():
        try:
            monitor.check()
        except ConfigurationError as error:
            return [str(error)]
        if case.diverges:
            model.skips = current_world().rank == 1
        return [str(record.error) for record in monitor.step(0) if record.failed]


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_cannot_be_done_is_said_on_all_processes(name: str, two_processes: Ranks) -> None:
    for errors in two_processes(errors_of, name):
        assert len(errors) == len(IMPOSSIBLE[name].messages)
        for message, error in zip(IMPOSSIBLE[name].messages, errors, strict=True):
            assert message in error


def graphs_kept() -> list[int]:
    """Passes of a product, with budgets that differ by process, and the storages that are still noted after many passes."""
    model = stack(4, depth=3)
    batches = [(torch.randn(3, 4, dtype=torch.float64), torch.randint(4, (3,))) for _ in range(3)]
    with nothing_fits(), isolated(model, seed=0):
        problem = Problem(model, batches, loss="cross_entropy", world=current_world())
        budget = 1 << 30 if current_world().rank == 0 else 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(HessianOperator, "limits", GraphLimits(kept_bytes=budget))
            operator = HessianOperator(problem.objective, problem.microbatches)
        calls: list[int] = []
        model.register_forward_hook(lambda *_: calls.append(1))
        for _ in range(6):
            operator.matmat(torch.ones(operator.shape[0], 1, dtype=torch.float64))
        assert problem.objective._on_use is not None
        return [len(calls), len(problem.objective._on_use.storages)]


def test_processes_keep_the_same_graphs_and_forget_what_they_gathered(two_processes: Ranks) -> None:
    for passes, noted in two_processes(graphs_kept):
        assert passes == 6 * 3, "one process had no room"
        assert noted <= 40
