"""The Fisher of drawn labels, against the gradients of the same draws and against the GGN."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from curvature_callbacks import ConfigurationError, Problem, compute_fisher_spectrum
from curvature_callbacks.model.loss.fisher_type import FisherType
from curvature_callbacks.model.loss.surrogates import surrogates
from curvature_callbacks.operators.fisher import SampledFisherOperator
from curvature_callbacks.operators.ggn import GGNOperator
from curvature_callbacks.operators.self_checks import check_adjoint
from tests.cases import CASES, CLASSES
from tests.operators.fisher_cases import TOLERANCE, prefixed, problem_of, vector
from tests.operators.operator_cases import dense
from tests.operators.test_fisher_refusals import bad_input, row_cross_entropy
from tests.reference import relative_error


def drawn_gradients(problem: Problem, unit: str, *, seed: int, num_draws: int) -> Tensor:
    """(S, P), one backward pass for every row or target, at the labels the surrogates drew."""
    fisher_type = FisherType(fisher="sampled", num_draws=num_draws)
    leaves = problem.objective.leaves()
    found = []
    for place, batch in enumerate(problem.microbatches):
        losses = problem.objective(batch, leaves)
        for surrogate in surrogates(fisher_type, losses, seed=seed + place):
            rows_ = surrogate(losses)
            for i in surrogate.active.nonzero()[:, 0].tolist():
                single = [rows_[i]]
                if unit == "token":
                    log_p, valid = losses.predictive.logits.log_softmax(-1), losses.predictive.valid
                    single = [-log_p[i, t, surrogate.draws[i, t]] for t in valid[i].nonzero()[:, 0].tolist()]
                for one in single:
                    options: Any = {"retain_graph": True, "materialize_grads": True, "allow_unused": True}
                    parts = torch.autograd.grad(one, list(leaves.values()), **options)
                    found.append(torch.cat([part.flatten() for part in parts]).double())
    return torch.stack(found)


@pytest.mark.parametrize("num_draws", [1, 3])
@pytest.mark.parametrize(("name", "unit"), [("gpt2", "sequence"), ("gpt2", "token"), ("bert", "token"), ("mlp", "sequence")])
def test_a_sampled_fisher_is_the_mean_outer_product_at_the_drawn_labels(name: str, unit: str, num_draws: int):
    case = CASES[name]
    with problem_of(case, case.model(), case.microbatches()) as problem:
        operator = SampledFisherOperator(problem.objective, problem.microbatches, sample_unit=unit, num_draws=num_draws, seed=7)
        G = drawn_gradients(problem, unit, seed=7, num_draws=num_draws)
        v = vector(G.shape[1])
        assert operator.normaliser == len(G)
        assert relative_error(operator.matmat(v[:, None])[:, 0], G.T @ (G @ v) / len(G)) < TOLERANCE
        assert relative_error(operator.vjp(torch.ones(operator.num_outputs)), G.sum(0)) < TOLERANCE
        assert check_adjoint(operator, seed=0) < TOLERANCE


@pytest.mark.parametrize(("name", "loss"), [("gpt2", None), ("mlp", "cross_entropy"), ("mlp", "mse"), ("mlp", "bce")])
def test_a_sampled_fisher_has_the_spectrum_of_the_gram_with_its_seed(name: str, loss: str | None):
    case = CASES[name]
    microbatches = case.microbatches()
    if loss in ("mse", "bce"):
        microbatches = [(x, F.one_hot(y, CLASSES).double()) for x, y in microbatches]
    chosen = prefixed("transformer.ln_f" if name == "gpt2" else "0.")
    options: Any = {"loss": loss, "fisher": "sampled", "block_structure": "none", "seed": 5}
    expected = compute_fisher_spectrum(case.model(), microbatches, **options, **chosen).full.eigenvalues
    with problem_of(case, case.model(), microbatches, loss=loss, **chosen) as problem:
        operator = SampledFisherOperator(problem.objective, problem.microbatches, seed=5)
        found = torch.linalg.eigvalsh(dense(operator)).flip(0)
        assert relative_error(found[: len(expected)], expected) < TOLERANCE
        other = SampledFisherOperator(problem.objective, problem.microbatches, seed=6)
        assert not torch.allclose(dense(other), dense(operator))


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "bce"])
def test_sampled_fishers_average_to_the_ggn(loss: str):
    case, num_draws = CASES["mlp"], 400
    microbatches = case.microbatches()
    if loss != "cross_entropy":
        microbatches = [(x, F.one_hot(y, CLASSES).double()) for x, y in microbatches]
    with problem_of(case, case.model(), microbatches, loss=loss) as problem:
        v = vector(sum(p.numel() for p in problem.objective.parameters.values()))
        expected = v @ GGNOperator(problem.objective, problem.microbatches).matmat(v[:, None])[:, 0]
        operator = SampledFisherOperator(problem.objective, problem.microbatches, sample_unit="token", num_draws=num_draws)
        squares = operator.jvp(v).square()  # (S,)
        assert operator.num_outputs == 6 * num_draws
    error = squares.std() / len(squares) ** 0.5
    assert abs(squares.mean() - expected) < 4 * error
    assert error < 0.1 * expected


def test_a_loss_without_a_likelihood_has_no_sampled_fisher():
    case = CASES["mlp"]
    found = problem_of(case, case.model(), case.microbatches(), loss=row_cross_entropy)
    with found as problem, pytest.raises(ConfigurationError, match="likelihood"):
        SampledFisherOperator(problem.objective, problem.microbatches)


def test_sampled_rows_that_are_not_finite_do_not_count():
    case = CASES["mlp"]
    model, microbatches = case.model(), case.microbatches()
    bad_input(microbatches[0])
    clean = [tuple(part[[0, 2]] for part in microbatches[0]), *microbatches[1:]]
    with problem_of(case, model, clean) as problem:
        expected = dense(SampledFisherOperator(problem.objective, clean, seed=3))
        found = SampledFisherOperator(problem.objective, microbatches, seed=3)
        assert found.rows.tolist() == [0, 2, 3, 4, 5]
        assert torch.allclose(dense(found), expected)
