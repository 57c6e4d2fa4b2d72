"""The loss of a LightningModule, from its own `training_step` where nothing else is given, leaving no trace."""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import Parameter, signature
from typing import Any, Final

from torch import Tensor, nn

from curvature_callbacks._optional import is_available
from curvature_callbacks.errors import ConfigurationError
from curvature_callbacks.model.isolation import seeded
from curvature_callbacks.model.losses import Loss
from curvature_callbacks.replicas import replica

_INTERNAL: Final = frozenset(nn.Module().__dict__)  # what torch keeps in a module: parameters, hooks, the training flag
_ADVICE = (
    "Pass `loss_fn=lambda module, batch: ...` to the callback or give the module a method curvature_loss(batch): either "
    "returns the mean loss or one loss per row."
)


def loss_of(module: Any, loss_fn: Loss) -> Loss:
    """`loss_fn`, else the module's `curvature_loss(batch)`, else its `training_step`.

    Raises:
        ConfigurationError: `training_step` cannot be called for a probe: manual optimization, or no batch argument.
    """
    if loss_fn is not None:
        return loss_fn
    if callable(getattr(module, "curvature_loss", None)):
        return _curvature_loss
    if not module.automatic_optimization:
        raise ConfigurationError(
            "the module optimizes manually, so calling its `training_step` for a probe would train it. " + _ADVICE
        )
    if "dataloader_iter" in signature(module.training_step).parameters:
        raise ConfigurationError("the module has no `training_step(batch, ...)`: it takes the loader's iterator. " + _ADVICE)
    return _training_step_loss


def _curvature_loss(module: Any, batch: Any) -> Tensor:
    loss: Tensor = module.curvature_loss(batch)
    return loss


def _training_step_loss(module: nn.Module, batch: Any) -> Tensor:
    step: Any = module.training_step
    with _without_trace(module):
        output = step(batch, *(0 for _ in range(_num_indices(step))))
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, Tensor):
        raise ConfigurationError(
            f"`training_step` returned {type(output).__name__} without a loss, so the loss cannot be determined. Return it. "
            + _ADVICE
        )
    return loss


def _num_indices(step: Any) -> int:
    """How many of `batch_idx` and `dataloader_idx` it wants beside the batch."""
    parameters = list(signature(step).parameters.values())
    if any(parameter.kind is Parameter.VAR_POSITIONAL for parameter in parameters):
        return 1
    required = [p for p in parameters if p.default is p.empty and p.kind is Parameter.POSITIONAL_OR_KEYWORD]
    return len(required) - 1


@contextmanager
def _without_trace(module: nn.Module) -> Iterator[None]:
    """A probe is no training batch: nothing is logged, metrics and collected outputs are as before.

    What it draws is the same in every call, so that a probe measures one function.
    """
    with _muted(module), _attributes_set_aside(module), seeded(module, seed=0):
        yield


@contextmanager
def _muted(module: Any) -> Iterator[None]:
    """`self.log` does nothing and `self.logger` is a dummy."""
    names = [name for name in ("log", "log_dict") if name not in module.__dict__]
    trainer: Any = getattr(module, "_trainer", None)
    loggers = trainer.loggers if trainer is not None else []
    try:
        for name in names:
            module.__dict__[name] = lambda *args, **kwargs: None
        if loggers:
            trainer.loggers = [_dummy_logger() for _ in loggers]
        yield
    finally:
        if loggers:
            trainer.loggers = loggers
        for name in names:
            del module.__dict__[name]


def _dummy_logger() -> Any:
    if is_available("lightning"):
        from lightning.pytorch.loggers.logger import DummyLogger
    else:
        from pytorch_lightning.loggers.logger import DummyLogger  # type: ignore[assignment]
    return DummyLogger()


@contextmanager
def _attributes_set_aside(module: nn.Module) -> Iterator[None]:
    """Every submodule works on replicas of its own attributes: collected outputs, running means, metrics, generators."""
    memo: dict[int, Any] = {}
    owners = [*module.modules(), *_modules_in_containers(module)]
    saved = [(owner, {name: value for name, value in owner.__dict__.items() if name not in _INTERNAL}) for owner in owners]
    try:
        for owner, attributes in saved:
            owner.__dict__.update({name: replica(value, memo) for name, value in attributes.items()})
        yield
    finally:
        for owner, attributes in saved:
            for name in [name for name in owner.__dict__ if name not in _INTERNAL and name not in attributes]:
                del owner.__dict__[name]
            owner.__dict__.update(attributes)


def _modules_in_containers(module: nn.Module) -> list[nn.Module]:
    """Metrics kept in a plain list or dict, which torch does not register."""
    held = [value for value in module.__dict__.values() if type(value) in (list, dict)]
    values = [item for value in held for item in (value.values() if isinstance(value, dict) else value)]
    return [child for value in values if isinstance(value, nn.Module) for child in value.modules()]
