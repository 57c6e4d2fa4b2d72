"""Rules: which operation makes which use of its parameters.

A rule has the signature of its operation, so that Python binds positional and keyword arguments alike. It returns the uses it
can vouch for; a tracked parameter left out takes the exact per-sample fallback.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from curvature_callbacks.gram.uses import Elementwise, Lookup, OuterProduct, Use

Uses = list[tuple[Tensor, Use]]
Rule = Callable[..., Uses]


def holds_samples(tensor: Tensor, num_samples: int) -> bool:
    """Whether axis 0 can be the sample, or (sample, position) pairs with a sample's positions together."""
    return tensor.ndim > 0 and tensor.shape[0] > 0 and tensor.shape[0] % num_samples == 0


def _linear(N: int, output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Uses:
    if not holds_samples(input, N) or (input.ndim == 1 and N > 1):
        return []
    uses: Uses = [(weight, OuterProduct("linear", N, input, transposed=False))]
    return uses + _biases(N, bias)


def _addmm(N: int, output: Tensor, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Uses:
    """Hugging Face's Conv1D: `bias + x @ weight` with weight (d_in, d_out)."""
    if not holds_samples(mat1, N) or beta != 1 or alpha != 1 or input.ndim != 1:
        return []
    uses: Uses = [(mat2, OuterProduct("conv1d", N, mat1, transposed=True))]
    return uses + _biases(N, input)


def _biases(N: int, bias: Tensor | None, kind: str = "bias") -> Uses:
    return [] if bias is None else [(bias, Elementwise(kind, N, bias.shape))]


def _embedding(
    N: int,
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Uses:
    if not holds_samples(input, N) or scale_grad_by_freq:
        return []
    row = None if padding_idx is None else padding_idx % weight.shape[0]
    return [(weight, Lookup(N, input, row))]


def _layer_norm(
    N: int,
    output: Tensor,
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Uses:
    scale = _scales(N, input, weight, lambda: F.layer_norm(input, normalized_shape, None, None, eps))
    return scale + (_biases(N, bias, "shift") if scale or weight is None else [])


def _rms_norm(
    N: int,
    output: Tensor,
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Uses:
    return _scales(N, input, weight, lambda: F.rms_norm(input, normalized_shape, None, eps))


def _scales(N: int, input: Tensor, weight: Tensor | None, normalised: Callable[[], Tensor]) -> Uses:
    if weight is None or not _leaves_samples_apart(N, input, weight):
        return []
    return [(weight, Elementwise("scale", N, weight.shape, normalised))]


def _multiply(N: int, output: Tensor, input: Any, other: Any) -> Uses:
    """`weight * x` in either order: the scale of every Hugging Face RMSNorm, LayerScale."""
    return [
        (parameter, Elementwise("scale", N, parameter.shape, partial(torch.Tensor.detach, factor)))
        for parameter, factor in ((input, other), (other, input))
        if isinstance(parameter, Tensor) and isinstance(factor, Tensor) and _leaves_samples_apart(N, output, parameter)
    ]


def _add(N: int, output: Tensor, input: Any, other: Any, *, alpha: Any = 1) -> Uses:
    """`x + parameter` in either order: position embeddings, biases kept outside their layer."""
    if alpha != 1:
        return []
    return [
        (parameter, Elementwise("shift", N, parameter.shape))
        for parameter in (input, other)
        if isinstance(parameter, Tensor) and _leaves_samples_apart(N, output, parameter)
    ]


def _leaves_samples_apart(N: int, output: Tensor, parameter: Tensor) -> bool:
    """Whether `parameter` is broadcast along axis 0 of `output`, which holds the samples."""
    if not holds_samples(output, N):
        return False
    return parameter.ndim < output.ndim or (parameter.ndim == output.ndim and parameter.shape[0] == 1)


RULES: Final[dict[Any, Rule]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__), _multiply),
    **dict.fromkeys((torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__), _add),
}


def is_shifted_copy(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether the result is the first argument up to dtype and a constant: the same gradient (Gemma scales by `1 + weight`)."""
    if func in (Tensor.float, Tensor.double, Tensor.to):
        return True
    return RULES.get(func) is _add and len(args) == 2 and isinstance(args[1], int | float)


def kind_without_rule(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Name of an operation without a rule here; `conv2d` where K-FAC nevertheless has factors for its parameters."""
    name = str(getattr(func, "__name__", func)).strip("_")
    groups = kwargs.get("groups", args[6] if len(args) > 6 else 1)
    return f"grouped {name}" if name.startswith("conv") and groups != 1 else name
