"""Sharded parameters that no process can hold: the numbers are those of one process with all rows."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from curvature_callbacks import CurvatureMonitor, FisherSpectrum, GradientNoise, KFACCoverage, KFACQuality, TopEigenpairs
from curvature_callbacks.isolation.model import isolated
from curvature_callbacks.problem.problem import Problem
from curvature_callbacks.processes.group import current_world
from curvature_callbacks.record import Record
from tests.processes.ranks import Ranks
from tests.processes.training import nothing_fits

ROWS = 6
TIGHT: dict[str, Any] = {"k": 2, "tol": 1e-5, "max_matvecs": 80}
MEASURE = [
    FisherSpectrum(),
    KFACQuality(),
    KFACCoverage(),
    GradientNoise(),
    TopEigenpairs(**TIGHT),
    TopEigenpairs(operator="ggn", which="LA", **TIGHT),
    TopEigenpairs(operator="empirical_fisher", sample_unit="token", which="LA", **TIGHT),
]


def language_model() -> GPT2LMHeadModel:
    """With a head tied to the embedding, in double precision."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 19, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    model: GPT2LMHeadModel = GPT2LMHeadModel(GPT2Config(**sizes)).double()
    return model


def sharded(model: GPT2LMHeadModel) -> nn.Module:
    for block in model.transformer.h:
        fully_shard(block)
    return fully_shard(model)


def sentences() -> dict[str, Tensor]:
    """Rows with different numbers of targets."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(19, (ROWS, 7), generator=generator)
    labels = tokens.clone()
    labels[::2, 4:] = -100
    return {"input_ids": tokens, "labels": labels}


def own_part(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    world = current_world()
    return {name: value[world.rank :: world.size] for name, value in batch.items()}


def measured(model: nn.Module, batch: Any) -> list[Record]:
    return CurvatureMonitor(model, probes=[batch], measure=MEASURE).step(0)


def measured_in_parts() -> list[Record]:
    with nothing_fits():
        return measured(sharded(language_model()), own_part(sentences()))


@pytest.mark.slow
def test_two_processes_measure_what_one_does_with_the_whole_model(two_processes: Ranks) -> None:
    assert_same_numbers(two_processes)


@pytest.mark.slow
def test_three_shards_of_every_parameter_and_an_empty_one(four_processes: Ranks) -> None:
    """Biases of two rows over four processes leave some of them without a part."""
    for found in four_processes(products, "hessian", tiny):
        assert found["error"] <= 1e-12


def assert_same_numbers(ranks: Ranks) -> None:
    expected = {(record.measurement, record.block): record for record in measured(language_model(), sentences())}
    for records in ranks(measured_in_parts):
        assert_close(records, expected)


def assert_close(records: list[Record], expected: Mapping[tuple[str, str | None], Record]) -> None:
    """The numbers of the `expected` measurements and blocks."""
    assert not [record.error for record in records if record.failed]
    assert {(record.measurement, record.block) for record in records} == expected.keys()
    for record in records:
        if record.measurement == "probe":
            continue
        alone = expected[record.measurement, record.block].scalars
        assert record.scalars.keys() == alone.keys()
        for name, value in alone.items():
            if "condition_number" not in name and not name.startswith("residual"):  # ratios to rounding
                assert record.scalars[name] == pytest.approx(value, rel=1e-6, abs=1e-9), (record.measurement, name)


def classifier() -> GPT2ForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"vocab_size": 19, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2, "num_labels": 3, "pad_token_id": 0}
    model: GPT2ForSequenceClassification = GPT2ForSequenceClassification(
        GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    ).double()
    return model


def labelled(labels_are: str) -> tuple[Any, list[dict[str, Tensor]]]:
    """A model with a loss of its own, and the microbatches of two processes, of which only the first tells all about it."""
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randint(1, 19, (3, 7), generator=generator) for _ in range(2))
    if labels_are == "equal":
        labels = [torch.tensor([0, 1, 2]), torch.tensor([1, 1, 1])]
        return classifier(), [{"input_ids": first, "labels": labels[0]}, {"input_ids": second, "labels": labels[1]}]
    ignored = torch.full_like(second, -100)
    return language_model(), [{"input_ids": first, "labels": first}, {"input_ids": second, "labels": ignored}]


def measured_labelled(labels_are: str, measure: list[Any], shared: bool) -> list[Record]:
    model, batches = labelled(labels_are)
    if not shared:
        return CurvatureMonitor(model, probes=batches, measure=measure).step(0)
    with nothing_fits():
        own = batches[current_world().rank]
        return CurvatureMonitor(sharded(model), probes=[own], measure=measure).step(0)


@pytest.mark.parametrize("labels_are", ["equal", "ignored"])
@pytest.mark.parametrize(
    "measurement",
    [FisherSpectrum(), pytest.param(TopEigenpairs(k=1, which="LA", tol=1e-5, max_matvecs=80), marks=pytest.mark.slow)],
    ids=["gram", "hessian"],
)
def test_the_models_own_loss_of_labels_that_tell_one_process_less(
    labels_are: str, measurement: Any, two_processes: Ranks
) -> None:
    expected = {(record.measurement, record.block): record for record in measured_labelled(labels_are, [measurement], False)}
    for records in two_processes(measured_labelled, labels_are, [measurement], True):
        assert_close(records, expected)


def with_a_row_that_is_not_finite() -> list[str]:
    """What the records say of a loss that one process cannot look into: the others would not take part in its passes."""
    inputs = torch.randn(3, 7, 8, dtype=torch.float64)
    if current_world().rank == 1:
        inputs[0] = torch.nan
    batch = {"inputs_embeds": inputs, "labels": torch.randint(19, (3, 7))}
    with nothing_fits():
        monitor = CurvatureMonitor(sharded(language_model()), probes=[batch], measure=[TopEigenpairs(k=1, max_matvecs=5)])
        return [str(record.error) for record in monitor.step(0) if record.failed]


def test_a_row_of_one_process_that_is_not_finite_fails_on_both(two_processes: Ranks) -> None:
    for found in two_processes(with_a_row_that_is_not_finite):
        assert found == ["ProbeError: process 1: the loss of this probe is nan"]


class Tagger(nn.Module):
    """A class for every position."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens))).mT


