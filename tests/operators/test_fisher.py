"""The empirical Fisher against one gradient per row and per target in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_callbacks.operators.self_checks import check_adjoint
from tests.cases import CASES, in_general_position
from tests.operators.fisher_cases import (
    DENSE,
    TOKENS,
    TOLERANCE,
    UNITS,
    fisher_of,
    oracle,
    prefixed,
    problem_of,
    vector,
)
from tests.operators.operator_cases import PartlyUsed, dense, partial_loss
from tests.reference import IGNORED, dense_fisher, gradients_of, relative_error, stacked


@pytest.mark.parametrize(("name", "unit"), [*((name, "sequence") for name in CASES), *((name, "token") for name in TOKENS)])
def test_products_are_those_of_the_oracle(name: str, unit: str):
    case = CASES[name]
    model, microbatches = case.model(), case.microbatches()
    G = oracle(case, model, microbatches, unit)
    v = vector(G.shape[1])
    with fisher_of(case, model, microbatches, unit) as operator:
        found = operator.matmat(v[:, None])[:, 0]
        assert operator.normaliser == len(G)
        assert relative_error(operator.vjp(torch.ones(operator.num_outputs)), G.sum(0)) < TOLERANCE
    assert relative_error(found, G.T @ (G @ v) / len(G)) < TOLERANCE


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", ["mlp", "gpt2"])
def test_the_matrix_is_the_dense_fisher(name: str, unit: str):
    case = CASES[name]
    model, microbatches = case.model(), case.microbatches()
    chosen = prefixed(*DENSE) if name == "gpt2" else {}
    names = [n for n, _ in model.named_parameters() if not chosen or n.startswith(DENSE)]
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter_name in names)
    truth = dense_fisher(oracle(case, model, microbatches, unit))
    with fisher_of(case, model, microbatches, unit, **chosen) as operator:
        assert relative_error(dense(operator), truth) < TOLERANCE


@pytest.mark.parametrize("unit", UNITS)
def test_the_gradient_is_what_the_ones_give(unit: str):
    """`J' 1 / sum n` is the gradient of the mean loss in either unit, and the trace the mean squared norm of the rows of J."""
    case = CASES["gpt2"]
    model, microbatches = case.model(), case.microbatches()
    with problem_of(case, model, microbatches, **prefixed("transformer.ln_f", "transformer.h.0.ln_1")) as problem:
        operator = problem.empirical_fisher(sample_unit=unit)
        total = operator.vjp(torch.ones(operator.num_outputs)) / operator.num_targets
        assert relative_error(total, torch.cat([part.flatten() for part in problem.gradients.values()])) < TOLERANCE
        squares = [operator.vjp(e).square().sum() for e in torch.eye(operator.num_outputs)]
        assert torch.trace(dense(operator)).item() == pytest.approx(float(sum(squares)) / operator.normaliser)


@pytest.mark.parametrize(("name", "unit"), [("gpt2", "token"), ("vit", "sequence"), ("mlp", "token")])
def test_float32_models_agree_with_float64(name: str, unit: str):
    case = CASES[name]
    G = oracle(case, case.model(), case.microbatches(), unit)
    v = vector(G.shape[1])
    with fisher_of(case, case.model(torch.float32), case.microbatches(), unit) as operator:
        assert operator.dtype == torch.float32
        assert relative_error(operator.matmat(v.float()[:, None])[:, 0], G.T @ (G @ v) / len(G)) < 5e-6


@pytest.mark.parametrize(("name", "unit"), [("bert", "token"), ("resnet", "sequence"), ("reused", "sequence")])
def test_contract(name: str, unit: str):
    """Symmetric, positive, linear, column by column, the same bits twice, and J the adjoint of J'."""
    case = CASES[name]
    with fisher_of(case, case.model(), case.microbatches(), unit) as operator:
        U = torch.stack([vector(operator.shape[0], seed=seed) for seed in range(3)], dim=1)
        FU = operator.matmat(U)
        products = U.T @ FU
        assert operator.is_psd
        assert operator.shape == (len(U), len(U))
        assert FU.shape == U.shape
        assert relative_error(products, products.T) < TOLERANCE
        assert torch.linalg.eigvalsh(products + products.T).min() > 0
        assert relative_error(operator.matmat(2 * U[:, :1] - U[:, 1:2]), 2 * FU[:, :1] - FU[:, 1:2]) < TOLERANCE
        assert torch.equal(torch.cat([operator.matmat(u[:, None]) for u in U.T], dim=1), FU)
        assert torch.equal(operator.matmat(U), FU)
        assert check_adjoint(operator, seed=0) < TOLERANCE


