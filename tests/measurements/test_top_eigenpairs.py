from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_callbacks import ConfigurationError, FisherSpectrum, RefusedError, TopEigenpairs
from curvature_callbacks.compute.offline import offline_problem
from curvature_callbacks.operators.fisher import EmpiricalFisherOperator
from curvature_callbacks.record import scalar_tags
from tests.cases import CASES
from tests.reference import case_loss, dense_hessian, fisher_eigenvalues, sample_gradients, stacked

CASE = CASES["mlp"]
PSD_METRICS = {"lambda_max", "lambda_min", "residual_lambda_max", "residual_lambda_min", "residual_max", "num_converged"}


def truth(model: nn.Module, names: list[str] | None = None) -> Tensor:
    names = names or [name for name, _ in model.named_parameters()]
    return torch.linalg.eigvalsh(dense_hessian(model, case_loss(CASE, CASE.microbatches()), names)).flip(0)


def problem_of(case: Any = CASE, **options: Any) -> Any:
    return offline_problem(case.model(), case.microbatches(), **{"loss": case.loss, "params_filter": None, **options})


def test_the_measurement_reports_the_whole_model_and_its_blocks():
    model = CASE.model()
    measurement = TopEigenpairs(k=4, tol=1e-8, max_matvecs=95, per_block=True)
    with offline_problem(model, CASE.microbatches(), loss=CASE.loss, params_filter=None) as problem:
        (whole, *blocks), state = measurement.measure(problem, measurement.init(problem))
        names = dict(problem.blocks)
        again, _ = measurement.measure(problem, {"error": state["error"]})
    assert whole.scalars["lambda_max"] == pytest.approx(truth(model)[0].item())
    assert whole.scalars["lambda_min"] == pytest.approx(truth(model)[-1].item())
    assert [record.block for record in blocks] == list(names)
    for record in blocks:
        values = truth(model, list(names[record.block]))
        assert record.scalars["lambda_max"] == pytest.approx(values[0].item())
        assert record.scalars["lambda_min"] == pytest.approx(values[-1].item(), abs=1e-10)
    assert state["error"] < 1e-10
    assert again[0].num_matvecs == whole.num_matvecs - 3  # the self-check runs once


@pytest.mark.parametrize("gram", [True, False], ids=["gram", "lanczos"])
def test_the_fisher_of_the_whole_model_and_its_blocks(gram: bool):
    measurement = TopEigenpairs(operator="empirical_fisher", k=4, tol=1e-8, per_block=True)
    with problem_of() as problem:
        problem.max_gram_rows = 6 if gram else 5
        (whole, *blocks), state = measurement.measure(problem, measurement.init(problem))
        names = dict(problem.blocks)
        again, _ = measurement.measure(problem, state)
    gradients = sample_gradients(CASE.model(), CASE.microbatches(), CASE.kind)
    values = fisher_eigenvalues(stacked(gradients))
    assert whole.scalars["lambda_max"] == pytest.approx(values[0].item())
    assert whole.arrays["eigenvalues"][:2] == pytest.approx(values[:2].tolist())
    assert whole.scalars["lambda_min"] == pytest.approx(0.0, abs=1e-12)
    assert [record.block for record in blocks] == list(names)
    for record in blocks:
        own = fisher_eigenvalues(stacked(gradients, list(names[record.block])))
        assert record.scalars["lambda_max"] == pytest.approx(own[0].item())
        assert record.arrays["eigenvalues"][:2] == pytest.approx(own[:2].tolist())
        assert record.metadata["num_samples"] == 6
    for record in (whole, *blocks):
        assert set(record.scalars) == PSD_METRICS  # nothing about negative curvature
        assert record.metadata["reorth_mode"] == ("gram" if gram else "partial")
        assert record.scalars["residual_max"] < 1e-7
        assert record.scalars["num_converged"] == 4.0
    assert state["error"] < 1e-10
    assert again[0].num_matvecs <= whole.num_matvecs - 2  # the self-check runs once
    assert (state["starts"] == {}) == gram  # the Gram needs no start


