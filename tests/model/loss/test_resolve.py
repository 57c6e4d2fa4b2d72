"""Every form of the model's own loss: `sum total / sum num_targets` is `model(**batch).loss`, row by row and together."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_callbacks import ConfigurationError, ProbeError, Problem
from curvature_callbacks.model.loss.resolve import resolve_loss
from curvature_callbacks.model.loss.sample_losses import SampleLosses
from tests.cases import CASES, CLASSES, TEXT, VOCABULARY, causal_batch, family, hugging_face, in_general_position, masked_batch
from tests.reference import row_loss, rows

LENGTH = 6


def losses_of(model: nn.Module, batch: Any, **options: Any) -> SampleLosses:
    return Problem(model, [batch], **options).objective(batch)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def bert(head: str, **options: Any) -> nn.Module:
    return hugging_face(f"BertFor{head}", "BertConfig", **TEXT, **options)


def with_labels(labels: Callable[[int], dict[str, Tensor]]) -> Callable[[int], dict[str, Tensor]]:
    def build(size: int) -> dict[str, Tensor]:
        batch = causal_batch(size, LENGTH, generator())
        del batch["labels"]
        return {**batch, **labels(size)}

    return build


# name: (model, batch of a given size, valid targets of the batch, whether losses of single rows are known)
FORMS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], dict[str, Tensor]], Callable[[Any], int], bool]] = {
    "causal": (
        lambda: family("llama"),
        lambda size: causal_batch(size, LENGTH, generator()),
        lambda batch: int((batch["labels"][:, 1:] != -100).sum()),
        True,
    ),
    "causal_bert": (
        lambda: hugging_face("BertLMHeadModel", "BertConfig", **TEXT, is_decoder=True),
        lambda size: causal_batch(size, LENGTH, generator()),
        lambda batch: int((batch["labels"][:, 1:] != -100).sum()),
        True,
    ),
    "masked": (
        lambda: bert("MaskedLM"),
        lambda size: masked_batch(size, LENGTH, generator()),
        lambda batch: int((batch["labels"] != -100).sum()),
        True,
    ),
    "token_classification": (
        lambda: bert("TokenClassification", num_labels=CLASSES),
        with_labels(lambda size: {"labels": torch.randint(CLASSES, (size, LENGTH), generator=generator())}),
        lambda batch: batch["labels"].numel(),
        True,
    ),
    "seq2seq": (
        lambda: family("bart", max_position_embeddings=16),
        lambda size: causal_batch(size, LENGTH, generator()),
        lambda batch: int((batch["labels"] != -100).sum()),
        True,
    ),
    "classification": (
        lambda: bert("SequenceClassification", num_labels=CLASSES),
        with_labels(lambda size: {"labels": torch.randint(CLASSES, (size,), generator=generator())}),
        lambda batch: len(batch["labels"]),
        True,
    ),
    "regression": (
        lambda: bert("SequenceClassification", num_labels=1),
        with_labels(lambda size: {"labels": torch.randn(size, generator=generator())}),
        lambda batch: len(batch["labels"]),
        True,
    ),
    "regression_of_several": (
        lambda: bert("SequenceClassification", num_labels=CLASSES, problem_type="regression"),
        with_labels(lambda size: {"labels": torch.randn(size, CLASSES, generator=generator())}),
        lambda batch: len(batch["labels"]),
        True,
    ),
    "multi_label": (
        lambda: bert("SequenceClassification", num_labels=CLASSES, problem_type="multi_label_classification"),
        with_labels(lambda size: {"labels": torch.randint(2, (size, CLASSES), generator=generator()).float()}),
        lambda batch: len(batch["labels"]),
        True,
    ),
    "question_answering": (
        lambda: bert("QuestionAnswering"),
        with_labels(
            lambda size: {
                "start_positions": torch.randint(LENGTH, (size,), generator=generator()),
                "end_positions": torch.randint(LENGTH, (size,), generator=generator()),
            }
        ),
        lambda batch: 2 * len(batch["start_positions"]),
        True,
    ),
    "multiple_choice": (
        lambda: bert("MultipleChoice"),
        lambda size: {
            "input_ids": torch.randint(3, VOCABULARY, (size, 4, LENGTH), generator=generator()),
            "labels": torch.randint(4, (size,), generator=generator()),
        },
        lambda batch: len(batch["labels"]),
        True,
    ),
}


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("name", FORMS)
def test_the_mean_is_the_models_own_loss(name: str, size: int):
    build, batch_of, targets, known = FORMS[name]
    model, batch = in_general_position(build), batch_of(size)
    losses = losses_of(model, batch)
    assert losses.num_targets.shape == (size,)
    assert int(losses.num_targets.sum()) == targets(batch)
    assert torch.allclose(losses.total / losses.num_targets.sum(), model(**batch).loss, rtol=1e-5)
    assert (losses.per_sample is not None) == known


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form[3]])
def test_losses_of_single_rows(name: str):
    build, batch_of, targets, _ = FORMS[name]
    model, batch = in_general_position(build), batch_of(4)
    losses = losses_of(model, batch)
    for i in range(4):
        row = {key: values[i : i + 1] for key, values in batch.items()}
        assert int(losses.num_targets[i]) == targets(row)
        assert torch.allclose(losses.per_sample[i], model(**row).loss * targets(row), rtol=1e-4, atol=1e-5)
    assert torch.allclose(losses.total, losses.per_sample.sum())


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form[3]])
def test_losses_of_single_targets(name: str):
    build, batch_of, targets, _ = FORMS[name]
    model, batch = in_general_position(build), batch_of(4)
    losses = losses_of(model, batch)
    assert torch.allclose(losses.per_target.sum(1), losses.per_sample)
    assert not losses.per_target[~losses.predictive.valid].any()
    assert torch.equal(losses.predictive.valid.sum(1), losses.num_targets)
    assert losses.predictive.logits.shape[:2] == losses.per_target.shape
    kind = {"regression": "gaussian", "regression_of_several": "gaussian", "multi_label": "bernoulli"}.get(name, "categorical")
    assert losses.predictive.likelihood == kind
    if kind == "categorical":
        assert (losses.per_target > 0).sum() == targets(batch)


@pytest.mark.parametrize("name", CASES)
def test_every_case_agrees_with_the_oracle(name: str):
    case = CASES[name]
    model, microbatches = case.model(), case.microbatches()
    objective = Problem(model, microbatches, loss=case.loss).objective
    with torch.no_grad():
        total = sum(objective(batch).total.item() for batch in microbatches)
        expected = sum(row_loss(model, row, case.kind).item() for row in rows(microbatches))
    assert total == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("first", ["ignored", "padded"])
def test_the_form_does_not_depend_on_the_first_microbatch(first: str):
    """Where nothing tells shift from no shift, a later microbatch must."""
    model = in_general_position(lambda: family("gpt2"))
    unclear, clear = (causal_batch(2, LENGTH, generator()) for _ in range(2))
    unclear["labels"][:, (0 if first == "ignored" else 2) :] = -100
    problem = Problem(model, [unclear, clear])
    problem.objective(unclear)
    losses = problem.objective(clear)
    assert torch.allclose(losses.total / losses.num_targets.sum(), model(**clear).loss, rtol=1e-5)
    assert losses.per_sample is not None


def test_pairs_with_ignored_classes():
    model = CASES["mlp"].model()
    x, y = CASES["mlp"].microbatches((5,))[0]
    y[2] = -100
    losses = losses_of(model, (x, y), loss="cross_entropy")
    assert losses.num_targets.tolist() == [1, 1, 0, 1, 1]
    assert torch.allclose(losses.total / 4, F.cross_entropy(model(x), y))
    assert losses.per_sample[2] == 0


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_targets_of_one_output_may_leave_its_axis_out(loss: str, shape: tuple[int, ...]):
    """(N,) targets against (N, 1) outputs must not broadcast to (N, N)."""
    model = in_general_position(lambda: nn.Linear(5, 1)).double()
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.rand(4, *shape, dtype=torch.float64)
    function = {"mse": F.mse_loss, "bce": F.binary_cross_entropy_with_logits}[loss]
    losses = losses_of(model, (x, y), loss=loss)
    assert torch.allclose(losses.total / 4, function(model(x)[:, 0], y.reshape(4)))


class WithLogits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.layer(x))


def test_outputs_with_logits_are_understood():
    model = WithLogits().double()
    batch = CASES["mlp"].microbatches((3,))[0]
    assert torch.allclose(
        losses_of(model, batch, loss="cross_entropy").total / 3, F.cross_entropy(model(batch[0]).logits, batch[1])
    )


@pytest.mark.parametrize(("value", "known"), [(lambda losses: losses.mean(), False), (lambda losses: losses, True)])
def test_a_function_may_return_a_mean_or_one_loss_a_row(value: Callable[[Tensor], Tensor], known: bool):
    model, batch = CASES["mlp"].model(), CASES["mlp"].microbatches((4,))[0]
    losses = losses_of(model, batch, loss=lambda m, b: value(F.cross_entropy(m(b[0]), b[1], reduction="none")))
    assert torch.allclose(losses.total / 4, F.cross_entropy(model(batch[0]), batch[1]))
    assert losses.num_targets.tolist() == [1] * 4
    assert (losses.per_sample is not None) == known


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (None, "cannot be determined"),
        ("hinge", "`loss` must be one of 'cross_entropy', 'mse', 'bce'"),
        (lambda model, batch: 3.0, "instead of a tensor"),
        (lambda model, batch: torch.zeros(2, 3), r"returned shape \(2, 3\) for a batch of 4 rows"),
    ],
)
def test_a_loss_that_cannot_be_determined(loss: Any, message: str):
    batch = CASES["mlp"].microbatches((4,))[0]
    with pytest.raises(ConfigurationError, match=message):
        losses_of(CASES["mlp"].model(), batch, loss=loss)


def test_a_named_loss_needs_pairs():
    with pytest.raises(ConfigurationError, match=r"\(inputs, targets\)"):
        losses_of(family("gpt2"), causal_batch(2, 4, generator()), loss="mse")


def test_a_batch_without_labels():
    batch = causal_batch(2, 4, generator())
    del batch["labels"]
    with pytest.raises(ConfigurationError, match="Add `labels`"):
        losses_of(family("gpt2"), batch)


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
