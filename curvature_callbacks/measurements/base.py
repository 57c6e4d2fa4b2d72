"""Measurement: the interface of what a probe computes, and what one can say of itself beforehand."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from curvature_callbacks.model.loss.fisher_type import FisherType
from curvature_callbacks.model.loss.sharing import Sharing
from curvature_callbacks.problem.problem import Problem
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
        """Name in records and tags, different for all measurements of a run."""
        ...

    def init(self, problem: Problem) -> Any:
        """State before the first probe; None where nothing is carried."""
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
    """A measurement of a type of Fisher; the run is refused before step 1 if its loss does not have that type."""

    @property
    def fisher_type(self) -> FisherType:
        """The type whose per-sample gradients it takes."""
        ...


@runtime_checkable
class OfKronecker(OfFisher, Protocol):
    """A measurement of Kronecker factors; they come from the pass over the microbatches that gives the Grams of that type."""

    @property
    def sharing(self) -> Sharing:
        """How the positions that share a weight enter its factors."""
        ...


@runtime_checkable
class OfOptimizer(Protocol):
    """A measurement that may need the optimizer; the run is refused before step 1 if it needs one and none is readable."""

    @property
    def needs_optimizer(self) -> bool:
        """Whether this one, with its options, needs the optimizer."""
        ...


@runtime_checkable
class Checked(Protocol):
    """A measurement that can find out at a first probe whether the run can have it at all."""

    def check(self, problem: Problem) -> None:
        """Raise a `ConfigurationError`, which stops the run before step 1, if not. Cost: at most a forward pass."""
        ...
