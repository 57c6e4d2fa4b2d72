"""Rules of the normalisation layers: a scale of the normalised input and a shift."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from curvature_callbacks.errors import RefusedError
from curvature_callbacks.gram.uses.elementwise import SCALE, SHIFT, Elementwise
from curvature_callbacks.gram.uses.sample_axis import LayoutOf
from curvature_callbacks.gram.uses.uses import RuleTaps
from curvature_callbacks.library_internals.tensors import layer_norm_statistics


def _layer_norm_rule(
    layout_of: LayoutOf,
    output: Tensor,
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> RuleTaps:
    statistics = layer_norm_statistics(output)  # normalising by them takes a third of the time of normalising anew (CPU)
    if statistics is None:
        normalised = partial(F.layer_norm, input, normalized_shape, None, None, eps)
    else:
        normalised = partial(_normalised, input.detach(), *statistics)
    return _affine(layout_of, output, weight, bias, normalised, None)


def _normalised(input: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    return (input - mean).mul_(scale)


def _rms_norm_rule(
    layout_of: LayoutOf,
    output: Tensor,
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> RuleTaps:
    return _affine(layout_of, output, weight, None, partial(F.rms_norm, input, normalized_shape, None, eps), None)


def _group_norm_rule(
    layout_of: LayoutOf,
    output: Tensor,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> RuleTaps:
    normalised = partial(F.group_norm, input, num_groups, None, None, eps)
    return _affine(layout_of, output, weight, bias, normalised, input.ndim - 2)


def _batch_norm_rule(
    layout_of: LayoutOf,
    output: Tensor,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> RuleTaps:
    """With running statistics only: those of the batch couple its samples."""
    if training or running_mean is None or running_var is None:
        raise RefusedError(
            "a BatchNorm layer uses the statistics of the batch, which couples its samples: they have no gradients of their "
            "own. Let it track running statistics (the probe uses these) or use another normalisation."
        )
    normalised = partial(F.batch_norm, input, running_mean, running_var, None, None, False, momentum, eps)
    return _affine(layout_of, output, weight, bias, normalised, input.ndim - 2)


def _instance_norm_rule(
    layout_of: LayoutOf,
    output: Tensor,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> RuleTaps:
    normalised = partial(F.instance_norm, input, running_mean, running_var, None, None, use_input_stats, 0.0, eps)
    return _affine(layout_of, output, weight, bias, normalised, input.ndim - 2)


def _affine(
    layout_of: LayoutOf,
    output: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalised: Callable[[], Tensor],
    after_channel: int | None,
) -> RuleTaps:
    """Scale and shift; of the channel axis with so many axes after it, or of the last axes."""
    layout = layout_of(output)
    if layout is None:
        return []

    def aligned(parameter: Tensor) -> tuple[int, ...]:
        return tuple(parameter.shape) if after_channel is None else (len(parameter), *(1,) * after_channel)

    taps: RuleTaps = []
    if weight is not None:
        taps.append((weight, Elementwise(SCALE, layout, weight.shape, normalised, fresh=True, aligned=aligned(weight))))
    if bias is not None:
        taps.append((bias, Elementwise(SHIFT, layout, bias.shape, aligned=aligned(bias))))
    return taps


NORM_RULES: Final[Mapping[Any, Callable[..., RuleTaps]]] = MappingProxyType(
    {
        F.layer_norm: _layer_norm_rule,
        torch.layer_norm: _layer_norm_rule,
        F.rms_norm: _rms_norm_rule,
        torch.rms_norm: _rms_norm_rule,
        F.group_norm: _group_norm_rule,
        torch.group_norm: _group_norm_rule,
        F.batch_norm: _batch_norm_rule,
        F.instance_norm: _instance_norm_rule,
    }
)
