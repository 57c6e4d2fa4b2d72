import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_callbacks import ProbeError, Problem, RefusedError, compute_spectrum
from curvature_callbacks.compute.offline import offline_problem
from curvature_callbacks.operators.hessian import HessianOperator
from tests.cases import CASES, CLASSES, Case, in_general_position, quick_for
from tests.operators.operator_cases import PartlyUsed, dense, names_of, partial_loss, vectors, with_fused_kernel
from tests.reference import case_loss, dense_hessian, finite_difference_hessian, hessian_product, relative_error

# Case to the prefixes of the parameters to differentiate by, few enough for a dense matrix.
DENSE = {
    "gpt2": ("transformer.h.1.ln_1", "transformer.h.1.attn.c_proj", "transformer.ln_f"),
    "llama": ("model.layers.0.input_layernorm", "model.layers.0.self_attn.k_proj", "model.norm"),
    "bert": ("bert.encoder.layer.1.attention.self.query", "cls.predictions.bias"),
    "vit": ("vit.embeddings.position", "vit.layers.0.attention.q_proj.bias", "classifier"),
    "resnet": ("resnet.encoder.stages.0.layers.0.layer.0.normalization", "classifier"),
    "mlp": ("",),
    "convnet": ("conv1", "bn1", "fc"),
    "reused": ("",),
}
SIZES = (2, 1, 2)
TOLERANCE = 1e-5  # float32 inside Hugging Face's norms, rotary embeddings and losses


def keep(name: str) -> Callable[[str, Any], bool]:
    return lambda parameter, _: parameter.startswith(DENSE[name])


@contextmanager
def hessian_of(case: Case, model: nn.Module, microbatches: list[Any], **options: Any) -> Iterator[HessianOperator]:
    with problem_of(case, model, microbatches, **options) as problem:
        yield problem.hessian()


@contextmanager
def problem_of(case: Case, model: nn.Module, microbatches: list[Any], **options: Any) -> Iterator[Problem]:
    """On running statistics, as the oracle evaluates the model."""
    options = {"loss": case.loss, "params_filter": None, "batch_norm": "eval", **options}
    with offline_problem(model, microbatches, **options) as problem:
        yield problem


@cache
def dense_truth(name: str) -> Tensor:
    case = CASES[name]
    model = case.model()
    return dense_hessian(model, case_loss(case, case.microbatches(SIZES)), names_of(model, DENSE[name]))


