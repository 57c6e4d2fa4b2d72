"""Subsampling: a random part of the rows of large blocks, the same for all samples."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from curvature_callbacks.model.blocks import Blocks


def chosen_rows(
    parameters: Mapping[str, Tensor], blocks: Blocks, max_params_per_block: int | None, *, seed: int
) -> dict[str, Tensor]:
    """Parameter to the sorted rows (indices of axis 0) that are counted, for those of blocks larger than allowed.

    Every parameter of such a block keeps the same share of its rows, at least one, so that each of its Grams scaled by all
    rows over counted rows is unbiased, and with them the trace of the block.
    """
    if max_params_per_block is None:
        return {}
    chosen: dict[str, Tensor] = {}
    for names in blocks.values():
        share = max_params_per_block / sum(parameters[name].numel() for name in names)
        for name in names if share < 1.0 else ():
            if parameters[name].ndim:
                chosen[name] = _rows(parameters[name], share, seed, name)
    return {name: rows for name, rows in chosen.items() if len(rows) < len(parameters[name])}


def _rows(parameter: Tensor, share: float, seed: int, name: str) -> Tensor:
    count = parameter.shape[0]
    own = int.from_bytes(hashlib.sha1(f"{seed} {name}".encode()).digest()[:8], "big") % 2**63
    order = torch.randperm(count, generator=torch.Generator().manual_seed(own))
    return order[: max(1, round(share * count))].sort().values.to(parameter.device)
