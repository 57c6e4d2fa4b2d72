"""Records of `SpectralDensity` against dense Hessians and Fishers."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_callbacks import ConfigurationError, FisherSpectrum, RefusedError, TopEigenpairs
from curvature_callbacks.compute.offline import offline_problem
from curvature_callbacks.linalg.quadrature import spectral_density
from curvature_callbacks.measurements.spectral_density import SpectralDensity
from curvature_callbacks.record import Record, metric_tag, scalar_tags
from tests.cases import CASES
from tests.reference import case_loss, dense_fisher, dense_hessian, sample_gradients, stacked

CASE = CASES["mlp"]
ESTIMATES = ("trace", "frobenius_norm", "effective_rank", "slq_negative_mass", "slq_negative_fraction")
CONVEX = ESTIMATES[:3]


def problem_of(case: Any = CASE, **options: Any) -> Any:
    return offline_problem(case.model(), case.microbatches(), **{"loss": case.loss, "params_filter": None, **options})


@cache
def truth(operator: str) -> Tensor:
    """All eigenvalues."""
    model, batches = CASE.model(), CASE.microbatches()
    if operator == "hessian":
        names = [name for name, _ in model.named_parameters()]
        return torch.linalg.eigvalsh(dense_hessian(model, case_loss(CASE, batches), names))
    return torch.linalg.eigvalsh(dense_fisher(stacked(sample_gradients(model, batches, CASE.kind))))


def record_of(**options: Any) -> Record:
    with problem_of() as problem:
        ((record,), _) = SpectralDensity(**options).measure(problem, None)
    return record


@pytest.mark.parametrize("operator", ["hessian", "empirical_fisher"])
def test_estimates_are_those_of_the_dense_matrix(operator: Any):
    """16 probes; 45 steps in 79 dimensions leave no bias to see: exact up to the standard errors, which are small."""
    record = record_of(operator=operator, num_probes=16, num_steps=45)
    values = truth(operator)
    expected = {"trace": values.sum().item(), "frobenius_norm": values.norm().item()}
    if operator == "hessian":
        expected["slq_negative_mass"] = (values[values < 0].sum() / -values.abs().sum()).item()
    for metric, value in expected.items():
        error = record.scalars[f"{metric}_standard_error"]
        assert abs(record.scalars[metric] - value) < 4 * error, metric
        assert error < 0.4 * abs(value), metric
    shares = values.abs()[values.abs() > 1e-12 * values.abs().max()] / values.abs().sum()
    entropy = -(shares * shares.log()).sum()
    assert record.scalars["effective_rank"] == pytest.approx(entropy.exp().item(), rel=0.2)
    assert record.metadata["lambda_abs_max"] == pytest.approx(values.abs().max().item(), rel=1e-6)


def test_numbers_are_those_of_the_quadrature_of_the_operator():
    with problem_of(seed=5) as problem:
        ((record,), _) = SpectralDensity(num_probes=3, num_steps=7, deflate=0).measure(problem, 0.0)
        expected = spectral_density(problem.hessian(), num_probes=3, num_steps=7, seed=5)
    assert record.scalars == expected.metrics()
    assert record.arrays["grid"] == expected.grid.tolist()
    assert record.arrays["density"] == expected.density.tolist()
    assert record.arrays["density_standard_error"] == expected.density_standard_error.tolist()
    settings = {"num_probes": 3, "num_steps": 7, "seed": 5, "dtype": "float64", "asymmetry": 0.0, "width": expected.width}
    assert settings.items() <= record.metadata.items()


@pytest.mark.parametrize(
    ("options", "metrics"), [({}, ESTIMATES), ({"operator": "empirical_fisher"}, CONVEX)], ids=["hessian", "fisher"]
)
def test_negative_curvature_is_for_operators_that_may_have_it(options: Any, metrics: tuple[str, ...]):
    record = record_of(num_probes=2, num_steps=5, **options)
    assert set(record.scalars) == {metric + suffix for metric in metrics for suffix in ("", "_standard_error")}


def test_outliers_are_taken_out_first_and_their_products_count():
    with problem_of() as problem:
        plain, deflated = (
            SpectralDensity(num_probes=8, num_steps=20, deflate=deflate).measure(problem, 0.0)[0][0] for deflate in (0, 4)
        )
        most = SpectralDensity(num_probes=2, num_steps=2, deflate=3).measure(problem, 0.0)[0][0]
    assert (plain.metadata["num_deflated"], deflated.metadata["num_deflated"]) == (0, 4)
    assert deflated.num_matvecs > plain.num_matvecs
    assert most.num_matvecs <= 2 * 2 + 40
    for metric in ("trace", "frobenius_norm"):
        error = f"{metric}_standard_error"
        assert deflated.scalars[error] < 0.6 * plain.scalars[error]
        expected = {"trace": truth("hessian").sum(), "frobenius_norm": truth("hessian").norm()}[metric]
        assert abs(deflated.scalars[metric] - expected) < 4 * deflated.scalars[error]


def test_many_outliers_have_the_products_they_take():
    """Four products a pair where that is more than forty."""
    record = record_of(num_probes=2, num_steps=4, deflate=30)
    assert record.metadata["num_deflated"] == 30
    assert 40 < record.num_matvecs - 2 * 4 - 3 <= 4 * 30


def test_the_operator_is_checked_at_the_first_probe_only():
    with problem_of() as problem:
        measurement = SpectralDensity(num_probes=2, num_steps=4, deflate=0)
        ((first,), state) = measurement.measure(problem, measurement.init(problem))
        ((second,), again) = measurement.measure(problem, state)
    assert first.num_matvecs == second.num_matvecs + 3 == 2 * 4 + 3
    assert state == again < 1e-10
    assert first.scalars == second.scalars


def test_a_wrong_second_derivative_is_refused():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * 3 * ctx.saved_tensors[0].detach() ** 2

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(Wrong.apply(self.inner(x)))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Net().double()
    batch = F.one_hot(torch.arange(5)).double(), torch.tensor([0, 1, 2, 0, 1])
    with (
        offline_problem(model, batch, loss="cross_entropy", params_filter=None) as problem,
        pytest.raises(RefusedError),
    ):
        SpectralDensity(num_probes=2, num_steps=3).measure(problem, None)


def test_names_and_tags_differ_from_those_of_other_measurements():
    measurements = [
        SpectralDensity(num_probes=2, num_steps=4),
        SpectralDensity(operator="empirical_fisher", num_probes=2, num_steps=4),
        SpectralDensity(operator="empirical_fisher", sample_unit="token", num_probes=2, num_steps=4),
        TopEigenpairs(k=2, max_matvecs=6),
        TopEigenpairs(operator="empirical_fisher", k=2),
        FisherSpectrum(),
    ]
    assert [measurement.name for measurement in measurements[:3]] == [
        "hessian_density",
        "empirical_fisher_density",
        "empirical_fisher_token_density",
    ]
    with problem_of() as problem:
        tags = [set(scalar_tags(measurement.measure(problem, measurement.init(problem))[0])) for measurement in measurements]
    assert sum(map(len, tags)) == len(set().union(*tags))
    assert "curvature/hessian_density_trace" in tags[0]
    assert "curvature_hessian_density/trace_standard_error" in tags[0]


def test_every_tag_stands_in_the_docstring():
    record = record_of(num_probes=2, num_steps=4)
    text = SpectralDensity.__doc__ or ""
    for metric in record.scalars:
        tag = metric_tag(record, metric).replace("hessian_density", "<m>")
        generic = "curvature_<m>/<metric>_standard_error"
        assert f"`{generic if metric.endswith('_standard_error') else tag}`" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operator": "fisher"}, "`operator` must be one of"),
        ({"sample_unit": "token"}, "`sample_unit`='token' has no meaning"),
        ({"num_probes": 1}, "`num_probes` must be at least 2"),
        ({"num_steps": 0}, "`num_steps` must be an integer of at least 1"),
        ({"deflate": -1}, "`deflate` must be a number of eigenpairs, 0 for none, got -1"),
        ({"deflate": True}, "`deflate` must be a number of eigenpairs"),
    ],
)
def test_bad_options_are_named(options: Any, message: str):
    with pytest.raises(ConfigurationError, match=message):
        SpectralDensity(**options)
