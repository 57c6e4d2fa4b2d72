"""Passes: hooked forward and backward passes over all microbatches."""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, final

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvature_callbacks.batches import batch_size, joined, map_tensors
from curvature_callbacks.errors import ConfigurationError
from curvature_callbacks.gram.capture.derived import Placed
from curvature_callbacks.gram.capture.interception import Capture
from curvature_callbacks.gram.memory import GramMemory
from curvature_callbacks.gram.row_by_row import check_rows
from curvature_callbacks.gram.storage import Storage
from curvature_callbacks.gram.uses.operation import Operation
from curvature_callbacks.model.loss.fisher_type import EMPIRICAL, FisherType
from curvature_callbacks.model.loss.sample_losses import SampleLosses
from curvature_callbacks.model.loss.surrogates import Surrogate, padded, surrogates
from curvature_callbacks.model.objective import Objective
from curvature_callbacks.processes.world import World

_ANY_KERNEL: Final = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]  # nothing is differentiated twice here, so that fused attention will do

_GRAM_BYTES: Final = 8 << 30  # of all parameters' Grams

_JOINED_BYTES: Final = 8 << 20  # captured by a pass over microbatches that were put together

Consume = Callable[[str, list[list[Placed]]], None]

Finish = Callable[[dict[str, list[list[Placed]]], list[str]], list[str]]


@final
@dataclass(slots=True)
class Passed:
    """What the passes over all microbatches found out.

    Attributes:
        unruled: parameter to why it has no valid rule.
        sizes: rows of each backward pass, in order.
        num_targets: for each microbatch (rows,) valid targets, on the CPU.
        surrogates: for each microbatch of this process what its backward passes differentiate; `[None]` for its sum of losses.
        num_passes: backward passes of each microbatch.
        operations: parameter to the operations that used it.
        positions: parameter to the positions per sample of each use.
        biases: weight to the biases its operations added.
        mode: how factors were kept, see `Storage.mode`.
        microbatches: of this process, as they were run: the first, and small ones after it together.
    """

    unruled: dict[str, str]
    sizes: list[int] = field(default_factory=list)
    num_targets: list[Tensor] = field(default_factory=list)
    surrogates: list[list[Surrogate | None]] = field(default_factory=list)
    num_passes: list[int] = field(default_factory=list)
    operations: dict[str, list[Operation]] = field(default_factory=dict)
    positions: dict[str, list[int]] = field(default_factory=dict)
    biases: dict[str, set[str | None]] = field(default_factory=dict)
    mode: str = "one pass"
    microbatches: Sequence[Any] = ()

    def note(
        self,
        operations: Mapping[str, Sequence[Operation]],
        positions: Mapping[str, Sequence[int]],
        biases: Mapping[str, Set[str | None]],
    ) -> None:
        """Add what a forward pass saw."""
        for name, found in operations.items():
            self.operations.setdefault(name, []).extend(found)
        for name, places in positions.items():
            self.positions.setdefault(name, []).extend(places)
        for weight, added in biases.items():
            self.biases.setdefault(weight, set()).update(added)


def run_passes(
    objective: Objective,
    microbatches: Sequence[Any],
    consume: Consume,
    result: Passed,
    kind: FisherType,
    memory: GramMemory,
    *,
    seed: int,
    storage: Storage,
    finish: Finish | None = None,
) -> None:
    """Every microbatch forward once and backward once a surrogate; `consume` gets a parameter with its uses in every pass.

    `result` is filled on the way; what is known of the last microbatch's forward pass is there before its backward passes. A
    parameter is consumed in the last backward pass as soon as its last use is complete. Until then the factors of earlier
    passes are kept within the budget; what does not fit is captured in further rounds over the microbatches, by groups of
    parameters. All ways give the same numbers. With `finish` nothing is consumed on the way: at the end of a round it gets the
    uses of every parameter and the names that have to wait for another one, and gives back those that everybody lets wait.
    Microbatches that capture little are run together, unless memory has run out before: the cost of a small pass is that of
    its launches. The first one, alone, tells how much a row captures.

    Cost: forward passes, and backward passes for activation gradients only; each further round the same again.
    """
    names = [name for name in objective.parameters if name not in result.unruled]
    result.microbatches = microbatches
    join = memory.row_limit is None and kind == EMPIRICAL and finish is None  # other types draw by microbatch
    names = _Round(objective, kind, memory, seed, names, result, storage, finish, join).run(consume)
    while names:
        storage.start_round()
        names = _Round(objective, kind, memory, seed, names, result, storage, finish).run(consume)
    result.mode = storage.mode


