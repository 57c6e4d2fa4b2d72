"""Small microbatches run together: the same Grams from fewer passes, and only where that is sure to be cheap and right."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature_callbacks import CurvatureMonitor, FisherSpectrum
from curvature_callbacks.compute.offline import offline_problem
from curvature_callbacks.gram.context import GramLimits
from curvature_callbacks.gram.memory import GramMemory
from curvature_callbacks.gram.passes import run_passes
from curvature_callbacks.gram.storage import MemoryBudget, Storage
from curvature_callbacks.microbatch import as_microbatch
from curvature_callbacks.model.loss.fisher_type import FisherType
from curvature_callbacks.model.objective import Objective
from tests.cases import CASES, Case
from tests.gram.capture.rule_cases import assert_exact
from tests.gram.gram_cases import context_of, parameter_grams
from tests.reference import sample_gradients


def equally_long(case: Case, sizes: tuple[int, ...]) -> list[Any]:
    """Microbatches that differ in their rows only."""
    draw = torch.Generator().manual_seed(0)
    return [case.batch(size, 6, draw) for size in sizes]


@pytest.fixture
def sizes_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every forward pass that is captured, as they come."""
    found: list[int] = []
    call = Objective.__call__

    def counting(self: Objective, batch: Any, *arguments: Any, **options: Any) -> Any:
        if options.get("watch") is not None:
            found.append(as_microbatch(batch).num_rows)
        return call(self, batch, *arguments, **options)

    monkeypatch.setattr(Objective, "__call__", counting)
    return found


@pytest.mark.parametrize("name", ["mlp", "gpt2", "convnet", "mixtral", "bert", "t5", "vit"])
def test_the_rest_is_run_together_and_exact(name: str, sizes_run: list[int]):
    case = CASES[name]
    model, microbatches = case.model(), equally_long(case, (2, 1, 3, 1))
    found = parameter_grams(model, microbatches, loss=case.loss)
    assert sizes_run == [2, 5]
    assert found.mode == "factors on device"
    assert_exact(found, sample_gradients(model, microbatches, case.kind), model, 1e-6)


def captured_by(model: nn.Module, batch: Any, loss: Any) -> int:
    """Bytes of what a pass over one batch captures."""
    storage = Storage(MemoryBudget(device_bytes=1 << 30))
    with offline_problem(model, [batch, batch], loss=loss, params_filter=None) as problem:  # the last pass keeps nothing
        run_passes(
            context_of(problem), problem.microbatches, FisherType(), storage, unruled={}, consume=lambda *parameter: None
        )
    return storage.captured


def test_passes_say_which_parameters_have_no_rule_and_leave_what_they_are_given_as_it_is():
    model = nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 2, batch_first=True)).double()
    known, consumed = {"0.bias": "by hand"}, []
    options: dict[str, Any] = {"loss": lambda net, batch: net(batch["x"])[0].square().sum((1, 2)), "params_filter": None}
    with offline_problem(model, [{"x": torch.randn(4, 2, 3, dtype=torch.float64)}], **options) as problem:
        passed = run_passes(
            context_of(problem),
            problem.microbatches,
            FisherType(),
            Storage(MemoryBudget(device_bytes=1 << 30)),
            unruled=known,
            consume=lambda name, *_: consumed.append(name),
        )
    assert known == {"0.bias": "by hand"}
    assert next(iter(passed.unruled.items())) == ("0.bias", "by hand")
    assert passed.unruled["1.weight_ih_l0"] == "no rule for `lstm`"
    assert consumed == ["0.weight"]
    assert {*passed.unruled, *consumed} == set(dict(model.named_parameters()))


def test_passes_are_no_larger_than_allowed(sizes_run: list[int]):
    case = CASES["mlp"]
    model, microbatches = case.model(), equally_long(case, (2, 2, 2, 2, 2, 2))
    four_rows = GramLimits(joined_bytes=2 * captured_by(model, microbatches[0], case.loss))
    sizes_run.clear()
    found = parameter_grams(model, microbatches, loss=case.loss, limits=four_rows)
    assert sizes_run == [2, 4, 4, 2]
    assert_exact(found, sample_gradients(model, microbatches, case.kind), model, 1e-10)


def test_where_not_all_can_be_kept_microbatches_stay_as_they_are(sizes_run: list[int]):
    case = CASES["mlp"]
    model, microbatches = case.model(), equally_long(case, (2, 1, 3, 1))
    with offline_problem(model, microbatches, loss=case.loss, params_filter=None, block_structure="parameter") as problem:
        found = problem.grams(memory_budget=0)
    assert sizes_run == [2, 1, 3, 1] * int(found.mode.removesuffix(" block groups"))
    assert_exact(found, sample_gradients(model, microbatches, case.kind), model, 1e-10)


def test_batches_of_other_lengths_stay_apart(sizes_run: list[int]):
    case = CASES["gpt2"]
    parameter_grams(case.model(), case.microbatches((3, 1, 2)), loss=case.loss)
    assert sizes_run == [3, 1, 2]


