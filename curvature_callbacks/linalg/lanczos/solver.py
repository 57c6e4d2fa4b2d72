"""Lanczos for the outer eigenpairs of a symmetric operator: full basis or restarted, with a residual for every pair."""

import time
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from curvature_callbacks.device import device_budget
from curvature_callbacks.errors import ConfigurationError
from curvature_callbacks.linalg.eigenpairs import Eigenpairs
from curvature_callbacks.linalg.inner_products import InnerProducts
from curvature_callbacks.linalg.lanczos.iteration import Iteration
from curvature_callbacks.linalg.lanczos.krylov import Krylov
from curvature_callbacks.linalg.lanczos.limits import DEFAULT_LIMITS, LanczosLimits
from curvature_callbacks.linalg.lanczos.options import LEAST_ROOM, LanczosOptions, ReorthMode
from curvature_callbacks.linalg.lanczos.reorthogonalisation import Full, Off, Partial, Reorthogonalisation, Selective
from curvature_callbacks.linalg.lanczos.ritz import Ritz
from curvature_callbacks.linalg.lanczos.wanted import Which, wanted
from curvature_callbacks.linalg.operator import Operator

__all__ = ["LanczosOptions", "ReorthMode", "Which", "lanczos", "solve"]

_SWEEP: Final = 1e-5  # a run to this accuracy or better also asks that no copy of a multiple eigenvalue is missing
_DEFAULT_BASIS: Final = 40  # 10 + 5 pairs of a GPT-2: 168 products with 30 vectors, 145 with 40, 130 with 60
_NOISE_SHARE: Final = 0.1  # of a warm start; between 0.003 and 1 products differed by one at most, so what lacks can be found


def lanczos(
    operator: Operator,
    *,
    k: int,
    which: Which = "LA",
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    max_seconds: float | None = None,
    reorth_mode: ReorthMode = "auto",
    reorth_window: int = 8,
    reorth_period: int = 5,
    basis_size: int | None = None,
    initial_vectors: Tensor | None = None,
    seed: int = 0,
    return_eigenvectors: bool = False,
    true_residuals: bool = False,
) -> Eigenpairs:
    """The `k` outer eigenpairs of a symmetric operator, with a residual for each.

    `A Q_m = Q_m T_m + beta_m q_{m+1} e_m'`, theta and s from `T_m s = theta s`, residual `|beta_m s_m|`. Per step: three-term
    recurrence first, then what `reorth_mode` says. Inner products and T are float64. A vanishing beta (an invariant subspace)
    is deflation: the run continues with a random vector in the orthogonal complement, until that holds no further copy of a
    wanted eigenvalue. One Krylov space shows one copy of a multiple eigenvalue only: a run with `tol` of 1e-5 or less looks
    for others in the complement of what it found before it ends; one with a larger `tol` does not. Assumed and unchecked:
    symmetry (the measured `asymmetry` is reported).

    Args:
        operator: symmetric operator on vectors (P,). An attribute `space` says how inner products of sharded vectors add up.
        k: wanted pairs; at most P are returned.
        which: as in SciPy's `eigsh`: `LA` largest, `SA` smallest, `LM` largest magnitude, `BE` half from each end (the odd
            one from the top).
        tol: a pair has converged when its residual is at most `max(tol |theta|, 10 eps |lambda|_max)`.
        max_matvecs: most products, at least `k` (up to 4 more are lost to each deflation); default `max(100, 2 k + 20)`. Pairs
            that have not converged by then are returned and flagged.
        max_seconds: stop at the first look after this time, likewise.
        reorth_mode: orthogonalisation of each new vector beyond the recurrence.
            `full`: against the whole basis.
            `partial`: against the whole basis only where a running estimate says that orthogonality would be lost to
            `sqrt(eps)`; the same pairs, about half the passes.
            `selective`: against the last `reorth_window` vectors, and against all at two of every `reorth_period` steps; more
            often once that proves too rare.
            `off`: none. Ghosts (copies of converged pairs) are found by their vectors and dropped, here and in `selective`.
            `thick_restart`: full, in a basis of `basis_size` vectors that is compressed to its best Ritz vectors when full
            (Wu and Simon 2000).
            `auto`: where a basis of `max_matvecs` vectors fits the device's memory budget, `partial` on a CPU and `full`
            elsewhere (`partial` is told of the recurrence at looks only there, and steps that prove lost cost products); else
            `thick_restart` with as many as fit.
        reorth_window: of `selective`.
        reorth_period: of `selective`.
        basis_size: vectors of `thick_restart`, at least `k + 8`; default `max(2 k + 20, 40)`.
        initial_vectors: (P, j) eigenvectors of a similar operator: the run starts from their sum, with a tenth of random noise.
            Their lengths are weights; `Eigenpairs.starting_vector` gives those that converge late more.
        seed: seed of random vectors, drawn from a private generator.
        return_eigenvectors: also return the Ritz vectors (P, k), each of unit length.
        true_residuals: replace the residual estimates by `||A v - theta v||_2`, at `k` further products (on top of
            `max_matvecs`).

    Returns:
        The pairs, eigenvalues descending.

    Raises:
        ConfigurationError: a bad option, before the first product.
        ProbeError: a product is not finite.

    Cost: one product and about `4 m P` multiplications at step m; memory `(max_matvecs + 1) P` in the operator's dtype,
    `(basis_size + 1) P` for `thick_restart`.

    References: Parlett, The Symmetric Eigenvalue Problem (1998), chapter 13; Daniel, Gragg, Kaufman and Stewart (1976); Wu and
    Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems" (2000).

    Example:
        >>> import torch
        >>> from curvature_callbacks.linalg.operator import MatrixOperator
        >>> A = torch.diag(torch.arange(-2.0, 8.0, dtype=torch.float64))
        >>> [round(value, 6) for value in lanczos(MatrixOperator(A), k=3, which="BE").eigenvalues.tolist()]
        [7.0, 6.0, -2.0]
    """
    options = LanczosOptions(
        k=k,
        which=which,
        tol=tol,
        max_matvecs=max_matvecs,
        max_seconds=max_seconds,
        reorth_mode=reorth_mode,
        reorth_window=reorth_window,
        reorth_period=reorth_period,
        basis_size=basis_size,
        seed=seed,
        return_eigenvectors=return_eigenvectors,
        true_residuals=true_residuals,
    )
    return solve(operator, options, initial_vectors=initial_vectors)


