"""The interface of a measurement."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

from torch import nn

from curvature_callbacks.batches import as_microbatches
from curvature_callbacks.gram.positions import Sharing
from curvature_callbacks.model.blocks import BlockStructure
from curvature_callbacks.model.isolation import isolated
from curvature_callbacks.model.losses import Loss
from curvature_callbacks.model.objective import ParamsFilter
from curvature_callbacks.model.stability import Optimizers
from curvature_callbacks.model.surrogates import FisherType
from curvature_callbacks.problem import Problem
from curvature_callbacks.record import Record


@runtime_checkable
class Measurement(Protocol):
    """What to compute at a probe. State is explicit: the monitor keeps it between probes.

    A state made of dicts, lists, tuples, numbers, strings, None and tensors is saved in checkpoints; from those in JSON alone
    its tensors come back as None.

    Write your own by giving these three; `examples/custom_measurement.py` has one. What it needs of the probe it can say
    beforehand by being `OfFisher`, `OfKronecker`, `OfOptimizer` or `Checked` as well.
    """

    @property
    def name(self) -> str:
        """Name in records and tags."""
        ...

    def init(self, problem: Problem) -> Any:
        """State before the first probe."""
        ...

    def measure(self, problem: Problem, state: Any) -> tuple[Sequence[Record], Any]:
        """Records of this probe and the state for the next. Seconds are filled in by the monitor."""
        ...


# For LightningCLI: jsonargparse takes a class for a protocol only where what it annotates is the same, or where the protocol
# annotates nothing; a measurement may say more than the protocol (`list[Record]`, the type of its state), or nothing.
for _method in (Measurement.init, Measurement.measure):
    _method.__annotations__ = {}


@runtime_checkable
class OfFisher(Protocol):
    """A measurement of a type of Fisher; where the run's loss does not have it, the run stops before step 1."""

    @property
    def fisher_type(self) -> FisherType:
        """Whose per-sample gradients it takes."""
        ...


@runtime_checkable
class OfKronecker(OfFisher, Protocol):
    """One of Kronecker factors too; these come from the pass over the microbatches that gives the Grams of the others."""

    @property
    def sharing(self) -> Sharing:
        """How positions enter the factors."""
        ...


@runtime_checkable
class OfOptimizer(Protocol):
    """A measurement that may read the optimizer; where the run has none that it can read, it stops before step 1."""

    @property
    def needs_optimizer(self) -> bool:
        """Whether it does."""
        ...


@runtime_checkable
class Checked(Protocol):
    """A measurement that can tell from a first probe whether the run can ever have it."""

    def check(self, problem: Problem) -> None:
        """Raise a `ConfigurationError`, which stops the run before step 1, if not. Cost: at most a forward pass."""
        ...


@contextmanager
def offline_problem(
    model: nn.Module,
    batches: Any,
    *,
    loss: Loss,
    params_filter: ParamsFilter | None,
    block_structure: BlockStructure = "layer",
    seed: int = 0,
    optimizer: Optimizers | None = None,
) -> Iterator[Problem]:
    """A problem outside any training loop, isolated all the same and checked."""
    with isolated(model, seed=seed):
        problem = Problem(
            model,
            as_microbatches(batches),
            loss=loss,
            params_filter=params_filter,
            block_structure=block_structure,
            seed=seed,
            optimizer=optimizer,
        )
        problem.check()
        yield problem
