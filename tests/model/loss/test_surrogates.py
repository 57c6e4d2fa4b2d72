"""Every type of Fisher against loops over rows, targets and labels in float64."""

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_callbacks import ConfigurationError
from curvature_callbacks.microbatch import as_microbatch
from curvature_callbacks.model.loss.fisher_type import FisherType
from curvature_callbacks.model.loss.resolve import resolve_loss
from curvature_callbacks.model.loss.sample_losses import SampleLosses
from curvature_callbacks.model.loss.surrogates import Surrogate, surrogates
from tests.model.loss.surrogate_cases import TYPES, UNITS, generator, randn

N, T, V, D = 4, 5, 4, 3


class TinyForCausalLM(nn.Module):
    """Position t sees tokens up to t and predicts the next one."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(V, 3)
        self.head = nn.Linear(3, V)

    def forward(self, input_ids: Tensor, labels: Tensor) -> SimpleNamespace:
        logits = self.head(torch.tanh(self.table(input_ids).cumsum(1)))
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return SimpleNamespace(loss=loss, logits=logits)


def text_batch() -> dict[str, Tensor]:
    """Rows of 4, 2, 1 and 0 valid targets; an ignored label in the middle of the second."""
    ids = torch.randint(V, (N, T), generator=generator())
    labels = ids.clone()
    labels[1, 2], labels[1, 4] = -100, -100
    labels[2, :4] = -100
    labels[3, 1:] = -100
    return {"input_ids": ids, "labels": labels}


def pair(kind: str) -> tuple[Tensor, Tensor]:
    if kind == "cross_entropy":
        return randn(N, 5), torch.tensor([2, -100, 0, 1])
    return randn(N, 5), torch.rand(N, D, generator=generator(1), dtype=torch.float64)


def loss_case(kind: str) -> tuple[nn.Module, Any, Callable[[nn.Module, Any], SampleLosses]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = (TinyForCausalLM() if kind == "text" else nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, D))).double()
    batch = text_batch() if kind == "text" else pair(kind)
    return model, batch, resolve_loss(None if kind == "text" else kind, batch)


KINDS = ("text", "cross_entropy", "mse", "bce")


def flat_gradient(value: Tensor, model: nn.Module) -> Tensor:
    leaves = list(model.parameters())
    found = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in found])


def dense_pseudo_samples(model: nn.Module, losses: SampleLosses, found: list[Surrogate]) -> tuple[Tensor, Tensor, Tensor]:
    """(S, P) gradients, (S,) weights and rows of the active pseudo-samples."""
    gradients, weights, rows = [], [], []
    for surrogate in found:
        values = surrogate(losses)
        for i in range(len(values)):
            gradient = flat_gradient(values[i], model)
            if surrogate.active[i]:
                gradients.append(gradient)
                weights.append(float(surrogate.weights[i]))
                rows.append(i)
            else:
                assert not gradient.any()
                assert surrogate.weights[i] == 0
    return torch.stack(gradients), torch.tensor(weights, dtype=torch.float64), torch.tensor(rows)


def fisher_of(kind: str, fisher_type: FisherType, *, seed: int = 0) -> Tensor:
    model, batch, loss = loss_case(kind)
    losses = loss(model, batch)
    G, _, rows = dense_pseudo_samples(model, losses, surrogates(fisher_type, losses, seed=seed))
    keep = losses.num_targets[rows] > 0
    return G[keep].T @ G[keep] / fisher_type.normaliser(losses.num_targets[losses.num_targets > 0])


def targets_of(kind: str, batch: Any) -> list[tuple[int, int]]:
    """(row, position of the logits) of every valid target."""
    if kind == "text":
        return [(i, t) for i in range(N) for t in range(T - 1) if batch["labels"][i, t + 1] != -100]
    return [(i, 0) for i in range(N) if kind != "cross_entropy" or batch[1][i] != -100]


def outputs_of(kind: str, model: nn.Module, batch: Any, row: int, position: int) -> Tensor:
    """The logits of one target, from a forward pass over its row alone."""
    if kind == "text":
        alone = {key: value[row : row + 1] for key, value in batch.items()}
        return model(**alone).logits[0, position]
    return model(batch[0][row : row + 1])[0]


def oracle(kind: str, fisher: str, unit: str) -> Tensor:
    """The Fisher by its definition, one row, target and label at a time."""
    model, batch, _ = loss_case(kind)
    targets = targets_of(kind, batch)
    rows = {row for row, _ in targets}
    total = torch.zeros(())
    if fisher == "exact":  # targets are independent given the input: rows add up
        for row, position in targets:
            total = total + expected_outer_product(kind, model, outputs_of(kind, model, batch, row, position))
    else:
        groups = [[target] for target in targets] if unit == "token" else [[t for t in targets if t[0] == r] for r in rows]
        for group in groups:
            g = sum(flat_gradient(given_loss(kind, model, batch, *target), model) for target in group)
            total = total + torch.outer(g, g)
    return total / (len(targets) if unit == "token" else len(rows))


def given_loss(kind: str, model: nn.Module, batch: Any, row: int, position: int) -> Tensor:
    outputs = outputs_of(kind, model, batch, row, position)
    if kind == "mse":
        return ((outputs - batch[1][row]) ** 2).sum() / D
    if kind == "bce":
        y = batch[1][row]
        return -(y * outputs.sigmoid().log() + (1 - y) * (1 - outputs.sigmoid()).log()).sum() / D
    label = batch["labels"][row, position + 1] if kind == "text" else batch[1][row]
    return outputs.logsumexp(0) - outputs[label]


def expected_outer_product(kind: str, model: nn.Module, outputs: Tensor) -> Tensor:
    """`E g g'` over the labels of one target: all classes, all 2^D label vectors, or points that match two moments."""
    cases: list[tuple[float, Tensor]] = []
    p = outputs.detach().softmax(0) if kind in ("text", "cross_entropy") else outputs.detach().sigmoid()
    if kind in ("text", "cross_entropy"):
        cases = [(float(p[c]), -outputs.log_softmax(0)[c]) for c in range(len(outputs))]
    elif kind == "bce":
        for bits in itertools.product((0, 1), repeat=D):
            y = torch.tensor(bits, dtype=torch.float64)
            probability = math.prod(float(q if bit else 1 - q) for q, bit in zip(p, bits, strict=True))
            cases.append((probability, F.binary_cross_entropy_with_logits(outputs, y, reduction="sum") / math.sqrt(D)))
    else:  # y = f +- sigma sqrt(D) e_d, each with probability 1 / 2D, has mean f and covariance sigma^2
        for d, sign in itertools.product(range(D), (1, -1)):
            y = outputs.detach().clone()
            y[d] += sign * math.sqrt(D / 2) * math.sqrt(D)
            cases.append((1 / (2 * D), F.mse_loss(outputs, y)))
    gradients = [(probability, flat_gradient(loss, model)) for probability, loss in cases]
    return sum(probability * torch.outer(g, g) for probability, g in gradients)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("fisher", ["empirical", "exact"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_fisher_is_its_definition(kind: str, fisher: str, unit: str):
    found = fisher_of(kind, FisherType(fisher=fisher, sample_unit=unit, num_targets=T))
    assert torch.allclose(found, oracle(kind, fisher, unit), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_exact_fisher_of_targets_is_the_ggn_of_the_mean_loss(kind: str):
    model, batch, loss = loss_case(kind)
    targets = targets_of(kind, batch)
    outputs = torch.stack([outputs_of(kind, model, batch, *target) for target in targets])  # (targets, C)
    jacobian = torch.stack([flat_gradient(entry, model) for entry in outputs.flatten()])

    def mean_loss(z: Tensor) -> Tensor:
        if kind in ("mse", "bce"):
            function = F.mse_loss if kind == "mse" else F.binary_cross_entropy_with_logits
            return function(z, batch[1])
        labels = [batch["labels"][i, t + 1] if kind == "text" else batch[1][i] for i, t in targets]
        return F.cross_entropy(z, torch.stack(labels))

    hessian = torch.autograd.functional.hessian(mean_loss, outputs.detach())
    ggn = jacobian.T @ hessian.reshape(2 * [outputs.numel()]) @ jacobian
    losses = loss(model, batch)
    assert torch.allclose(mean_loss(outputs), losses.total / losses.num_targets.sum())
    assert torch.allclose(fisher_of(kind, FisherType(fisher="exact", sample_unit="token")), ggn, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("kind", KINDS)
def test_sampled_labels_give_the_exact_fisher_on_average(kind: str, unit: str):
    """Along fixed directions, 150 independent draws against their own standard error."""
    exact = fisher_of(kind, FisherType(fisher="exact", sample_unit=unit))
    model, batch, loss = loss_case(kind)
    losses = loss(model, batch)
    one = FisherType(fisher="sampled", sample_unit=unit, num_targets=2)
    normaliser = one.normaliser(losses.num_targets[losses.num_targets > 0])
    directions = torch.nn.functional.normalize(randn(len(exact), 4, seed=5), dim=0)
    found = []
    for seed in range(150):
        G, _, _ = dense_pseudo_samples(model, losses, surrogates(one, losses, seed=seed))
        found.append(torch.cat([(G @ directions).square().sum(0), G.square().sum()[None]]) / normaliser)
    draws_of = torch.stack(found)
    expected = torch.cat([(directions * (exact @ directions)).sum(0), exact.trace()[None]])
    standard_error = draws_of.std(0) / math.sqrt(len(found))
    assert ((draws_of.mean(0) - expected).abs() < 4 * standard_error).all()
    assert (standard_error < 0.3 * expected).all()


@pytest.mark.parametrize("unit", UNITS)
def test_more_draws_are_more_samples_of_the_same_fisher(unit: str):
    exact = fisher_of("text", FisherType(fisher="exact", sample_unit=unit))
    few, many = (fisher_of("text", FisherType(fisher="sampled", sample_unit=unit, num_draws=n)) for n in (2, 200))
    assert (many - exact).norm() < 0.3 * exact.norm() < (few - exact).norm()


def test_chosen_targets_are_unbiased():
    one = FisherType(sample_unit="token", num_targets=2)
    expected = oracle("text", "empirical", "token")
    found = torch.stack([fisher_of("text", one, seed=seed) for seed in range(100)])
    standard_error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - expected).abs() <= 4.5 * standard_error + 1e-12).all()
    assert standard_error.max() > 0


@pytest.mark.parametrize("seed", range(5))
def test_targets_are_chosen_without_replacement_among_the_valid_ones(seed: int):
    model, batch, loss = loss_case("text")
    losses = loss(model, batch)
    found = surrogates(FisherType(sample_unit="token", num_targets=3), losses, seed=seed)
    G, weights, rows = dense_pseudo_samples(model, losses, found)
    truth = {
        row: [flat_gradient(given_loss("text", model, batch, *t), model) for t in targets_of("text", batch) if t[0] == row]
        for row in range(N)
    }
    assert rows.bincount(minlength=N).tolist() == [3, 2, 1, 0]
    chosen = []
    for g, weight, row in zip(G, weights, rows.tolist(), strict=True):
        matches = [t for t, one in enumerate(truth[row]) if torch.allclose(one * weight.sqrt(), g)]
        assert len(matches) == 1
        assert float(weight) == pytest.approx(4 / 3 if row == 0 else 1)
        chosen.append((row, matches[0]))
    assert len(set(chosen)) == len(chosen)


@pytest.mark.parametrize(("fisher", "unit"), TYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_make_the_mean_gradient(kind: str, fisher: str, unit: str):
    """`sum sqrt(w) g~ / normaliser` is the mean gradient: of the rows' or the targets' losses; 0 where it is by definition."""
    model, batch, loss = loss_case(kind)
    losses = loss(model, batch)
    fisher_type = FisherType(fisher=fisher, sample_unit=unit, num_targets=T)
    G, weights, rows = dense_pseudo_samples(model, losses, surrogates(fisher_type, losses, seed=0))
    usable = losses.num_targets[rows] > 0
    normaliser = fisher_type.normaliser(losses.num_targets[losses.num_targets > 0])
    mean = (weights[usable].sqrt()[:, None] * G[usable]).sum(0) / normaliser
    if fisher == "empirical":
        assert torch.allclose(mean, flat_gradient(losses.total, model) / normaliser)
    if fisher == "exact":
        assert not weights.any()
    else:
        assert float(weights[usable].sum()) == pytest.approx(normaliser)


@pytest.mark.parametrize("kind", ["cross_entropy", "text"])
def test_the_gradient_of_a_sampled_row_is_that_of_labels_that_can_be_drawn(kind: str):
    model, batch, loss = loss_case(kind)
    losses = loss(model, batch)
    G, _, rows = dense_pseudo_samples(model, losses, surrogates(FisherType(fisher="sampled", num_draws=5), losses, seed=0))
    for row in set(rows.tolist()):
        outputs = [outputs_of(kind, model, batch, *target) for target in targets_of(kind, batch) if target[0] == row]
        of_targets = [[flat_gradient(loss, model) for loss in -z.log_softmax(0)] for z in outputs]
        possible = torch.stack([torch.stack(labels).sum(0) for labels in itertools.product(*of_targets)])
        for g in G[rows == row]:
            assert torch.isclose(possible, g).all(1).sum() == 1


@pytest.mark.parametrize(("fisher", "unit"), TYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_keep_their_draws(kind: str, fisher: str, unit: str):
    """From a forward pass over the subset alone, in another order."""
    model, batch, loss = loss_case(kind)
    losses = loss(model, batch)
    subset = torch.tensor([2, 0])
    part = loss(model, as_microbatch(batch).take(subset))
    for surrogate in surrogates(FisherType(fisher=fisher, sample_unit=unit), losses, seed=3):
        again = surrogate.restricted(subset)
        assert torch.equal(again.weights, surrogate.weights[subset])
        assert torch.equal(again.active, surrogate.active[subset])
        here, there = surrogate(losses)[subset], again(part)
        assert torch.allclose(here, there, rtol=1e-12)
        for i in range(2):
            assert torch.allclose(flat_gradient(here[i], model), flat_gradient(there[i], model), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_alone_decides_the_draws(kind: str, unit: str):
    fisher_type = FisherType(fisher="sampled", sample_unit=unit, num_draws=4, num_targets=2)
    before = torch.get_rng_state()
    first, second, other = (fisher_of(kind, fisher_type, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.allclose(first, other)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("fisher", "unit"), TYPES)
def test_padding_and_ignored_targets_change_nothing(fisher: str, unit: str, side: str):
    """Six more positions of ignored labels beside the row: also the draws stay."""
    logits, labels = randn(N, T, V).requires_grad_(), text_batch()["labels"]
    wide = (2, 4) if side == "left" else (0, 6)
    garbage = F.pad(logits, (0, 0, *wide), value=7.0)
    loss = resolve_loss("cross_entropy", (None, labels))
    plain = loss(lambda _: logits.movedim(-1, 1), (None, labels))
    padded = loss(lambda _: garbage.movedim(-1, 1), (None, F.pad(labels, wide, value=-100)))
    fisher_type = FisherType(fisher=fisher, sample_unit=unit, num_targets=2)
    here, there = (surrogates(fisher_type, losses, seed=0) for losses in (plain, padded))
    assert len(here) == len(there)
    for one, other in zip(here, there, strict=True):
        slopes = [torch.autograd.grad(s(x).sum(), logits, retain_graph=True)[0] for s, x in ((one, plain), (other, padded))]
        assert torch.allclose(*slopes, atol=1e-14)
        assert torch.equal(one.weights, other.weights)
        assert not slopes[0][labels == -100].any()


@pytest.mark.parametrize(("fisher", "unit"), TYPES)
def test_a_microbatch_without_valid_target_has_no_pseudo_sample(fisher: str, unit: str):
    model, batch, _ = loss_case("text")
    loss = resolve_loss(None, batch)
    batch["labels"][:] = -100
    unknown = loss(model, batch)
    loss(model, text_batch())
    for losses in (unknown, loss(model, batch)):
        assert losses.num_targets.tolist() == [0] * N
        assert losses.total == 0
        (surrogate,) = surrogates(FisherType(fisher=fisher, sample_unit=unit), losses, seed=0)
        assert not surrogate(losses).any()
        assert not surrogate.active.any() or fisher == "empirical"


def test_an_exact_fisher_of_too_many_passes_is_refused():
    labels = torch.zeros(2, 5, dtype=torch.int64)
    loss = resolve_loss("cross_entropy", (None, labels))
    with pytest.raises(ConfigurationError, match=r"1025 backward passes \(5 positions times 205 outputs\).*'sampled'"):
        surrogates(FisherType(fisher="exact"), loss(lambda _: torch.zeros(2, 205, 5), (None, labels)), seed=0)
    labels[:, 0] = -100
    found = surrogates(FisherType(fisher="exact"), loss(lambda _: torch.zeros(2, 205, 5), (None, labels)), seed=0)
    assert len(found) == 4 * 205


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("fisher", "unit"), TYPES[1:])
def test_a_loss_function_tells_no_likelihood(fisher: str, unit: str, reduction: str):
    model, batch, _ = loss_case("mse")
    axes = (0, 1) if reduction == "mean" else (1,)
    loss = resolve_loss(lambda m, b: (m(b[0]) - b[1]).square().mean(axes), batch)
    with pytest.raises(ConfigurationError, match="`fisher`='empirical' with `sample_unit`='sequence'"):
        surrogates(FisherType(fisher=fisher, sample_unit=unit), loss(model, batch), seed=0)