@pytest.mark.parametrize("sizes", [(3,), SIZES], ids=["one", "ragged"])
@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_the_oracle(name: str, sizes: tuple[int, ...]):
    case = CASES[name]
    model, microbatches = case.model(), case.microbatches(sizes)
    with hessian_of(case, model, microbatches) as operator:
        v = torch.randn(operator.shape[0], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        found = operator.matmat(v[:, None])[:, 0]
    assert relative_error(found, hessian_product(model, case_loss(case, microbatches), v)) < TOLERANCE


@pytest.mark.parametrize("name", quick_for(DENSE, "mlp", "resnet", "gpt2"))
def test_the_matrix_is_the_dense_hessian(name: str):
    case = CASES[name]
    with hessian_of(case, case.model(), case.microbatches(SIZES), params_filter=keep(name)) as operator:
        assert relative_error(dense(operator), dense_truth(name)) < TOLERANCE


@pytest.mark.parametrize("name", ["gpt2", "resnet", "mlp", "reused"])
def test_eigenvalues_are_those_of_the_dense_hessian(name: str):
    case, truth = CASES[name], torch.linalg.eigvalsh(dense_truth(name)).flip(0)
    options: Mapping[str, Any] = {"k": 6, "which": "BE", "tol": 1e-5, "max_matvecs": 120, "batch_norm": "eval"}
    pairs = compute_spectrum(case.model(), case.microbatches(SIZES), loss=case.loss, params_filter=keep(name), **options)
    assert pairs.converged.all()
    assert relative_error(pairs.eigenvalues, torch.cat([truth[:3], truth[-3:]])) < TOLERANCE


@pytest.mark.parametrize("name", ["gpt2", "vit", "mlp"])
def test_float32_models_agree_with_float64(name: str):
    case = CASES[name]
    with hessian_of(case, case.model(torch.float32), case.microbatches(SIZES), params_filter=keep(name)) as operator:
        assert operator.dtype == torch.float32
        V = vectors(operator)
        assert relative_error(operator.matmat(V), dense_truth(name) @ V.double()) < 1e-4


def test_the_oracle_agrees_with_finite_differences():
    case = CASES["mlp"]
    model, microbatches = case.model(), case.microbatches()
    names = names_of(model, ("",))
    loss = case_loss(case, microbatches)
    truth = finite_difference_hessian(model, loss, names, 1e-4)
    assert relative_error(dense_hessian(model, loss, names), truth) < 1e-6
    with hessian_of(case, model, microbatches) as operator:
        assert relative_error(dense(operator), truth) < 1e-6


@pytest.mark.parametrize("name", ["bert", "resnet", "reused"])
def test_contract(name: str):
    """Symmetric, linear, column by column, the same bits twice."""
    case = CASES[name]
    with hessian_of(case, case.model(), case.microbatches(SIZES), params_filter=keep(name)) as operator:
        U = torch.randn(operator.shape[0], 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        HU = operator.matmat(U)
        products = U.T @ HU
        assert HU.shape == U.shape
        assert relative_error(products, products.T) < TOLERANCE
        assert relative_error(operator.matmat(2 * U[:, :1] - U[:, 1:2]), 2 * HU[:, :1] - HU[:, 1:2]) < TOLERANCE
        assert torch.equal(torch.cat([operator.matmat(u[:, None]) for u in U.T], dim=1), HU)
        assert torch.equal(operator.matmat(U), HU)


@pytest.mark.parametrize("name", ["gpt2", "convnet"])
def test_no_side_effect_on_the_model(name: str):
    case = CASES[name]
    model, microbatches = case.model().train(), case.microbatches()
    before = copy.deepcopy(model.state_dict())
    kept = {parameter: parameter.data_ptr() for parameter in model.parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    state = torch.get_rng_state()
    compute_spectrum(model, microbatches, loss=case.loss, k=2, max_matvecs=4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.data_ptr() == address for parameter, address in kept.items())
    assert all(torch.equal(parameter.grad, torch.full_like(parameter, 3.0)) for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert torch.equal(state, torch.get_rng_state())


def test_microbatches_are_weighted_by_their_targets():
    """One batch in pieces is one batch, whatever the pieces' lengths."""
    case = CASES["gpt2"]
    model, (batch,) = case.model(), case.microbatches((6,))
    pieces = [{name: values[a:b] for name, values in batch.items()} for a, b in ((0, 1), (1, 5), (5, 6))]
    with hessian_of(case, model, [batch], params_filter=keep("gpt2")) as whole:
        V = torch.randn(whole.shape[0], 1, dtype=torch.float64)
        expected = whole.matmat(V)
    with hessian_of(case, model, pieces, params_filter=keep("gpt2")) as parts:
        assert relative_error(parts.matmat(V), expected) < TOLERANCE


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_a_microbatch_without_valid_target_changes_nothing(empty: int):
    case = CASES["gpt2"]
    model, microbatches = case.model(), case.microbatches()
    microbatches[empty]["labels"][:] = -100
    rest = [batch for i, batch in enumerate(microbatches) if i != empty]
    with hessian_of(case, model, rest, params_filter=keep("gpt2")) as operator:
        V = torch.randn(operator.shape[0], 1, dtype=torch.float64)
        expected = operator.matmat(V)
    with hessian_of(case, model, microbatches, params_filter=keep("gpt2")) as operator:
        assert relative_error(operator.matmat(V), expected) < TOLERANCE


def test_unused_and_linear_parameters_have_a_zero_block():
    model = in_general_position(PartlyUsed).double()
    batch = CASES["mlp"].microbatches((4,))[0]
    truth = dense_hessian(model, lambda m: partial_loss(m, batch).mean(), names_of(model, ("",)))
    with hessian_of(CASES["mlp"], model, [batch], loss=partial_loss) as operator:
        found = dense(operator)
    assert relative_error(found, truth) < 1e-12
    order = [name for name, parameter in model.named_parameters() for _ in range(parameter.numel())]
    flat = torch.tensor([name in ("unused", "linear") for name in order])
    assert found[flat].abs().max() == found[:, flat].abs().max() == 0
    assert found.abs().max() > 0


@pytest.mark.parametrize("which", ["linear", "unused"])
def test_a_loss_linear_in_everything_has_the_zero_hessian(which: str):
    model = in_general_position(PartlyUsed).double()
    batch = CASES["mlp"].microbatches((4,))[0]
    with hessian_of(CASES["mlp"], model, [batch], loss=partial_loss, params_filter=lambda name, _: name == which) as operator:
        assert torch.equal(dense(operator), torch.zeros(operator.shape, dtype=torch.float64))


def test_a_named_block_is_its_diagonal_block():
    case = CASES["mlp"]
    model, microbatches = case.model(), case.microbatches()
    with problem_of(case, model, microbatches) as problem:
        whole, part = dense(problem.hessian()), dense(problem.hessian(["2.weight", "2.bias"]))
    start = model[0].weight.numel() + model[0].bias.numel()
    assert torch.allclose(part, whole[start : start + len(part), start : start + len(part)])


def test_a_loss_that_is_not_finite_has_no_hessian():
    case = CASES["mlp"]
    x, y = case.microbatches((3,))[0]
    x[0, 0] = float("nan")
    with pytest.raises(ProbeError, match="nan"):
        compute_spectrum(case.model(), (x, y), loss=case.loss, k=1)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_attention_that_can_be_differentiated_twice(name: str, implementation: str):
    case = CASES[name]
    model, microbatches = case.model(), case.microbatches(SIZES)
    model.config._attn_implementation = implementation
    with hessian_of(case, model, microbatches, params_filter=keep(name)) as operator:
        V = vectors(operator)
        assert relative_error(operator.matmat(V), dense_truth(name) @ V) < TOLERANCE


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3", "flex_attention", "paged|sdpa"])
def test_attention_that_cannot_is_refused(implementation: str):
    case = CASES["gpt2"]
    with problem_of(case, case.model(), case.microbatches((2,))) as problem:
        problem.model.config._attn_implementation = implementation
        with pytest.raises(RefusedError, match=implementation.replace("|", r"\|")):
            problem.hessian()


class OnceCrossEntropy(torch.autograd.Function):
    """A fused loss: everything trainable lies before it."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, targets)
        return F.cross_entropy(logits, targets, reduction="none")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, targets = ctx.saved_tensors
        return gradient[:, None] * (logits.softmax(1) - F.one_hot(targets, CLASSES)), None


def fused_loss(model: nn.Module, batch: Any) -> Tensor:
    return OnceCrossEntropy.apply(model(batch[0]), batch[1])


def test_a_kernel_without_a_second_derivative_is_refused_with_the_reason():
    batch = CASES["mlp"].microbatches((4,))[0]
    with pytest.raises(RefusedError, match="no second derivative"):
        compute_spectrum(with_fused_kernel("inside"), batch, loss="cross_entropy", k=2)


@pytest.mark.parametrize(
    ("place", "loss", "prefix"),
    [("last", "cross_entropy", ""), ("none", fused_loss, ""), ("inside", "cross_entropy", "a"), ("none", fused_loss, "b")],
    ids=["last", "fused_loss", "only_before", "fused_loss_head"],
)
def test_such_a_kernel_after_everything_measured_is_refused_too(place: str, loss: Any, prefix: str):
    """Then the product is symmetric though wrong, or plainly zero."""
    batch = CASES["mlp"].microbatches((4,))[0]
    options: Mapping[str, Any] = {"loss": loss, "params_filter": lambda name, _: name.startswith(prefix)}
    with problem_of(CASES["mlp"], with_fused_kernel(place), [batch], **options) as problem, pytest.raises(RefusedError):
        problem.hessian().self_check(0)


@pytest.mark.parametrize(("place", "prefix"), [("first", ""), ("inside", "b")])
def test_such_a_kernel_before_everything_measured_does_no_harm(place: str, prefix: str):
    model, batch = with_fused_kernel(place), CASES["mlp"].microbatches((4,))[0]
    truth = dense_hessian(model, lambda m: F.cross_entropy(m(batch[0]), batch[1]), names_of(model, (prefix,)))
    with hessian_of(CASES["mlp"], model, [batch], params_filter=lambda name, _: name.startswith(prefix)) as operator:
        assert operator.self_check(0).error < 1e-4
        assert relative_error(dense(operator), truth) < 1e-10


class TwiceTanh(torch.autograd.Function):
    """A custom operation whose backward pass can be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (1 - ctx.saved_tensors[0].tanh() ** 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_custom_operation_with_a_second_derivative_is_measured(dtype: torch.dtype):
    model, batch = with_fused_kernel("none").to(dtype), CASES["mlp"].microbatches((4,))[0]

    def loss(m: nn.Module, b: Any) -> Tensor:
        return F.cross_entropy(TwiceTanh.apply(m(b[0])), b[1], reduction="none")

    truth = dense_hessian(model, lambda m: loss(m, batch).mean(), names_of(model, ("",)))
    with hessian_of(CASES["mlp"], model, [batch], loss=loss) as operator:
        assert operator.self_check(0).error < 2e-3
        assert relative_error(dense(operator), truth) < 1e-5


@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.float64, 1e-6), (torch.float32, 1e-3)])
@pytest.mark.parametrize("name", ["gpt2", "mlp"])
def test_differences_of_the_gradient_agree_with_the_product(name: str, dtype: torch.dtype, accuracy: float):
    case = CASES[name]
    if name == "gpt2" and dtype == torch.float64:
        accuracy = 1e-3  # its loss is computed in float32
    with hessian_of(case, case.model(dtype), case.microbatches(SIZES), params_filter=keep(name)) as operator:
        v = torch.randn(operator.shape[0], generator=torch.Generator().manual_seed(0), dtype=dtype)
        assert relative_error(operator.difference_product(v), dense_truth(name) @ v.double()) < accuracy
