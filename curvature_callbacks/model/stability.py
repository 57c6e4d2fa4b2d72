"""Stability: how much curvature the optimizer's next step stands, read from its live state."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from curvature_callbacks.errors import ConfigurationError, RefusedError
from curvature_callbacks.model.update_rules import Dynamics, update_rule
from curvature_callbacks.processes.fsdp import shard

Optimizers = Optimizer | Sequence[Optimizer]

# Limits so close count as one: decoupled decay of weights but not of biases moves them by 1e-6 to 1e-4.
_EQUAL_LIMITS: Final = 1e-3


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stability:
    """Where the next step is stable: `lambda_max(T^1/2 (H + C) T^1/2) < 1`, all of T and C diagonal.

    `T_i = 1 / (limit_i P_i)` and `C_i` the coupled weight decay of parameter i. For one group this is Cohen et al.'s criterion;
    for groups of different learning rates, decays, momenta and update rules it is exact too: with `S = eta gain P^-1`, d and
    mu as diagonal matrices a mode follows `z^2 - (d + mu - S^1/2 (H + C) S^1/2) z + d mu` between symmetric matrices, whose
    quadratic form in any direction is the equation of a single group. Nesterov's matrices are symmetric for one mu only.

    Attributes:
        learning_rates: of every group with a parameter that is measured, in the optimizer's order.
        optimizers: class names, such as `Adam`, of those that move something; of all when nothing moves.
        names: the parameters that move, in the model's order: in a group, at a learning rate that is not 0, and (where the
            optimizer keeps a state) stepped before. The vectors below are flat in this order.
        preconditioner: (P,) the diagonal P, 1 for SGD; None when nothing moves.
        scale: (P,) T; None when nothing moves.
        decay: (P,) C; None when nothing moves or no weight decay is part of a gradient.
        limit: of `lambda_max(P^-1/2 (H + C) P^-1/2)`, None where groups differ in it (by more than 1e-3).
        reason: why nothing moves, else None.
    """

    learning_rates: tuple[float, ...]
    optimizers: tuple[str, ...]
    names: tuple[str, ...] = ()
    preconditioner: Tensor | None = None
    scale: Tensor | None = None
    decay: Tensor | None = None
    limit: float | None = None
    reason: str | None = None

    @property
    def preconditioned(self) -> bool:
        """Whether P is anything but 1."""
        return any(name != SGD.__name__ for name in self.optimizers)


def read_stability(
    optimizers: Optimizers, parameters: Mapping[str, Tensor], *, dtype: torch.dtype, read: Callable[[Any], Any] = shard
) -> Stability:
    """What the optimizer will do to the named parameters with the learning rates it has now.

    P is that of the latest step, `theta' = theta - eta P^-1 m'`: of Adam `(1 - beta1^t) (sqrt(v / (1 - beta2^t)) + eps)` (v's
    running maximum with `amsgrad`), of RMSprop `sqrt(v) + eps` (`sqrt(v - g^2) + eps` when centered, g its mean gradient).
    Assumed and unchecked: several optimizers step together, gradients are not clipped, and P changes slowly.

    Args:
        optimizers: SGD, Adam, AdamW, RMSprop, or several; wrappers with an `optimizer` (accelerate's, Lightning's) are opened.
            Only read, and no entry of its state is created.
        parameters: name to the very tensors the optimizer was given.
        dtype: of the vectors.
        read: what to take of a tensor that is sharded over processes: this process's shard, or the gathered tensor.

    Raises:
        ConfigurationError: the optimizer has none of the parameters.
        RefusedError: an optimizer whose update is not known, gradient ascent, a parameter in two groups, or Nesterov momentum
            beside another momentum.

    Cost: memory 3 vectors (P,); no synchronisation with the device but for learning rates that are tensors.

    References: Cohen et al., Gradient descent on neural networks typically occurs at the edge of stability (2021), 2103.00065,
        appendix B; Cohen et al., Adaptive gradient methods at the edge of stability (2022), 2207.14484, section 2.
    """
    members = _members(open_optimizers(optimizers), parameters)
    dynamics = {name: member.dynamics for name, member in members.items()}
    moving = {name: members[name] for name in parameters if name in members and dynamics[name].learning_rate > 0}
    _refuse_what_has_no_limit(members.values(), moving.values())
    diagonals = {name: member.preconditioner(parameters[name], read) for name, member in moving.items()}
    stepped = {name: diagonal.to(dtype) for name, diagonal in diagonals.items() if diagonal is not None}
    acting = [moving[name] for name in stepped] or members.values()
    groups = {id(member.group): member for member in members.values()}  # each once
    learning_rates = tuple(member.dynamics.learning_rate for member in groups.values())
    acting_optimizers = tuple(dict.fromkeys(update_rule(member.optimizer).name for member in acting))
    if not stepped:
        return Stability(learning_rates=learning_rates, optimizers=acting_optimizers, reason=_why_nothing_moves(moving))
    limits = [dynamics[name].limit for name in stepped]
    return Stability(
        names=tuple(stepped),
        preconditioner=_concatenated(stepped.values()),
        scale=_concatenated(1 / (limit * diagonal) for limit, diagonal in zip(limits, stepped.values(), strict=True)),
        decay=_decay(stepped, dynamics),
        limit=min(limits) if max(limits) - min(limits) <= _EQUAL_LIMITS * min(limits) else None,
        learning_rates=learning_rates,
        optimizers=acting_optimizers,
    )


def open_optimizers(optimizers: Optimizers) -> list[Optimizer]:
    """The optimizers themselves, without the wrappers of frameworks."""
    return [_opened(optimizer) for optimizer in ([optimizers] if isinstance(optimizers, Optimizer) else optimizers)]


def _opened(optimizer: Any) -> Optimizer:
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise ConfigurationError(f"`optimizer` must be a torch.optim.Optimizer or a list of them, got {optimizer!r}.")
    return optimizer


@final
@dataclass(frozen=True, slots=True)
class _Membership:
    """The optimizer and the parameter group that a parameter belongs to."""

    optimizer: Optimizer
    group: Mapping[str, Any]

    @property
    def dynamics(self) -> Dynamics:
        return update_rule(self.optimizer).dynamics(self.group)

    def preconditioner(self, parameter: Tensor, read: Callable[[Any], Any]) -> Tensor | None:
        state = self.optimizer.state.get(parameter)  # `state[parameter]` would create an entry
        held = {name: read(value) for name, value in state.items()} if state else None
        return update_rule(self.optimizer).preconditioner(self.group, held, read(parameter))


def _members(optimizers: Sequence[Optimizer], parameters: Mapping[str, Tensor]) -> dict[str, _Membership]:
    """Name to the optimizer and the group its parameter is in, group after group."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    members: dict[str, _Membership] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for name in [names[id(parameter)] for parameter in group["params"] if id(parameter) in names]:
                if name in members:
                    raise RefusedError(f"parameter `{name}` is in two groups: it has no stability limit of its own.")
                members[name] = _Membership(optimizer, group)
    if not members:
        raise ConfigurationError(
            "`optimizer` has none of the parameters that are measured: pass the one that trains this very model (one with "
            "flattened or sharded copies of its parameters cannot be read)."
        )
    return members