def solve(
    operator: Operator,
    options: LanczosOptions,
    *,
    initial_vectors: Tensor | None = None,
    limits: LanczosLimits = DEFAULT_LIMITS,
) -> Eigenpairs:
    """`lanczos` with its options as an object.

    Raises:
        ConfigurationError: `initial_vectors` of another shape.
        ProbeError: a product is not finite.
    """
    _check_initial_vectors(initial_vectors, operator)
    start = time.perf_counter()
    run = iteration(operator, options, initial_vectors=initial_vectors, limits=limits)
    ritz, krylov = run.result(), run.krylov
    vectors = _unit_vectors(krylov, ritz) if options.return_eigenvectors or options.true_residuals else None
    num_matvecs = krylov.num_matvecs
    if options.true_residuals and vectors is not None:
        ritz = replace(ritz, residuals=_true_residuals(operator, vectors, ritz))
        num_matvecs += vectors.shape[1]
    return Eigenpairs(
        eigenvalues=ritz.values,
        residuals=ritz.residuals,
        converged=ritz.converged(options.tol),
        eigenvectors=vectors if options.return_eigenvectors else None,
        num_matvecs=num_matvecs,
        which=options.which,
        reorth_mode=run.mode,
        is_psd=operator.is_psd,
        tol=options.tol,
        lambda_abs_max=ritz.scale,
        asymmetry=krylov.projection.asymmetry / ritz.scale if ritz.scale > 0 else 0.0,
        seconds=time.perf_counter() - start,
        warnings=_warnings(ritz, options.k, krylov, options.tol),
    )


def iteration(
    operator: Operator,
    options: LanczosOptions,
    *,
    initial_vectors: Tensor | None = None,
    limits: LanczosLimits = DEFAULT_LIMITS,
) -> Iteration:
    """The run that `solve` makes, before its first step."""
    deadline = None if options.max_seconds is None else time.perf_counter() + options.max_seconds
    mode, capacity = _basis(operator, options, limits)
    krylov = Krylov(
        operator,
        capacity,
        seed=options.seed,
        start=_start(initial_vectors, operator, options.seed),
        policy=_policy(mode, operator, options, limits),
        restart_columns=limits.restart_columns,
    )
    return Iteration(
        krylov=krylov,
        mode=mode,
        wanted=wanted(options.k, options.which).at_most(krylov.dimension),
        tol=options.tol,
        max_matvecs=options.most_matvecs,
        deadline=deadline,
        look_every=limits.look_every,
        hurried=initial_vectors is not None and options.k == 1,
        sweeping=options.tol <= _SWEEP,
    )


