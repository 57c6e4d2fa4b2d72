"""Dense float64 oracles, written the slow and obvious way: one row, one gradient entry, one eigenvalue at a time."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.cases import Case

IGNORED = -100


def float64_copy(model: nn.Module) -> nn.Module:
    """An independent copy in evaluation mode, with attention written out instead of fused."""
    replica = copy.deepcopy(model).double().eval()
    for module in replica.modules():
        if hasattr(getattr(module, "config", None), "_attn_implementation"):
            module.config._attn_implementation = "eager"
    return replica


def rows(microbatches: Sequence[Any]) -> Iterator[Any]:
    """Every sample as a batch of one, microbatch after microbatch."""
    for microbatch in microbatches:
        batch = getattr(microbatch, "content", microbatch)
        values = list(batch.values()) if isinstance(batch, Mapping) else list(batch)
        for i in range(len(values[0])):
            row = [value[i : i + 1].double() if value.is_floating_point() else value[i : i + 1] for value in values]
            yield dict(zip(batch, row, strict=True)) if isinstance(batch, Mapping) else tuple(row)


def num_targets(row: Any, kind: str) -> int:
    if kind == "causal":
        return int((row["labels"][0, 1:] != IGNORED).sum())
    return int((row["labels"][0] != IGNORED).sum()) if kind == "tokens" else 1


def row_loss(model: nn.Module, row: Any, kind: str) -> Tensor:
    """The summed loss of one sample: the model's own mean times its targets, 0 without targets."""
    if kind == "pair":
        return F.cross_entropy(model(row[0]), row[1])
    output, n = model(**row), num_targets(row, kind)
    return output.loss * n if n else output.logits.sum() * 0.0


def sample_gradients(model: nn.Module, microbatches: Sequence[Any], kind: str) -> dict[str, Tensor]:
    """Name to (N, p) gradients of each sample's summed loss."""
    return gradients_of(model, [lambda m, row=row: row_loss(m, row, kind) for row in rows(microbatches)])


def gradients_of(model: nn.Module, losses: Sequence[Callable[[nn.Module], Tensor]]) -> dict[str, Tensor]:
    """Name to the gradients of each of the scalar functions of the model."""
    replica = float64_copy(model)
    found: dict[str, list[Tensor]] = {name: [] for name, p in replica.named_parameters() if p.requires_grad}
    for loss in losses:
        replica.zero_grad(set_to_none=True)
        loss(replica).backward()
        for name, parameter in replica.named_parameters():
            if name in found:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                found[name].append(gradient.detach().flatten().clone())
    return {name: torch.stack(gradients) for name, gradients in found.items()}


def stacked(gradients: Mapping[str, Tensor], names: Sequence[str] | None = None) -> Tensor:
    """(N, P) of the named parameters."""
    return torch.cat([gradients[name] for name in (names or list(gradients))], dim=1)


def fisher_eigenvalues(G: Tensor, *, centred: bool = False) -> Tensor:
    """Eigenvalues of `(1/N) sum g g'`, descending, from the singular values of the gradients themselves."""
    G = G - G.mean(0) if centred else G
    return torch.linalg.svdvals(G) ** 2 / len(G)


def dense_fisher(G: Tensor) -> Tensor:
    """(P, P), one outer product at a time."""
    F_ = torch.zeros(G.shape[1], G.shape[1], dtype=torch.float64)
    for g in G:
        F_ += torch.outer(g, g) / len(G)
    return F_


def mean_loss(model: nn.Module, microbatches: Sequence[Any], kind: str) -> Tensor:
    """`sum_i l_i / sum_i n_i`."""
    found = list(rows(microbatches))
    total = sum(num_targets(row, kind) for row in found)
    return torch.stack([row_loss(model, row, kind) for row in found]).sum() / total


def largest(product: Callable[[Tensor], Tensor], size: int) -> float:
    """Largest eigenvalue in float64, by another eigensolver."""

    def matvec(v: Any) -> Any:
        return product(torch.from_numpy(np.array(v, dtype=np.float64).ravel())).numpy()

    operator = LinearOperator((size, size), matvec=matvec, dtype=np.float64)
    return float(eigsh(operator, k=1, which="LA", tol=1e-6, return_eigenvectors=False, v0=np.ones(size))[0])


@sdpa_kernel(SDPBackend.MATH)
def largest_of_hessian(replica: nn.Module, loss: Callable[[nn.Module], Tensor]) -> float:
    """Largest eigenvalue of a Hessian, from a graph of the gradient of `loss(replica)`, a model in float64."""
    leaves = [parameter for parameter in replica.parameters() if parameter.requires_grad]
    options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
    gradients = torch.autograd.grad(loss(replica), leaves, create_graph=True, **options)
    slopes = torch.cat([gradient.flatten() for gradient in gradients])

    def product(v: Tensor) -> Tensor:
        return torch.cat([part.flatten() for part in torch.autograd.grad(slopes, leaves, v, retain_graph=True, **options)])

    return largest(product, slopes.numel())


@sdpa_kernel(SDPBackend.MATH)
def dense_hessian(model: nn.Module, loss: Callable[[nn.Module], Tensor], names: Sequence[str]) -> Tensor:
    """(P, P) of `loss(model)` in the named parameters, one row of second derivatives at a time."""
    replica = float64_copy(model)
    leaves = [dict(replica.named_parameters())[name] for name in names]
    gradients = torch.autograd.grad(loss(replica), leaves, create_graph=True, allow_unused=True, materialize_grads=True)
    lines = []
    for entry in torch.cat([gradient.flatten() for gradient in gradients]):
        line = _second_derivatives(entry, leaves)
        lines.append(torch.cat([part.flatten() for part in line]))
    return torch.stack(lines).detach()


