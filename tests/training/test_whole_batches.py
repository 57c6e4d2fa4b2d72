"""Models with batch norms in whole training runs: measured on whole batches of training, which goes on bit for bit."""

from pathlib import Path
from typing import Any

import pytest

from curvature_callbacks import FisherSpectrum, TopEigenpairs
from curvature_callbacks.lightning.callback import CurvatureCallback as LightningCallback
from curvature_callbacks.transformers.callback import CurvatureCallback as TransformersCallback
from tests.configurations.transformers_parts import Images, image_classifier
from tests.lightning_runs import LIGHTNING_WARNINGS, FrozenNet, Net, lightning_run
from tests.training_cases import Run, assert_same_training
from tests.transformers_runs import transformers_run

pytestmark = LIGHTNING_WARNINGS

SIZES: dict[str, Any] = {"num_microbatches": 1, "microbatch_size": 2, "every_n_steps": 2}


def measure() -> list[Any]:
    return [TopEigenpairs(k=1, which="LA", max_matvecs=4), FisherSpectrum()]


def about(run: Run, measurement: str) -> list[tuple[Any, Any]]:
    found = [record for record in run.records if record.measurement == measurement and record.block is None]
    assert not any(record.failed for record in found)
    assert found
    return [(record.metadata["batch_norm"], record.metadata.get("batch_size")) for record in found]


@pytest.mark.parametrize(("net", "batch_norm"), [(Net, "batch"), (FrozenNet, "eval")])
def test_lightning(net: Any, batch_norm: str, tmp_path: Path) -> None:
    """The loader has four rows a batch; a norm that is kept in evaluation mode couples none."""
    callback = LightningCallback(measure=measure(), **SIZES)
    plain, probed = lightning_run(tmp_path / "a", net=net), lightning_run(tmp_path / "b", callback, net=net)
    assert_same_training(plain, probed)
    later = about(probed, "hessian")[1:]  # the first probe is before the user's hook
    assert set(later) == {(batch_norm, 4 if batch_norm == "batch" else None)}
    assert set(about(probed, FisherSpectrum().name)) == {("eval", None)}


def test_the_trainer(tmp_path: Path) -> None:
    callback = TransformersCallback(measure=measure(), **SIZES)
    options: dict[str, Any] = {"model": image_classifier, "data": Images}
    plain, probed = transformers_run(tmp_path / "a", **options), transformers_run(tmp_path / "b", callback, **options)
    assert_same_training(plain, probed)
    assert set(about(probed, "hessian")) == {("batch", 4)}
