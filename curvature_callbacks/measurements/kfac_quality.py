"""K-FAC quality: how near `A x G` is to the Fisher block of each layer, and EKFAC in the same eigenbasis."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, final, get_args

from curvature_callbacks.batches import dtype_name
from curvature_callbacks.errors import ProbeError, RefusedError, check_choice, check_positive
from curvature_callbacks.linalg.accumulate import finite_samples
from curvature_callbacks.linalg.kronecker import LayerKronecker
from curvature_callbacks.linalg.kronecker_pairs import outer_pairs
from curvature_callbacks.measurements.kfac_coverage import uncovered_parameters
from curvature_callbacks.model.loss.fisher_type import Fisher, FisherType, SampleUnit
from curvature_callbacks.model.loss.sharing import Sharing
from curvature_callbacks.problem.problem import Problem
from curvature_callbacks.record import Record
from curvature_callbacks.statistics.kronecker_quality import Approximation, approximation, block_diagonal, kronecker_metrics
from curvature_callbacks.statistics.spectrum import rank_cut

_HEADLINE: Final = ("kfac_cosine", "relative_error", "ekfac_cosine")
_CURVES: Final = ("kfac_cosine",)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class KFACQuality:
    """How well Kronecker factors stand for the Fisher, layer by layer, by inner products that need nothing P x P.

    F is a layer's Fisher block, `(1/Z) sum_s g_s g_s'` over the pseudo-samples of the chosen type; a layer is a weight with its
    bias. `K = A x G` from inputs and output gradients (formulas: `gram.kronecker.factors`), `E = U diag(c) U'` EKFAC, the best
    matrix with K's eigenvectors. `<m>` is the measurement's name, `kfac_<fisher>[_token]_<sharing>`.

    | tag | meaning | range | high (low) means |
    | --- | --- | --- | --- |
    | `curvature/<m>_kfac_cosine` | `<F, K> / (norm(F) norm(K))`, F and K block diagonal over all layers | 0..1 | right shape |
    | `curvature/<m>_relative_error` | `norm(F - K) / norm(F)` of the same | >= 0 | (0) exact; above 1: worse than nothing |
    | `curvature/<m>_ekfac_cosine` | the same cosine for E | `kfac_cosine`..1 | the eigenvectors are right |
    | `curvature_<m>/ekfac_relative_error` | `norm(F - E) / norm(F)` | 0..`relative_error` | wrong eigenvectors (0: exact) |
    | `curvature_<m>/product_{lambda_max,trace}` | largest eigenvalue and trace of K | >= 0 | |
    | `curvature_<m>_kfac_cosine/<b>` | of a layer | 0..1 | right shape |
    | `curvature_<m>_over_blocks/<metric>_{min,median,max}` | the others of single layers, over layers | | |

    The first three over all layers weigh each layer by its `norm(F)`. Metrics of a layer: `kfac_cosine`, `relative_error`,
    `ekfac_cosine`, `ekfac_relative_error`; `fisher_norm = norm(F)`; `input_condition_number`, `input_effective_rank` of A,
    `output_condition_number`, `output_effective_rank` of G (eigenvalues above `N eps` times the largest; high condition: the
    damping decides; effective rank at most the number of positions) and `product_condition_number`, `product_effective_rank`,
    `product_lambda_max`, `product_trace`, `product_frobenius_norm` of K. Arrays: the k largest eigenvalues of K and of E.

    A high cosine with a high error is a wrong scale, which a learning rate mends; a low `kfac_cosine` under a high
    `ekfac_cosine` is wrong eigenvalues, which EKFAC mends; a low `ekfac_cosine` neither. F has rank N at most: with few
    samples both cosines are low for any K of high rank. Errors below 1e-3 are rounding for a float32 model. What is nan
    (a layer without gradient) is in the JSON lines only.

    Args:
        sharing: how positions that share the weight enter: `expand` (each on its own) or `reduce` (their mean and sum).
        fisher: `empirical`, `sampled` (what K-FAC is meant for) or `exact`.
        sample_unit: `sequence` or `token`, see `FisherType`.
        num_draws: label draws per sample, for `sampled`.
        num_targets: targets per row, for `token`.
        k: eigenvalues kept for each layer, and for all layers together.

    Cost: the passes of the Fisher type (see `surrogates`), and for each layer `2 n (d_in^2 + d_out^2 + d_in d_out)` operations
    a pass over n positions and two eigensolves of at most d_in and d_out (seconds on a CPU for d = 2048: measure rarely).
    Memory: the factors of all layers, and as many float64 numbers as they have parameters.
    """

    sharing: Sharing = "expand"
    fisher: Fisher = "empirical"
    sample_unit: SampleUnit = "sequence"
    num_draws: int = 1
    num_targets: int = 8
    k: int = 10

    def __post_init__(self) -> None:
        check_choice("sharing", self.sharing, get_args(Sharing))
        check_positive("k", self.k)
        _ = self.fisher_type  # which checks its options

    @property
    def name(self) -> str:
        """`kfac_<fisher>[_token]_<sharing>`, how its tags begin."""
        unit = "_token" if self.sample_unit == "token" else ""
        return f"kfac_{self.fisher}{unit}_{self.sharing}"

    def init(self, problem: Problem) -> None:
        """None: nothing is carried from probe to probe."""

    def measure(self, problem: Problem, state: None) -> tuple[list[Record], None]:
        """One record of all layers together, and one a layer."""
        layers = problem.grams.kronecker(self.fisher_type, sharing=self.sharing)
        if not layers and not finite_samples(problem.grams(self.fisher_type).grams).any():
            raise ProbeError("no row of this probe has a finite gradient.")
        if not layers:
            raise RefusedError("no trainable layer has Kronecker factors: see KFACCoverage for the reasons.")
        named = {_layer_name(layer.weight): layer for layer in layers.values()}
        quality = {name: _quality(layer) for name, layer in named.items()}
        records = [self._of_layer(problem, name, layer, quality[name]) for name, layer in named.items()]
        return [self._model_wide(problem, named, block_diagonal(quality.values()), records), *records], None

    @property
    def fisher_type(self) -> FisherType:
        """The Fisher the factors stand for."""
        return FisherType(
            fisher=self.fisher, sample_unit=self.sample_unit, num_draws=self.num_draws, num_targets=self.num_targets
        )

    def _of_layer(self, problem: Problem, name: str, layer: LayerKronecker, quality: Approximation) -> Record:
        metrics = kronecker_metrics(layer.factors, rank_cut=rank_cut(len(layer.gram), problem.objective.dtype))
        prefixed = {
            metric if metric.startswith(("input_", "output_")) else f"product_{metric}": value
            for metric, value in metrics.items()
        }
        return Record(
            step=problem.step,
            measurement=self.name,
            block=name,
            scalars={**_quality_scalars(quality), "fisher_norm": quality.fisher_squared**0.5, **prefixed},
            curves=_CURVES,
            arrays={
                "product_eigenvalues": outer_pairs(layer.factors, self.k).eigenvalues.tolist(),
                "corrected_eigenvalues": outer_pairs(layer.factors, self.k, corrected=True).eigenvalues.tolist(),
            },
            charts={},  # the largest few are no spectrum
        )

    def _model_wide(
        self, problem: Problem, layers: Mapping[str, LayerKronecker], quality: Approximation, records: list[Record]
    ) -> Record:
        arrays = {
            key: sorted((value for record in records for value in record.arrays[key]), reverse=True)[: self.k]
            for key in records[0].arrays
        }
        scalars = _quality_scalars(quality)
        if arrays["product_eigenvalues"]:
            scalars["product_lambda_max"] = arrays["product_eigenvalues"][0]
            scalars["product_trace"] = sum(record.scalars.get("product_trace", 0.0) for record in records)
        return Record(
            step=problem.step,
            measurement=self.name,
            scalars=scalars,
            headline=_HEADLINE,
            arrays=arrays,
            charts={},
            metadata=self._metadata(problem, layers),
        )

    def _metadata(self, problem: Problem, layers: Mapping[str, LayerKronecker]) -> dict[str, Any]:
        first = next(iter(layers.values()))
        return {
            "fisher": self.fisher,
            "sample_unit": self.sample_unit,
            "num_draws": self.num_draws,
            "num_targets": self.num_targets,
            "sharing": self.sharing,
            "centered": False,
            "batch_norm": "eval",
            "dtype": dtype_name(problem.objective.dtype),
            "seed": problem.seed,
            "num_samples": len(first.gram),
            "normaliser": first.normaliser,
            "layers": {name: [layer.weight, *([layer.bias] if layer.bias else [])] for name, layer in layers.items()},
            "uncovered": uncovered_parameters(problem),
        }


def _quality(layer: LayerKronecker) -> Approximation:
    if not layer.gram.isfinite().all():
        raise ProbeError(f"the gradients of `{layer.weight}` are not finite at this probe.")
    return approximation(layer.factors, layer.gram, normaliser=layer.normaliser)


def _quality_scalars(quality: Approximation) -> dict[str, float]:
    return {
        "kfac_cosine": quality.kfac_cosine,
        "relative_error": quality.kfac_relative_error,
        "ekfac_cosine": quality.ekfac_cosine,
        "ekfac_relative_error": quality.ekfac_relative_error,
    }


def _layer_name(weight: str) -> str:
    """Module path of the layer; the parameter's own name where a module has several weights."""
    module, _, attribute = weight.rpartition(".")
    return module if module and attribute == "weight" else weight