@pytest.mark.parametrize("unit", ["sequence", "token"])
def test_what_the_fisher_is_made_of_stands_in_the_record(unit: Any):
    case = CASES["gpt2"]
    microbatches = case.microbatches()
    microbatches[1]["labels"][:] = -100
    measurement = TopEigenpairs(operator="empirical_fisher", sample_unit=unit, k=1, which="LA")
    with offline_problem(case.model(), microbatches, loss=None, params_filter=None) as problem:
        ((record,), _) = measurement.measure(problem, None)
    targets = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in microbatches)
    expected = {"fisher": "empirical", "sample_unit": unit, "num_samples": 5, "num_targets": targets}
    assert expected.items() <= record.metadata.items()
    assert record.metadata["reorth_mode"] == {"sequence": "gram", "token": "partial"}[unit]
    assert "lambda_min" not in record.scalars  # the small end was not asked for


def test_names_and_tags_differ_from_those_of_every_other_measurement():
    measurements = [
        TopEigenpairs(k=2, max_matvecs=6, per_block=True),
        TopEigenpairs(operator="empirical_fisher", k=2, per_block=True),
        TopEigenpairs(operator="empirical_fisher", sample_unit="token", k=2, max_matvecs=6, per_block=True),
        FisherSpectrum(),
    ]
    names = [measurement.name for measurement in measurements]
    assert names == ["hessian", "empirical_fisher_eigenpairs", "empirical_fisher_token_eigenpairs", "empirical_fisher"]
    with problem_of() as problem:
        tags = [set(scalar_tags(measurement.measure(problem, measurement.init(problem))[0])) for measurement in measurements]
    assert sum(map(len, tags)) == len(set().union(*tags))
    assert "curvature/empirical_fisher_eigenpairs_lambda_max" in tags[1]
    assert "curvature_empirical_fisher_eigenpairs/residual_lambda_min" in tags[1]
    assert any(tag.startswith("curvature_empirical_fisher_eigenpairs_lambda_max/") for tag in tags[1])
    assert "curvature_empirical_fisher_eigenpairs_over_blocks/residual_max_median" in tags[1]
    assert "curvature/empirical_fisher_token_eigenpairs_lambda_max" in tags[2]


def test_the_gram_is_shared_with_the_fisher_spectrum():
    with problem_of() as problem:
        fisher = FisherSpectrum()
        fisher.measure(problem, fisher.init(problem))
        grams = problem.grams()
        ((record,), _) = TopEigenpairs(operator="empirical_fisher", k=2).measure(problem, None)
        assert problem.grams() is grams
        spectrum = fisher.measure(problem, fisher.init(problem))[0][0]
    assert record.scalars["lambda_max"] == pytest.approx(spectrum.scalars["full_lambda_max"], rel=1e-12)


@pytest.mark.parametrize("gram", [True, False], ids=["gram", "lanczos"])
def test_wrong_products_are_refused_at_the_first_probe(gram: bool, monkeypatch: pytest.MonkeyPatch):
    right = EmpiricalFisherOperator.jvp
    monkeypatch.setattr(EmpiricalFisherOperator, "jvp", lambda self, v: 0.9 * right(self, v))
    with problem_of() as problem:
        problem.max_gram_rows = 6 if gram else 5
        with pytest.raises(RefusedError, match="same Jacobian"):
            TopEigenpairs(operator="empirical_fisher", k=2).measure(problem, None)


