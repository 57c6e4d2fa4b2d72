"""The cross-entropy of capturing passes: PyTorch's values, gradients, second gradients and errors, in less memory."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_callbacks.gram.capture import interception as capture_module
from curvature_callbacks.gram.capture.interception import Capture
from curvature_callbacks.model.loss.cross_entropy_kernel import fused_cross_entropy
from tests.cases import CASES
from tests.gram.capture.rule_cases import assert_exact
from tests.gram.gram_cases import parameter_grams
from tests.reference import sample_gradients

REDUCTIONS = ("none", "mean", "sum")


def logits(rows: int = 7, classes: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    return (3 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(0), dtype=dtype)).requires_grad_()


def by_hand(z: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """`d sum_m w_m l_m / d z`, entry by entry."""
    rows = []
    for row, target, weight in zip(z.detach(), targets.tolist(), weights.tolist(), strict=True):
        p = (row - row.max()).exp()
        p = p / p.sum()
        if target >= 0:
            p[target] -= 1
        rows.append(p * (weight if target >= 0 else 0.0))
    return torch.stack(rows)


# On a CPU the kernel works through 2**19 logits at a time.
@pytest.mark.parametrize("classes", [5, 1 << 18, (1 << 18) + 1], ids=["whole", "two rows", "row by row"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("targets", [[0, 4, 2, 1, 3, 3, 0], [0, -100, 2, -100, 3, 3, -100]], ids=["all", "ignored"])
def test_values_and_gradients(targets: list[int], reduction: str, classes: int):
    z, y = logits(classes=classes), torch.tensor(targets)
    weights = torch.linspace(-1, 2, 7, dtype=torch.float64) if reduction == "none" else torch.ones(7, dtype=torch.float64)
    found, expected = (f(z, y, reduction=reduction) for f in (fused_cross_entropy, F.cross_entropy))
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-14, rtol=1e-15)
    (gradient,) = torch.autograd.grad((found * weights).sum() if reduction == "none" else found, z)
    scale = 1.0 if reduction != "mean" else 1.0 / sum(target >= 0 for target in targets)
    assert torch.allclose(gradient, by_hand(z, y, weights) * scale, atol=1e-14, rtol=0)
    assert found.grad_fn is not None
    assert "CrossEntropy" in str(found.grad_fn) or reduction != "none"  # the own form, not PyTorch's


def test_another_label_to_ignore():
    z, y = logits(), torch.tensor([0, 4, 2, 2, 3, 3, 0])
    found = fused_cross_entropy(z, y, ignore_index=2, reduction="none")
    assert torch.equal(found == 0, y == 2)
    (gradient,) = torch.autograd.grad(found.sum(), z)
    assert torch.equal(gradient[y == 2], torch.zeros(2, 5, dtype=torch.float64))
    assert torch.allclose(gradient, by_hand(z, torch.where(y == 2, -100, y), torch.ones(7)), atol=1e-14, rtol=0)


def test_first_and_second_derivatives_by_differences():
    z, y = logits(4), torch.tensor([0, 4, -100, 1])
    for reduction in REDUCTIONS:
        assert torch.autograd.gradcheck(lambda x, how=reduction: fused_cross_entropy(x, y, reduction=how), z)
        assert torch.autograd.gradgradcheck(lambda x, how=reduction: fused_cross_entropy(x, y, reduction=how), z)


def test_third_derivatives():
    z, y = logits(3), torch.tensor([0, 4, 1])
    results = []
    for f in (fused_cross_entropy, F.cross_entropy):
        (first,) = torch.autograd.grad(f(z, y, reduction="none").square().sum(), z, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), z, create_graph=True)
        results.append(torch.autograd.grad(second.square().sum(), z)[0])
    assert torch.allclose(*results, rtol=1e-11)


def test_several_backward_passes_through_one_graph():
    z, y = logits(), torch.tensor([0, 4, 2, 1, 3, 3, 0])
    losses = fused_cross_entropy(z, y, reduction="none")
    first, second = (torch.autograd.grad(losses.sum(), z, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_target_at_all(reduction: str):
    z, y = logits(), torch.full((7,), -100)
    found, expected = (f(z, y, reduction=reduction) for f in (fused_cross_entropy, F.cross_entropy))
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_large_and_infinite_logits(dtype: torch.dtype):
    z = torch.tensor([[1e4, -1e4, 0.0], [float("-inf"), 2.0, 1.0]], dtype=dtype).requires_grad_()
    y = torch.tensor([1, 1])
    found, expected = (f(z, y, reduction="none") for f in (fused_cross_entropy, F.cross_entropy))
    assert torch.allclose(found, expected, rtol=1e-6 if dtype == torch.float32 else 1e-15, atol=0)
    one, other = (torch.autograd.grad(loss.sum(), z)[0] for loss in (found, expected))
    assert torch.allclose(one, other, atol=0, rtol=1e-6)


OTHERS: dict[str, Any] = {
    "weights": ((logits(), torch.arange(5).repeat(2)[:7]), {"weight": torch.rand(5, dtype=torch.float64)}),
    "smoothing": ((logits(), torch.arange(5).repeat(2)[:7]), {"label_smoothing": 0.1}),
    "probabilities": ((logits(), torch.rand(7, 5, dtype=torch.float64).softmax(1)), {}),
    "classes on axis 1": ((logits(14).view(2, 5, 7), torch.arange(5).repeat(3)[:14].view(2, 7)), {}),
    "one row": ((logits()[0], torch.tensor(2)), {}),
    "old arguments": ((logits(), torch.arange(5).repeat(2)[:7]), {"size_average": False}),
    "half precision": ((logits(dtype=torch.float32).bfloat16(), torch.arange(5).repeat(2)[:7]), {}),
    "no gradient": ((logits().detach(), torch.arange(5).repeat(2)[:7]), {}),
}


@pytest.mark.filterwarnings("ignore:size_average and reduce args")
@pytest.mark.parametrize("name", OTHERS)
def test_everything_else_is_pytorchs_own(name: str):
    arguments, options = OTHERS[name]
    assert torch.equal(fused_cross_entropy(*arguments, **options), F.cross_entropy(*arguments, **options))


def test_inside_a_transform_it_is_pytorchs_own():
    z, y = logits(), torch.arange(5).repeat(2)[:7]
    found = torch.func.grad(lambda x: fused_cross_entropy(x, y))(z.detach())
    assert torch.allclose(found, by_hand(z, y, torch.ones(7)) / 7, atol=1e-14, rtol=0)


@pytest.mark.parametrize(
    ("z", "y", "error"), [(logits(), [5] * 7, (IndexError, RuntimeError)), (logits(), [0] * 6, ValueError)]
)
def test_errors_are_pytorchs_own(z: Tensor, y: list[int], error: type[Exception]):
    with pytest.raises(error):
        F.cross_entropy(z, torch.tensor(y))
    with pytest.raises(error):
        fused_cross_entropy(z, torch.tensor(y))


def test_labels_of_a_kind_pytorch_does_not_take():
    for loss in (F.cross_entropy, fused_cross_entropy):
        with pytest.raises(RuntimeError, match="Long"):
            loss(logits(), torch.zeros(7, dtype=torch.int32))


def test_one_buffer_of_the_size_of_the_logits():
    """What is made in forward and backward pass, by size, beside what is given."""
    z, y = logits(512, 2000, torch.float32), torch.zeros(512, dtype=torch.int64)

    def made(loss: Any) -> int:
        with torch.profiler.profile(profile_memory=True) as profile:
            torch.autograd.grad(loss(z, y, reduction="sum"), z)
        sizes = [event.self_cpu_memory_usage for event in profile.events() if event.name in ("aten::empty", "aten::empty_like")]
        sizes += [event.self_cpu_memory_usage for event in profile.events() if event.name.startswith("aten::_log_softmax")]
        return sum(size >= z.nbytes for size in sizes)

    assert made(fused_cross_entropy) == 1  # and pieces of 262 rows
    assert made(F.cross_entropy) > 1


def test_capturing_passes_take_it(monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple[int, ...]] = []

    def counting(z: Tensor, *arguments: Any, **options: Any) -> Tensor:
        calls.append(tuple(z.shape))
        return fused_cross_entropy(z, *arguments, **options)

    monkeypatch.setattr(capture_module, "fused_cross_entropy", counting)
    case = CASES["gpt2"]
    model, microbatches = case.model(), case.microbatches((4,))
    found = parameter_grams(model, microbatches, loss=None)
    assert calls == [(28, 11)]
    assert_exact(found, sample_gradients(model, microbatches, case.kind), model, 1e-6)


def test_a_loss_with_derivatives_of_its_own():
    """A penalty on the gradient by the input, differentiated once more by the capturing pass."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with torch.enable_grad():
            x = batch[0].detach().requires_grad_()
            losses = F.cross_entropy(model(x), batch[1], reduction="none")
            (slope,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
            return losses + slope.square().sum(1)

    model, microbatches = CASES["mlp"].model(), CASES["mlp"].microbatches((4,))
    found = parameter_grams(model, microbatches, loss=loss)
    rows = [(microbatches[0][0][i : i + 1], microbatches[0][1][i : i + 1]) for i in range(4)]
    parameters = dict(model.named_parameters())
    per_row = [torch.autograd.grad(loss(model, row).sum(), list(parameters.values())) for row in rows]
    truth = {name: torch.stack([row[i].flatten() for row in per_row]) for i, name in enumerate(parameters)}
    assert_exact(found, truth, model, 1e-10)


def test_nothing_of_it_outside_a_capture():
    z, y = logits(), torch.arange(5).repeat(2)[:7]
    with Capture({}, 7, unruled={}):
        inside = F.cross_entropy(z, y, reduction="none")
    assert type(inside.grad_fn) is not type(F.cross_entropy(z, y, reduction="none").grad_fn)
