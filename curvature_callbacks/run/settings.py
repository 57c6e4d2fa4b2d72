"""Settings: the arguments of both callbacks and of the monitor, validated in one place, and the rows they ask for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, final, get_args

from torch.utils.data import default_collate

from curvature_callbacks.batches import cut_sequences
from curvature_callbacks.errors import ConfigurationError, check_choice, check_positive, check_seconds, check_share
from curvature_callbacks.measurements import Measurement
from curvature_callbacks.model.batch_norm import BatchNorm
from curvature_callbacks.model.blocks import BlockStructure, check_block_structure
from curvature_callbacks.model.loss.resolve import Loss, TargetLossName
from curvature_callbacks.model.objective import ParamsFilter
from curvature_callbacks.probes import CapturedProbes, DatasetProbes, Draw, Prepare, Probes, check_dataset, probes_from_loader
from curvature_callbacks.probes.batch_sizes import training_batch_size
from curvature_callbacks.run.choice import check_measurements, chosen_measurements
from curvature_callbacks.run.fingerprint import argument_texts, fingerprint
from curvature_callbacks.run.schedules import EveryNSteps, LossSpike, Schedule

EVERY_N_STEPS: Final = 200  # the default of `every_n_steps`


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Arguments of `CurvatureCallback`; see there. A monitor has those of them that are not a framework's.

    Raises:
        ConfigurationError: at construction, for a bad value.
    """

    every_n_steps: int = EVERY_N_STEPS
    measure: Sequence[Measurement] | None = None
    num_microbatches: int = 4
    microbatch_size: int = 8
    draw: Draw = "fresh"
    loss_fn: Loss = None
    params_filter: ParamsFilter | None = None
    block_structure: BlockStructure = "layer"
    seed: int = 0
    schedule: Schedule | None = None
    max_overhead: float | None = None
    max_seconds: float | None = None
    spike: LossSpike | None = None
    probe_dataset: Any = None
    probe_dataloader: Any = None
    max_sequence_length: int | None = None
    batch_norm: BatchNorm | None = None

    def __post_init__(self) -> None:
        check_positive("every_n_steps", self.every_n_steps)
        check_positive("num_microbatches", self.num_microbatches)
        check_positive("microbatch_size", self.microbatch_size)
        check_choice("draw", self.draw, get_args(Draw))
        if self.batch_norm is not None:
            check_choice("batch_norm", self.batch_norm, get_args(BatchNorm))
        check_block_structure(self.block_structure)
        check_measurements(chosen_measurements(self.measure))
        check_share("max_overhead", self.max_overhead)
        check_seconds("max_seconds", self.max_seconds)
        self._check_choices()
        names = get_args(TargetLossName)
        if self.loss_fn is not None and not callable(self.loss_fn) and self.loss_fn not in names:
            raise ConfigurationError(
                f"`loss_fn` must be a function `(model, batch) -> loss` or one of {', '.join(map(repr, names))}, got "
                f"{self.loss_fn!r}. The callback for Hugging Face also takes 'trainer'."
            )

    @property
    def when(self) -> Schedule:
        """When a probe is due: by `schedule` where it is given, else every `every_n_steps` optimizer steps."""
        return EveryNSteps(n=self.every_n_steps) if self.schedule is None else self.schedule

    @property
    def key(self) -> str:
        """Names the state of this callback in a checkpoint; where any argument differs, it is another state."""
        names = ",".join(measurement.name for measurement in chosen_measurements(self.measure))
        return f"{names} {fingerprint(self.description)}"

    @property
    def description(self) -> dict[str, str]:
        """The arguments, for a state that may be read by another callback."""
        instead = {
            "measure": chosen_measurements(self.measure),
            "probe_dataset": type(self.probe_dataset).__name__,
            "probe_dataloader": type(self.probe_dataloader).__name__,
        }
        return argument_texts(self, instead=instead)

    def probes(self, loader: Any, *, prepare: Prepare | None = None) -> Probes | None:
        """Rows of `probe_dataset` or `probe_dataloader`, else of the training data; None where these cannot be indexed."""
        prepare = self._prepare(prepare)
        if self.probe_dataset is not None:
            check_dataset(self.probe_dataset)
            return DatasetProbes(
                self.probe_dataset,
                getattr(loader, "collate_fn", None) or default_collate,
                num_microbatches=self.num_microbatches,
                microbatch_size=self.microbatch_size,
                prepare=prepare,
                batch_size=training_batch_size(loader),
            )
        probes = probes_from_loader(
            loader if self.probe_dataloader is None else self.probe_dataloader,
            num_microbatches=self.num_microbatches,
            microbatch_size=self.microbatch_size,
            prepare=prepare,
            batch_size=training_batch_size(loader),
        )
        if probes is None and self.probe_dataloader is not None:
            raise ConfigurationError(
                "`probe_dataloader` must be a DataLoader over a map-style dataset, whose rows can be indexed, got "
                f"{type(self.probe_dataloader).__name__}."
            )
        return probes

    def captured_probes(self, loader: Any) -> CapturedProbes:
        """A source for the batches of this loader, which can only be watched go by."""
        batch_size = getattr(loader, "batch_size", None)
        return CapturedProbes(
            num_microbatches=self.num_microbatches,
            microbatch_size=self.microbatch_size,
            prepare=self._prepare(None),
            batch_size=batch_size if isinstance(batch_size, int) else None,
        )

    def _prepare(self, prepare: Prepare | None) -> Prepare | None:
        """What the loop does to a batch, then the cut of its sequences."""
        longest = self.max_sequence_length
        if longest is None:
            return prepare
        return lambda batch: cut_sequences(prepare(batch) if prepare else batch, longest)

    def _check_choices(self) -> None:
        """Raise a `ConfigurationError` for arguments that exclude each other or have the wrong type."""
        if self.schedule is not None and self.every_n_steps != EVERY_N_STEPS:
            raise ConfigurationError("`schedule` and `every_n_steps` both say when to probe: give one of them.")
        if self.schedule is not None and not isinstance(self.schedule, Schedule):
            raise ConfigurationError(f"`schedule` must have a method `due(step, previous)`, got {self.schedule!r}.")
        if self.spike is not None and not isinstance(self.spike, LossSpike):
            raise ConfigurationError(f"`spike` must be a LossSpike or None, got {self.spike!r}.")
        if self.probe_dataset is not None and self.probe_dataloader is not None:
            raise ConfigurationError("`probe_dataset` and `probe_dataloader` both say what to measure on: give one of them.")
        if self.max_sequence_length is not None:
            check_positive("max_sequence_length", self.max_sequence_length)
