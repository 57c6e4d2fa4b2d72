"""The callback on the models of Hugging Face: training is the same bits, every number is the oracle's or is refused."""

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, LlamaForCausalLM
from transformers.masking_utils import eager_mask
from transformers.modeling_outputs import CausalLMOutputWithPast

from curvature_callbacks import FisherSpectrum, Measurement, TopEigenpairs
from tests.cases import quick_for
from tests.configurations.model_cases import CASES, NAMES, ModelCase, check, first_probe
from tests.heads import Batch, outputs_and_labels
from tests.reference import (
    IGNORED,
    fisher_eigenvalues,
    float64_copy,
    largest,
    largest_of_hessian,
    mean_loss,
    relative_error,
    sample_gradients,
    stacked,
)

TOLERANCE = 2e-4  # of float32 numbers; Hugging Face's norms, rotary embeddings and losses are float32 in the oracle too
TIGHT: dict[str, Any] = {"k": 1, "which": "LA", "tol": 1e-4, "max_matvecs": 80}
SECOND: list[Measurement] = [TopEigenpairs(**TIGHT), TopEigenpairs(operator="ggn", **TIGHT)]


@pytest.fixture(autouse=True, scope="module")
def _imported_modules_are_no_garbage() -> Iterator[None]:
    """Trainers collect garbage again and again, mostly by looking at the million objects that imports leave."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def marked(names: list[str]) -> list[Any]:
    return [pytest.param(name, marks=[] if CASES[name].is_quick else [pytest.mark.slow]) for name in names]


@pytest.mark.parametrize("name", marked(list(CASES)))
def test_training_is_bit_identical_and_everything_is_measured_or_refused(name: str, tmp_path: Path) -> None:
    assert check(CASES[name], tmp_path) == dict.fromkeys(NAMES.values(), "yes") | dict(CASES[name].refused)


def assert_fisher_of_rows(case: ModelCase, directory: Path) -> None:
    """Against gradients of one row at a time, in float64."""
    model, batch, records = first_probe(case, directory, [FisherSpectrum()])
    gradients = sample_gradients(model, [batch], case.kind)
    found = records["empirical_fisher", None]
    assert not found.failed, found.error
    assert relative_error(torch.tensor(found.arrays["full_eigenvalues"]), fisher_eigenvalues(stacked(gradients))) < TOLERANCE
    assert found.scalars["full_trace"] == pytest.approx(stacked(gradients).square().sum().item() / 4, rel=TOLERANCE)
    blocks = [block for _, block in records if block]
    assert sum(records["empirical_fisher", block].scalars["trace"] for block in blocks) == pytest.approx(
        found.scalars["full_trace"], rel=1e-5
    )


@pytest.mark.parametrize("name", marked([name for name, case in CASES.items() if "Fisher" not in case.refused]))
def test_fisher_is_that_of_single_rows(name: str, tmp_path: Path) -> None:
    assert_fisher_of_rows(CASES[name], tmp_path)


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def in_float64(batch: Batch) -> Batch:
    return {
        key: value.double() if torch.is_tensor(value) and value.is_floating_point() else value for key, value in batch.items()
    }


def as_trained(model: nn.Module) -> nn.Module:
    """A float64 copy whose batch norms know no statistics but those of the batch."""
    replica = float64_copy(model)
    for module in replica.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return replica


def ggn_oracle(model: nn.Module, batch: Batch, *, shifted: bool) -> float:
    """`J' H J` with J in forward mode and H of the mean cross-entropy written out."""
    replica = as_trained(model)
    values = {name: value.detach() for name, value in replica.named_parameters() if value.requires_grad}
    shapes = [value.shape for value in values.values()]
    batch = in_float64(batch)
    labels: list[Tensor] = []

    def logits(*parts: Tensor) -> Tensor:
        class Called:
            def __call__(self, **inputs: Any) -> Any:
                return functional_call(replica, dict(zip(values, parts, strict=True)), kwargs=inputs)

        z, found = outputs_and_labels(Called(), batch, shifted)  # type: ignore[arg-type]
        labels[:] = [found]
        return z.double()

    z, pull = torch.func.vjp(logits, *values.values())
    valid = (labels[0] != IGNORED).double()[..., None]
    p = z.softmax(-1)
    J = torch.stack([flat(pull(one.reshape(z.shape))) for one in torch.eye(z.numel()).double()]) if z.numel() < 50 else None

    def slopes(v: Tensor) -> Tensor:
        if J is not None:  # few enough; the weight norm of Wav2Vec2 has no forward mode
            return (J @ v).reshape(z.shape)
        pieces = v.split([shape.numel() for shape in shapes])
        tangents = tuple(piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True))
        return torch.func.jvp(logits, tuple(values.values()), tangents)[1]

    def product(v: Tensor) -> Tensor:
        u = slopes(v)
        w = p * u - p * (p * u).sum(-1, keepdim=True)
        return flat(pull(w * valid / valid.sum()))

    return largest(product, sum(shape.numel() for shape in shapes))


def assert_second_order(case: ModelCase, directory: Path) -> None:
    """Both, where they are not refused."""
    measure = [one for one in SECOND if NAMES[one.name] not in case.refused]
    model, batch, records = first_probe(case, directory, measure)
    is_coupled = case.refused or records[measure[0].name, None].metadata.get("batch_norm") == "batch"
    loss = (lambda m: m(**in_float64(batch)).loss) if is_coupled else (lambda m: mean_loss(m, [batch], case.kind))
    for one in measure:
        found = records[one.name, None]
        assert not found.failed, found.error
        assert found.scalars["num_converged"] == 1
        hessian = one.name == "hessian"
        value = (
            largest_of_hessian(as_trained(model), loss) if hessian else ggn_oracle(model, batch, shifted=case.kind == "causal")
        )
        assert found.scalars["lambda_max"] == pytest.approx(value, rel=1e-3), one.name


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")  # torch's own rules of forward mode are scripts
@pytest.mark.parametrize(
    "name", quick_for([name for name, case in CASES.items() if "Hessian" not in case.refused], "llama", "resnet")
)
def test_hessian_and_ggn_are_those_of_the_oracles(name: str, tmp_path: Path) -> None:
    assert_second_order(CASES[name], tmp_path)


def numbers(case: ModelCase, directory: Path) -> dict[Any, float]:
    _, _, records = first_probe(case, directory, [FisherSpectrum(), *SECOND])
    found = {key: one.scalars for key, one in records.items() if key[0] in ("empirical_fisher", "hessian", "ggn")}
    return {
        (*key, tag): value[tag] for key, value in found.items() for tag in ("lambda_max", "trace", "full_trace") if tag in value
    }


def with_attention(case: ModelCase, kind: str) -> ModelCase:
    def build() -> nn.Module:
        model: Any = case.build()
        model.set_attn_implementation(kind)
        return model

    return replace(case, build=build)


def with_experts(case: ModelCase, kind: str) -> ModelCase:
    def build() -> nn.Module:
        model: Any = case.build()
        model.set_experts_implementation(kind)
        return model

    return replace(case, build=build)


@pytest.mark.parametrize("name", marked(["llama", "gpt2", "bert classifier", "vit", "whisper"]))
def test_attention_implementations_give_the_same_numbers(name: str, tmp_path: Path) -> None:
    sdpa, eager = (numbers(with_attention(CASES[name], kind), tmp_path / kind) for kind in ("sdpa", "eager"))
    assert len(sdpa) > 3
    assert sdpa == pytest.approx(eager, rel=TOLERANCE)


@pytest.mark.parametrize("name", marked(["mixtral", "qwen3_moe", "gpt_oss"]))
def test_implementations_of_experts_give_the_same_numbers_and_stay_as_set(name: str, tmp_path: Path) -> None:
    """That they stay is a part of every run: see `check` and `first_probe`."""
    kinds = ("grouped_mm", "batched_mm", "eager")
    found = [numbers(with_experts(CASES[name], kind), tmp_path / kind) for kind in kinds]
    assert len(found[0]) > 3
    assert found[0] == pytest.approx(found[1], rel=TOLERANCE)
    assert found[0] == pytest.approx(found[2], rel=TOLERANCE)


KERNEL = "a kernel has no second derivative"
SECOND_REFUSED = {"Hessian": KERNEL, "GGN": KERNEL}


def attended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    return (query @ key.mT / query.shape[-1] ** 0.5 + mask).softmax(-1) @ value


class FusedAttention(torch.autograd.Function):
    """As kernels outside PyTorch do it: a backward pass that leaves no graph and does not say so."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        return attended(query, key, value, mask)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        *inputs, mask = (tensor.detach() for tensor in ctx.saved_tensors)
        with torch.enable_grad():
            leaves = [tensor.requires_grad_() for tensor in inputs]
            found = torch.autograd.grad(attended(*leaves, mask), leaves, slopes[0].detach())
        return *(gradient.detach() for gradient in found), None