def measured_by_position(shared: bool) -> list[Record]:
    """Of rows with three positions on the first process, and five on the second."""
    torch.manual_seed(0)
    model = Tagger().double()
    batches = [(torch.randint(5, (2, length)), torch.randint(4, (2, length))) for length in (3, 5)]
    batches[1][1][0, 2:] = -100
    measure: list[Any] = [FisherSpectrum(sample_unit="token"), FisherSpectrum(fisher="exact"), KFACQuality(fisher="exact")]
    if not shared:
        return CurvatureMonitor(model, probes=batches, loss="cross_entropy", measure=measure).step(0)
    fully_shard(model.head)
    fully_shard(model)
    with nothing_fits():
        own = [batches[current_world().rank]]
        return CurvatureMonitor(model, probes=own, loss="cross_entropy", measure=measure).step(0)


def test_rows_of_other_lengths_on_other_processes(two_processes: Ranks) -> None:
    expected = {(record.measurement, record.block): record for record in measured_by_position(False)}
    for records in two_processes(measured_by_position, True):
        assert_close(records, expected)


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()


class Again(nn.Module):
    """The network of `tiny` with a part of it registered under a second name."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny()
        self.backbone = self.net[:2]

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.net)

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.backbone(x))


def products(operator: str, build: Callable[[], nn.Module]) -> dict[str, float]:
    """Largest difference of the operator from that of one process with all rows."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(2, (8,), generator=generator)
    alone = Problem(build(), [(x, y)], loss="cross_entropy")
    world, model = current_world(), build()
    for child in model:
        if isinstance(child, nn.Linear):
            fully_shard(child)
    fully_shard(model)
    names = list(dict(model.named_parameters()))
    with nothing_fits(), isolated(model, seed=0):
        problem = Problem(
            model, [(x[world.rank :: world.size], y[world.rank :: world.size])], loss="cross_entropy", world=world
        )
        found = getattr(problem, operator)()
        v = {name: torch.randn(value.shape, dtype=torch.float64) for name, value in alone.objective.parameters.items()}
        v = world.gathered(v)[0]  # generators of processes differ
        product = found.matmat(torch.cat([v[name][world.part(len(v[name]))].flatten() for name in names])[:, None])[:, 0]
    right = getattr(alone, operator)().matmat(torch.cat([v[name].flatten() for name in names])[:, None])[:, 0]
    pieces = torch.split(right, [v[name].numel() for name in names])
    own = [piece.view(v[name].shape)[world.part(len(v[name]))].flatten() for piece, name in zip(pieces, names, strict=True)]
    return {"error": float((product - torch.cat(own)).norm() / right.norm()), "held": len(product)}


@pytest.mark.parametrize("operator", ["hessian", "ggn", "empirical_fisher"])
def test_a_product_is_the_part_of_that_over_all_rows(operator: str, two_processes: Ranks) -> None:
    found = two_processes(products, operator, tiny)
    assert max(one["error"] for one in found) <= 1e-12
    assert sum(one["held"] for one in found) == sum(value.numel() for value in tiny().parameters())
    assert max(one["held"] for one in found) < sum(value.numel() for value in tiny().parameters())


def test_differences_need_no_whole_parameter_either(two_processes: Ranks) -> None:
    assert max(one["error"] for one in two_processes(products, "finite_difference_hessian", tiny)) <= 1e-5


def test_a_module_under_two_names_is_gathered_once(two_processes: Ranks) -> None:
    for found in two_processes(products, "hessian", Again):
        assert found["error"] <= 1e-12
