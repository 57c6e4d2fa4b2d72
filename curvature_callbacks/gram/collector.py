"""Collector: turns the captured uses of each parameter into its Gram and, if asked, its layer's Kronecker factors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from curvature_callbacks.gram.capture.derived import Placed
from curvature_callbacks.gram.context import GramContext, GramOptions
from curvature_callbacks.gram.kronecker.factors import kronecker_factors
from curvature_callbacks.gram.kronecker.positions import MicrobatchUses
from curvature_callbacks.gram.passed import Observed
from curvature_callbacks.gram.products.parameter_gram import parameter_gram
from curvature_callbacks.gram.uses.operation import factor_obstacle, is_layer_bias
from curvature_callbacks.gram.uses.uses import Use
from curvature_callbacks.linalg.kronecker import KroneckerFactors, LayerKronecker


@final
@dataclass(frozen=True, slots=True, eq=False)
class ParameterResult:
    """What the uses of one parameter in all passes give.

    Attributes:
        gram: (S, S); None where it would take too much memory.
        is_subsampled: whether it counts the chosen slices of the parameter only.
        factors: Kronecker factors of its layer, where it is a weight that has them and they are wanted.
    """

    gram: Tensor | None
    is_subsampled: bool
    factors: KroneckerFactors | None


@final
class Collector:
    """Holds the Grams and factors of the parameters that are complete.

    Args:
        context: memory of the run.
        options: which Grams and factors.
        slices: parameter to the slices of its first axis that are counted, where not all are.

    Attributes:
        without_gram: parameter to why its complete uses gave no Gram.
    """

    def __init__(self, context: GramContext, options: GramOptions, slices: Mapping[str, Tensor]) -> None:
        self._scratch = context.memory.scratch
        self._options = options
        self._slices = slices
        self._results: dict[str, ParameterResult] = {}
        self.without_gram: dict[str, str] = {}

    @property
    def grams(self) -> dict[str, Tensor]:
        """Parameter to its Gram, (S, S) float64, of the parameters with a rule."""
        return {name: result.gram for name, result in self._results.items() if result.gram is not None}

    @property
    def counted_slices(self) -> dict[str, Tensor]:
        """Parameter to the slices that its Gram counts, scaled up to all, where these are not all."""
        return {name: self._slices[name] for name, result in self._results.items() if result.is_subsampled}

    def consume(self, name: str, passes: Sequence[Sequence[Placed]], observed: Observed) -> None:
        """Compute and keep the Gram of one parameter; its captured inputs can be freed."""
        self.add(name, self.computed(name, passes, observed))

    def computed(self, name: str, passes: Sequence[Sequence[Placed]], observed: Observed) -> ParameterResult:
        """The Gram of one parameter, and its layer's factors; call it without gradients.

        Args:
            name: the parameter.
            passes: its uses in every pass.
            observed: the same passes.
        """
        slices = self._slices.get(name) if all(placed.view.is_parameter for uses in passes for placed in uses) else None
        gram = parameter_gram(passes, observed.sizes, self._scratch, chosen=slices)
        sharing, factors = self._options.sharing, None
        if gram is not None and sharing is not None and _has_factors(name, passes, observed):
            uses = self._by_microbatch(passes, observed)
            factors = kronecker_factors(uses, bias=_bias(name, observed) is not None, sharing=sharing, device=gram.device)
        return ParameterResult(gram, slices is not None, factors)

    def add(self, name: str, result: ParameterResult) -> None:
        """Keep the result of one parameter, computed here or by another process."""
        if result.gram is None:
            self.without_gram[name] = "views of it overlap"
        else:
            self._results[name] = result

    def kronecker(self, grams: Mapping[str, Tensor], observed: Observed) -> dict[str, LayerKronecker]:
        """Weight to the factors of its layer, with the Gram of weight and bias."""
        layers = {name: result.factors for name, result in self._results.items() if result.factors is not None}
        if not layers:
            return {}
        normaliser = sum(float(counts.sum()) for counts in self._counts(observed))
        return {
            name: LayerKronecker(
                factors=factors,
                gram=grams[name]
                if (bias := _bias(name, observed)) is None
                else grams[name] + grams[bias].to(grams[name].device),
                weight=name,
                bias=bias,
                transposed=observed.operations[name][0].transposed,
                normaliser=normaliser,
            )
            for name, factors in layers.items()
        }

    def _by_microbatch(self, passes: Sequence[Sequence[Placed]], observed: Observed) -> list[MicrobatchUses]:
        microbatches, start = [], 0
        for number, counts in zip(observed.num_passes, self._counts(observed), strict=True):
            uses: list[list[Use]] = [[placed.use for placed in of_pass] for of_pass in passes[start : start + number]]
            microbatches.append(MicrobatchUses(passes=uses, counts=counts))
            start += number
        return microbatches

    def _counts(self, observed: Observed) -> list[Tensor]:
        """For each microbatch (rows,) pseudo-samples a row stands for in the Fisher's normaliser."""
        fisher_type = self._options.fisher_type
        return [
            (targets if fisher_type.sample_unit == "token" else (targets > 0)).double() * fisher_type.num_draws
            for targets in observed.num_targets
        ]


def _has_factors(name: str, passes: Sequence[Sequence[Placed]], observed: Observed) -> bool:
    uses = [placed for of_pass in passes for placed in of_pass]
    return (
        len(_added_biases(name, observed)) == 1
        and factor_obstacle([placed.use.operation for placed in uses]) is None
        and all(placed.view.is_parameter for placed in uses)
    )


def _bias(name: str, observed: Observed) -> str | None:
    """The trained bias of the weight's only layer."""
    (bias,) = _added_biases(name, observed)
    return bias if bias is not None and is_layer_bias(observed.operations.get(bias, ())) else None


def _added_biases(name: str, observed: Observed) -> set[str | None]:
    """The biases that the layers of a weight add, None for one without."""
    return {operation.bias for operation in observed.operations.get(name, ()) if operation.has_factors}
