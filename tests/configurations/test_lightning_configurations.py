"""Training with Lightning is the same bits with and without the callback, in every configuration listed."""

import gc
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

import curvature_callbacks.lightning
from curvature_callbacks import ConfigurationError, probes
from curvature_callbacks.isolation import model as isolation
from curvature_callbacks.lightning import loss as training_step
from curvature_callbacks.model import draws
from tests.configurations.lightning_cases import CASES
from tests.configurations.lightning_fits import IN_YAML, command_line, written
from tests.configurations.lightning_sessions import Session, assert_same_bits
from tests.lightning_runs import LIGHTNING_WARNINGS
from tests.training_cases import wide

pytestmark = LIGHTNING_WARNINGS


@pytest.fixture(autouse=True, scope="module")
def _imported_modules_are_no_garbage() -> Iterator[None]:
    """Finders collect garbage again and again, mostly by looking at the million objects that imports leave."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


LIKELY = [name for name, case in CASES.items() if case.has_likelihood]
# One of each mechanism that a probe must not disturb; the others of its kind are by `make test-all`.
QUICK = {
    *("plain", "accumulation", "16-mixed, scaler", "bf16-mixed", "64-true"),  # numbers
    *("weight averaging", "exponential averaging", "LBFGS", "manual optimization", "gradients in hooks"),  # optimizers
    *("late layers", "compiled in place, eager", "frozen at every epoch", "noisy layer"),  # modules
    *("noise", "metrics", "remembering", "logging directly"),  # what `training_step` keeps
    *("augmentation", "transform", "reloaded", "transfer hooks", "stream", "max_size"),  # data
    *("learning rate finder", "checkpoints", "command line, more", "another trainer", "resumed"),  # Trainers
    *("spike", "probe dataset"),  # options of the callback
}
REPEATED = {"plain", "bf16-mixed", "stream"}  # with more measurements


assert CASES.keys() >= QUICK | REPEATED


def marked(names: Iterable[str], slow: Iterable[str] = ()) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] if CASES[name].is_slow or name in slow else []) for name in names]


@pytest.mark.parametrize("name", marked(CASES, slow=CASES.keys() - QUICK))
def test_training_is_bit_identical(name: str, tmp_path: Path) -> None:
    assert_same_bits(CASES[name], tmp_path)


@pytest.mark.parametrize("name", marked(LIKELY, slow=[name for name in LIKELY if name not in REPEATED]))
def test_training_is_bit_identical_whatever_is_measured(name: str, tmp_path: Path) -> None:
    assert_same_bits(CASES[name], tmp_path, wide(), loss_fn="cross_entropy")


@pytest.mark.parametrize(
    ("name", "module", "protection"),
    [
        ("plain", isolation, "_training_flags"),
        ("augmentation", isolation, "_generators"),
        ("logging directly", training_step, "_muted"),
        ("metrics", training_step, "attributes_set_aside"),
        ("remembering", training_step, "attributes_set_aside"),
        ("noise", draws, "begun_at"),
        ("transform", probes.dataset, "undisturbed"),
        pytest.param("plain", isolation, "_training_flags", marks=pytest.mark.slow),
        pytest.param("plain", training_step, "_muted", marks=pytest.mark.slow),
        pytest.param("unregistered metric", training_step, "attributes_set_aside", marks=pytest.mark.slow),
        pytest.param("collecting", training_step, "attributes_set_aside", marks=pytest.mark.slow),
        pytest.param("noise", training_step, "attributes_set_aside", marks=pytest.mark.slow),
    ],
)
def test_each_protection_is_needed(name: str, module: Any, protection: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Without it training differs, a measurement fails or is refused: the comparison above can fail."""
    for where in (module, isolation) if protection == "attributes_set_aside" else (module,):  # of every call, of every probe
        monkeypatch.setattr(where, protection, lambda *args, **kwargs: nullcontext())
    with pytest.raises((AssertionError, ConfigurationError)):
        assert_same_bits(CASES[name], tmp_path)


def test_batches_of_probes_have_to_be_made_as_those_of_training(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(curvature_callbacks.lightning.callback, "_as_the_loop_does", lambda trainer, module, batch: batch)
    with pytest.raises(ConfigurationError):
        assert_same_bits(CASES["transfer hooks"], tmp_path)


@pytest.mark.filterwarnings("ignore:(?s).*was deprecated in v4", "ignore:(?s)\\s*By default only one Jsonargparse")
def test_the_configuration_that_lightning_saves_builds_the_same_callback(tmp_path: Path) -> None:
    session = Session(CASES["command line"], tmp_path / "first", wide())
    first = command_line("--config", str(written(session, **IN_YAML)), run=False)
    saved = tmp_path / "saved.yaml"
    saved.write_text(first.parser.dump(first.config, skip_none=False))
    second = command_line("--config", str(saved), run=False)
    one, other = (cli.trainer.callbacks[0] for cli in (first, second))
    assert isinstance(one, curvature_callbacks.lightning.CurvatureCallback)
    assert one.state_key == other.state_key
