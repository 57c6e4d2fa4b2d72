"""Draws: targets of rows and labels of targets, from a CPU generator, so that they are the same on every device."""

import math
from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

_DRAW_ELEMENTS: Final = 1 << 21  # probabilities at a time while labels are drawn: 16 MiB in float64, three such buffers


def chosen_targets(valid: Tensor, count: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Up to `count` valid targets of every row without replacement, one a pass: (targets, active, weights `n_i / m_i`)."""
    on_host = valid.cpu()
    keys = torch.full(on_host.shape, -1.0, dtype=torch.float64)
    keys[on_host] = torch.rand(int(on_host.sum()), generator=generator, dtype=torch.float64)
    order = keys.argsort(dim=1, descending=True)  # invalid ones last
    n = on_host.sum(1)
    m = n.clamp(max=count)
    for index in range(max(1, int(m.max()))):
        active = index < m
        weights = torch.where(active, n / m.clamp(min=1).double(), 0.0)
        yield order[:, index].to(valid.device), active.to(valid.device), weights.to(valid.device)


def drawn_labels(
    logits: Tensor, rows: Tensor, positions: Tensor, generator: torch.Generator, *, max_elements: int = _DRAW_ELEMENTS
) -> Tensor:
    """One label from `softmax(logits[row, position])` for each pair, by the inverse of its distribution function.

    Args:
        logits: (N, M, C).
        rows: of the pairs.
        positions: of the pairs.
        generator: on the CPU.
        max_elements: probabilities that are computed at a time.
    """
    C = logits.shape[-1]
    uniform = torch.rand(len(rows), 1, generator=generator, dtype=torch.float64).to(logits.device)
    labels = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    step = max(1, max_elements // C)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        p = logits.detach()[rows[part], positions[part]].double().softmax(-1)  # (step, C)
        labels[part] = _inverse_distribution(p, uniform[part])
    return labels.clamp_(max=C - 1)


def _inverse_distribution(p: Tensor, uniform: Tensor) -> Tensor:
    """(n,) smallest c with `p_0 + ... + p_c > uniform`, for `p` (n, C) and `uniform` (n, 1).

    In two levels of about sqrt(C) classes, summed by products: `cumsum` has no deterministic algorithm on CUDA.
    """
    n, C = p.shape
    width = math.isqrt(max(C - 1, 0)) + 1
    groups = F.pad(p, (0, width * width - C)).reshape(n, width, width)
    group, before = _first_above(groups.sum(-1), uniform)
    within = groups.gather(1, group[:, :, None].expand(-1, -1, width))[:, 0]
    return (group * width + _first_above(within, uniform - before)[0])[:, 0]


def _first_above(p: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """(n, 1) first index whose cumulated `p` (n, K) is above `uniform`, and what was cumulated before it."""
    K = p.shape[1]
    cumulated = p @ torch.ones(K, K, dtype=p.dtype, device=p.device).triu()
    index = (cumulated <= uniform).sum(1, keepdim=True).clamp(max=K - 1)
    return index, cumulated.gather(1, index) - p.gather(1, index)