def _refuse_what_has_no_limit(members: Iterable[_Membership], moving: Iterable[_Membership]) -> None:
    if any(member.group.get("maximize", False) for member in members):
        raise RefusedError("the optimizer maximises: gradient ascent on a loss has no edge of stability.")
    dynamics = {member.dynamics for member in moving}
    if any(each.gain <= 0 for each in dynamics):
        raise RefusedError("`dampening` of the optimizer is 1 or more: no gradient enters its momentum.")
    momenta = {(each.nesterov, each.momentum) for each in dynamics}
    if len(momenta) > 1 and any(nesterov for nesterov, _ in momenta):
        raise RefusedError(
            "parameter groups mix Nesterov momentum with another momentum, of which no stability limit is known: give all "
            "groups the same `momentum` and `nesterov`."
        )


def _why_nothing_moves(moving: Mapping[str, _Membership]) -> str:
    if moving:
        return "the optimizer has made no step yet: its preconditioner is not known."
    return "every learning rate is 0: nothing moves."


def _decay(stepped: Mapping[str, Tensor], dynamics: Mapping[str, Dynamics]) -> Tensor | None:
    if not any(dynamics[name].coupled_decay for name in stepped):
        return None
    return _concatenated(torch.full_like(diagonal, dynamics[name].coupled_decay) for name, diagonal in stepped.items())


def _concatenated(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])  # (P,)
