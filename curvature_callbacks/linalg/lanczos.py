"""Lanczos with full reorthogonalisation for the outer eigenpairs of a symmetric operator."""

import time
from dataclasses import dataclass
from typing import Final, Literal, final, get_args

import torch
from torch import Tensor

from curvature_callbacks.errors import check_choice, check_positive
from curvature_callbacks.linalg.accumulate import coefficients, dot, norm, subtract_combination
from curvature_callbacks.linalg.eigenpairs import Eigenpairs
from curvature_callbacks.linalg.operator import Operator

Which = Literal["LA", "SA", "LM", "BE"]

_LOOK_EVERY: Final = 5  # steps between looks at the recurrence; each look is the only host synchronisation
_SECOND_PASS: Final = 0.7  # a pass that shrinks the vector below this share is repeated (Daniel et al. 1976: 1/sqrt(2))
_NOISE: Final = 10.0  # noise floor of a residual and of beta, in units of eps |lambda|_max


def lanczos(
    operator: Operator,
    *,
    k: int,
    which: Which = "LA",
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    seed: int = 0,
    return_eigenvectors: bool = False,
    true_residuals: bool = False,
) -> Eigenpairs:
    """The `k` outer eigenpairs of a symmetric operator, with a residual for each.

    `A Q_m = Q_m T_m + beta_m q_{m+1} e_m'`, theta and s from `T_m s = theta s`, residual `|beta_m s_m|`. Per step: three-term
    recurrence first, then one full pass over the basis, a second one when the first shrank the vector. Inner products and
    T are float64. A vanishing beta (an invariant subspace) is deflation: the run continues with a random vector in the
    orthogonal complement. Assumed and unchecked: symmetry (the measured `asymmetry` is reported).

    Args:
        operator: symmetric operator on vectors (P,).
        k: wanted pairs; at most P are returned.
        which: as in SciPy's `eigsh`: `LA` largest, `SA` smallest, `LM` largest magnitude, `BE` half from each end (the odd
            one from the top).
        tol: a pair has converged when its residual is at most `max(tol |theta|, 10 eps |lambda|_max)`.
        max_matvecs: most basis vectors to build, one product each (up to 4 more are lost to the first deflation), at least
            `k`; default `max(100, 2 k + 20)`. Pairs that have not converged by then are returned and flagged.
        seed: seed of the start vector, drawn from a private generator.
        return_eigenvectors: also return the Ritz vectors (P, k).
        true_residuals: replace the residual estimates by `||A v - theta v||_2`, at `k` further products (on top of
            `max_matvecs`).

    Returns:
        The pairs, eigenvalues descending.

    Raises:
        ConfigurationError: a bad option, before the first product.

    Cost: one product and about `4 m P` multiplications at step m; memory `(max_matvecs + 1) P` in the operator's dtype.

    References: Parlett, The Symmetric Eigenvalue Problem (1998), chapter 13; Daniel, Gragg, Kaufman and Stewart (1976).

    Example:
        >>> import torch
        >>> from curvature_callbacks.linalg.operator import MatrixOperator
        >>> A = torch.diag(torch.arange(-2.0, 8.0, dtype=torch.float64))
        >>> [round(value, 6) for value in lanczos(MatrixOperator(A), k=3, which="BE").eigenvalues.tolist()]
        [7.0, 6.0, -2.0]
    """
    check_positive("k", k)
    check_choice("which", which, get_args(Which))
    budget = max(100, 2 * k + 20) if max_matvecs is None else max_matvecs
    if budget < k:
        raise ValueError(f"`max_matvecs` must be at least `k`={k}, got {budget}.")
    if not tol > 0:
        raise ValueError(f"`tol` must be positive, got {tol!r}.")
    start = time.perf_counter()
    krylov = _Krylov(operator, budget, seed)
    ritz = _iterate(krylov, k, which, tol)
    vectors = krylov.ritz_vectors(ritz.vectors) if return_eigenvectors or true_residuals else None
    if true_residuals and vectors is not None:
        ritz.residuals = _true_residuals(operator, vectors, ritz)
        krylov.num_matvecs += vectors.shape[1]
    return Eigenpairs(
        eigenvalues=ritz.values,
        residuals=ritz.residuals,
        converged=ritz.converged(tol),
        eigenvectors=vectors if return_eigenvectors else None,
        num_matvecs=krylov.num_matvecs,
        which=which,
        reorth_mode="full",
        is_psd=operator.is_psd,
        tol=tol,
        lambda_abs_max=ritz.scale,
        asymmetry=krylov.asymmetry() / ritz.scale if ritz.scale > 0 else 0.0,
        seconds=time.perf_counter() - start,
        warnings=_warnings(ritz, k, operator.shape[0], tol),
    )