@sdpa_kernel(SDPBackend.MATH)
def hessian_product(model: nn.Module, loss: Callable[[nn.Module], Tensor], v: Tensor) -> Tensor:
    """`H v` in all parameters: the gradient of `g . v`, for models too large for a dense matrix."""
    replica = float64_copy(model)
    leaves = list(replica.parameters())
    gradients = torch.autograd.grad(loss(replica), leaves, create_graph=True, allow_unused=True, materialize_grads=True)
    slope = torch.cat([gradient.flatten() for gradient in gradients]) @ v
    return torch.cat([part.flatten() for part in _second_derivatives(slope, leaves)])


def _second_derivatives(entry: Tensor, leaves: Sequence[Tensor]) -> Sequence[Tensor]:
    if not entry.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return torch.autograd.grad(entry, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)


def jacobian(outputs: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    """(C, P) of outputs (C,), one backward pass for each; their graph is kept."""
    lines = [
        torch.autograd.grad(output, leaves, retain_graph=True, allow_unused=True, materialize_grads=True) for output in outputs
    ]
    return torch.stack([torch.cat([part.flatten() for part in line]) for line in lines]).double()


def dense_ggn(
    model: nn.Module,
    names: Sequence[str],
    targets: Callable[[nn.Module], Iterator[tuple[Tensor, Tensor]]],
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """`(1/n) sum_t J_t' H_t J_t`, H by differentiating the loss twice in the logits; `targets` gives (C,) logits and labels."""
    replica = float64_copy(model)
    leaves = [dict(replica.named_parameters())[name] for name in names]
    P = sum(leaf.numel() for leaf in leaves)
    total, n = torch.zeros(P, P, dtype=torch.float64), 0
    for logits, label in targets(replica):
        J = jacobian(logits, leaves)
        H = torch.autograd.functional.hessian(lambda z, label=label: loss(z, label), logits.detach().double())
        total += J.T @ H @ J
        n += 1
    return total / n


def finite_difference_hessian(
    model: nn.Module, loss: Callable[[nn.Module], Tensor], names: Sequence[str], step: float
) -> Tensor:
    """The same from central differences of the gradient: no second derivative anywhere."""
    replica = float64_copy(model)
    leaves = [dict(replica.named_parameters())[name] for name in names]
    lines = []
    for leaf in leaves:
        for i in range(leaf.numel()):
            ends = [_gradient_at(replica, loss, leaves, leaf, i, sign * step) for sign in (1, -1)]
            lines.append((ends[0] - ends[1]) / (2 * step))
    return torch.stack(lines)


def _gradient_at(
    model: nn.Module, loss: Callable[[nn.Module], Tensor], leaves: Sequence[Tensor], leaf: Tensor, i: int, shift: float
) -> Tensor:
    kept = leaf.detach().clone()
    with torch.no_grad():
        leaf.view(-1)[i] += shift
    gradients = torch.autograd.grad(loss(model), leaves, allow_unused=True, materialize_grads=True)
    with torch.no_grad():
        leaf.copy_(kept)
    return torch.cat([gradient.flatten() for gradient in gradients])


def case_loss(case: Case, microbatches: Sequence[Any]) -> Callable[[nn.Module], Tensor]:
    return lambda model: mean_loss(model, microbatches, case.kind)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected entry; the shorter list of eigenvalues is padded by zeros."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    if found.ndim == expected.ndim == 1 and len(found) != len(expected):
        longer = max(len(found), len(expected))
        found, expected = (F.pad(x, (0, longer - len(x))) for x in (found, expected))
    scale = expected.abs().max().item()
    return (found - expected).abs().max().item() / scale if scale else found.abs().max().item()


def spectrum_metrics(eigenvalues: Tensor, num_params: int, G: Tensor, damping: float) -> dict[str, float]:
    """The metrics of a Fisher spectrum, from a NumPy array of its non-zero eigenvalues and the gradients G (N, P)."""
    lam = np.sort(eigenvalues.numpy())[::-1]
    p = lam / lam.sum()
    dots = [[float(a @ b) for b in G] for a in G]
    pairs = [(i, j) for i in range(len(G)) for j in range(len(G)) if i != j]
    return {
        "rank": float(len(lam)),
        "num_samples": float(len(G)),
        "trace": math.fsum(float(g @ g) for g in G) / len(G),
        "lambda_max": lam[0],
        "condition_number": lam[0] / lam[-1],
        "condition_number_damped": (lam[0] + damping) / ((lam[-1] if len(lam) == num_params else 0.0) + damping),
        "effective_rank": float(np.prod(p**-p)),
        "stable_rank": float(np.linalg.norm(lam) ** 2 / lam[0] ** 2),
        "participation_ratio": float(np.linalg.norm(lam, 1) ** 2 / np.linalg.norm(lam) ** 2),
        "participation_ratio_unbiased": sum(dots[i][i] * dots[j][j] for i, j in pairs) / sum(dots[i][j] ** 2 for i, j in pairs),
        "spectral_gap": lam[0] - (lam[1] if len(lam) > 1 else 0.0),
        "top_share": lam[0] / (math.fsum(float(g @ g) for g in G) / len(G)),
        "mean_gradient_norm_squared": sum(dots[i][j] for i, j in pairs) / len(pairs),
    }
