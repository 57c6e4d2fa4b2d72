"""What the Trainer's callback measures by default, and the proof that it is what the Trainer minimises."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer

from curvature_callbacks import ConfigurationError, KFACCoverage, TopEigenpairs
from curvature_callbacks.processes.world import SINGLE
from curvature_callbacks.transformers.callback import CurvatureCallback
from curvature_callbacks.transformers.measured import measured_loss
from tests.configurations.transformers_parts import focal
from tests.training_cases import callback_options
from tests.transformers.loss_cases import SMOOTHING, Passing, trainer_for
from tests.transformers_runs import Sentences, language_model, training_arguments


def trained_with(directory: Path, measure: Any, case: dict[str, Any], **changes: Any) -> CurvatureCallback:
    probing = CurvatureCallback(**callback_options(measure=measure, draw="fixed", **changes))
    trainer_for(directory, [probing], max_steps=1, **case).train()
    assert not any(record.failed for record in probing.history)
    return probing


CASES: dict[str, dict[str, Any]] = {
    "label smoothing": SMOOTHING,
    "compute_loss_func": {"arguments": lambda: {"compute_loss_func": focal}},
    "a `compute_loss` that only logs": {"kind": Passing, "data": Sentences},
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_without_an_argument_it_is_what_the_trainer_minimises(case: dict[str, Any], tmp_path: Path, caplog: Any) -> None:
    measure = [TopEigenpairs(k=1, which="LA", max_matvecs=20)]
    default = trained_with(tmp_path / "default", measure, case)
    follows = trained_with(tmp_path / "trainer", measure, case, loss_fn="trainer")
    found, expected = (
        [record.scalars["lambda_max"] for record in probing.history if "lambda_max" in record.scalars]
        for probing in (default, follows)
    )
    assert found == pytest.approx(expected, rel=1e-3)
    told = default.history[0].metadata["objective"]["by the training loop"]
    assert max(told.values()) <= 1e-4
    assert "own `.loss`" not in caplog.text


class OverLabels(Trainer):
    """Twice the mean over labels, which only its gradients tell from one over rows."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Tensor:
        return 2 * model(**inputs).loss


def test_what_a_computed_loss_averages_over_is_found_out_by_default_too(tmp_path: Path) -> None:
    measure = [TopEigenpairs(k=1, which="LA", max_matvecs=20, tol=1e-5)]
    case = {"kind": OverLabels, "data": Sentences, "model": language_model}
    default = trained_with(tmp_path / "default", measure, case, num_microbatches=3)
    own = trained_with(tmp_path / "own", measure, {"data": Sentences}, num_microbatches=3)
    found, expected = (
        next(record.scalars["lambda_max"] for record in probing.history if record.measurement == "hessian")
        for probing in (default, own)
    )
    assert found == pytest.approx(2 * expected, rel=1e-3)


def test_a_compute_loss_that_only_logs_keeps_the_likelihood(tmp_path: Path) -> None:
    trained_with(
        tmp_path, [TopEigenpairs(operator="ggn", k=1, which="LA", max_matvecs=8)], CASES["a `compute_loss` that only logs"]
    )


class Anchored(Trainer):
    """Holds the model near a copy of itself: at the copy, where training begins, that is zero with its gradient."""

    def __init__(self, model: nn.Module, **arguments: Any) -> None:
        super().__init__(model, **arguments)
        self.reference = copy.deepcopy(model).eval().requires_grad_(False)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        outputs = model(**inputs)
        with torch.no_grad():
            before = self.reference(input_ids=inputs["input_ids"]).logits
        loss = outputs.loss + 10 * F.mse_loss(outputs.logits, before)
        return (loss, outputs) if return_outputs else loss


def test_what_is_zero_where_training_begins_is_part_of_what_is_measured(tmp_path: Path) -> None:
    tops = []
    for loss_fn in (None, "trainer"):
        torch.manual_seed(0)
        probing = CurvatureCallback(**callback_options(measure=[TopEigenpairs(k=1, tol=1e-4)], draw="fixed", loss_fn=loss_fn))
        arguments = training_arguments(tmp_path / str(loss_fn), max_steps=4, learning_rate=1e-2)
        Anchored(model=language_model(), args=arguments, train_dataset=Sentences(), callbacks=[probing]).train()
        tops.append([record.scalars["lambda_max"] for record in probing.history if record.measurement == "hessian"])
    assert len(tops[0]) > 1
    assert tops[0] == pytest.approx(tops[1], rel=1e-3)


def test_where_the_trainer_was_not_found_that_is_pointed_out(tmp_path: Path, caplog: Any) -> None:
    args = training_arguments(tmp_path, label_smoothing_factor=0.1)
    measured = measured_loss(None, False, args=args, trainer=None, world=SINGLE)
    assert (measured.loss, measured.loop) == (None, None)
    assert caplog.text.count("own `.loss`, without `label_smoothing_factor`: pass `loss_fn`='trainer'") == 1


def twice(model: nn.Module, batch: Any) -> Tensor:
    return 2 * model(**batch).loss


def test_another_loss_is_refused_unless_a_function_chooses_it(tmp_path: Path, caplog: Any) -> None:
    probing = CurvatureCallback(**callback_options(measure=[KFACCoverage()], loss_fn=nn.CrossEntropyLoss(label_smoothing=0.3)))
    trainer = trainer_for(tmp_path / "refused", [probing])
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(ConfigurationError, match=r"that of the Trainer's `compute_loss` .*Pass `loss_fn`='trainer'"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    chosen = trained_with(tmp_path / "chosen", [KFACCoverage()], {}, loss_fn=twice)
    told = chosen.history[0].metadata["objective"]["by the training loop"]
    assert told == pytest.approx({"value": 0.5, "gradient": 0.5}, rel=1e-4)
    assert caplog.text.count("another loss than the one that trains") == 1
