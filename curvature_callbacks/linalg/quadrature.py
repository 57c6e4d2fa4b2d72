"""Stochastic Lanczos quadrature: the spectral density of a symmetric operator and what follows from it."""

import math
import time
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from curvature_callbacks.errors import ConfigurationError, check_positive
from curvature_callbacks.linalg.accumulate import subtract_combination
from curvature_callbacks.linalg.density import Density
from curvature_callbacks.linalg.eigenpairs import NOISE, Eigenpairs
from curvature_callbacks.linalg.inner_products import InnerProducts
from curvature_callbacks.linalg.lanczos.krylov import Krylov
from curvature_callbacks.linalg.operator import Operator
from curvature_callbacks.space import LOCAL

_LOOK_EVERY: Final = 10  # steps between looks at the recurrence; an operator of low rank ends early
_LEAST_PROBES: Final = 2  # a standard error needs two
_LEAST_GRID: Final = 32
_POINTS_PER_WIDTH: Final = 2.5  # of the Gaussian: at one the trapezoidal rule is already exact to exp(-2 pi^2) = 3e-9
_MARGIN: Final = 4.0  # widths beyond the outermost nodes: 3e-5 of their weight lies further out
_LEAST_EXTENT: Final = 1e-2  # of |lambda|_max, for spectra of a single value
_COUNTED: Final = 1e-3  # of |lambda|_max: the bulk at zero makes counts of smaller negative eigenvalues meaningless


def spectral_density(
    operator: Operator,
    *,
    num_probes: int = 8,
    num_steps: int = 40,
    seed: int = 0,
    num_grid: int = 256,
    deflate: Eigenpairs | None = None,
) -> Density:
    """The spectral density of a symmetric operator by stochastic Lanczos quadrature, and sums over its spectrum.

    For v uniform on the unit sphere `E v' f(A) v = tr f(A) / P`, and m steps of Lanczos from v give the Gauss rule
    `v' f(A) v = sum_j w_j f(theta_j)`, theta the Ritz values and w the squared first entries of the eigenvectors of T, exact
    for polynomials of degree below 2 m. Probes are Gaussian vectors, normalised, rather than random signs: projected out of the
    deflated eigenvectors they are still uniform, and their spread does not depend on the basis the parameters are. A
    vanished beta ends a run early: the rule is then exact for its v. Nodes within `10 eps |lambda|_max` count as zero in
    masses and ranks. Assumed and unchecked: symmetry.

    Args:
        operator: symmetric operator on vectors (P,).
        num_probes: random vectors, at least two; standard errors shrink as one over its root.
        num_steps: Lanczos steps a probe. Fewer than 20 miss small negative masses.
        seed: of the probes, drawn from a private generator.
        num_grid: points of the density, at least 32. Its Gaussian is 2.5 grid spacings wide.
        deflate: eigenpairs with eigenvectors (orthonormal, unchecked). The converged ones enter exactly and the quadrature
            runs in their orthogonal complement, which shrinks the standard errors where they are outliers.

    Returns:
        The density and the sums.

    Raises:
        ConfigurationError: a bad option, before the first product.
        ProbeError: products that are not finite.

    Cost: `num_probes * num_steps` products and about `4 m P` multiplications at step m (`6 P` more a deflated pair); memory
    `num_steps + 1` vectors in the operator's dtype, and the deflated ones.

    References: Ubaru, Chen and Saad (2017), "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature"; Ghorbani,
    Krishnan and Xiao (2019), "An investigation into neural net optimization via Hessian eigenvalue density".

    Example:
        >>> import torch
        >>> from curvature_callbacks.linalg.operator import MatrixOperator
        >>> A = MatrixOperator(3 * torch.eye(50, dtype=torch.float64))
        >>> density = spectral_density(A, num_probes=2, num_steps=5)
        >>> round(density.trace, 6), density.num_steps
        (150.0, 1)
    """
    _check(operator, num_probes, num_steps, num_grid, deflate)
    start = time.perf_counter()
    sampler = QuadratureSampler(operator, num_steps, seed, deflate)
    rules = [sampler.rule() for _ in range(num_probes)]
    return _density(rules, sampler, operator, num_grid=num_grid, start=start)


@final
@dataclass(frozen=True, slots=True, eq=False)
class QuadratureRule:
    """Nodes and weights (adding up to one), (m,) float64 on CPU: `sum_j weights_j f(nodes_j)` stands for `tr f(A) / P`."""

    nodes: Tensor
    weights: Tensor

    def density(self, grid: Tensor, width: float) -> Tensor:
        """(n,) the nodes as Gaussians of this standard deviation."""
        gaussians = torch.exp(-0.5 * ((grid[:, None] - self.nodes) / width) ** 2)  # (n, m)
        return gaussians @ self.weights / (width * math.sqrt(2 * math.pi))

    def moments(self, unit: float, eps: float) -> Tensor:
        """(6,): sums over x = node / unit of x, x^2, |x|, |x| where negative, where x counts as negative, |x| log |x|."""
        x = self.nodes / unit
        size = x.abs() * (x.abs() > NOISE * eps)
        return torch.stack([x, x**2, size, size * (x < 0), (x < -_COUNTED).to(x), size.xlogy(size)]) @ self.weights


