import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from curvature_callbacks import KFACCoverage, ProbeError, compute_kfac_coverage
from curvature_callbacks.compute.offline import offline_problem
from curvature_callbacks.measurements.kfac_coverage import coverage_of
from tests.cases import CASES, CLASSES, in_general_position
from tests.reference import float64_copy, mean_loss


def energies(name: str) -> dict[str, float]:
    case = CASES[name]
    replica = float64_copy(case.model())
    mean_loss(replica, case.microbatches(), case.kind).backward()
    return {name: float((p.grad**2).sum()) if p.grad is not None else 0.0 for name, p in replica.named_parameters()}


# Counted by hand from the configurations in `cases.py`: (tensors covered, all), (elements covered, all).
HAND_COUNTS = {
    "mlp": ((6, 6), (30 + 6 + 24 + 4 + 12 + 3, 79)),
    # embedding tied to the head and five LayerNorms of 2 x 8 are not; wpe 16 x 8, per block 8*24+24, 8*8+8, 8*12+12, 12*8+8
    "gpt2": ((1 + 2 * 8, 1 + 1 + 2 * 12 + 2), (128 + 2 * 500, 88 + 128 + 2 * 532 + 16)),
    # five norms of 8; embedding and head 11 x 8, per block q 64, k and v 32 each, o 64, three of 96
    "llama": ((2 + 2 * 7, 3 + 2 * 9), (176 + 2 * 480, 176 + 2 * 496 + 8)),
    # grouped convolution and two of three BatchNorms with it; stem 36, block conv 4*4*9+4, head 12+3
    "convnet": ((1 + 2 + 2, 13), (36 + 148 + 15, 36 + 148 + 76 + 3 * 8 + 15)),
}


@pytest.mark.parametrize("name", HAND_COUNTS)
def test_shares_agree_with_counts_by_hand(name: str):
    case = CASES[name]
    report = compute_kfac_coverage(case.model(), case.microbatches(), loss=case.loss)
    (tensors, all_tensors), (elements, all_elements) = HAND_COUNTS[name]
    assert report.tensors == pytest.approx(tensors / all_tensors)
    assert report.elements == pytest.approx(elements / all_elements)
    assert len(report.uncovered) == all_tensors - tensors


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5", "vit", "resnet", "mixtral", "convnet", "encoder", "scaled"])
def test_energy_is_the_share_of_the_mean_gradient(name: str):
    case = CASES[name]
    report = compute_kfac_coverage(case.model(), case.microbatches(), loss=case.loss)
    by_name = energies(name)
    covered = sum(energy for parameter, energy in by_name.items() if parameter not in report.uncovered)
    assert set(report.uncovered) <= set(by_name)
    assert report.gradient_energy == pytest.approx(covered / sum(by_name.values()), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "parameter", "reason"),
    [
        ("gpt2", "transformer.wte.weight", r"shared between embedding and linear"),
        ("gpt2", "transformer.ln_f.weight", r"scale"),
        ("gpt2", "transformer.ln_f.bias", r"shift"),
        ("llama", "model.norm.weight", r"scale"),
        ("convnet", "layer1.1.conv1.weight", r"grouped conv2d"),
        ("convnet", "layer1.1.conv1.bias", r"bias of `layer1.1.conv1.weight`, used by grouped conv2d"),
        ("convnet", "bn1.weight", r"scale"),
        ("convnet", "bn1.bias", r"shift"),
        ("mixtral", "model.layers.0.mlp.experts.down_proj", r"no Kronecker factors"),
        ("vit", "vit.embeddings.cls_token", r"no Kronecker factors"),
    ],
)
def test_every_uncovered_parameter_has_its_reason(name: str, parameter: str, reason: str):
    case = CASES[name]
    report = compute_kfac_coverage(case.model(), case.microbatches(), loss=case.loss)
    assert re.search(reason, report.uncovered[parameter])


def test_a_layer_used_several_times_counts_as_covered():
    case = CASES["reused"]
    report = compute_kfac_coverage(case.model(), case.microbatches(), loss=case.loss)
    assert set(report.uncovered) == {"norm.weight", "norm.bias"}