def _check_initial_vectors(vectors: Tensor | None, operator: Operator) -> None:
    if vectors is not None and (vectors.ndim != 2 or vectors.shape[0] != operator.shape[0] or vectors.shape[1] == 0):
        raise ConfigurationError(
            f"`initial_vectors` must have shape ({operator.shape[0]}, j), one vector a column, got {tuple(vectors.shape)}."
        )


def _basis(operator: Operator, options: LanczosOptions, limits: LanczosLimits) -> tuple[ReorthMode, int]:
    """The mode that runs, and how many basis vectors it has."""
    k, mode, budget = options.k, options.reorth_mode, options.most_matvecs
    if mode == "thick_restart":
        return mode, options.basis_size or max(2 * k + 20, _DEFAULT_BASIS)
    if mode != "auto":
        return mode, budget
    vector = operator.shape[0] * operator.dtype.itemsize
    products = InnerProducts(operator)
    memory = device_budget(operator.device) if limits.basis_bytes is None else limits.basis_bytes
    fitting = int(products.average(memory // max(vector, 1) - 1))
    if min(budget, products.dimension(operator.shape[0])) <= fitting:
        return ("partial" if products.reads_are_free else "full"), budget
    return "thick_restart", max(k + LEAST_ROOM, fitting)


def _policy(mode: ReorthMode, operator: Operator, options: LanczosOptions, limits: LanczosLimits) -> Reorthogonalisation:
    eps = torch.finfo(operator.dtype).eps
    if mode == "partial":
        return Partial(eps=eps, ahead=1 if InnerProducts(operator).reads_are_free else limits.look_every)
    if mode == "selective":
        return Selective(eps=eps, window=options.reorth_window, period=options.reorth_period)
    return Off() if mode == "off" else Full()


def _start(vectors: Tensor | None, operator: Operator, seed: int) -> Tensor | None:
    """(P,) the sum of the vectors (P, j) at unit length, plus a tenth of noise: what they lack must still be found."""
    if vectors is None:
        return None
    products = InnerProducts(operator)
    norm = products.norm
    together = vectors.to(operator.device, operator.dtype).sum(1)
    noise = torch.randn(len(together), generator=products.random(seed), dtype=operator.dtype).to(operator.device)
    return together / norm(together).to(together.dtype) + _NOISE_SHARE * noise / norm(noise).to(noise.dtype)


def _unit_vectors(krylov: Krylov, ritz: Ritz) -> Tensor:
    """(P, k) the Ritz vectors at unit length, which a basis orthonormal to half the digits gives to these only."""
    vectors = krylov.vectors(ritz.coordinates)
    for column in vectors.T:
        column /= krylov.products.norm(column).to(column.dtype)
    return vectors


def _true_residuals(operator: Operator, vectors: Tensor, ritz: Ritz) -> Tensor:
    norm = InnerProducts(operator).norm
    differences = operator.matmat(vectors) - vectors * ritz.values.to(vectors)
    return torch.stack([norm(column.contiguous()).cpu() for column in differences.T]).clamp_min(ritz.floor)


def _warnings(ritz: Ritz, k: int, krylov: Krylov, tol: float) -> tuple[str, ...]:
    messages = []
    if k > krylov.dimension:
        messages.append(f"`k`={k} exceeds the dimension {krylov.dimension}: {krylov.dimension} pairs are returned.")
    missing = int((~ritz.converged(tol)).sum())
    if missing:
        messages.append(f"{missing} of {len(ritz.values)} pairs did not reach `tol`={tol:g}: raise `max_matvecs` or `tol`.")
    absent = min(k, krylov.dimension) - len(ritz.values)
    if absent:
        messages.append(f"{absent} further pairs were only ghosts of these: raise `max_matvecs` or use `reorth_mode`='full'.")
    return tuple(messages)
