"""The certificate: wrong rules, wrong sample axes and coupled samples never pass; what it costs and when it is spent."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature_callbacks.compute.offline import offline_problem
from curvature_callbacks.errors import RefusedError
from curvature_callbacks.gram.certificate import certificate_errors, signature
from curvature_callbacks.gram.context import GramOptions
from curvature_callbacks.gram.memory import TOLERANCE, GramMemory
from curvature_callbacks.gram.passed import Passed
from curvature_callbacks.gram.uses.convolution import Convolution
from curvature_callbacks.gram.uses.elementwise import SCALE, Elementwise
from curvature_callbacks.gram.uses.operation import Operation
from curvature_callbacks.gram.uses.uses import Lookup, OuterProduct
from curvature_callbacks.model.loss.fisher_type import FisherType
from tests.cases import CASES, CLASSES, in_general_position
from tests.gram.capture.rule_cases import RuleCase, assert_exact, weight
from tests.gram.gram_cases import block_grams_of, context_of, parameter_grams
from tests.reference import sample_gradients


class Everything(nn.Module):
    """One layer of every kind of rule."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = torch.tanh(self.conv(self.table(ids).mT).mT)
        return self.head(torch.tanh(self.norm(hidden)).sum(1))


def ids(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randint(9, (size, 5), generator=generator), torch.randint(CLASSES, (size,), generator=generator))
        for size in sizes
    ]


# What goes wrong with the gradients (N, ...) of one rule.
FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "one part in a thousand": lambda G: G * 1.001,
    "samples in another order": lambda G: G.flip(0),
    "two samples exchanged": lambda G: torch.cat([G[1:2], G[:1], G[2:]]),
    "signs of samples": lambda G: G * torch.tensor([1.0, -1.0]).repeat(len(G))[: len(G)].reshape(-1, *[1] * (G.ndim - 1)),
    "one sample missing": lambda G: torch.cat([torch.zeros_like(G[:1]), G[1:]]),
    "the mean of all": lambda G: G.mean(0, keepdim=True).expand_as(G),
    "nothing": lambda G: G * 0,
}


