"""Training with the Hugging Face Trainer is the same bits with and without the callback, in every configuration listed."""

import gc
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from curvature_callbacks import ConfigurationError, probes
from curvature_callbacks.isolation import model as isolation
from tests.configurations.transformers_cases import CASES
from tests.configurations.transformers_sessions import assert_same_bits
from tests.training_cases import wide


@pytest.fixture(autouse=True, scope="module")
def _imported_modules_are_no_garbage() -> Iterator[None]:
    """Trainers collect garbage again and again, mostly by looking at the million objects that imports leave."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


LIKELY = [name for name, case in CASES.items() if case.has_likelihood]
# One of each mechanism that a probe must not disturb; the others of its kind are by `make test-all`.
QUICK = {
    *("plain", "accumulation", "bf16", "fp16 scaler", "neftune"),  # numbers
    *("label smoothing measured", "compute_loss_func measured", "compute_loss measured"),  # losses
    *("checkpointing", "model's own checkpointing, reentrant", "compiled in place", "frozen", "batch norm"),  # models
    *("augmentation", "masking collator", "own generator", "stream", "compute_loss on a stream, measured"),  # data
    *("lora, checkpointing", "batch size found", "best model", "resumed"),  # Trainers
    *("listed steps", "other data"),  # options of the callback
}
REPEATED = {"plain", "bf16", "label smoothing measured", "checkpointing, reentrant"}  # with more measurements


assert CASES.keys() >= QUICK | REPEATED


def marked(names: Iterable[str], slow: Iterable[str] = ()) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] if CASES[name].is_slow or name in slow else []) for name in names]


@pytest.mark.parametrize("name", marked(CASES, slow=CASES.keys() - QUICK))
def test_training_is_bit_identical(name: str, tmp_path: Path) -> None:
    assert_same_bits(CASES[name], tmp_path)


@pytest.mark.parametrize("name", marked(LIKELY, slow=[name for name in LIKELY if name not in REPEATED]))
def test_training_is_bit_identical_whatever_is_measured(name: str, tmp_path: Path) -> None:
    assert_same_bits(CASES[name], tmp_path, wide())


@pytest.mark.parametrize(
    ("name", "module", "protection"),
    [
        ("augmentation", isolation, "_generators"),
        ("batch norm", isolation, "_training_flags"),
        ("plain", isolation, "sdpa_kernel"),
        ("bf16", isolation, "_unpatched_forward"),
        ("model's own checkpointing, reentrant", isolation, "plain_checkpoints"),
        ("own generator", probes.dataset, "undisturbed"),
    ],
)
def test_each_protection_is_needed(name: str, module: Any, protection: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Without it training differs, a measurement fails or is refused: the comparison above can fail."""
    monkeypatch.setattr(module, protection, lambda *args, **kwargs: nullcontext())
    monkeypatch.setattr(probes.dataset, "_private_copy", lambda collate: collate)
    with pytest.raises((AssertionError, ConfigurationError)):
        assert_same_bits(CASES[name], tmp_path)
