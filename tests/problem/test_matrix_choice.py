"""Options that say something about a matrix and those that do not; what a matrix asks of a run."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_callbacks import (
    ConfigurationError,
    CurvatureMonitor,
    SpectralDensity,
    TopEigenpairs,
    compute_spectrum,
)
from curvature_callbacks.compute.offline import offline_problem
from curvature_callbacks.model.loss.fisher_type import FisherType
from curvature_callbacks.problem.matrix_choice import MatrixChoice
from tests.problem.matrix_cases import D, measured, microbatches, network, truth


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"operator": "gauss"}, "`operator` must be one of 'hessian', 'ggn'"),
        ({"operator": 3}, "`operator` must be one of"),
        ({"sample_unit": "token"}, "`sample_unit`='token' has no meaning for `operator`='hessian'"),
        ({"operator": "ggn", "num_draws": 2}, "`num_draws`=2 has no meaning for `operator`='ggn'"),
        ({"operator": "empirical_fisher", "num_draws": 2}, "`num_draws`=2 has no meaning"),
        ({"operator": "kfac", "num_draws": 2}, "`num_draws`=2 needs `fisher`='sampled'"),
        ({"operator": "ggn", "fisher": "exact"}, "`fisher`='exact' has no meaning"),
        ({"operator": "sampled_fisher", "sharing": "reduce"}, "`sharing`='reduce' has no meaning"),
        ({"operator": "kfac", "sample_unit": "token"}, "`sample_unit`='token' has no meaning"),
        ({"operator": "kfac", "sharing": "mean"}, "`sharing` must be one of"),
        ({"operator": "sampled_fisher", "num_draws": 0}, "`num_draws` must be"),
    ],
)
@pytest.mark.parametrize("cls", [TopEigenpairs, SpectralDensity, MatrixChoice])
def test_bad_options_are_refused_at_once(cls: Any, options: Any, said: str):
    with pytest.raises(ConfigurationError, match=said):
        cls(**options)


def mean_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def row_losses(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


@pytest.mark.parametrize("cls", [TopEigenpairs, SpectralDensity])
@pytest.mark.parametrize(
    ("options", "loss", "said"),
    [
        ({"operator": "empirical_fisher"}, mean_loss, "one loss per row"),
        ({"operator": "empirical_fisher", "sample_unit": "token"}, row_losses, "losses of single targets"),
        ({"operator": "sampled_fisher"}, row_losses, "likelihood of the loss"),
        ({"operator": "ggn"}, row_losses, "the GGN needs the logits"),
        ({"operator": "kfac", "fisher": "exact"}, row_losses, "likelihood of the loss"),
        ({"operator": "preconditioned_hessian"}, "cross_entropy", "needs the `optimizer`"),
    ],
)
def test_what_the_run_cannot_have_stops_it_before_its_first_step(cls: Any, options: Any, loss: Any, said: str):
    watching = CurvatureMonitor(network(), probes=microbatches(), loss=loss, measure=[cls(**options)])
    with pytest.raises(ConfigurationError, match=said):
        watching.check()


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_kronecker_factors_of_given_labels_need_the_mean_loss_only(name: Any):
    measure = [TopEigenpairs(operator=name, k=1, which="LA")]
    found = []
    for loss in (mean_loss, row_losses):
        watching = CurvatureMonitor(network(), probes=microbatches(), loss=loss, measure=measure)
        watching.check()
        found.append(watching.step(0)[1].scalars["lambda_max"])
    assert found[0] == pytest.approx(found[1], rel=1e-9)


@pytest.mark.parametrize("loss", [mean_loss, row_losses])
@pytest.mark.parametrize("name", ["hessian", "finite_difference_hessian"])
def test_a_hessian_asks_nothing_of_the_loss(name: Any, loss: Any):
    watching = CurvatureMonitor(network(), probes=microbatches(), loss=loss, measure=[TopEigenpairs(operator=name, k=1)])
    watching.check()
    assert watching.step(0)[1].scalars["lambda_max"] == pytest.approx(
        torch.linalg.eigvalsh(truth("hessian"))[-1].item(), rel=1e-3
    )


def test_before_the_first_step_of_adam_there_is_a_reason_and_no_number():
    for cls in (TopEigenpairs, SpectralDensity):
        (record,) = measured(cls(operator="preconditioned_hessian"), lambda model: torch.optim.Adam(model.parameters()))
        assert not record.scalars
        assert "no step yet" in record.metadata["reason"]
        assert not record.failed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("which", ["BE", "SA", "LM"])
def test_differences_in_sixteen_bits_say_nothing_about_negative_curvature(which: Any, dtype: torch.dtype):
    options: Any = {"operator": "finite_difference_hessian", "loss": "cross_entropy", "k": 2}
    with pytest.raises(ConfigurationError, match=r"bfloat16 or float16.*`which`='LA'"):
        compute_spectrum(network(dtype), microbatches(dtype), which=which, **options)
    measurement = TopEigenpairs(operator="finite_difference_hessian", which=which)
    with pytest.raises(ConfigurationError, match="bfloat16 or float16"):
        CurvatureMonitor(network(dtype), probes=microbatches(dtype), loss="cross_entropy", measure=[measurement]).check()
    top = compute_spectrum(network(dtype), microbatches(dtype), which="LA", **options)
    assert "most_negative_eigenvalue" not in top.metrics()


def test_fisher_types_name_the_samples():
    assert MatrixChoice(operator="sampled_fisher", sample_unit="token", num_draws=3).fisher_type == FisherType(
        fisher="sampled", sample_unit="token", num_draws=3
    )
    assert MatrixChoice(operator="kfac", fisher="exact").fisher_type == FisherType(fisher="exact")


def lambda_max(matrix: Tensor) -> float:
    return torch.linalg.eigvalsh((matrix + matrix.T) / 2)[-1].item()


def test_draws_and_samples_asked_for_are_those_of_the_matrix():
    model = network()
    options: Any = {"loss": "cross_entropy", "params_filter": None, "seed": 3}
    with offline_problem(model, microbatches(), **options) as problem:
        eye = torch.eye(60, dtype=D)
        for num_draws in (1, 4):
            asked: Any = {"sample_unit": "token", "num_draws": num_draws}
            measurement = TopEigenpairs(operator="sampled_fisher", k=1, which="LA", tol=1e-8, max_matvecs=60, **asked)
            ((record,), _) = measurement.measure(problem, None)
            expected = lambda_max(problem.sampled_fisher(**asked).matmat(eye))
            assert record.scalars["lambda_max"] == pytest.approx(expected, rel=1e-8)
            assert asked.items() <= record.metadata.items()


@pytest.mark.parametrize("fisher", ["empirical", "sampled", "exact"])
def test_kronecker_factors_are_those_of_the_fisher_asked_for(fisher: Any):
    with offline_problem(network(), microbatches(), loss="cross_entropy", params_filter=None) as problem:
        ((record,), _) = TopEigenpairs(operator="kfac", fisher=fisher, k=1, which="LA").measure(problem, None)
        operator = problem.kfac(fisher_type=FisherType(fisher=fisher), sharing="expand", corrected=False)
        expected = lambda_max(operator.matmat(torch.eye(50, dtype=D)))
    assert record.scalars["lambda_max"] == pytest.approx(expected, rel=1e-8)


def test_a_density_of_differences_in_sixteen_bits_is_refused_before_the_first_step():
    measurement = SpectralDensity(operator="finite_difference_hessian")
    watching = CurvatureMonitor(
        network(torch.bfloat16), probes=microbatches(torch.bfloat16), loss="cross_entropy", measure=[measurement]
    )
    with pytest.raises(ConfigurationError, match="bfloat16 or float16"):
        watching.check()
