"""How often the basis is passed over, and that fewer passes give the same eigenvalues."""

from typing import Any

import pytest
import torch

from curvature_callbacks.linalg.lanczos.krylov import Krylov
from curvature_callbacks.linalg.lanczos.options import LanczosOptions
from curvature_callbacks.linalg.lanczos.reorthogonalisation import Full, Partial, Recurrence, Selective
from curvature_callbacks.linalg.lanczos.ritz import Ritz
from curvature_callbacks.linalg.lanczos.solver import iteration, lanczos
from curvature_callbacks.linalg.operator import Operator
from tests.linalg.lanczos.lanczos_cases import DTYPES, Counted, outliers_and_bulk, symmetric, wanted_values


def passed_over(operator: Counted) -> list[int]:
    """The numbers of basis vectors of every pass so far."""
    return [vectors for _, vectors in operator.passes]


def test_a_full_step_passes_over_the_basis_once():
    """The recurrence has left little to take away."""
    operator = Counted(symmetric(torch.linspace(-1, 1, 200)))
    krylov = Krylov(operator, 40, seed=0, policy=Full())
    for _ in range(30):
        krylov.step()
    assert passed_over(operator) == list(range(1, 31))
    assert krylov.num_matvecs == 30


def test_a_second_pass_follows_a_drop_of_the_norm():
    """Much is left in the span where the recurrence does not hold: of a matrix that is not symmetric."""
    A = torch.randn(30, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    operator = Counted(A)
    krylov = Krylov(operator, 28, seed=0, policy=Full())
    for _ in range(26):
        krylov.step()
    vectors = passed_over(operator)
    assert vectors[0] == 1
    assert vectors[-4:] == [25, 25, 26, 26]
    assert sorted(set(vectors)) == list(range(1, 27))
    Q = krylov.basis[:27]
    assert (Q @ Q.T - torch.eye(27, dtype=torch.float64)).abs().max() <= 1e-14


def test_an_accelerator_passes_twice_rather_than_ask():
    operator = Counted(symmetric(torch.linspace(-1, 1, 200)), reads_are_free=False)
    krylov = Krylov(operator, 40, seed=0, policy=Full())
    for _ in range(5):
        krylov.step()
    assert passed_over(operator) == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def outcome(operator: Operator, **options: Any) -> tuple[Ritz, Krylov]:
    """What `lanczos` finds, and the basis it leaves."""
    run = iteration(operator, LanczosOptions(**options))
    return run.result(), run.krylov


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["uniform", "normal", "net"])
def test_partial_takes_fewer_passes_for_the_same_eigenvalues(name: str, dtype: torch.dtype):
    values = SPECTRA[name]
    options = {"k": 6, "which": "BE", "tol": 1.1e-5, "max_matvecs": 200}
    every, some = (Counted(symmetric(values).to(dtype)) for _ in range(2))
    full = lanczos(every, reorth_mode="full", **options)  # type: ignore[arg-type]
    partial = lanczos(some, reorth_mode="partial", **options)  # type: ignore[arg-type]
    assert partial.num_matvecs <= full.num_matvecs + 5
    assert every.num_passes() == full.num_matvecs
    assert some.num_passes() <= {"uniform": 0.2, "normal": 0.4, "net": 0.8}[name] * every.num_passes()
    accuracy = 1e-9 if dtype == torch.float64 else 2e-6
    scale = values.abs().max()
    assert (partial.eigenvalues - full.eigenvalues).abs().max() <= accuracy * scale
    assert (partial.eigenvalues - wanted_values(values, 6, "BE")).abs().max() <= accuracy * scale


SPECTRA = {
    "uniform": torch.linspace(-1, 1, 300, dtype=torch.float64),
    "normal": torch.randn(300, generator=torch.Generator().manual_seed(3), dtype=torch.float64),
    "cubes": torch.randn(150, generator=torch.Generator().manual_seed(3)).double() ** 3,
    "net": outliers_and_bulk(300),
    "decay": torch.logspace(0, -8, 300, dtype=torch.float64),
}


def lost(krylov: Krylov) -> float:
    """Largest inner product of two basis vectors."""
    Q = krylov.basis[: krylov.size].double()
    return float((Q @ Q.T - torch.eye(len(Q), dtype=torch.float64)).abs().max())