class Convolutions(nn.Module):
    """One to three dimensions, with a trained bias and without."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(1, 2, 2)
        self.two = nn.Conv2d(1, 2, 2, bias=False)
        self.three = nn.Conv3d(1, 2, 1, stride=2)
        self.grouped = nn.Conv1d(2, 2, 1, groups=2)
        self.transposed = nn.ConvTranspose1d(2, CLASSES, 2)

    def forward(self, x: Tensor) -> Tensor:  # (N, 5)
        maps = x[:, None, None] * x[:, None, :, None]  # (N, 1, 5, 5)
        kept = self.two(maps).mean((2, 3)) + self.three(maps[:, :, None]).mean((2, 3, 4))
        return self.transposed(self.grouped(self.one(x[:, None])) + kept[..., None]).mean(2)


def test_convolutions_count_but_for_grouped_and_transposed_ones():
    model = in_general_position(Convolutions).double()
    report = compute_kfac_coverage(model, CASES["mlp"].microbatches(), loss="cross_entropy")
    assert set(report.uncovered) == {f"{layer}.{part}" for layer in ("grouped", "transposed") for part in ("weight", "bias")}
    assert report.elements == pytest.approx((4 + 2 + 8 + 2 + 2) / (4 + 2 + 8 + 2 + 2 + 2 + 2 + 12 + 3))


def test_a_bias_counts_with_its_layer_and_by_itself_where_only_it_is_trained():
    case = CASES["convnet"]
    model = case.model()
    report = compute_kfac_coverage(model, case.microbatches(), loss=case.loss, params_filter=lambda name, _: "bias" in name)
    assert "fc.bias" not in report.uncovered
    assert "bn1.bias" in report.uncovered


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(5, CLASSES)
        self.unused = nn.Linear(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_what_the_loss_does_not_use_is_uncovered_and_without_energy():
    model = in_general_position(Unused).double()
    report = compute_kfac_coverage(model, CASES["mlp"].microbatches(), loss="cross_entropy")
    assert report.uncovered == dict.fromkeys(("unused.weight", "unused.bias"), "not used by the loss")
    assert (report.tensors, report.gradient_energy) == (0.5, 1.0)


def test_params_filter_and_frozen_parameters_do_not_count():
    case = CASES["gpt2"]
    model = case.model()
    model.transformer.ln_f.requires_grad_(False)
    report = compute_kfac_coverage(model, case.microbatches(), params_filter=lambda name, _: "wte" not in name)
    assert set(report.uncovered) == {
        f"transformer.h.{i}.ln_{j}.{part}" for i in (0, 1) for j in (1, 2) for part in ("weight", "bias")
    }


def test_a_gradient_that_is_not_finite_is_no_answer():
    x, y = CASES["mlp"].microbatches((3,))[0]
    x[0, 0] = float("inf")
    with pytest.raises(ProbeError, match="finite"):
        compute_kfac_coverage(CASES["mlp"].model(), (x, y), loss="cross_entropy")


@pytest.mark.parametrize("after_grams", [False, True])
def test_the_record_is_the_report(after_grams: bool):
    """Whether the operations come from the Gram's pass or from one of its own."""
    case = CASES["convnet"]
    report = compute_kfac_coverage(case.model(), case.microbatches(), loss=case.loss)
    with offline_problem(case.model(), case.microbatches(), loss=case.loss, params_filter=None) as problem:
        if after_grams:
            assert problem.grams().operations
        (record,), _ = KFACCoverage().measure(problem, None)
    assert record.scalars == pytest.approx(
        {"tensors": report.tensors, "elements": report.elements, "gradient_energy": report.gradient_energy}
    )
    assert record.metadata["uncovered"] == report.uncovered
    assert torch.tensor(list(record.scalars.values())).max() <= 1


class OwnNames(nn.Module):
    """Layers whose biases are not called `bias`: a linear and a grouped convolution; and one with a parametrised weight."""

    def __init__(self, parametrised: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.matrix, self.offset = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(4))
        self.kernel, self.shift = nn.Parameter(torch.randn(4, 2, 1)), nn.Parameter(torch.randn(4))
        self.head = parametrised(nn.Linear(4, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(nn.functional.linear(x, self.matrix, self.offset))
        return self.head(nn.functional.conv1d(hidden[..., None], self.kernel, self.shift, groups=2)[..., 0])


@pytest.mark.parametrize("parametrised", [weight_norm, spectral_norm])
def test_a_bias_counts_with_its_layer_whatever_both_are_called(parametrised: Callable[[nn.Module], nn.Module]):
    model = in_general_position(lambda: OwnNames(parametrised)).double().eval()
    with offline_problem(model, CASES["mlp"].microbatches(), loss="cross_entropy", params_filter=None) as problem:
        report = coverage_of(problem)
        without_factors = set(problem.kfac(sharing="expand", corrected=False).uncovered)
    assert set(report.uncovered) == without_factors == {name for name, _ in model.named_parameters()} - {"matrix", "offset"}
    assert report.uncovered["shift"] == "bias of `kernel`, used by grouped conv1d, which has no Kronecker factors"
    assert re.fullmatch(
        "bias of `head.parametrizations.weight.original0?`, .* function of it, .*", report.uncovered["head.bias"]
    )
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert report.elements == pytest.approx((20 + 4) / sum(sizes.values()))
