"""Wanted: which eigenvalues of a symmetric operator are asked for."""

from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

Which = Literal["LA", "SA", "LM", "BE"]


@final
@dataclass(frozen=True, slots=True)
class Wanted:
    """`upper` from the top and `lower` from the bottom, or the `upper` largest in magnitude."""

    upper: int
    lower: int = 0
    by_magnitude: bool = False

    @property
    def count(self) -> int:
        """How many eigenvalues are wanted in all."""
        return self.upper + self.lower

    def at_most(self, n: int) -> "Wanted":
        """The same request cut down to n values; where both ends lose, they keep half each."""
        lower = min(self.lower, max(n - self.upper, n // 2))
        return Wanted(min(self.upper, n - lower), lower, self.by_magnitude)

    def choose(self, values: Tensor) -> Tensor:
        """Indices of the wanted ones among ascending `values`, in descending order of value."""
        m = len(values)
        fitting = self.at_most(m)
        if self.by_magnitude:
            return values.abs().argsort(descending=True, stable=True)[: fitting.upper].sort().values.flip(0)
        return torch.cat([torch.arange(fitting.lower), torch.arange(m - fitting.upper, m)]).flip(0)

    def more(self, count: int) -> "Wanted":
        """The same ends with `count` more in all."""
        if self.by_magnitude or self.lower == 0:
            return Wanted(self.upper + count, self.lower, self.by_magnitude)
        if self.upper == 0:
            return Wanted(0, self.lower + count)
        return Wanted(self.upper + count - count // 2, self.lower + count // 2)


def wanted(k: int, which: Which) -> Wanted:
    """In SciPy's terms: `LA` largest, `SA` smallest, `LM` largest magnitude, `BE` half from each end, the odd one on top."""
    if which == "SA":
        return Wanted(0, k)
    if which == "BE":
        return Wanted(k - k // 2, k // 2)
    return Wanted(k, 0, by_magnitude=which == "LM")
