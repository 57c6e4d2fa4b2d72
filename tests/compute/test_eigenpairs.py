"""`compute_spectrum` of the Hessian and of the empirical Fisher against dense float64 matrices."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature_callbacks import ConfigurationError, MatrixOperator, RefusedError, compute_spectrum
from curvature_callbacks.compute.offline import offline_problem
from curvature_callbacks.linalg.lanczos.options import LanczosOptions
from curvature_callbacks.problem.matrix_choice import MatrixChoice
from tests.cases import CASES, Case
from tests.reference import (
    IGNORED,
    case_loss,
    dense_fisher,
    dense_hessian,
    fisher_eigenvalues,
    gradients_of,
    relative_error,
    row_loss,
    rows,
    sample_gradients,
    stacked,
)

CASE = CASES["mlp"]
FISHER: dict[str, Any] = {"operator": "empirical_fisher"}


def hessian_eigenvalues(model: nn.Module) -> Tensor:
    names = [name for name, _ in model.named_parameters()]
    return torch.linalg.eigvalsh(dense_hessian(model, case_loss(CASE, CASE.microbatches()), names)).flip(0)


def row_gradients(case: Case, microbatches: list[Any] | None = None) -> Tensor:
    """(N, P)."""
    return stacked(sample_gradients(case.model(), case.microbatches() if microbatches is None else microbatches, case.kind))


def true_residuals(G: Tensor, pairs: Any) -> Tensor:
    """`||F v - theta v||` in float64, from the oracle's gradients and without their P x P matrix."""
    V = pairs.eigenvectors.double()
    return (G.T @ (G @ V) / len(G) - V * pairs.eigenvalues).norm(dim=0)


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
def test_the_ends_asked_for(which: str):
    model = CASE.model()
    values = hessian_eigenvalues(model)
    pairs = compute_spectrum(model, CASE.microbatches(), loss=CASE.loss, k=4, which=which, tol=1e-8)
    by_size = values[values.abs().argsort(descending=True)[:4]].sort(descending=True).values
    ends = torch.cat([values[:2], values[-2:]])
    expected = {"LA": values[:4], "SA": values[-4:], "LM": by_size, "BE": ends}[which]
    assert torch.allclose(pairs.eigenvalues, expected, atol=1e-9 * values[0].item())


def test_eigenvectors_follow_named_parameters():
    model, microbatches = CASE.model(), CASE.microbatches()
    names = [name for name, _ in model.named_parameters()]
    H = dense_hessian(model, case_loss(CASE, microbatches), names)
    pairs = compute_spectrum(model, microbatches, loss=CASE.loss, k=3, tol=1e-8, return_eigenvectors=True, true_residuals=True)
    residuals = (H @ pairs.eigenvectors - pairs.eigenvectors * pairs.eigenvalues).norm(dim=0)
    assert residuals.max() <= 1e-7 * pairs.eigenvalues[0]
    assert pairs.eigenvectors.shape == (len(H), 3)


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "vit", "resnet", "mlp", "convnet", "reused"])
def test_fisher_pairs_are_those_of_eigh(name: str):
    case = CASES[name]
    G = row_gradients(case)
    truth = torch.linalg.svd(G, full_matrices=False)
    options: dict[str, Any] = {"loss": case.loss, "k": 5, "which": "LA", "tol": 1e-6, "return_eigenvectors": True}
    pairs = compute_spectrum(case.model(), case.microbatches(), **FISHER, **options)
    assert pairs.reorth_mode == "gram"
    assert relative_error(pairs.eigenvalues, truth.S[:5] ** 2 / len(G)) < 1e-6
    assert true_residuals(G, pairs).max() < 1e-6 * pairs.eigenvalues[0]
    top = (pairs.eigenvectors[:, 0] @ truth.Vh[0]).abs().item()
    assert top == pytest.approx(1.0, abs=1e-9)
    assert pairs.converged.all()


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit", "mlp"])
def test_fisher_pairs_in_float32(name: str):
    """The residual reported is not below the true one, and that is rounding."""
    case = CASES[name]
    G = row_gradients(case)
    options: dict[str, Any] = {"loss": case.loss, "k": 3, "which": "LA", "return_eigenvectors": True}
    pairs = compute_spectrum(case.model(torch.float32), case.microbatches(), **FISHER, **options)
    true = true_residuals(G, pairs)
    assert true.max() < 2e-6 * pairs.eigenvalues[0]  # 1.2e-6 on one processor
    assert (true <= pairs.residuals).all()
    assert pairs.eigenvectors.dtype == torch.float32


