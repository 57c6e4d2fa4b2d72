"""The loss of a LightningModule, from its own `training_step` where nothing else is given, leaving no trace."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import Parameter, signature
from typing import Any

from torch import Tensor, nn

from curvature_callbacks._optional import is_available
from curvature_callbacks.errors import ConfigurationError
from curvature_callbacks.isolation.generators import kept_generators
from curvature_callbacks.isolation.replicas import attributes_set_aside
from curvature_callbacks.isolation.snapshot import put_back
from curvature_callbacks.model.loss.loop import LoopLoss
from curvature_callbacks.model.loss.resolve import Loss, is_function

_ADVICE = (
    "Pass `loss_fn=lambda module, batch: ...` to the callback or give the module a method curvature_loss(batch): either "
    "returns the mean loss or one loss per row."
)


def loss_of_module(module: Any, loss_fn: Loss) -> Loss:
    """`loss_fn`, else the module's `curvature_loss(batch)`, else its `training_step`.

    Raises:
        ConfigurationError: `training_step` cannot be called for a probe: manual optimization, or no batch argument.
    """
    if is_function(loss_fn):
        given = loss_fn
        return lambda model, batch: _traceless(model, given, model, batch)
    if loss_fn is not None:
        return loss_fn
    if callable(getattr(module, "curvature_loss", None)):
        return _curvature_loss
    if not module.automatic_optimization:
        raise ConfigurationError(
            "the module optimizes manually, so calling its `training_step` for a probe would train it. " + _ADVICE
        )
    if _takes_an_iterator(module):
        raise ConfigurationError("the module has no `training_step(batch, ...)`: it takes the loader's iterator. " + _ADVICE)
    return _training_step_loss


def loop_loss_of_module(module: Any, loss_fn: Loss) -> LoopLoss | None:
    """`training_step`, where another loss is measured; None where it is measured itself, or cannot be called for a probe."""
    is_function_given = is_function(loss_fn) or (loss_fn is None and callable(getattr(module, "curvature_loss", None)))
    if not (is_function_given or loss_fn is not None) or not module.automatic_optimization or _takes_an_iterator(module):
        return None
    return LoopLoss(
        function=_training_step_loss,
        name="`training_step`",
        is_by_choice=is_function_given,
        advice="Leave `loss_fn` out to measure what `training_step` returns, or pass a function `(module, batch) -> scalar "
        "mean or (N,) losses` to measure another loss on purpose.",
    )


def _takes_an_iterator(module: Any) -> bool:
    return "dataloader_iter" in signature(module.training_step).parameters


def _curvature_loss(module: Any, batch: Any) -> Tensor:
    loss: Tensor = _traceless(module, module.curvature_loss, batch)
    return loss


def _training_step_loss(module: nn.Module, batch: Any) -> Tensor:
    step: Any = module.training_step
    output = _traceless(module, step, batch, *(0 for _ in range(_num_indices(step))))
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise ConfigurationError(
            f"`training_step` returned {type(output).__name__} without a loss, so the loss cannot be determined. Return it. "
            + _ADVICE
        )
    return loss.reshape(()) if loss.shape == (1,) else loss


def _traceless(module: nn.Module, function: Any, *args: Any) -> Any:
    with _module_without_trace(module):
        return function(*args)


def _num_indices(step: Any) -> int:
    """How many of `batch_idx` and `dataloader_idx` it wants beside the batch."""
    parameters = list(signature(step).parameters.values())
    if any(parameter.kind is Parameter.VAR_POSITIONAL for parameter in parameters):
        return 1
    required = [p for p in parameters if p.default is p.empty and p.kind is Parameter.POSITIONAL_OR_KEYWORD]
    return len(required) - 1


@contextmanager
def _module_without_trace(module: nn.Module) -> Iterator[None]:
    """A probe is no training batch: nothing is logged, metrics and collected outputs are as before.

    Its generators are those of the objective, which begins them for every call at the microbatch's own seed.
    """
    aside = attributes_set_aside(list(module.modules()), shared=kept_generators(module))
    with _muted(module), _trainer_unchanged(module), aside, _default_dtype(module):
        yield


def _default_dtype(module: Any) -> AbstractContextManager[Any]:
    """What Lightning sets around a step in double precision: tensors made there are float64 too."""
    trainer: Any = getattr(module, "_trainer", None)
    is_double = trainer is not None and trainer.precision == "64-true"
    return trainer.precision_plugin.forward_context() if is_double else nullcontext()


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
def _trainer_unchanged(module: Any) -> Iterator[None]:
    """Learning rates, schedulers, hyperparameters, the data module and the wish to stop: what a step writes elsewhere."""
    trainer: Any = getattr(module, "_trainer", None)
    if trainer is None:
        yield
        return
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    owners = [*(config.scheduler for config in trainer.lr_scheduler_configs), getattr(trainer, "datamodule", None)]
    held = [*groups, *(vars(owner) for owner in owners if owner is not None), getattr(module, "_hparams", {})]
    should_stop = trainer.should_stop
    with put_back(held):
        try:
            yield
        finally:
            trainer.should_stop = should_stop
