"""Private names about modules: what torch keeps in them, their hooks, and activation checkpointing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from typing_extensions import TypeIs

WRAPPERS: Final = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})  # children of `torch.compile` and of checkpointing
_CHECKPOINTS: Final = ("CheckpointFunction", "_checkpoint_without_reentrant_generator")


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The dict in which a module keeps its own parameters, itself."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The dict in which a module keeps its own buffers, itself."""
    return module._buffers


def forward_hooks_of(module: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    """The dicts in which a module keeps what runs before its forward pass and after it, themselves."""
    return module._forward_pre_hooks, module._forward_hooks


def has_global_forward_hooks() -> bool:
    """Whether a hook is registered that runs after the forward pass of every module."""
    return bool(torch.nn.modules.module._global_forward_hooks)


def registries_of(module: nn.Module) -> list[dict[str, Any]]:
    """The dicts in which torch keeps parameters, submodules and hooks of a module, themselves; not that of its buffers."""
    return [vars(module)[name] for name, value in vars(nn.Module()).items() if isinstance(value, dict) and name != "_buffers"]


def internal_attributes() -> frozenset[str]:
    """Names of what torch keeps in every module: parameters, hooks, the training flag."""
    return frozenset(vars(nn.Module()))


def is_convolution(module: object) -> bool:
    """Whether it is a convolution of torch, transposed or not, of any number of axes."""
    return isinstance(module, torch.nn.modules.conv._ConvNd)


def is_batch_norm(module: object) -> bool:
    """Whether it is a batch norm of torch, lazy or synchronised ones too, or derived from one."""
    return isinstance(module, torch.nn.modules.batchnorm._BatchNorm)


def is_criterion(loss: object) -> TypeIs[nn.Module]:
    """Whether it is one of torch's losses, such as `nn.CrossEntropyLoss`: all derive from one class."""
    return isinstance(loss, torch.nn.modules.loss._Loss)


@contextmanager
def plain_checkpoints() -> Iterator[None]:
    """Checkpointed functions as plain calls: recomputation happens outside what a probe sets up, and the reentrant kind knows
    no `autograd.grad`. By the two names that `torch.utils.checkpoint.checkpoint` looks up, so that imported copies follow."""
    module: Any = torch.utils.checkpoint
    saved = {name: getattr(module, name) for name in _CHECKPOINTS if hasattr(module, name)}
    try:
        if len(saved) == len(_CHECKPOINTS):
            module.CheckpointFunction = _PlainCall
            module._checkpoint_without_reentrant_generator = _nothing_around
        yield
    finally:
        for name, original in saved.items():
            setattr(module, name, original)


class _PlainCall:
    """In place of the reentrant checkpoint."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


def _nothing_around(*args: Any, **kwargs: Any) -> Iterator[None]:
    """In place of what the other kind does before and after the call."""
    yield
