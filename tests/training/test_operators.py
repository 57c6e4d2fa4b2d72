"""Every curvature matrix in whole training runs on real data: pairs of all, and training as without."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from curvature_callbacks import EdgeRatio, Measurement, Record, SpectralDensity, TopEigenpairs
from curvature_callbacks.lightning.callback import CurvatureCallback as LightningCallback
from curvature_callbacks.problem.matrix import OperatorName
from curvature_callbacks.transformers.callback import CurvatureCallback as TransformersCallback
from tests.lightning_runs import LIGHTNING_WARNINGS, lightning_run, lightning_trainer
from tests.real_data import Characters, Digits, digit_loop, digits
from tests.training_cases import assert_probed, assert_same_training
from tests.transformers_runs import language_model, transformers_run

pytestmark = LIGHTNING_WARNINGS

# The convolutional net has kinks, which differences step over: they are for smooth models.
SMOOTH: list[Measurement] = [TopEigenpairs(operator=name, k=2, which="LA", max_matvecs=30) for name in get_args(OperatorName)]
OTHERS: list[Measurement] = [
    TopEigenpairs(operator="ggn", k=2, which="LA", max_matvecs=20, per_block=True),
    TopEigenpairs(operator="hessian", k=4, max_matvecs=40),
    TopEigenpairs(operator="sampled_fisher", sample_unit="token", k=1, which="LA", max_matvecs=20),
    TopEigenpairs(operator="ekfac", fisher="sampled", k=2, which="LA"),
    TopEigenpairs(operator="preconditioned_hessian", k=2, which="LA", max_matvecs=20),
    SpectralDensity(operator="ggn", num_probes=2, num_steps=10),
    EdgeRatio(),
]
WATCH: dict[str, Any] = {"num_microbatches": 2, "microbatch_size": 6, "draw": "fixed"}


def names(measure: Sequence[Measurement]) -> set[str]:
    return {measurement.name for measurement in measure} | {"probe"}


def top(records: Sequence[Record], measurement: str, step: int) -> float:
    found = [one for one in records if (one.measurement, one.step, one.block) == (measurement, step, None)]
    return found[0].scalars["lambda_max"]


def assert_sane(records: Sequence[Record]) -> None:
    assert [record.error for record in records if record.failed] == []
    for record in records:
        if record.arrays.get("eigenvalues") and record.block is None:
            assert record.scalars["num_converged"] >= 1, record
            rounding = 5e-3 if record.measurement.startswith("finite_difference") else 1e-3  # differences are coarse
            assert record.metadata["asymmetry"] < rounding


def test_in_a_plain_loop() -> None:
    plain, probed = digit_loop(None, every=3), digit_loop(WATCH | {"measure": OTHERS}, every=3)
    assert_probed(probed.records, [0, 3], names(OTHERS))
    assert_sane(probed.records)
    assert_same_training(plain, probed)


def test_in_lightning(tmp_path: Path) -> None:
    callback = LightningCallback(every_n_steps=3, loss_fn="cross_entropy", measure=OTHERS, **WATCH)
    plain = lightning_run(tmp_path / "plain", net=Digits, data=digits)
    probed = lightning_run(tmp_path / "probed", callback, net=Digits, data=digits)
    assert_probed(probed.records, [0, 3, 6], names(OTHERS))
    assert_sane(probed.records)
    assert_same_training(plain, probed)


def test_in_transformers(tmp_path: Path) -> None:
    callback = TransformersCallback(every_n_steps=3, measure=SMOOTH, **WATCH)
    plain = transformers_run(tmp_path / "plain", data=Characters)
    probed = transformers_run(tmp_path / "probed", callback, model=language_model, data=Characters)
    assert_probed(probed.records, [0, 3], names(SMOOTH))
    assert_sane(probed.records)
    exact = top(probed.records, "hessian", 3)
    assert top(probed.records, "finite_difference_hessian", 3) == pytest.approx(exact, rel=1e-3)
    assert top(probed.records, "ekfac_empirical_expand_eigenpairs", 3) > 0
    assert_same_training(plain, probed)


WARM = TopEigenpairs(k=1, which="LA", tol=1e-3, max_matvecs=40)


def spent(records: Sequence[Record]) -> dict[int, int]:
    return {record.step: record.num_matvecs for record in records if record.measurement == "hessian"}


def test_lightning_resumes_with_the_vectors_of_the_last_probe(tmp_path: Path) -> None:
    def callback() -> LightningCallback:
        return LightningCallback(every_n_steps=3, loss_fn="cross_entropy", measure=[WARM], **WATCH)

    through = lightning_run(tmp_path / "through", callback(), net=Digits, data=digits)
    first, second = callback(), callback()
    torch.manual_seed(1)
    trainer = lightning_trainer(tmp_path / "first", [first], max_epochs=1)
    trainer.fit(Digits(), digits())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    saved = torch.load(tmp_path / "model.ckpt", weights_only=True)["callbacks"]
    (state,) = (one for key, one in saved.items() if "Curvature" in key)
    assert state["states"]["hessian"]["starts"][""].numel() == sum(p.numel() for p in Digits().parameters())
    again = lightning_trainer(tmp_path / "second", [second], max_epochs=2)
    again.fit(Digits(), digits(), ckpt_path=str(tmp_path / "model.ckpt"))
    resumed = spent(second.history)
    assert min(resumed) == 6
    assert resumed[6] <= spent(through.records)[0] - 3  # no self-check, and no cold start


def test_transformers_resumes_with_the_vectors_of_the_last_probe(tmp_path: Path) -> None:
    def callback() -> TransformersCallback:
        return TransformersCallback(every_n_steps=2, measure=[WARM], **WATCH)

    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "data": Characters}
    first, second, without = callback(), callback(), callback()
    transformers_run(tmp_path, first, **saving)
    (file,) = (tmp_path / "checkpoint-3").glob("curvature_*.pt")
    held = torch.load(file, weights_only=True)["whole"]["states"]["hessian"]["starts"][""]
    assert held.numel() == sum(parameter.numel() for parameter in language_model().parameters())
    resumed = transformers_run(tmp_path, second, resume=str(tmp_path / "checkpoint-3"), **saving)
    assert spent(second.history) == {step: count for step, count in spent(first.history).items() if step > 3}
    file.unlink()
    transformers_run(tmp_path, without, resume=str(tmp_path / "checkpoint-3"), **saving)
    assert min(spent(without.history)) == min(spent(resumed.records)) == 4
    assert spent(without.history)[4] > spent(second.history)[4]  # a cold start, the self-check still passed


def test_a_file_that_cannot_be_read_costs_a_cold_start_only(tmp_path: Path, caplog: Any) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 4, "data": Characters}
    first, second = (TransformersCallback(every_n_steps=2, measure=[WARM], **WATCH) for _ in range(2))
    transformers_run(tmp_path, first, **saving)
    (file,) = (tmp_path / "checkpoint-3").glob("curvature_*.pt")
    file.write_bytes(file.read_bytes()[:100])
    transformers_run(tmp_path, second, resume=str(tmp_path / "checkpoint-3"), **saving)
    assert any("cannot be read" in record.getMessage() for record in caplog.records)
    assert set(spent(second.history)) == {4}


def test_transformers_resumes_in_another_directory_with_the_vectors_of_the_checkpoint_it_is_given(tmp_path: Path) -> None:
    """Also where the directory has a checkpoint of the same step, of another run."""
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "data": Characters}
    first, other, second, third = (TransformersCallback(every_n_steps=2, measure=[WARM], **WATCH) for _ in range(4))
    transformers_run(tmp_path / "first", first, **saving)
    transformers_run(tmp_path / "second", other, **saving | {"learning_rate": 0.5, "max_steps": 4})
    (file,) = (tmp_path / "second" / "checkpoint-3").glob("curvature_*.pt")
    found = torch.load(file, weights_only=True)
    off = {"failures": {"hessian": 3}}  # switched off there
    torch.save({"plain": found["plain"] | off, "whole": found["whole"] | off}, file)
    given = tmp_path / "first" / "checkpoint-3"
    transformers_run(tmp_path / "second", second, resume=str(given), **saving)
    assert spent(second.history) == {step: count for step, count in spent(first.history).items() if step > 3} != {}
    next(given.glob("curvature_*.pt")).unlink()
    transformers_run(tmp_path / "second", third, resume=str(given), **saving)
    assert spent(third.history)[4] > spent(first.history)[4]  # cold, and not the other run's


def test_vectors_that_cannot_be_written_do_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = torch.save

    def full(state: Any, path: Any, *args: Any, **options: Any) -> None:
        if Path(str(path)).name.startswith("curvature_"):
            raise OSError("no space left on device")
        right(state, path, *args, **options)

    monkeypatch.setattr(torch, "save", full)
    callback = TransformersCallback(every_n_steps=2, measure=[WARM], **WATCH)
    transformers_run(tmp_path, callback, save_strategy="steps", save_steps=3, max_steps=4, data=Characters)
    assert set(spent(callback.history)) == {0, 2, 4}
    assert (tmp_path / "checkpoint-3" / "trainer_state.json").exists()
    assert any("no space left on device" in record.getMessage() for record in caplog.records)
