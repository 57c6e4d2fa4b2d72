"""The loss that a Trainer minimises, measured: its value, its samples, the curvature."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer
from transformers.trainer_pt_utils import LabelSmoother

from curvature_callbacks import FisherSpectrum, Record, TopEigenpairs, compute_spectrum
from curvature_callbacks.model.loss.sample_losses import SampleLosses
from curvature_callbacks.processes.world import SINGLE
from curvature_callbacks.transformers.callback import CurvatureCallback
from curvature_callbacks.transformers.loss import loss_of_trainer
from tests.configurations.transformers_parts import focal, mask_filler
from tests.training_cases import assert_probed, callback_options
from tests.transformers.loss_cases import SMOOTHING, Passing, adapted, batch_of, evaluated, new_callback, trainer_for, unlisted
from tests.transformers_runs import Sentences, language_model


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
@pytest.mark.parametrize("model", [language_model, mask_filler, unlisted, adapted], ids=lambda make: make.__name__)
def test_the_smoothed_loss_is_the_trainers_and_knows_its_targets(model: Any, tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, model=model, data=Sentences, **SMOOTHING)
    batch = batch_of(trainer)
    losses = evaluated(trainer, batch)
    assert isinstance(losses, SampleLosses)
    assert losses.predictive is not None
    expected = trainer.compute_loss(trainer.model, dict(batch))
    torch.testing.assert_close(losses.total / losses.num_targets.sum(), expected)


def test_a_batch_without_labels_is_not_smoothed(tmp_path: Path) -> None:
    class LossFirst(nn.Module):
        def forward(self, input_ids: Tensor) -> Any:
            return type("Output", (), {"loss": self.weight.square().sum()})

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

    trainer = trainer_for(tmp_path, **SMOOTHING)
    function: Any = loss_of_trainer(trainer, SINGLE)
    losses = function(LossFirst(), {"input_ids": torch.ones(2, 4)})
    assert (losses.total / losses.num_targets.sum()).item() == 3


@pytest.mark.parametrize("changed", [{"ignore_index": 0}, {"__call__": None}], ids=["ignore_index", "class"])
def test_a_smoother_of_the_users_own_is_only_called(changed: dict[str, Any], tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, **SMOOTHING)
    own = type("Own", (LabelSmoother,), {}) if "__call__" in changed else LabelSmoother
    trainer.label_smoother = own(epsilon=0.3, **{key: value for key, value in changed.items() if key != "__call__"})
    batch = batch_of(trainer)
    assert torch.equal(evaluated(trainer, batch), trainer.compute_loss(trainer.model, dict(batch)))


def test_a_trainer_without_a_loss_of_its_own_is_measured_for_the_models(tmp_path: Path) -> None:
    assert loss_of_trainer(trainer_for(tmp_path), SINGLE) is None


def hessian(records: list[Record]) -> float:
    return next(record.scalars["lambda_max"] for record in records if record.measurement == "hessian")


@pytest.mark.parametrize(
    ("case", "loss"),
    [
        (
            {"arguments": lambda: {"compute_loss_func": focal}},
            lambda model, batch: focal(model(batch["input_ids"]), batch["labels"]),
        ),
        (SMOOTHING, lambda model, batch: smoothed(model(batch["input_ids"]).logits, batch["labels"])),
    ],
    ids=["compute_loss_func", "label smoothing"],
)
def test_curvature_is_that_of_the_loss_that_is_trained(case: dict[str, Any], loss: Any, tmp_path: Path) -> None:
    measure = [TopEigenpairs(k=2, max_matvecs=40, tol=1e-4)]
    probing = new_callback(measure=measure, num_microbatches=1, microbatch_size=24, draw="fixed")
    trainer = trainer_for(tmp_path, [probing], max_steps=1, **case)
    model, batch = copy.deepcopy(trainer.model), batch_of(trainer, 24)
    trainer.train()
    found = compute_spectrum(model.eval(), batch, loss=loss, k=2, max_matvecs=40, tol=1e-4)
    assert hessian(probing.history) == pytest.approx(found.eigenvalues[0].item(), rel=1e-3)
    own = compute_spectrum(model, batch, k=2, max_matvecs=40, tol=1e-4).eigenvalues[0].item()
    assert hessian(probing.history) != pytest.approx(own, rel=1e-2)


def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    """Rows at a time, from the definition."""
    logarithms = logits[:, :-1].log_softmax(-1)
    given = logarithms.gather(-1, labels[:, 1:, None])[..., 0]
    return -(0.8 * given + 0.2 * logarithms.mean(-1)).mean(1)


def test_losses_of_single_rows_are_taken_as_such(tmp_path: Path) -> None:
    def of_rows(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        losses = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
        rows = losses.reshape(len(labels), -1).sum(1)
        return rows if num_items_in_batch is None else rows.sum() / num_items_in_batch

    probing = new_callback(measure=[FisherSpectrum()])
    trainer = trainer_for(tmp_path, [probing], data=Sentences, arguments=lambda: {"compute_loss_func": of_rows})
    trainer.train()
    assert_probed(probing.history, [0, 2, 4], {"probe", "empirical_fisher"})


class Averaging(Trainer):
    """The mean over rows of the means over their tokens."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        labels = inputs["labels"]
        outputs = model(input_ids=inputs["input_ids"])
        losses = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
        return (losses.reshape(len(labels), -1).sum(1) / (labels[:, 1:] != -100).sum(1)).mean()


def spectrum(records: list[Record]) -> dict[str, float]:
    return {key: record.scalars[key] for record in records if record.block is None for key in record.scalars if "lambda" in key}


@pytest.mark.parametrize(
    ("kind", "model"),
    [(Passing, language_model), pytest.param(Passing, mask_filler, marks=pytest.mark.slow), (Averaging, language_model)],
)
def test_a_mean_over_ragged_tokens_or_rows_is_told_apart_by_its_rows(kind: Any, model: Any, tmp_path: Path) -> None:
    probing = new_callback(num_microbatches=3, draw="fixed")
    trainer_for(tmp_path / "trainer", [probing], kind=kind, model=model, data=Sentences).train()
    assert_probed(probing.history, [0, 2, 4])
    if kind is Passing:
        own = CurvatureCallback(**callback_options(num_microbatches=3, draw="fixed"))
        trainer_for(tmp_path / "own", [own], model=model, data=Sentences).train()
        assert spectrum(probing.history) == pytest.approx(spectrum(own.history), rel=1e-3)


def test_rows_without_any_label_are_no_obstacle(tmp_path: Path) -> None:
    class Emptied(Sentences):
        def __init__(self) -> None:
            super().__init__()
            self.labels[::2] = -100

    probing = new_callback(num_microbatches=1, microbatch_size=24)
    trainer_for(tmp_path, [probing], kind=Passing, data=Emptied).train()
    assert_probed(probing.history, [0, 2, 4])