@pytest.mark.parametrize("free", [True, False], ids=["told every step", "told at looks"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SPECTRA)
def test_partial_keeps_the_basis_orthonormal_to_the_root_of_eps(name: str, dtype: torch.dtype, free: bool):
    operator = Counted(symmetric(SPECTRA[name]).to(dtype), reads_are_free=free)
    _, krylov = outcome(operator, reorth_mode="partial", k=6, which="BE", tol=2e-5, max_matvecs=120)
    assert krylov.size > 20
    assert operator.num_passes() < krylov.num_matvecs
    assert lost(krylov) <= torch.finfo(dtype).eps ** 0.5


class Coarse(Counted):
    """Products rounded to fewer digits than the vectors have, as models do that compute parts in less precision."""

    def __init__(self, A: torch.Tensor, digits: torch.dtype, *, reads_are_free: bool) -> None:
        super().__init__(A, reads_are_free=reads_are_free)
        self._digits = digits

    def matmat(self, V: torch.Tensor) -> torch.Tensor:
        return super().matmat(V).to(self._digits).to(self.dtype)


@pytest.mark.parametrize("free", [True, False], ids=["told every step", "told at looks"])
@pytest.mark.parametrize(
    ("dtype", "digits"), [(torch.float32, torch.bfloat16), (torch.float64, torch.float32), (torch.float64, torch.bfloat16)]
)
def test_partial_notices_products_with_few_digits(dtype: torch.dtype, digits: torch.dtype, free: bool):
    """Taken for products that are good to rounding, a run gave three copies of the largest eigenvalue."""
    values = outliers_and_bulk(300)
    operator = Coarse(symmetric(values).to(dtype), digits, reads_are_free=free)
    ritz, krylov = outcome(operator, k=6, which="BE", tol=1e-3, max_matvecs=120, reorth_mode="partial")
    assert lost(krylov) <= torch.finfo(dtype).eps ** 0.5
    error = (ritz.values - wanted_values(values, 6, "BE")).abs().max() / values.abs().max()
    assert error <= 2 * torch.finfo(digits).eps


@pytest.mark.parametrize("name", SPECTRA)
def test_the_estimate_is_not_below_the_truth(name: str):
    """With signs lost on the way the terms cancel: it was too small by a thousand after 18 steps of `cubes`."""
    policy = Partial(eps=torch.finfo(torch.float64).eps, ahead=1)
    krylov = Krylov(Counted(symmetric(SPECTRA[name])), 60, seed=0, policy=policy)
    for _ in range(40):
        krylov.step()
        krylov.settle()
        Q = krylov.basis[: krylov.size + 1]
        assert (Q[:-1] @ Q[-1]).abs().max() <= 2 * policy.estimate


def steps_until_a_pass(policy: Partial, start: int, alphas: torch.Tensor, betas: torch.Tensor) -> int:
    """Told of one step after the other from `start` on, until it asks for one."""
    m = start
    while policy.vectors(m + 1) is None:
        policy.observe(Recurrence(alphas[:m], betas[:m], torch.zeros(m, dtype=torch.float64), 0.0))
        m += 1
    return m


def test_a_pass_that_finds_more_than_was_estimated_is_a_lesson():
    alphas = torch.linspace(1, 2, 30, dtype=torch.float64)
    betas = torch.full((30,), 0.1, dtype=torch.float64)
    taught, other = (Partial(eps=torch.finfo(torch.float64).eps, ahead=1) for _ in range(2))
    m = steps_until_a_pass(taught, 1, alphas, betas)
    assert m > 3
    losses = torch.zeros(m, dtype=torch.float64)
    losses[m - 1] = 1e-3
    assert taught.observe(Recurrence(alphas[:m], betas[:m], losses, 0.0)) == 1  # none before was against all
    spent = []
    for policy in (taught, other):
        policy.reset(1)
        for steps in (1, 2):
            policy.observe(Recurrence(alphas[:steps], betas[:steps], losses[:steps], 0.0))
        spent.append(steps_until_a_pass(policy, 3, alphas, betas))
    assert spent[0] < spent[1]


def test_what_leads_back_to_locked_vectors_is_no_loss():
    """A run to a small tolerance looks for copies beside the Ritz vectors it keeps, with residuals: 583 passes of 1213."""
    operator = Counted(symmetric(SPECTRA["uniform"]), limit=2000)
    pairs = lanczos(operator, reorth_mode="partial", k=6, which="BE", tol=1e-6, max_matvecs=2000)
    assert pairs.converged.all()
    assert operator.num_passes(beyond=6) <= 0.15 * pairs.num_matvecs  # those over the six locked vectors are no loss


def test_steps_that_are_thrown_away_say_nothing_of_symmetry():
    A = symmetric(torch.cat([torch.tensor([3.0, 2.0, 1.0]), torch.zeros(97)]))
    for mode in ("full", "partial"):
        operator = Counted(A, reads_are_free=False)
        pairs = lanczos(operator, k=3, tol=1e-6, reorth_mode=mode, max_matvecs=200)  # type: ignore[arg-type]
        assert pairs.asymmetry <= 1e-13


def test_partial_passes_just_before_orthogonality_is_lost():
    policy = Partial(eps=torch.finfo(torch.float64).eps, ahead=5)
    small = torch.full((5,), 1.0, dtype=torch.float64)
    assert policy.vectors(6) is None
    assert policy.observe(Recurrence(small, small, small, 0.0)) is None
    assert policy.vectors(6) is None  # nothing has converged: the estimate stays at rounding
    vanishing = torch.cat([small, torch.tensor([1e-3, 1e-4, 1e-5, 1e-6, 1e-7], dtype=torch.float64)])
    assert policy.observe(Recurrence(torch.ones(10, dtype=torch.float64), vanishing, vanishing, 0.0)) is not None
    policy.reset(8)
    assert policy.vectors(10) == slice(0, 10)
    assert policy.vectors(11) is None


def test_selective_shortens_its_period_where_too_much_is_lost():
    policy = Selective(eps=1e-16, window=3, period=5)
    assert [policy.vectors(size) for size in (4, 5, 6, 7)] == [slice(1, 4), slice(0, 5), slice(0, 6), slice(4, 7)]
    losses = torch.zeros(10, dtype=torch.float64)
    assert policy.observe(Recurrence(losses[:5], losses[:5], losses[:5], 0.0)) is None
    losses[9] = 1e-6  # the vector after it, at index 10, had lost that much
    assert policy.observe(Recurrence(losses, losses, losses, 0.0)) == 7  # the first after 5 and 6, which were against all
    policy.reset(7)
    assert policy.vectors(7) == slice(4, 7)
    assert policy.vectors(8) == slice(0, 8)
