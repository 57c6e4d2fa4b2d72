"""Checkpoints of the Trainer: what goes on from them, what begins anew."""

from pathlib import Path

from curvature_callbacks import RefusedError
from tests.training_cases import Checksum, Raising, probed_steps
from tests.transformers.callback_cases import new_callback, trainer_for


def test_resuming_goes_on_where_the_schedule_was(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 4, "max_steps": 4}
    first, second = (new_callback(every_n_steps=3, measure=[Checksum()]) for _ in range(2))
    trainer_for(tmp_path, [first], **saving).train()
    trainer_for(tmp_path, [second], max_steps=7).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert probed_steps(first.history) == [0, 3]
    assert probed_steps(second.history) == [6]


def test_resuming_a_checkpoint_without_the_callback_measures_at_once_and_can_save(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer_for(tmp_path, [], **saving, max_steps=4).train()
    probing = new_callback(every_n_steps=3, measure=[Checksum()])
    trainer_for(tmp_path, [probing], **saving, max_steps=6).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert probed_steps(probing.history) == [4, 6]
    assert (tmp_path / "checkpoint-6").exists()


def test_a_checkpoint_with_the_callback_loads_without_it(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer_for(tmp_path, [new_callback(measure=[Checksum()])], **saving, max_steps=2).train()
    trainer = trainer_for(tmp_path, [], **saving, max_steps=4)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 4


def test_a_switched_off_measurement_stays_off_after_resuming(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    first, second = (new_callback(measure=[Raising(error=RefusedError("never"))]) for _ in range(2))
    trainer_for(tmp_path, [first], **saving).train()
    trainer_for(tmp_path, [second], max_steps=5).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [record.measurement for record in first.history].count("raising") == 1
    assert [record.measurement for record in second.history].count("raising") == 0


def test_a_switched_off_measurement_stays_off_when_two_callbacks_resume(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    first, second = (new_callback(measure=[Raising(error=RefusedError("never"))]) for _ in range(2))
    trainer_for(tmp_path, [first, new_callback(measure=[Checksum()])], **saving).train()
    again = trainer_for(tmp_path, [second, new_callback(measure=[Checksum()])], max_steps=5)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [record.measurement for record in first.history].count("raising") == 1
    assert [record.measurement for record in second.history].count("raising") == 0
