"""What goes wrong on one process of a training run: a failed record on all, and training as without a probe."""

from collections.abc import Iterator
from contextlib import contextmanager
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
    GradientNoise,
    KFACCoverage,
    KFACQuality,
    TopEigenpairs,
    lanczos,
)
from curvature_callbacks.errors import ProbeError
from curvature_callbacks.isolation.model import isolated
from curvature_callbacks.model.loss.own import OwnLoss
from curvature_callbacks.problem.eigenproblem import Eigenproblem
from curvature_callbacks.problem.problem import Problem
from curvature_callbacks.processes.group import current_world
from curvature_callbacks.record import Record
from curvature_callbacks.run.failures import Failures
from tests.processes.cases import assert_same_records
from tests.processes.ranks import Ranks
from tests.processes.training import Net
from tests.training_cases import Rows, assert_equal, seed_everything

STEPS = 6


class Wrong(nn.Module):
    """Does what `kind` says on the second process, in probes at certain steps only."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.at, self.step = kind, (2,), 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training or current_world().rank != 1 or self.step not in self.at:
            return x
        if self.kind == "exception":
            raise ValueError("a layer")
        if self.kind == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if self.kind == "large microbatch" and len(x) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x * torch.nan if self.kind == "nan" else x


class WrongRows(Rows):
    """Cannot be read by the second process at the third step."""

    step = 0

    def __getitem__(self, index: int) -> Any:
        if WrongRows.step == 2 and current_world().rank == 1:
            raise OSError("a file is gone")
        return super().__getitem__(index)


def train(kind: str, probed: bool) -> tuple[dict[str, Any], list[Record], int]:
    """What is left of training, the records, and how often a sink was called."""
    seed_everything()
    model = Net()
    model.wrong = Wrong(kind)
    model.norm = nn.Sequential(model.norm, model.wrong)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(10 + current_world().rank)
    dataset: Dataset[Any] = WrongRows() if kind == "data" else Rows()
    captured = CapturedProbes(num_microbatches=2, microbatch_size=3)
    sink = Counted()
    monitor = CurvatureMonitor(
        model,
        probes=captured if kind == "stream" else DataLoader(dataset, batch_size=4),
        measure=[FisherSpectrum(), TopEigenpairs(k=1, which="LA", max_matvecs=8, warm_start=False)],
        when=1 if kind == "stream" else 2,
        loss="cross_entropy",
        num_microbatches=2,
        microbatch_size=3,
        sinks=[sink],
    )
    losses, rows = [], iter(DataLoader(Rows(), batch_size=4))
    for step in range(STEPS):
        model.wrong.step = WrongRows.step = step
        batch = next(rows)
        if probed:
            monitor.step(step)
            if kind == "stream" and (current_world().rank == 0 or step >= 2):
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


@pytest.mark.parametrize("kind", CAUSES)
def test_a_failure_of_one_process_is_recorded_by_all_and_training_goes_on(kind: str, two: Ranks) -> None:
    plain, probed = two(train, kind, False), two(train, kind, True)
    for rank in range(2):
        assert_equal(plain[rank][0], probed[rank][0], f"rank {rank}")
        records = probed[rank][1]
        failed = {name: error for name, error in errors(records, 2).items() if error is not None}
        if kind != "nan":  # what of it fails is the measurement's affair
            assert failed.keys() == ({"probe"} if kind == "data" else {"empirical_fisher", "hessian"})
        assert failed
        assert all(CAUSES[kind] in error for error in failed.values()), failed
        for step in (0, 4):
            assert not any(errors(records, step).values()), "other probes are as ever"
    assert [calls for _, _, calls in probed] == [3, 0], "one writer"
    for step in (0, 4):
        assert_same_records([[record for record in records if record.step == step] for _, records, _ in probed])


def test_a_microbatch_that_is_too_large_for_one_process_is_halved_on_all(two: Ranks) -> None:
    for _, records, _ in two(train, "large microbatch", True):
        assert not [record.error for record in records if record.failed]
        sizes = [record.scalars["microbatch_size"] for record in records if record.measurement == "probe"]
        assert sizes == [3.0, 1.0, 1.0]


def test_a_stream_is_measured_once_all_processes_have_data(two: Ranks) -> None:
    found = two(train, "stream", True)
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


def test_an_exception_without_a_message_is_told_by_its_type(two: Ranks) -> None:
    unreadable = "UnspeakableError: its message cannot be read (LookupError)"
    assert two(speechless) == [(f"process 1: {unreadable}", 2.0)] * 2
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


def test_the_loss_goes_on_alone_after_no_failure_of_all(two: Ranks) -> None:
    assert two(asked) == [("process 1: ValueError: no labels", 2.0)] * 2


# ---------------------------------------------------------------------------------------------- rows of every process


def drawn(step: int) -> list[int]:
    """Which rows a process draws."""
    seen: list[int] = []

    class Noted(Rows):
        def __getitem__(self, index: int) -> Any:
            seen.append(index)
            return super().__getitem__(index)

    probes = DataLoader(Noted(), batch_size=4)
    model = nn.Sequential(nn.Linear(6, 3))
    sizes: dict[str, Any] = {"num_microbatches": 2, "microbatch_size": 3}
    monitor = CurvatureMonitor(model, probes=probes, loss="cross_entropy", measure=[KFACCoverage()], **sizes)
    monitor._checked = True
    monitor.step(step)
    return seen


def test_processes_draw_rows_of_their_own_that_depend_on_the_step(two: Ranks) -> None:
    first, again, other = two(drawn, 0), two(drawn, 0), two(drawn, 1)
    assert first == again
    assert first != other
    assert len({*first[0], *first[1]}) == 12


# --------------------------------------------------------------------------------------- Grams that do not come easily


class Experts(nn.Module):
    """Every row goes to one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        found = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            (rows,) = ((x[:, 0] > 0).long() == number).nonzero(as_tuple=True)
            if len(rows):
                found = found.index_add(0, rows, expert(x[rows]))
        return self.head(found)


