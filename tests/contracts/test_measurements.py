"""What every measurement promises."""

import copy
import json
import pickle
from dataclasses import FrozenInstanceError, asdict, fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

import curvature_callbacks
from curvature_callbacks import Measurement, Problem, Record
from curvature_callbacks.isolation.model import isolated
from curvature_callbacks.record import tag_segment
from tests.contracts.measurement_cases import VARIANTS


@pytest.fixture(params=VARIANTS, ids=repr)
def measurement(request: Any) -> Any:
    return request.param


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))


def measured(measurement: Any, model: nn.Module | None = None, *, step: int = 7, state: Any = None) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(6, 4, generator=generator), torch.randint(3, (6,), generator=generator)
    model = network() if model is None else model
    with isolated(model, seed=0):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        problem = Problem(model, [batch], loss="cross_entropy", step=step, optimizer=optimizer)
        records, state = measurement.measure(problem, measurement.init(problem) if state is None else state)
    return list(records), state


class TestMeasurement:
    def test_it_is_a_measurement(self, measurement: Any) -> None:
        assert isinstance(measurement, Measurement)

    def test_it_pickles_and_copies(self, measurement: Any) -> None:
        assert pickle.loads(pickle.dumps(measurement)) == measurement
        assert copy.deepcopy(measurement) == measurement

    def test_its_options_are_json(self, measurement: Any) -> None:
        options = json.loads(json.dumps(asdict(measurement)))
        assert type(measurement)(**options) == measurement

    def test_it_is_a_frozen_value(self, measurement: Any) -> None:
        assert is_dataclass(measurement)
        assert replace(measurement) == measurement
        assert hash(replace(measurement)) == hash(measurement)
        assert not hasattr(measurement, "__dict__")
        for field in fields(measurement):
            with pytest.raises(FrozenInstanceError):
                setattr(measurement, field.name, None)

    def test_positional_options_are_refused(self, measurement: Any) -> None:
        with pytest.raises(TypeError):
            type(measurement)(1)

    def test_it_prints_every_option(self, measurement: Any) -> None:
        assert repr(measurement).startswith(type(measurement).__name__ + "(")
        assert all(f"{field.name}=" in repr(measurement) for field in fields(measurement))
        assert eval(repr(measurement), vars(curvature_callbacks)) == measurement

    def test_its_name_is_a_tag(self, measurement: Any) -> None:
        assert measurement.name == tag_segment(measurement.name)

    def test_records_are_its_own_at_the_step_asked_for(self, measurement: Any) -> None:
        records, _ = measured(measurement, step=41)
        assert records
        assert {(record.measurement, record.step) for record in records} == {(measurement.name, 41)}
        assert [record.block for record in records].count(None) == 1
        assert len({record.block for record in records}) == len(records)
        assert all(record.scalars for record in records)

    def test_values_are_floats_and_json(self, measurement: Any) -> None:
        for record in measured(measurement)[0]:
            assert all(type(value) is float for value in record.scalars.values())
            assert all(type(value) is float for values in record.arrays.values() for value in values)
            assert Record.from_json(record.to_json()).to_json() == record.to_json()

    def test_what_is_drawn_is_said(self, measurement: Any) -> None:
        for record in measured(measurement)[0]:
            assert record.block is None or record.curves is not None
            assert not record.arrays or record.charts is not None
            assert set(record.curves or ()) <= set(record.scalars)
            assert set(record.charts or ()) <= set(record.arrays)

    def test_eigenvalues_descend(self, measurement: Any) -> None:
        for record in measured(measurement)[0]:
            for name, values in record.arrays.items():
                if name.endswith("eigenvalues"):
                    assert values == sorted(values, reverse=True)

    def test_the_same_problem_gives_the_same_numbers(self, measurement: Any) -> None:
        first, second = ([(dict(record.scalars), dict(record.arrays)) for record in measured(measurement)[0]] for _ in range(2))
        assert repr(first) == repr(second)

    def test_a_second_probe_takes_the_state_of_the_first(self, measurement: Any) -> None:
        records, state = measured(measurement)
        again, _ = measured(measurement, state=state)
        assert [record.block for record in again] == [record.block for record in records]

    def test_the_model_is_left_alone(self, measurement: Any) -> None:
        model = network()
        model(torch.randn(2, 4)).sum().backward()
        kept = [(p._version, p.grad._version, p.requires_grad) for p in model.parameters()]  # type: ignore[union-attr]
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]
        measured(measurement, model)
        assert [(p._version, p.grad._version, p.requires_grad) for p in model.parameters()] == kept  # type: ignore[union-attr]
        assert [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()] == hooks

    def test_its_docstring_tells_tags_and_cost(self, measurement: Any) -> None:
        documentation = type(measurement).__doc__
        assert "Cost:" in documentation
        assert "| tag | meaning |" in documentation
        assert all(f"{field.name}:" in documentation for field in fields(measurement))