@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
@pytest.mark.parametrize("parameters", ["", "2.bias"], ids=["N<P", "N>P"])
def test_the_gram_and_lanczos_find_the_same(parameters: str, which: Any):
    """Zeros included: with 6 samples of 73 parameters the small end is zero, of the 4 parameters it is not."""
    options = LanczosOptions(k=3, which=which, tol=1e-8, return_eigenvectors=True)
    chosen = offline_problem(
        CASE.model(), CASE.microbatches(), loss=CASE.loss, params_filter=lambda name, _: name.startswith(parameters)
    )
    with chosen as problem:
        gram = MatrixChoice(operator="empirical_fisher").eigenproblem(problem).solve(options)
        problem.max_gram_rows = 5
        lanczos = MatrixChoice(operator="empirical_fisher").eigenproblem(problem).solve(options)
    assert gram.eigenvectors is not None
    assert lanczos.eigenvectors is not None
    assert (gram.reorth_mode, lanczos.reorth_mode) == ("gram", "partial")
    assert torch.allclose(gram.eigenvalues, lanczos.eigenvalues, rtol=1e-9, atol=1e-12)
    assert gram.converged.all()
    assert gram.eigenvectors.shape == lanczos.eigenvectors.shape
    assert (gram.eigenvalues[-1] == 0) == (parameters == "" and which in ("SA", "BE"))


def test_up_to_a_thousand_rows_come_from_the_gram():
    options: dict[str, Any] = {"loss": CASE.loss, "k": 1, "which": "LA"}
    for rows_, mode in ((1000, "gram"), (1001, "partial")):
        microbatches = CASE.microbatches((rows_,))
        pairs = compute_spectrum(CASE.model(), microbatches, **FISHER, **options)
        assert pairs.reorth_mode == mode
        assert relative_error(pairs.eigenvalues, fisher_eigenvalues(row_gradients(CASE, microbatches))[:1]) < 1e-6


def test_the_small_end_of_more_samples_than_parameters():
    microbatches = CASE.microbatches((40,))
    names = ["4.weight", "4.bias"]
    G = stacked(sample_gradients(CASE.model(), microbatches, CASE.kind), names)
    truth = torch.linalg.eigh(dense_fisher(G))
    options: dict[str, Any] = {"params_filter": lambda name, _: name in names, "return_eigenvectors": True}
    pairs = compute_spectrum(CASE.model(), microbatches, **FISHER, loss=CASE.loss, k=12, which="SA", **options)
    assert len(truth.eigenvalues) == 15
    # Cross-entropy does not see a shift of all logits: five of the fifteen eigenvalues are zero.
    assert pairs.eigenvalues[-5:].tolist() == [0.0] * 5
    assert torch.allclose(pairs.eigenvalues, truth.eigenvalues[:12].flip(0), atol=1e-15)
    assert torch.allclose(pairs.eigenvectors.T @ pairs.eigenvectors, torch.eye(12).double(), atol=1e-9)
    assert true_residuals(G, pairs).max() < 1e-14
    assert pairs.converged.all()


def test_repeated_rows_add_no_direction():
    x, y = CASE.microbatches((2,))[0]
    pairs = compute_spectrum(
        CASE.model(torch.float32), (x.repeat(3, 1), y.repeat(3)), **FISHER, loss=CASE.loss, k=4, which="LA"
    )
    assert (pairs.eigenvalues > 0).tolist() == [True, True, False, False]
    assert relative_error(pairs.eigenvalues, fisher_eigenvalues(row_gradients(CASE, [(x, y)]))) < 1e-6
    assert pairs.converged.all()