def test_a_loss_known_as_a_mean_only_is_asked_for_by_row():
    def mean(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    with problem_of(loss=mean) as problem, pytest.raises(ConfigurationError, match="one loss per row"):
        TopEigenpairs(operator="empirical_fisher", k=2).measure(problem, None)


@pytest.mark.parametrize(
    "options",
    [
        {"k": 0},
        {"which": "SM"},
        {"tol": 0.0},
        {"k": 8, "max_matvecs": 7},
        {"operator": "gauss_newton"},
        {"operator": "empirical_fisher", "sample_unit": "word"},
        {"operator": "hessian", "sample_unit": "token"},
    ],
)
def test_the_measurement_names_its_bad_option(options: dict[str, Any]):
    with pytest.raises(ConfigurationError, match=f"`{list(options)[-1]}`"):
        TopEigenpairs(**options)


WARM = TopEigenpairs(k=2, which="LA", tol=1e-3, max_matvecs=60, per_block=True)


def spent(measurement: TopEigenpairs, problem: Any, state: Any) -> list[int]:
    return [record.num_matvecs for record in measurement.measure(problem, state)[0]]


def test_the_next_probe_starts_from_the_vectors_of_this_one():
    """On the model and in every block, at the same place: none takes more products than a cold start."""
    cold = replace(WARM, warm_start=False)
    with problem_of() as problem:
        state = WARM.measure(problem, None)[1]
        assert {key: len(start) for key, start in state["starts"].items()} == {
            "": 79,
            **{
                block: sum(problem.objective.parameters[name].numel() for name in names)
                for block, names in problem.blocks.items()
            },
        }
        assert all(start.device.type == "cpu" for start in state["starts"].values())
        warm, again = spent(WARM, problem, state), spent(cold, problem, {"error": 0.0})
    assert sum(warm) < sum(again)
    assert warm[0] < again[0]


def test_every_block_starts_from_its_own_vector():
    cold = replace(WARM, warm_start=False)
    with problem_of() as problem:
        state = WARM.measure(problem, None)[1]
        assert state is not None
        warm, again = spent(WARM, problem, state), spent(cold, problem, {"error": 0.0})
        lost = spent(WARM, problem, {"error": 0.0, "starts": {"": state["starts"][""]}})
    assert sum(warm[1:]) < sum(again[1:])
    assert lost == [warm[0], *again[1:]]


def test_the_start_vector_is_drawn_with_the_seed_of_the_probe():
    found = []
    for seed in (1, 1, 2):
        with problem_of(seed=seed) as problem:
            record = TopEigenpairs(k=1, tol=1e-3, max_matvecs=5).measure(problem, {"error": 0.0})[0][0]
        assert record.metadata["seed"] == seed
        found.append(record.arrays["residuals"])
    assert found[0] == found[1] != found[2]


def test_without_a_warm_start_nothing_is_kept():
    with problem_of() as problem:
        state = replace(WARM, warm_start=False).measure(problem, None)[1]
    assert state["starts"] == {}


def test_vectors_of_other_parameters_begin_anew():
    with problem_of() as problem:
        state = WARM.measure(problem, None)[1]
        state["starts"][""] = state["starts"][""][:5]
        state["starts"]["0"] = None  # as from a checkpoint in JSON
        assert WARM.measure(problem, state)[0][0].scalars["lambda_max"] == pytest.approx(
            truth(CASE.model())[0].item(), rel=1e-4
        )


def test_a_warm_start_finds_what_the_vectors_lack():
    """From the eigenvector of the second largest eigenvalue the largest is found all the same."""
    with problem_of() as problem:
        names = [name for name, _ in problem.model.named_parameters()]
        H = dense_hessian(CASE.model(), case_loss(CASE, CASE.microbatches()), names)
        second = torch.linalg.eigh(H).eigenvectors[:, -2]
        state = {"error": 0.0, "starts": {"": second}}
        record = TopEigenpairs(k=1, which="LA", tol=1e-3, max_matvecs=60).measure(problem, state)[0][0]
    assert record.scalars["lambda_max"] == pytest.approx(torch.linalg.eigvalsh(H)[-1].item(), rel=1e-5)


def test_a_limit_in_seconds_ends_a_run_at_its_first_look():
    with problem_of() as problem:
        record = TopEigenpairs(k=2, tol=1e-9, max_matvecs=60, max_seconds=1e-9).measure(problem, {"error": 0.0})[0][0]
    assert record.num_matvecs <= 5
    assert record.scalars["num_converged"] < 2
    assert any("did not reach" in message for message in record.metadata["warnings"])
