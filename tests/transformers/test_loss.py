"""`loss_fn="trainer"`: the loss measured is the one the Trainer minimises, and evaluating it leaves no trace in the Trainer."""

import copy
import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2LMHeadModel, Trainer
from transformers.trainer_pt_utils import LabelSmoother

from curvature_callbacks import ConfigurationError, FisherSpectrum, Record, TopEigenpairs, compute_spectrum
from curvature_callbacks.model.loss.sample_losses import SampleLosses
from curvature_callbacks.transformers import loss as trainer_loss
from curvature_callbacks.transformers.callback import CurvatureCallback
from curvature_callbacks.transformers.loss import ComputeLossWatch, loss_of
from tests.configurations.transformers_cases import (
    CASES,
    PenalisedTrainer,
    Unpadded,
    assert_same_bits,
    collected,
    collecting_focal,
    focal,
    mask_filler,
    penalties,
)
from tests.training_cases import (
    Checksum,
    Stream,
    assert_equal,
    assert_probed,
    callback_options,
    global_generators,
    probed_steps,
    reports,
    seed_everything,
)
from tests.transformers_runs import Sentences, language_model, training_arguments

SMOOTHING = {"label_smoothing_factor": 0.2}


class Unlisted(GPT2LMHeadModel):
    """A model that shifts inside itself and that the Trainer, which goes by names, does not know to be causal."""


def unlisted() -> nn.Module:
    return Unlisted(language_model().config)


def adapted() -> nn.Module:
    settings = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    return get_peft_model(language_model(), settings)


def trainer_for(
    directory: Any,
    callbacks: Any = (),
    *,
    kind: type[Trainer] = Trainer,
    model: Callable[[], nn.Module] = language_model,
    data: Callable[[], Any] = Unpadded,
    arguments: Callable[[], dict[str, Any]] = dict,
    **changes: Any,
) -> Trainer:
    seed_everything()
    made = {"model": model(), "args": training_arguments(directory, **changes), "train_dataset": data()}
    return kind(**made, callbacks=list(callbacks), **arguments())


def callback(**changes: Any) -> CurvatureCallback:
    return CurvatureCallback(**callback_options(loss_fn="trainer", **changes))


def batch_of(trainer: Trainer, rows: int = 5) -> dict[str, Tensor]:
    return trainer.data_collator([trainer.train_dataset[i] for i in range(rows)])


def evaluated(trainer: Trainer, batch: dict[str, Tensor]) -> Any:
    function: Any = loss_of(trainer)
    return function(trainer.model.eval(), batch)


# ----------------------------------------------------------------------------------------------------------------- value


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
    function: Any = loss_of(trainer)
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
    assert loss_of(trainer_for(tmp_path)) is None


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
    probing = callback(measure=measure, num_microbatches=1, microbatch_size=24, draw="fixed")
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

    probing = callback(measure=[FisherSpectrum()])
    trainer = trainer_for(tmp_path, [probing], data=Sentences, arguments=lambda: {"compute_loss_func": of_rows})
    trainer.train()
    assert_probed(probing.history, [0, 2, 4], {"probe", "empirical_fisher"})


