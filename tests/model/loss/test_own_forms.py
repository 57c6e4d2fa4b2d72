"""Whose likelihood is known: the heads of Hugging Face and the criteria of PyTorch, target by target."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_callbacks import RefusedError, compute_fisher_spectrum, compute_spectrum
from curvature_callbacks.model.loss.resolve import resolve_loss
from tests.cases import CLASSES, in_general_position
from tests.heads import HEADS, Batch, bert, outputs_and_labels
from tests.model.loss.loss_cases import LENGTH, N, batch_of, classes, own_losses, spans, target_loss
from tests.reference import relative_error


@pytest.mark.parametrize("name", HEADS)
def test_losses_and_likelihood_of_every_target(name: str):
    head = HEADS[name]
    model, batch, kind, shifted = in_general_position(head.build).double(), batch_of(head), head.kind, head.shifted
    loss = resolve_loss(None, batch)
    with torch.no_grad():
        logits, labels = outputs_and_labels(model, batch, shifted)
        found = [loss(model, batch) for _ in range(2)][1]  # settled, and by now perhaps called without labels
        own = model(**batch).loss.to(found.total)
    assert found.predictive.likelihood == kind
    kept = found.predictive.valid.any(0) if shifted else slice(None)
    per_target, valid, z = found.per_target[:, kept], found.predictive.valid[:, kept], found.predictive.logits[:, kept]
    for i in range(N):
        for m in range(per_target.shape[1]):
            counts = kind != "categorical" or int(labels[i, m]) != -100
            assert bool(valid[i, m]) == counts
            assert torch.equal(z[i, m], logits[i, m])
            expected = target_loss(kind, logits[i, m], labels[i, m]) if counts else 0.0
            assert float(per_target[i, m]) == pytest.approx(expected, rel=1e-9 if logits.dtype == torch.float64 else 1e-6)
    assert found.num_targets.tolist() == valid.sum(1).tolist()
    assert torch.allclose(found.total / found.num_targets.sum(), own, rtol=2e-6)


class Odd(nn.Module):
    """A head whose loss is no standard form."""

    def __init__(self, *, ignored: int = -100, power: int = 1) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, 4), nn.Linear(4, 2)
        self.classes = nn.Linear(4, CLASSES)
        self.ignored, self.power = ignored, power

    def forward(
        self, input_ids: Tensor, start_positions: Any = None, end_positions: Any = None, labels: Any = None
    ) -> SimpleNamespace:
        hidden = self.table(input_ids).cumsum(1).tanh()
        start, end = self.head(hidden).unbind(-1)
        if start_positions is not None:
            loss = F.cross_entropy(start, start_positions) + F.cross_entropy(end, end_positions)  # not halved
            return SimpleNamespace(loss=loss, start_logits=start, end_logits=end)
        logits = self.classes(hidden)
        loss = None if labels is None else F.cross_entropy(logits.mT, labels, ignore_index=self.ignored) ** self.power
        return SimpleNamespace(loss=loss, logits=logits)


def odd(**options: Any) -> nn.Module:
    return in_general_position(lambda: Odd(**options)).double()


@pytest.mark.parametrize(
    ("model", "labels", "num_targets"),
    [
        ({}, {"start_positions": classes(N), "end_positions": classes(N)}, 2 * N),
        ({"power": 2}, {"labels": classes(N, LENGTH)}, N * LENGTH),
        ({"ignored": -1}, {"labels": classes(N, LENGTH) - 1}, N * LENGTH),
        ({"ignored": 99}, {"labels": torch.where(classes(N, LENGTH) == 1, 99, 0)}, N * LENGTH),
    ],
    ids=["spans not halved", "a square", "ignores -1", "ignores 99"],
)
def test_a_loss_of_no_standard_form_is_known_as_its_mean(model: Any, labels: Batch, num_targets: int):
    batch = {"input_ids": classes(N, LENGTH, count=11), **labels}
    found = own_losses(odd(**model), batch)
    assert found.per_sample is found.per_target is found.predictive is None
    assert int(found.num_targets.sum()) == num_targets
    assert torch.allclose(found.total / num_targets, odd(**model)(**batch).loss)


class ByRow(nn.Module):
    """A loss averaged over each row's targets and then over rows, as CTC is; `extra` adds one of all rows together."""

    def __init__(self, *, extra: bool = False) -> None:
        super().__init__()
        self.table, self.head, self.extra = nn.Embedding(11, 4), nn.Linear(4, CLASSES), extra

    def forward(self, input_ids: Tensor, labels: Any = None) -> SimpleNamespace:
        logits = self.head(self.table(input_ids).cumsum(1).tanh())
        if labels is None:
            return SimpleNamespace(logits=logits)
        rows = [F.cross_entropy(z, y) for z, y in zip(logits, labels, strict=True)]
        shared = logits.softmax(-1).mean((0, 1)).square().sum() if self.extra else None
        loss = torch.stack(rows).mean() + (0.001 * shared if self.extra else 0)
        return SimpleNamespace(loss=loss, logits=logits, aux_loss=shared)


def ragged(*lengths: int) -> Batch:
    labels = classes(len(lengths), LENGTH)
    labels[torch.arange(LENGTH) >= torch.tensor(lengths)[:, None]] = -100
    return {"input_ids": classes(len(lengths), LENGTH, count=11), "labels": labels}


