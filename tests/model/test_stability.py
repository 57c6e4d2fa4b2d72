"""Stability limits against simulations with PyTorch's own optimizers, and what is read of their state."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from curvature_callbacks import ConfigurationError, RefusedError
from curvature_callbacks.model.stability import Optimizers, Stability, open_optimizers, read_stability

SIZES = {"first": 3, "second": 4}
FROZEN = 1 - 1e-12  # a decay rate at which second moments stay as they were set
STEPS = 500

Parameters = dict[str, Tensor]
Build = Callable[[list[Any]], Optimizers]


def parameters(seed: int = 0) -> Parameters:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(n, generator=generator).double().requires_grad_() for name, n in SIZES.items()}


def quadratic() -> Tensor:
    """(7, 7), eigenvalues from 0.3 to 1 in a random basis."""
    generator = torch.Generator().manual_seed(3)
    Q = torch.linalg.qr(torch.randn(7, 7, generator=generator).double()).Q
    return Q @ torch.diag(torch.linspace(0.3, 1.0, 7).double()) @ Q.T


def read(optimizer: Optimizers, named: Parameters) -> Stability:
    return read_stability(optimizer, named, dtype=torch.float64)


def split(x: Tensor) -> list[Tensor]:
    return list(x.split(list(SIZES.values())))


def with_frozen_state(optimizers: Optimizers, named: Parameters) -> None:
    """Long after the start, second moments somewhere between 0.1 and 1.1, and hardly changed by what comes."""
    generator = torch.Generator().manual_seed(4)
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in open_optimizers(optimizers):
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for state in optimizer.state.values():
            for key, low in (("exp_avg_sq", 0.1), ("max_exp_avg_sq", 1.2), ("square_avg", 0.1)):
                if key in state:
                    state[key].copy_(low + torch.rand(state[key].shape, generator=generator).double())
            if "grad_avg" in state:
                state["grad_avg"].fill_(0.2)
            if "momentum_buffer" in state:
                state["momentum_buffer"].zero_()
            if "exp_avg" in state:
                state["exp_avg"].zero_()
                state["step"] = torch.tensor(1e14, dtype=torch.float64)


def growth(optimizers: Optimizers, named: Parameters, H: Tensor) -> float:
    """How many times larger the iterate on `theta' H theta / 2` is after some hundred steps; at most about 1e6."""
    with torch.no_grad():
        for parameter in named.values():
            parameter.fill_(1e-9)  # so small that second moments stay frozen while it grows
    start = torch.cat(list(named.values())).norm().item()
    for _ in range(STEPS):
        gradient = H @ torch.cat([parameter.detach() for parameter in named.values()])
        for parameter, part in zip(named.values(), split(gradient), strict=True):
            parameter.grad = part.clone()
        for optimizer in open_optimizers(optimizers):
            optimizer.step()
        now = torch.cat([parameter.detach() for parameter in named.values()]).norm().item()
        if now > 1e6 * start:
            break
    return now / start


def groups(values: list[Any], *options: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"params": [value], **option} for value, option in zip(values, options, strict=True)]


SIMULATED: dict[str, Build] = {
    "gradient descent": lambda p: SGD(p, lr=0.3),
    "heavy ball": lambda p: SGD(p, lr=0.3, momentum=0.9),
    "dampened": lambda p: SGD(p, lr=0.3, momentum=0.8, dampening=0.5),
    "nesterov": lambda p: SGD(p, lr=0.3, momentum=0.9, nesterov=True),
    "nesterov, little momentum": lambda p: SGD(p, lr=0.3, momentum=0.2, nesterov=True),
    "decay": lambda p: SGD(p, lr=0.3, momentum=0.5, weight_decay=0.4),
    "nesterov with decay": lambda p: SGD(p, lr=0.3, momentum=0.5, weight_decay=0.4, nesterov=True),
    "adam": lambda p: Adam(p, lr=0.3, betas=(0.9, FROZEN)),
    "adam, another beta": lambda p: Adam(p, lr=0.3, betas=(0.6, FROZEN), eps=0.2),
    "amsgrad": lambda p: Adam(p, lr=0.3, betas=(0.9, FROZEN), amsgrad=True),
    "adam with decay": lambda p: Adam(p, lr=0.3, betas=(0.8, FROZEN), weight_decay=0.4),
    "adamw": lambda p: AdamW(p, lr=0.3, betas=(0.8, FROZEN), weight_decay=1.5),
    "rmsprop": lambda p: RMSprop(p, lr=0.3, alpha=FROZEN),
    "rmsprop with momentum": lambda p: RMSprop(p, lr=0.3, alpha=FROZEN, momentum=0.7, weight_decay=0.3),
    "centered rmsprop": lambda p: RMSprop(p, lr=0.3, alpha=FROZEN, centered=True, eps=0.1),
    "rates": lambda p: SGD(groups(p, {"lr": 0.1}, {"lr": 0.5}), momentum=0.9),
    "nesterov rates": lambda p: SGD(groups(p, {"lr": 0.1}, {"lr": 0.5}), momentum=0.9, nesterov=True),
    "momenta": lambda p: SGD(groups(p, {"momentum": 0.0}, {"momentum": 0.9}), lr=0.3),
    "decays": lambda p: AdamW(groups(p, {"weight_decay": 0.0}, {"weight_decay": 3.0}), lr=0.3, betas=(0.9, FROZEN)),
    "coupled decays": lambda p: SGD(groups(p, {"weight_decay": 0.0}, {"weight_decay": 0.7}), lr=0.3),
    "betas": lambda p: Adam(groups(p, {"betas": (0.0, FROZEN)}, {"betas": (0.95, FROZEN), "lr": 0.1}), lr=0.3),
    "two optimizers": lambda p: [SGD(p[:1], lr=0.3, momentum=0.5), AdamW(p[1:], lr=0.2, betas=(0.9, FROZEN))],
}


@pytest.mark.parametrize("name", SIMULATED)
def test_iterates_grow_exactly_above_a_ratio_of_one(name: str) -> None:
    """The curvature is chosen by dense algebra so that the ratio is 0.99 and 1.01; PyTorch's steps decide."""
    named = parameters()
    optimizers = SIMULATED[name](list(named.values()))
    with_frozen_state(optimizers, named)
    found = read(optimizers, named)
    assert found.scale is not None
    C = torch.zeros(7).double() if found.decay is None else found.decay
    for ratio in (0.99, 1.01):
        H = curvature(found.scale, C, ratio)
        # T (H + C) has the same eigenvalues as the symmetric form, without a square root
        assert torch.linalg.eigvals(torch.diag(found.scale) @ (H + torch.diag(C))).real.max() == pytest.approx(ratio)
        copies = copy.deepcopy((named, optimizers))
        assert (growth(copies[1], copies[0], H) > 100) == (ratio > 1), ratio