class Passing(Trainer):
    """The model's own loss by way of an overridden `compute_loss`, as a logging subclass gives it."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)


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
    probing = callback(num_microbatches=3, draw="fixed")
    trainer_for(tmp_path / "trainer", [probing], kind=kind, model=model, data=Sentences).train()
    assert_probed(probing.history, [0, 2, 4])
    if kind is Passing:
        own = CurvatureCallback(**callback_options(num_microbatches=3, draw="fixed"))
        trainer_for(tmp_path / "own", [own], model=model, data=Sentences).train()
        assert spectrum(probing.history) == pytest.approx(spectrum(own.history), rel=1e-3)


class TwoProcesses:
    """As far as the loss asks: another process, whose rows have told what the mean is over."""

    rank, size = 0, 2

    def __init__(self, told: str | None) -> None:
        self.told = told

    def gathered(self, value: Any) -> list[Any]:
        return [value, self.told]


@pytest.mark.parametrize("told", ["labels that follow", "rows", None])
def test_what_one_process_can_tell_holds_for_all(told: str | None, tmp_path: Path, monkeypatch: Any) -> None:
    trainer = trainer_for(tmp_path, kind=Passing, data=Sentences)
    batch = dict(batch_of(trainer))
    batch["labels"] = batch["input_ids"].clone()  # rows of one length tell nothing
    N, T = batch["labels"].shape
    monkeypatch.setattr(trainer_loss, "current_world", lambda: TwoProcesses(told))
    with torch.no_grad():
        found = trainer_loss._ComputedLoss(trainer)(trainer.model.eval(), batch)
    if told is None:
        assert found.ndim == 0
    else:
        assert found.num_targets.tolist() == [1 if told == "rows" else T - 1] * N


def test_processes_that_contradict_each_other_are_refused(tmp_path: Path, monkeypatch: Any) -> None:
    loss = trainer_loss._ComputedLoss(trainer_for(tmp_path, kind=Passing, data=Sentences))
    monkeypatch.setattr(trainer_loss, "current_world", lambda: TwoProcesses("rows"))
    with pytest.raises(ConfigurationError, match=r"mean over different things \(labels, rows\).*pass"):
        loss._settle("labels")


def test_rows_without_any_label_are_no_obstacle(tmp_path: Path) -> None:
    class Emptied(Sentences):
        def __init__(self) -> None:
            super().__init__()
            self.labels[::2] = -100

    probing = callback(num_microbatches=1, microbatch_size=24)
    trainer_for(tmp_path, [probing], kind=Passing, data=Emptied).train()
    assert_probed(probing.history, [0, 2, 4])


# ----------------------------------------------------------------------------------------------------------------- trace


@pytest.mark.parametrize(
    ("case", "observed"),
    [({"kind": PenalisedTrainer}, penalties), ({"arguments": collecting_focal}, collected)],
    ids=["compute_loss", "compute_loss_func"],
)
def test_an_evaluation_leaves_nothing_behind_and_gives_the_same_twice(case: Any, observed: Any, tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, **case)
    trainer.train()
    attributes = dict(vars(trainer))
    before = copy.deepcopy([observed(trainer), trainer.state.log_history, vars(trainer.control), global_generators()])
    batch = batch_of(trainer)
    first, second = evaluated(trainer, batch), evaluated(trainer, batch)
    assert first.requires_grad
    assert torch.equal(first, second)
    assert sorted(batch) == ["input_ids", "labels"]
    assert_equal(before, [observed(trainer), trainer.state.log_history, vars(trainer.control), global_generators()])
    assert vars(trainer).keys() == attributes.keys()
    assert all(value is attributes[name] for name, value in vars(trainer).items())


def test_an_exception_leaves_nothing_behind(tmp_path: Path) -> None:
    class Failing(PenalisedTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            super().compute_loss(*args, **kwargs)
            self.invented = 1
            raise RuntimeError("of the user's own")

    trainer = trainer_for(tmp_path, kind=Failing)
    before = copy.deepcopy(penalties(trainer))
    with pytest.raises(RuntimeError, match="of the user's own"):
        evaluated(trainer, batch_of(trainer))
    assert_equal(before, penalties(trainer))
    assert not hasattr(trainer, "invented")
    assert "log" not in vars(trainer)


@pytest.mark.parametrize("name", ["compute_loss measured", "compute_loss_func measured"])
def test_without_that_training_differs(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(trainer_loss, "_trainer_without_trace", lambda trainer: nullcontext())
    with pytest.raises(AssertionError, match=r"state|logged"):
        assert_same_bits(CASES[name], tmp_path)


# --------------------------------------------------------------------------------------------------------------- streams


def test_two_callbacks_watch_a_stream_and_leave_the_trainer_as_it_was(tmp_path: Path, caplog: Any) -> None:
    first, second = callback(), callback(every_n_steps=1)
    trainer = trainer_for(tmp_path, [first, second], data=lambda: Stream(Sentences()), **SMOOTHING)
    trainer.train()
    assert_probed(first.history, [1, 2, 4])
    assert_probed(second.history, [1, 2, 3, 4, 5])
    assert "compute_loss" not in vars(trainer)
    assert not reports(caplog)


@pytest.mark.parametrize("order", [1, -1])
def test_the_last_watch_puts_a_compute_loss_of_the_users_back(order: int, tmp_path: Path) -> None:
    trainer, seen = trainer_for(tmp_path), []
    own = trainer.compute_loss = lambda model, inputs, **kwargs: inputs.pop("labels")  # type: ignore[method-assign]
    watches = [ComputeLossWatch(trainer, seen.append) for _ in range(2)][::order]
    batch = batch_of(trainer)
    trainer.compute_loss(trainer.model.train(), batch)
    trainer.compute_loss(trainer.model.eval(), batch_of(trainer))
    assert [sorted(one) for one in seen] == [["input_ids", "labels"]] * 2
    watches[0].remove()
    assert trainer.compute_loss is not own
    watches[1].remove()
    assert trainer.compute_loss is own


def test_evaluation_batches_of_a_stream_are_not_kept(tmp_path: Path) -> None:
    trainer, seen = trainer_for(tmp_path, **SMOOTHING), []
    ComputeLossWatch(trainer, seen.append)
    trainer.evaluate(Sentences(8))
    assert not seen


# --------------------------------------------------------------------------------------------------------------- refusals


def needing_the_number(outputs: Any, labels: Tensor, num_items_in_batch: Any) -> Tensor:
    return F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum") / num_items_in_batch


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (needing_the_number, "the loss of a first probe could not be computed.*NoneType"),
        (lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum(2), r"returned shape \(3, 6\)"),
        (lambda outputs, labels, num_items_in_batch=None: 1.0, "returned float instead of a tensor"),
    ],
    ids=["number needed", "per token", "no tensor"],
)
def test_a_loss_that_cannot_be_evaluated_stops_the_run_before_step_1(function: Any, match: str, tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, [callback()], arguments=lambda: {"compute_loss_func": function})
    with pytest.raises(ConfigurationError, match=match):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_trainer_that_is_not_found_is_asked_for(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("curvature_callbacks.transformers.callback.calling_trainer", lambda callback: None)
    with pytest.raises(ConfigurationError, match=r"`loss_fn`='trainer' needs the Trainer.*callback.attach"):
        trainer_for(tmp_path, [callback()], **SMOOTHING).train()
    own = CurvatureCallback(**callback_options())
    with pytest.raises(ConfigurationError, match=r"stream, label smoothing.*callback.attach"):
        trainer_for(tmp_path, [own], data=lambda: Stream(Sentences()), **SMOOTHING).train()


def test_an_overridden_compute_loss_is_refused_with_several_processes(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(trainer_loss, "current_world", lambda: type("World", (), {"size": 2}))
    with pytest.raises(ConfigurationError, match="an overridden `compute_loss` must run in a single process, got 2"):
        loss_of(trainer_for(tmp_path, kind=PenalisedTrainer))


def test_a_name_that_is_none_is_answered_with_those_there_are() -> None:
    from curvature_callbacks.lightning.callback import CurvatureCallback as OfLightning

    names, also = "'cross_entropy', 'mse', 'bce', got ", ".*Hugging Face also takes 'trainer'"
    with pytest.raises(ConfigurationError, match=names + "'trainers'" + also):
        CurvatureCallback(loss_fn="trainers")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=names + "'trainer'" + also):
        OfLightning(loss_fn="trainer")  # type: ignore[arg-type]


def test_nothing_is_warned_about_where_the_trained_loss_is_measured(tmp_path: Path, caplog: Any) -> None:
    trainer_for(tmp_path, [callback(measure=[Checksum()])], max_steps=1, **SMOOTHING).train()
    assert not reports(caplog)


# -------------------------------------------------------------------------------------------------------------- lifetime


def test_a_trainer_is_freed_without_the_garbage_collector_as_without_the_callback(tmp_path: Path) -> None:
    """One in a cycle goes with the next collection, and its persistent workers then take five seconds to end."""
    probing = callback(measure=[Checksum()])
    trainer = trainer_for(tmp_path, [probing])
    trainer.train()
    found = weakref.ref(trainer)
    gc.disable()
    try:
        del trainer
        assert found() is None
    finally:
        gc.enable()
    assert probed_steps(probing.history) == [0, 2, 4]
