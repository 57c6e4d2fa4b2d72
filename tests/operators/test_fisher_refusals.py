"""What has no Fisher, and what a Fisher leaves out: rows, losses and kernels."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_callbacks import ConfigurationError, ProbeError, RefusedError, compute_fisher_spectrum
from curvature_callbacks.operators.self_checks import check_adjoint
from tests.cases import CASES
from tests.operators.fisher_cases import fisher_of, prefixed, problem_of, vector
from tests.operators.operator_cases import dense, mean_cross_entropy, row_cross_entropy, with_fused_kernel
from tests.reference import dense_fisher, relative_error, sample_gradients, stacked


def bad_input(batch: Any) -> None:
    batch[0][1, 0] = float("nan")


def bad_gradient(batch: Any) -> None:
    batch[0][1] = 0.0


def rooted(model: nn.Module, batch: Any) -> Tensor:
    """Finite everywhere, with an infinite slope at zero."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none") * model[0](batch[0]).sum(1).abs().sqrt()


@pytest.mark.parametrize(("spoil", "loss"), [(bad_input, "cross_entropy"), (bad_gradient, rooted)])
def test_rows_that_are_not_finite_do_not_count(spoil: Any, loss: Any):
    case = CASES["mlp"]
    model, microbatches = case.model(), case.microbatches()
    model[0].bias.data.zero_()
    spoil(microbatches[0])
    clean = [tuple(part[[0, 2]] for part in microbatches[0]), *microbatches[1:]]
    with fisher_of(case, model, clean, loss=loss) as operator:
        v = vector(operator.shape[0])[:, None]
        expected = operator.matmat(v)
    with fisher_of(case, model, microbatches, loss=loss) as operator:
        assert operator.rows.tolist() == [0, 2, 3, 4, 5]
        assert operator.normaliser == 5
        assert torch.allclose(operator.matmat(v), expected)
    with pytest.warns(UserWarning, match="1 of 6 samples were left out"):  # and so says the Gram
        assert compute_fisher_spectrum(model, microbatches, loss=loss).full.num_samples == operator.normaliser


def test_a_probe_without_a_usable_row_has_no_fisher():
    case = CASES["mlp"]
    x, y = case.microbatches((3,))[0]
    x[:] = float("nan")
    with problem_of(case, case.model(), [(x, y)]) as problem, pytest.raises(ProbeError, match="no row"):
        problem.empirical_fisher()


@pytest.mark.parametrize(
    ("loss", "unit", "message"),
    [
        (mean_cross_entropy, "sequence", "one loss per row"),
        (mean_cross_entropy, "token", "one loss per row"),
        (row_cross_entropy, "token", "single targets"),
        ("cross_entropy", "word", "`sample_unit` must be one of 'sequence', 'token', got 'word'"),
    ],
)
def test_what_the_loss_does_not_tell_is_asked_for(loss: Any, unit: Any, message: str):
    case = CASES["mlp"]
    problem = problem_of(case, case.model(), case.microbatches(), loss=loss)
    with problem as found, pytest.raises(ConfigurationError, match=message):
        found.empirical_fisher(sample_unit=unit)


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_attention_without_a_second_derivative_is_refused(implementation: str):
    case = CASES["gpt2"]
    with problem_of(case, case.model(), case.microbatches((2,))) as problem:
        problem.model.config._attn_implementation = implementation
        with pytest.raises(RefusedError, match=implementation):
            problem.empirical_fisher()


@pytest.mark.parametrize(("place", "prefix"), [("inside", ""), ("last", ""), ("inside", "a"), ("last", "b")])
def test_a_kernel_without_a_second_derivative_is_caught(place: str, prefix: str):
    """Also where the wrong product is symmetric (everything before the kernel) or plainly zero."""
    model = with_fused_kernel(place)
    problem = problem_of(CASES["mlp"], model, CASES["mlp"].microbatches(), **prefixed(prefix))
    with problem as found, pytest.raises(RefusedError, match="no second derivative"):
        check_adjoint(found.empirical_fisher(), seed=0)


@pytest.mark.parametrize(("place", "prefix"), [("first", ""), ("inside", "b")])
def test_such_a_kernel_before_everything_measured_does_no_harm(place: str, prefix: str):
    case, model = CASES["mlp"], with_fused_kernel(place)
    truth = sample_gradients(model, case.microbatches(), case.kind)
    names = [name for name in truth if name.startswith(prefix)]
    with fisher_of(case, model, case.microbatches(), **prefixed(prefix)) as operator:
        assert check_adjoint(operator, seed=0) < 1e-10
        assert relative_error(dense(operator), dense_fisher(stacked(truth, names))) < 1e-10


def test_kernels_that_change_their_answer_are_refused(monkeypatch: pytest.MonkeyPatch):
    case = CASES["mlp"]
    with fisher_of(case, case.model(), case.microbatches()) as operator:
        product = operator.vjp
        monkeypatch.setattr(operator, "vjp", lambda u: product(u) * (1 + 0.1 * torch.rand(())))
        with pytest.raises(RefusedError, match="same answer"):
            check_adjoint(operator, seed=0)
