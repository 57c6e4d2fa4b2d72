"""Collect: what becomes of a parameter's uses once all passes have them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from curvature_callbacks.gram.capture.derived import Placed
from curvature_callbacks.gram.kronecker.factors import kronecker_factors
from curvature_callbacks.gram.kronecker.positions import MicrobatchUses
from curvature_callbacks.gram.passes import Passed
from curvature_callbacks.gram.products.parameter_gram import parameter_gram
from curvature_callbacks.gram.products.scratch import Scratch
from curvature_callbacks.gram.uses.operation import factor_obstacle, is_layer_bias
from curvature_callbacks.gram.uses.uses import Use
from curvature_callbacks.linalg.kronecker import KroneckerFactors, LayerKronecker
from curvature_callbacks.model.loss.fisher_type import FisherType
from curvature_callbacks.model.loss.sharing import Sharing


@final
@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What is known of a parameter once all passes have its uses.

    Attributes:
        gram: (S, S); None where it would take too much memory.
        partial: whether it counts some rows of the parameter only.
        factors: Kronecker factors of its layer, where it is a weight that has them and they are wanted.
    """

    gram: Tensor | None
    partial: bool
    factors: KroneckerFactors | None


@final
class Collector:
    """Takes each parameter's uses as they are completed and keeps its Gram, and its layer's Kronecker factors if asked.

    Args:
        passed: filled by the passes; holds what is known when the last backward pass begins.
        rows: parameter to the rows that are counted, where not all are.
        kind: type of Fisher.
        sharing: how positions enter Kronecker factors; None for no factors.
        scratch: memory to work in.

    Attributes:
        grams: parameter to its (S, S) Gram.
        counted: parameter to the rows that its Gram counts, where not all.
    """

    def __init__(
        self, passed: Passed, rows: Mapping[str, Tensor], kind: FisherType, sharing: Sharing | None, scratch: Scratch
    ) -> None:
        self._passed = passed
        self._rows = rows
        self._kind = kind
        self._sharing = sharing
        self._scratch = scratch
        self._factors: dict[str, KroneckerFactors] = {}
        self.grams: dict[str, Tensor] = {}
        self.counted: dict[str, Tensor] = {}

    def consume(self, name: str, passes: list[list[Placed]]) -> None:
        """`take` what is `found` of one parameter; its uses are not needed afterwards."""
        self.take(name, self.found(name, passes))

    def found(self, name: str, passes: list[list[Placed]]) -> "Found":
        """Compute what is wanted of one parameter, without gradients."""
        rows = self._rows.get(name) if all(one.view.whole for found in passes for one in found) else None
        gram = parameter_gram(passes, self._passed.sizes, self._scratch, rows=rows)
        factors = None
        if gram is not None and self._sharing is not None and self._has_factors(name, passes):
            uses = [[one.use for one in found] for found in passes]
            bias = self._bias(name) is not None
            factors = kronecker_factors(self._by_microbatch(uses), bias=bias, sharing=self._sharing, device=gram.device)
        return Found(gram, rows is not None, factors)

    def take(self, name: str, found: "Found") -> None:
        """Keep what was found of one parameter, here or by another process."""
        if found.gram is None:
            self._passed.unruled[name] = "views of it overlap"
            return
        self.grams[name] = found.gram
        if found.partial:
            self.counted[name] = self._rows[name]
        if found.factors is not None:
            self._factors[name] = found.factors

    def kronecker(self, grams: Mapping[str, Tensor]) -> dict[str, LayerKronecker]:
        """Weight to the factors of its layer, with the Gram of weight and bias."""
        if not self._factors:
            return {}
        normaliser = sum(float(counts.sum()) for counts in self._counts())
        return {
            name: LayerKronecker(
                factors=factors,
                gram=grams[name] if (bias := self._bias(name)) is None else grams[name] + grams[bias].to(grams[name].device),
                weight=name,
                bias=bias,
                transposed=self._passed.operations[name][0].transposed,
                normaliser=normaliser,
            )
            for name, factors in self._factors.items()
        }

    def _has_factors(self, name: str, passes: Sequence[Sequence[Placed]]) -> bool:
        placed = [one for found in passes for one in found]
        operations = [one.use.operation for one in placed]
        return (
            len(self._passed.biases.get(name, ())) == 1
            and factor_obstacle(operations) is None
            and all(one.view.whole for one in placed)
        )

    def _bias(self, name: str) -> str | None:
        """The trained bias of the weight's only layer."""
        (bias,) = self._passed.biases[name]
        return bias if bias is not None and is_layer_bias(self._passed.operations.get(bias, ())) else None

    def _by_microbatch(self, passes: Sequence[Sequence[Use]]) -> list[MicrobatchUses]:
        found, start = [], 0
        for number, counts in zip(self._passed.num_passes, self._counts(), strict=True):
            found.append(MicrobatchUses(passes=passes[start : start + number], counts=counts))
            start += number
        return found

    def _counts(self) -> list[Tensor]:
        """For each microbatch (rows,) pseudo-samples a row stands for in the Fisher's normaliser."""
        unit = self._kind.sample_unit
        return [
            (targets if unit == "token" else (targets > 0)).double() * self._kind.num_draws
            for targets in self._passed.num_targets
        ]
