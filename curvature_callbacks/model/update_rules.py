"""Update rules: how the optimizers of PyTorch move a parameter, from their groups and states."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from curvature_callbacks.errors import RefusedError


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Dynamics:
    """How a parameter group moves: `m' = mu m + gain (g + c theta)`, then `theta' = (1 - eta w) theta - eta P^-1 m'`.

    Nesterov's variant steps by `g + c theta + mu m'` instead of `m'`, always with gain 1 and w 0.

    Attributes:
        learning_rate: eta.
        momentum: mu; beta1 of Adam.
        gain: share of the gradient that enters m: 1, `1 - dampening`, `1 - beta1`.
        nesterov: whether it is that variant.
        coupled_decay: c, weight decay that is a part of the gradient.
        decoupled_decay: w, weight decay beside it (AdamW).
    """

    learning_rate: float
    momentum: float = 0.0
    gain: float = 1.0
    nesterov: bool = False
    coupled_decay: float = 0.0
    decoupled_decay: float = 0.0

    @property
    def limit(self) -> float:
        """The eigenvalue x of `P^-1 (H + c I)` above which iterates of a quadratic grow, P taken as constant.

        With `d = 1 - eta w` an eigendirection follows `z^2 - (d + mu - eta gain x) z + mu d = 0`: the product of the roots is
        below 1, so the first to leave the unit circle does so at z = -1, where `eta gain x = (1 + d) (1 + mu)`. Nesterov:
        `z^2 - (1 + mu) (1 - eta x) z + mu (1 - eta x) = 0`, which gives `eta x (1 + 2 mu) = 2 + 2 mu`.
        """
        if self.nesterov:
            return (2 + 2 * self.momentum) / (self.learning_rate * (1 + 2 * self.momentum))
        shrinking = 1 - self.learning_rate * self.decoupled_decay
        return (1 + shrinking) * (1 + self.momentum) / (self.learning_rate * self.gain)


@final
@dataclass(frozen=True, slots=True)
class UpdateRule:
    """What is known of one class of optimizers.

    Attributes:
        name: of the class.
        dynamics: of a parameter group.
        preconditioner: P of a parameter, in its shape and float32 or better, from group, state and parameter; None before its
            first step.
    """

    name: str
    dynamics: Callable[[Mapping[str, Any]], Dynamics]
    preconditioner: Callable[[Mapping[str, Any], Mapping[str, Any] | None, Tensor], Tensor | None]


def update_rule(optimizer: Optimizer) -> UpdateRule:
    """The rule of the class whose `step` the optimizer has: a subclass may add anything but another step.

    Raises:
        RefusedError: the update is not known.
    """
    for base in type(optimizer).__mro__:
        if base in _RULES and _same_step(type(optimizer), base):
            return _RULES[base]
    raise RefusedError(
        f"the update of {type(optimizer).__name__} is not known, and so neither is its stability limit; known are "
        f"{', '.join(rule.name for rule in _RULES.values())} of torch.optim."
    )


def _same_step(cls: Any, base: Any) -> bool:
    """Behind the wrappers that PyTorch's profiler hook and decorators put around it."""
    return inspect.unwrap(cls.step) is inspect.unwrap(base.step)


def _sgd(group: Mapping[str, Any]) -> Dynamics:
    momentum = float(group["momentum"])
    return Dynamics(
        learning_rate=float(group["lr"]),
        momentum=momentum,
        gain=1 - float(group["dampening"]) if momentum else 1.0,  # dampens what enters the momentum buffer, where there is one
        nesterov=bool(group["nesterov"]) and momentum > 0,
        coupled_decay=float(group["weight_decay"]),
    )


def _rmsprop(group: Mapping[str, Any]) -> Dynamics:
    return Dynamics(
        learning_rate=float(group["lr"]), momentum=float(group["momentum"]), coupled_decay=float(group["weight_decay"])
    )


def _adam(group: Mapping[str, Any]) -> Dynamics:
    return _adam_dynamics(group, decoupled=bool(group.get("decoupled_weight_decay", False)))


def _adamw(group: Mapping[str, Any]) -> Dynamics:
    return _adam_dynamics(group, decoupled=True)  # its groups say so from torch 2.7 on only


def _adam_dynamics(group: Mapping[str, Any], *, decoupled: bool) -> Dynamics:
    beta, decay = float(group["betas"][0]), float(group["weight_decay"])
    return Dynamics(
        learning_rate=float(group["lr"]),
        momentum=beta,
        gain=1 - beta,
        coupled_decay=0.0 if decoupled else decay,
        decoupled_decay=decay if decoupled else 0.0,
    )


def _no_preconditioner(group: Mapping[str, Any], state: Mapping[str, Any] | None, parameter: Tensor) -> Tensor:
    return torch.ones_like(parameter, requires_grad=False)


def _adam_preconditioner(group: Mapping[str, Any], state: Mapping[str, Any] | None, parameter: Tensor) -> Tensor | None:
    if not state:
        return None
    beta1, beta2 = map(float, group["betas"])
    steps = torch.as_tensor(state["step"]).to(parameter.device, torch.float64)
    squares = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"].detach()
    corrected = _widened(squares) / (1 - beta2**steps)
    preconditioner: Tensor = (corrected.sqrt() + group["eps"]) * (1 - beta1**steps)
    return preconditioner


def _rmsprop_preconditioner(group: Mapping[str, Any], state: Mapping[str, Any] | None, parameter: Tensor) -> Tensor | None:
    if not state:
        return None
    squares = _widened(state["square_avg"].detach())
    if group["centered"]:
        squares = squares - _widened(state["grad_avg"].detach()) ** 2
    preconditioner: Tensor = squares.sqrt() + group["eps"]
    return preconditioner


def _widened(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


_RULES: Final[Mapping[Any, UpdateRule]] = {
    SGD: UpdateRule("SGD", _sgd, _no_preconditioner),
    AdamW: UpdateRule("AdamW", _adamw, _adam_preconditioner),
    Adam: UpdateRule("Adam", _adam, _adam_preconditioner),
    RMSprop: UpdateRule("RMSprop", _rmsprop, _rmsprop_preconditioner),
}
