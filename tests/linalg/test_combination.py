import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature_callbacks import ConfigurationError, CurvatureMonitor, MatrixOperator, TopEigenpairs
from curvature_callbacks.linalg.combination import LinearCombination
from curvature_callbacks.linalg.lanczos.solver import lanczos
from curvature_callbacks.linalg.operator import Operator
from curvature_callbacks.space import LocalSpace

P = 7


def symmetric(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    matrix = torch.randn(P, P, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (matrix + matrix.T).to(dtype)


@pytest.mark.parametrize("shift", [0.0, -1.5])
@pytest.mark.parametrize("weights", [(1.0,), (2.0, -0.5), (0.25, 0.0, 3)])
def test_products_are_those_of_the_dense_sum(weights: tuple[float, ...], shift: float):
    matrices = [symmetric(i) for i in range(len(weights))]
    operator = LinearCombination([(c, MatrixOperator(A)) for c, A in zip(weights, matrices, strict=True)], shift=shift)
    expected = torch.diag(torch.full((P,), shift, dtype=torch.float64))
    for c, A in zip(weights, matrices, strict=True):
        expected = expected + c * A
    V = torch.randn(P, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    kept = V.clone()
    assert isinstance(operator, Operator)
    assert torch.allclose(operator.matmat(V), expected @ V, rtol=1e-12, atol=1e-12)
    assert torch.equal(V, kept)


def test_combinations_nest_and_have_eigenvalues():
    inner = LinearCombination([(1.0, MatrixOperator(symmetric(0)))], shift=2.0)
    operator = LinearCombination([(-1.0, inner), (0.5, MatrixOperator(symmetric(1)))])
    truth = torch.linalg.eigvalsh(-symmetric(0) - 2 * torch.eye(P) + 0.5 * symmetric(1)).flip(0)
    assert torch.allclose(lanczos(operator, k=2, tol=1e-8).eigenvalues, truth[:2])


@pytest.mark.parametrize(
    ("weights", "psd", "shift", "expected"),
    [
        ((1.0, 2.0), (True, True), 0.0, True),
        ((0.0, 2.0), (True, True), 0.5, True),
        ((1.0, 2.0), (True, False), 0.0, False),
        ((1.0, -2.0), (True, True), 0.0, False),
        ((1.0, 2.0), (True, True), -1e-9, False),
    ],
)
def test_what_is_known_to_be_positive(weights: Any, psd: Any, shift: float, expected: bool):
    parts = [(c, MatrixOperator(torch.eye(P), is_psd=known)) for c, known in zip(weights, psd, strict=True)]
    assert LinearCombination(parts, shift=shift).is_psd is expected


def test_it_looks_like_its_parts():
    operator = LinearCombination([(1.0, MatrixOperator(symmetric(0, torch.float32)))], shift=1)
    assert operator.shape == (P, P)
    assert operator.dtype == torch.float32
    assert operator.device == torch.device("cpu")
    assert operator.matmat(torch.ones(P, 1)).dtype == torch.float32


@pytest.mark.parametrize(
    ("parts", "shift", "message"),
    [
        ([], 1.0, "at least one"),
        ([(1.0, MatrixOperator(torch.eye(3))), (1.0, MatrixOperator(torch.eye(2)))], 0.0, r"same shape: number 1 has \(2, 2\)"),
        ([(1.0, MatrixOperator(torch.eye(3))), (1.0, MatrixOperator(torch.eye(3).double()))], 0.0, "same dtype"),
        ([(1.0, MatrixOperator(torch.eye(3))), (1.0, MatrixOperator(torch.eye(3, device="meta")))], 0.0, "same device"),
        ([(math.nan, MatrixOperator(torch.eye(3)))], 0.0, "weight 0 of `parts` must be a finite"),
        ([(1.0, MatrixOperator(torch.eye(3)))], math.inf, "`shift` must be a finite number, got inf"),
    ],
)
def test_parts_that_do_not_fit(parts: Any, shift: float, message: str):
    with pytest.raises(ConfigurationError, match=message):
        LinearCombination(parts, shift=shift)


def test_the_space_is_that_of_the_parts():
    """Without one where no part has one: over processes such an operator is refused."""
    here, elsewhere = (MatrixOperator(symmetric(seed)) for seed in range(2))
    assert not hasattr(LinearCombination([(1.0, here), (1.0, elsewhere)]), "space")
    here.space = LocalSpace()  # type: ignore[attr-defined]
    assert LinearCombination([(1.0, elsewhere), (1.0, here)]).space is here.space  # type: ignore[attr-defined]
    elsewhere.space = LocalSpace()  # type: ignore[attr-defined]
    with pytest.raises(ConfigurationError, match="same space"):
        LinearCombination([(1.0, here), (1.0, elsewhere)])


EXAMPLE = Path(__file__).parents[2] / "examples" / "residual_hessian.py"


def dense_residual(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """`(1 / N) sum_nc (softmax(z_n) - onehot(y_n))_c d2z_nc / dtheta2` (P, P), one second derivative of an output at a time."""
    names = [name for name, _ in model.named_parameters()]
    shapes = [parameter.shape for parameter in model.parameters()]
    flat = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    total = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for x, y in zip(inputs, targets, strict=True):

        def output(theta: Tensor, c: int, x: Tensor = x) -> Tensor:
            pieces = theta.split([shape.numel() for shape in shapes])
            parameters = {name: piece.view(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}
            return torch.func.functional_call(model, parameters, (x[None],))[0, c]

        errors = torch.softmax(model(x[None])[0], 0).detach() - torch.eye(3, dtype=torch.float64)[y]
        for c in range(3):
            total += errors[c] * torch.autograd.functional.hessian(lambda theta, c=c: output(theta, c), flat)
    return total / len(inputs)


def test_what_the_ggn_leaves_of_the_hessian(monkeypatch: pytest.MonkeyPatch):
    """The example's matrix through a monitor, against second derivatives of the outputs."""
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    residual_hessian = runpy.run_path(str(EXAMPLE))["residual_hessian"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        inputs, targets = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    watching = CurvatureMonitor(
        model,
        probes=[(inputs, targets)],
        loss="cross_entropy",
        measure=[TopEigenpairs(operator=residual_hessian, k=4, which="BE", tol=1e-8, max_matvecs=100, per_block=True)],
    )
    records = {record.block: record for record in watching.step(0)[1:]}
    truth = dense_residual(model, inputs, targets)
    values = torch.linalg.eigvalsh(truth)
    assert values[0] < -1e-3
    assert records[None].measurement == "residual_hessian"
    assert records[None].scalars["lambda_max"] == pytest.approx(values[-1].item(), rel=1e-7)
    assert records[None].scalars["lambda_min"] == pytest.approx(values[0].item(), rel=1e-7)
    first = torch.linalg.eigvalsh(truth[:25, :25])  # the last layer's block is zero: outputs are linear in it
    assert records["0"].scalars["lambda_max"] == pytest.approx(first[-1].item(), rel=1e-7)
    assert abs(records["2"].scalars["lambda_max"]) < 1e-14
