"""The empirical Fisher against one gradient per row and per target in float64."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_callbacks import ConfigurationError, ProbeError, Problem, RefusedError, compute_fisher_spectrum
from curvature_callbacks.compute.offline import offline_problem
from curvature_callbacks.model.loss.fisher_type import FisherType
from curvature_callbacks.model.loss.surrogates import surrogates
from curvature_callbacks.operators.fisher import EmpiricalFisherOperator, SampledFisherOperator
from curvature_callbacks.operators.ggn import GGNOperator
from curvature_callbacks.operators.self_checks import check_adjoint
from tests.cases import CASES, CLASSES, Case, in_general_position
from tests.reference import IGNORED, dense_fisher, gradients_of, relative_error, row_loss, rows, sample_gradients, stacked

UNITS = ("sequence", "token")
TOKENS = ("gpt2", "llama", "bert", "t5", "vit", "mlp")  # families whose single targets the oracle walks through
DENSE = ("transformer.h.1.ln_1", "transformer.h.1.attn.c_proj", "transformer.ln_f")  # of gpt2, few enough for a matrix
TOLERANCE = 1e-5  # float32 inside Hugging Face's norms, rotary embeddings and losses


@contextmanager
def problem_of(case: Case, model: nn.Module, microbatches: list[Any], **options: Any) -> Iterator[Problem]:
    with offline_problem(model, microbatches, **{"loss": case.loss, "params_filter": None, **options}) as problem:
        yield problem


@contextmanager
def fisher(
    case: Case, model: nn.Module, microbatches: list[Any], unit: str = "sequence", **options: Any
) -> Iterator[EmpiricalFisherOperator]:
    with problem_of(case, model, microbatches, **options) as problem:
        yield problem.empirical_fisher(sample_unit=unit)


def prefixed(*prefixes: str) -> dict[str, Any]:
    return {"params_filter": lambda name, _: name.startswith(prefixes)}


def dense(operator: EmpiricalFisherOperator) -> Tensor:
    return operator.matmat(torch.eye(operator.shape[0], dtype=operator.dtype))


def row_gradients(case: Case, model: nn.Module, microbatches: Sequence[Any]) -> Tensor:
    """(N, P)."""
    return stacked(sample_gradients(model, microbatches, case.kind))


def target_gradients(case: Case, model: nn.Module, microbatches: Sequence[Any]) -> Tensor:
    """(sum n_i, P): one gradient of one target at a time, its logits looked up in a pass over its row."""
    losses = []
    for row in rows(microbatches):
        if case.kind in ("row", "pair"):
            losses.append(lambda m, row=row: row_loss(m, row, case.kind))
            continue
        shift = 1 if case.kind == "causal" else 0
        for position, label in enumerate(row["labels"][0].tolist()):
            if label != IGNORED and position >= shift:
                at = position - shift
                losses.append(lambda m, row=row, at=at, label=label: -m(**row).logits[0, at].double().log_softmax(0)[label])
    return stacked(gradients_of(model, losses))


def oracle(case: Case, model: nn.Module, microbatches: Sequence[Any], unit: str) -> Tensor:
    return (row_gradients if unit == "sequence" else target_gradients)(case, model, microbatches)


def vector(size: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(("name", "unit"), [*((name, "sequence") for name in CASES), *((name, "token") for name in TOKENS)])
def test_products_are_those_of_the_oracle(name: str, unit: str):
    case = CASES[name]
    model, microbatches = case.model(), case.microbatches()
    G = oracle(case, model, microbatches, unit)
    v = vector(G.shape[1])
    with fisher(case, model, microbatches, unit) as operator:
        found = operator.matmat(v[:, None])[:, 0]
        assert operator.normaliser == len(G)
        assert relative_error(operator.vjp(torch.ones(operator.num_losses)), G.sum(0)) < TOLERANCE
    assert relative_error(found, G.T @ (G @ v) / len(G)) < TOLERANCE


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", ["mlp", "gpt2"])
def test_the_matrix_is_the_dense_fisher(name: str, unit: str):
    case = CASES[name]
    model, microbatches = case.model(), case.microbatches()
    chosen = prefixed(*DENSE) if name == "gpt2" else {}
    names = [n for n, _ in model.named_parameters() if not chosen or n.startswith(DENSE)]
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter_name in names)
    truth = dense_fisher(oracle(case, model, microbatches, unit))
    with fisher(case, model, microbatches, unit, **chosen) as operator:
        assert relative_error(dense(operator), truth) < TOLERANCE


@pytest.mark.parametrize("unit", UNITS)
def test_the_gradient_is_what_the_ones_give(unit: str):
    """`J' 1 / sum n` is the gradient of the mean loss in either unit, and the trace the mean squared norm of the rows of J."""
    case = CASES["gpt2"]
    model, microbatches = case.model(), case.microbatches()
    with problem_of(case, model, microbatches, **prefixed("transformer.ln_f", "transformer.h.0.ln_1")) as problem:
        operator = problem.empirical_fisher(sample_unit=unit)
        total = operator.vjp(torch.ones(operator.num_losses)) / operator.num_targets
        assert relative_error(total, torch.cat([part.flatten() for part in problem.gradients.values()])) < TOLERANCE
        squares = [operator.vjp(e).square().sum() for e in torch.eye(operator.num_losses)]
        assert torch.trace(dense(operator)).item() == pytest.approx(float(sum(squares)) / operator.normaliser)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", ["gpt2", "vit", "mlp"])
def test_float32_models_agree_with_float64(name: str, unit: str):
    case = CASES[name]
    G = oracle(case, case.model(), case.microbatches(), unit)
    v = vector(G.shape[1])
    with fisher(case, case.model(torch.float32), case.microbatches(), unit) as operator:
        assert operator.dtype == torch.float32
        assert relative_error(operator.matmat(v.float()[:, None])[:, 0], G.T @ (G @ v) / len(G)) < 5e-6


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", ["gpt2", "bert", "resnet", "mlp", "reused"])
def test_contract(name: str, unit: str):
    """Symmetric, positive, linear, column by column, the same bits twice, and J the adjoint of J'."""
    case = CASES[name]
    with fisher(case, case.model(), case.microbatches(), unit) as operator:
        U = torch.stack([vector(operator.shape[0], seed=seed) for seed in range(3)], dim=1)
        FU = operator.matmat(U)
        products = U.T @ FU
        assert operator.is_psd
        assert operator.shape == (len(U), len(U))
        assert FU.shape == U.shape
        assert relative_error(products, products.T) < TOLERANCE
        assert torch.linalg.eigvalsh(products + products.T).min() > 0
        assert relative_error(operator.matmat(2 * U[:, :1] - U[:, 1:2]), 2 * FU[:, :1] - FU[:, 1:2]) < TOLERANCE
        assert torch.equal(torch.cat([operator.matmat(u[:, None]) for u in U.T], dim=1), FU)
        assert torch.equal(operator.matmat(U), FU)
        assert check_adjoint(operator, seed=0) < TOLERANCE


