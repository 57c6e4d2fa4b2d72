"""What a loss averages over is told from its values and gradients, at every count of labels and however alike the values."""

from typing import Any

import pytest
import torch
from torch import Tensor

from curvature_callbacks import ConfigurationError, ProbeError, compute_fisher_spectrum
from curvature_callbacks.model.loss.averages import AVERAGES as NAMES
from curvature_callbacks.model.loss.averages import FOLLOWING, GIVEN, LABELLED, ROWS, SUM, Averages
from curvature_callbacks.problem.problem import Problem
from tests.model.loss.average_cases import AVERAGES, Speaker, fisher_trace, flattened, labelled, row_losses, speaker

PROMPTS = labelled((2, 0), (3, 1), (1, 2), (2, 2))  # every first label is ignored: with and without a shift counts are equal
EQUAL_HALVES = labelled((0, 5), (0, 3), (0, 3), (0, 5))  # rows 0 and 2 have as many labels as rows 1 and 3
EQUAL_ROWS = labelled((0, 2), (0, 2), (0, 2), (0, 2))
TWO_EMPTY = labelled((6, 0), (0, 1), (0, 6), (0, 3))
WHOLE = labelled((0, 0), (0, 0), (0, 0))
RAGGED = labelled((0, 0), (0, 1), (0, 4), (0, 2), (0, 0), seed=1)


def trace(model: Speaker, *batches: dict[str, Tensor]) -> float:
    return compute_fisher_spectrum(model, list(batches), block_structure="none").full.metrics()["trace"]


@pytest.mark.parametrize(
    "first", [PROMPTS, EQUAL_HALVES, EQUAL_ROWS, WHOLE], ids=["prompts", "equal halves", "equal rows", "whole rows"]
)
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("scale", [1.0, 1e-6, 0.0])
def test_samples_are_those_of_the_average(average: str, first: dict[str, Tensor], scale: float) -> None:
    """Whatever the counts of the first microbatch, and where all targets have one loss as well."""
    model = flattened(speaker(average), scale)
    assert trace(model, first, RAGGED) == pytest.approx(fisher_trace(model, first, RAGGED), rel=1e-6)


@pytest.mark.parametrize("average", ["over labels", "over rows", "sum"])
def test_microbatches_of_one_row_tell_the_same(average: str) -> None:
    model = speaker(average)
    rows = [{key: value[i : i + 1] for key, value in RAGGED.items()} for i in (1, 2, 3)]
    assert trace(model, *rows) == pytest.approx(fisher_trace(model, *rows), rel=1e-6)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("average", ["over labels", "over rows"])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 0.0])
def test_the_shift_is_the_losses_and_not_the_names(average: str, causal: bool, shift: bool, scale: float) -> None:
    model = flattened(speaker(average, causal=causal, shift=shift), scale)
    batch = labelled((0, 0), (0, 1), (0, 3))
    assert trace(model, batch) == pytest.approx(fisher_trace(model, batch), rel=1e-6)


@pytest.mark.parametrize("shift", [True, False])
def test_a_loss_that_does_not_come_from_the_logits_is_compared_by_the_parameters(shift: bool) -> None:
    model = flattened(speaker(causal=True, shift=shift, own_logits=False), 0.0)
    batch = labelled((0, 0), (0, 1), (0, 3))
    assert trace(model, batch) == pytest.approx(fisher_trace(model, batch), rel=1e-6)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("average", ["over labels", "over rows"])
def test_rows_of_equally_many_labels_that_are_never_ignored_have_the_sums_over_them(average: str, shift: bool) -> None:
    """A mean over rows is one over labels then; also at one row a microbatch."""
    model, batch = speaker(average, shift=shift), labelled((0, 0), (0, 0), (0, 0))
    rows = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(3)]
    model.average = "over labels"
    expected = fisher_trace(model, batch)
    model.average = average
    assert trace(model, batch) == pytest.approx(expected, rel=1e-6)
    assert trace(model, *rows) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("average", ["over labels", "over rows", "over rows with a label"])
def test_rows_without_a_label_count_where_the_loss_counts_them(average: str) -> None:
    """The gradient of the mean over two microbatches, against the mean of their rows' losses by its definition."""
    model, batches = speaker(average), [TWO_EMPTY, RAGGED]
    problem = Problem(model, batches)
    problem.settle_loss()
    total = sum(row_losses(model, batch).sum() for batch in batches)
    of_rows = [batch["labels"].ne(-100).sum(1) for batch in batches]
    counts = {"over labels": sum(n.sum() for n in of_rows), "over rows with a label": sum((n > 0).sum() for n in of_rows)}
    expected = torch.autograd.grad(total / counts.get(average, torch.tensor(9)), list(model.parameters()))
    for found, gradient in zip(problem.gradients.values(), expected, strict=True):
        torch.testing.assert_close(found, gradient)


