"""Every matrix of the table, through `compute_spectrum` and `TopEigenpairs`, against dense float64 matrices."""

import dataclasses
from typing import Any, get_args

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from curvature_callbacks import (
    SpectralDensity,
    TopEigenpairs,
    compute_spectrum,
)
from curvature_callbacks.compute.offline import offline_problem
from curvature_callbacks.problem.matrix import MATRICES, OperatorName
from curvature_callbacks.problem.matrix_choice import MatrixChoice
from curvature_callbacks.record import scalar_tags
from tests.problem.matrix_cases import D, adam, ends, everything, measured, microbatches, network, truth
from tests.reference import dense_fisher, sample_gradients, stacked


@pytest.mark.parametrize(
    ("name", "accuracy"),
    [
        ("hessian", 1e-9),
        ("ggn", 1e-9),
        ("empirical_fisher", 1e-9),
        ("preconditioned_hessian", 1e-9),
        ("finite_difference_hessian", 1e-5),
    ],
)
def test_eigenvalues_are_those_of_the_dense_matrix(name: Any, accuracy: float):
    model = network()
    optimizer = adam(model) if name == "preconditioned_hessian" else None
    found = compute_spectrum(
        model, microbatches(), operator=name, loss="cross_entropy", optimizer=optimizer, k=6, tol=1e-7, max_matvecs=150
    )
    values = torch.linalg.eigvalsh(truth(name))
    assert (found.eigenvalues - ends(values)).abs().max() <= accuracy * values.abs().max()
    assert found.is_psd == (name in ("ggn", "empirical_fisher"))
    assert found.reorth_mode == {"empirical_fisher": "gram"}.get(name, "partial")
    assert (found.product_error > 0) == (name == "finite_difference_hessian")


@pytest.mark.parametrize("unit", ["sequence", pytest.param("token", marks=pytest.mark.slow)])
def test_the_sampled_fisher_comes_to_the_ggn(unit: Any):
    """At one target a row; the mean over seeds of `<F, G>` and of the trace, each within four standard errors."""
    model, G = network(), truth("ggn")
    found = []
    for seed in range(15):
        options: Any = {"loss": "cross_entropy", "params_filter": None, "seed": seed}
        with offline_problem(model, microbatches(), **options) as problem:
            F_seed = problem.sampled_fisher(sample_unit=unit, num_draws=3).matmat(torch.eye(len(G), dtype=D))
        found.append(torch.stack([F_seed.trace(), (F_seed * G).sum()]))
    values = torch.stack(found)
    expected = torch.stack([G.trace(), (G * G).sum()])
    assert ((values.mean(0) - expected).abs() <= 4 * values.std(0) / len(values) ** 0.5).all()


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_kronecker_pairs_are_those_of_the_dense_product(sharing: Any, corrected: bool):
    """One position a row: `A` and `G` are plain second moments of inputs and output gradients."""
    model = network()
    (inputs, targets), dense = everything(model), []
    hidden = model[:3](inputs).detach()
    logits = model[3](hidden).detach().requires_grad_()
    (b_last,) = torch.autograd.grad(F.cross_entropy(logits, targets, reduction="sum"), logits)
    first = model[0](inputs).detach().requires_grad_()
    (b_first,) = torch.autograd.grad(F.cross_entropy(model[1:](first), targets, reduction="sum"), first)
    extended = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=D)], 1)
    for a, b in ((extended, b_first), (hidden, b_last)):
        A, G = a.T @ a / len(a), b.T @ b / len(b)
        if not corrected:
            dense.append(torch.linalg.eigvalsh(torch.kron(G, A)))
            continue
        U_A, U_G = torch.linalg.eigh(A).eigenvectors, torch.linalg.eigh(G).eigenvectors
        rotated = torch.einsum("ni,ij,no,op->npj", a, U_A, b, U_G)
        dense.append(rotated.square().mean(0).flatten())
    name: Any = "ekfac" if corrected else "kfac"
    options: Any = {"operator": name, "sharing": sharing, "loss": "cross_entropy", "which": "LA", "k": 5}
    found = compute_spectrum(model, microbatches(), **options)
    expected = torch.cat(dense).sort(descending=True).values[:5]
    assert torch.allclose(found.eigenvalues, expected, rtol=1e-6)
    assert found.reorth_mode == "kronecker"
    assert found.converged.all()


@pytest.mark.parametrize("name", ["hessian", "ggn", "empirical_fisher", "preconditioned_hessian"])
def test_blocks_are_diagonal_blocks(name: Any):
    whole, *blocks = measured(TopEigenpairs(operator=name, k=2, which="BE", tol=1e-7, max_matvecs=60, per_block=True))
    matrix, start = truth(name), 0
    assert whole.scalars["lambda_max"] == pytest.approx(torch.linalg.eigvalsh(matrix)[-1].item(), rel=1e-8)
    assert [record.block for record in blocks] == ["0", "1", "3"]
    for record, size in zip(blocks, (30, 10, 20), strict=True):
        values = torch.linalg.eigvalsh(matrix[start : start + size, start : start + size])
        assert record.scalars["lambda_max"] == pytest.approx(values[-1].item(), rel=1e-8)
        assert record.scalars["lambda_min"] == pytest.approx(values[0].item(), abs=1e-8 * values[-1].item())
        assert record.metadata["num_params"] == size
        start += size