@final
@dataclass(slots=True)
class _Round:
    """One round over the microbatches for a group of parameters; the first one also notes what the passes are."""

    objective: Objective
    kind: FisherType
    memory: GramMemory
    seed: int
    names: list[str]
    result: Passed
    storage: Storage
    finish: Finish | None = None
    join: bool = False
    uses: dict[str, list[list[Placed]]] = field(default_factory=dict)
    index: int = 0  # of the backward pass

    def run(self, consume: Consume) -> list[str]:
        """Consume all names but those returned, which have to wait for another round."""
        self.uses = {name: [] for name in self.names}
        postponed: list[str] = []
        place = 0
        while place < len(self.result.microbatches):
            postponed += self._microbatch(place, self.result.microbatches[place], consume)
            if place == 0 and self.join and not postponed:
                self.result.microbatches = self._with_rest_together()
            place += 1
        if self.finish is not None:
            return self.finish({name: self._padded(found) for name, found in self.uses.items()}, postponed)
        with torch.no_grad():
            for name, found in self.uses.items():  # used by no microbatch's loss, or not by the last one
                if name not in self.result.unruled:
                    consume(name, self.storage.returned(name, self._padded(found)))
        return [name for name in self.names if name in set(postponed)]

    def _microbatch(self, place: int, batch: Any, consume: Consume) -> list[str]:
        """Run one microbatch; the names that have to wait for another round."""
        values = {name: parameter.detach() for name, parameter in self.objective.parameters.items()}
        capture = self._capture(values, batch)
        with self.objective.saving(), capture, sdpa_kernel(_ANY_KERNEL):
            losses = self.objective(map_tensors(batch, torch.Tensor.detach), values, watch=capture)
        if place == len(self.result.surrogates):
            self.result.note(capture.operations, capture.positions, capture.biases)
        chosen = self._surrogates(place, batch, losses)
        postponed: list[str] = []
        for number, surrogate in enumerate(chosen):
            again = number < len(chosen) - 1
            last = place == len(self.result.microbatches) - 1 and not again and self.finish is None
            total = losses.total if surrogate is None else surrogate(losses).sum()
            if not again:
                del losses  # the logits, which the graph may not need
            capture.backward(total, partial(self._take, consume if last else None), again=again)
            self.index += 1
            if not last:
                postponed += self._postpone((place + (number + 1) / len(chosen)) / len(self.result.microbatches))
        return postponed

    def _with_rest_together(self) -> list[Any]:
        """The microbatches, those after the first put together where a pass over them captures little."""
        first, *rest = self.result.microbatches
        captured = self.storage.captured / batch_size(first)
        most = _JOINED_BYTES / captured if captured else 0
        found = [first]
        for batch in rest:
            small = len(found) > 1 and batch_size(found[-1]) + batch_size(batch) <= most
            together = joined(found[-1], batch) if small else None
            found[-1:] = [found[-1], batch] if together is None else [together]
        return found

    def _capture(self, values: dict[str, Tensor], batch: Any) -> Capture:
        here = self.objective.unsharded
        taken = {name: values[name] for name in self.names if name in here}
        others = [value for name, value in values.items() if name not in taken and name in here]
        return Capture(
            taken,
            batch_size(batch),
            unruled=self.result.unruled,
            positions_first=self.memory.positions_first,
            constants=[*others, *self.objective.constants()],
            sharded={name for name in self.names if name not in here},
        )

    def _surrogates(self, place: int, batch: Any, losses: SampleLosses) -> list[Surrogate | None]:
        if place < len(self.result.surrogates):
            return self.result.surrogates[place]
        size = batch_size(batch)
        chosen: list[Surrogate | None] = [None]
        if self.kind.fisher != "empirical" or self.kind.sample_unit != "sequence":
            found = surrogates(self.kind, losses, seed=self.seed + place)
            most = -self.objective.least(-len(found))  # where all must take part in every pass
            chosen = [*padded(found, most)]
        elif losses.per_sample is None:
            self.join = False
            if size > 1:
                check_rows(self.objective, batch, losses)
        self.result.surrogates.append(chosen)
        self.result.num_passes.append(len(chosen))
        self.result.sizes += [size] * len(chosen)
        self.result.num_targets.append(losses.num_targets.cpu())
        self._check_size()
        return chosen

    def _check_size(self) -> None:
        """Raise a `ConfigurationError` where the Grams themselves would not fit."""
        samples, parameters = sum(self.result.sizes), len(self.objective.parameters)
        if 8 * samples**2 * parameters > _GRAM_BYTES:
            raise ConfigurationError(
                f"{samples} pseudo-samples of {parameters} parameters need Grams of {8 * samples**2 * parameters / 2**30:.0f} "
                f"GiB, more than {_GRAM_BYTES >> 30}: take fewer rows, draws or targets, or `fisher`='sampled' for 'exact'."
            )

    def _take(self, consume: Consume | None, name: str, found: list[Placed]) -> None:
        if name not in self.uses:  # waits for another round
            return
        if consume is None:
            self.uses[name] = [*self._padded(self.uses[name], self.index), self.storage.keep(name, found)]
        else:
            kept = self.storage.returned(name, self._padded(self.uses.pop(name), self.index))
            consume(name, [*kept, found])

    def _padded(self, found: list[list[Placed]], length: int | None = None) -> list[list[Placed]]:
        """With no uses in the passes that did not reach the parameter."""
        return found + [[] for _ in range((self.index if length is None else length) - len(found))]

    def _postpone(self, share: float) -> list[str]:
        later = self.storage.postponed(self.uses, share)
        for name in later:
            del self.uses[name]
        return later


def pseudo_samples(passed: Passed, world: World) -> tuple[Tensor, Tensor, Tensor]:
    """Row, weight and presence of every row of every backward pass of all processes, on the CPU."""
    own = _own_pseudo_samples(passed)
    if world.size == 1:
        return own
    rows = sum(map(len, passed.num_targets))
    found, start = [], 0
    for number, samples, weights, active in world.gathered((rows, *own)):
        found.append((samples + start, weights, active))
        start += number
    samples, weights, active = (torch.cat(parts) for parts in zip(*found, strict=True))
    return samples, weights, active


def _own_pseudo_samples(passed: Passed) -> tuple[Tensor, Tensor, Tensor]:
    if not passed.surrogates:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.bool)
    samples, weights, active, start = [], [], [], 0
    for targets, chosen in zip(passed.num_targets, passed.surrogates, strict=True):
        for surrogate in chosen:
            samples.append(torch.arange(start, start + len(targets)))
            ones = torch.ones(len(targets), dtype=torch.float64)
            weights.append(ones if surrogate is None else surrogate.weights.cpu())
            active.append(ones.bool() if surrogate is None else surrogate.active.cpu())
        start += len(targets)
    return torch.cat(samples), torch.cat(weights), torch.cat(active)