def curvature(T: Tensor, C: Tensor, ratio: float) -> Tensor:
    """A multiple of the quadratic for which T (H + C) has the largest eigenvalue `ratio`, by bisection."""
    low, high = 0.0, 1e4
    for _ in range(80):
        middle = (low + high) / 2
        largest = torch.linalg.eigvals(torch.diag(T) @ (middle * quadratic() + torch.diag(C))).real.max()
        low, high = (middle, high) if largest < ratio else (low, middle)
    return low * quadratic()


LIMITS: list[tuple[Build, float]] = [
    (lambda p: SGD(p, lr=0.1), 20.0),
    (lambda p: SGD(p, lr=0.1, momentum=0.9), 38.0),
    (lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True), 38 / 2.8),
    (lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.9), 380.0),
    (lambda p: SGD(p, lr=0.1, dampening=0.9), 20.0),  # without momentum PyTorch dampens nothing
    (lambda p: Adam(p, lr=0.1), 380.0),
    (lambda p: AdamW(p, lr=0.1, weight_decay=0.01), (2 - 0.001) * 19 / 0.1),
    (lambda p: RMSprop(p, lr=0.1), 20.0),
    (lambda p: RMSprop(p, lr=0.1, momentum=0.9), 38.0),
    (lambda p: AdamW(groups(p, {"weight_decay": 0.0}, {"weight_decay": 0.01}), lr=1e-3), (2 - 1e-5) * 19 / 1e-3),
    (lambda p: SGD(p, lr=torch.tensor(0.1, dtype=torch.float64)), 20.0),
]


@pytest.mark.parametrize(("build", "limit"), LIMITS)
def test_limits_in_numbers(build: Build, limit: float) -> None:
    named = parameters()
    optimizer = build(list(named.values()))
    with_frozen_state(optimizer, named)
    assert read(optimizer, named).limit == pytest.approx(limit, rel=1e-12)


