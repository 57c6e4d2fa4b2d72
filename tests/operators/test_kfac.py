"""K-FAC and EKFAC products and eigenpairs against dense Kronecker products, element by element."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from curvature_callbacks import ConfigurationError, KFACQuality, ProbeError, RefusedError
from curvature_callbacks.compute.offline import offline_problem
from curvature_callbacks.linalg.kronecker import Factor, KroneckerFactors, LayerKronecker, factor_of_diagonal, factor_of_matrix
from curvature_callbacks.linalg.lanczos.options import LanczosOptions
from curvature_callbacks.linalg.lanczos.solver import lanczos
from curvature_callbacks.linalg.operator import Operator
from curvature_callbacks.model.loss.fisher_type import FisherType
from curvature_callbacks.operators.kfac import KFACOperator
from tests.cases import CASES
from tests.linalg.kronecker_cases import D, semidefinite
from tests.reference import relative_error, sample_gradients


def layer_with(factors: KroneckerFactors, *, weight: str, bias: str | None, transposed: bool) -> LayerKronecker:
    """Without the Gram, which is of no account to the operator."""
    gram = torch.zeros(0, 0, dtype=D)
    return LayerKronecker(factors=factors, weight=weight, bias=bias, transposed=transposed, gram=gram, normaliser=1.0)


def layer_of(
    name: str, d_out: int, d_in: int, *, bias: bool, transposed: bool = False, rank: int | None = None, seed: int = 0
) -> tuple[LayerKronecker, Tensor]:
    """A layer with the dense (d_out d_in, d_out d_in) product of its factors; `d_in` counts the bias."""
    A, G = semidefinite(d_in, rank=rank, seed=seed), semidefinite(d_out, seed=seed + 1)
    corrected = torch.rand(d_out, min(d_in, rank or d_in), generator=torch.Generator().manual_seed(seed), dtype=D)
    factors = KroneckerFactors(A=factor_of_matrix(A, dtype=D), G=factor_of_matrix(G, dtype=D), corrected=corrected)
    named = f"{name}.bias" if bias else None
    return layer_with(factors, weight=f"{name}.weight", bias=named, transposed=transposed), torch.kron(G, A)


def embedding_layer() -> tuple[LayerKronecker, Tensor]:
    """A table of 5 rows of which 3 were looked up, 2 columns."""
    diagonal, G = torch.tensor([0.5, 0.0, 2.0, 0.0, 1.0], dtype=D), semidefinite(2, seed=7)
    corrected = torch.rand(2, 3, generator=torch.Generator().manual_seed(7), dtype=D)
    factors = KroneckerFactors(A=factor_of_diagonal(diagonal), G=factor_of_matrix(G, dtype=D), corrected=corrected)
    layer = layer_with(factors, weight="table.weight", bias=None, transposed=True)
    return layer, torch.kron(G, torch.diag(diagonal))


def dense_corrected(layer: LayerKronecker, d_in: int) -> Tensor:
    A, G = layer.factors.A, layer.factors.G
    U_A = torch.eye(d_in, dtype=D)[:, A.axes] if A.basis is None else A.basis
    U = torch.kron(G.basis, U_A)
    return U @ torch.diag(layer.factors.corrected.flatten()) @ U.T


def elements(layer: LayerKronecker, parameters: Mapping[str, Tensor]) -> list[tuple[str, int]]:
    """Name and flat index of each element of the layer, in the row-major order of (d_out, d_in)."""
    weight = parameters[layer.weight]
    index = torch.arange(weight.numel()).reshape(weight.shape[0], -1)
    index = index.T if layer.transposed else index
    found = []
    for row in range(len(index)):
        found += [(layer.weight, int(i)) for i in index[row]]
        found += [] if layer.bias is None else [(layer.bias, row)]
    return found


def dense_matrix(
    layers: list[tuple[LayerKronecker, Tensor]], parameters: Mapping[str, Tensor], names: tuple[str, ...]
) -> Tensor:
    """The dense matrix over `names`, one element after another."""
    position = {element: p for p, element in enumerate((n, i) for n in names for i in range(parameters[n].numel()))}
    result = torch.zeros(len(position), len(position), dtype=D)
    for layer, product in layers:
        index = torch.tensor([position[element] for element in elements(layer, parameters)])
        result[index[:, None], index] = product
    return result


def layers_and_parameters() -> tuple[list[tuple[LayerKronecker, Tensor]], dict[str, Tensor]]:
    """Every layout; in the parameters' order layers are mixed, and two have no factors."""
    layers = [
        layer_of("linear", 3, 5, bias=True),
        layer_of("plain", 4, 4, bias=False, rank=2, seed=1),
        layer_of("turned", 3, 5, bias=True, transposed=True, seed=2),
        layer_of("kernel", 2, 9, bias=True, rank=3, seed=3),
        embedding_layer(),
    ]
    shapes = {
        "norm.weight": (4,),
        "linear.bias": (3,),
        "table.weight": (5, 2),
        "kernel.weight": (2, 2, 2, 2),
        "turned.weight": (4, 3),
        "linear.weight": (3, 4),
        "kernel.bias": (2,),
        "plain.weight": (4, 4),
        "raw": (2,),
        "turned.bias": (3,),
    }
    return layers, {name: torch.zeros(shape, dtype=D) for name, shape in shapes.items()}


