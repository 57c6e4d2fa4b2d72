"""The GGN against logits differentiated one entry at a time and Hessians of the loss in them, in float64."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_callbacks import ConfigurationError, ProbeError, RefusedError, compute_fisher_spectrum
from curvature_callbacks.compute.offline import offline_problem
from curvature_callbacks.operators.ggn import GGNOperator
from curvature_callbacks.operators.self_checks import check_adjoint
from tests.cases import CASES, CLASSES, Case, in_general_position, quick_for
from tests.operators.operator_cases import dense, mean_cross_entropy, names_of, row_cross_entropy, vectors, with_fused_kernel
from tests.reference import IGNORED, case_loss, dense_ggn, dense_hessian, relative_error, rows

# Case to the prefixes of the parameters to differentiate by, few enough for a dense matrix.
DENSE = {
    "gpt2": ("transformer.h.1.ln_1", "transformer.h.1.attn.c_proj", "transformer.ln_f"),
    "llama": ("model.layers.0.input_layernorm", "model.layers.0.self_attn.k_proj", "model.norm"),
    "bert": ("bert.encoder.layer.1.attention.self.query", "cls.predictions.bias"),
    "t5": ("decoder.final_layer_norm",),
    "vit": ("vit.embeddings.position", "vit.layers.0.attention.q_proj.bias", "classifier"),
    "resnet": ("resnet.encoder.stages.0.layers.0.layer.0.normalization", "classifier"),
    "mlp": ("",),
    "convnet": ("conv1", "bn1", "fc"),
    "reused": ("",),
}
SIZES = (2, 1, 2)
TOLERANCE = 1e-5  # float32 inside Hugging Face's norms, rotary embeddings and losses


@contextmanager
def ggn_of(
    model: nn.Module, microbatches: list[Any], loss: Any, prefixes: tuple[str, ...] = ("",), **options: Any
) -> Iterator[GGNOperator]:
    keep = lambda name, _: name.startswith(prefixes)  # noqa: E731
    with offline_problem(model, microbatches, loss=loss, params_filter=keep) as problem:
        yield GGNOperator(problem.objective, problem.microbatches, **options)


def of_targets(model: nn.Module, case: Case, row: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """(C,) logits and label of every target of a row that counts."""
    if case.kind == "pair":
        yield model(row[0])[0], row[1][0]
        return
    logits, labels = model(**row).logits[0], row["labels"][0]
    if case.kind == "row":
        yield logits, labels
        return
    shift = 1 if case.kind == "causal" else 0
    for position in range(shift, len(labels)):
        if labels[position] != IGNORED:
            yield logits[position - shift], labels[position]


def truth(case: Case, microbatches: Sequence[Any], prefixes: tuple[str, ...]) -> Tensor:
    model = case.model()
    names = names_of(model, prefixes)

    def targets(replica: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        for row in rows(microbatches):
            yield from of_targets(replica, case, row)

    return dense_ggn(model, names, targets, lambda z, label: -z.log_softmax(0)[label])


@cache
def dense_truth(name: str) -> Tensor:
    return truth(CASES[name], CASES[name].microbatches(SIZES), DENSE[name])


@pytest.mark.parametrize("name", quick_for(DENSE, "mlp", "resnet", "gpt2"))
def test_the_matrix_is_the_dense_ggn(name: str):
    case = CASES[name]
    with ggn_of(case.model(), case.microbatches(SIZES), case.loss, DENSE[name]) as operator:
        assert operator.is_psd
        assert relative_error(dense(operator), dense_truth(name)) < TOLERANCE


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit", "mlp"])
def test_float32_models_agree_with_float64(name: str):
    case = CASES[name]
    with ggn_of(case.model(torch.float32), case.microbatches(SIZES), case.loss, DENSE[name]) as operator:
        assert operator.dtype == torch.float32
        V = vectors(operator)
        assert relative_error(operator.matmat(V), dense_truth(name) @ V.double()) < TOLERANCE


@pytest.mark.parametrize("name", ["bert", "resnet", "reused"])
def test_contract(name: str):
    """Symmetric, positive, linear, column by column, the same bits twice, and J the adjoint of J'."""
    case = CASES[name]
    with ggn_of(case.model(), case.microbatches(SIZES), case.loss) as operator:
        U = torch.randn(operator.shape[0], 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        GU = operator.matmat(U)
        products = U.T @ GU
        assert operator.shape == (len(U), len(U))
        assert GU.shape == U.shape
        assert relative_error(products, products.T) < TOLERANCE
        assert torch.linalg.eigvalsh(products + products.T).min() > 0
        assert relative_error(operator.matmat(2 * U[:, :1] - U[:, 1:2]), 2 * GU[:, :1] - GU[:, 1:2]) < TOLERANCE
        assert torch.equal(torch.cat([operator.matmat(u[:, None]) for u in U.T], dim=1), GU)
        assert torch.equal(operator.matmat(U), GU)
        assert check_adjoint(operator, seed=0) < TOLERANCE


@pytest.mark.parametrize(("name", "prefixes"), [("gpt2", ("transformer.ln_f",)), ("vit", ("classifier",))])
def test_it_is_the_exact_fisher_of_targets(name: str, prefixes: tuple[str, ...]):
    case = CASES[name]
    model, microbatches = case.model(), case.microbatches()
    keep = lambda parameter, _: parameter.startswith(prefixes)  # noqa: E731
    spectrum = compute_fisher_spectrum(
        model, microbatches, loss=case.loss, fisher="exact", sample_unit="token", block_structure="none", params_filter=keep
    ).full
    with ggn_of(model, microbatches, case.loss, prefixes) as operator:
        found = torch.linalg.eigvalsh(dense(operator)).flip(0)
    assert relative_error(found[: len(spectrum.eigenvalues)], spectrum.eigenvalues) < TOLERANCE
    assert (found[len(spectrum.eigenvalues) :].abs() < TOLERANCE * found[0]).all()


@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_losses_of_several_outputs(loss: str):
    model = in_general_position(lambda: nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 6), nn.Unflatten(1, (2, 3))))
    generator = torch.Generator().manual_seed(0)
    microbatches = [(torch.randn(N, 5, generator=generator), torch.rand(N, 2, 3, generator=generator)) for N in (3, 1)]
    function = F.mse_loss if loss == "mse" else F.binary_cross_entropy_with_logits

    def targets(replica: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in rows(microbatches):
            yield replica(x).flatten(), y.flatten()

    expected = dense_ggn(model, [name for name, _ in model.named_parameters()], targets, function)
    with ggn_of(model.double(), microbatches, loss) as operator:
        assert relative_error(dense(operator), expected) < 1e-6  # float32 inputs


def test_the_hessian_is_the_ggn_in_the_last_layer():
    case = CASES["mlp"]
    names = ["4.weight", "4.bias"]
    with ggn_of(case.model(), case.microbatches(), case.loss, tuple(names)) as operator:
        found = dense(operator)
    assert relative_error(found, dense_hessian(case.model(), case_loss(case, case.microbatches()), names)) < 1e-10


def test_one_batch_in_pieces_is_one_batch():
    case = CASES["gpt2"]
    model, (batch,) = case.model(), case.microbatches((6,))
    pieces = [{name: values[a:b] for name, values in batch.items()} for a, b in ((0, 1), (1, 5), (5, 6))]
    with ggn_of(model, [batch], case.loss, DENSE["gpt2"]) as whole, ggn_of(model, pieces, case.loss, DENSE["gpt2"]) as parts:
        V = vectors(whole)
        assert relative_error(parts.matmat(V), whole.matmat(V)) < TOLERANCE
        assert parts.num_targets == whole.num_targets


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_ignored_targets_change_nothing(empty: int):
    """A microbatch without a target, and a row's targets one by one."""
    case = CASES["gpt2"]
    microbatches = case.microbatches()
    microbatches[empty]["labels"][:] = IGNORED
    microbatches[(empty + 1) % 3]["labels"][0, 2:4] = IGNORED
    with ggn_of(case.model(), microbatches, case.loss, DENSE["gpt2"]) as operator:
        V = vectors(operator)
        assert relative_error(operator.matmat(V), truth(case, microbatches, DENSE["gpt2"]) @ V) < TOLERANCE


def test_a_named_block_is_its_diagonal_block():
    case = CASES["mlp"]
    with offline_problem(case.model(), case.microbatches(), loss=case.loss, params_filter=None) as problem:
        whole = dense(GGNOperator(problem.objective, problem.microbatches))
        part = dense(GGNOperator(problem.objective, problem.microbatches, ["2.weight", "2.bias"]))
        start = problem.objective.parameters["0.weight"].numel() + problem.objective.parameters["0.bias"].numel()
    assert torch.allclose(part, whole[start : start + len(part), start : start + len(part)])


class WithOffset(nn.Module):
    """`unused` is not in the logits; `offset` is a row of them, alone."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(3))
        self.curved = nn.Linear(5, CLASSES)
        self.offset = nn.Parameter(torch.ones(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.curved(x) + self.offset


@pytest.mark.parametrize("prefix", ["", "unused", "offset", "curved"])
def test_unused_parameters_have_a_zero_block(prefix: str):
    model, (batch,) = in_general_position(WithOffset).double(), CASES["mlp"].microbatches((4,))
    names = names_of(model, (prefix,))
    targets = lambda replica: ((replica(x)[0], y[0]) for x, y in rows([batch]))  # noqa: E731
    expected = dense_ggn(model, names, targets, lambda z, label: -z.log_softmax(0)[label])
    with ggn_of(model, [batch], "cross_entropy", (prefix,)) as operator:
        assert torch.allclose(dense(operator), expected)
        assert check_adjoint(operator, seed=0) < 1e-10


class Bare(nn.Module):
    """Its parameter is what it returns."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.randn(size, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.z


def test_logits_that_are_a_parameter():
    model = in_general_position(lambda: Bare(4)).double()
    batch = (torch.zeros(4, 1), torch.arange(4) % CLASSES)
    blocks = [torch.diag(p) - torch.outer(p, p) for p in model.z.detach().softmax(1)]
    with ggn_of(model, [batch], "cross_entropy") as operator:
        assert torch.allclose(dense(operator), torch.block_diag(*blocks) / 4)


@pytest.mark.parametrize("loss", [row_cross_entropy, mean_cross_entropy])
def test_a_loss_without_a_likelihood_has_no_ggn(loss: Any):
    case = CASES["mlp"]
    with pytest.raises(ConfigurationError, match="likelihood"), ggn_of(case.model(), case.microbatches(), loss):
        pass


@pytest.mark.parametrize(("spoiled", "message"), [("input", "nan"), ("labels", "no sample")])
def test_a_loss_that_is_undefined_has_no_ggn(spoiled: str, message: str):
    case = CASES["mlp"]
    x, y = case.microbatches((3,))[0]
    with offline_problem(case.model(), [(x, y)], loss=case.loss, params_filter=None) as problem:
        if spoiled == "input":
            x[0, 0] = float("nan")
        else:
            y[:] = IGNORED
        with pytest.raises(ProbeError, match=message):
            GGNOperator(problem.objective, [(x, y)])


@pytest.mark.parametrize(("place", "prefix"), [("inside", ""), ("last", ""), ("inside", "a"), ("last", "b")])
def test_a_kernel_without_a_second_derivative_is_caught(place: str, prefix: str):
    found = ggn_of(with_fused_kernel(place), CASES["mlp"].microbatches(), "cross_entropy", (prefix,))
    with found as operator, pytest.raises(RefusedError, match="no second derivative"):
        check_adjoint(operator, seed=0)