@pytest.mark.parametrize("fisher_type", [FisherType(fisher="sampled"), FisherType(sample_unit="token", num_targets=2)], ids=str)
def test_types_that_draw_by_microbatch_keep_them(fisher_type: FisherType, sizes_run: list[int]):
    case = CASES["gpt2"]
    parameter_grams(case.model(), equally_long(case, (2, 1, 1)), loss=case.loss, fisher_type=fisher_type)
    assert sizes_run == [2, 1, 1]


def test_a_mean_of_the_batch_is_taken_as_it_came(sizes_run: list[int]):
    """What is known of it holds for each microbatch by itself."""
    case = CASES["mlp"]
    mean = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    model, microbatches = case.model(), equally_long(case, (2, 1, 1))
    found = parameter_grams(model, microbatches, loss=mean)
    assert sizes_run == [2, 1, 1]
    assert_exact(found, sample_gradients(model, microbatches, case.kind), model, 1e-10)


def test_a_parameter_that_goes_row_by_row_beside_them(sizes_run: list[int]):
    case, memory = CASES["mlp"], GramMemory()
    model, microbatches = case.model(), equally_long(case, (2, 1, 3, 1))
    memory.refused[next(name for name, _ in model.named_parameters())] = "by hand"
    found = parameter_grams(model, microbatches, loss=case.loss, memory=memory)
    assert sizes_run == [2, 5]
    assert list(found.fallback) == list(memory.refused)
    assert_exact(found, sample_gradients(model, microbatches, case.kind), model, 1e-10)


def test_where_nothing_is_captured_nothing_is_known(sizes_run: list[int]):
    case, memory = CASES["mlp"], GramMemory()
    model, microbatches = case.model(), equally_long(case, (2, 1, 1))
    memory.refused.update(dict.fromkeys(dict(model.named_parameters()), "by hand"))
    found = parameter_grams(model, microbatches, loss=case.loss, memory=memory)
    assert sizes_run == [2, 1, 1]
    assert_exact(found, sample_gradients(model, microbatches, case.kind), model, 1e-10)


def test_kronecker_factors_do_not_depend_on_it():
    case = CASES["mlp"]
    model, microbatches = case.model(), equally_long(case, (2, 1, 3, 1))
    together, apart = (
        parameter_grams(model, microbatches, loss=case.loss, sharing="expand", limits=limits)
        for limits in (GramLimits(), GramLimits(joined_bytes=0))
    )
    assert list(together.kronecker) == list(apart.kronecker) != []
    for name, layer in together.kronecker.items():
        other = apart.kronecker[name]
        assert layer.normaliser == other.normaliser
        for one, two in ((layer.factors.A, other.factors.A), (layer.factors.G, other.factors.G)):
            assert torch.allclose(one.eigenvalues, two.eigenvalues, atol=1e-12)


def test_once_memory_ran_out_microbatches_stay_small(sizes_run: list[int], monkeypatch: pytest.MonkeyPatch):
    """Halved microbatches would be of no use if the Grams put them together again."""
    case = CASES["mlp"]
    call = Objective.__call__

    def small_only(self: Objective, batch: Any, *arguments: Any, **options: Any) -> Any:
        if options.get("watch") is not None and as_microbatch(batch).num_rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call(self, batch, *arguments, **options)

    monkeypatch.setattr(Objective, "__call__", small_only)
    monitor = CurvatureMonitor(
        case.model(torch.float32),
        probes=[(x.float(), y) for x, y in equally_long(case, (2, 2, 2))],
        loss="cross_entropy",
        measure=[FisherSpectrum()],
        when=1,
    )
    for step in range(2):
        found = {record.measurement: record for record in monitor.step(step) if record.block is None}
        assert found["probe"].scalars["failed"] == 0
        assert found["probe"].scalars["microbatch_size"] == 1
    assert sizes_run[-6:] == [1] * 6


def test_a_run_whose_memory_ran_out_keeps_its_microbatches(sizes_run: list[int]):
    case = CASES["mlp"]
    model, microbatches = case.model(), equally_long(case, (2, 1, 3, 1))
    parameter_grams(model, microbatches, GramMemory(row_limit=3), loss=case.loss)
    assert sizes_run == [2, 1, 3, 1]


def test_a_tensor_that_only_looks_like_rows_is_found_out():
    """Weights of classes, as many as the microbatch has rows: put together they fit no batch."""
    weights = torch.rand(3, dtype=torch.float64)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x, y, w = batch
        return nn.functional.cross_entropy(model(x) * w, y, reduction="none")

    draw = torch.Generator().manual_seed(0)
    model = CASES["mlp"].model()
    batches = [(*CASES["mlp"].batch(3, 0, draw), weights) for _ in range(3)]
    with pytest.raises(RuntimeError, match="size of tensor"):
        parameter_grams(model, batches, loss=loss)
