"""Checks: what a model cannot be asked for, found out before anything is computed."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from torch import nn

from curvature_callbacks.errors import ConfigurationError, RefusedError
from curvature_callbacks.library_internals.frameworks import attention_implementation

_TWICE_DIFFERENTIABLE: Final = ("eager", "sdpa")
# How autograd says it: of its own operations, and of custom ones that are `once_differentiable`.
_SINGLE: Final = re.compile(r"derivative for (\S+) is not implemented|differentiate twice .*@once_differentiable")


def check_model(model: nn.Module) -> None:
    """Raise a `ConfigurationError` for a model whose forward pass changes its own weights."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
            raise ConfigurationError(
                f"`{path}` has `max_norm`, which rescales the weight in place at every forward pass: a probe would change "
                "training. Remove `max_norm`, or normalise in the training loop."
            )


def check_second_derivatives(model: nn.Module) -> None:
    """Raise a `RefusedError` for a model whose attention has no second derivative.

    Kernels outside PyTorch return first derivatives only, and autograd then treats them as constants without a word: the
    Hessian product of a model with one such activation was off by 71 %.
    """
    for path, module in model.named_modules():
        config: Any = getattr(module, "config", None)
        implementation = attention_implementation(config)
        if implementation is not None and implementation not in _TWICE_DIFFERENTIABLE:
            raise RefusedError(
                f"`{path or type(module).__name__}` uses attention implementation {implementation!r}, which has no second "
                f"derivative: load the model with `attn_implementation` {' or '.join(map(repr, _TWICE_DIFFERENTIABLE))}."
            )


@contextmanager
def refusing_single_derivatives() -> Iterator[None]:
    """A context in which an operation that has no second derivative, and says so, is refused for good.

    Raises:
        RefusedError: for the error that autograd raises then.
    """
    try:
        yield
    except RuntimeError as error:
        refusal = _SINGLE.search(str(error))
        if isinstance(error, RefusedError) or refusal is None:
            raise
        raise RefusedError(
            f"{refusal.group(1) or 'a custom operation'} has no second derivative. `operator`='finite_difference_hessian' "
            "needs first ones only."
        ) from error
