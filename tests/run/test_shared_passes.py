"""What the measurements of a probe share: one pass gives Grams and Kronecker factors."""

from typing import Any

import pytest
import torch
from torch import nn

from curvature_callbacks import FisherSpectrum, GradientNoise, KFACQuality, Measurement
from curvature_callbacks.gram import probe_grams
from curvature_callbacks.gram.block_grams import block_grams
from curvature_callbacks.gram.context import GramContext, GramOptions
from tests.run.monitor_cases import new_monitor, outcomes


class Counter:
    """Counts the forward passes of a model and the backward passes that reach its output."""

    def __init__(self, model: nn.Module) -> None:
        self.forwards = self.backwards = 0
        model.register_forward_hook(self._forward)

    def _forward(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self.forwards += 1
        if output.requires_grad:
            output.register_hook(self._backward)

    def _backward(self, gradient: torch.Tensor) -> None:
        self.backwards += 1


def passes(*measure: Measurement) -> tuple[int, int]:
    """Forward and backward passes of the second probe, whose layout is certified, but for the gradient it compares with."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    watching, counter = new_monitor(model, measure=measure), Counter(model)
    watching.step(0)
    counter.forwards = counter.backwards = 0
    records = watching.step(1)
    assert not any(record.failed for record in records)
    assert {record.measurement for record in records} == {"probe", *(one.name for one in measure)}
    return counter.forwards - 1, counter.backwards - 1


OF_ONE_PASS = {
    "empirical": [FisherSpectrum(), KFACQuality()],
    "reduce": [FisherSpectrum(center_gradients=True), KFACQuality(sharing="reduce")],
    "all": [FisherSpectrum(), GradientNoise(), KFACQuality()],
    "sampled": [FisherSpectrum(fisher="sampled"), KFACQuality(fisher="sampled")],
    "deterministic": [FisherSpectrum(deterministic=True), KFACQuality()],
}


@pytest.mark.parametrize("name", OF_ONE_PASS)
def test_fisher_and_kronecker_factors_come_from_one_pass(name: str) -> None:
    assert passes(*OF_ONE_PASS[name]) == (1, 1)


def test_layers_come_in_the_order_of_the_model() -> None:
    watching = new_monitor(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), measure=[KFACQuality()])
    assert [record.block for record in watching.step(0)] == [None, None, "0", "2"]


@pytest.mark.parametrize("name", sorted(OF_ONE_PASS.keys() - {"deterministic"}))
def test_in_either_order(name: str) -> None:
    assert passes(*reversed(OF_ONE_PASS[name])) == (1, 1)


def test_other_numbers_take_another_pass() -> None:
    assert passes(FisherSpectrum(), KFACQuality(fisher="sampled")) == (2, 2)
    assert passes(KFACQuality(), FisherSpectrum(deterministic=True)) == (2, 2)
    assert passes(FisherSpectrum(), KFACQuality(), KFACQuality(sharing="reduce")) == (2, 2)
    assert passes(FisherSpectrum(max_params_per_block=4), KFACQuality()) == (2, 2)


def test_what_is_switched_off_asks_for_no_factors(monkeypatch: Any) -> None:
    asked: list[Any] = []

    def noted(context: GramContext, microbatches: Any, blocks: Any, options: GramOptions) -> Any:
        asked.append(options.sharing)
        return block_grams(context, microbatches, blocks, options)

    monkeypatch.setattr(probe_grams, "block_grams", noted)
    watching = new_monitor(measure=[FisherSpectrum(), KFACQuality()])
    watching.load_state_dict({"previous": None, "failures": {"kfac_empirical_expand": 3}})
    watching.step(0)
    assert asked == [None]


def test_factors_that_do_not_fit_leave_the_grams(monkeypatch: Any) -> None:
    def out_of_memory(context: GramContext, microbatches: Any, blocks: Any, options: GramOptions) -> Any:
        if options.sharing is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return block_grams(context, microbatches, blocks, options)

    monkeypatch.setattr(probe_grams, "block_grams", out_of_memory)
    for measure in ([FisherSpectrum(), KFACQuality()], [KFACQuality(), FisherSpectrum()]):
        watching = new_monitor(measure=measure)
        watching.step(0)
        assert set(outcomes(watching, "empirical_fisher")) == {(0, None)}
        assert outcomes(watching, "kfac_empirical_expand") == [(0, "OutOfMemoryError: CUDA out of memory")]