def test_a_sum_is_measured_for_its_mean_over_rows_and_said_to_be_one(caplog: Any) -> None:
    model = speaker("sum")
    problem = Problem(model, [PROMPTS, RAGGED])
    problem.settle_loss()
    expected = torch.cat([row_losses(model, PROMPTS), row_losses(model, RAGGED)]).mean()
    leaves = problem.objective.leaves()
    torch.testing.assert_close(problem.objective.mean(problem.microbatches, leaves), expected)
    assert [record.message for record in caplog.records] == [
        "the loss is a sum over the rows of a batch, and grows with it: curvature is measured for its mean over rows. That of "
        "the loss that trains is so many times larger as there are rows in a step."
    ]


def test_what_was_found_is_looked_at_at_the_next_probe_and_not_again(caplog: Any) -> None:
    model = speaker("over labels")
    first = Problem(model, [PROMPTS])
    first.settle_loss()
    calls = []
    for step in (1, 2, 3):
        model.num_calls = 0
        later = Problem(model, [RAGGED], step=step, memory=first._memory)
        later.settle_loss()
        later.settle_loss()
        calls.append(model.num_calls)
    assert calls == [1, 0, 0]
    assert not caplog.records


@pytest.mark.parametrize(
    ("before", "now"), [("over labels", "over rows"), ("over rows", "over labels"), ("over rows", "sum"), ("sum", "over rows")]
)
def test_a_mistake_is_corrected_at_the_next_probe(before: str, now: str, caplog: Any) -> None:
    model = speaker(before)
    first = Problem(model, [PROMPTS])
    first.settle_loss()
    model.average = now
    later = Problem(model, [PROMPTS], step=1, memory=first._memory)
    later.settle_loss()
    expected = AVERAGES[now][1](*model.targets(**PROMPTS)[1:]).sum()
    torch.testing.assert_close(later.objective(PROMPTS).total, expected)
    assert "as earlier probes of this run had it: their numbers are those of another function" in caplog.text


class Beside:
    """This process and one beside it, which has found that of a batch."""

    size = 2

    def __init__(self, found: Any) -> None:
        self.found = found

    def gathered(self, item: Any) -> list[Any]:
        return [item, self.found(item) if isinstance(item, tuple) else item]

    def anywhere(self, flag: bool) -> bool:
        return flag


def all_but(*names: str) -> frozenset[str]:
    return frozenset(NAMES) - set(names)


@pytest.mark.parametrize(
    ("own", "others", "name"),
    [
        (None, all_but(ROWS), ROWS),
        (all_but(GIVEN, FOLLOWING), all_but(GIVEN, ROWS), GIVEN),
        (all_but(FOLLOWING), None, FOLLOWING),
    ],
)
def test_what_one_process_can_tell_holds_for_all(own: Any, others: Any, name: str) -> None:
    averages = Averages()
    averages.settle(lambda batch: own, [RAGGED], Beside(lambda found: (*found[:2], others)))  # type: ignore[arg-type]
    losses = averages.losses(torch.tensor(1.0), RAGGED)
    assert losses is not None
    expected = {ROWS: [1] * 5, GIVEN: [6, 5, 2, 4, 6], FOLLOWING: [5, 4, 1, 3, 5]}[name]
    assert losses.num_targets.tolist() == expected


def test_processes_that_contradict_each_other_are_refused() -> None:
    world: Any = Beside(lambda found: (*found[:2], all_but(ROWS)))
    with pytest.raises(ConfigurationError, match=r"a mean over different things \(labels, rows\).*pass"):
        Averages().settle(lambda batch: all_but(GIVEN), [RAGGED], world)


def test_averages_that_differ_and_cannot_be_told_apart_are_refused_until_they_can() -> None:
    averages, world = Averages(), Beside(lambda found: found)
    looks = iter([all_but(GIVEN, ROWS), all_but(GIVEN, ROWS), all_but(LABELLED, ROWS)])
    averages.settle(lambda batch: next(looks), [EQUAL_ROWS], world)  # type: ignore[arg-type]
    assert averages.losses(torch.tensor(1.0), EQUAL_ROWS).num_targets.tolist() == [4] * 4  # type: ignore[union-attr]
    with pytest.raises(ProbeError, match=r"may average over labels or rows: .* The next probe looks again"):
        averages.settle(lambda batch: next(looks), [RAGGED], world)  # type: ignore[arg-type]
    averages.settle(lambda batch: next(looks), [RAGGED], world)  # type: ignore[arg-type]
    assert averages.losses(torch.tensor(2.0), RAGGED).total == 10  # type: ignore[union-attr]


def test_a_sum_is_never_taken_for_a_mean() -> None:
    world: Any = Beside(lambda found: found)
    with pytest.raises(ProbeError, match="may average over rows or nothing"):
        Averages().settle(lambda batch: all_but(ROWS, SUM), [EQUAL_ROWS], world)
