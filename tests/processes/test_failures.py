"""What goes wrong on one process of a training run: a failed record on all, and training as without a probe."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from curvature_callbacks import (
    CapturedProbes,
    CurvatureMonitor,
    FisherSpectrum,
    KFACCoverage,
    TopEigenpairs,
)
from curvature_callbacks.errors import ProbeError
from curvature_callbacks.model.loss.own import OwnLoss
from curvature_callbacks.processes.group import current_world
from curvature_callbacks.record import Record
from curvature_callbacks.run.failures import Failures
from tests.processes.cases import assert_same_records
from tests.processes.ranks import Ranks
from tests.processes.training import Net
from tests.training_cases import Rows, assert_equal, seed_everything

STEPS = 6


class Wrong(nn.Module):
    """Does what `wrong` says on the second process, in probes at certain steps only."""

    def __init__(self, wrong: str) -> None:
        super().__init__()
        self.wrong, self.at, self.step = wrong, (2,), 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training or current_world().rank != 1 or self.step not in self.at:
            return x
        if self.wrong == "exception":
            raise ValueError("a layer")
        if self.wrong == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if self.wrong == "large microbatch" and len(x) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x * torch.nan if self.wrong == "nan" else x


class WrongRows(Rows):
    """Cannot be read by the second process at the third step."""

    step = 0

    def __getitem__(self, index: int) -> Any:
        if WrongRows.step == 2 and current_world().rank == 1:
            raise OSError("a file is gone")
        return super().__getitem__(index)


def train(wrong: str, probed: bool) -> tuple[dict[str, Any], list[Record], int]:
    """What is left of training, the records, and how often a sink was called."""
    seed_everything()
    model = Net()
    model.wrong = Wrong(wrong)
    model.norm = nn.Sequential(model.norm, model.wrong)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(10 + current_world().rank)
    dataset: Dataset[Any] = WrongRows() if wrong == "data" else Rows()
    captured = CapturedProbes(num_microbatches=2, microbatch_size=3)
    sink = Counted()
    monitor = CurvatureMonitor(
        model,
        probes=captured if wrong == "stream" else DataLoader(dataset, batch_size=4),
        measure=[FisherSpectrum(), TopEigenpairs(k=1, which="LA", max_matvecs=8, warm_start=False)],
        when=1 if wrong == "stream" else 2,
        loss="cross_entropy",
        num_microbatches=2,
        microbatch_size=3,
        batch_norm="eval",  # whole batches are never cut
        sinks=[sink],
    )
    losses, rows = [], iter(DataLoader(Rows(), batch_size=4))
    for step in range(STEPS):
        model.wrong.step = WrongRows.step = step
        batch = next(rows)
        if probed:
            monitor.step(step)
            if wrong == "stream" and (current_world().rank == 0 or step >= 2):
                monitor.offer(batch)
        WrongRows.step = -1
        loss = F.cross_entropy(wrapped(batch[0]), batch[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    left = {"parameters": dict(model.state_dict()), "losses": torch.stack(losses), "rng": torch.get_rng_state()}
    return left, monitor.history, sink.calls


class Counted:
    def __init__(self) -> None:
        self.calls = 0

    def write(self, records: Any) -> None:
        self.calls += 1


def errors(records: list[Record], step: int) -> dict[str, str | None]:
    return {record.measurement: record.error for record in records if record.step == step and record.block is None}


CAUSES = {
    "exception": "process 1: ValueError: a layer",
    "memory": "process 1: CUDA out of memory",
    "nan": "process 1",
    "data": "process 1: OSError: a file is gone",
}


@pytest.mark.parametrize("wrong", CAUSES)
def test_a_failure_of_one_process_is_recorded_by_all_and_training_goes_on(wrong: str, two_processes: Ranks) -> None:
    plain, probed = two_processes(train, wrong, False), two_processes(train, wrong, True)
    for rank in range(2):
        assert_equal(plain[rank][0], probed[rank][0], f"rank {rank}")
        records = probed[rank][1]
        failed = {name: error for name, error in errors(records, 2).items() if error is not None}
        if wrong != "nan":  # what of it fails is the measurement's affair
            assert failed.keys() == ({"probe"} if wrong == "data" else {"empirical_fisher", "hessian"})
        assert failed
        assert all(CAUSES[wrong] in error for error in failed.values()), failed
        for step in (0, 4):
            assert not any(errors(records, step).values()), "other probes are as ever"
    assert [calls for _, _, calls in probed] == [3, 0], "one writer"
    for step in (0, 4):
        assert_same_records([[record for record in records if record.step == step] for _, records, _ in probed])


def test_a_microbatch_that_is_too_large_for_one_process_is_halved_on_all(two_processes: Ranks) -> None:
    for _, records, _ in two_processes(train, "large microbatch", True):
        assert not [record.error for record in records if record.failed]
        sizes = [record.scalars["microbatch_size"] for record in records if record.measurement == "probe"]
        assert sizes == [3.0, 1.0, 1.0]


def test_a_stream_is_measured_once_all_processes_have_data(two_processes: Ranks) -> None:
    found = two_processes(train, "stream", True)
    for _, records, _ in found:
        assert [record.step for record in records if record.measurement == "probe"] == [3, 4, 5]
        assert not [record.error for record in records if record.failed]
    assert_same_records([records for _, records, _ in found])


class UnspeakableError(Exception):
    """Has no message to give."""

    def __str__(self) -> str:
        raise LookupError("no text")


def speechless() -> tuple[str, float]:
    world = current_world()
    try:
        with world.together():
            if world.rank == 1:
                raise UnspeakableError
            world.total(torch.ones(2))
    except ProbeError as error:
        return str(error), world.total(torch.ones(1)).item()
    return "", 0.0


def test_an_exception_without_a_message_is_told_by_its_type(two_processes: Ranks) -> None:
    unreadable = "UnspeakableError: its message cannot be read (LookupError)"
    assert two_processes(speechless) == [(f"process 1: {unreadable}", 2.0)] * 2
    assert Failures().failed("hessian", 0, UnspeakableError()).error == unreadable


class Asking(nn.Module):
    """Fails on the second process where it gets no labels, and tells the first."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        if labels is None:
            with current_world().together():
                if current_world().rank == 1:
                    raise ValueError("no labels")
                current_world().total(torch.ones(1))
        return SimpleNamespace(logits=x, loss=None if labels is None else F.cross_entropy(x, labels))