def test_a_product_takes_no_pass_through_the_model():
    calls = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        calls.append(len(batch[0]))
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    case = CASES["mlp"]
    with fisher(case, case.model(), case.microbatches(), loss=loss) as operator:
        calls.clear()
        operator.matmat(torch.ones(operator.shape[0], 2, dtype=torch.float64))
    assert calls == []


@pytest.mark.parametrize("unit", UNITS)
def test_one_batch_in_pieces_is_one_batch(unit: str):
    case = CASES["gpt2"]
    model, (batch,) = case.model(), case.microbatches((6,))
    pieces = [{name: values[a:b] for name, values in batch.items()} for a, b in ((0, 1), (1, 5), (5, 6))]
    with fisher(case, model, [batch], unit) as whole:
        v = vector(whole.shape[0])
        expected = whole.matmat(v[:, None])
    with fisher(case, model, pieces, unit) as parts:
        assert relative_error(parts.matmat(v[:, None]), expected) < TOLERANCE
        assert parts.rows.tolist() == whole.rows.tolist() == list(range(6))


def test_one_target_a_row_makes_the_units_equal():
    case = CASES["vit"]
    with problem_of(case, case.model(), case.microbatches()) as problem:
        sequence, token = (problem.empirical_fisher(sample_unit=unit) for unit in UNITS)
        v = vector(sequence.shape[0])[:, None]
        assert torch.allclose(sequence.matmat(v), token.matmat(v))


def test_a_named_block_is_its_diagonal_block():
    case = CASES["mlp"]
    with problem_of(case, case.model(), case.microbatches()) as problem:
        whole, part = dense(problem.empirical_fisher()), dense(problem.empirical_fisher(["2.weight", "2.bias"]))
        start = problem.objective.parameters["0.weight"].numel() + problem.objective.parameters["0.bias"].numel()
    assert torch.allclose(part, whole[start : start + len(part), start : start + len(part)])


