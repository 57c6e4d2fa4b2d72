"""Every measurement of the Fisher's Gram, on real data, in every kind of loop: records of all, and training as without."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from curvature_callbacks import (
    ConfigurationError,
    FisherSpectrum,
    GradientNoise,
    KFACQuality,
    Measurement,
    Record,
    TopEigenpairs,
)
from curvature_callbacks.lightning.callback import CurvatureCallback as LightningCallback
from curvature_callbacks.transformers.callback import CurvatureCallback as TransformersCallback
from tests.lightning_runs import LIGHTNING_WARNINGS, lightning_run
from tests.real_data import Characters, Digits, digit_loop, digits
from tests.training_cases import Run, assert_probed, assert_same_training
from tests.transformers_runs import language_model, transformers_run

pytestmark = LIGHTNING_WARNINGS

MEASURE: list[Measurement] = [
    FisherSpectrum(),
    FisherSpectrum(fisher="sampled"),
    KFACQuality(),
    GradientNoise(),
    TopEigenpairs(operator="empirical_fisher", k=2, which="LA", per_block=True),
]
NAMES = {measurement.name for measurement in MEASURE} | {"probe"}
WATCH: dict[str, Any] = {
    "measure": MEASURE,
    "num_microbatches": 2,
    "microbatch_size": 6,
    "draw": "fixed",
    "block_structure": "component",
}
PER_BLOCK = {"empirical_fisher", "sampled_fisher", "gradient_noise", "empirical_fisher_eigenpairs"}


def plain_loop(monitored: bool) -> Run:
    return digit_loop(WATCH if monitored else None, every=3)


def assert_complete(records: Sequence[Record], steps: Sequence[int], blocks: list[str]) -> None:
    """All measurements at all probes, each of every block, and no certificate that failed."""
    assert_probed(records, steps, NAMES)
    for record in records:
        if record.measurement == "probe":
            assert record.metadata["blocks"] == blocks
        if record.measurement in ("empirical_fisher", "sampled_fisher") and record.block is None:
            assert record.metadata["fallback"] == {}
            assert record.metadata["num_samples"] == 12
    for name in PER_BLOCK:
        for step in steps:
            found = [record for record in records if (record.measurement, record.step) == (name, step)]
            assert [record.block for record in found if record.block] == blocks, name


def blocks_of(run: Run) -> list[str]:
    blocks: list[str] = next(record.metadata["blocks"] for record in run.records if record.measurement == "probe")
    return blocks


def value(records: Sequence[Record], measurement: str, metric: str, block: str | None = None) -> float:
    last = [record for record in records if (record.measurement, record.block) == (measurement, block)][-1]
    return last.scalars[metric]


def assert_consistent(records: Sequence[Record], block: str, layer: str) -> None:
    """What two measurements find of the same matrix agrees."""
    spectrum = value(records, "empirical_fisher", "full_lambda_max")
    assert value(records, "empirical_fisher_eigenpairs", "lambda_max") == pytest.approx(spectrum, rel=1e-4)
    of_block = value(records, "empirical_fisher", "lambda_max", block)
    assert value(records, "empirical_fisher_eigenpairs", "lambda_max", block) == pytest.approx(of_block, rel=1e-4)
    signal, scatter = (
        value(records, "gradient_noise", metric) for metric in ("mean_gradient_norm_squared", "covariance_trace")
    )
    assert signal + scatter == pytest.approx(value(records, "empirical_fisher", "full_trace"), rel=1e-4)
    assert 0 < value(records, "kfac_empirical_expand", "kfac_cosine", layer) <= 1
    assert value(records, "gradient_noise", "kernel_drift") > 1e-4


def test_in_a_plain_loop() -> None:
    plain, probed = plain_loop(monitored=False), plain_loop(monitored=True)
    blocks = blocks_of(probed)
    assert_complete(probed.records, [0, 3], blocks)
    assert_consistent(probed.records, blocks[-1], "3")
    assert_same_training(plain, probed)


def test_in_lightning(tmp_path: Path) -> None:
    callback = LightningCallback(every_n_steps=3, loss_fn="cross_entropy", **WATCH)
    plain = lightning_run(tmp_path / "plain", net=Digits, data=digits)
    probed = lightning_run(tmp_path / "probed", callback, net=Digits, data=digits)
    blocks = blocks_of(probed)
    assert_complete(probed.records, [0, 3, 6], blocks)
    assert_consistent(probed.records, blocks[-1], "layers.3")
    assert_same_training(plain, probed)


def test_in_transformers(tmp_path: Path) -> None:
    callback = TransformersCallback(every_n_steps=2, **WATCH)
    plain = transformers_run(tmp_path / "plain", data=Characters)
    probed = transformers_run(tmp_path / "probed", callback, model=language_model, data=Characters)
    blocks = ["wte/embedding", "wpe/embedding", "h.0/norm", "h.0/attention", "h.0/mlp", "ln_f/norm"]
    assert_complete(probed.records, [0, 2, 4], blocks)
    assert_consistent(probed.records, "h.0/mlp", "transformer.h.0.mlp.c_fc")
    assert_same_training(plain, probed)


def test_a_training_step_has_no_likelihood(tmp_path: Path) -> None:
    """Refused before the first step, with what to do."""
    callback = LightningCallback(measure=[FisherSpectrum(fisher="sampled")])
    with pytest.raises(ConfigurationError, match="named one"):
        lightning_run(tmp_path, callback, net=Digits, data=digits)
