"""Types of Fisher and draws that tests of surrogates share."""

import torch
from torch import Tensor

UNITS = ("sequence", "token")


TYPES = [(fisher, unit) for fisher in ("empirical", "sampled", "exact") for unit in UNITS]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)
