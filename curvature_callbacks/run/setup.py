"""Setup: what a monitor is made of, once a user's or a framework's arguments are validated."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from torch import nn

from curvature_callbacks.model.loss.loop import LoopLoss
from curvature_callbacks.model.loss.resolve import Loss
from curvature_callbacks.model.stability import Optimizers
from curvature_callbacks.probes import Probes
from curvature_callbacks.problem.memory import ProbeMemory
from curvature_callbacks.problem.subject import Subject
from curvature_callbacks.run.settings import Settings
from curvature_callbacks.sinks import Sink


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Setup:
    """One training run, as its monitor sees it.

    Attributes:
        model: the module training runs, unwrapped.
        settings: validated.
        probes: where microbatches are drawn from at first.
        sinks: receivers of the records.
        loss: what training minimises; see `resolve_loss`. A callback has found it from the settings' own.
        optimizer: what trains the model, or several of them; only read.
        loop: the training loop's own loss, to compare `loss` with; None where there is none, or it is `loss` itself.
    """

    model: nn.Module
    settings: Settings
    probes: Probes
    sinks: Sequence[Sink]
    loss: Loss
    optimizer: Optimizers | None
    loop: LoopLoss | None = None

    def new_subject(self) -> Subject:
        """What all probes look at, of which nothing is known yet."""
        return Subject(
            model=self.model,
            loss=self.loss,
            params_filter=self.settings.params_filter,
            block_structure=self.settings.block_structure,
            optimizer=self.optimizer,
            batch_norm=self.settings.batch_norm,
            memory=ProbeMemory(loop=self.loop),
        )
