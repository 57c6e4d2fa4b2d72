"""Recorded passes: a loss may take derivatives of its own in any pass, also in one that is not differentiated."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_IS_VALUE_ONLY: ContextVar[bool] = ContextVar("is_value_only", default=False)


def is_recorded() -> bool:
    """Whether the present pass may be differentiated or watched: then the model is to be called once.

    The grad mode alone does not tell: it is on in passes for values too, for losses that differentiate within themselves.
    """
    return torch.is_grad_enabled() and not _IS_VALUE_ONLY.get()


@contextmanager
def value_only() -> Iterator[None]:
    """A pass for its values alone, in which gradients are on for what the loss itself differentiates (forces, penalties).

    Parameters that do not require gradients leave no graph behind, so this costs what `no_grad` does.
    """
    before = _IS_VALUE_ONLY.set(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        _IS_VALUE_ONLY.reset(before)
