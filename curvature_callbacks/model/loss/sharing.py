"""Sharing: how the positions of a layer that applies one weight many times enter its Kronecker factors.

`expand` takes every position as a sample of its own, `reduce` sums or averages over positions first.
"""

from typing import Literal

Sharing = Literal["expand", "reduce"]
