"""`ProbeGrams.kronecker` of whole models against module hooks, unfolded patches and single-row gradients."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_callbacks.compute.offline import offline_problem
from curvature_callbacks.linalg.kronecker import Factor, LayerKronecker
from curvature_callbacks.model.loss.fisher_type import FisherType
from curvature_callbacks.model.loss.sharing import Sharing
from curvature_callbacks.statistics.kronecker_quality import approximation
from tests.cases import CASES, Case
from tests.reference import dense_fisher, float64_copy, num_targets, row_loss, rows, sample_gradients, stacked

NAMES = ["mlp", "gpt2", "convnet", "bert_classifier", "reused"]


def layers_of(case: Case, sharing: Sharing, kind: FisherType | None = None) -> Mapping[str, LayerKronecker]:
    with offline_problem(case.model(), case.microbatches(), loss=case.loss, params_filter=None) as problem:
        return problem.grams.kronecker(kind or FisherType(), sharing=sharing)


def positions_by_hooks(case: Case) -> dict[str, list[list[tuple[Tensor, Tensor]]]]:
    """Module to, for each row, its positions' `(a_t, b_t)`, one row at a time."""
    replica = float64_copy(case.model())
    layers = {
        name: module
        for name, module in replica.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding | transformers.pytorch_utils.Conv1D)
    }
    seen: list[tuple[str, Tensor, Tensor]] = []

    def hook(name: str) -> Any:
        def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not output.requires_grad:
                output = output.requires_grad_()
            seen.append((name, args[0].detach(), output))
            return output

        return note

    for name, module in layers.items():
        module.register_forward_hook(hook(name))
    found: dict[str, list[list[tuple[Tensor, Tensor]]]] = {name: [] for name in layers}
    for row in rows(case.microbatches()):
        seen.clear()
        loss = row_loss(replica, row, case.kind)
        outputs = [output for _, _, output in seen]
        gradients = torch.autograd.grad(loss, outputs, allow_unused=True, materialize_grads=True)
        for name in layers:
            found[name].append([])
        for (name, inputs, _), gradient in zip(seen, gradients, strict=True):
            a, b = _vectors(layers[name], inputs, gradient)
            found[name][-1] += [(x, y) for x, y in zip(a, b, strict=True) if y.abs().max() > 0]
    return found