def fused_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    T = query.shape[2]
    mask = query.new_full((T, T), -1e9).triu(1) if attention_mask is None else attention_mask
    return FusedAttention.apply(query, key, value, mask.to(query)).transpose(1, 2), None


def registered(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel under this name, as a package that brings it would do, until the test is over."""
    monkeypatch.setitem(AttentionInterface._global_mapping, kind, fused_attention)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, kind, eager_mask)


def named_attention(case: ModelCase, kind: str) -> ModelCase:
    """By the configuration alone: whether the packages of these names are there is not looked at."""

    def build() -> nn.Module:
        model: Any = case.build()
        for module in model.modules():
            if hasattr(module, "config"):
                module.config._attn_implementation_internal = kind
        return model

    return replace(case, build=build)


@pytest.mark.parametrize(
    "kind",
    [
        "a kernel of my own",
        "flash_attention_2",
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in ("flash_attention_3", "flex_attention", "kernels-community/flash-attn3")
        ),
    ],
)
def test_attention_of_other_names_has_a_fisher_and_no_second_derivative(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered(kind, monkeypatch)
    case = named_attention(CASES["llama"], kind)
    assert case.model().config._attn_implementation == kind  # type: ignore[union-attr]
    assert check(case, tmp_path / "checked") == dict.fromkeys(NAMES.values(), "yes") | SECOND_REFUSED
    assert_fisher_of_rows(case, tmp_path / "fisher")
    _, _, records = first_probe(case, tmp_path / "second", SECOND)
    for one in SECOND:
        assert f"attention implementation {kind!r}" in (records[one.name, None].error or "")


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_a_kernel_behind_a_name_that_is_trusted_is_found_by_the_self_check(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered(kind, monkeypatch)
    if kind == "eager":
        monkeypatch.setattr("transformers.models.llama.modeling_llama.eager_attention_forward", fused_attention)
    case = with_attention(CASES["llama"], kind)
    assert check(case, tmp_path) == dict.fromkeys(NAMES.values(), "yes") | SECOND_REFUSED


class FusedSiLU(torch.autograd.Function):
    """Its slope is a constant to autograd, and the product with that is not: enough for the GGN, whose J is right."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.silu(x)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = x.detach().sigmoid()
        return slopes[0] * (s * (1 + x.detach() * (1 - s)))


class OnceSiLU(FusedSiLU):
    """One that says that it is differentiable once, which autograd does not always look at."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:
        return FusedSiLU.backward(ctx, *slopes)


class Activation(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


def with_activation(function: Any) -> ModelCase:
    """Llama whose activation is that of a kernel."""

    def build() -> nn.Module:
        model: Any = CASES["llama"].build()
        for layer in model.model.layers:
            layer.mlp.act_fn = Activation(function)
        return model

    return replace(CASES["llama"], build=build)


@pytest.mark.parametrize(("function", "refused"), [(FusedSiLU, {"Hessian": KERNEL}), (OnceSiLU, SECOND_REFUSED)])
def test_a_fused_activation_has_a_fisher_and_no_hessian(function: Any, refused: dict[str, str], tmp_path: Path) -> None:
    case = with_activation(function)
    assert check(case, tmp_path / "checked") == dict.fromkeys(NAMES.values(), "yes") | refused
    assert_fisher_of_rows(case, tmp_path / "fisher")
    if "GGN" not in refused:
        found, right = (first_probe(one, tmp_path / "ggn", SECOND[1:])[2] for one in (case, CASES["llama"]))
        assert found["ggn", None].scalars["lambda_max"] == pytest.approx(right["ggn", None].scalars["lambda_max"], rel=1e-4)


class FusedCrossEntropy(torch.autograd.Function):
    """Head and loss in one, with the gradient taken on the way forward, as Liger does it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in (hidden, weight)]
            logits = leaves[0] @ leaves[1].T
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            ctx.save_for_backward(*torch.autograd.grad(loss, leaves))
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        return *(slopes[0] * gradient for gradient in ctx.saved_tensors), None