@final
@dataclass(slots=True)
class _Ritz:
    """The wanted Ritz pairs of one look at T."""

    values: Tensor  # (k,) descending
    vectors: Tensor  # (m, k) coordinates in the Krylov basis
    residuals: Tensor  # (k,)
    scale: float  # largest |theta|
    floor: float  # noise floor of a residual

    def converged(self, tol: float) -> Tensor:
        return self.residuals <= (tol * self.values.abs()).clamp_min(self.floor)


class _Krylov:
    """Basis and recurrence of one run; everything stays on the operator's device between looks."""

    def __init__(self, operator: Operator, budget: int, seed: int) -> None:
        self.operator = operator
        P = operator.shape[0]
        self.capacity = min(P, budget)
        self.generator = torch.Generator().manual_seed(seed)
        self.basis = torch.empty(self.capacity + 1, P, dtype=operator.dtype, device=operator.device)  # (capacity + 1, P)
        self.alphas = torch.zeros(self.capacity, dtype=torch.float64, device=operator.device)
        self.betas = torch.zeros(self.capacity, dtype=torch.float64, device=operator.device)
        self.couplings = torch.zeros(self.capacity, dtype=torch.float64, device=operator.device)
        self.size = 0
        self.start = 0  # first step of the current segment, after the last deflation
        self.settled = 0  # steps whose beta was looked at
        self.num_matvecs = 0
        self._place_random(0)

    @property
    def finished(self) -> bool:
        return self.size == self.capacity

    def step(self) -> None:
        """One product, the three-term recurrence, then the basis."""
        j = self.size
        q = self.basis[j]
        w = self.operator.matmat(q[:, None])[:, 0].clone()
        self.num_matvecs += 1
        self.alphas[j] = alpha = dot(q, w)
        if j > 0:
            self.couplings[j] = dot(self.basis[j - 1], w) - self.betas[j - 1]
            w -= self.betas[j - 1] * self.basis[j - 1]
        w -= alpha * q
        self.betas[j] = beta = self._orthogonalise(w, j + 1)
        torch.div(w, beta.clamp_min(torch.finfo(self.basis.dtype).tiny), out=self.basis[j + 1])
        self.size = j + 1

    def look(self) -> tuple[Tensor, Tensor]:
        """`(alphas, betas)` on the host; the first vanished beta ends an invariant subspace, where the run restarts."""
        alphas, betas = self.alphas[: self.size].cpu(), self.betas[: self.size].cpu()
        scale = max(alphas.abs().max().item(), betas.max().item())
        vanished = betas <= _NOISE * torch.finfo(self.basis.dtype).eps * scale
        vanished[: self.settled] = False  # deflated at an earlier look
        if vanished.any():
            j = int(vanished.nonzero()[0])
            self.size = self.settled = self.start = j + 1
            self.betas[j] = 0.0
            self._place_random(j + 1)
            return alphas[: j + 1], torch.cat([betas[:j], betas.new_zeros(1)])
        self.settled = self.size
        return alphas, betas

    def ritz_vectors(self, coordinates: Tensor) -> Tensor:
        """(P, k) from coordinates (m, k)."""
        weights = coordinates.to(self.basis)
        vectors: Tensor = self.basis[: weights.shape[0]].T @ weights
        return vectors

    def asymmetry(self) -> float:
        return self.couplings[: self.size].abs().max().item()

    def _orthogonalise(self, w: Tensor, count: int) -> Tensor:
        before = norm(w)
        subtract_combination(w, self.basis[:count], coefficients(self.basis[:count], w))
        after = norm(w)
        # On an accelerator the second pass is cheaper than the synchronisation that would tell whether it is needed.
        if w.device.type != "cpu" or after < _SECOND_PASS * before:
            subtract_combination(w, self.basis[:count], coefficients(self.basis[:count], w))
            after = norm(w)
        return after

    def _place_random(self, index: int) -> None:
        """A random unit vector orthogonal to the first `index` basis vectors, in place `index`."""
        P = self.basis.shape[1]
        if index >= P:
            self.basis[index].zero_()
            return
        q = torch.randn(P, generator=self.generator, dtype=self.basis.dtype).to(self.basis.device)
        for _ in range(3 if index else 0):
            q /= norm(q)
            subtract_combination(q, self.basis[:index], coefficients(self.basis[:index], q))
        self.basis[index] = q / norm(q)


