"""Subsample: a random part of each large block, the same for every sample, that stands for all of it."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from curvature_callbacks.model.blocks import Blocks


def chosen_slices(
    parameters: Mapping[str, Tensor], blocks: Blocks, max_params_per_block: int | None, *, seed: int
) -> dict[str, Tensor]:
    """Parameter to the sorted slices (indices of axis 0) that are counted, for those of blocks larger than allowed.

    Every parameter of such a block keeps the same share of its slices, at least one, so that each of its Grams scaled by all
    slices over counted slices is unbiased, and with them the trace of the block.

    Args:
        parameters: by name.
        blocks: their groups.
        max_params_per_block: None to count all.
        seed: of the choice, with the parameter's name.
    """
    if max_params_per_block is None:
        return {}
    chosen: dict[str, Tensor] = {}
    for names in blocks.values():
        share = max_params_per_block / sum(parameters[name].numel() for name in names)
        for name in names if share < 1.0 else ():
            if parameters[name].ndim:
                chosen[name] = _slices(parameters[name], share, seed, name)
    return {name: slices for name, slices in chosen.items() if len(slices) < len(parameters[name])}


def _slices(parameter: Tensor, share: float, seed: int, name: str) -> Tensor:
    count = parameter.shape[0]
    seed_of_name = int.from_bytes(hashlib.sha1(f"{seed} {name}".encode()).digest()[:8], "big") % 2**63
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed_of_name))
    return order[: max(1, round(share * count))].sort().values.to(parameter.device)