def test_a_product_takes_no_pass_through_the_model():
    calls = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        calls.append(len(batch[0]))
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    case = CASES["mlp"]
    with fisher_of(case, case.model(), case.microbatches(), loss=loss) as operator:
        calls.clear()
        operator.matmat(torch.ones(operator.shape[0], 2, dtype=torch.float64))
    assert calls == []


@pytest.mark.parametrize("unit", UNITS)
def test_one_batch_in_pieces_is_one_batch(unit: str):
    case = CASES["gpt2"]
    model, (batch,) = case.model(), case.microbatches((6,))
    pieces = [{name: values[a:b] for name, values in batch.items()} for a, b in ((0, 1), (1, 5), (5, 6))]
    with fisher_of(case, model, [batch], unit) as whole:
        v = vector(whole.shape[0])
        expected = whole.matmat(v[:, None])
    with fisher_of(case, model, pieces, unit) as parts:
        assert relative_error(parts.matmat(v[:, None]), expected) < TOLERANCE
        assert parts.rows.tolist() == whole.rows.tolist() == list(range(6))


def test_one_target_a_row_makes_the_units_equal():
    case = CASES["vit"]
    with problem_of(case, case.model(), case.microbatches()) as problem:
        sequence, token = (problem.empirical_fisher(sample_unit=unit) for unit in UNITS)
        v = vector(sequence.shape[0])[:, None]
        assert torch.allclose(sequence.matmat(v), token.matmat(v))


def test_a_named_block_is_its_diagonal_block():
    case = CASES["mlp"]
    with problem_of(case, case.model(), case.microbatches()) as problem:
        whole, part = dense(problem.empirical_fisher()), dense(problem.empirical_fisher(["2.weight", "2.bias"]))
        start = problem.objective.parameters["0.weight"].numel() + problem.objective.parameters["0.bias"].numel()
    assert torch.allclose(part, whole[start : start + len(part), start : start + len(part)])


@pytest.mark.parametrize("unit", UNITS)
def test_rows_without_a_valid_target_do_not_count(unit: str):
    case = CASES["gpt2"]
    model, microbatches = case.model(), case.microbatches()
    microbatches[0]["labels"][1] = IGNORED
    microbatches[1]["labels"][:] = IGNORED
    G = oracle(case, model, microbatches, unit)
    if unit == "sequence":
        G = G[[0, 2, 4, 5]]  # the oracle gives the others a zero gradient
    v = vector(G.shape[1])
    with fisher_of(case, model, microbatches, unit) as operator:
        assert operator.rows.tolist() == [0, 2, 4, 5]
        assert operator.normaliser == len(G)
        assert relative_error(operator.matmat(v[:, None])[:, 0], G.T @ (G @ v) / len(G)) < TOLERANCE


def test_unused_and_linear_parameters():
    model = in_general_position(PartlyUsed).double()
    batch = CASES["mlp"].microbatches((4,))[0]
    truth = dense_fisher(stacked(gradients_of(model, [lambda m, i=i: partial_loss(m, batch)[i] for i in range(4)])))
    with fisher_of(CASES["mlp"], model, [batch], loss=partial_loss) as operator:
        found = dense(operator)
    assert torch.allclose(found, truth)
    order = [name for name, parameter in model.named_parameters() for _ in range(parameter.numel())]
    assert found[torch.tensor([name == "unused" for name in order])].abs().max() == 0
    assert found[torch.tensor([name == "linear" for name in order])].abs().max() > 0


def test_a_loss_that_depends_on_nothing_named_has_the_zero_fisher():
    model = in_general_position(PartlyUsed).double()
    batch = CASES["mlp"].microbatches((4,))[0]
    with fisher_of(CASES["mlp"], model, [batch], loss=partial_loss, **prefixed("unused")) as operator:
        assert torch.equal(dense(operator), torch.zeros(3, 3, dtype=torch.float64))
        assert check_adjoint(operator, seed=0) == 0.0
