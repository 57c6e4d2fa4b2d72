"""Whose likelihood is known: the heads of Hugging Face and the criteria of PyTorch, target by target."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.trainer_pt_utils import LabelSmoother

from curvature_callbacks import ConfigurationError, ProbeError, Problem, RefusedError, compute_fisher_spectrum, compute_spectrum
from curvature_callbacks.model.loss.resolve import resolve_loss
from curvature_callbacks.model.loss.sample_losses import SampleLosses
from tests.cases import CASES, CLASSES, causal_batch, family, in_general_position
from tests.heads import HEADS, Batch, Head, bert, outputs_and_labels, text_with
from tests.reference import dense_hessian, relative_error

LENGTH, N = 6, 3


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def drawn(head: Head) -> Batch:
    return head.batch(N, LENGTH, generator())


def classes(*shape: int, count: int = CLASSES) -> Tensor:
    return torch.randint(count, shape, generator=generator())


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(), dtype=torch.float64)


def spans(start: list[int] | None = None, end: list[int] | None = None) -> Batch:
    positions = {"start_positions": torch.tensor(start or [0, 2, 5]), "end_positions": torch.tensor(end or [1, 2, 4])}
    return text_with(lambda *_: positions)(N, LENGTH, generator())


def target_loss(kind: str, z: Tensor, y: Tensor) -> float:
    """Of one target, written out: `z` (C,), and `y` a class or (C,)."""
    if kind == "categorical":
        return -math.log(math.exp(z[y]) / sum(map(math.exp, z.tolist())))
    pairs = list(zip(z.tolist(), y.tolist(), strict=True))
    if kind == "gaussian":
        return sum((f - t) ** 2 for f, t in pairs) / len(pairs)
    p = [(1 / (1 + math.exp(-f)), t) for f, t in pairs]
    return -sum(t * math.log(q) + (1 - t) * math.log(1 - q) for q, t in p) / len(p)


@pytest.mark.parametrize("name", HEADS)
def test_losses_and_likelihood_of_every_target(name: str):
    head = HEADS[name]
    model, batch, kind, shifted = in_general_position(head.build).double(), drawn(head), head.kind, head.shifted
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


def own_losses(model: nn.Module, batch: Any) -> SampleLosses:
    return resolve_loss(None, batch)(model, batch)


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
    with pytest.raises(RefusedError, match="`aux_loss`, of all rows of a batch together: samples are coupled"):
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


# Criteria of PyTorch


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    return numbers(4, 5), classes(4, *shape)


class Grid(nn.Module):
    """(N, C, 2) logits: classes on axis 1, as PyTorch wants them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 2 * CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).reshape(len(x), CLASSES, 2)


def linear() -> nn.Module:
    return in_general_position(lambda: nn.Linear(5, CLASSES)).double()


def grid() -> nn.Module:
    return in_general_position(Grid).double()


def probabilities(*shape: int) -> Tensor:
    return numbers(*shape).softmax(1)


CRITERIA: dict[str, tuple[nn.Module, Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]], str]] = {
    "cross-entropy": (nn.CrossEntropyLoss(), linear, pair, "categorical"),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.3), linear, pair, "categorical"),
    "ignored": (nn.CrossEntropyLoss(ignore_index=1), linear, pair, "categorical"),
    "smoothed and ignored": (nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=1), linear, pair, "categorical"),
    "positions": (nn.CrossEntropyLoss(label_smoothing=0.2, ignore_index=0), grid, lambda: pair(2), "categorical"),
    "probabilities": (
        nn.CrossEntropyLoss(label_smoothing=0.2),
        linear,
        lambda: (numbers(4, 5), probabilities(4, CLASSES)),
        "categorical",
    ),
    "probabilities of positions": (
        nn.CrossEntropyLoss(),
        grid,
        lambda: (numbers(4, 5), probabilities(4, CLASSES, 2)),
        "categorical",
    ),
    "squares": (nn.MSELoss(), linear, lambda: (numbers(4, 5), numbers(4, CLASSES)), "gaussian"),
    "binary": (nn.BCEWithLogitsLoss(), linear, lambda: (numbers(4, 5), classes(4, CLASSES, count=2).double()), "bernoulli"),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_a_criterion_is_the_loss_it_computes(name: str):
    criterion, build, batch_of, kind = CRITERIA[name]
    model, (x, y) = build(), batch_of()
    found = Problem(model, [(x, y)], loss=criterion).objective((x, y))
    assert torch.allclose(found.total / found.num_targets.sum(), criterion(model(x), y), rtol=1e-12)
    assert found.predictive.likelihood == kind
    assert found.predictive.valid.sum(1).tolist() == found.num_targets.tolist()
    for i in range(4):
        if found.num_targets[i]:
            row = criterion(model(x[i : i + 1]), y[i : i + 1]) * found.num_targets[i]
            assert torch.allclose(found.per_sample[i], row, rtol=1e-12)
        else:
            assert found.per_sample[i] == 0
    assert torch.allclose(found.per_target.sum(1), found.per_sample)


@pytest.mark.parametrize("name", ["smoothed", "probabilities", "squares", "binary"])
def test_curvature_under_a_criterion(name: str):
    criterion, build, batch_of, _ = CRITERIA[name]
    model, (x, y) = build(), batch_of()
    truth = torch.linalg.eigvalsh(dense_hessian(model, lambda m: criterion(m(x), y), ["weight", "bias"])).flip(0)
    pairs = compute_spectrum(model, (x, y), loss=criterion, k=1, which="LA", tol=1e-8)
    assert relative_error(pairs.eigenvalues[:1], truth[:1]) < 1e-8
    # the model is linear: its Hessian is its GGN, and that the exact Fisher
    exact = compute_fisher_spectrum(model, (x, y), loss=criterion, fisher="exact").full.eigenvalues
    assert relative_error(exact, truth[: len(exact)]) < 1e-8


