"""EdgeRatio against dense algebra, its tags, when it is absent, and that the optimizer stays as it is."""

import copy
import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from curvature_callbacks import ConfigurationError, CurvatureMonitor, Problem, Record, RefusedError
from curvature_callbacks.isolation.model import isolated
from curvature_callbacks.measurements import EdgeRatio, Measurement
from curvature_callbacks.record import headline, scalar_tags
from tests.reference import dense_hessian
from tests.training_cases import assert_equal, reports

TIGHT = EdgeRatio(tol=1e-9, max_matvecs=60)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def seven_rows() -> Any:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(7, 4, generator=generator).double(), torch.tensor([0, 1, 2, 2, 1, 0, 1])


def loss(model: nn.Module) -> Tensor:
    return F.cross_entropy(model(seven_rows()[0]), seven_rows()[1])


def train(model: nn.Module, optimizer: Optimizer, num_steps: int = 3) -> None:
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()


def measured(
    model: nn.Module, optimizer: Any, measurement: EdgeRatio = TIGHT, state: Any = None, **options: Any
) -> tuple[Record, Any]:
    with isolated(model, seed=0):
        problem = Problem(model, [seven_rows()], loss="cross_entropy", step=7, optimizer=optimizer, **options)
        records, state = measurement.measure(problem, measurement.init(problem) if state is None else state)
    (record,) = records
    return record, state


def monitor_of(model: nn.Module, **options: Any) -> CurvatureMonitor:
    usual: dict[str, Any] = {"probes": [seven_rows()], "loss": "cross_entropy", "measure": [TIGHT], "when": 1}
    return CurvatureMonitor(model, **(usual | options))


def largest(matrix: Tensor) -> float:
    """Of a matrix similar to a symmetric one."""
    return torch.linalg.eigvals(matrix).real.max().item()


def test_of_gradient_descent() -> None:
    model = network()
    H = dense_hessian(model, loss, [name for name, _ in model.named_parameters()])
    found = measured(model, SGD(model.parameters(), lr=0.3, momentum=0.9))[0].scalars
    assert found["lambda_max"] == pytest.approx(largest(H), rel=1e-8)
    assert found["limit"] == pytest.approx(3.8 / 0.3)
    assert found["ratio"] == pytest.approx(largest(H) * 0.3 / 3.8, rel=1e-8)
    assert found["learning_rate"] == 0.3
    assert found["converged"] == 1.0
    assert set(found) == {"ratio", "limit", "learning_rate", "lambda_max", "residual", "converged"}


def test_weight_decay_is_curvature() -> None:
    model = network()
    plain = measured(model, SGD(model.parameters(), lr=0.3))[0].scalars
    decayed = measured(model, SGD(model.parameters(), lr=0.3, weight_decay=0.25))[0].scalars
    assert decayed["lambda_max"] - plain["lambda_max"] == pytest.approx(0.25, rel=1e-7)
    assert decayed["limit"] == plain["limit"]


@pytest.mark.parametrize("method", ["adam", "adamw", "rmsprop"])
def test_of_a_preconditioned_method(method: str) -> None:
    """Eigenvalues of the unsymmetric `P^-1 (H + w)`."""
    model = network()
    optimizer: Optimizer = {
        "adam": Adam(model.parameters(), lr=0.01, weight_decay=0.3),
        "adamw": AdamW(model.parameters(), lr=0.01, weight_decay=0.3),
        "rmsprop": RMSprop(model.parameters(), lr=0.01, momentum=0.5),
    }[method]
    train(model, optimizer)
    H = dense_hessian(model, loss, [name for name, _ in model.named_parameters()])
    key = "square_avg" if method == "rmsprop" else "exp_avg_sq"
    v = torch.cat([optimizer.state[parameter][key].flatten() for parameter in model.parameters()])
    P = v**0.5 + 1e-8 if method == "rmsprop" else (1 - 0.9**3) * ((v / (1 - 0.999**3)) ** 0.5 + 1e-8)
    decay = 0.3 if method == "adam" else 0.0
    limit = {"adam": 38 / 0.01, "adamw": (2 - 0.003) * 19 / 0.01, "rmsprop": 3 / 0.01}[method]
    sharpness = largest((H + decay * torch.eye(len(H))) / P[:, None])
    found = measured(model, optimizer)[0].scalars
    assert found["preconditioned_lambda_max"] == pytest.approx(sharpness, rel=1e-7)
    assert found["limit"] == pytest.approx(limit)
    assert found["ratio"] == pytest.approx(sharpness / limit, rel=1e-7)
    assert "lambda_max" not in found


