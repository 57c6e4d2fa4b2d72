"""The loss of a LightningModule, from its own `training_step` where nothing else is given, leaving no trace."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from inspect import Parameter, signature
from typing import Any

from torch import Tensor, nn

from curvature_callbacks._optional import is_available
from curvature_callbacks.errors import ConfigurationError
from curvature_callbacks.model.losses import LossCallable

_ADVICE = (
    "Pass `loss_fn=lambda module, batch: ...` to the callback or give the module a method curvature_loss(batch): either "
    "returns the mean loss or one loss per row."
)


def loss_of(module: Any, loss_fn: LossCallable | None) -> LossCallable:
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
    """A probe is no training batch: nothing is logged, metrics and collected outputs are put back."""
    with ExitStack() as stack:
        stack.enter_context(_muted(module))
        stack.enter_context(_attributes(module))
        for metric in _metrics(module):
            stack.enter_context(_metric_state(metric))
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
def _attributes(module: nn.Module) -> Iterator[None]:
    """The module's own attributes, and what its lists, dicts and sets hold (outputs collected for the epoch's end)."""
    internal = nn.Module().__dict__.keys()
    saved = {name: value for name, value in module.__dict__.items() if name not in internal}
    contents = [(value, value.copy()) for value in saved.values() if type(value) in (list, dict, set)]
    try:
        yield
    finally:
        for name in [name for name in module.__dict__ if name not in internal and name not in saved]:
            del module.__dict__[name]
        module.__dict__.update(saved)
        for container, content in contents:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)


@contextmanager
def _metric_state(metric: Any) -> Iterator[None]:
    attributes, states = dict(metric.__dict__), metric._copy_state_dict()
    try:
        yield
    finally:
        metric.__dict__.update({**attributes, **states})


def _metrics(module: nn.Module) -> list[Any]:
    """torchmetrics among the submodules and in the module's own containers."""
    if not is_available("torchmetrics"):
        return []
    from torchmetrics import Metric

    held = [value for value in module.__dict__.values() if type(value) in (list, dict)]
    values = [item for value in held for item in (value.values() if isinstance(value, dict) else value)]
    roots = [value for value in (*values, *module.__dict__.values()) if isinstance(value, nn.Module)]
    return [child for root in (module, *roots) for child in root.modules() if isinstance(child, Metric)]