def built(corrected: bool) -> tuple[KFACOperator, Tensor]:
    layers, parameters = layers_and_parameters()
    operator = KFACOperator([layer for layer, _ in layers], parameters, corrected=corrected)
    if corrected:
        layers = [(layer, dense_corrected(layer, len(product) // len(layer.factors.G.basis))) for layer, product in layers]
    return operator, dense_matrix(layers, parameters, operator.names)


def as_matrix(operator: Any) -> Tensor:
    return operator.matmat(torch.eye(operator.shape[0], dtype=operator.dtype))


def ends(values: Tensor, k: int, which: str) -> Tensor:
    bottom = {"LA": 0, "LM": 0, "SA": k, "BE": k // 2}[which]
    return torch.cat([values[: k - bottom], values[len(values) - bottom :]])


@pytest.mark.parametrize("corrected", [False, True])
def test_the_matrix_is_the_dense_one(corrected: bool):
    operator, matrix = built(corrected)
    assert isinstance(operator, Operator)
    assert operator.shape == tuple(matrix.shape)
    assert operator.is_psd
    assert torch.allclose(as_matrix(operator), matrix, atol=1e-13)
    values = torch.linalg.eigvalsh(matrix)
    assert torch.allclose(torch.linalg.eigvalsh(as_matrix(operator)), values, atol=1e-12)


def test_uncovered_parameters_are_absent():
    operator, _ = built(False)
    _, parameters = layers_and_parameters()
    assert operator.uncovered == ("norm.weight", "raw")
    assert operator.names == tuple(name for name in parameters if name not in operator.uncovered)
    assert operator.shape[0] == sum(parameters[name].numel() for name in operator.names)


@pytest.mark.parametrize("corrected", [False, True])
def test_products_are_fixed_linear_maps(corrected: bool):
    operator, matrix = built(corrected)
    V = torch.randn(len(matrix), 3, generator=torch.Generator().manual_seed(0), dtype=D)
    kept = V.clone()
    product = operator.matmat(V)
    assert torch.equal(product, operator.matmat(V))
    assert torch.equal(V, kept)
    columns = torch.cat([operator.matmat(V[:, i : i + 1]) for i in range(3)], dim=1)
    assert torch.allclose(columns, product, atol=1e-13)
    assert torch.allclose(operator.matmat(V.T.contiguous().T), product, atol=1e-13)
    assert torch.allclose(V.T @ product, product.T @ V)
    assert torch.allclose(operator.matmat(2 * V[:, :1] - V[:, 1:2]), 2 * product[:, :1] - product[:, 1:2], atol=1e-12)


@pytest.mark.parametrize("corrected", [False, True])
def test_the_projection_has_ones_where_the_factors_have_rank(corrected: bool):
    operator, matrix = built(corrected)
    U = torch.linalg.eigh(matrix)
    inside = U.eigenvectors[:, U.eigenvalues > 1e-12]
    assert torch.allclose(operator.projected(torch.eye(len(matrix), dtype=D)), inside @ inside.T, atol=1e-10)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize(
    ("k", "which"), [(k, which) for k in (2, 7, 60) for which in ("LA", "SA", "LM", "BE")] + [(1, "LA"), (1, "SA"), (74, "BE")]
)
def test_the_pairs_are_those_of_the_dense_matrix(k: int, which: str, corrected: bool):
    """Of 74: 50 positive and 24 zero; k takes part of either, all, or both ends at once."""
    operator, matrix = built(corrected)
    P = len(matrix)
    assert P == 74
    pairs = operator.eigenpairs(LanczosOptions(k=k, which=which, tol=1e-10, return_eigenvectors=True))
    values, V = pairs.eigenvalues, pairs.eigenvectors
    assert torch.allclose(values, ends(torch.linalg.eigvalsh(matrix).flip(0), k, which), atol=1e-12)
    assert (values.diff() <= 0).all()
    assert torch.allclose(V.T @ V, torch.eye(k, dtype=D), atol=1e-12)
    assert (matrix @ V - V * values).norm(dim=0).max() < 1e-12
    assert pairs.converged.all()
    assert (pairs.which, pairs.reorth_mode, pairs.is_psd, pairs.asymmetry) == (which, "kronecker", True, 0.0)
    assert pairs.lambda_abs_max == pytest.approx(torch.linalg.eigvalsh(matrix)[-1].item())
    assert pairs.residuals.min() >= 10 * torch.finfo(D).eps * pairs.lambda_abs_max * (1 - 1e-9)
    assert pairs.num_matvecs >= k
    assert not pairs.warnings


def test_more_pairs_than_dimensions_are_those_there_are():
    operator, matrix = built(False)
    pairs = operator.eigenpairs(LanczosOptions(k=200))
    assert len(pairs.eigenvalues) == len(matrix)
    assert "`k`=200 exceeds the dimension 74" in pairs.warnings[0]
    assert pairs.eigenvectors is None


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("k", [4, 10, 16])
def test_equal_eigenvalues_are_not_reported_twice(k: int, corrected: bool):
    """16 eigenvalues of 1 in two layers: both ends search the same ties."""
    eye = factor_of_matrix(torch.eye(2, 2, dtype=D), dtype=D), factor_of_matrix(torch.eye(4, dtype=D), dtype=D)
    factors = KroneckerFactors(A=eye[0], G=eye[1], corrected=torch.ones(4, 2, dtype=D))
    layers = [layer_with(factors, weight=name, bias=None, transposed=False) for name in "ab"]
    operator = KFACOperator(layers, {name: torch.zeros(4, 2, dtype=D) for name in "ab"}, corrected=corrected)
    pairs = operator.eigenpairs(LanczosOptions(k=k, which="BE", return_eigenvectors=True))
    assert pairs.eigenvalues.tolist() == [1.0] * k
    assert torch.allclose(pairs.eigenvectors.T @ pairs.eigenvectors, torch.eye(k, dtype=D), atol=1e-12)


def test_residuals_tell_a_wrong_basis():
    """A basis that is not orthonormal: the reported residual is the true one."""
    layer, _ = layer_of("w", 3, 4, bias=False)
    bent = layer.factors.A.basis.clone()
    bent[0] += 0.1
    layer = replace(layer, factors=replace(layer.factors, A=replace(layer.factors.A, basis=bent)))
    operator = KFACOperator([layer], {"w.weight": torch.zeros(3, 4, dtype=D)})
    pairs = operator.eigenpairs(LanczosOptions(k=2, return_eigenvectors=True))
    true = (as_matrix(operator) @ pairs.eigenvectors - pairs.eigenvectors * pairs.eigenvalues).norm(dim=0)
    assert torch.allclose(pairs.residuals, true)
    assert not pairs.converged.any()
    assert "did not reach" in pairs.warnings[0]


def test_lanczos_finds_the_same_top():
    operator, matrix = built(False)
    found = lanczos(operator, k=4, tol=1e-9, max_matvecs=len(matrix))
    assert torch.allclose(found.eigenvalues, operator.eigenpairs(LanczosOptions(k=4)).eigenvalues)


def test_a_zero_factor_is_a_zero_block():
    zero = Factor(eigenvalues=torch.zeros(0, dtype=D), basis=torch.zeros(4, 0, dtype=D))
    layer = layer_with(
        factors=KroneckerFactors(A=zero, G=factor_of_matrix(torch.eye(3), dtype=D), corrected=torch.zeros(3, 0, dtype=D)),
        weight="w",
        bias=None,
        transposed=False,
    )
    for corrected in (False, True):
        operator = KFACOperator([layer], {"w": torch.ones(3, 4, dtype=D)}, corrected=corrected)
        assert torch.equal(as_matrix(operator), torch.zeros(12, 12, dtype=D))
        pairs = operator.eigenpairs(LanczosOptions(k=3, which="BE", return_eigenvectors=True))
        assert pairs.eigenvalues.tolist() == [0.0, 0.0, 0.0]
        assert torch.allclose(pairs.eigenvectors.T @ pairs.eigenvectors, torch.eye(3, dtype=D), atol=1e-12)


def test_a_block_takes_its_layers():
    layers, parameters = layers_and_parameters()
    block = {name: p for name, p in parameters.items() if name.startswith(("kernel", "norm"))}
    operator = KFACOperator([layer for layer, _ in layers], block)
    assert operator.names == ("kernel.weight", "kernel.bias")
    assert operator.uncovered == ("norm.weight",)
    assert torch.allclose(as_matrix(operator), dense_matrix(layers[3:4], parameters, operator.names), atol=1e-13)


def test_what_cannot_be_measured_is_refused():
    layers, parameters = layers_and_parameters()
    named = [layer for layer, _ in layers]
    with pytest.raises(RefusedError, match="none of the 1 parameters"):
        KFACOperator(named, {"norm.weight": parameters["norm.weight"]})
    with pytest.raises(ConfigurationError, match=r"got linear\.weight and linear\.bias without linear\.bias"):
        KFACOperator(named, {"linear.weight": parameters["linear.weight"]})
    nan = factor_of_matrix(torch.full((4, 4), torch.nan), dtype=D)
    broken = replace(named[1], factors=replace(named[1].factors, A=nan))
    with pytest.raises(ProbeError, match=r"`plain\.weight` are not finite"):
        KFACOperator([broken], parameters)
    operator = KFACOperator(named, parameters)
    for options, name in (({"k": 0}, "k"), ({"k": 1, "which": "XX"}, "which"), ({"k": 1, "tol": 0.0}, "tol")):
        with pytest.raises(ConfigurationError, match=f"`{name}` must be"):
            operator.eigenpairs(LanczosOptions(**options))


def test_single_precision_meets_its_own_floor():
    layers, parameters = layers_and_parameters()
    operator = KFACOperator([layer for layer, _ in layers], {name: p.float() for name, p in parameters.items()})
    exact, _ = built(False)
    assert operator.dtype == torch.float32
    assert relative_error(as_matrix(operator), as_matrix(exact)) < 1e-6
    pairs = operator.eigenpairs(LanczosOptions(k=10, which="BE", tol=1e-5))
    assert pairs.converged.all()
    assert torch.allclose(pairs.eigenvalues, exact.eigenpairs(LanczosOptions(k=10, which="BE")).eigenvalues)


def test_no_global_random_numbers():
    state = torch.random.get_rng_state()
    operator, _ = built(False)
    found = [
        operator.eigenpairs(LanczosOptions(k=3, which="SA", seed=1, return_eigenvectors=True)).eigenvectors for _ in range(2)
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(torch.random.get_rng_state(), state)


def of_model(name: str, corrected: bool) -> Any:
    """Operator, layers and the records of `KFACQuality` for a case, at one step."""
    case = CASES[name]
    with offline_problem(case.model(), case.microbatches(), loss=case.loss, params_filter=None) as problem:
        layers = problem.grams.kronecker(FisherType(), sharing="expand")
        records, _ = KFACQuality().measure(problem, None)
        operator = problem.kfac(sharing="expand", corrected=corrected)
        return operator, layers, records


@pytest.mark.parametrize("name", ["mlp", "gpt2", "convnet", "bert_classifier"])
def test_trace_and_largest_eigenvalue_are_those_of_the_quality_measurement(name: str):
    operator, layers, (total, *records) = of_model(name, False)
    assert operator.eigenpairs(LanczosOptions(k=1)).eigenvalues[0].item() == pytest.approx(total.scalars["product_lambda_max"])
    assert operator.eigenpairs(LanczosOptions(k=5)).eigenvalues.tolist() == pytest.approx(
        total.arrays["product_eigenvalues"][:5]
    )
    whole_trace, P = 0.0, operator.shape[0]
    for start in range(0, P, 256):
        columns = torch.eye(P, dtype=D)[:, start : start + 256]
        whole_trace += operator.matmat(columns)[start : start + 256].trace().item()
    assert whole_trace == pytest.approx(total.scalars["product_trace"])
    assert len(records) == len(layers)


@pytest.mark.parametrize("name", ["mlp", "gpt2", "convnet"])
def test_ekfac_has_the_fisher_on_its_diagonal(name: str):
    """`u' E u = u' F u` in the factors' eigenbasis, so each block has the Fisher's trace; nothing else fits the layouts."""
    operator, layers, _ = of_model(name, True)
    case = CASES[name]
    gradients = sample_gradients(case.model(), case.microbatches(), case.kind)
    g = torch.cat([gradients[member] for member in operator.names], dim=1)  # (N, P)
    N = round(next(iter(layers.values())).normaliser)
    pairs = operator.eigenpairs(LanczosOptions(k=12, return_eigenvectors=True))
    expected = (g @ pairs.eigenvectors).square().sum(0) / N
    assert torch.allclose(pairs.eigenvalues, expected, rtol=1e-4)
    # Every gradient lies in the span of the eigenvectors: `expand` leaves nothing of the Fisher out.
    assert torch.allclose(operator.projected(g.T), g.T, atol=1e-6 * g.abs().max().item())
