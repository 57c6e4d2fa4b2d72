"""A run that goes on from a checkpoint measures as the one that was never interrupted, or says why it does not."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from curvature_callbacks import FisherSpectrum, GradientNoise, Record, TopEigenpairs
from curvature_callbacks.lightning.callback import CurvatureCallback as LightningCallback
from curvature_callbacks.transformers.callback import CurvatureCallback as TransformersCallback
from tests.lightning.callback_cases import SaveAt
from tests.lightning_runs import LIGHTNING_WARNINGS, Net, lightning_trainer
from tests.training_cases import callback_options, cheap, loader, probed_steps, reports, seed_everything
from tests.transformers_runs import transformers_run

pytestmark = [*LIGHTNING_WARNINGS, pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")]


class CalmNet(Net):
    """Without dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[3] = nn.Identity()


def measures() -> list[Any]:
    return [FisherSpectrum(), TopEigenpairs(k=1, which="LA", max_matvecs=12, tol=1e-3), GradientNoise()]


def scalars(records: Sequence[Record], name: str, *, after: int) -> list[tuple[int, str | None, dict[str, float]]]:
    found = [record for record in records if record.measurement == name and record.step > after]
    return [(record.step, record.block, dict(record.scalars)) for record in found]


def transformers_pair(tmp_path: Path, second: Any, *, spoil: bool = False, **changes: Any) -> tuple[Any, Any]:
    """A run of seven steps, and one that goes on from its fourth."""
    first = TransformersCallback(**callback_options(every_n_steps=3, **changes))
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, "max_steps": 7}
    transformers_run(tmp_path, first, **saving)
    if spoil:
        for path in (tmp_path / "checkpoint-4").glob("curvature_*.pt"):
            path.unlink()
    transformers_run(tmp_path, second, **saving, resume=str(tmp_path / "checkpoint-4"))
    return first, second


def lightning_pair(tmp_path: Path, second: Any, *, saved_at: int = 4, **changes: Any) -> tuple[Any, Any]:
    """The same with Lightning, whose checkpoints hold no generators, in which a loader therefore shuffles nothing."""
    first, path = LightningCallback(**callback_options(every_n_steps=3, **changes)), tmp_path / "at.ckpt"
    seed_everything()
    data: dict[str, Any] = {"shuffle": False}
    lightning_trainer(tmp_path, [first, SaveAt(path, saved_at)], max_steps=saved_at + 3).fit(CalmNet(), loader(**data))
    lightning_trainer(tmp_path, [second], max_steps=saved_at + 3).fit(CalmNet(), loader(**data), ckpt_path=path)
    return first, second


PAIRS: dict[str, Any] = {
    "transformers": (TransformersCallback, transformers_pair),
    "lightning": (LightningCallback, lightning_pair),
}


@pytest.mark.parametrize("framework", PAIRS)
def test_later_probes_are_those_of_the_uninterrupted_run(framework: str, tmp_path: Path, caplog: Any) -> None:
    kind, pair = PAIRS[framework]
    at: dict[str, Any] = {"saved_at": 6} if framework == "lightning" else {}  # an epoch: loaders begin anew within one
    first, second = pair(tmp_path, kind(**callback_options(every_n_steps=3, measure=measures())), measure=measures(), **at)
    assert probed_steps(second.history) == [step for step in probed_steps(first.history) if step > 4] != []
    for name in ("empirical_fisher", "gradient_noise"):
        assert scalars(second.history, name, after=4) == scalars(first.history, name, after=4) != []
    pairs = [[r for r in one.history if r.measurement == "hessian" and r.step > 4] for one in (first, second)]
    for found, expected in zip(*pairs, strict=True):
        assert found.arrays["eigenvalues"] == pytest.approx(expected.arrays["eigenvalues"], rel=1e-3)
        assert found.num_matvecs == expected.num_matvecs
    assert reports(caplog) == []


def blocks_of_one(name: str, parameter: Any) -> str:
    return "one"


CHANGES: dict[str, dict[str, Any]] = {
    "seed": {"seed": 5},
    "block_structure": {"block_structure": blocks_of_one},
    "measure": {"measure": [FisherSpectrum(), TopEigenpairs(k=2, max_matvecs=5)]},
    "microbatch_size": {"microbatch_size": 2},
}


@pytest.mark.parametrize("framework", PAIRS)
@pytest.mark.parametrize("name", ["seed", *(pytest.param(name, marks=pytest.mark.slow) for name in CHANGES if name != "seed")])
def test_other_arguments_begin_anew_and_say_so_once(framework: str, name: str, tmp_path: Path, caplog: Any) -> None:
    kind, pair = PAIRS[framework]
    _, second = pair(tmp_path, kind(**callback_options(every_n_steps=3) | CHANGES[name]), measure=cheap())
    told = [line for line in reports(caplog) if "had other arguments" in line]
    assert len(told) == 1
    assert f"(`{name}` " in told[0]
    assert probed_steps(second.history) == [4, 6]


def test_a_missing_file_of_tensors_is_said_once(tmp_path: Path, caplog: Any) -> None:
    second = TransformersCallback(**callback_options(every_n_steps=3))
    transformers_pair(tmp_path, second, spoil=True)
    assert [line for line in reports(caplog) if "is missing" in line] == reports(caplog) != []
    assert len(reports(caplog)) == 1
    assert probed_steps(second.history) == [6]


def test_the_file_of_another_checkpoint_is_not_taken(tmp_path: Path, caplog: Any) -> None:
    first = TransformersCallback(**callback_options(every_n_steps=1))
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    transformers_run(tmp_path, first, **saving)
    (path,) = (tmp_path / "checkpoint-4").glob("curvature_*.pt")
    shutil.copy(path, tmp_path / "checkpoint-2" / path.name)
    transformers_run(
        tmp_path, TransformersCallback(**callback_options(every_n_steps=1)), **saving, resume=str(tmp_path / "checkpoint-2")
    )
    assert len([line for line in reports(caplog) if "of another checkpoint" in line]) == 1