def test_a_mean_over_rows_is_told_from_one_over_targets():
    model, batch = in_general_position(ByRow).double(), ragged(6, 2, 5, 1)
    with torch.no_grad():
        found = own_losses(model, batch)
        single = own_losses(model, {key: value[:1] for key, value in batch.items()})
        squared = own_losses(Squared().double(), batch)
    assert found.num_targets.tolist() == [1, 1, 1, 1]
    assert torch.allclose(found.total / 4, model(**batch).loss)
    assert single.num_targets.tolist() == squared.num_targets.tolist()[:1] == [6]  # of one row nothing can be told
    assert squared.num_targets.tolist() == [6, 2, 5, 1]


class Squared(Odd):
    """A mean over neither."""

    def __init__(self) -> None:
        super().__init__(power=2)


def test_the_fisher_of_a_mean_over_rows_is_that_of_the_rows_own_losses():
    model, batch = in_general_position(ByRow).double(), ragged(6, 2, 5, 1)
    found = compute_fisher_spectrum(model, batch, block_structure="none")
    lines = []
    for i in range(4):
        loss = model(**{key: value[i : i + 1] for key, value in batch.items()}).loss
        lines.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    expected = torch.linalg.svdvals(torch.stack(lines)).square() / 4
    assert relative_error(torch.as_tensor(found.full.eigenvalues), expected) < 1e-8


def test_a_loss_of_all_experts_together_couples_the_rows():
    model, batch = in_general_position(lambda: ByRow(extra=True)).double(), ragged(6, 2, 5, 1)
    assert own_losses(model, batch).coupled == "aux_loss"
    with pytest.raises(RefusedError, match=r"of all rows of a batch together \(aux_loss\): samples are coupled"):
        compute_fisher_spectrum(model, batch)
    assert compute_spectrum(model, batch, k=1).eigenvalues.isfinite().all()


def questions() -> nn.Module:
    return in_general_position(lambda: bert("QuestionAnswering")).double()


def position_loss(logits: Tensor, position: int) -> float:
    return 0.0 if position >= LENGTH else target_loss("categorical", logits, torch.tensor(max(position, 0)))


@pytest.mark.parametrize(
    ("start", "end", "counted"),
    [
        ([6, 2, 5], [9, 2, 4], [0, 2, 2]),
        ([-1, 2, 5], [1, -7, 4], [2, 2, 2]),
        ([6, 2, 5], [1, 99, 4], [1, 1, 2]),
        ([0, 2, 6], [1, 2, 4], [2, 2, 1]),
    ],
    ids=["beyond", "negative", "one each", "unequal"],
)
@pytest.mark.parametrize("settled", [False, True])
def test_positions_outside_the_sequence(settled: bool, start: list[int], end: list[int], counted: list[int]):
    model, batch = questions(), spans(start, end)
    loss = resolve_loss(None, batch)
    with torch.no_grad():
        if settled:
            loss(model, spans())
        found, output = loss(model, batch), model(**batch)
    assert found.num_targets.tolist() == counted
    for i in range(N):
        assert float(found.per_target[i, 0]) == pytest.approx(position_loss(output.start_logits[i], start[i]))
        assert float(found.per_target[i, 1]) == pytest.approx(position_loss(output.end_logits[i], end[i]))
    mean = found.total / sum(counted)
    if sum(p >= LENGTH for p in start) == sum(p >= LENGTH for p in end):
        assert torch.allclose(mean, output.loss)
    else:  # every target weighs the same
        assert torch.allclose(mean, found.per_target.sum() / 5)
        assert not torch.allclose(mean, output.loss)


@pytest.mark.parametrize("settled", [False, True])
def test_questions_all_beyond_the_sequence(settled: bool):
    model, batch = questions(), spans([6, 7, 8], [6, 7, 8])
    loss = resolve_loss(None, batch)
    if settled:
        loss(model, spans())
    found = loss(model, batch)
    assert found.num_targets.tolist() == [0] * N
    assert found.total == 0
    assert torch.allclose(loss(model, spans()).total / (2 * N), model(**spans()).loss)


def test_positions_may_be_columns():
    model, batch = questions(), spans()
    columns = batch | {key: batch[key][:, None] for key in ("start_positions", "end_positions")}
    assert torch.equal(own_losses(model, columns).per_target, own_losses(model, batch).per_target)


def test_the_exact_fisher_of_questions_is_its_generalised_gauss_newton_matrix():
    """`(1/N) sum_i sum_m J_im' (diag p - p p') J_im` over start and end."""
    model, batch = questions(), spans()
    names = ["qa_outputs.weight", "qa_outputs.bias"]
    parameters = [dict(model.named_parameters())[name] for name in names]
    output, truth = model(**batch), 0.0
    for logits in (output.start_logits, output.end_logits):
        for z in logits:
            J = torch.stack(
                [torch.cat([g.flatten() for g in torch.autograd.grad(entry, parameters, retain_graph=True)]) for entry in z]
            )
            p = z.detach().softmax(0)
            truth = truth + J.T @ (p.diag() - p.outer(p)) @ J / N
    found = compute_fisher_spectrum(model, batch, fisher="exact", params_filter=lambda name, _: name in names)
    expected = torch.linalg.eigvalsh(truth).flip(0)
    assert relative_error(found.full.eigenvalues, expected[: len(found.full.eigenvalues)]) < 1e-6
