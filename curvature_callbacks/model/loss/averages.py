"""Averages: what a loss divides by, which its values and gradients on parts of a batch tell."""

import logging
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Final, Protocol, TypeVar, final, runtime_checkable

import torch
from torch import Tensor, nn

from curvature_callbacks.errors import ConfigurationError, ProbeError
from curvature_callbacks.microbatch import Microbatch, as_microbatch
from curvature_callbacks.model.loss.own_forms import has_spans, labels_of
from curvature_callbacks.model.loss.sample_losses import IGNORED, SampleLosses
from curvature_callbacks.processes.world import World

FOLLOWING: Final = "labels that follow"
GIVEN: Final = "labels"
LABELLED: Final = "rows with a label"
ROWS: Final = "rows"
SUM: Final = "nothing (it is a sum over rows)"
AVERAGES: Final = (FOLLOWING, GIVEN, LABELLED, ROWS, SUM)  # the finest first

_ENOUGH: Final = 2  # probes at which an average was looked at

_logger = logging.getLogger("curvature_callbacks")
T = TypeVar("T")


class Evaluate(Protocol):
    """Calls a function at the measured values of the parameters, which require gradients inside."""

    def __call__(self, function: Callable[[nn.Module, Any], T], batch: Any, /, *, moved: float = 0.0) -> T:
        """What `function` returns for the model and `batch`, parameters moved by normal noise of that size."""
        ...


@runtime_checkable
class Settling(Protocol):
    """A loss whose form is found out from the microbatches of a probe before they are measured."""

    def settle(self, evaluate: Evaluate, microbatches: Sequence[Any], world: World) -> None:
        """Find the form out, or look whether it still holds; all processes call it, with microbatches of their own.

        Raises:
            ProbeError: several forms are possible that make different numbers of these microbatches.
            ConfigurationError: processes find different ones.
        """
        ...


def label_layout(batch: Any) -> Hashable:
    """The keys of a batch with the kind and rank of its labels: losses of one layout have one form."""
    content = batch.content if isinstance(batch, Microbatch) else batch
    if not isinstance(content, Mapping):
        return type(content).__name__
    labels = labels_of(content)
    return frozenset(content), None if labels is None else (labels.is_floating_point(), labels.ndim)


def row_weights(batch: Any) -> dict[str, Tensor]:
    """What every row weighs under each average that the batch allows: name to (N,) int64, in the order of `AVERAGES`.

    A sum divides by nothing; its rows count one each, so that what is measured does not grow with the batch.
    """
    microbatch = as_microbatch(batch)
    ones, content = torch.ones(microbatch.num_rows, dtype=torch.int64), microbatch.content
    labels = labels_of(content) if isinstance(content, Mapping) else None
    if labels is None or labels.is_floating_point() or labels.ndim == 0 or len(labels) != len(ones):
        return {ROWS: ones, SUM: ones}
    if has_spans(content):
        return {GIVEN: 2 * ones, ROWS: ones, SUM: ones}
    given = _labels_per_row(labels)
    weights = {GIVEN: given, LABELLED: (given > 0).to(torch.int64), ROWS: ones, SUM: ones}
    return {FOLLOWING: _labels_per_row(labels[:, 1:]), **weights} if labels.ndim == 2 else weights


def has_ragged_rows(batch: Any) -> bool:
    """Whether rows have different numbers of labels, so that a mean over these is none over rows."""
    given = row_weights(batch).get(GIVEN)
    return given is not None and bool((given != given[0]).any())


