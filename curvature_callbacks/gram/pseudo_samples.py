"""Pseudo-samples: rows and columns of a Gram, one for each row of each backward pass."""

import torch
from torch import Tensor

from curvature_callbacks.gram.passes import Passed
from curvature_callbacks.world import World


def pseudo_samples(passed: Passed, world: World) -> tuple[Tensor, Tensor, Tensor]:
    """Row, weight and presence of every row of every backward pass of all processes, on the CPU."""
    own = _own_pseudo_samples(passed)
    if world.size == 1:
        return own
    rows = sum(map(len, passed.num_targets))
    found, start = [], 0
    for number, samples, weights, active in world.gathered((rows, *own)):
        found.append((samples + start, weights, active))
        start += number
    samples, weights, active = (torch.cat(parts) for parts in zip(*found, strict=True))
    return samples, weights, active


def _own_pseudo_samples(passed: Passed) -> tuple[Tensor, Tensor, Tensor]:
    if not passed.surrogates:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.bool)
    samples, weights, active, start = [], [], [], 0
    for targets, chosen in zip(passed.num_targets, passed.surrogates, strict=True):
        for surrogate in chosen:
            samples.append(torch.arange(start, start + len(targets)))
            ones = torch.ones(len(targets), dtype=torch.float64)
            weights.append(ones if surrogate is None else surrogate.weights.cpu())
            active.append(ones.bool() if surrogate is None else surrogate.active.cpu())
        start += len(targets)
    return torch.cat(samples), torch.cat(weights), torch.cat(active)
