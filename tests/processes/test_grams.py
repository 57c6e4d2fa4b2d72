"""Grams, Fishers and eigenvalues over processes, of microbatches that differ in number and size, against single rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature_callbacks import (
    CurvatureMonitor,
    FisherSpectrum,
    GradientNoise,
    KFACQuality,
    lanczos,
)
from curvature_callbacks.isolation.model import isolated
from curvature_callbacks.problem.eigenproblem import Eigenproblem
from curvature_callbacks.problem.problem import Problem
from curvature_callbacks.processes.group import current_world
from curvature_callbacks.record import Record
from tests.processes.ranks import Ranks
from tests.processes.training import Net


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


def rows_of(rank: int, case: str) -> list[Any]:
    generator = torch.Generator().manual_seed(rank)
    found = []
    for count in COUNTS[rank]:
        x = torch.randn(count, 6, generator=generator, dtype=torch.float64)
        if case == "experts":  # the second expert has rows of one process only
            x[:, 0] = x[:, 0].abs() * (1 if rank == 1 else -1)
        found.append((x, torch.randint(3, (count,), generator=generator)))
    if case == "infinite" and rank == 1:
        found[0][0][2, 3] = torch.inf
    if case == "no finite row" and rank == 1:
        for x, _ in found:
            x[:] = torch.inf
    return found


@contextmanager
def problem_of(case: str, ranks: list[int]) -> Iterator[Problem]:
    torch.manual_seed(0)
    model = MODELS.get(case, Net)().double()
    world = current_world()
    batches = [batch for rank in ranks for batch in rows_of(rank, case)]
    with isolated(model, seed=0):
        yield Problem(model, batches, loss="cross_entropy", world=world, batch_norm="eval")


def grams(case: str, budget: int | None = None) -> dict[str, Tensor]:
    with problem_of(case, [current_world().rank]) as problem:
        found = problem.grams(memory_budget=budget if current_world().rank == 0 else None)
        if case in ("plain", "experts"):
            assert not found.fallback, "the certificate accepts what the processes put together"
        return dict(found.grams) | {"num_targets": found.num_targets}


def dense(case: str, size: int) -> dict[str, Tensor]:
    """From the gradient of every single row, in the order of processes."""
    with problem_of(case, list(range(size))) as problem:
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


def assert_grams(ranks: Ranks, case: str, budget: int | None = None) -> None:
    expected = dense(case, ranks.size)
    for found in ranks(grams, case, budget):
        assert len(found["num_targets"]) == sum(map(sum, COUNTS[: ranks.size]))
        for block, K in expected.items():
            usable = K.diagonal().isfinite()
            assert torch.equal(found[block].diagonal().isfinite(), usable)
            right = K[usable][:, usable]
            assert torch.allclose(found[block][usable][:, usable], right, rtol=1e-10, atol=1e-12 * right.abs().max().item())


@pytest.mark.parametrize("case", ["plain", "experts", "recurrent", "infinite"])
def test_grams_of_two_processes_are_those_of_single_rows(case: str, two_processes: Ranks) -> None:
    assert_grams(two_processes, case)


def test_rounds_of_one_process_are_rounds_of_all(two_processes: Ranks) -> None:
    assert_grams(two_processes, "plain", budget=1)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["plain", "experts", "recurrent", "infinite"])
def test_grams_of_four_processes_are_those_of_single_rows(case: str, four_processes: Ranks) -> None:
    assert_grams(four_processes, case)


def every_fisher(shared: bool) -> list[Record]:
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
    return CurvatureMonitor(Net().double(), probes=batches, loss="cross_entropy", measure=measure, batch_norm="eval").step(0)


def test_every_fisher_has_the_rows_of_all(two_processes: Ranks) -> None:
    expected = {(record.measurement, record.block): record.scalars for record in every_fisher(False)}
    for records in two_processes(every_fisher, True):
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


def products_and_eigenvalues(case: str, ranks: list[int] | None) -> list[list[float]]:
    """Of three Fishers; of the rows of this process and the others, or (alone) of these `ranks`."""
    with problem_of(case, [current_world().rank] if ranks is None else ranks) as problem:
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


def test_a_process_without_a_finite_row_leaves_the_fisher_to_the_others(two_processes: Ranks) -> None:
    expected = products_and_eigenvalues("no finite row", [0, 1])
    for found in two_processes(products_and_eigenvalues, "no finite row", None):
        for values, right in zip(found, expected, strict=True):
            assert values == pytest.approx(right, rel=1e-8)


MODES = [pytest.param(mode, marks=pytest.mark.slow) for mode in ("thick_restart", "partial", "selective", "off", "auto")]


@pytest.mark.parametrize("mode", ["full", *MODES])
def test_eigenvalues_are_those_of_the_dense_hessian_in_every_mode(mode: str, two_processes: Ranks) -> None:
    with problem_of("plain", [0, 1]) as problem:
        size = sum(problem.objective.sizes.values())
        H = problem.hessian().matmat(torch.eye(size, dtype=torch.float64))
    values = torch.linalg.eigvalsh(H).flip(0)
    first, second = two_processes(eigenvalues, mode)
    assert first == second, "to the last bit"
    assert torch.allclose(torch.tensor(first, dtype=torch.float64), torch.cat([values[:2], values[-2:]]), rtol=1e-7)