ADAPTIVE: dict[str, Callable[[list[Any]], Optimizer]] = {
    "adam": lambda p: Adam(p, lr=0.1),
    "foreach": lambda p: Adam(p, lr=0.1, foreach=True),
    "fused": lambda p: Adam(p, lr=0.1, fused=True),
    "amsgrad": lambda p: Adam(p, lr=0.1, amsgrad=True, betas=(0.8, 0.3)),
    "eps": lambda p: Adam(p, lr=0.1, eps=0.5),
    "adamw": lambda p: AdamW(p, lr=0.1, weight_decay=0.3),
    "fused adamw": lambda p: AdamW(p, lr=0.1, weight_decay=0.3, fused=True),
    "rate as a tensor": lambda p: AdamW(p, lr=torch.tensor(0.1, dtype=torch.float64), foreach=False),
    "rmsprop": lambda p: RMSprop(p, lr=0.1, eps=0.1),
    "rmsprop, momentum": lambda p: RMSprop(p, lr=0.1, momentum=0.9, foreach=True),
    "centered": lambda p: RMSprop(p, lr=0.1, centered=True),
}


@pytest.mark.parametrize("num_steps", [1, 4])
@pytest.mark.parametrize("name", ADAPTIVE)
def test_the_preconditioner_is_what_the_latest_step_divided_by(name: str, num_steps: int) -> None:
    """`theta' = (1 - eta w) theta - eta m' / P`, each step of a real run taken apart."""
    named = parameters()
    optimizer = ADAPTIVE[name](list(named.values()))
    generator = torch.Generator().manual_seed(1)
    for step in range(num_steps):
        before = torch.cat([parameter.detach().clone() for parameter in named.values()])
        for parameter in named.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator).double() / (step + 1)
        optimizer.step()
    after = torch.cat([parameter.detach() for parameter in named.values()])
    states = [optimizer.state[parameter] for parameter in named.values()]
    key = "exp_avg" if "exp_avg" in states[0] else "momentum_buffer"
    gradient = torch.cat([parameter.grad for parameter in named.values()])  # type: ignore[misc]
    w = 0.3 if "adamw" in name else 0.01 if isinstance(optimizer, AdamW) else 0.0
    found = read(optimizer, named)
    assert found.preconditioner is not None
    if key == "momentum_buffer":  # RMSprop divides what enters the momentum, not what leaves it
        gradient_over_P = gradient / found.preconditioner
        assert num_steps > 1 or torch.allclose((before - after) / 0.1, gradient_over_P)
        if "momentum" not in name:
            torch.testing.assert_close(after, before - 0.1 * gradient_over_P)
        return
    m = torch.cat([state[key] for state in states])
    torch.testing.assert_close(after, (1 - 0.1 * w) * before - 0.1 * m / found.preconditioner)
    assert found.names == tuple(SIZES)


def test_reading_leaves_no_trace() -> None:
    named = parameters()
    optimizer = Adam(list(named.values()))
    read(optimizer, named)
    assert len(optimizer.state) == 0
    with_frozen_state(optimizer, named)
    before = copy.deepcopy(optimizer.state_dict())
    found = read(optimizer, named)
    assert found.preconditioner is not None
    found.preconditioner.zero_()
    assert str(optimizer.state_dict()) == str(before)
    sgd = SGD(list(named.values()), lr=0.1)
    assert not read(sgd, named).preconditioner.requires_grad  # type: ignore[union-attr]


def test_before_the_first_step_an_adaptive_optimizer_has_no_preconditioner() -> None:
    named = parameters()
    found = read(Adam(list(named.values()), lr=0.1), named)
    assert (found.names, found.scale, found.limit) == ((), None, None)
    assert "no step yet" in (found.reason or "")
    assert found.learning_rates == (0.1,)
    assert found.optimizers == ("Adam",)


def test_at_a_learning_rate_of_zero_nothing_moves() -> None:
    named = parameters()
    found = read(SGD(list(named.values()), lr=0.0), named)
    assert found.scale is None
    assert "learning rate" in (found.reason or "")


def test_parameters_that_do_not_move_are_left_out() -> None:
    named = parameters()
    assert read(SGD([named["second"]], lr=0.1), named).names == ("second",)
    halted = SGD(groups(list(named.values()), {"lr": 0.0}, {"lr": 0.5}))
    assert read(halted, named).names == ("second",)
    assert read(halted, named).limit == 4.0
    assert read(halted, named).learning_rates == (0.0, 0.5)
    optimizer = AdamW(list(named.values()))
    named["first"].grad = torch.ones_like(named["first"])
    optimizer.step()
    assert read(optimizer, named).names == ("first",)


def test_names_are_in_the_order_of_the_model() -> None:
    named = parameters()
    found = read(SGD(groups(list(named.values())[::-1], {"lr": 0.1}, {"lr": 0.5})), named)
    assert found.names == ("first", "second")
    assert found.scale is not None
    torch.testing.assert_close(found.scale, torch.tensor([0.25] * 3 + [0.05] * 4, dtype=torch.float64))
    assert found.limit is None
    assert found.learning_rates == (0.1, 0.5)


