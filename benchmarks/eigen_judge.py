"""The independent judge: true residuals in float64 of pairs anybody found, by products that share no code with the package."""

from collections.abc import Sequence
from typing import Any

import torch
from eigen_peers import Classifier, pairs
from fisher_cases import Workload
from torch import Tensor
from torch.func import functional_call, jvp
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def true_residuals(workload: Workload, curvature: str, eigenvalues: Tensor, eigenvectors: Tensor) -> Tensor:
    """`||A v - theta v|| / (|theta| ||v||)` (k,), everything in float64.

    Args:
        workload: model and batch, of any dtype; copied.
        curvature: `hessian` or `ggn`.
        eigenvalues: (k,)
        eigenvectors: (P, k)
    """
    V = eigenvectors.double() / eigenvectors.double().norm(dim=0)
    thetas = eigenvalues.double()
    return (exact_products(workload, curvature, V) - thetas * V).norm(dim=0) / thetas.abs()


def exact_products(workload: Workload, curvature: str, V: Tensor) -> Tensor:
    """`A V` (P, K) in float64."""
    exact = workload.to(torch.float64, torch.arange(workload.num_samples, device=V.device))
    columns = [column.contiguous() for column in V.double().T]
    with sdpa_kernel(SDPBackend.MATH):
        return torch.stack(_hessian(exact, columns) if curvature == "hessian" else _gauss_newton(exact, columns), dim=1)


def _hessian(exact: Workload, columns: Sequence[Tensor]) -> list[Tensor]:
    """By differentiating `<gradient, v>`."""
    model, (inputs, targets) = Classifier(exact), pairs(exact)
    parameters = list(model.parameters())
    gradient = _flat(torch.autograd.grad(F.cross_entropy(model(inputs), targets), parameters, create_graph=True))
    return [_flat(torch.autograd.grad(gradient @ v, parameters, retain_graph=True)) for v in columns]


def _gauss_newton(exact: Workload, columns: Sequence[Tensor]) -> list[Tensor]:
    """By a forward-mode `J v`, the softmax's own Hessian `(diag(p) - p p') / rows`, and a backward pass."""
    model, (inputs, _) = Classifier(exact), pairs(exact)
    named = {name: value.detach() for name, value in model.named_parameters()}

    def logits(values: dict[str, Tensor]) -> Tensor:
        found: Tensor = functional_call(model, values, (inputs,))
        return found

    leaves = {name: value.clone().requires_grad_() for name, value in named.items()}
    graph = logits(leaves)
    p = graph.detach().softmax(-1)
    products = []
    for v in columns:
        _, change = jvp(logits, (named,), (_named(v, named),))
        weighted = p * (change - (p * change).sum(-1, keepdim=True)) / len(p)
        products.append(_flat(torch.autograd.grad(graph, list(leaves.values()), weighted, retain_graph=True)))
    return products


def _flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _named(vector: Tensor, like: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = vector.split([value.numel() for value in like.values()])
    return {name: part.reshape(value.shape) for (name, value), part in zip(like.items(), parts, strict=True)}
