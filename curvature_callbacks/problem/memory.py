"""ProbeMemory: what the probes of a run learn about their problem, so that later ones need not."""

from dataclasses import dataclass, field
from typing import final

from curvature_callbacks.gram.memory import GramMemory
from curvature_callbacks.model.blocks import Blocks
from curvature_callbacks.model.loss.resolve import LossFunction


@final
@dataclass(slots=True, kw_only=True)
class ProbeMemory:
    """Facts of one run: its loss and block structure are the same at every probe.

    Attributes:
        loss: the run's loss, which settles its form once.
        blocks: names of the measured parameters, and their blocks.
        rewritten: names of the parameters that the loss changes in place.
        grams: what is known of the Grams.
    """

    loss: LossFunction | None = None
    blocks: tuple[tuple[str, ...], Blocks] | None = None
    rewritten: set[str] = field(default_factory=set)
    grams: GramMemory = field(default_factory=GramMemory)