def test_blocks_without_kronecker_factors_are_absent():
    whole, *blocks = measured(TopEigenpairs(operator="kfac", k=1, which="LA", per_block=True))
    assert [record.block for record in blocks] == ["0", "3"]
    assert whole.metadata["uncovered"] == ["1.weight", "1.bias"]
    assert whole.metadata["num_params"] == 50
    assert whole.scalars["lambda_max"] == max(record.scalars["lambda_max"] for record in blocks)


def test_a_weight_without_its_bias_is_no_block_of_kronecker_factors():
    measurement = TopEigenpairs(operator="kfac", k=1, which="LA", per_block=True)
    options: Any = {"loss": "cross_entropy", "params_filter": None, "block_structure": "parameter"}
    with offline_problem(network(), microbatches(), **options) as problem:
        records, _ = measurement.measure(problem, None)
    assert [record.block for record in records] == [None, "3.weight"]


def test_blocks_the_optimizer_does_not_move_are_absent():
    def of_the_head(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model[3].parameters(), lr=0.1)  # type: ignore[index]

    measurement = TopEigenpairs(operator="preconditioned_hessian", k=1, which="LA", tol=1e-7, max_matvecs=60, per_block=True)
    whole, *blocks = measured(measurement, of_the_head)
    assert [record.block for record in blocks] == ["3"]
    assert whole.metadata["num_params"] == 20
    assert whole.scalars["lambda_max"] == pytest.approx(torch.linalg.eigvalsh(truth("hessian")[40:, 40:])[-1].item(), rel=1e-8)


def test_what_the_matrix_is_made_of_stands_in_the_record():
    expected = {
        "hessian": {"operator": "hessian", "num_params": 60},
        "ggn": {"operator": "ggn", "num_targets": 12},
        "sampled_fisher": {
            "fisher": "sampled",
            "sample_unit": "sequence",
            "num_samples": 12,
            "num_targets": 12,
            "num_draws": 1,
        },
        "ekfac": {"fisher": "empirical", "sharing": "expand", "sample_unit": "sequence"},
    }
    for name, settings in expected.items():
        record = measured(TopEigenpairs(operator=name, k=1, which="LA"))[0]  # type: ignore[arg-type]
        assert settings.items() <= record.metadata.items()


def test_names_and_tags_are_all_different():
    measurements = [
        *(TopEigenpairs(operator=name, k=2, per_block=True) for name in get_args(OperatorName)),
        TopEigenpairs(operator="sampled_fisher", sample_unit="token", k=2),
        TopEigenpairs(operator="kfac", sharing="reduce", k=2),
        TopEigenpairs(operator="kfac", fisher="sampled", k=2),
        *(SpectralDensity(operator=name, num_probes=2, num_steps=3) for name in ("hessian", "ggn", "ekfac")),
    ]
    assert len({measurement.name for measurement in measurements}) == len(measurements)
    tags = [set(scalar_tags(measured(measurement))) for measurement in measurements]
    assert all(tags)
    assert sum(map(len, tags)) == len(set().union(*tags))
    assert "curvature/ggn_lambda_max" in tags[1]
    assert "curvature_ggn_lambda_max/00" in tags[1]
    assert "curvature/kfac_empirical_expand_eigenpairs_lambda_max" in tags[4]
    assert "curvature_finite_difference_hessian/product_error" in tags[7]


@pytest.mark.parametrize("mode", ["full", "partial", "selective", "off", "thick_restart"])
def test_the_mode_asked_for_is_the_one_that_runs(mode: Any):
    found = compute_spectrum(network(), microbatches(), loss="cross_entropy", k=2, reorth_mode=mode, which="LA")
    assert found.reorth_mode == mode
    assert found.eigenvalues[0].item() == pytest.approx(torch.linalg.eigvalsh(truth("hessian"))[-1].item(), rel=1e-5)
    record = measured(TopEigenpairs(k=2, reorth_mode=mode))[0]
    assert record.metadata["reorth_mode"] == mode


def test_a_row_without_a_finite_gradient_is_no_part_of_the_gram():
    batches = microbatches()
    batches[1][0][1] = torch.nan  # the sixth row of twelve
    found = compute_spectrum(network(), batches, operator="empirical_fisher", loss="cross_entropy", k=3, which="LA")
    kept = torch.arange(3) != 1
    others = [batches[0], (batches[1][0][kept], batches[1][1][kept]), batches[2]]
    values = torch.linalg.eigvalsh(dense_fisher(stacked(sample_gradients(network(), others, "pair"))))
    assert found.reorth_mode == "gram"
    assert torch.allclose(found.eigenvalues, values.flip(0)[:3], rtol=1e-9)


def test_factors_need_no_vector_to_start_from():
    with offline_problem(network(), microbatches(), loss="cross_entropy", params_filter=None) as problem:
        state = TopEigenpairs(operator="kfac", k=2, which="LA", per_block=True).measure(problem, None)[1]
    assert state is not None
    assert state["starts"] == {}


def test_the_public_names_are_those_of_the_table():
    assert get_args(OperatorName) == tuple(MATRICES)


def test_the_table_speaks_of_options_that_there_are():
    fields = {field.name: field.default for field in dataclasses.fields(MatrixChoice)}
    for matrix in MATRICES.values():
        assert set(matrix.options) <= set(fields) - {"operator"}
        assert "fisher" not in matrix.options or matrix.fisher == fields["fisher"], "the option alone says which"


def test_nothing_can_be_put_into_the_table():
    with pytest.raises(TypeError):
        MATRICES["hessian"] = MATRICES["ggn"]  # type: ignore[index]