@pytest.mark.parametrize("unit", UNITS)
def test_rows_without_a_valid_target_do_not_count(unit: str):
    case = CASES["gpt2"]
    model, microbatches = case.model(), case.microbatches()
    microbatches[0]["labels"][1] = IGNORED
    microbatches[1]["labels"][:] = IGNORED
    G = oracle(case, model, microbatches, unit)
    if unit == "sequence":
        G = G[[0, 2, 4, 5]]  # the oracle gives the others a zero gradient
    v = vector(G.shape[1])
    with fisher(case, model, microbatches, unit) as operator:
        assert operator.rows.tolist() == [0, 2, 4, 5]
        assert operator.normaliser == len(G)
        assert relative_error(operator.matmat(v[:, None])[:, 0], G.T @ (G @ v) / len(G)) < TOLERANCE


def bad_input(batch: Any) -> None:
    batch[0][1, 0] = float("nan")


def bad_gradient(batch: Any) -> None:
    batch[0][1] = 0.0


def rooted(model: nn.Module, batch: Any) -> Tensor:
    """Finite everywhere, with an infinite slope at zero."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none") * model[0](batch[0]).sum(1).abs().sqrt()


@pytest.mark.parametrize(("spoil", "loss"), [(bad_input, "cross_entropy"), (bad_gradient, rooted)])
def test_rows_that_are_not_finite_do_not_count(spoil: Any, loss: Any):
    case = CASES["mlp"]
    model, microbatches = case.model(), case.microbatches()
    model[0].bias.data.zero_()
    spoil(microbatches[0])
    clean = [tuple(part[[0, 2]] for part in microbatches[0]), *microbatches[1:]]
    with fisher(case, model, clean, loss=loss) as operator:
        v = vector(operator.shape[0])[:, None]
        expected = operator.matmat(v)
    with fisher(case, model, microbatches, loss=loss) as operator:
        assert operator.rows.tolist() == [0, 2, 3, 4, 5]
        assert operator.normaliser == 5
        assert torch.allclose(operator.matmat(v), expected)
    with pytest.warns(UserWarning, match="1 of 6 samples were left out"):  # and so says the Gram
        assert compute_fisher_spectrum(model, microbatches, loss=loss).full.num_samples == operator.normaliser


def test_a_probe_without_a_usable_row_has_no_fisher():
    case = CASES["mlp"]
    x, y = case.microbatches((3,))[0]
    x[:] = float("nan")
    with problem_of(case, case.model(), [(x, y)]) as problem, pytest.raises(ProbeError, match="no row"):
        problem.empirical_fisher()


class Partial(nn.Module):
    """`unused` is not in the loss, `linear` enters it linearly: its gradient does not depend on it, its Fisher is not zero."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(3))
        self.curved = nn.Linear(5, CLASSES)
        self.linear = nn.Parameter(torch.ones(2))


def partial_loss(model: nn.Module, batch: Any) -> Tensor:
    losses = F.cross_entropy(model.curved(batch[0]), batch[1], reduction="none")
    return losses + model.linear.sum() * batch[0][:, 0]


def test_unused_and_linear_parameters():
    model = in_general_position(Partial).double()
    batch = CASES["mlp"].microbatches((4,))[0]
    truth = dense_fisher(stacked(gradients_of(model, [lambda m, i=i: partial_loss(m, batch)[i] for i in range(4)])))
    with fisher(CASES["mlp"], model, [batch], loss=partial_loss) as operator:
        found = dense(operator)
    assert torch.allclose(found, truth)
    order = [name for name, parameter in model.named_parameters() for _ in range(parameter.numel())]
    assert found[torch.tensor([name == "unused" for name in order])].abs().max() == 0
    assert found[torch.tensor([name == "linear" for name in order])].abs().max() > 0


def test_a_loss_that_depends_on_nothing_named_has_the_zero_fisher():
    model = in_general_position(Partial).double()
    batch = CASES["mlp"].microbatches((4,))[0]
    with fisher(CASES["mlp"], model, [batch], loss=partial_loss, **prefixed("unused")) as operator:
        assert torch.equal(dense(operator), torch.zeros(3, 3, dtype=torch.float64))
        assert check_adjoint(operator, seed=0) == 0.0