def test_of_groups_with_their_own_rates() -> None:
    """No one limit, but one ratio."""
    model = network()
    optimizer = SGD([{"params": model[0].parameters(), "lr": 0.2}, {"params": model[2].parameters(), "lr": 1.4}], momentum=0.5)
    H = dense_hessian(model, loss, [name for name, _ in model.named_parameters()])
    T = torch.tensor([0.2] * 25 + [1.4] * 18, dtype=torch.float64) / 3
    found = measured(model, optimizer)[0].scalars
    assert found["ratio"] == pytest.approx(largest(T[:, None] * H), rel=1e-8)
    assert (found["learning_rate"], found["learning_rate_min"], found["learning_rate_max"]) == (0.2, 0.2, 1.4)
    assert "limit" not in found
    assert "lambda_max" not in found


def test_what_does_not_move_is_left_out() -> None:
    model = network()
    H = dense_hessian(model, loss, ["2.weight", "2.bias"])
    record, _ = measured(model, SGD(model[2].parameters(), lr=0.3))
    assert record.scalars["lambda_max"] == pytest.approx(largest(H), rel=1e-8)
    assert record.metadata["num_params"] == 18


def test_an_eigenvalue_lies_within_the_residual_of_the_ratio() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.3)
    ratios = torch.linalg.eigvalsh(dense_hessian(model, loss, [name for name, _ in model.named_parameters()])) * 0.15
    for max_matvecs in (3, 5, 8):
        rough = measured(model, optimizer, EdgeRatio(tol=1e-9, max_matvecs=max_matvecs))[0]
        assert rough.scalars["converged"] == 0.0
        assert (ratios - rough.scalars["ratio"]).abs().min() <= rough.scalars["residual"] * (1 + 1e-9)
        assert rough.num_matvecs == max_matvecs + 3  # the self-check of the first probe
        assert len(rough.metadata["warnings"]) == 1


def test_the_next_probe_starts_from_the_eigenvector_of_this_one() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    measurement = EdgeRatio(tol=1e-4)
    _, state = measured(model, optimizer, measurement)
    train(model, optimizer, 1)
    warm, _ = measured(model, optimizer, measurement, state)
    again, _ = measured(model, optimizer, measurement)
    assert warm.num_matvecs < again.num_matvecs - 3
    assert warm.scalars["ratio"] == pytest.approx(again.scalars["ratio"], rel=1e-4)
    assert state[1].device.type == "cpu"


def test_other_parameters_begin_anew() -> None:
    model = network()
    _, state = measured(model, SGD(model[2].parameters(), lr=0.1))
    cold = measured(model, SGD(model.parameters(), lr=0.1))[0]
    assert measured(model, SGD(model.parameters(), lr=0.1), state=state)[0].scalars == cold.scalars


def test_before_the_first_step_of_adam_there_is_a_reason_and_no_ratio(caplog: Any) -> None:
    model = network()
    optimizer = Adam(model.parameters(), lr=0.02)
    watching = monitor_of(model, optimizer=optimizer)
    watching.step(0)
    train(model, optimizer, 1)
    watching.step(1)
    first, second = (record for record in watching.history if record.measurement == "edge")
    assert dict(first.scalars) == {"learning_rate": 0.02}
    assert "no step yet" in first.metadata["reason"]
    assert "reason" not in second.metadata
    assert "ratio" in second.scalars
    assert reports(caplog) == []
    assert [record.scalars["failed"] for record in watching.history if record.measurement == "probe"] == [0.0, 0.0]


def test_an_unknown_optimizer_is_refused_once(caplog: Any) -> None:
    model = network()
    watching = monitor_of(model, optimizer=torch.optim.Adagrad(model.parameters()))
    with caplog.at_level(logging.WARNING, logger="curvature_callbacks"):
        for step in range(3):
            watching.step(step)
    assert [record.step for record in watching.history if record.measurement == "edge"] == [0]
    (said,) = reports(caplog)
    assert "Adagrad is not known" in said


