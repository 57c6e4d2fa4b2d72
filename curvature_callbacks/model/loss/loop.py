"""LoopLoss: the loss by which the training loop trains, which the measured one is compared with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor, nn


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoopLoss:
    """What the training loop minimises, where the measured loss is given in another way.

    Attributes:
        function: `(model, batch) -> 0-d mean or (N,) losses` of a microbatch, which leaves no trace in the loop.
        name: what users call it (`training_step`).
        is_by_choice: whether the user gave a function of their own to measure instead: a difference is told, not refused.
        advice: what to do about a difference.
    """

    function: Callable[[nn.Module, Any], Tensor]
    name: str
    is_by_choice: bool
    advice: str
