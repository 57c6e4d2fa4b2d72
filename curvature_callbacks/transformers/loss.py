"""The loss that a Hugging Face Trainer minimises, evaluated for a probe without leaving a trace in the Trainer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_pt_utils import LabelSmoother
from typing_extensions import override

from curvature_callbacks.errors import ConfigurationError
from curvature_callbacks.isolation.objects import CONTAINERS, reachable
from curvature_callbacks.isolation.replicas import replica
from curvature_callbacks.isolation.snapshot import put_back, undisturbed
from curvature_callbacks.microbatch import Microbatch, as_microbatch
from curvature_callbacks.model.loss.averages import Averages, Evaluate
from curvature_callbacks.model.loss.evidence import contradicted_averages, telling_rows
from curvature_callbacks.model.loss.own import OwnLoss
from curvature_callbacks.model.loss.resolve import Loss, MicrobatchLoss
from curvature_callbacks.model.loss.sample_losses import IGNORED, SampleLosses, cross_entropies, shifted_cross_entropies
from curvature_callbacks.processes.world import World

_SHARED_FROM: Final = frozenset({"transformers", "accelerate", "datasets"})
_SHARED: Final = (nn.Module, Optimizer, LRScheduler, Dataset)  # which a loss does not change, and large
_LEFT_ALONE: Final = frozenset(  # data (lists are data sets too), functions that no loss calls, and our own watch
    {"train_dataset", "eval_dataset", "model_init", "compute_metrics", "preprocess_logits_for_metrics", "compute_loss"}
)


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
        return _ComputedLoss(trainer)
    if trainer.label_smoother is None:
        return None
    is_known = type(trainer.label_smoother) is LabelSmoother and trainer.label_smoother.ignore_index == IGNORED
    return _SmoothedLoss(trainer.label_smoother.epsilon) if is_known else _ComputedLoss(trainer)


def computes_in_its_own_way(trainer: Trainer) -> bool:
    """Whether its `compute_loss` is not the Trainer's, so that processes need not call it equally often."""
    return _is_overridden(trainer)


def is_computed(loss: Loss) -> bool:
    """Whether a loss of `loss_of_trainer` is what `compute_loss` returns, and no loss of the same value."""
    return isinstance(loss, _ComputedLoss)


def computed_loss(trainer: Trainer, model: nn.Module, batch: Any, *, num_items: Tensor | None = None) -> Any:
    """What the Trainer's `compute_loss` returns for a microbatch, leaving no trace.

    Args:
        trainer: of the run.
        model: in place of the one it trains.
        batch: on the model's device, or its `Microbatch`.
        num_items: its `num_items_in_batch`, None as in an evaluation.
    """
    content = batch.content if isinstance(batch, Microbatch) else batch
    inputs = dict(content) if isinstance(content, Mapping) else content  # its labels are popped
    items: dict[str, Any] = {} if num_items is None else {"num_items_in_batch": num_items}
    with _trainer_without_trace(trainer):
        return trainer.compute_loss(model, inputs, **items)


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
class _SmoothedLoss(MicrobatchLoss):
    """What `label_smoothing_factor` trains: the model without its labels, then their smoothed cross-entropy.

    Shifted for the classes that Transformers lists as causal, as the Trainer decides it, whatever their own loss does. A
    batch without labels has the model's own loss.
    """

    def __init__(self, epsilon: float) -> None:
        self._epsilon = epsilon
        self._own = OwnLoss()

    @override
    def __call__(self, model: nn.Module, microbatch: Any) -> SampleLosses:
        batch = as_microbatch(microbatch).content
        if "labels" not in batch:
            return self._own(model, microbatch)
        output: Any = model(**{name: value for name, value in batch.items() if name != "labels"})
        logits = output["logits"] if isinstance(output, dict) else output[0]
        form = shifted_cross_entropies if _shifts_labels(model) else cross_entropies
        return form(logits, batch["labels"], label_smoothing=self._epsilon)


