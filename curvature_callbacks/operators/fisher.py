"""The empirical and the sampled Fisher, by one product with J and one with J' through graphs that are built once."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, final, get_args

import torch
from torch import Tensor
from typing_extensions import override

from curvature_callbacks.errors import ConfigurationError, ProbeError, check_choice
from curvature_callbacks.linalg.eigenpairs import Eigenpairs
from curvature_callbacks.linalg.gram_eigenpairs import eigenpairs_of_gram
from curvature_callbacks.linalg.lanczos.options import LanczosOptions
from curvature_callbacks.linalg.lanczos.solver import solve
from curvature_callbacks.linalg.operator import JacobianOperator
from curvature_callbacks.microbatch import Microbatch, as_microbatch
from curvature_callbacks.model.checks import refusing_single_derivatives
from curvature_callbacks.model.gradients import gradients
from curvature_callbacks.model.loss.fisher_type import FisherType, SampleUnit
from curvature_callbacks.model.loss.sample_losses import SampleLosses
from curvature_callbacks.model.loss.surrogates import Surrogate, surrogates
from curvature_callbacks.model.objective import Objective
from curvature_callbacks.operators.capabilities import SelfCheck
from curvature_callbacks.operators.graphs import MicrobatchOperator
from curvature_callbacks.operators.jacobian import DirectLossJacobian, LossJacobian, SlopedLossJacobian
from curvature_callbacks.operators.self_checks import ADJOINT_PRODUCTS, check_adjoint
from curvature_callbacks.operators.vectors import unflatten


class FisherOperator(MicrobatchOperator[LossJacobian]):
    """`F = J' J / normaliser`, J (S, P) the gradients of the losses of S pseudo-samples in the named parameters.

    `sequence`: a sample is a row, its loss summed over its valid targets, `F = (1/N) sum_i g_i g_i'`. `token`: a sample is a
    valid target, `F = (1/sum_i n_i) sum_it g_it g_it'`. Rows without a valid target, with a loss or with a gradient (in the
    named parameters) that is not finite are left out, of N too.

    Where the loss is a cross-entropy, its slope in the logits is kept and J is that slope times the logits' Jacobian: no
    derivative of a softmax is left in a product. Assumed and unchecked here: every operation is twice differentiable
    (`check_adjoint` tests it).

    Attributes:
        sample_unit: `sequence` or `token`.
        num_draws: label draws per sample; 1 where labels are given.
        rows: (N,) int64, the rows used, counted over all microbatches.
        num_samples: N, with sharded parameters over all processes.
        num_targets: sum of `n_i` over these.
        normaliser: `num_draws` times N for `sequence`, times `num_targets` for `token`.
        num_outputs: S, the single losses of all microbatches, one for every draw: the length of `J v`.
        gram: (N, N) `J J'` where it is known and gives the eigenpairs; else None, and Lanczos finds them.

    Cost: 1.2 to 1.6 gradients to build, 1.1 to 1.3 a product (half of it for J v), 2.2 with convolutions; as much as to build
    once more for microbatches whose graph is not kept. Memory: about a gradient's for every kept one, of it a buffer as large
    as the logits for every draw. Where a row is not finite, one single-row gradient for each row on top.
    """

    is_psd = True
    gram: Tensor | None = None

    def __init__(
        self,
        objective: Objective,
        microbatches: Sequence[Any],
        names: Iterable[str] | None,
        *,
        sample_unit: SampleUnit,
        num_draws: int,
    ) -> None:
        check_choice("sample_unit", sample_unit, get_args(SampleUnit))
        microbatches = [as_microbatch(batch) for batch in microbatches]
        super().__init__(objective, microbatches, names)
        self.sample_unit = sample_unit
        self.num_draws = num_draws
        if objective.summed(int(not self._built(microbatches, _row_numbers(microbatches)))) == 0:
            return
        if objective.is_sharded:
            raise ProbeError("a row of this probe has no finite gradient, and rows cannot be taken one by one over processes.")
        del self._graphs  # before the gradients of single rows, and the graphs of those that are left
        if not self._built(*self._finite_part(microbatches)):
            raise ProbeError("every row of this probe has a finite gradient, but not all of them together.")

    @property
    def num_outputs(self) -> int:
        """S, the single losses of all microbatches, one for every draw: the length of `J v`."""
        return sum(self._counts)

    def jvp(self, v: Tensor) -> Tensor:
        """`J v` (S,) for `v` (P,), microbatch after microbatch, in each draw after draw. Cost: half a product."""
        parts, pieces = unflatten(v.contiguous(), self._shapes), [v.new_zeros(0)]  # of several processes one may have no row
        self._graphs.each(self._saving_graph, lambda graph: pieces.append(graph.jvp(parts)))
        return torch.cat(pieces)

    def vjp(self, u: Tensor) -> Tensor:
        """`J' u = sum_s u_s g_s` (P,) for `u` (S,). Cost: one backward pass, half a product."""
        pieces = iter(torch.split(u, self._counts))
        return self._sum(1, lambda graph: [graph.vjp(next(pieces))], 1.0)[0]

    def eigenpairs(self, options: LanczosOptions, *, initial_vectors: Tensor | None = None) -> Eigenpairs:
        """The outer pairs: from the Gram where it is known, with true residuals, else by Lanczos."""
        return fisher_eigenpairs(self, self.gram, options, initial_vectors)

    @override
    def self_check(self, seed: int) -> SelfCheck:
        with refusing_single_derivatives():
            return SelfCheck(check_adjoint(self, seed=seed), ADJOINT_PRODUCTS)

    @abstractmethod
    def _loss_jacobian(self, losses: SampleLosses, index: int) -> LossJacobian:
        """The Jacobian of the single losses of one microbatch."""

    @override
    def _graph(self, index: int) -> LossJacobian:
        return self._loss_jacobian(self._losses(index, curved=False), index)

    def _built(self, microbatches: Sequence[Microbatch], rows: Sequence[Tensor]) -> bool:
        """Graphs of these rows; False, and nothing to rely on, when something in them is not finite."""
        self._microbatches = microbatches
        noted: list[tuple[Tensor, int, int, bool]] = []

        def note(graph: LossJacobian) -> None:
            noted.append((graph.valid, graph.num_targets, graph.num_losses, graph.is_finite))

        self._keep(note)
        if not self._objective.is_part and not any(valid.any() for valid, *_ in noted):
            raise ProbeError("no row of this probe has both a valid target and a finite gradient: there is no Fisher.")
        used = [numbers[valid] for numbers, (valid, *_) in zip(rows, noted, strict=True)]
        self.rows = torch.cat([torch.empty(0, dtype=torch.int64), *used])
        self.num_samples = self._objective.summed(len(self.rows))
        self.num_targets = self._objective.summed(sum(targets for _, targets, *_ in noted))
        self._counts = [count for *_, count, _ in noted]
        self.normaliser = self.num_draws * (self.num_samples if self.sample_unit == "sequence" else self.num_targets)
        self._scale = 1 / max(self.normaliser, 1)
        return all(is_finite for *_, is_finite in noted)

    def _finite_part(self, microbatches: Sequence[Microbatch]) -> tuple[list[Microbatch], list[Tensor]]:
        """The rows with a finite gradient, in their microbatches, and their numbers."""
        kept, numbers = [], []
        for batch, of_batch in zip(microbatches, _row_numbers(microbatches), strict=True):
            finite = torch.tensor([self._is_finite(row) for row in batch.singles()]).nonzero()[:, 0]
            if len(finite):
                kept.append(batch.take(finite))
                numbers.append(of_batch[finite])
        return kept, numbers

    def _is_finite(self, row: Microbatch) -> bool:
        """Whether the loss and the gradient of a single row are finite. Cost: that gradient."""
        loss = self._objective(row, self._named_leaves).total
        parts = gradients(loss, self._named_leaves).values()
        return all(bool(part.detach().isfinite().all()) for part in (loss, *parts))


@final
class EmpiricalFisherOperator(FisherOperator):
    """The Fisher of the given labels; see `FisherOperator` for what it is, its attributes and its cost.

    Args:
        objective: the loss of a microbatch.
        microbatches: what N spans.
        names: parameters to differentiate by, default all; only their part of the graph is built.
        sample_unit: `sequence` or `token`.
        gram: `J J'` over all rows of the microbatches, used or not.

    Raises:
        ConfigurationError: losses of single rows (`token`: of single targets) are not known.
        ProbeError: no row can be used; a used one has an entry in the Gram that is not finite.
    """

    def __init__(
        self,
        objective: Objective,
        microbatches: Sequence[Any],
        names: Iterable[str] | None = None,
        *,
        sample_unit: SampleUnit = "sequence",
        gram: Tensor | None = None,
    ) -> None:
        super().__init__(objective, microbatches, names, sample_unit=sample_unit, num_draws=1)
        self.gram = None if gram is None else gram_of_rows(gram, self.rows)

    def _loss_jacobian(self, losses: SampleLosses, index: int) -> LossJacobian:
        each, predictive = self._each(losses), losses.predictive
        if predictive is None or predictive.likelihood != "categorical":  # outputs are few: nothing to gain from their slopes
            return DirectLossJacobian(losses, each, self._leaves)
        slopes = [_slope_by_logits(losses.total, predictive.logits)]
        return SlopedLossJacobian(losses, predictive.logits, slopes, self._leaves, by_target=self.sample_unit == "token")

    def _each(self, losses: SampleLosses) -> Tensor:
        """(N,) losses of rows, or (N, M) of targets."""
        if losses.per_sample is None:
            raise ConfigurationError(
                "the empirical Fisher needs the loss of every row, and this one is only known as the mean of a batch: return "
                "one loss per row."
            )
        if self.sample_unit == "sequence":
            return losses.per_sample
        if losses.per_target is None:
            raise ConfigurationError(
                "`sample_unit`='token' needs the losses of single targets, and a loss function gives those of rows: use "
                "'sequence', the model's own loss or a named one."
            )
        return losses.per_target


@final
class SampledFisherOperator(FisherOperator):
    """The Fisher of labels drawn from the model's own predictive, at all valid targets; see `FisherOperator`.

    Labels, and for `sequence` the whole operator, are those of the Gram with the same seed (`FisherType(fisher="sampled")`);
    `token` takes every valid target at these labels, where the Gram takes some. For squared and binary losses of D outputs the
    gradients in J are scaled as `Predictive` says, so that the mean over draws is the GGN.

    Args:
        objective: the loss of a microbatch.
        microbatches: what N spans.
        names: parameters to differentiate by, default all; only their part of the graph is built.
        sample_unit: `sequence` or `token`.
        num_draws: label draws per sample.
        seed: of the draws; microbatch b draws with `seed + b`.

    Raises:
        ConfigurationError: the likelihood of the loss is not known.
        ProbeError: no row can be used.
    """

    def __init__(
        self,
        objective: Objective,
        microbatches: Sequence[Any],
        names: Iterable[str] | None = None,
        *,
        sample_unit: SampleUnit = "sequence",
        num_draws: int = 1,
        seed: int = 0,
    ) -> None:
        self._fisher_type = FisherType(fisher="sampled", num_draws=num_draws)
        self._seed = seed
        self._drawn: dict[int, list[Surrogate]] = {}
        super().__init__(objective, microbatches, names, sample_unit=sample_unit, num_draws=num_draws)

    def _built(self, microbatches: Sequence[Microbatch], rows: Sequence[Tensor]) -> bool:
        self._drawn.clear()  # those of other rows
        return super()._built(microbatches, rows)

    def _loss_jacobian(self, losses: SampleLosses, index: int) -> LossJacobian:
        """Labels are drawn once: a rebuilt pass may differ in a last bit, and that must not draw another one."""
        if index not in self._drawn:
            self._drawn[index] = surrogates(self._fisher_type, losses, seed=self._seed + index)
        assert losses.predictive is not None, "surrogates have drawn from it"
        logits = losses.predictive.logits
        slopes = [_slope_by_logits(surrogate(losses).sum(), logits) for surrogate in self._drawn[index]]
        return SlopedLossJacobian(losses, logits, slopes, self._leaves, by_target=self.sample_unit == "token")


def fisher_eigenpairs(
    operator: JacobianOperator, gram: Tensor | None, options: LanczosOptions, initial_vectors: Tensor | None
) -> Eigenpairs:
    """The outer pairs of a Fisher: from its Gram where it is known, with true residuals, else by Lanczos."""
    if gram is None:
        return solve(operator, options, initial_vectors=initial_vectors)
    return eigenpairs_of_gram(gram, operator, options)


def gram_of_rows(gram: Tensor, rows: Tensor) -> Tensor:
    """The part of a Gram that belongs to these rows.

    Raises:
        ProbeError: an entry of it is not finite.
    """
    rows = rows.to(gram.device)
    used = gram[rows][:, rows]
    if not used.isfinite().all():
        raise ProbeError("a row of this probe has a finite gradient in this block and one that is not finite in another.")
    return used


def _slope_by_logits(total: Tensor, logits: Tensor) -> Tensor:
    """(N, M, C) gradient of a sum over rows; each entry is that of its own target's loss."""
    if not total.requires_grad:
        return torch.zeros((), dtype=logits.dtype, device=logits.device).expand(logits.shape)
    (slope,) = torch.autograd.grad(total, logits, retain_graph=True)
    return slope


def _row_numbers(microbatches: Sequence[Microbatch]) -> list[Tensor]:
    """Row numbers of each microbatch, counted over all."""
    sizes = [batch.num_rows for batch in microbatches]
    return list(torch.split(torch.arange(sum(sizes)), sizes))
