"""The loss that a Hugging Face Trainer minimises, evaluated for a probe without leaving a trace in the Trainer."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_pt_utils import LabelSmoother

from curvature_callbacks.batches import take_rows
from curvature_callbacks.errors import ConfigurationError
from curvature_callbacks.isolation.objects import CONTAINERS, reachable
from curvature_callbacks.isolation.replicas import replica
from curvature_callbacks.isolation.snapshot import put_back, undisturbed
from curvature_callbacks.model.loss.own import OwnLoss
from curvature_callbacks.model.loss.recording import is_recorded
from curvature_callbacks.model.loss.resolve import Loss
from curvature_callbacks.model.loss.sample_losses import IGNORED, SampleLosses, cross_entropies, shifted_cross_entropies
from curvature_callbacks.processes.world import World

_SHARED_FROM: Final = frozenset({"transformers", "accelerate", "datasets"})
_SHARED: Final = (nn.Module, Optimizer, LRScheduler, Dataset)  # which a loss does not change, and large
_MATCH: Final = 1e-5  # relative; float32 means of a few rows differ by 1e-7, those with other weights seldom by less than 1e-4
_LEFT_ALONE: Final = frozenset(  # data (lists are data sets too), functions that no loss calls, and our own watch
    {"train_dataset", "eval_dataset", "model_init", "compute_metrics", "preprocess_logits_for_metrics", "compute_loss"}
)

_Count = Callable[[Tensor], Tensor]


def departures(args: TrainingArguments, trainer: Trainer | None) -> list[str]:
    """Human-readable reasons why the trained loss is not the model's own; none where it is."""
    reasons = {
        "`label_smoothing_factor`": bool(args.label_smoothing_factor),
        "`compute_loss_func`": getattr(trainer, "compute_loss_func", None) is not None,
        "an overridden `compute_loss`": trainer is not None and _is_overridden(trainer),
    }
    return [name for name, present in reasons.items() if present]


def loss_of_trainer(trainer: Trainer | None, world: World) -> Loss:
    """The loss of `loss_fn="trainer"`.

    None, the model's own, where `trainer` minimises that; the smoothed cross-entropy, target by target, where it smooths
    labels and does nothing else; what its `compute_loss` returns in all other cases, with `num_items_in_batch` left None.

    Args:
        trainer: None where it was not found.
        world: the processes that train.

    Raises:
        ConfigurationError: there is no Trainer, or an overridden `compute_loss` in a run of several processes.
    """
    if trainer is None:
        raise ConfigurationError(
            "`loss_fn`='trainer' needs the Trainer, which was not found: call `callback.attach(trainer)` before training."
        )
    if _is_overridden(trainer) and world.size > 1:
        raise ConfigurationError(
            "`loss_fn`='trainer' with an overridden `compute_loss` must run in a single process, got "
            f"{world.size}: it may gather over them, and probes of different ranks need not evaluate it equally "
            "often. Pass a function `(model, batch) -> scalar mean or (N,) losses`."
        )
    if _is_overridden(trainer) or trainer.compute_loss_func is not None:
        return _ComputedLoss(trainer, world)
    if trainer.label_smoother is None:
        return None
    is_known = type(trainer.label_smoother) is LabelSmoother and trainer.label_smoother.ignore_index == IGNORED
    return _SmoothedLoss(trainer.label_smoother.epsilon) if is_known else _ComputedLoss(trainer, world)