def mean_cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def row_cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


@pytest.mark.parametrize(
    ("loss", "unit", "message"),
    [
        (mean_cross_entropy, "sequence", "one loss per row"),
        (mean_cross_entropy, "token", "one loss per row"),
        (row_cross_entropy, "token", "single targets"),
        ("cross_entropy", "word", "`sample_unit` must be one of 'sequence', 'token', got 'word'"),
    ],
)
def test_what_the_loss_does_not_tell_is_asked_for(loss: Any, unit: Any, message: str):
    case = CASES["mlp"]
    problem = problem_of(case, case.model(), case.microbatches(), loss=loss)
    with problem as found, pytest.raises(ConfigurationError, match=message):
        found.empirical_fisher(sample_unit=unit)


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_attention_without_a_second_derivative_is_refused(implementation: str):
    case = CASES["gpt2"]
    with problem_of(case, case.model(), case.microbatches((2,))) as problem:
        problem.model.config._attn_implementation = implementation
        with pytest.raises(RefusedError, match=implementation):
            problem.empirical_fisher()


class OnceTanh(torch.autograd.Function):
    """What a fused kernel looks like to autograd: a backward pass without a derivative of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * (1 - ctx.saved_tensors[0].tanh() ** 2)


class Fused(nn.Module):
    """Two layers with the fused function before (`first`), between (`inside`) or after (`last`) them."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.a = nn.Linear(5, 4)
        self.b = nn.Linear(4, CLASSES)
        self._place = place

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(OnceTanh.apply(x) if self._place == "first" else x)
        logits = self.b(OnceTanh.apply(hidden) if self._place == "inside" else torch.tanh(hidden))
        return OnceTanh.apply(logits) if self._place == "last" else logits


@pytest.mark.parametrize(("place", "prefix"), [("inside", ""), ("last", ""), ("inside", "a"), ("last", "b")])
def test_a_kernel_without_a_second_derivative_is_caught(place: str, prefix: str):
    """Also where the wrong product is symmetric (everything before the kernel) or plainly zero."""
    model = in_general_position(lambda: Fused(place)).double()
    problem = problem_of(CASES["mlp"], model, CASES["mlp"].microbatches(), **prefixed(prefix))
    with problem as found, pytest.raises(RefusedError, match="no second derivative"):
        check_adjoint(found.empirical_fisher(), seed=0)


@pytest.mark.parametrize(("place", "prefix"), [("first", ""), ("inside", "b")])
def test_such_a_kernel_before_everything_measured_does_no_harm(place: str, prefix: str):
    case, model = CASES["mlp"], in_general_position(lambda: Fused(place)).double()
    truth = sample_gradients(model, case.microbatches(), case.kind)
    names = [name for name in truth if name.startswith(prefix)]
    with fisher(case, model, case.microbatches(), **prefixed(prefix)) as operator:
        assert check_adjoint(operator, seed=0) < 1e-10
        assert relative_error(dense(operator), dense_fisher(stacked(truth, names))) < 1e-10


def test_kernels_that_change_their_answer_are_refused(monkeypatch: pytest.MonkeyPatch):
    case = CASES["mlp"]
    with fisher(case, case.model(), case.microbatches()) as operator:
        product = operator.vjp
        monkeypatch.setattr(operator, "vjp", lambda u: product(u) * (1 + 0.1 * torch.rand(())))
        with pytest.raises(RefusedError, match="same answer"):
            check_adjoint(operator, seed=0)


def drawn_gradients(problem: Problem, unit: str, *, seed: int, num_draws: int) -> Tensor:
    """(S, P), one backward pass for every row or target, at the labels the surrogates drew."""
    kind = FisherType(fisher="sampled", num_draws=num_draws)
    leaves = problem.objective.leaves()
    found = []
    for place, batch in enumerate(problem.microbatches):
        losses = problem.objective(batch, leaves)
        for surrogate in surrogates(kind, losses, seed=seed + place):
            rows_ = surrogate(losses)
            for i in surrogate.active.nonzero()[:, 0].tolist():
                single = [rows_[i]]
                if unit == "token":
                    log_p, valid = losses.predictive.logits.log_softmax(-1), losses.predictive.valid
                    single = [-log_p[i, t, surrogate.draws[i, t]] for t in valid[i].nonzero()[:, 0].tolist()]
                for one in single:
                    options: Any = {"retain_graph": True, "materialize_grads": True, "allow_unused": True}
                    parts = torch.autograd.grad(one, list(leaves.values()), **options)
                    found.append(torch.cat([part.flatten() for part in parts]).double())
    return torch.stack(found)