def test_narrow_states_are_widened() -> None:
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = Adam([weight])
    weight.grad = torch.tensor([1e-4, 1.0, 30.0], dtype=torch.bfloat16)
    optimizer.step()
    found = read_stability(optimizer, {"weight": weight}, dtype=torch.float32)
    assert found.preconditioner is not None
    assert found.preconditioner.dtype == torch.float32
    torch.testing.assert_close(found.preconditioner, 0.1 * (weight.grad.float() + 1e-8), rtol=1e-2, atol=0)


class Tagged(Adam):
    """Nothing of its own in the update."""


class Signed(SGD):
    def step(self, closure: Any = None) -> Any:
        return None


def test_wrappers_are_opened() -> None:
    named = parameters()
    optimizer = SGD(list(named.values()), lr=0.1)
    for wrapped in (LightningOptimizer(optimizer), Accelerator(cpu=True).prepare(optimizer)):
        assert open_optimizers(wrapped) == [optimizer]
        assert read(wrapped, named).limit == 20.0


def test_a_subclass_counts_by_its_step() -> None:
    named = parameters()
    optimizer = Tagged(list(named.values()))
    with_frozen_state(optimizer, named)
    assert read(optimizer, named).optimizers == ("Adam",)
    with pytest.raises(RefusedError, match=r"Signed is not known.*SGD, AdamW, Adam, RMSprop"):
        read(Signed(list(named.values())), named)


def test_an_optimizer_with_a_scheduler_is_known() -> None:
    named = parameters()
    optimizer = SGD(list(named.values()), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    optimizer.step()
    scheduler.step()
    assert read(optimizer, named).limit == 40.0


REFUSED: dict[str, tuple[Build, str]] = {
    "unknown": (lambda p: torch.optim.Adagrad(p), "Adagrad is not known"),
    "ascent": (lambda p: SGD(p, lr=0.1, maximize=True), "maximises"),
    "all dampened": (lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=1.0), "dampening"),
    "nesterov momenta": (
        lambda p: SGD(groups(p, {"momentum": 0.5}, {}), lr=0.1, momentum=0.9, nesterov=True),
        "mix Nesterov momentum",
    ),
    "nesterov and none": (lambda p: [SGD(p[:1], lr=0.1), SGD(p[1:], momentum=0.9, nesterov=True)], "mix Nesterov momentum"),
    "twice": (lambda p: [SGD(p, lr=0.1), SGD(p[1:], lr=0.1)], "`second` is in two groups"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_known_limit_is_refused(name: str) -> None:
    build, message = REFUSED[name]
    named = parameters()
    with pytest.raises(RefusedError, match=message):
        read(build(list(named.values())), named)


def test_an_unknown_optimizer_of_other_parameters_does_not_matter() -> None:
    named = parameters()
    other = torch.optim.Adagrad([torch.nn.Parameter(torch.ones(2))])
    assert read([SGD(list(named.values()), lr=0.1), other], named).optimizers == ("SGD",)


def test_an_optimizer_of_another_model_is_a_mistake() -> None:
    named = parameters()
    with pytest.raises(ConfigurationError, match="none of the parameters"):
        read(SGD(list(parameters().values()), lr=0.1), named)
    with pytest.raises(ConfigurationError, match="none of the parameters"):
        read([], named)


@pytest.mark.parametrize("wrong", [3, [None], ["adam"]])
def test_anything_but_an_optimizer_is_a_mistake(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="`optimizer` must be"):
        read(wrong if isinstance(wrong, list) else [wrong], parameters())


def test_the_learning_rate_is_a_plain_number() -> None:
    named = parameters()
    optimizer: Optimizer = SGD(list(named.values()), lr=torch.tensor(0.1))
    assert type(read(optimizer, named).learning_rates[0]) is float


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_an_optimizer_at_rest_preconditions_nothing(rate: float) -> None:
    """Adam at a rate of zero or before its first step, beside SGD that moves; alone it is named all the same."""
    first, second = (torch.nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    resting = Adam([second], lr=rate)
    found = read_stability([SGD([first], lr=0.1), resting], {"first": first, "second": second}, dtype=torch.float64)
    assert (found.names, found.optimizers, found.preconditioned) == (("first",), ("SGD",), False)
    assert read_stability(resting, {"second": second}, dtype=torch.float64).optimizers == ("Adam",)