class FusedLlamaForCausalLM(LlamaForCausalLM):
    """Without logits."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, **options: Any) -> Any:  # type: ignore[override]
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        return CausalLMOutputWithPast(loss=FusedCrossEntropy.apply(hidden, self.lm_head.weight, labels))


def test_a_fused_loss_has_a_fisher_and_no_hessian(tmp_path: Path) -> None:
    """At the end of the model, where a constant leaves a symmetric product."""
    config: Any = CASES["llama"].build().config
    case = replace(CASES["llama"], build=lambda: FusedLlamaForCausalLM(config))
    refused = {"Hessian": KERNEL, "GGN": "the likelihood of the loss is not known"}
    assert check(case, tmp_path / "checked") == dict.fromkeys(NAMES.values(), "yes") | refused
    assert_fisher_of_rows(case, tmp_path / "fisher")


def test_an_operation_that_says_it_has_no_second_derivative_is_refused_at_once(tmp_path: Path) -> None:
    """With what to do instead, and that does work."""
    measure: list[Measurement] = [TopEigenpairs(k=1), TopEigenpairs(operator="finite_difference_hessian", k=1, which="LA")]
    _, _, records = first_probe(CASES["wav2vec2"], tmp_path, measure)
    error = records["hessian", None].error or ""
    assert error.startswith("RefusedError: aten::_ctc_loss_backward has no second derivative")
    assert "`operator`='finite_difference_hessian'" in error
    assert records["finite_difference_hessian", None].scalars["lambda_max"] > 0