@final
class Averages:
    """What a run's loss averages over, for every layout of batches by itself.

    Several averages may remain. While they weigh all rows of a probe in proportion, the objective is the same under each of
    them, and the sum over a row's labels is taken for its loss; of rows that they weigh differently nothing is measured.
    """

    def __init__(self) -> None:
        self._remaining: dict[Hashable, frozenset[str]] = {}
        self._looks: dict[Hashable, int] = {}

    def losses(self, mean: Tensor, batch: Any) -> SampleLosses | None:
        """The losses of a batch of which the loss function returned `mean`, 0-d; None while no average is known."""
        remaining = self._remaining.get(label_layout(batch), frozenset())
        weights = row_weights(batch)
        name = next((name for name in weights if name in remaining), None)
        if name is None:
            return None
        counts = weights[name]
        if name == SUM:
            return SampleLosses(mean, counts, None, is_sum=True)
        return SampleLosses(mean * counts.sum() if counts.any() else mean.new_zeros(()), counts, None)

    def settle(self, look: Callable[[Any], frozenset[str] | None], microbatches: Sequence[Any], world: World) -> None:
        """Find out what is averaged over, for all processes together; see `Settling`.

        Args:
            look: at a microbatch: the names of averages that it contradicts; None where it tells nothing.
            microbatches: of this process.
            world: all processes.
        """
        looked: set[Hashable] = set()
        for number in range(max(world.gathered(len(microbatches)))):
            batch = microbatches[number] if number < len(microbatches) else None
            if not world.anywhere(batch is not None and self._is_due(batch, looked)):
                continue
            found = None if batch is None else (label_layout(batch), frozenset(row_weights(batch)), look(batch))
            looked |= self._take_in([each for each in world.gathered(found) if each is not None])
        self._require_decided(microbatches, world)

    def note(self, batch: Any, contradicted: frozenset[str] | None) -> None:
        """Take in what one process has seen of a batch by itself."""
        self._take_in([(label_layout(batch), frozenset(row_weights(batch)), contradicted)])

    def knows(self, batch: Any) -> bool:
        """Whether batches like it were looked at."""
        return label_layout(batch) in self._remaining

    def _is_due(self, batch: Any, looked: Iterable[Hashable]) -> bool:
        layout = label_layout(batch)
        if layout not in looked and self._looks.get(layout, 0) < _ENOUGH:
            return True
        return not _in_proportion(self._weights([batch], layout))

    def _take_in(self, found: Sequence[tuple[Hashable, frozenset[str], frozenset[str] | None]]) -> set[Hashable]:
        """Take in what batches of one or more layouts allow and contradict; the layouts that told something."""
        layouts = {layout for layout, _, contradicted in found if contradicted is not None}
        for layout in layouts:
            told = [(names, contradicted) for of, names, contradicted in found if of == layout and contradicted is not None]
            possible = frozenset[str]().union(*(names for names, _ in told))
            left = possible.difference(*(contradicted for _, contradicted in told))
            if not left and all(names - contradicted for names, contradicted in told):
                each = sorted(" or ".join(sorted(names - contradicted)) for names, contradicted in told)
                raise ConfigurationError(
                    f"processes find that the loss is a mean over different things ({', '.join(each)}): pass a function "
                    "`(model, batch) -> scalar mean or (N,) losses`."
                )
            self._narrow(layout, left)
        return layouts

    def _narrow(self, layout: Hashable, left: frozenset[str]) -> None:
        before = self._remaining.get(layout)
        self._remaining[layout] = left if before is None else before & left or left
        self._looks[layout] = self._looks.get(layout, 0) + 1
        if before and not before & left:
            _logger.warning(
                "the loss is found to average over %s and not over %s, as earlier probes of this run had it: their numbers are "
                "those of another function.",
                _either(left),
                _either(before),
            )
        elif left == {SUM} and before != left:
            _logger.warning(
                "the loss is a sum over the rows of a batch, and grows with it: curvature is measured for its mean over rows. "
                "That of the loss that trains is so many times larger as there are rows in a step."
            )

    def _weights(self, microbatches: Iterable[Any], layout: Hashable) -> dict[str, list[int]]:
        """What all rows of this layout weigh under each average that remains."""
        remaining = self._remaining.get(layout, frozenset())
        weights: dict[str, list[int]] = {name: [] for name in AVERAGES if name in remaining}
        for batch in microbatches:
            if label_layout(batch) == layout:
                of_batch = row_weights(batch)
                for name in weights:
                    weights[name] += of_batch[name].tolist() if name in of_batch else []
        return weights

    def _require_decided(self, microbatches: Sequence[Any], world: World) -> None:
        for layout in [layout for layout, names in self._remaining.items() if len(names) > 1]:
            by_rank = world.gathered(self._weights(microbatches, layout))
            weights = {name: [each for of_rank in by_rank for each in of_rank[name]] for name in by_rank[0]}
            if not _in_proportion(weights):
                raise ProbeError(
                    f"the loss may average over {_either(weights)}: on parts of this probe's rows all of these give its value "
                    "and its gradient, and on all of its rows they differ. The next probe looks again; or pass a function "
                    "`(model, batch) -> (N,) losses`."
                )


def _labels_per_row(labels: Tensor) -> Tensor:
    """(N,) labels that are not ignored."""
    return (labels != IGNORED).reshape(len(labels), -1).sum(1).cpu()


def _in_proportion(weights: Mapping[str, Sequence[int]]) -> bool:
    """Whether all these averages make the same mean of the rows, and the same sums over the labels of a row."""
    if SUM in weights and len(weights) > 1:
        return False
    of_labels = [weights[name] for name in (FOLLOWING, GIVEN) if name in weights]
    if len(of_labels) == 2 and of_labels[0] != of_labels[1]:
        return False
    every = [list(each) for each in weights.values()]
    return all(a * sum(every[0]) == b * sum(other) for other in every[1:] for a, b in zip(other, every[0], strict=True))


def _either(names: Iterable[str]) -> str:
    return " or ".join(name for name in AVERAGES if name in names) or "neither rows nor labels"
