"""Positions: a layer's inputs and output gradients row by row, in pieces of bounded size."""

from typing import Literal

Sharing = Literal["expand", "reduce"]