def faulty_products(fault: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    original = OuterProduct.factors

    def factors(self: OuterProduct) -> tuple[Tensor, Tensor]:
        left, right = original(self)
        return fault(left), right

    monkeypatch.setattr(OuterProduct, "factors", factors)


def faulty_convolutions(fault: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    original = Convolution.slices

    def slices(self: Convolution, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        found = fault(original(self, start, stop))
        return found if out is None else out.copy_(found.reshape(out.shape))

    monkeypatch.setattr(Convolution, "slices", slices)


def faulty_lookups(fault: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    original = Lookup.complete
    monkeypatch.setattr(Lookup, "complete", lambda self, gradient: original(self, fault(gradient)))


def faulty_scales(fault: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    original = Elementwise.completed
    monkeypatch.setattr(
        Elementwise,
        "completed",
        lambda self, gradient: original(self, fault(gradient) if self.operation == SCALE else gradient),
    )


RULES = {
    "head.weight": faulty_products,
    "conv.weight": faulty_convolutions,
    "table.weight": faulty_lookups,
    "norm.weight": faulty_scales,
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("parameter", RULES)
def test_a_wrong_rule_is_caught_and_its_parameter_goes_row_by_row(parameter: str, fault: str, monkeypatch: pytest.MonkeyPatch):
    model, microbatches, memory = in_general_position(Everything).double(), ids(3, 2), GramMemory()
    truth = sample_gradients(model, microbatches, "pair")
    RULES[parameter](FAULTS[fault], monkeypatch)
    found = parameter_grams(model, microbatches, memory)
    assert set(found.fallback) == {parameter}
    assert found.fallback[parameter].startswith("certificate failed (relative error ")
    assert found.failed_certificates == (parameter,)
    assert found.certificate_error is not None
    assert found.certificate_error < 1e-10
    assert_exact(found, truth, model, 1e-10)
    again = parameter_grams(model, microbatches, memory)
    assert again.certificate_error is None  # proved already, without the parameter
    assert dict(again.fallback) == dict(found.fallback)
    assert_exact(again, truth, model, 1e-10)


@pytest.mark.parametrize("fisher", ["sampled", "exact"])
def test_a_wrong_rule_is_caught_in_other_types_of_fisher(fisher: Any, monkeypatch: pytest.MonkeyPatch):
    model, microbatches, fisher_type = in_general_position(Everything).double(), ids(3, 2), FisherType(fisher=fisher)
    expected = parameter_grams(model, microbatches, fisher_type=fisher_type)
    faulty_convolutions(FAULTS["samples in another order"], monkeypatch)
    found = parameter_grams(model, microbatches, fisher_type=fisher_type)
    assert set(found.fallback) == {"conv.weight"}
    for block, K in expected.grams.items():
        assert torch.allclose(found.grams[block], K, rtol=1e-10)


def test_no_seed_misses_samples_out_of_place(monkeypatch: pytest.MonkeyPatch):
    model, microbatches = in_general_position(Everything).double(), ids(2, 3)
    faulty_products(FAULTS["two samples exchanged"], monkeypatch)
    for seed in range(30):
        assert set(parameter_grams(model, microbatches, seed=seed).fallback) == {"head.weight"}


def test_right_rules_pass_for_every_seed_and_in_single_precision():
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        model = in_general_position(Everything).to(dtype)
        for seed in range(10):
            found = parameter_grams(model, ids(3, 2), seed=seed)
            assert found.fallback == {}
            assert found.certificate_error is not None
            assert found.certificate_error < bound


def linear() -> dict[str, Any]:
    return {"inner": nn.Linear(4, 3)}


def turned(m: Any, x: Tensor) -> Tensor:
    return m.inner(x.flip(0)).flip(0)


@pytest.mark.parametrize("sizes", [(2,), (3,), (4,), (3, 2)], ids=str)
def test_samples_permuted_inside_a_layer_are_caught(sizes: tuple[int, ...]):
    case, memory = RuleCase(body=turned, parts=linear), GramMemory()
    model, microbatches = case.model(stem=True), case.microbatches(sizes)
    found = parameter_grams(model, microbatches, memory)
    assert set(found.fallback) == {"inner.weight", "inner.bias"}
    assert all(reason.startswith("certificate failed") for reason in found.fallback.values())
    assert set(found.failed_certificates) == set(found.fallback)
    assert_exact(found, sample_gradients(model, microbatches, "pair"), model, 1e-10)


COUPLED = {
    "permuted and not put back": lambda m, x: m.inner(x.flip(0)),
    "inputs minus their mean": lambda m, x: m.inner(x - x.mean(0)),
    "activations minus a mean without gradient": lambda m, x: m.inner(x) - m.inner(x).detach().mean(0),
    "inputs rolled": lambda m, x: m.inner(x) + x.roll(1, 0)[..., :3],
    "activations rolled": lambda m, x: m.inner(x).roll(1, 0),
    "divided by the largest": lambda m, x: m.inner(x) / x.abs().max(),
}


@pytest.mark.parametrize("stem", [False, True], ids=["input", "hidden"])
@pytest.mark.parametrize("name", COUPLED)
def test_coupled_samples_are_refused(name: str, stem: bool):
    case, memory = RuleCase(body=COUPLED[name], parts=linear), GramMemory()
    for _ in range(2):  # also by a run that has tried before
        with pytest.raises(RefusedError):
            parameter_grams(case.model(stem=stem), case.microbatches((3, 4)), memory)


class _Count(torch.autograd.Function):
    """The identity; `calls` counts its passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, calls: list[str]) -> Tensor:
        ctx.calls = calls
        calls.append("forward")
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.calls.append("backward")
        return gradient, None


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 4)
        self.head = nn.Linear(4, CLASSES)
        self.calls: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.head(_Count.apply(torch.tanh(self.inner(x)), self.calls))

    def count(self) -> tuple[int, int]:
        found = self.calls.count("forward"), self.calls.count("backward")
        self.calls.clear()
        return found


@pytest.mark.parametrize(("sizes", "sizes_run"), [((4,), (4,)), ((3, 1, 2), (3, 3)), ((1, 2, 3), (1, 5))], ids=str)
def test_what_a_probe_costs(sizes: tuple[int, ...], sizes_run: tuple[int, ...]):
    """Passes a microbatch: one of each; once more of each to prove it, and three without gradient to see rows apart.

    Small ones are run together, but for types that draw by microbatch.
    """
    model, microbatches, memory = in_general_position(Counting).double(), CASES["mlp"].microbatches(sizes), GramMemory()
    pairs = len(sizes_run)
    with offline_problem(model, microbatches, loss="cross_entropy", params_filter=None) as problem:
        model.count()
        first = block_grams_of(problem, memory)
        apart = sum(3 if size > 1 else 1 for size in sizes_run)
        assert model.count() == (2 * pairs + apart, 2 * pairs)
        second = block_grams_of(problem, memory)
        assert model.count() == (pairs, pairs)
        sampled = GramOptions(fisher_type=FisherType(fisher="sampled", num_draws=3))
        block_grams_of(problem, memory, options=sampled)
        assert model.count() == (len(sizes), 3 * len(sizes))  # the layout is the same
    assert (first.certificate_error, second.certificate_error) != (None, None)
    assert second.certificate_error is None
    for block, K in first.grams.items():
        assert torch.equal(second.grams[block], K)


def test_a_layout_not_met_before_is_proved_anew():
    def body(m: Any, x: Tensor) -> Tensor:
        return x * m.scale if x.shape[1] > 4 else x + m.scale

    case, memory = RuleCase(body=body, parts=lambda: {"scale": weight(4)}), GramMemory()
    model = case.model(stem=True)
    long, short, _ = case.microbatches((2, 2, 2))
    proved = [
        parameter_grams(model, [batch], memory).certificate_error is not None for batch in (long, long, short, long, short)
    ]
    assert proved == [True, False, True, False, False]


@pytest.mark.parametrize("sizes", [(4, 6), (4, 3), (6, 4), (3, 6), (2, 4, 6, 3), (1, 3), (1, 4, 2)], ids=str)
def test_trust_does_not_carry_a_wrong_sample_axis_over(sizes: tuple[int, ...]):
    """Sequence-first with T = 6: for some N the shape tells, for others axis 0 passes for samples."""
    case, memory = CASES["sequence_first"], GramMemory()
    model = case.model()
    for size in sizes:
        microbatches = case.microbatches((size,))
        found = parameter_grams(model, microbatches, memory)
        assert_exact(found, sample_gradients(model, microbatches, "pair"), model, 1e-10)


@pytest.mark.parametrize("sizes", [(1,), (1, 1)], ids=str)
def test_a_row_by_itself_proves_nothing_about_the_sample_axis(sizes: tuple[int, ...]):
    case, memory = RuleCase(body=turned, parts=linear), GramMemory()
    model, microbatches = case.model(stem=True), case.microbatches((3,))
    parameter_grams(model, case.microbatches(sizes), memory)
    found = parameter_grams(model, microbatches, memory)
    assert_exact(found, sample_gradients(model, microbatches, "pair"), model, 1e-10)


def test_signatures_know_operations_and_sample_axes_but_not_lengths():
    def of(positions: list[int], names: list[str]) -> Any:
        operations = {"weight": [Operation(name) for name in names], "other": [Operation("linear")]}
        return signature(operations, {"weight": positions, "other": [max(positions)]})

    assert of([7], ["linear"]) == of([4], ["linear"])
    assert of([7, 7], ["linear", "linear"]) == of([7], ["linear"])
    assert of([7], ["linear"]) != of([7], ["bias"])
    assert of([7], ["linear"]) != of([1], ["linear"])
    assert of([7], ["linear"]) != of([7, 1], ["linear", "linear"])


def test_a_failure_is_read_the_other_way_then_row_by_row_then_refused():
    memory = GramMemory()
    assert memory.judge({"right": TOLERANCE, "wrong": 0.1, "nan": float("nan")}, {})
    assert memory.positions_first == {"wrong", "nan"}
    assert memory.refused == {}
    assert memory.judge({"right": 0.0, "wrong": 0.1, "nan": 0.0}, {})
    assert set(memory.refused) == memory.failed == {"wrong"}
    assert not memory.judge({"right": 0.0, "wrong": 0.0}, memory.refused)
    with pytest.raises(RefusedError, match="wrong"):
        memory.judge({"wrong": 0.1}, memory.refused)


def error_of(name: str, factor: float, shrink: float = 1.0) -> float:
    """The certificate's error for one parameter whose Gram is wrong by a factor, its output weighing little."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, CLASSES)).double()
    with torch.no_grad():
        model[1].weight *= shrink
    microbatches = CASES["mlp"].microbatches((4,))
    with offline_problem(model, microbatches, loss="cross_entropy", params_filter=None, block_structure="parameter") as problem:
        truth = sample_gradients(model, microbatches, "pair")
        grams = {key: G @ G.T for key, G in truth.items()}
        grams[name] = grams[name] * factor
        passed = Passed(microbatches=problem.microbatches, surrogates=[[None]])
        return certificate_errors(context_of(problem), passed, grams, {})[name]


def test_errors_are_of_each_parameter_by_itself():
    assert error_of("0.weight", 1.0) < 1e-12
    assert error_of("0.weight", 1.01) > TOLERANCE
    assert error_of("0.weight", 1.01, shrink=1e-3) > TOLERANCE  # a millionth of all
    assert error_of("0.weight", 2.0, shrink=1e-8) < TOLERANCE  # rounding is nobody's fault
    assert error_of("0.weight", 0.0) == pytest.approx(1.0, rel=5.0)
