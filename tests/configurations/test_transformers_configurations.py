"""Training with the Hugging Face Trainer is the same bits with and without the callback, in every configuration listed."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.configurations.transformers_cases import CASES, check, wide


@pytest.fixture(autouse=True, scope="module")
def _imported_modules_are_no_garbage() -> Iterator[None]:
    """Trainers collect garbage again and again, mostly by looking at the million objects that imports leave."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def marked(names: list[str]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] if CASES[name].is_slow else []) for name in names]


@pytest.mark.parametrize("name", marked(list(CASES)))
def test_training_is_bit_identical(name: str, tmp_path: Path) -> None:
    check(CASES[name], tmp_path)


@pytest.mark.parametrize("name", marked([name for name, case in CASES.items() if case.has_likelihood]))
def test_training_is_bit_identical_whatever_is_measured(name: str, tmp_path: Path) -> None:
    check(CASES[name], tmp_path, wide())