def test_gradient_ascent_is_refused() -> None:
    model = network()
    with pytest.raises(RefusedError, match="maximises"):
        measured(model, SGD(model.parameters(), lr=0.1, maximize=True))


def test_without_an_optimizer_the_run_stops_before_its_first_step() -> None:
    with pytest.raises(ConfigurationError, match="pass `optimizer=` to CurvatureMonitor"):
        monitor_of(network()).check()


def test_with_an_optimizer_of_another_model_too() -> None:
    with pytest.raises(ConfigurationError, match="none of the parameters"):
        monitor_of(network(), optimizer=SGD(network().parameters(), lr=0.1)).check()
    with pytest.raises(ConfigurationError, match="`optimizer` must be"):
        monitor_of(network(), optimizer=[3]).check()


@pytest.mark.parametrize("wrong", [{"tol": 0.0}, {"tol": float("nan")}, {"max_matvecs": 0}])
def test_bad_options_are_refused_at_once(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        EdgeRatio(**wrong)


def test_tags() -> None:
    model = network()
    record, _ = measured(model, SGD(model.parameters(), lr=0.3))
    first_page = {"curvature/edge_ratio", "curvature/edge_limit", "curvature/edge_learning_rate"}
    assert set(headline([record])) == first_page
    others = {"curvature_edge/lambda_max", "curvature_edge/residual", "curvature_edge/converged"}
    assert set(scalar_tags([record])) == first_page | others
    documentation = EdgeRatio.__doc__ or ""
    assert all(tag in documentation for tag in first_page | others)
    assert isinstance(TIGHT, Measurement)
    assert record.to_json() == Record.from_json(record.to_json()).to_json()


def test_the_learning_rate_is_that_of_the_coming_step() -> None:
    """Each record's rate is the one by which the parameters then move."""
    model = network()
    optimizer = SGD(model.parameters(), lr=0.4)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    watching = monitor_of(model, optimizer=optimizer)
    moved = []
    for step in range(3):
        watching.step(step)
        before = model[0].weight.detach().clone()
        train(model, optimizer, 1)
        moved.append(((before - model[0].weight) / model[0].weight.grad).median().item())
        scheduler.step()
    found = [record.scalars["learning_rate"] for record in watching.history if record.measurement == "edge"]
    assert found == pytest.approx([0.4, 0.2, 0.1])
    assert found == pytest.approx(moved)


OPTIMIZERS: Sequence[Any] = (
    lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    lambda p: AdamW(p, lr=0.01, fused=True),
    lambda p: Adam(p, lr=0.01, amsgrad=True, foreach=True),
    lambda p: RMSprop(p, lr=0.01, centered=True, momentum=0.5),
)


@pytest.mark.parametrize("build", OPTIMIZERS)
def test_training_and_the_optimizer_are_as_without(build: Any) -> None:
    def run(*, watched: bool) -> Any:
        model = network()
        optimizer = build(model.parameters())
        watching = monitor_of(model, optimizer=optimizer, measure=[EdgeRatio()]) if watched else None
        for step in range(4):
            if watching:
                before = copy.deepcopy(optimizer.state_dict())
                watching.step(step)
                assert_equal(before, optimizer.state_dict())
            train(model, optimizer, 1)
        if watching:
            assert not [record for record in watching.history if record.failed]
            assert "ratio" in watching.history[-1].scalars
        return model.state_dict(), optimizer.state_dict(), torch.get_rng_state()

    assert_equal(run(watched=False), run(watched=True))


def test_a_model_in_bfloat16_is_measured_in_float32() -> None:
    model = network().bfloat16()
    optimizer = Adam(model.parameters(), lr=0.01)
    optimizer.zero_grad()
    F.cross_entropy(model(seven_rows()[0].bfloat16()), seven_rows()[1]).backward()
    optimizer.step()
    record, _ = measured(model, optimizer, EdgeRatio())
    assert record.metadata["dtype"] == "float32"
    assert record.scalars["converged"] == 1.0
