"""The arguments both callbacks share, validated in one place, and the monitor they make."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final, get_args

from torch import nn

from curvature_callbacks.errors import ConfigurationError, check_choice, check_positive
from curvature_callbacks.measurements import Measurement, checked_measurements
from curvature_callbacks.model.blocks import BlockStructure, check_block_structure
from curvature_callbacks.model.losses import Loss, TargetLossName
from curvature_callbacks.model.objective import ParamsFilter
from curvature_callbacks.model.stability import Optimizers
from curvature_callbacks.monitor import CurvatureMonitor
from curvature_callbacks.probes import CapturedProbes, Draw, Probes
from curvature_callbacks.schedules import EveryNSteps
from curvature_callbacks.sinks import Sink


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Arguments of `CurvatureCallback`; see there.

    Raises:
        ConfigurationError: at construction, for a bad value.
    """

    every_n_steps: int
    measure: Sequence[Measurement] | None
    num_microbatches: int
    microbatch_size: int
    draw: Draw
    loss_fn: Loss
    params_filter: ParamsFilter | None
    block_structure: BlockStructure
    seed: int

    def __post_init__(self) -> None:
        check_positive("every_n_steps", self.every_n_steps)
        check_positive("num_microbatches", self.num_microbatches)
        check_positive("microbatch_size", self.microbatch_size)
        check_choice("draw", self.draw, get_args(Draw))
        check_block_structure(self.block_structure)
        checked_measurements(self.measure)
        names = get_args(TargetLossName)
        if self.loss_fn is not None and not callable(self.loss_fn) and self.loss_fn not in names:
            raise ConfigurationError(
                f"`loss_fn` must be a function `(model, batch) -> loss` or one of {', '.join(map(repr, names))}, got "
                f"{self.loss_fn!r}. The callback for Hugging Face also takes 'trainer'."
            )

    @property
    def key(self) -> str:
        """Names the state of this callback in a checkpoint; another schedule or measurement is another state."""
        names = ",".join(measurement.name for measurement in checked_measurements(self.measure))
        return f"{names} every {self.every_n_steps} seed {self.seed} {self.draw}"

    def captured_probes(self) -> CapturedProbes:
        """A source for training batches that can only be watched go by."""
        return CapturedProbes(num_microbatches=self.num_microbatches, microbatch_size=self.microbatch_size)

    def probe_sizes(self) -> dict[str, Any]:
        """Keyword arguments of `probes_from_loader`."""
        return {"num_microbatches": self.num_microbatches, "microbatch_size": self.microbatch_size}

    def monitor(
        self, model: nn.Module, *, probes: Probes, sinks: Sequence[Sink], loss: Loss, optimizer: Optimizers | None
    ) -> CurvatureMonitor:
        """The monitor of one run."""
        shared: dict[str, Any] = {
            "params_filter": self.params_filter,
            "block_structure": self.block_structure,
            "draw": self.draw,
            "seed": self.seed,
            "optimizer": optimizer,
        }
        when = EveryNSteps(n=self.every_n_steps)
        return CurvatureMonitor(model, probes=probes, measure=self.measure, when=when, sinks=sinks, loss=loss, **shared)
