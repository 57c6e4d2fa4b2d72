"""The empirical Fisher, by one product with J and one with J' through graphs that are built once."""

from collections.abc import Iterable, Sequence
from typing import Any, final, get_args

import torch
from torch import Tensor

from curvature_callbacks.batches import batch_size, take_rows
from curvature_callbacks.errors import ConfigurationError, ProbeError, check_choice
from curvature_callbacks.model.objective import Objective, gradients
from curvature_callbacks.model.sample_losses import SampleLosses
from curvature_callbacks.model.surrogates import SampleUnit
from curvature_callbacks.operators.vectors import flatten, unflatten


@final
class EmpiricalFisherOperator:
    """`F = J' J / normaliser`, row s of J the gradient of the loss of sample s, restricted to the named parameters.

    `sequence`: a sample is a row, its loss summed over its valid targets, `F = (1/N) sum_i g_i g_i'`. `token`: a sample is a
    valid target, `F = (1/sum_i n_i) sum_it g_it g_it'`. Rows without a valid target, with a loss or with a gradient (in the
    named parameters) that is not finite are left out, of N too.

    `J'w` is built once as a graph that is linear in a dummy w and differentiated by w for `J v`; the losses' own graph gives
    `J'u`. It must not outlive its probe: fused optimizers change parameters without bumping their version, so a stale graph
    goes unnoticed. Assumed and unchecked here: every operation is twice differentiable (`check_adjoint` tests it).

    Args:
        objective: the loss of a microbatch.
        microbatches: what N spans.
        names: parameters to differentiate by, default all; only their part of the graph is built.
        sample_unit: `sequence` or `token`.

    Attributes:
        rows: (N,) int64, the rows used, counted over all microbatches; row s of J is row `rows[s]` for `sequence`.
        num_targets: sum of `n_i` over these.
        normaliser: N for `sequence`, `num_targets` for `token`.
        num_losses: S, the rows of J.

    Raises:
        ConfigurationError: losses of single rows (`token`: of single targets) are not known.
        ProbeError: no row can be used.

    Cost: 1 to 1.3 gradients to build, 1.4 to 1.6 a product on transformers (half of it for J v); memory about 2.5 times a
    gradient's, for all microbatches together. Where a row is not finite, one single-row gradient for each row on top.
    """

    is_psd = True

    def __init__(
        self,
        objective: Objective,
        microbatches: Sequence[Any],
        names: Iterable[str] | None = None,
        *,
        sample_unit: SampleUnit = "sequence",
    ) -> None:
        check_choice("sample_unit", sample_unit, get_args(SampleUnit))
        self.sample_unit = sample_unit
        self._objective = objective
        self._named_leaves = objective.leaves(names)
        self._leaves = list(self._named_leaves.values())
        self._shapes = [leaf.shape for leaf in self._leaves]
        size = sum(shape.numel() for shape in self._shapes)
        self.shape = (size, size)
        self.dtype = objective.dtype
        self.device = objective.device
        if not self._build(microbatches, _numbered(microbatches)) and not self._build(*self._finite_part(microbatches)):
            raise ProbeError("every row of this probe has a finite gradient, but not all of them together.")

    @property
    def num_losses(self) -> int:
        """S, the rows of J."""
        return len(self._losses)

    def matmat(self, V: Tensor) -> Tensor:
        """`F V` for `V` (P, K), column by column: several at once gain nothing on CPU and cost memory."""
        return torch.stack([self.vjp(self.jvp(column)) / self.normaliser for column in V.T], dim=1)

    def jvp(self, v: Tensor) -> Tensor:
        """`J v` (S,) for `v` (P,). Cost: 0.7 to 0.8 gradients."""
        parts = unflatten(v, self._shapes)
        used = [(line, part.contiguous()) for line, part in zip(self._lines, parts, strict=True) if line is not None]
        if not used:
            return torch.zeros_like(self._losses)
        lines, weights = zip(*used, strict=True)
        (product,) = torch.autograd.grad(
            lines, [self._dummy], weights, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return product

    def vjp(self, u: Tensor) -> Tensor:
        """`J' u = sum_s u_s g_s` (P,) for `u` (S,). Cost: one backward pass, 0.65 to 0.75 gradients."""
        if not self._losses.requires_grad:
            return torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
        found = torch.autograd.grad(
            self._losses, self._leaves, u.to(self._losses), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return flatten(found)

    def _build(self, microbatches: Sequence[Any], rows: Sequence[Tensor]) -> bool:
        """Losses and the graph of `J'w` of these rows; False, and nothing to rely on, when something in them is not finite."""
        found = [self._objective(batch, self._named_leaves) for batch in microbatches]
        valid = [losses.num_targets.cpu() > 0 for losses in found]
        if not any(part.any() for part in valid):
            raise ProbeError("no row of this probe has both a valid target and a finite gradient: there is no Fisher.")
        self.rows = torch.cat([numbers[part] for numbers, part in zip(rows, valid, strict=True)])
        self.num_targets = sum(int(losses.num_targets.sum()) for losses in found)
        self.normaliser = len(self.rows) if self.sample_unit == "sequence" else self.num_targets
        self._losses = torch.cat([self._of_rows(losses, part) for losses, part in zip(found, valid, strict=True)])
        self._dummy = torch.zeros_like(self._losses, requires_grad=True)
        self._lines = self._transposed_graph()
        parts = [self._losses, *(line for line in self._lines if line is not None)]
        return all(bool(part.detach().isfinite().all()) for part in parts)

    def _transposed_graph(self) -> list[Tensor | None]:
        """`J'w` at w = 0, leaf by leaf; None where the losses do not depend on the leaf."""
        if not self._losses.requires_grad:
            return [None] * len(self._leaves)
        found = torch.autograd.grad(self._losses, self._leaves, self._dummy, create_graph=True, allow_unused=True)
        return [line if line is not None and line.requires_grad else None for line in found]

    def _of_rows(self, losses: SampleLosses, valid: Tensor) -> Tensor:
        """(S,) losses of the samples in the valid rows."""
        if losses.per_sample is None:
            raise ConfigurationError(
                "the empirical Fisher needs the loss of every row, and this one is only known as the mean of a batch: return "
                "one loss per row."
            )
        if self.sample_unit == "sequence":
            return losses.per_sample[valid.to(losses.per_sample.device)]
        if losses.per_target is None:
            raise ConfigurationError(
                "`sample_unit`='token' needs the losses of single targets, and a loss function gives those of rows: use "
                "'sequence', the model's own loss or a named one."
            )
        return losses.per_target[valid.to(losses.per_target.device)].flatten()

    def _finite_part(self, microbatches: Sequence[Any]) -> tuple[list[Any], list[Tensor]]:
        """The rows with a finite gradient, in their microbatches, and their numbers."""
        kept, numbers = [], []
        for batch, own in zip(microbatches, _numbered(microbatches), strict=True):
            finite = [row for row in torch.arange(len(own)) if self._is_finite(take_rows(batch, row[None]))]
            if finite:
                kept.append(take_rows(batch, torch.stack(finite)))
                numbers.append(own[torch.stack(finite)])
        return kept, numbers

    def _is_finite(self, row: Any) -> bool:
        """Whether the loss and the gradient of a single row are finite. Cost: that gradient."""
        loss = self._objective(row, self._named_leaves).total
        found = gradients(loss, self._named_leaves).values()
        return all(bool(part.detach().isfinite().all()) for part in (loss, *found))


def _numbered(microbatches: Sequence[Any]) -> list[Tensor]:
    """Row numbers of each microbatch, counted over all."""
    sizes = [batch_size(batch) for batch in microbatches]
    return list(torch.split(torch.arange(sum(sizes)), sizes))