@final
class QuadratureSampler:
    """Draws probes and runs Lanczos from each, in the complement of what is deflated."""

    def __init__(self, operator: Operator, num_steps: int, seed: int, deflate: Eigenpairs | None) -> None:
        known, values = _deflated(operator, deflate)
        self._known = known  # (k, P)
        self._values = values  # (k,)
        self.num_deflated = len(values)
        self._operator = _Complement(operator, known) if self.num_deflated else operator
        self._products = InnerProducts(operator)
        self.dimension = self._products.dimension(operator.shape[0])
        self._num_steps = min(num_steps, self.dimension - self.num_deflated)
        self._seed = seed
        self._generator = self._products.random(seed)
        self.num_matvecs = 0
        self.longest = 0

    def rule(self) -> QuadratureRule:
        """The Gauss rule of the next probe, with the deflated eigenvalues as exact nodes."""
        exact = torch.full_like(self._values, 1 / self.dimension)
        if self._num_steps == 0:
            return QuadratureRule(self._values, exact)
        nodes, weights = self._run(self._probe())
        share = 1 - self.num_deflated / self.dimension
        return QuadratureRule(torch.cat([self._values, nodes]), torch.cat([exact, share * weights]))

    def _probe(self) -> Tensor:
        """(P,) Gaussian; in the complement twice, because rounding of the first projection may be all that is left."""
        v = torch.randn(self._operator.shape[0], generator=self._generator, dtype=self._operator.dtype)
        v = v.to(self._operator.device)
        for _ in range(2 if self.num_deflated else 0):
            v /= self._products.norm(v).to(v)
            subtract_combination(v, self._known, self._products.coefficients(self._known, v))
        return v

    def _run(self, probe: Tensor) -> tuple[Tensor, Tensor]:
        """Nodes and weights of the Gauss rule; shorter where `probe` lies in an invariant subspace."""
        krylov = Krylov(self._operator, self._num_steps, seed=self._seed, start=probe)
        while not krylov.finished and krylov.start == 0:
            for _ in range(min(_LOOK_EVERY, krylov.capacity - krylov.size)):
                krylov.step()
            krylov.settle()
        self.num_matvecs += krylov.num_matvecs
        self.longest = max(self.longest, krylov.size)
        nodes, vectors = torch.linalg.eigh(krylov.projection.matrix())
        return nodes, vectors[0].square()


@final
class _Complement:
    """`(I - Q Q') A (I - Q Q') + c Q Q'`, Q the deflated eigenvectors, for vectors orthogonal to them.

    Their rounding along Q would grow with every step if its eigenvalue lay outside the rest of the spectrum, as zero does for
    a definite A. So c is a Rayleigh quotient in the complement: of the first vector.
    """

    def __init__(self, operator: Operator, known: Tensor) -> None:
        self._operator = operator
        self._known = known  # (k, P)
        self._products = InnerProducts(operator)
        self._centre: Tensor | None = None
        self.space = getattr(operator, "space", LOCAL)
        self.shape = operator.shape
        self.dtype = operator.dtype
        self.device = operator.device
        self.is_psd = operator.is_psd

    def matmat(self, V: Tensor) -> Tensor:
        """`A V` for `V` (P, K) orthogonal to the deflated eigenvectors, one column after the other."""
        product = self._operator.matmat(V).T.contiguous()  # (K, P)
        for v, image in zip(V.T, product, strict=True):
            if self._centre is None:
                self._centre = self._products.dot(v, image) / self._products.dot(v, v)
            inside = self._products.coefficients(self._known, v)
            weights = self._products.coefficients(self._known, image) - self._centre * inside
            subtract_combination(image, self._known, weights)
        return product.T


def _deflated(operator: Operator, pairs: Eigenpairs | None) -> tuple[Tensor, Tensor]:
    """Eigenvectors (k, P) and eigenvalues (k,) of the converged pairs."""
    if pairs is None or pairs.eigenvectors is None:
        empty = torch.empty(0, operator.shape[0], dtype=operator.dtype, device=operator.device)
        return empty, torch.empty(0, dtype=torch.float64)
    chosen = pairs.converged.cpu()
    known = pairs.eigenvectors.T[chosen.to(pairs.eigenvectors.device)].to(operator.device, operator.dtype)
    return known.contiguous(), pairs.eigenvalues.cpu().double()[chosen]


