"""Operations: what an operation does with a parameter, and what K-FAC can make of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final


@final
@dataclass(frozen=True, slots=True)
class Operation:
    """What an operation does with one of its parameters; the rule that makes a tap says it.

    Attributes:
        name: as messages and records quote it.
        has_factors: whether `A x G` approximates the parameter's Fisher block: it is the weight of a layer, and its uses give
            the layer's inputs and output gradients.
        transposed: whether the weight is stored as (d_in, d_out) rather than (d_out, d_in).
        is_bias: whether the parameter is the bias of a layer, which has no factors of its own: it extends the weight by a
            last column.
    """

    name: str
    has_factors: bool = False
    transposed: bool = False
    is_bias: bool = False

    def on(self, what: str) -> "Operation":
        """The same operation on `what` in place of the parameter itself; K-FAC can make nothing of that."""
        return Operation(f"{self.name} of {what}")


def is_layer_bias(operations: Sequence[Operation]) -> bool:
    """Whether a parameter with these uses is a bias and nothing else."""
    return bool(operations) and all(operation.is_bias for operation in operations)


def factor_obstacle(operations: Sequence[Operation]) -> str | None:
    """Why a weight with these uses has no Kronecker factors, or None where it has."""
    names = sorted({operation.name for operation in operations})
    if not names:
        return "not used by the loss"
    if len(names) > 1:
        return f"shared between {' and '.join(names)}: a sum of Kronecker products is not one"
    covered = all(operation.has_factors for operation in operations)
    return None if covered else f"used by {names[0]}, which has no Kronecker factors"
