"""Operators of a run on many processes: each has its own rows, and holds its own part of every vector."""

from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor

from curvature_callbacks.errors import ProbeError
from curvature_callbacks.linalg.eigenpairs import Eigenpairs
from curvature_callbacks.linalg.lanczos.options import LanczosOptions
from curvature_callbacks.linalg.operator import Operator
from curvature_callbacks.operators.capabilities import SelfCheck, self_check
from curvature_callbacks.operators.difference import FiniteDifferenceHessianOperator, eigenpairs_with_product_error
from curvature_callbacks.operators.fisher import FisherOperator, fisher_eigenpairs, gram_of_rows
from curvature_callbacks.processes.world import World


class ReplicatedOperator:
    """`A = sum_r (n_r / n) A_r` over the processes r, A_r the mean over its own n_r targets or rows, `n = sum_r n_r`.

    A vector lies in parts of equal length over the processes, so a basis takes each of them 1 / W of its memory and of its
    arithmetic, and there is one copy of every entry: processes cannot drift apart. For a product the vector is assembled,
    multiplied on each process with its own rows, and the sum is taken apart again.

    Args:
        local: A_r, on assembled vectors (P,).
        count: n_r.
        world: the processes.

    Attributes:
        shape: of the part of a vector that this process holds.
        space: how inner products of parts become those of vectors.
        local: A_r.
        num_targets: n.

    Cost: a product of each process's own rows, and two exchanges of a vector. Memory: two vectors.
    """

    def __init__(self, local: Operator, count: int, world: World) -> None:
        self.local = local
        self.space = world
        self._world = world
        counts = world.gathered(count)
        self.num_targets = sum(counts)
        if self.num_targets == 0:
            raise ProbeError("no sample of this probe has a valid target on any process: the loss is undefined.")
        self._weight = count / self.num_targets
        self._length = local.shape[0]
        part = world.part(self._length)
        held = part.stop - part.start
        self.shape = (held, held)
        self.dtype = local.dtype
        self.device = local.device
        self.is_psd = local.is_psd

    def matmat(self, V: Tensor) -> Tensor:
        """`A V` for `V` (held by this process, K)."""
        vectors = self._world.assembled(V.T.contiguous(), self._length)  # (K, P)
        with self._world.together():
            product = self.local.matmat(vectors.T) * self._weight
        return self._world.reduced(product.T.contiguous()).T

    def self_check(self, seed: int) -> SelfCheck:
        """The worst of the checks that every process makes of its own derivatives."""
        return self._worst(lambda: self_check(self.local, seed))

    def _worst(self, check: Callable[[], SelfCheck]) -> SelfCheck:
        """The largest of the processes' errors (nan before all), and the products it took."""
        with self._world.together():
            checked = check()
        worst: SelfCheck = max(self._world.gathered(checked), key=lambda other: (other.error != other.error, other))
        return worst


@final
class ReplicatedDifferencesOperator(ReplicatedOperator):
    """`ReplicatedOperator` of finite differences, which knows how far off its products are."""

    def __init__(self, local: FiniteDifferenceHessianOperator, count: int, world: World) -> None:
        super().__init__(local, count, world)
        self._differences = local

    def error_estimate(self, v: Tensor) -> float:
        """The largest of the processes' estimates for their own rows, along `v` (held by this process,)."""
        vector = self._world.assembled(v[None], self._length)[0]
        return self._worst(lambda: SelfCheck(self._differences.error_estimate(vector), 0)).error

    def eigenpairs(self, options: LanczosOptions, *, initial_vectors: Tensor | None = None) -> Eigenpairs:
        """The outer pairs by Lanczos, with the error of the products along the outermost of them."""
        return eigenpairs_with_product_error(self, options, initial_vectors)


@final
class ShardedFisherOperator(ReplicatedOperator):
    """A Fisher `J' J / normaliser`, J the gradients of the losses of all processes, by rank.

    Attributes:
        rows: (N,) rows used, counted over all microbatches of all processes.
        num_targets: valid targets of these.
        normaliser: of all processes.
        sample_unit: `sequence` or `token`.
        gram: (N, N) `J J'` where it is known and gives the eigenpairs; else None, and Lanczos finds them.
    """

    def __init__(self, local: FisherOperator, num_rows: int, world: World, *, gram: Tensor | None = None) -> None:
        super().__init__(local, local.normaliser, world)
        self._fisher = local
        self.sample_unit = local.sample_unit
        self.normaliser = self.num_targets  # as counted above; of targets it is counted anew
        by_rank = world.gathered((local.rows.tolist(), num_rows, local.num_targets, local.num_outputs))
        self.rows = _joint_row_numbers([rows for rows, *_ in by_rank], [size for _, size, *_ in by_rank])
        self.num_samples = len(self.rows)
        self.num_targets = sum(targets for _, _, targets, _ in by_rank)
        self._counts = [num_losses for *_, num_losses in by_rank]
        self.gram = None if gram is None else gram_of_rows(gram, self.rows)

    @property
    def num_outputs(self) -> int:
        """S, the single losses of all processes: the length of `J v`."""
        return sum(self._counts)

    def jvp(self, v: Tensor) -> Tensor:
        """`J v` (S,) for `v` (held by this process,)."""
        vector = self._world.assembled(v[None], self._length)[0]
        with self._world.together():
            local = self._fisher.jvp(vector)
        pieces = [torch.zeros(count, dtype=local.dtype, device=local.device) for count in self._counts]
        pieces[self._world.rank] = local
        return self._world.total(torch.cat(pieces))

    def vjp(self, u: Tensor) -> Tensor:
        """`J' u` (held by this process,) for `u` (S,), the same on every process."""
        with self._world.together():
            local = self._fisher.vjp(torch.split(u, self._counts)[self._world.rank])
        return self._world.reduced(local[None])[0]

    def eigenpairs(self, options: LanczosOptions, *, initial_vectors: Tensor | None = None) -> Eigenpairs:
        """The outer pairs: from the Gram where it is known, with true residuals, else by Lanczos."""
        return fisher_eigenpairs(self, self.gram, options, initial_vectors)


def _joint_row_numbers(rows: Sequence[Sequence[int]], sizes: Sequence[int]) -> Tensor:
    """Row numbers counted over all processes, from those of each and how many rows each has."""
    starts = torch.tensor([0, *sizes]).cumsum(0)
    return torch.cat([torch.tensor(local, dtype=torch.int64) + start for local, start in zip(rows, starts, strict=False)])