def _iterate(krylov: _Krylov, k: int, which: Which, tol: float) -> _Ritz:
    P = krylov.operator.shape[0]
    wanted = min(k, P)
    patience = _LOOK_EVERY
    while True:
        for _ in range(patience):
            krylov.step()
            if krylov.finished:
                break
        alphas, betas = krylov.look()
        if betas[-1] == 0:
            patience = 1  # steps after a vanished beta are lost, so look at each from here on
        ritz = _ritz(alphas, betas, wanted, which, krylov.basis.dtype, exhausted=krylov.size == P)
        if krylov.finished:
            return ritz
        converged = krylov.size > max(wanted, krylov.start) and bool(ritz.converged(tol).all())
        if converged and _adds_nothing(alphas, betas, krylov.start, wanted, which, tol, ritz.floor):
            return ritz


def _adds_nothing(alphas: Tensor, betas: Tensor, start: int, k: int, which: Which, tol: float, floor: float) -> bool:
    """Whether the segment since the last deflation, at step `start`, holds no further copy of a wanted eigenvalue.

    One Krylov space sees one copy of a multiple eigenvalue; each restart in the complement sees the next. The wanted pairs of
    the segments before are final once the outermost values of the current one have converged inside them.
    """
    if start < k:
        return start == 0
    before = torch.linalg.eigvalsh(_tridiagonal(alphas[:start], betas[:start]))
    wanted = before[_choose(before, k, which)]  # descending
    values, vectors = torch.linalg.eigh(_tridiagonal(alphas[start:], betas[start:]))
    settled = (betas[-1] * vectors[-1]).abs() <= (tol * values.abs()).clamp_min(floor)
    if which == "LM":
        outermost = values.abs().argmax()
        return bool(settled[outermost] & (values[outermost].abs() <= wanted.abs().min() + floor))
    top = {"LA": k, "SA": 0, "BE": k - k // 2}[which]  # pairs wanted from the upper end
    none_above = top == 0 or bool(settled[-1] & (values[-1] <= wanted[top - 1] + floor))
    none_below = top == k or bool(settled[0] & (values[0] >= wanted[top] - floor))
    return none_above and none_below


def _tridiagonal(alphas: Tensor, betas: Tensor) -> Tensor:
    return torch.diag(alphas) + torch.diag(betas[:-1], 1) + torch.diag(betas[:-1], -1)


def _ritz(alphas: Tensor, betas: Tensor, k: int, which: Which, dtype: torch.dtype, *, exhausted: bool) -> _Ritz:
    values, vectors = torch.linalg.eigh(_tridiagonal(alphas, betas))
    scale = values.abs().max().item()
    floor = _NOISE * torch.finfo(dtype).eps * scale
    chosen = _choose(values, min(k, len(values)), which)
    last = torch.zeros(()) if exhausted else betas[-1]
    residuals = (last * vectors[-1, chosen]).abs().clamp_min(floor)
    return _Ritz(values[chosen], vectors[:, chosen], residuals, scale, floor)


def _choose(values: Tensor, k: int, which: Which) -> Tensor:
    """Indices of the wanted ones among ascending `values`, in descending order of value."""
    m = len(values)
    if which == "LA":
        chosen = torch.arange(m - k, m)
    elif which == "SA":
        chosen = torch.arange(k)
    elif which == "LM":
        chosen = values.abs().argsort(descending=True)[:k].sort().values
    else:
        chosen = torch.cat([torch.arange(k // 2), torch.arange(m - (k - k // 2), m)])
    return chosen.flip(0)


def _true_residuals(operator: Operator, vectors: Tensor, ritz: _Ritz) -> Tensor:
    differences = operator.matmat(vectors) - vectors * ritz.values.to(vectors)
    return torch.stack([norm(column).cpu() for column in differences.T]).clamp_min(ritz.floor)


def _warnings(ritz: _Ritz, k: int, P: int, tol: float) -> tuple[str, ...]:
    messages = []
    if k > P:
        messages.append(f"`k`={k} exceeds the dimension {P}: {P} pairs are returned.")
    missing = int((~ritz.converged(tol)).sum())
    if missing:
        messages.append(f"{missing} of {len(ritz.values)} pairs did not reach `tol`={tol:g}: raise `max_matvecs` or `tol`.")
    return tuple(messages)
