"""The model's own loss: when it is called with labels, and when its form is settled."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_callbacks import ProbeError
from curvature_callbacks.model.loss.resolve import resolve_loss
from tests.cases import CLASSES, in_general_position
from tests.model.loss.form_cases import FORMS, bert

LABELS = {"labels", "start_positions", "end_positions"}


class Calls:
    """How a model was called: whether with labels, one entry a call."""

    def __init__(self, model: nn.Module) -> None:
        self.with_labels: list[bool] = []
        model.register_forward_pre_hook(
            lambda _, args, kwargs: self.with_labels.append(bool(LABELS & set(kwargs))), with_kwargs=True
        )


@pytest.mark.parametrize(
    "name", ["causal", "causal_bert", "masked", "classification", "regression", "multi_label", "question_answering"]
)
def test_the_model_computes_no_loss_of_its_own_once_the_form_is_known(name: str):
    build, batch_of, _, _ = FORMS[name]
    model, loss = in_general_position(build), resolve_loss(None, batch_of(2))
    calls = Calls(model)
    with torch.no_grad():
        loss(model, batch_of(4))
    assert calls.with_labels == [True, True, False]
    for size in (3, 1, 3):
        losses, expected = loss(model, batch_of(size)), model(**batch_of(size)).loss
        assert torch.allclose(losses.total / losses.num_targets.sum(), expected, rtol=1e-5)
        assert losses.total.requires_grad
    assert calls.with_labels[3:] == [False, True] * 3


def test_models_that_need_their_labels_keep_them():
    build, batch_of, _, _ = FORMS["seq2seq"]
    model, loss = in_general_position(build), resolve_loss(None, batch_of(2))
    with torch.no_grad():
        loss(model, batch_of(2))
    calls = Calls(model)
    losses = loss(model, batch_of(3))
    assert calls.with_labels == [True]
    assert torch.allclose(losses.total / losses.num_targets.sum(), model(**batch_of(3)).loss, rtol=1e-5)


class Speller(nn.Module):
    """A language model whose name tells nothing; what labels do to its logits and whether it can do without is set."""

    def __init__(self, labels: str = "unused", *, shift: bool = True) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5)
        self.labels, self.shift, self.silent = labels, shift, False

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        logits = self.head(torch.tanh(self.table(input_ids).cumsum(1)))
        if self.labels == "cast":
            logits = logits.float().double()
        if labels is None:
            if self.labels == "needed":
                raise KeyError("labels")
            if self.labels == "inputs":
                logits = logits + 1e-9
            if self.labels == "cast":
                logits = logits.float()  # the same values in another type
            return SimpleNamespace(logits=None if self.silent else logits)
        there, then = (logits[:, :-1], labels[:, 1:]) if self.shift else (logits, labels)
        return SimpleNamespace(loss=F.cross_entropy(there.flatten(0, 1), then.flatten()), logits=logits)


def speller(labels: str = "unused", **options: Any) -> nn.Module:
    return in_general_position(lambda: Speller(labels, **options)).double()


def spelled(seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(5, (3, 6), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


@pytest.mark.parametrize("labels", ["needed", "inputs", "cast"])
def test_labels_stay_where_the_logits_depend_on_them(labels: str):
    model, loss = speller(labels), resolve_loss(None, spelled())
    with torch.no_grad():
        loss(model, spelled())
    calls = Calls(model)
    losses = loss(model, spelled(1))
    assert calls.with_labels == [True]
    assert torch.allclose(losses.total / losses.num_targets.sum(), model(**spelled(1)).loss)


def test_labels_stay_while_their_influence_cannot_be_seen():
    model, loss, batch = speller(), resolve_loss(None, spelled()), spelled()
    batch["labels"][:] = 2
    calls = Calls(model)
    with torch.no_grad():
        for _ in range(2):
            loss(model, batch)
        loss(model, spelled())
        loss(model, spelled())
    assert calls.with_labels == [True, True, True, True, False, False]


def test_a_pass_with_gradients_is_one_call():
    """It may be watched, and every call would count as a use of the parameters."""
    model, loss = speller(), resolve_loss(None, spelled())
    calls = Calls(model)
    loss(model, spelled())
    loss(model, spelled())
    assert calls.with_labels == [True, True]


def test_a_form_is_not_settled_while_two_fit():
    """A head of zeros gives the same loss at every position, shifted or not."""
    model, loss = speller(), resolve_loss(None, spelled())
    kept = {name: p.detach().clone() for name, p in model.head.named_parameters()}
    with torch.no_grad():
        for p in model.head.parameters():
            p.zero_()
        loss(model, spelled())
        for name, p in model.head.named_parameters():
            p.copy_(kept[name])
    losses = loss(model, spelled())
    assert losses.num_targets.tolist() == [5, 5, 5]
    assert torch.allclose(losses.total / 15, model(**spelled()).loss)


@pytest.mark.parametrize("rows", [slice(1, 2), slice(None)])
def test_a_loss_that_is_not_finite_settles_nothing_wrong(rows: slice):
    model, loss = speller(), resolve_loss(None, spelled())
    good, bad = spelled(), spelled()
    bad["input_ids"][rows] = 4
    weight = model.table.weight.detach().clone()
    with torch.no_grad():
        good["input_ids"] %= 4
        bad["input_ids"][2 if rows != slice(None) else slice(0, 0)] %= 4
        bad["input_ids"][0 if rows != slice(None) else slice(0, 0)] %= 4
        model.table.weight[4] = torch.nan
        first = loss(model, bad)
        model.table.weight.copy_(weight)
    assert not first.total.isfinite()
    if rows != slice(None):
        assert first.per_sample.isfinite().tolist() == [True, False, True]
    losses = loss(model, good)
    assert torch.allclose(losses.total / 15, model(**good).loss)
    assert losses.per_sample is not None


def test_one_loss_serves_batches_of_every_layout():
    """The same object from probe to probe: kind of labels, sizes and lengths change."""
    model = in_general_position(lambda: bert("SequenceClassification", num_labels=CLASSES))
    loss = resolve_loss(None, FORMS["classification"][1](2))
    for _ in range(2):
        for name in ("classification", "multi_label", "classification"):
            model.config.problem_type = None
            batch = FORMS[name][1](3)
            for gradients in (False, True):
                with torch.set_grad_enabled(gradients):
                    losses = loss(model, batch)
                    expected = model(**batch).loss
                assert torch.allclose(losses.total / losses.num_targets.sum(), expected, rtol=1e-5)
                assert losses.per_sample is not None


def test_logits_that_go_missing_are_an_error():
    model, loss = speller(), resolve_loss(None, spelled())
    with torch.no_grad():
        loss(model, spelled())
    model.silent = True
    with pytest.raises(ProbeError, match=r"`.logits` are no tensor for labels of shape \(3, 6\)"):
        loss(model, spelled())


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_a_microbatch_without_valid_target_has_losses_of_zero(known: bool, gradients: bool):
    model, loss = speller(), resolve_loss(None, spelled())
    if known:
        with torch.no_grad():
            loss(model, spelled())
    batch = spelled()
    batch["labels"][:] = -100
    with torch.set_grad_enabled(gradients):
        losses = loss(model, batch)
    assert losses.num_targets.tolist() == [0, 0, 0]
    assert losses.total == 0
    assert torch.equal(losses.per_sample, torch.zeros(3, dtype=torch.float64))
    assert not losses.predictive.valid.any()
    assert losses.predictive.valid.shape == losses.per_target.shape
    assert torch.allclose((again := loss(model, spelled())).total / 15, model(**spelled()).loss)
    assert again.num_targets.tolist() == [5, 5, 5]
