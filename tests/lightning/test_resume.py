"""Lightning's checkpoints: what goes on from them, what begins anew."""

from pathlib import Path
from typing import Any

import pytest
import torch

from curvature_callbacks import RefusedError
from curvature_callbacks.lightning.callback import CurvatureCallback
from tests.lightning.callback_cases import SaveAt, new_callback
from tests.lightning_runs import LIGHTNING_WARNINGS, Net, lightning_trainer
from tests.training_cases import Checksum, Raising, assert_equal, loader, probed_steps

pytestmark = LIGHTNING_WARNINGS


def save_at(tmp_path: Path, step: int, callbacks: list[Any]) -> Path:
    path = tmp_path / "at.ckpt"
    lightning_trainer(tmp_path, [*callbacks, SaveAt(path, step)], max_steps=step).fit(Net(), loader())
    return path


def resume(tmp_path: Path, probing: CurvatureCallback, checkpoint: Path, max_steps: int = 9) -> None:
    lightning_trainer(tmp_path, [probing], max_steps=max_steps).fit(Net(), loader(), ckpt_path=checkpoint)


def test_resuming_goes_on_where_the_schedule_was(tmp_path: Path) -> None:
    first, second = new_callback(every_n_steps=3), new_callback(every_n_steps=3)
    resume(tmp_path, second, save_at(tmp_path, 5, [first]))
    assert probed_steps(first.history) == [0, 3]
    assert probed_steps(second.history) == [6]


def test_resuming_a_checkpoint_saved_after_training(tmp_path: Path) -> None:
    trainer = lightning_trainer(tmp_path, [new_callback(every_n_steps=3)], max_steps=5)
    trainer.fit(Net(), loader())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    second = new_callback(every_n_steps=3)
    resume(tmp_path, second, tmp_path / "end.ckpt")
    assert probed_steps(second.history) == [6]


def test_resuming_a_checkpoint_without_the_callback_measures_at_once(tmp_path: Path) -> None:
    probing = new_callback(every_n_steps=3)
    resume(tmp_path, probing, save_at(tmp_path, 5, []))
    assert probed_steps(probing.history) == [5, 6]


def test_a_checkpoint_with_the_callback_loads_without_it(tmp_path: Path) -> None:
    trainer = lightning_trainer(tmp_path, [], max_steps=6)
    with pytest.warns(UserWarning, match="CurvatureCallback"):  # Lightning says that a callback of the checkpoint is missing
        trainer.fit(Net(), loader(), ckpt_path=save_at(tmp_path, 4, [new_callback()]))
    assert trainer.global_step == 6


def test_a_switched_off_measurement_stays_off_after_resuming(tmp_path: Path) -> None:
    first, second = (new_callback(measure=[Raising(error=RefusedError("never"))]) for _ in range(2))
    resume(tmp_path, second, save_at(tmp_path, 4, [first]))
    assert [record.measurement for record in first.history].count("raising") == 1
    assert [record.measurement for record in second.history].count("raising") == 0


def test_a_fresh_fit_after_a_resumed_one_starts_from_step_zero(tmp_path: Path) -> None:
    probing = new_callback()
    resume(tmp_path, probing, save_at(tmp_path, 4, [new_callback()]))
    resumed = len(probed_steps(probing.history))
    lightning_trainer(tmp_path, [probing], max_steps=5).fit(Net(), loader())
    assert probed_steps(probing.history)[resumed:] == [0, 2, 4]


def test_two_callbacks_with_different_intervals_in_one_trainer(tmp_path: Path) -> None:
    often, rarely = new_callback(measure=[Checksum()]), new_callback(every_n_steps=5)
    lightning_trainer(tmp_path, [often, rarely]).fit(Net(), loader())
    assert probed_steps(often.history) == [0, 2, 4, 6]
    assert probed_steps(rarely.history) == [0, 5]


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_state_survives_a_run_that_has_nothing_left_to_train(tmp_path: Path) -> None:
    first, second = new_callback(), new_callback()
    lightning_trainer(tmp_path, [first], enable_checkpointing=True, max_steps=4).fit(Net(), loader())
    trainer = lightning_trainer(tmp_path, [second], enable_checkpointing=True, max_steps=4)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    trainer.fit(Net(), loader(), ckpt_path=checkpoint)
    saved = torch.load(checkpoint, weights_only=False)["callbacks"][second.state_key]
    assert_equal(second.state_dict(), saved)
    assert saved
    lightning_trainer(tmp_path, [second], max_steps=3).fit(Net(), loader())
    assert probed_steps(second.history) == [0, 2]