def _density(
    rules: list[QuadratureRule], sampler: QuadratureSampler, operator: Operator, *, num_grid: int, start: float
) -> Density:
    """What the probes' rules say together; the clock read `start` before the first of them."""
    scale = max(rule.nodes.abs().max().item() for rule in rules)
    grid, width = _grid(rules, num_grid, scale)
    densities = torch.stack([rule.density(grid, width) for rule in rules])  # (probes, n)
    estimates, errors = _estimates_with_errors(rules, scale, sampler.dimension, torch.finfo(operator.dtype).eps)
    trace, frobenius_norm, negative_mass, negative_fraction, effective_rank = zip(estimates, errors, strict=True)
    return Density(
        grid=grid,
        density=densities.mean(0),
        density_standard_error=densities.std(0) / math.sqrt(len(rules)),
        width=width,
        trace=trace[0],
        trace_standard_error=trace[1],
        frobenius_norm=frobenius_norm[0],
        frobenius_norm_standard_error=frobenius_norm[1],
        negative_mass=negative_mass[0],
        negative_mass_standard_error=negative_mass[1],
        negative_fraction=negative_fraction[0],
        negative_fraction_standard_error=negative_fraction[1],
        effective_rank=effective_rank[0],
        effective_rank_standard_error=effective_rank[1],
        lambda_abs_max=scale,
        num_matvecs=sampler.num_matvecs,
        num_probes=len(rules),
        num_steps=sampler.longest,
        num_deflated=sampler.num_deflated,
        is_psd=operator.is_psd,
        seconds=time.perf_counter() - start,
    )


def _grid(rules: list[QuadratureRule], num_grid: int, scale: float) -> tuple[Tensor, float]:
    """Points (n,) over all nodes and a margin, and the width of a Gaussian."""
    low, high = (float(pick(float(pick(rule.nodes.tolist())) for rule in rules)) for pick in (min, max))
    extent = max(high - low, _LEAST_EXTENT * scale) or 1.0
    spacing = extent / (num_grid - 1 - 2 * _MARGIN * _POINTS_PER_WIDTH)
    half = spacing * (num_grid - 1) / 2
    middle = (low + high) / 2
    grid = torch.linspace(middle - half, middle + half, num_grid, dtype=torch.float64)
    return grid, _POINTS_PER_WIDTH * spacing


def _estimates_with_errors(rules: list[QuadratureRule], scale: float, P: int, eps: float) -> tuple[list[float], list[float]]:
    """The estimates (5), as `_estimates` orders them, and their standard errors.

    By the jackknife: leaving one probe out tells the spread of a ratio as well as that of a mean.
    """
    unit = scale if scale > 0 else 1.0
    moments = torch.stack([rule.moments(unit, eps) for rule in rules])  # (n, 6)
    n = len(rules)
    estimates = _estimates(moments.mean(0), unit, P)
    others = _estimates((moments.sum(0) - moments) / (n - 1), unit, P)  # (n, 5)
    errors = ((n - 1) * others.var(0, correction=0)).sqrt()
    return estimates.tolist(), errors.tolist()


def _estimates(moments: Tensor, unit: float, P: int) -> Tensor:
    """(..., 5) trace, Frobenius norm, negative mass, negative fraction and effective rank, from moments (..., 6).

    The entropy that the rank is the exponential of is `log S - sum |x| log |x| / S` with `S = sum |x|`.
    """
    mean, square, size, negative, below, logarithm = moments.unbind(-1)
    divisor = torch.where(size > 0, size, 1.0)
    rank = P * size * (-logarithm / divisor).exp()
    return torch.stack([P * unit * mean, unit * (P * square).sqrt(), negative / divisor, below, rank], dim=-1)


def _check(operator: Operator, num_probes: int, num_steps: int, num_grid: int, deflate: Eigenpairs | None) -> None:
    check_quadrature(num_probes=num_probes, num_steps=num_steps)
    check_positive("num_grid", num_grid)
    if num_grid < _LEAST_GRID:
        raise ConfigurationError(f"`num_grid` must be at least {_LEAST_GRID}, got {num_grid}.")
    if deflate is None:
        return
    if deflate.eigenvectors is None:
        raise ConfigurationError("`deflate` must hold eigenvectors, got None: solve with `return_eigenvectors=True`.")
    length, P = len(deflate.eigenvectors), operator.shape[0]
    if length != P:
        raise ConfigurationError(f"`deflate` must hold eigenvectors of length {P}, got {length}: solve for this operator.")


def check_quadrature(*, num_probes: int, num_steps: int) -> None:
    """Raise a `ConfigurationError` unless a run can have these."""
    check_positive("num_probes", num_probes)
    check_positive("num_steps", num_steps)
    if num_probes < _LEAST_PROBES:
        raise ConfigurationError(
            f"`num_probes` must be at least {_LEAST_PROBES}, got {num_probes}: a standard error needs two."
        )
