"""K-FAC and EKFAC as operators on flat vectors, and their eigenpairs, both from the factors' eigenbases."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from curvature_callbacks.errors import ConfigurationError, ProbeError, RefusedError
from curvature_callbacks.linalg.accumulate import norm
from curvature_callbacks.linalg.direct import NullVectors, direct_eigenpairs
from curvature_callbacks.linalg.eigenpairs import Eigenpairs, noise_floor
from curvature_callbacks.linalg.kronecker import LayerKronecker
from curvature_callbacks.linalg.kronecker_pairs import outer_pairs
from curvature_callbacks.linalg.lanczos.options import LanczosOptions
from curvature_callbacks.linalg.lanczos.wanted import Wanted
from curvature_callbacks.operators.capabilities import SelfCheck

_NULL_PASSES: Final = 2  # projections of a null vector; the second mends a random vector that lies almost in the range


@final
class KFACOperator:
    """K-FAC's block-diagonal approximation of a Fisher, `A x G` for each layer, or EKFAC's in the same eigenbasis.

    On the matrix V (d_out, d_in) of a layer: `U_G (S * (U_G' V U_A)) U_A'`, with `S_jk = mu_j lambda_k` for K-FAC and EKFAC's
    corrected eigenvalues for EKFAC; zero outside the ranks of the factors. Normalisation, Fisher type and how positions
    enter are those of the factors. Vectors span the covered parameters only, in the order of `parameters`: what has no factors
    is absent, not a block of zeros or of ones.

    Args:
        layers: the factors; layers with no parameter in `parameters` are left out.
        parameters: name to parameter (its shape, dtype and device are used) in the order of the flat vectors.
        corrected: EKFAC rather than K-FAC.

    Attributes:
        names: the covered parameters.
        uncovered: the parameters without factors.
        shape: `(P, P)`, P the elements of the covered parameters.

    Raises:
        RefusedError: no parameter is covered.
        ConfigurationError: `parameters` has the weight of a layer without its bias, or the reverse: `A x G` has no block of
            this form.
        ProbeError: factors that are not finite.

    Cost of a product: `4 d_in d_out (r_A + r_G)` operations a layer, no gradient. Memory: the factors' bases, and three
    matrices (d_out, d_in) a column.
    """

    is_psd = True

    def __init__(self, layers: Iterable[LayerKronecker], parameters: Mapping[str, Tensor], *, corrected: bool = False) -> None:
        chosen = [layer for layer in layers if any(name in parameters for name in layer.members)]
        _check_layers(chosen, parameters)
        covered = {name for layer in chosen for name in layer.members}
        self.names = tuple(name for name in parameters if name in covered)
        self.uncovered = tuple(name for name in parameters if name not in covered)
        self.corrected = corrected
        first = parameters[self.names[0]]
        self.dtype, self.device = first.dtype, first.device
        parts = _parts(self.names, parameters)
        self.shape = (parts[self.names[-1]].stop, parts[self.names[-1]].stop)
        self._layers = [_Layer(layer, parts, parameters[layer.weight], corrected=corrected) for layer in chosen]

    def self_check(self, seed: int) -> SelfCheck:
        """Nothing to check: its products are those of matrices, and nothing is differentiated."""
        return SelfCheck(0.0, 0)

    def matmat(self, V: Tensor) -> Tensor:
        """`A V` for `V` (P, K), all columns at once."""
        return self._mapped(V, scaled=True)

    def projected(self, V: Tensor) -> Tensor:
        """The part of `V` (P, K) within the ranks of the factors; the rest has eigenvalue zero. Cost: one product."""
        return self._mapped(V, scaled=False)

    def _mapped(self, V: Tensor, *, scaled: bool) -> Tensor:
        result = torch.empty_like(V, memory_format=torch.contiguous_format)
        for layer in self._layers:
            coordinates = layer.rotated(V)
            layer.write(layer.restored(coordinates * layer.spectrum if scaled else coordinates), result)
        return result

    def eigenpairs(self, options: LanczosOptions, *, initial_vectors: Tensor | None = None) -> Eigenpairs:
        """The `k` outer eigenpairs, exact up to the factors' own eigensolves, with true residuals; no Krylov space.

        Eigenvalues by a search over the products of those of the factors, eigenvectors `u_G x u_A`. All other directions have
        eigenvalue zero; a wanted zero is reported with a vector of the null space, found by projection. So the ends are those
        of the P x P matrix, as from `lanczos`: ask for `LA` to spend all k on the top.

        Args:
            options: at most P of `k` pairs are returned; of the ends `LM` is the largest here; a pair has converged when its
                residual is at most `max(tol theta, 10 eps lambda_max)`; `seed` is that of the start vectors in the null space.
            initial_vectors: not needed.

        Returns:
            The pairs, eigenvalues descending; `reorth_mode` is `kronecker`, `asymmetry` zero by construction.

        Cost: one product a pair, two more for a zero. Memory: k vectors of size P.
        """
        start = time.perf_counter()
        search = _KroneckerSearch(self._layers, self, options.seed)
        return direct_eigenpairs(search, options, solver="kronecker", start=start)


@final
class _Layer:
    """The factors of one layer and the parts of a flat vector that belong to its parameters."""

    def __init__(self, layer: LayerKronecker, parts: Mapping[str, slice], weight: Tensor, *, corrected: bool) -> None:
        self._weight = parts[layer.weight]
        self._bias = None if layer.bias is None else parts[layer.bias]
        self._stored = (weight.shape[0], weight.numel() // weight.shape[0])
        self._transposed = layer.transposed
        d_out, d_in = reversed(self._stored) if layer.transposed else self._stored
        self._d_out, self._d_in = d_out, d_in + (self._bias is not None)
        self.A, self.G = (factor.to(weight.device, weight.dtype) for factor in (layer.factors.A, layer.factors.G))
        for factor, size in ((self.A, self._d_in), (self.G, self._d_out)):
            assert factor.basis is None or len(factor.basis) == size, f"factors of `{layer.weight}` have another layout"
        self.factors, self.corrected = layer.factors, corrected
        spectrum = layer.factors.corrected if corrected else torch.outer(self.G.eigenvalues, self.A.eigenvalues)
        assert spectrum is not None
        self.spectrum = spectrum.to(weight)  # (r_G, r_A)

    def rotated(self, V: Tensor) -> Tensor:
        """Coordinates (K, r_G, r_A) in the eigenbasis of the layer's part of `V` (P, K)."""
        matrices = V[self._weight].T.reshape(-1, *self._stored)
        matrices = matrices.mT if self._transposed else matrices  # (K, d_out, d_in)
        if self._bias is not None:
            matrices = torch.cat([matrices, V[self._bias].T[..., None]], dim=2)
        return self.G.rotated(self.A.rotated(matrices).mT).mT

    def restored(self, coordinates: Tensor) -> Tensor:
        """Matrices (K, d_out, d_in) from coordinates."""
        return self.A.restored(self.G.restored(coordinates.mT, self._d_out).mT, self._d_in)

    def write(self, matrices: Tensor, out: Tensor) -> None:
        """Put matrices (K, d_out, d_in) into the layer's part of `out` (P, K)."""
        if self._bias is not None:
            out[self._bias] = matrices[..., -1].T
            matrices = matrices[..., :-1]
        out[self._weight] = (matrices.mT if self._transposed else matrices).flatten(1).T

    def write_eigenvector(self, j: int, i: int, out: Tensor) -> None:
        """`u_G x u_A` of eigenvectors j of G and i of A, into the layer's part of `out` (P, 1)."""
        coordinates = self.spectrum.new_zeros(1, *self.spectrum.shape)
        coordinates[0, j, i] = 1.0
        self.write(self.restored(coordinates), out)