@pytest.mark.parametrize("num_draws", [1, 3])
@pytest.mark.parametrize(("name", "unit"), [("gpt2", "sequence"), ("gpt2", "token"), ("bert", "token"), ("mlp", "sequence")])
def test_a_sampled_fisher_is_the_mean_outer_product_at_the_drawn_labels(name: str, unit: str, num_draws: int):
    case = CASES[name]
    with problem_of(case, case.model(), case.microbatches()) as problem:
        operator = SampledFisherOperator(problem.objective, problem.microbatches, sample_unit=unit, num_draws=num_draws, seed=7)
        G = drawn_gradients(problem, unit, seed=7, num_draws=num_draws)
        v = vector(G.shape[1])
        assert operator.normaliser == len(G)
        assert relative_error(operator.matmat(v[:, None])[:, 0], G.T @ (G @ v) / len(G)) < TOLERANCE
        assert relative_error(operator.vjp(torch.ones(operator.num_losses)), G.sum(0)) < TOLERANCE
        assert check_adjoint(operator, seed=0) < TOLERANCE


@pytest.mark.parametrize(("name", "loss"), [("gpt2", None), ("mlp", "cross_entropy"), ("mlp", "mse"), ("mlp", "bce")])
def test_a_sampled_fisher_has_the_spectrum_of_the_gram_with_its_seed(name: str, loss: str | None):
    case = CASES[name]
    microbatches = case.microbatches()
    if loss in ("mse", "bce"):
        microbatches = [(x, F.one_hot(y, CLASSES).double()) for x, y in microbatches]
    chosen = prefixed("transformer.ln_f" if name == "gpt2" else "0.")
    options: Any = {"loss": loss, "fisher": "sampled", "block_structure": "none", "seed": 5}
    expected = compute_fisher_spectrum(case.model(), microbatches, **options, **chosen).full.eigenvalues
    with problem_of(case, case.model(), microbatches, loss=loss, **chosen) as problem:
        operator = SampledFisherOperator(problem.objective, problem.microbatches, seed=5)
        found = torch.linalg.eigvalsh(dense(operator)).flip(0)
        assert relative_error(found[: len(expected)], expected) < TOLERANCE
        other = SampledFisherOperator(problem.objective, problem.microbatches, seed=6)
        assert not torch.allclose(dense(other), dense(operator))


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "bce"])
def test_sampled_fishers_average_to_the_ggn(loss: str):
    case, num_draws = CASES["mlp"], 400
    microbatches = case.microbatches()
    if loss != "cross_entropy":
        microbatches = [(x, F.one_hot(y, CLASSES).double()) for x, y in microbatches]
    with problem_of(case, case.model(), microbatches, loss=loss) as problem:
        v = vector(sum(p.numel() for p in problem.objective.parameters.values()))
        expected = v @ GGNOperator(problem.objective, problem.microbatches).matmat(v[:, None])[:, 0]
        operator = SampledFisherOperator(problem.objective, problem.microbatches, sample_unit="token", num_draws=num_draws)
        squares = operator.jvp(v).square()  # (S,)
        assert operator.num_losses == 6 * num_draws
    error = squares.std() / len(squares) ** 0.5
    assert abs(squares.mean() - expected) < 4 * error
    assert error < 0.1 * expected


def test_a_loss_without_a_likelihood_has_no_sampled_fisher():
    case = CASES["mlp"]
    found = problem_of(case, case.model(), case.microbatches(), loss=row_cross_entropy)
    with found as problem, pytest.raises(ConfigurationError, match="likelihood"):
        SampledFisherOperator(problem.objective, problem.microbatches)


def test_sampled_rows_that_are_not_finite_do_not_count():
    case = CASES["mlp"]
    model, microbatches = case.model(), case.microbatches()
    bad_input(microbatches[0])
    clean = [tuple(part[[0, 2]] for part in microbatches[0]), *microbatches[1:]]
    with problem_of(case, model, clean) as problem:
        expected = dense(SampledFisherOperator(problem.objective, clean, seed=3))
        found = SampledFisherOperator(problem.objective, microbatches, seed=3)
        assert found.rows.tolist() == [0, 2, 3, 4, 5]
        assert torch.allclose(dense(found), expected)
