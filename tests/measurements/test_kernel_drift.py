"""Drift of the gradients' kernel: the same rows and parameters are compared, others are told apart."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from curvature_callbacks import CurvatureMonitor, GradientNoise, Problem, Record
from tests.measurements.gradient_noise_cases import CASE, Batch, descend, digits, measured, model_record, network
from tests.reference import sample_gradients, stacked


def dense_gram(model: nn.Module, batches: Any) -> Tensor:
    G = stacked(sample_gradients(model, batches, "pair"))
    return torch.tensor([[float(a @ b) for b in G] for a in G], dtype=torch.float64)


def test_drift_through_the_monitor_at_fixed_rows_of_the_digits() -> None:
    model, data = network(), digits()
    loader = DataLoader(TensorDataset(*data), batch_size=16)
    rows: list[Any] = []

    class Rows:
        """Shows which rows were drawn."""

        name = "rows"

        def init(self, problem: Problem) -> None:
            return None

        def measure(self, problem: Problem, state: None) -> tuple[list[Record], None]:
            rows[:] = [(x.clone(), y.clone()) for x, y in problem.microbatches]
            return [], None

    watching = CurvatureMonitor(
        model, probes=loader, loss="cross_entropy", measure=[GradientNoise(), Rows()], when=1, draw="fixed",
        num_microbatches=2, microbatch_size=6,
    )  # fmt: skip
    watching.step(0)
    first = dense_gram(model, rows)
    watching.step(1)
    for index in (2, 3):
        descend(model, data)
        watching.step(index)
    last = dense_gram(model, rows)
    found = [record for record in watching.history if record.measurement == "gradient_noise" and record.block is None]
    drifts = [record.scalars["kernel_drift"] for record in found]
    assert drifts[:2] == [0.0, 0.0]
    assert 0 < drifts[2] < drifts[3] < 1
    assert drifts[3] == pytest.approx(1 - float((first * last).sum() / first.norm() / last.norm()), rel=1e-6)
    assert all(record.metadata["reference_step"] == 0 for record in found)


def test_fresh_draws_have_no_drift() -> None:
    loader = DataLoader(TensorDataset(*digits()), batch_size=16)
    watching = CurvatureMonitor(
        network(), probes=loader, loss="cross_entropy", measure=[GradientNoise()], when=1, num_microbatches=1
    )
    records = [watching.step(index)[1] for index in range(3)]
    assert ["kernel_drift" in record.scalars for record in records] == [True, False, False]
    assert "first probe" in records[-1].metadata["absent"]["kernel_drift"]


def other_label(x: Tensor, y: Tensor) -> list[Batch]:
    changed = y.clone()
    changed[0] = (changed[0] + 1) % 3
    return [(x, changed)]


CHANGES: dict[str, Callable[[Tensor, Tensor], list[Batch]]] = {
    "a label": other_label,
    "the last bit of an input": lambda x, y: [(torch.nextafter(x, x + 1), y)],
    "the order": lambda x, y: [(x.flip(0), y.flip(0))],
    "fewer rows": lambda x, y: [(x[:-1], y[:-1])],
    "a row more": lambda x, y: [(x, y), (x[:1], y[:1])],
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_rows_have_no_drift(change: str) -> None:
    model, (x, y) = CASE.model(), CASE.microbatches((5,))[0]
    _, state = measured(model, [(x, y)])
    assert "kernel_drift" not in model_record(model, CHANGES[change](x, y), state).scalars
    assert model_record(model, [(x.clone(), y.clone())], state).scalars["kernel_drift"] == 0.0


def test_other_parameters_have_no_drift() -> None:
    model, batches = CASE.model(), CASE.microbatches()
    _, state = measured(model, batches)
    assert "kernel_drift" not in model_record(model, batches, state, params_filter=lambda name, _: "weight" in name).scalars


def test_rows_of_any_layout_are_told_apart_by_their_content() -> None:
    """Strided, empty, boolean, half-precision and 0-d tensors in a microbatch, which the loss does not read."""
    model, (x, y) = CASE.model(), CASE.microbatches((4,))[0]

    def loss(module: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(module(batch["x"]), batch["labels"], reduction="none")

    def batch(mask: Tensor, half: float) -> dict[str, Any]:
        extra = {"empty": torch.empty(4, 0), "half": torch.full((4,), half, dtype=torch.bfloat16), "scalar": torch.tensor(2)}
        return {"x": x.T.contiguous().T, "labels": y.repeat_interleave(2)[::2], "mask": mask, "name": "any"} | extra

    mask = torch.tensor([True, False, True, True])
    _, state = measured(model, [batch(mask, 1.0)], loss=loss)
    as_dense = batch(mask, 1.0) | {"x": x.contiguous(), "labels": y}  # other strides may be multiplied in another order
    assert model_record(model, [as_dense], state, loss=loss).scalars["kernel_drift"] < 1e-28
    same = batch(mask, 1.0)
    for other in (
        batch(~mask, 1.0),
        batch(mask, 2.0),
        same | {"half": same["half"].view(torch.int16)},  # the same bytes
        same | {"half": same["half"][:, None]},
    ):
        assert "kernel_drift" not in model_record(model, [other], state, loss=loss).scalars