def target_losses(row: Any, kind: str) -> Iterator[Callable[[nn.Module], Tensor]]:
    """The loss of every valid target of a row, each with a pass through the model."""
    labels = row["labels"][0, 1:] if kind == "causal" else row["labels"][0].reshape(-1)
    for t, label in enumerate(labels.tolist()):
        if label != IGNORED:
            yield lambda m, t=t, y=label: -m(**row).logits.flatten(0, -2)[t].double().log_softmax(0)[y]


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit"])
def test_a_fisher_of_tokens(name: str):
    case = CASES[name]
    losses = [loss for row in rows(case.microbatches()) for loss in target_losses(row, case.kind)]
    truth = fisher_eigenvalues(stacked(gradients_of(case.model(), losses)))
    pairs = compute_spectrum(case.model(), case.microbatches(), **FISHER, sample_unit="token", k=4, which="LA", tol=1e-5)
    assert pairs.reorth_mode == "partial"
    assert pairs.is_psd
    assert pairs.converged.all()
    assert relative_error(pairs.eigenvalues, truth[:4]) < 1e-6
    rows_ = compute_spectrum(case.model(), case.microbatches(), **FISHER, k=4, which="LA", tol=1e-5)
    assert (relative_error(rows_.eigenvalues, truth[:4]) < 1e-6) == (name == "vit")  # one target a row


@pytest.mark.parametrize("operator", ["hessian", "empirical_fisher"])
def test_the_same_bits_twice(operator: Any):
    model, microbatches = CASES["gpt2"].model(torch.float32), CASES["gpt2"].microbatches()
    options: dict[str, Any] = {"operator": operator, "k": 3, "max_matvecs": 12, "seed": 4, "return_eigenvectors": True}
    first, second = (compute_spectrum(model, microbatches, **options) for _ in range(2))
    assert torch.equal(first.eigenvalues, second.eigenvalues)
    assert torch.equal(first.residuals, second.residuals)
    assert torch.equal(first.eigenvectors, second.eigenvectors)


def test_bfloat16_models_are_measured_in_float32():
    case = CASES["gpt2"]
    model, microbatches = case.model(torch.bfloat16), case.microbatches((2,))
    names = [name for name, _ in model.named_parameters() if "h.1.attn.c_proj" in name]
    values = torch.linalg.eigvalsh(dense_hessian(model, case_loss(case, microbatches), names))
    pairs = compute_spectrum(model, microbatches, k=2, which="BE", params_filter=lambda name, _: name in names)
    assert pairs.eigenvalues.tolist() == pytest.approx([values[-1].item(), values[0].item()], rel=1e-4)
    G = stacked(gradients_of(model, [lambda m, row=row: row_loss(m, row, case.kind) for row in rows(microbatches)]), names)
    fisher = compute_spectrum(model, microbatches, **FISHER, k=2, which="LA", params_filter=lambda name, _: name in names)
    assert fisher.eigenvalues.tolist() == pytest.approx(fisher_eigenvalues(G)[:2].tolist(), rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"k": 0},
        {"which": "SM"},
        {"tol": 0.0},
        {"k": 8, "max_matvecs": 7},
        {"operator": "fisher"},
        {**FISHER, "k": 0},
        {**FISHER, "which": "SM"},
        {**FISHER, "tol": 0.0},
        {**FISHER, "k": 8, "max_matvecs": 7},
        {**FISHER, "sample_unit": "word"},
        {"sample_unit": "token"},
    ],
)
def test_the_function_names_its_bad_option(options: dict[str, Any]):
    with pytest.raises(ValueError, match=f"`{list(options)[-1]}`"):
        compute_spectrum(CASE.model(), CASE.microbatches(), loss=CASE.loss, **options)


def test_an_operator_of_ones_own():
    A = torch.diag(torch.arange(-3.0, 5.0, dtype=torch.float64))
    pairs = compute_spectrum(CASE.model(), CASE.microbatches(), operator=MatrixOperator(A), k=2, which="BE")
    assert pairs.eigenvalues.tolist() == pytest.approx([4.0, -3.0])
    with pytest.raises(RefusedError, match="not symmetric"):
        compute_spectrum(CASE.model(), None, operator=MatrixOperator(torch.triu(torch.ones(8, 8).double())), k=2)
    with pytest.raises(ConfigurationError, match="operator"):
        compute_spectrum(CASE.model(), None, operator=object(), k=2)