def _vectors(module: nn.Module, inputs: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """(T, d_in [+ 1]) and (T, d_out) of one row."""
    if isinstance(module, nn.Embedding):
        return F.one_hot(inputs.flatten(), module.num_embeddings).double(), gradient.reshape(-1, module.embedding_dim)
    if isinstance(module, nn.Conv2d):
        a = F.unfold(inputs, module.kernel_size, module.dilation, module.padding, module.stride)[0].T
        b = gradient[0].flatten(1).T
    else:
        a, b = inputs.reshape(-1, inputs.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    bias = getattr(module, "bias", None) is not None
    return torch.cat([a, torch.ones(len(a), int(bias), dtype=a.dtype)], 1), b


def by_definition(samples: list[list[tuple[Tensor, Tensor]]], N: int, sharing: Sharing) -> tuple[Tensor, Tensor]:
    used = [pair for row in samples for pair in row]
    if sharing == "reduce":
        used = [(sum(a for a, _ in row) / len(row), sum(b for _, b in row)) for row in samples if row]
    A = sum(torch.outer(a, a) for a, _ in used) / N
    return A, sum(torch.outer(b, b) for _, b in used) / len(used)


def as_matrix(factor: Factor, size: int = 0) -> Tensor:
    """(d, d); `size` for a diagonal one."""
    basis = torch.eye(size, dtype=torch.float64)[:, factor.axes] if factor.basis is None else factor.basis
    return basis @ torch.diag(factor.eigenvalues) @ basis.T


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", NAMES)
def test_factors_and_quality_of_every_layer(name: str, sharing: Sharing):
    case = CASES[name]
    found = layers_of(case, sharing)
    expected = positions_by_hooks(case)
    gradients = sample_gradients(case.model(), case.microbatches(), case.kind)
    N = sum(num_targets(row, case.kind) > 0 for row in rows(case.microbatches()))
    assert found
    tol = 1e-10 if case.kind == "pair" else 1e-5  # Hugging Face's losses are float32
    for weight, layer in found.items():
        samples = expected[weight.removesuffix(".weight")]
        A, G = by_definition(samples, N, sharing)
        A = torch.diag(A.diagonal()) if layer.factors.A.basis is None else A
        zero = torch.zeros(len(G) * len(A), dtype=torch.float64)
        rebuilt = torch.stack([sum((torch.outer(b, a).flatten() for a, b in row), zero) for row in samples])
        fisher = dense_fisher(rebuilt) * len(rebuilt) / N
        members = [weight] if layer.bias is None else [weight, layer.bias]
        assert torch.allclose(rebuilt.square().sum(), stacked(gradients, members).square().sum(), rtol=tol)
        assert torch.allclose(layer.gram.norm() / N, fisher.norm(), rtol=tol)
        if sharing == "reduce" and ".key." in weight:  # attention does not depend on a shift of all keys: G is rounding
            assert layer.factors.G.eigenvalues.sum() < 1e-12 * fisher.trace()
            continue
        assert torch.allclose(as_matrix(layer.factors.A, len(A)), A, rtol=0, atol=tol * A.abs().max().item()), weight
        assert torch.allclose(as_matrix(layer.factors.G), G, rtol=0, atol=tol * G.abs().max().item()), weight
        judged = approximation(layer.factors, layer.gram, normaliser=layer.normaliser)
        inner = float((fisher * torch.kron(G, A)).sum() / (fisher.norm() * G.norm() * A.norm()))
        assert judged.kfac_cosine == pytest.approx(inner, rel=max(tol, 1e-8)), weight
        assert judged.kfac_cosine <= judged.ekfac_cosine <= 1 + 1e-9
        assert judged.ekfac_relative_error <= judged.kfac_relative_error + 1e-7


def test_the_layers_are_those_that_have_factors():
    assert set(layers_of(CASES["convnet"], "expand")) == {"conv1.weight", "layer1.0.conv1.weight", "fc.weight"}
    gpt2 = layers_of(CASES["gpt2"], "expand")
    assert "transformer.wte.weight" not in gpt2
    assert {"transformer.wpe.weight", "transformer.h.1.attn.c_attn.weight"} <= set(gpt2)
    assert gpt2["transformer.h.1.attn.c_attn.weight"].bias == "transformer.h.1.attn.c_attn.bias"
    assert gpt2["transformer.wpe.weight"].bias is None
    assert gpt2["transformer.wpe.weight"].transposed
    assert gpt2["transformer.h.1.attn.c_attn.weight"].transposed
    assert not layers_of(CASES["mlp"], "expand")["0.weight"].transposed


def exact_gradients(case: Case, names: list[str]) -> tuple[Tensor, int]:
    """(N C, P) of `sqrt(p_c) grad(-log p_c)` of a classifier, and N."""
    replica = float64_copy(case.model())
    parameters = dict(replica.named_parameters())
    found = []
    batches = list(rows(case.microbatches()))
    for x, _ in batches:
        log_p = replica(x)[0].log_softmax(-1)
        for c in range(len(log_p)):
            value = -log_p[c] * log_p[c].detach().exp().sqrt()
            g = torch.autograd.grad(value, [parameters[name] for name in names], retain_graph=True)
            found.append(torch.cat([g[0], g[1][:, None]], 1).flatten())
    return torch.stack(found), len(batches)


@pytest.mark.parametrize("layer", ["0", "2", "4"])
def test_an_exact_fisher_counts_every_input_once(layer: str):
    case = CASES["mlp"]
    names = [f"{layer}.weight", f"{layer}.bias"]
    found = layers_of(case, "expand", FisherType(fisher="exact"))[names[0]]
    g, N = exact_gradients(case, names)
    fisher = dense_fisher(g) * len(g) / N
    assert found.normaliser == N
    assert torch.allclose(found.gram.norm() / N, fisher.norm())
    basis = torch.kron(found.factors.G.basis, found.factors.A.basis)
    assert torch.allclose(found.factors.corrected.flatten(), torch.stack([u @ fisher @ u for u in basis.T]))
    plain = layers_of(case, "expand")[names[0]]
    assert torch.allclose(as_matrix(found.factors.A), as_matrix(plain.factors.A))


def test_draws_of_a_sampled_fisher_share_their_inputs():
    case = CASES["mlp"]
    found = layers_of(case, "expand", FisherType(fisher="sampled", num_draws=40))["4.weight"]
    exact = layers_of(case, "expand", FisherType(fisher="exact"))["4.weight"]
    assert found.normaliser == 40 * exact.normaliser
    assert torch.allclose(as_matrix(found.factors.A), as_matrix(exact.factors.A))
    difference = as_matrix(found.factors.G) - as_matrix(exact.factors.G)
    assert difference.norm() < 0.4 * as_matrix(exact.factors.G).norm()