@final
class ComputeLossWatch:
    """Shows every training batch to `offer` before `compute_loss` takes its labels away; `remove` ends that.

    A forward pre-hook of the model sees what `compute_loss` passes on, which is not what it was given.
    """

    def __init__(self, trainer: Trainer, offer: Callable[[Any], None]) -> None:
        self._attributes = vars(trainer)
        self._offer = offer
        function, attribute = trainer.compute_loss, self._attributes.get("compute_loss")
        self._watched = function if isinstance(function, _Watched) else _Watched(function, attribute, [])
        self._watched.offers.append(offer)
        self._attributes["compute_loss"] = self._watched

    def remove(self) -> None:
        """Put the Trainer back as it was, if nobody else watches it."""
        self._watched.offers.remove(self._offer)
        if self._watched.offers or self._attributes.get("compute_loss") is not self._watched:
            return
        del self._attributes["compute_loss"]
        if self._watched.attribute is not None:
            self._attributes["compute_loss"] = self._watched.attribute


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Watched:
    """Stands in place of `compute_loss`; `attribute` is what the Trainer itself, not its class, had under that name."""

    compute_loss: Callable[..., Any]
    attribute: Any
    offers: list[Callable[[Any], None]]

    def __call__(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training:  # neither a probe nor an evaluation
            for offer in self.offers:
                offer(dict(inputs) if isinstance(inputs, Mapping) else inputs)
        return self.compute_loss(model, inputs, *args, **kwargs)


def _is_overridden(trainer: Trainer) -> bool:
    attribute = vars(trainer).get("compute_loss")
    if isinstance(attribute, _Watched):
        attribute = attribute.attribute
    return attribute is not None or type(trainer).compute_loss is not Trainer.compute_loss


@final
class _SmoothedLoss:
    """What `label_smoothing_factor` trains: the model without its labels, then their smoothed cross-entropy.

    Shifted for the classes that Transformers lists as causal, as the Trainer decides it, whatever their own loss does. A
    batch without labels has the model's own loss.
    """

    def __init__(self, epsilon: float) -> None:
        self._epsilon = epsilon
        self._own = OwnLoss()

    def __call__(self, model: nn.Module, batch: Mapping[str, Any]) -> SampleLosses:
        if "labels" not in batch:
            return self._own(model, batch)
        output: Any = model(**{name: value for name, value in batch.items() if name != "labels"})
        logits = output["logits"] if isinstance(output, dict) else output[0]
        form = shifted_cross_entropies if _shifts_labels(model) else cross_entropies
        return form(logits, batch["labels"], label_smoothing=self._epsilon)


def _shifts_labels(model: nn.Module) -> bool:
    within: Any = getattr(model, "get_base_model", None)  # of PEFT's wrapper
    return type(model if within is None else within()).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


@final
class _ComputedLoss:
    """The value of `trainer.compute_loss`, a mean over the batch or one loss per row; nothing else is known of it.

    A mean is one over rows, or over the labels that are not ignored where single rows say so: until gradients are asked for
    the first time, batches whose rows have different numbers of labels are evaluated row by row as well.
    """

    def __init__(self, trainer: Trainer, world: World) -> None:
        self._trainer = trainer
        self._world = world
        self._compute_loss = trainer.compute_loss
        self._count: _Count | None = None
        self._is_settled = False

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        loss = self._value(model, batch)
        if not isinstance(loss, Tensor) or loss.ndim or not isinstance(batch, Mapping):
            return loss
        self._is_settled |= is_recorded()  # such a pass may be watched: one evaluation only
        if not self._is_settled:
            self._settle(self._matching_count(model, batch, loss))
        if self._count is None:
            return loss
        counts = self._count(batch["labels"])
        return SampleLosses(loss * counts.sum() if counts.any() else loss.new_zeros(()), counts, None)

    def _value(self, model: nn.Module, batch: Any) -> Any:
        inputs = dict(batch) if isinstance(batch, Mapping) else batch  # its labels are popped
        device = next(model.parameters()).device
        generators = torch.random.fork_rng([device] if device.type == "cuda" else [])
        with _trainer_without_trace(self._trainer), generators:  # noise of its own is the same at every evaluation of a probe
            return self._compute_loss(model, inputs)

    def _settle(self, count: str | None) -> None:
        """Agree on the name of a count; all processes call it once, at their first batch, and one that knows is enough."""
        names = {name for name in self._world.gathered(count) if name is not None}
        if len(names) > 1:
            raise ConfigurationError(
                f"processes find that the Trainer's loss is a mean over different things ({', '.join(sorted(names))}): pass a "
                "function `(model, batch) -> scalar mean or (N,) losses`."
            )
        self._count = _COUNTS[names.pop()] if names else None
        self._is_settled = self._count is not None or self._world.size > 1

    def _matching_count(self, model: nn.Module, batch: Mapping[str, Any], loss: Tensor) -> str | None:
        """The name of the only count by which losses of single rows average to `loss`; None where they do not differ."""
        labels = batch.get("labels")
        if not isinstance(labels, Tensor) or labels.ndim != 2 or IGNORED not in labels:
            return None
        single = torch.stack([self._value(model, take_rows(batch, row)) for row in torch.arange(len(labels))[:, None]])
        single = single.nan_to_num()  # of rows without a label, which count nothing
        means = {name: (single * count(labels)).sum() / count(labels).sum() for name, count in _COUNTS.items()}
        matching = [name for name, mean in means.items() if bool((mean - loss).abs() <= _MATCH * loss.abs())]
        return matching[0] if len(matching) == 1 else None


def _rows_with_labels(labels: Tensor) -> Tensor:
    """(N,) 1 for each row with a label."""
    return (_given(labels) > 0).to(torch.int64)


def _following(labels: Tensor) -> Tensor:
    """(N,) labels that a causal model is to predict."""
    return _given(labels[:, 1:])


def _given(labels: Tensor) -> Tensor:
    """(N,) labels that are not ignored."""
    return (labels != IGNORED).sum(1)


_COUNTS: Final[Mapping[str, _Count]] = {"rows": _rows_with_labels, "labels that follow": _following, "labels": _given}


@contextmanager
def _trainer_without_trace(trainer: Trainer) -> Iterator[None]:
    """`trainer.log` does nothing; attributes of the Trainer, its arguments, its state and its control flags, learning rates,
    generators, and what its `compute_loss_func` collects are as before."""
    attributes = vars(trainer)
    groups = trainer.optimizer.param_groups if trainer.optimizer is not None else []
    scheduler = vars(trainer.lr_scheduler) if trainer.lr_scheduler is not None else {}
    held = (attributes, vars(trainer.state), vars(trainer.control), vars(trainer.args), scheduler, *groups)
    own = {name: value for name, value in attributes.items() if name not in _LEFT_ALONE and not _is_shared(value)}
    collected = [value for value in reachable((trainer.compute_loss_func,)) if type(value) in CONTAINERS]
    memo: dict[int, Any] = {}
    with put_back([*collected, *held]), undisturbed(*own.values()):
        attributes.update({name: replica(value, memo) for name, value in own.items()})
        attributes["log"] = lambda *args, **kwargs: None
        yield


def _is_shared(value: Any) -> bool:
    return isinstance(value, _SHARED) or any(cls.__module__.partition(".")[0] in _SHARED_FROM for cls in type(value).__mro__)