def _shifts_labels(model: nn.Module) -> bool:
    within: Any = getattr(model, "get_base_model", None)  # of PEFT's wrapper
    return type(model if within is None else within()).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


@final
class _ComputedLoss(MicrobatchLoss):
    """The value of `trainer.compute_loss`, one loss per row or a mean over the batch, of which nothing else is known.

    What it is a mean over is found out by `settle`; until then, and where it is neither rows nor labels, it is one over rows.

    It is called without `num_items_in_batch`, as in an evaluation. A `compute_loss_func` that needs it, or sums over the batch
    without it, is given what the Trainer counts, the labels of the batch, and is a mean over these where it divides by it.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._averages = Averages()
        self._items: _Items | None = None if trainer.compute_loss_func is not None else _Items.UNUSED

    @override
    def __call__(self, model: nn.Module, microbatch: Any) -> Any:
        batch = as_microbatch(microbatch)
        loss = self._value(model, batch)
        if not isinstance(loss, Tensor) or loss.ndim:
            return loss
        counts = self._num_items(batch)
        if self._items is _Items.DIVIDED_BY and counts is not None:
            return SampleLosses(loss * counts.sum() if counts.any() else loss.new_zeros(()), counts, None)
        losses = self._averages.losses(loss, batch)
        return loss if losses is None else losses

    def settle(self, evaluate: Evaluate, microbatches: Sequence[Any], world: World) -> None:
        """Find out what the loss is a mean over; see `Settling`."""
        if self._items is None:
            found = [evaluate(self._use_of_items, batch) for batch in microbatches[:1]]
            self._items = max((each for uses in world.gathered(found) for each in uses), key=list(_Items).index)
        self._averages.settle(lambda batch: evaluate(self._contradicted, batch), microbatches, world)

    def _contradicted(self, model: nn.Module, batch: Any) -> frozenset[str] | None:
        return contradicted_averages(self._value, model, batch)

    def _use_of_items(self, model: nn.Module, batch: Any) -> "_Items":
        """How the loss has to be given `num_items_in_batch`: it is a sum without it, and half of that for two as for one."""
        if self._num_items(batch) is None:
            return _Items.UNUSED
        rows = telling_rows(batch)
        try:
            alone = computed_loss(self._trainer, model, rows)
        except TypeError:
            alone = None
        if alone is not None and not _is_mean(alone):
            return _Items.UNUSED
        once, twice = (computed_loss(self._trainer, model, rows, num_items=torch.tensor(items)) for items in (1, 2))
        if _is_mean(once) and torch.isclose(once, 2 * twice, rtol=1e-5) and (alone is None or torch.isclose(once, alone)):
            return _Items.DIVIDED_BY
        return _Items.NEEDED if alone is None else _Items.UNUSED

    def _value(self, model: nn.Module, batch: Microbatch) -> Any:
        items = None if self._items in (None, _Items.UNUSED) else self._num_items(batch)
        return computed_loss(self._trainer, model, batch, num_items=None if items is None else items.sum())

    def _num_items(self, batch: Any) -> Tensor | None:
        """(N,) labels of every row that the Trainer counts for a batch by itself; None where it counts none."""
        content = as_microbatch(batch).content
        labels = content.get("labels") if isinstance(content, Mapping) else None
        if not isinstance(labels, Tensor) or not labels.ndim:
            return None
        counted = labels[..., 1:] if getattr(self._trainer, "_loss_shifts_labels", False) else labels
        return counted.ne(IGNORED).reshape(len(labels), -1).sum(1)


class _Items(Enum):
    """What a `compute_loss_func` does with `num_items_in_batch`; the later ones need it more."""

    UNUSED = "unused"
    NEEDED = "needed"
    DIVIDED_BY = "divided by"


def _is_mean(loss: Any) -> bool:
    return isinstance(loss, Tensor) and not loss.ndim


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
