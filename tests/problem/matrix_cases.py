"""A small model of which every matrix is known as a dense float64 one."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_callbacks import (
    Record,
)
from curvature_callbacks.compute.offline import offline_problem
from tests.reference import dense_fisher, sample_gradients, stacked

D = torch.float64
SIZES = (4, 3, 5)


def network(dtype: torch.dtype = D) -> nn.Sequential:
    """60 parameters: two layers with Kronecker factors and a norm without."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 4, bias=False)).to(dtype)


def microbatches(dtype: torch.dtype = D) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 5, generator=generator, dtype=D).to(dtype), torch.randint(4, (size,), generator=generator))
        for size in SIZES
    ]


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """Stepped once, at the same place, so that it has a preconditioner."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    inputs, targets = microbatches()[0]
    F.cross_entropy(model(inputs), targets).backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.01
    optimizer.zero_grad()
    return optimizer


def everything(model: nn.Module) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(*microbatches(), strict=True)
    return torch.cat(inputs), torch.cat(targets)


def of_parameters(
    function: Callable[[dict[str, Tensor]], Tensor], model: nn.Module
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The function of one flat vector, and where the model is."""
    named = {name: value.detach() for name, value in model.named_parameters()}
    shapes = [value.shape for value in named.values()]

    def flat(theta: Tensor) -> Tensor:
        parts = [part.reshape(shape) for part, shape in zip(theta.split([s.numel() for s in shapes]), shapes, strict=True)]
        return function(dict(zip(named, parts, strict=True)))

    return flat, torch.cat([value.flatten() for value in named.values()])


def hessian_of(model: nn.Module) -> Tensor:
    inputs, targets = everything(model)

    def loss(named: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, named, (inputs,)), targets)

    return torch.autograd.functional.hessian(*of_parameters(loss, model))


def ggn_of(model: nn.Module) -> Tensor:
    inputs, _ = everything(model)
    J = torch.autograd.functional.jacobian(
        *of_parameters(lambda named: torch.func.functional_call(model, named, (inputs,)), model)
    )
    p = model(inputs).detach().softmax(-1)
    H = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]  # (N, C, C)
    return torch.einsum("ncp,ncd,ndq->pq", J, H, J) / len(p)


@cache
def truth(name: str) -> Tensor:
    """Dense, in the order of the model's parameters; of Kronecker factors without what they do not cover."""
    model = network()
    if name in ("hessian", "finite_difference_hessian"):
        return hessian_of(model)
    if name == "ggn":
        return ggn_of(model)
    if name == "empirical_fisher":
        return dense_fisher(stacked(sample_gradients(model, microbatches(), "pair")))
    if name == "preconditioned_hessian":
        v = torch.cat([adam_state["exp_avg_sq"].flatten() for adam_state in adam(model).state.values()])
        root = (0.1 * ((v / (1 - 0.999)) ** 0.5 + 1e-8)) ** -0.5
        return root[:, None] * hessian_of(model) * root
    raise AssertionError(name)


def ends(values: Tensor, k: int = 6) -> Tensor:
    values = values.sort(descending=True).values
    return torch.cat([values[: k - k // 2], values[len(values) - k // 2 :]])


def measured(measurement: Any, optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adam) -> list[Record]:
    model = network()
    options: Any = {"loss": "cross_entropy", "params_filter": None, "optimizer": optimizer(model)}
    with offline_problem(model, microbatches(), **options) as problem:
        records, _ = measurement.measure(problem, measurement.init(problem))
    return list(records)
