"""Objective: the loss as a function of the trainable parameters, on aliases that leave the model untouched."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from curvature_callbacks.batches import to_dtype
from curvature_callbacks.distributed import whole
from curvature_callbacks.errors import ConfigurationError, ProbeError
from curvature_callbacks.model.losses import LossFunction, SampleLosses

ParamsFilter = Callable[[str, nn.Parameter], bool]

_PREFIX = "model."


@final
class Objective:
    """`sum_i l_i` of a microbatch at given parameter values.

    Parameters are passed as aliased leaves through `functional_call`: no copy, no `.grad`, no parameter hook, tied weights
    follow. Models in bfloat16 or float16 are measured in float32: their values, buffers and inputs are widened (a copy of
    four bytes per parameter and buffer element), because a second derivative has no digits left in bf16.

    Attributes:
        parameters: name to detached value in `dtype`, the trainable parameters in the model's order; tied ones once.
        dtype: dtype everything is differentiated in.
        device: device of the first parameter.
        is_widened: whether any parameter of the model, trainable or not, is stored in bfloat16 or float16.
    """

    def __init__(self, model: nn.Module, loss: LossFunction, *, params_filter: ParamsFilter | None = None) -> None:
        named = dict(model.named_parameters())
        chosen = {
            name: parameter
            for name, parameter in named.items()
            if parameter.requires_grad and (params_filter is None or params_filter(name, parameter))
        }
        if not chosen:
            raise ConfigurationError(
                "the model has no trainable parameter"
                + (" left by `params_filter`" if params_filter else "")
                + ": nothing to measure. Set `requires_grad` where training does."
            )
        self.dtype = _compute_dtype(chosen.values())
        self.device = next(iter(chosen.values())).device
        self.is_widened = any(_is_narrow(parameter.dtype) for parameter in named.values())
        self.parameters = self._widened(chosen)
        self._constants = self._widened({name: value for name, value in named.items() if name not in chosen})
        self._constants |= {name: self._widen(buffer) for name, buffer in model.named_buffers() if _is_narrow(buffer.dtype)}
        self._module = _LossModule(model, loss)

    def leaves(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Aliases of the named parameters (default all) that require gradients."""
        wanted = self.parameters if names is None else names
        return {name: self.parameters[name].detach().requires_grad_() for name in wanted}

    def constants(self) -> list[Tensor]:
        """Tensors the loss reads beside parameters and batch: frozen parameters and buffers."""
        return [*self._constants.values(), *self._module.buffers()]

    def __call__(self, batch: Any, values: Mapping[str, Tensor] | None = None) -> SampleLosses:
        """Losses of `batch` with `values` in place of the parameters of the same name."""
        merged = {**self._constants, **self.parameters, **(values or {})}
        named = {_PREFIX + name: tensor for name, tensor in merged.items()}
        result: SampleLosses = functional_call(self._module, named, (to_dtype(batch, self.dtype),))
        return result

    def mean(self, microbatches: Sequence[Any], values: Mapping[str, Tensor]) -> Tensor:
        """The objective `L = sum_i l_i / sum_i n_i` over all microbatches, 0-d.

        Raises:
            ProbeError: no sample has a valid target, or L is not finite.
        """
        losses = [self(batch, values) for batch in microbatches]
        num_targets = sum(int(loss.num_targets.sum()) for loss in losses)
        if num_targets == 0:
            raise ProbeError("no sample of this probe has a valid target: the loss is undefined.")
        mean = torch.stack([loss.total for loss in losses]).sum() / num_targets
        if not mean.isfinite():
            raise ProbeError(f"the loss of this probe is {mean.item()}.")
        return mean

    def _widen(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if _is_narrow(tensor.dtype) else tensor

    def _widened(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._widen(whole(tensor)) for name, tensor in tensors.items()}


def gradients(loss: Tensor, leaves: Mapping[str, Tensor], *, again: bool = False) -> dict[str, Tensor]:
    """Name to the gradient of `loss`; zero where it does not depend on the leaf. Cost: one backward pass.

    Args:
        loss: 0-d.
        leaves: what to differentiate by.
        again: whether its graph will be asked once more.
    """
    if not loss.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True, retain_graph=again)
    return dict(zip(leaves, found, strict=True))


class _LossModule(nn.Module):
    """Model and loss as one module, so that `functional_call` swaps the parameters for both."""

    def __init__(self, model: nn.Module, loss: LossFunction) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, batch: Any) -> SampleLosses:
        return self._loss(self.model, batch)


def _is_narrow(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16)


def _compute_dtype(parameters: Iterable[Tensor]) -> torch.dtype:
    dtype = torch.float32
    for parameter in parameters:
        dtype = torch.promote_types(dtype, parameter.dtype)
    return dtype
