"""Random draws of single rows: those that they have in the draw of their batch."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from curvature_callbacks.errors import RefusedError
from curvature_callbacks.library_internals.tensors import argument_of, dispatch_mode, written_arguments

Shape = tuple[int, ...]
Given = Shape | int


@final
@dataclass(frozen=True, slots=True)
class Draw:
    """One operation that drew random numbers in a forward pass.

    Attributes:
        operation: its name.
        given: shapes of its tensors and lists, and its numbers, in the order of its arguments.
    """

    operation: str
    given: tuple[Given, ...]


@final
@dataclass(slots=True)
class DrawsOfBatch:
    """The operations that drew random numbers in one forward pass over a batch, in their order."""

    num_rows: int
    draws: list[Draw] = field(default_factory=list)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Notes what is drawn inside. Cost: some microseconds an operation."""

        def note(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
            if _is_random(operation, args, kwargs):
                given = (_given(leaf) for leaf in _leaves(args, kwargs)[0])
                self.draws.append(Draw(str(operation), tuple(value for value in given if value is not None)))
            return operation(*args, **kwargs)

        with dispatch_mode(note):
            yield

    @contextmanager
    def of_rows(self, rows: Tensor) -> Iterator[None]:
        """Inside, a pass over these rows alone draws what they had in the batch, where generators begin at the same seed.

        Each operation draws for the whole batch, as it did there, and the rows are taken of that. An operation whose shapes do
        not depend on the rows is one of the batch, and draws the same again.

        Raises:
            RefusedError: by the operations, where they are not those of the batch or their numbers do not belong to rows.
        """
        noted = iter(self.draws)

        def draw(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
            if not _is_random(operation, args, kwargs):
                return operation(*args, **kwargs)
            return _Replay(next(noted, None), self.num_rows, rows)(operation, args, kwargs)

        with dispatch_mode(draw):
            yield


@final
@dataclass(slots=True)
class _Replay:
    """One random operation of a pass over some rows of a batch."""

    noted: Draw | None
    num_rows: int
    rows: Tensor
    axis: int | None = None  # that rows lie along, with the numbers of others where there are several a row

    def __call__(self, operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if self.noted is None or self.noted.operation != str(operation):
            raise _refusal(operation)
        leaves, structure = _leaves(args, kwargs)
        noted = iter(self.noted.given)
        whole = [self._of_batch(operation, leaf, noted) for leaf in leaves]
        if next(noted, None) is not None:
            raise _refusal(operation)
        written = list(written_arguments(operation, args, kwargs))
        all_args, all_kwargs = tree_unflatten(whole, structure)
        result = operation(*all_args, **all_kwargs)
        if self.axis is None:
            return result
        if not written:
            return tuple(map(self._taken, result)) if isinstance(result, tuple) else self._taken(result)
        if len(written) > 1 or written[0] is not args[0]:
            raise _refusal(operation)
        return args[0].copy_(self._taken(result))

    def _of_batch(self, operation: Any, leaf: Any, noted: Iterator[Given]) -> Any:
        """What the batch had in place of `leaf`: the shape noted, a tensor of it with the rows at their places."""
        now = _given(leaf)
        before = None if now is None else next(noted, None)
        if now == before:
            return leaf
        axis = self._axis_of_rows(now, before) if isinstance(now, tuple) and isinstance(before, tuple) else None
        if axis is None or self.axis not in (None, axis):
            raise _refusal(operation)
        self.axis = axis
        return self._spread(leaf) if isinstance(leaf, Tensor) else before

    def _axis_of_rows(self, shape: Shape, noted: Shape) -> int | None:
        differing = [axis for axis, sizes in enumerate(zip(shape, noted, strict=False)) if sizes[0] != sizes[1]]
        if len(shape) != len(noted) or len(differing) != 1:
            return None
        (axis,) = differing
        per_row, rest = divmod(noted[axis], self.num_rows)
        return axis if rest == 0 and shape[axis] == per_row * len(self.rows) else None

    def _spread(self, tensor: Tensor) -> Tensor:
        """The rows at their places in the batch, and the first of them everywhere else."""
        places = torch.zeros(self.num_rows, dtype=torch.int64)
        places[self.rows] = torch.arange(len(self.rows))
        return self._indexed(tensor, places, len(self.rows))

    def _taken(self, tensor: Tensor) -> Tensor:
        return self._indexed(tensor, self.rows, self.num_rows)

    def _indexed(self, tensor: Tensor, index: Tensor, count: int) -> Tensor:
        """`tensor` with these of its `count` rows, each with all numbers of its own, in place of all."""
        assert self.axis is not None
        before, rest = tensor.shape[: self.axis], tensor.shape[self.axis + 1 :]
        by_row = tensor.reshape(*before, count, tensor.shape[self.axis] // count, *rest)
        return by_row.index_select(self.axis, index.to(tensor.device)).flatten(self.axis, self.axis + 1)


def _is_random(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether it draws: attention is tagged as random by PyTorch also where it drops nothing."""
    if torch.Tag.nondeterministic_seeded not in operation.tags:
        return False
    return bool(argument_of(operation, "dropout_p", args, kwargs) != 0)


def _leaves(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], Any]:
    """Its arguments, lists of numbers as one each, and how they belong together."""
    return tree_flatten((args, kwargs), is_leaf=lambda value: value is not args and _is_shape(value))


def _is_shape(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(type(entry) is int for entry in value)


def _given(leaf: Any) -> Given | None:
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape)
    if _is_shape(leaf):
        return tuple(leaf)
    return leaf if type(leaf) is int else None


def _refusal(operation: Any) -> RefusedError:
    return RefusedError(
        f"the loss draws random numbers for its batch (`{operation}`) that do not belong to single rows, which have no losses "
        "of their own at that draw. Draw as many for each row, or let the loss function take its noise from the batch."
    )
