"""Peers: the same block Grams from per-sample gradients of every parameter, as other tools give them.

Each one is prepared once (copies, hooks) and then called; its gradients are multiplied in the same chunked float64 sums as
ours, parameter by parameter, and let go as soon as their product is taken.
"""

import copy
from collections.abc import Callable, Iterator

import torch
from fisher_cases import Workload
from torch import Tensor, nn

from curvature_callbacks.linalg.accumulate import gram
from curvature_callbacks.microbatch import as_microbatch
from curvature_callbacks.model.blocks import Blocks

Grams = dict[str, Tensor]
PerSample = Callable[[], Iterator[tuple[str, Tensor]]]  # yields (parameter, (N, ...)), each once


class IncompleteError(Exception):
    """The peer gives no per-sample gradient of some parameters."""


def row_loop(workload: Workload) -> PerSample:
    """One forward and backward pass per row."""

    def run() -> Iterator[tuple[str, Tensor]]:
        named = dict(workload.model.named_parameters())
        rows = [row_gradients(workload, row, named) for row in torch.arange(workload.num_samples)]
        for position, name in enumerate(named):
            yield name, torch.stack([row[position] for row in rows])

    return run


def row_gradients(workload: Workload, row: Tensor, named: dict[str, nn.Parameter]) -> list[Tensor]:
    loss = workload.summed_loss(as_microbatch(workload.batch).take(row[None]).content)
    return list(torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True))


def vmap_of_grad(workload: Workload) -> PerSample:
    """`torch.func.vmap(grad)` over the rows."""
    values = {name: parameter.detach() for name, parameter in workload.model.named_parameters()}
    names = list(workload.batch) if isinstance(workload.batch, dict) else None

    def loss(values: Grams, *row: Tensor) -> Tensor:
        one = [tensor[None] for tensor in row]
        return workload.summed_loss(tuple(one) if names is None else dict(zip(names, one, strict=True)), values)

    def run() -> Iterator[tuple[str, Tensor]]:
        rows = workload.batch if names is None else tuple(workload.batch.values())
        over = (None, *(0 for _ in rows))
        found = torch.func.vmap(torch.func.grad(loss), in_dims=over)(values, *rows)
        while found:
            yield found.popitem()

    return run


def backpack_batch_gradients(workload: Workload) -> PerSample:
    """BackPACK's `BatchGrad`; it hooks single modules and knows linear, convolution, embedding and batch norm layers."""
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad

    model = extend(copy.deepcopy(workload.model))

    def run() -> Iterator[tuple[str, Tensor]]:
        with backpack(BatchGrad()):
            workload.summed_loss(workload.batch, model=model).backward()
        yield from _collected(model, "grad_batch", workload.num_samples)

    return run


def opacus_grad_samples(workload: Workload) -> PerSample:
    """Opacus' `GradSampleModule`; position ids, which it cannot see without a row axis, are spelled out for it."""
    from opacus import GradSampleModule

    model = GradSampleModule(copy.deepcopy(workload.model), loss_reduction="sum", strict=False)
    batch = workload.batch
    if isinstance(batch, dict) and "input_ids" in batch:
        ids = batch["input_ids"]
        batch = {**batch, "position_ids": torch.arange(ids.shape[1], device=ids.device).expand_as(ids)}

    def run() -> Iterator[tuple[str, Tensor]]:
        workload.summed_loss(batch, model=model).backward()
        yield from _collected(model._module, "grad_sample", workload.num_samples)

    return run


PEERS: dict[str, Callable[[Workload], PerSample]] = {
    "row_loop": row_loop,
    "vmap": vmap_of_grad,
    "backpack": backpack_batch_gradients,
    "opacus": opacus_grad_samples,
}


def block_sums(gradients: PerSample, blocks: Blocks, N: int) -> Grams:
    """Block to the (N, N) float64 Gram."""
    owner = {name: block for block, names in blocks.items() for name in names}
    sums: Grams = {}
    for name, found in gradients():
        product = gram(found.reshape(N, -1))
        block = owner[name]
        sums[block] = sums[block] + product if block in sums else product
    return sums


def _collected(model: nn.Module, attribute: str, N: int) -> Iterator[tuple[str, Tensor]]:
    """What a tool left on the parameters, removed from them."""
    missing = []
    for name, parameter in model.named_parameters():
        parameter.grad = None
        found = getattr(parameter, attribute, None)
        setattr(parameter, attribute, None)
        if isinstance(found, Tensor) and len(found) == N:
            yield name, found
        else:
            missing.append(name)
    if missing:
        raise IncompleteError(f"no per-sample gradient of {len(missing)} parameters: {', '.join(missing[:4])}")
