"""Operations: what an operation does with a parameter, and what K-FAC can make of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, slots=True)
class Operation:
    """What an operation does with one of its parameters; the rule that makes a tap says it, but for the other parameters.

    Attributes:
        name: as messages and records quote it.
        has_factors: whether `A x G` approximates the parameter's Fisher block: it is the weight of a layer, and its uses give
            the layer's inputs and output gradients.
        transposed: whether the weight is stored as (d_in, d_out) rather than (d_out, d_in).
        is_bias: whether the parameter is the bias of a layer, which has no factors of its own: it extends the weight by a
            last column.
        bias: of a weight that is a parameter itself: the trained bias that the layer adds; None where it adds none.
        weights: of a bias: the trained parameters that the layer's weight is, or is computed from (a parametrised weight).
    """

    name: str
    has_factors: bool = False
    transposed: bool = False
    is_bias: bool = False
    bias: str | None = None
    weights: tuple[str, ...] = ()

    def on(self, what: str) -> "Operation":
        """The same operation on `what` in place of the parameter itself; K-FAC can make nothing of that."""
        return Operation(f"{self.name} of {what}")


def is_layer_bias(operations: Sequence[Operation]) -> bool:
    """Whether a parameter with these uses is a bias and nothing else."""
    return bool(operations) and all(operation.is_bias for operation in operations)


def coverage_obstacle(name: str, operations: Mapping[str, Sequence[Operation]]) -> str | None:
    """Why a parameter is in no layer with Kronecker factors, or None where it is in one.

    A bias is in the layers of its weights; where these are not trained it is a layer of its own.
    """
    used = operations.get(name, ())
    if not is_layer_bias(used):
        return factor_obstacle(used)
    for weight in dict.fromkeys(weight for operation in used for weight in operation.weights):
        obstacle = factor_obstacle(operations[weight])
        if obstacle is not None:
            return f"bias of `{weight}`, {obstacle}"
    return None


def factor_obstacle(operations: Sequence[Operation]) -> str | None:
    """Why a weight with these uses has no Kronecker factors, or None where it has."""
    names = sorted({operation.name for operation in operations})
    if not names:
        return "not used by the loss"
    if len(names) > 1:
        return f"shared between {' and '.join(names)}: a sum of Kronecker products is not one"
    covered = all(operation.has_factors for operation in operations)
    return None if covered else f"used by {names[0]}, which has no Kronecker factors"
