"""Runs on several processes that must be the same bits with and without curvature."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from curvature_callbacks.record import Record
from tests.processes import training
from tests.processes.ranks import Ranks
from tests.training_cases import assert_equal, probed_steps

Left = tuple[dict[str, Any], list[Record]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration.

    Attributes:
        title: what a reader of the table of configurations reads.
        train: `(probed, directory, size)` to what a rank is left with.
        arguments: put before these.
        steps: where probes are expected.
        names: measurements that must have succeeded there.
    """

    title: str
    train: Callable[..., Left]
    arguments: tuple[Any, ...]
    steps: tuple[int, ...]
    names: frozenset[str] = field(default_factory=lambda: frozenset({"empirical_fisher", "hessian", "kfac_coverage", "edge"}))


_LOOP: Final = (0, 2, 4)
_FRAMEWORK: Final = (0, 3)
_OPERATORS: Final = frozenset(
    {"empirical_fisher", "hessian", "ggn", "kfac_empirical_expand_eigenpairs", "edge", "kfac_coverage"}
)


def _loop(title: str, wrap: Callable[..., Any], **options: Any) -> Case:
    return Case(title=title, train=loop, arguments=(wrap, options), steps=_LOOP, names=_OPERATORS)


def loop(wrap: Callable[..., Any], options: Mapping[str, Any], probed: bool, directory: str, size: int) -> Left:
    return training.train(wrap, probed, **options)


def small(wrap: Callable[..., Any], probed: bool, directory: str, size: int) -> Left:
    return training.train_without_room(wrap, probed)


def _small(title: str, wrap: Callable[..., Any]) -> Case:
    names = _OPERATORS - {"kfac_empirical_expand_eigenpairs"}
    return Case(title=title, train=small, arguments=(wrap,), steps=_LOOP, names=names)


def in_a_framework(work: str, *arguments: Any) -> Any:
    """What this function of `frameworks` returns: a process imports Lightning and the Trainer when it needs them."""
    from tests.processes import frameworks

    return getattr(frameworks, work)(*arguments)


def _lightning(title: str, strategy: str) -> Case:
    return Case(title=title, train=in_a_framework, arguments=("lightning", strategy), steps=_FRAMEWORK)


def _transformers(title: str, setting: str, steps: tuple[int, ...] = _FRAMEWORK) -> Case:
    return Case(title=title, train=in_a_framework, arguments=("transformers", setting), steps=steps)


CASES: dict[str, Case] = {
    "loop_ddp": _loop("loop of one's own: DDP", training.ddp),
    "loop_ddp_unused": _loop("loop of one's own: DDP, `find_unused_parameters`", training.ddp, find_unused_parameters=True),
    "loop_ddp_static": _loop("loop of one's own: DDP, `static_graph`", training.ddp, static_graph=True),
    "loop_ddp_views": _loop("loop of one's own: DDP, `gradient_as_bucket_view`", training.ddp, gradient_as_bucket_view=True),
    "loop_fsdp2": _loop("loop of one's own: FSDP2", training.fsdp2),
    "loop_fsdp2_kept": _loop(
        "loop of one's own: FSDP2, `reshard_after_forward=False`", training.fsdp2, reshard_after_forward=False
    ),
    "loop_fsdp2_bf16": _loop("loop of one's own: FSDP2, bf16 `MixedPrecisionPolicy`", training.fsdp2_in_bf16),
    "loop_hsdp": _loop("loop of one's own: FSDP2 over a mesh of two dimensions", training.hsdp),
    "loop_fsdp2_checkpointing": _loop("loop of one's own: FSDP2, activation checkpointing", training.fsdp2_checkpointing),
    "loop_fsdp2_on_use": _small("loop of one's own: FSDP2, parameters that fit no process", training.fsdp2),
    "loop_fsdp2_bf16_on_use": _small(
        "loop of one's own: FSDP2, the same with bf16 `MixedPrecisionPolicy`", training.fsdp2_in_bf16
    ),
    "lightning_ddp": _lightning("Lightning: DDP", "ddp"),
    "lightning_unused": _lightning("Lightning: DDP, `find_unused_parameters`", "unused"),
    "lightning_static": _lightning("Lightning: DDP, `static_graph`", "static"),
    "lightning_stream": _lightning("Lightning: DDP, a stream", "stream"),
    "lightning_fsdp2": _lightning("Lightning: FSDP2 (`ModelParallelStrategy`)", "fsdp2"),
    "transformers_ddp": _transformers("Trainer: DDP", "ddp"),
    "transformers_accumulation": _transformers("Trainer: DDP, gradient accumulation", "accumulation"),
    "transformers_stream": _transformers("Trainer: DDP, a stream", "stream", (1, 3)),  # no data before the first step
    "transformers_fsdp2": _transformers("Trainer: FSDP2 (accelerate)", "fsdp2"),
}


def assert_same_bits(case: Case, ranks: Ranks, directory: Path) -> None:
    """Train with and without on all ranks; raise on any difference, and where something was not measured."""
    plain = ranks(case.train, *case.arguments, False, str(directory / "plain"), ranks.size)
    probed = ranks(case.train, *case.arguments, True, str(directory / "probed"), ranks.size)
    for rank, ((left, _), (found, records)) in enumerate(zip(plain, probed, strict=True)):
        assert_equal(left, found, f"rank {rank}")
        assert not [record.error for record in records if record.failed]
        assert probed_steps(records) == list(case.steps)
        for name in case.names:
            assert {record.step for record in records if record.measurement == name} == set(case.steps), name
    assert_same_records([records for _, records in probed])


def assert_same_records(found: Sequence[list[Record]]) -> None:
    """All ranks have the same numbers, to the bit."""
    for records in found[1:]:
        assert_equal([_numbers(one) for one in found[0]], [_numbers(one) for one in records], "records")


def _numbers(record: Record) -> dict[str, Any]:
    return {"name": record.measurement, "block": record.block, "scalars": dict(record.scalars), "arrays": dict(record.arrays)}