class Recurrent(nn.Module):
    """Without a rule: taken row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x.view(len(x), 2, 3))[0][:, -1])


MODELS = {"experts": Experts, "recurrent": Recurrent, "plain": Net}
COUNTS = ((4, 3), (5, 1, 2), (2,), (6,))  # rows of the microbatches of each process


def rows_of(rank: int, kind: str) -> list[Any]:
    generator = torch.Generator().manual_seed(rank)
    found = []
    for count in COUNTS[rank]:
        x = torch.randn(count, 6, generator=generator, dtype=torch.float64)
        if kind == "experts":  # the second expert has rows of one process only
            x[:, 0] = x[:, 0].abs() * (1 if rank == 1 else -1)
        found.append((x, torch.randint(3, (count,), generator=generator)))
    if kind == "infinite" and rank == 1:
        found[0][0][2, 3] = torch.inf
    if kind == "no finite row" and rank == 1:
        for x, _ in found:
            x[:] = torch.inf
    return found


@contextmanager
def problem_of(kind: str, ranks: list[int]) -> Iterator[Problem]:
    torch.manual_seed(0)
    model = MODELS.get(kind, Net)().double()
    world = current_world()
    batches = [batch for rank in ranks for batch in rows_of(rank, kind)]
    with isolated(model, seed=0):
        yield Problem(model, batches, loss="cross_entropy", world=world)


def grams(kind: str, budget: int | None = None) -> dict[str, Tensor]:
    with problem_of(kind, [current_world().rank]) as problem:
        found = problem.grams(memory_budget=budget if current_world().rank == 0 else None)
        if kind in ("plain", "experts"):
            assert not found.fallback, "the certificate accepts what the processes put together"
        return dict(found.grams) | {"num_targets": found.num_targets}


def dense(kind: str, size: int) -> dict[str, Tensor]:
    """From the gradient of every single row, in the order of processes."""
    with problem_of(kind, list(range(size))) as problem:
        leaves = problem.objective.leaves()
        rows: dict[str, list[Tensor]] = {block: [] for block in problem.blocks}
        for x, y in problem.microbatches:
            for row in range(len(x)):
                loss = problem.objective((x[row : row + 1], y[row : row + 1]), leaves).total
                found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
                named = dict(zip(leaves, found, strict=True))
                for block, names in problem.blocks.items():
                    rows[block].append(torch.cat([named[name].flatten() for name in names]))
        return {block: torch.stack(found) @ torch.stack(found).T for block, found in rows.items()}


def assert_grams(ranks: Ranks, kind: str, budget: int | None = None) -> None:
    expected = dense(kind, ranks.size)
    for found in ranks(grams, kind, budget):
        assert len(found["num_targets"]) == sum(map(sum, COUNTS[: ranks.size]))
        for block, K in expected.items():
            usable = K.diagonal().isfinite()
            assert torch.equal(found[block].diagonal().isfinite(), usable)
            right = K[usable][:, usable]
            assert torch.allclose(found[block][usable][:, usable], right, rtol=1e-10, atol=1e-12 * right.abs().max().item())


@pytest.mark.parametrize("kind", ["plain", "experts", "recurrent", "infinite"])
def test_grams_of_two_processes_are_those_of_single_rows(kind: str, two: Ranks) -> None:
    assert_grams(two, kind)


def test_rounds_of_one_process_are_rounds_of_all(two: Ranks) -> None:
    assert_grams(two, "plain", budget=1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "experts", "recurrent", "infinite"])
def test_grams_of_four_processes_are_those_of_single_rows(kind: str, four: Ranks) -> None:
    assert_grams(four, kind)


def kinds_of_fisher(shared: bool) -> list[Record]:
    measure: list[Any] = [
        FisherSpectrum(sample_unit="token"),
        FisherSpectrum(fisher="exact"),
        KFACQuality(),
        KFACQuality(fisher="exact", sharing="reduce"),
        GradientNoise(),
    ]
    torch.manual_seed(0)
    ranks = [current_world().rank] if shared else [0, 1]
    batches = [batch for rank in ranks for batch in rows_of(rank, "plain")]
    return CurvatureMonitor(Net().double(), probes=batches, loss="cross_entropy", measure=measure).step(0)


def test_every_kind_of_fisher_has_the_rows_of_all(two: Ranks) -> None:
    expected = {(record.measurement, record.block): record.scalars for record in kinds_of_fisher(False)}
    for records in two(kinds_of_fisher, True):
        assert not [record.error for record in records if record.failed]
        for record in [record for record in records if record.measurement != "probe"]:
            alone = expected[record.measurement, record.block]
            for name, value in alone.items():
                if "condition_number" not in name:  # a ratio to rounding
                    assert record.scalars[name] == pytest.approx(value, rel=1e-8, abs=1e-10), (record.measurement, name)


def eigenvalues(mode: str) -> list[float]:
    with problem_of("plain", [current_world().rank]) as problem:
        pairs = lanczos(problem.hessian(), k=4, which="BE", tol=1e-8, max_matvecs=400, reorth_mode=mode)
        return pairs.eigenvalues.tolist()


def products_and_eigenvalues(kind: str, ranks: list[int] | None) -> list[list[float]]:
    """Of three Fishers; of the rows of this process and the others, or (alone) of these `ranks`."""
    with problem_of(kind, [current_world().rank] if ranks is None else ranks) as problem:
        operators = [
            problem.empirical_fisher(),
            problem.empirical_fisher(sample_unit="token"),
            problem.sampled_fisher(),
        ]
        for operator in operators:
            assert Eigenproblem(operator=operator).check(seed=0)[0] < 1e-6
        return [
            [
                one.jvp(torch.ones(one.shape[0], dtype=torch.float64)).norm().item(),
                *lanczos(one, k=2, which="LA", tol=1e-8, max_matvecs=100).eigenvalues.tolist(),
            ]
            for one in operators
        ]


def test_a_process_without_a_finite_row_leaves_the_fisher_to_the_others(two: Ranks) -> None:
    expected = products_and_eigenvalues("no finite row", [0, 1])
    for found in two(products_and_eigenvalues, "no finite row", None):
        for values, right in zip(found, expected, strict=True):
            assert values == pytest.approx(right, rel=1e-8)


MODES = [pytest.param(mode, marks=pytest.mark.slow) for mode in ("thick_restart", "partial", "selective", "off", "auto")]


@pytest.mark.parametrize("mode", ["full", *MODES])
def test_eigenvalues_are_those_of_the_dense_hessian_in_every_mode(mode: str, two: Ranks) -> None:
    with problem_of("plain", [0, 1]) as problem:
        size = sum(problem.objective.sizes.values())
        H = problem.hessian().matmat(torch.eye(size, dtype=torch.float64))
    values = torch.linalg.eigvalsh(H).flip(0)
    first, second = two(eigenvalues, mode)
    assert first == second, "to the last bit"
    assert torch.allclose(torch.tensor(first, dtype=torch.float64), torch.cat([values[:2], values[-2:]]), rtol=1e-7)