@final
@dataclass(frozen=True, slots=True)
class _Pair:
    """An eigenvalue and what its vector is made of; `layer` is -1 for a zero outside the factors' ranks."""

    value: float
    layer: int = -1
    output: int = -1
    input: int = -1


@final
class _KroneckerSearch:
    """Outer eigenpairs of the block-diagonal matrix from those of its layers."""

    asymmetry = 0.0

    def __init__(self, layers: list[_Layer], operator: KFACOperator, seed: int) -> None:
        self._layers, self._operator = layers, operator
        self._null = NullVectors(operator, seed)
        self.dimension = operator.shape[0]
        self._num_zeros = self.dimension - sum(layer.spectrum.numel() for layer in layers)
        self.scale = max((pair.value for pair in self._outer(1, largest=True)), default=0.0)
        self.floor = noise_floor(operator.dtype, self.scale)
        self.num_matvecs = 0

    def solve(self, ends: Wanted, tol: float) -> tuple[Tensor, Tensor, Tensor]:
        chosen = self._choose(ends)
        num_images = sum(pair.layer >= 0 for pair in chosen)  # null vectors come last
        vectors = torch.zeros(len(chosen), self.dimension, dtype=self._operator.dtype, device=self._operator.device)  # (k, P)
        residuals = []
        for i, pair in enumerate(chosen):
            if pair.layer < 0:
                vectors[i] = self._null_vector(vectors[num_images:i])
            else:
                self._layers[pair.layer].write_eigenvector(pair.output, pair.input, vectors[i, :, None])
            self.num_matvecs += 1
            v = vectors[i]
            residuals.append(norm(self._operator.matmat(v[:, None])[:, 0] - pair.value * v))
        return torch.tensor([pair.value for pair in chosen], dtype=torch.float64), vectors, torch.stack(residuals).cpu()

    def _choose(self, ends: Wanted) -> list[_Pair]:
        """The wanted ones of the P eigenvalues, descending."""
        best = self._outer(ends.upper, largest=True)
        zeros = min(ends.count - len(best), self._num_zeros)
        # Among equal eigenvalues both searches may meet the same pair.
        missing = ends.count - len(best) - zeros
        smallest = [pair for pair in self._outer(missing + len(best), largest=False) if pair not in best][:missing]
        return [*best, *reversed(smallest), *[_Pair(0.0)] * zeros]

    def _outer(self, count: int, *, largest: bool) -> list[_Pair]:
        outermost = []
        for index, layer in enumerate(self._layers):
            pairs = outer_pairs(layer.factors, count, corrected=layer.corrected, largest=largest)
            listed = zip(*(part.tolist() for part in (pairs.eigenvalues, pairs.outputs, pairs.inputs)), strict=True)
            outermost += [_Pair(value, index, output, input) for value, output, input in listed]
        return sorted(outermost, key=lambda pair: pair.value, reverse=largest)[:count]

    def _null_vector(self, before: Tensor) -> Tensor:
        """A unit vector (P,) outside the ranges of all layers, orthogonal to the null vectors `before` (n, P)."""
        v = self._null.draw()
        for _ in range(_NULL_PASSES):
            v -= self._operator.projected(v[:, None])[:, 0]
            self.num_matvecs += 1
            self._null.normalise(v, before, passes=1)
        return v


def _check_layers(layers: list[LayerKronecker], parameters: Mapping[str, Tensor]) -> None:
    if not layers:
        raise RefusedError(
            f"none of the {len(parameters)} parameters is in a layer with Kronecker factors: measure others, or ask for "
            "another operator."
        )
    for layer in layers:
        missing = [name for name in layer.members if name not in parameters]
        if missing:
            raise ConfigurationError(
                f"`parameters` must hold both the weight and the bias of a layer, got {' and '.join(layer.members)} without "
                f"{missing[0]}: choose blocks or a `params_filter` that keep them together."
            )
        if not layer.factors.A.eigenvalues.isfinite().all() or not layer.factors.G.eigenvalues.isfinite().all():
            raise ProbeError(f"the Kronecker factors of `{layer.weight}` are not finite at this probe.")


def _parts(names: Iterable[str], parameters: Mapping[str, Tensor]) -> dict[str, slice]:
    """Name to its part of a flat vector."""
    parts, stop = {}, 0
    for name in names:
        start, stop = stop, stop + parameters[name].numel()
        parts[name] = slice(start, stop)
    return parts