def asked() -> tuple[str, float]:
    """What the model's own loss makes of it when it tries whether the logits need labels."""
    batch = {"x": torch.arange(12.0).view(4, 3), "labels": torch.tensor([0, 1, 2, 1])}
    try:
        with torch.no_grad():
            OwnLoss()(Asking(), batch)
    except ProbeError as error:
        return str(error), current_world().total(torch.ones(1)).item()
    return "", 0.0


def test_the_loss_goes_on_alone_after_no_failure_of_all(two_processes: Ranks) -> None:
    assert two_processes(asked) == [("process 1: ValueError: no labels", 2.0)] * 2


def drawn(step: int) -> list[int]:
    """Which rows a process draws at the second probe: the first one draws for the check too."""
    seen: list[int] = []

    class Noted(Rows):
        def __getitem__(self, index: int) -> Any:
            seen.append(index)
            return super().__getitem__(index)

    torch.manual_seed(0)
    probes = DataLoader(Noted(), batch_size=4)
    model = nn.Sequential(nn.Linear(6, 3))
    sizes: dict[str, Any] = {"num_microbatches": 2, "microbatch_size": 3}
    monitor = CurvatureMonitor(model, probes=probes, loss="cross_entropy", measure=[KFACCoverage()], when=1, **sizes)
    monitor.step(0)
    seen.clear()
    monitor.step(step)
    return seen


def test_processes_draw_rows_of_their_own_that_depend_on_the_step(two_processes: Ranks) -> None:
    first, again, other = two_processes(drawn, 1), two_processes(drawn, 1), two_processes(drawn, 2)
    assert first == again
    assert first != other
    assert len({*first[0], *first[1]}) == 12