def test_smoothing_changes_the_empirical_fisher_and_no_other():
    model, batch = linear(), pair()
    plain, smoothed = (nn.CrossEntropyLoss(label_smoothing=share) for share in (0.0, 0.3))
    for fisher, same in (("exact", True), ("sampled", True), ("empirical", False)):
        found = [compute_fisher_spectrum(model, batch, loss=loss, fisher=fisher).full.eigenvalues for loss in (plain, smoothed)]
        assert (relative_error(*found) < 1e-9) == same


SMOOTHED = ["gpt2", "mistral", "roberta", "t5", "tokens", "causal classifier", "classifier", "vit", "multiple choice"]


@pytest.mark.parametrize("share", [0.0, 0.2])
@pytest.mark.parametrize("name", SMOOTHED)
def test_smoothing_the_models_own_loss_is_what_the_trainer_does(name: str, share: float):
    head = HEADS[name]
    model, batch, shifted = in_general_position(head.build).double(), drawn(head), head.shifted
    loss = resolve_loss(nn.CrossEntropyLoss(label_smoothing=share), batch)
    with torch.no_grad():
        expected = LabelSmoother(epsilon=share)(model(**batch), batch["labels"], shift_labels=shifted)
        plain = own_losses(model, batch)
        for _ in range(2):
            found = loss(model, batch)
            assert torch.allclose(found.total / found.num_targets.sum(), expected.double(), rtol=1e-6)
            assert torch.equal(found.num_targets, plain.num_targets)
            assert torch.equal(found.predictive.logits, plain.predictive.logits)
            assert torch.equal(found.predictive.valid, plain.predictive.valid)
            assert torch.equal(found.per_target != 0, found.predictive.valid)
        for i in range(N):
            row = {key: value[i : i + 1] for key, value in batch.items()}
            part = LabelSmoother(epsilon=share)(model(**row), row["labels"], shift_labels=shifted)
            if plain.num_targets[i]:
                assert float(found.per_sample[i]) == pytest.approx(float(part * plain.num_targets[i]), rel=1e-5)


@pytest.mark.parametrize("name", ["regression", "multi-label", "questions"])
def test_only_a_cross_entropy_of_labels_can_be_smoothed(name: str):
    batch = drawn(HEADS[name])
    with pytest.raises(ConfigurationError, match=r"mean cross-entropy of `.logits` at `labels`"):
        resolve_loss(nn.CrossEntropyLoss(label_smoothing=0.1), batch)(in_general_position(HEADS[name].build).double(), batch)


def test_a_loss_that_is_not_finite_tells_no_shift_yet():
    model, batch = in_general_position(lambda: family("gpt2")), causal_batch(1, LENGTH, generator())
    loss = resolve_loss(nn.CrossEntropyLoss(label_smoothing=0.1), batch)
    weight = model.transformer.wte.weight
    with torch.no_grad():
        kept = weight.clone()
        weight.fill_(torch.nan)
        with pytest.raises(ProbeError, match="cannot tell yet"):
            loss(model, batch)
        weight.copy_(kept)
        expected = LabelSmoother(epsilon=0.1)(model(**batch), batch["labels"], shift_labels=True)
        found = loss(model, batch)
    assert torch.allclose(found.total / found.num_targets.sum(), expected, rtol=1e-5)


class Own(nn.CrossEntropyLoss):
    pass


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (nn.CrossEntropyLoss(weight=torch.ones(CLASSES)), "has `weight`"),
        (nn.BCEWithLogitsLoss(pos_weight=torch.ones(CLASSES)), "has `pos_weight`"),
        (nn.BCEWithLogitsLoss(weight=torch.ones(CLASSES)), "has `weight`"),
        (nn.CrossEntropyLoss(reduction="sum"), "must be 'mean', got 'sum'"),
        (nn.MSELoss(reduction="none"), "must be 'mean', got 'none'"),
        (nn.CrossEntropyLoss(label_smoothing=1.5), "between 0 and 1, got 1.5"),
        (nn.L1Loss(), "must be CrossEntropyLoss, MSELoss or BCEWithLogitsLoss"),
        (nn.NLLLoss(), "wrap it in a function"),
        (Own(), "wrap it in a function"),
    ],
)
def test_criteria_that_are_no_plain_mean(criterion: Any, message: str):
    with pytest.raises(ConfigurationError, match=message):
        Problem(linear(), [pair()], loss=criterion)


@pytest.mark.parametrize(
    ("criterion", "message"),
    [
        (nn.MSELoss(), r"`loss`=MSELoss\(\) needs `\(inputs, targets\)` batches, got dict"),
        (nn.BCEWithLogitsLoss(), r"needs `\(inputs, targets\)` batches"),
        (nn.CrossEntropyLoss(ignore_index=0), "`ignore_index` of `loss` must be -100 on mapping batches"),
    ],
)
def test_criteria_that_mapping_batches_cannot_have(criterion: Any, message: str):
    with pytest.raises(ConfigurationError, match=message):
        Problem(in_general_position(lambda: family("gpt2")), [causal_batch(2, LENGTH, generator())], loss=criterion)


class Mine(nn.Module):
    """A module that is a loss function."""

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none") * 2


def test_a_module_may_be_a_loss_function():
    model, batch = CASES["mlp"].model(), CASES["mlp"].microbatches((4,))[0]
    found = Problem(model, [batch], loss=Mine()).objective(batch)
    assert torch.allclose(found.total, 2 * F.cross_entropy(model(batch[0]), batch[1], reduction="sum"))
