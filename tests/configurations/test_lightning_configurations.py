"""Training with Lightning is the same bits with and without the callback, in every configuration listed."""

import gc
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.configurations.lightning_cases import CASES, check
from tests.training_cases import LIGHTNING_WARNINGS, wide

pytestmark = LIGHTNING_WARNINGS


@pytest.fixture(autouse=True, scope="module")
def _imported_modules_are_no_garbage() -> Iterator[None]:
    """Finders collect garbage again and again, mostly by looking at the million objects that imports leave."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


# Of the loop around the model alone: what is measured at a step should make no difference to them.
AROUND = {"clipping", "clipping by value", "one cycle", "workers", "weight averaging", "limit_train_batches", "validation"}
AROUND |= {"checkpoints", "lr_find", "learning rate finder", "batch size finder", "twice", "another trainer", "resumed"}
AROUND |= {"resumed within an epoch", "augmentation", "transform", "transform of a subset", "collecting", "remembering"}
LIKELY = [name for name, case in CASES.items() if case.has_likelihood]


def marked(names: Iterable[str], slow: Iterable[str] = ()) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] if CASES[name].is_slow or name in slow else []) for name in names]


@pytest.mark.parametrize("name", marked(CASES))
def test_training_is_bit_identical(name: str, tmp_path: Path) -> None:
    check(CASES[name], tmp_path)


@pytest.mark.parametrize("name", marked(LIKELY, slow=AROUND))
def test_training_is_bit_identical_whatever_is_measured(name: str, tmp_path: Path) -> None:
    check(CASES[name], tmp_path, wide(), loss_fn="cross_entropy")
