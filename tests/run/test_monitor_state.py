"""What a monitor carries from probe to probe, and through a checkpoint."""

import io
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from curvature_callbacks import CurvatureMonitor, GradientNoise, Measurement, Record, RefusedError, TopEigenpairs
from tests.run.monitor_cases import new_monitor
from tests.training_cases import Checksum, Raising, assert_equal, cheap, loader, probed_steps


def test_state_goes_on_where_it_was() -> None:
    first = new_monitor(when=3)
    for step in range(5):
        first.step(step)
    second = new_monitor(when=3)
    second.load_state_dict(first.state_dict())
    for step in range(5, 8):
        second.step(step)
    assert probed_steps(second.history) == [6]


def test_state_is_plain_data() -> None:
    watching = new_monitor(measure=[Raising(error=RefusedError("x")), Remembering(), GradientNoise(), *cheap()])
    watching.step(0)
    state = watching.state_dict(tensors=False)
    assert type(state["states"]["gradient_noise"]["whole"]["weight"]) is float
    assert "remembering" not in state["states"]  # a tensor
    again = json.loads(json.dumps(state))
    assert again["states"]["gradient_noise"] == state["states"]["gradient_noise"]
    assert again["failures"] == state["failures"] == {"raising": 3} | dict.fromkeys(state["states"], 0) | {"remembering": 0}


def test_a_checkpoint_that_holds_tensors_has_them_all() -> None:
    watching = new_monitor(measure=[Remembering(), TopEigenpairs(k=2), GradientNoise()])
    watching.step(0)
    state = watching.state_dict()
    assert torch.equal(state["states"]["remembering"], torch.zeros(1))
    assert len(state["states"]["hessian"]["starts"][""]) == 21
    assert_equal(torch.load(io.BytesIO(saved(state)), weights_only=True), state)
    bare = json.loads(json.dumps(watching.state_dict(tensors=False)))
    assert bare["states"]["hessian"] == {"error": state["states"]["hessian"]["error"], "starts": {"": None}}


def test_eigenvectors_and_the_passed_self_check_go_on_after_a_checkpoint() -> None:
    model, measure = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), [TopEigenpairs(k=1, which="LA", tol=1e-3)]
    through, second, bare, cold = (new_monitor(model, measure=measure) for _ in range(4))
    through.step(0)
    second.load_state_dict(torch.load(io.BytesIO(saved(through.state_dict())), weights_only=True))
    bare.load_state_dict(json.loads(json.dumps(through.state_dict(tensors=False))))
    runs = {name: one.step(1)[1] for name, one in {"on": through, "resumed": second, "bare": bare, "cold": cold}.items()}
    assert runs["resumed"].scalars == runs["on"].scalars
    assert runs["resumed"].num_matvecs == runs["on"].num_matvecs < runs["bare"].num_matvecs
    assert runs["bare"].num_matvecs == runs["cold"].num_matvecs - 3  # the self-check
    assert runs["bare"].scalars == runs["cold"].scalars


def saved(state: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


def noise(watching: CurvatureMonitor) -> list[dict[str, float]]:
    return [dict(record.scalars) for record in watching.history if record.measurement == "gradient_noise"]


def test_averages_go_on_after_a_checkpoint() -> None:
    model, probes = nn.Linear(6, 3), loader()
    measure: list[Measurement] = [GradientNoise(), *cheap()]
    through, first, second = (new_monitor(model, probes=probes, measure=measure) for _ in range(3))
    for step in range(4):
        through.step(step)
    first.step(0)
    first.step(1)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(tensors=False))))
    second.step(2)
    second.step(3)
    assert noise(first) + noise(second) == noise(through)


def test_a_checkpoint_without_states_begins_them_anew() -> None:
    model = nn.Linear(6, 3)
    watching, fresh = (new_monitor(model, measure=[GradientNoise()]) for _ in range(2))
    watching.load_state_dict({"previous": 0, "failures": {}})
    watching.step(1)
    fresh.step(1)
    assert noise(watching) == noise(fresh) != []


@dataclass(frozen=True)
class Telling:
    """Its states are those it is told."""

    states: tuple[Any, ...]
    name: str = "telling"

    def init(self, problem: Any) -> None:
        return None

    def measure(self, problem: Any, state: Any) -> Any:
        return [], self.states[problem.step]


def test_a_state_that_a_checkpoint_can_no_longer_hold_is_not_saved_as_it_was() -> None:
    watching = new_monitor(measure=[Telling(({"seen": 1}, {"seen": object()}))])
    watching.step(0)
    assert watching.state_dict()["states"] == {"telling": {"seen": 1}}
    watching.step(1)
    for tensors in (True, False):
        assert watching.state_dict(tensors=tensors)["states"] == {}


def test_a_state_with_keys_that_json_would_turn_into_strings_is_not_saved() -> None:
    watching = new_monitor(measure=[Telling(({3: 1.0},))])
    watching.step(0)
    assert watching.state_dict(tensors=False)["states"] == {}


def test_loading_a_checkpoint_forgets_what_it_does_not_hold() -> None:
    watching = new_monitor(measure=[Telling(({"seen": 1},))])
    watching.step(0)
    watching.load_state_dict({"previous": 0, "failures": {}, "states": {}})
    assert watching.state_dict()["states"] == {}


@dataclass(frozen=True)
class Remembering:
    """Its state is a tensor."""

    name: str = "remembering"

    def init(self, problem: Any) -> torch.Tensor:
        return torch.zeros(1)

    def measure(self, problem: Any, state: torch.Tensor) -> Any:
        return [Record(step=problem.step, measurement=self.name, scalars={"one": 1.0})], state


class Counting(Checksum):
    """Counts its probes in its state and fails at one of them."""

    def init(self, problem: Any) -> int:
        return 0

    def measure(self, problem: Any, state: int) -> Any:
        if problem.step == 2:
            raise RuntimeError("x")
        return [Record(step=problem.step, measurement=self.name, scalars={"count": float(state)})], state + 1


def test_the_state_of_a_measurement_is_handed_back_and_survives_a_failure() -> None:
    watching = new_monitor(measure=[Counting()])
    for step in range(5):
        watching.step(step)
    counts = [record.scalars.get("count") for record in watching.history if record.measurement == "checksum"]
    assert counts == [0.0, 1.0, None, 2.0, 3.0]
