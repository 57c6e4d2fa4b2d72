"""CurvatureMonitor by itself: what it raises, what it swallows, what it hands on."""

import io
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from curvature_callbacks import (
    CapturedProbes,
    ConfigurationError,
    CurvatureMonitor,
    EdgeRatio,
    FisherSpectrum,
    GradientNoise,
    JSONLinesSink,
    KFACQuality,
    Measurement,
    MemorySink,
    ProbeError,
    Probes,
    Record,
    RefusedError,
    TopEigenpairs,
)
from curvature_callbacks.gram import probe_grams as shared
from curvature_callbacks.gram.block_grams import block_grams
from curvature_callbacks.gram.context import GramContext, GramOptions
from tests.training_cases import Checksum, Raising, Rows, Stream, assert_equal, cheap, loader, probed_steps, reports


def batch(num_rows: int = 6) -> Any:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_rows, 6, generator=generator), torch.randint(3, (num_rows,), generator=generator)


def monitor(model: nn.Module | None = None, **changes: Any) -> CurvatureMonitor:
    usual = {"probes": [batch()], "loss": "cross_entropy", "measure": [Checksum()], "when": 1}
    return CurvatureMonitor(nn.Linear(6, 3) if model is None else model, **(usual | changes))


def row_losses(model: nn.Module, rows: Any) -> torch.Tensor:
    """All that is known of this loss is its value."""
    return F.cross_entropy(model(rows[0]), rows[1], reduction="none")


def outcomes(watching: CurvatureMonitor, name: str) -> list[tuple[int, str | None]]:
    return [(record.step, record.error) for record in watching.history if record.measurement == name]


# -------------------------------------------------------------------------------------------------------------- schedule


def test_probes_happen_when_due_and_step_returns_their_records() -> None:
    watching = monitor(when=3)
    returned = [watching.step(step) for step in range(8)]
    assert [step for step, records in enumerate(returned) if records] == [0, 3, 6]
    assert [record for records in returned for record in records] == watching.history
    assert [record.measurement for record in returned[3]] == ["probe", "checksum"]


def test_a_schedule_of_ones_own() -> None:
    class AtPowersOfTwo:
        def due(self, step: int, previous: int | None) -> bool:
            return step & (step - 1) == 0

    watching = monitor(when=AtPowersOfTwo())
    for step in range(20):
        watching.step(step)
    assert probed_steps(watching.history) == [0, 1, 2, 4, 8, 16]


def test_records_carry_the_step_of_the_loggers() -> None:
    watching = monitor(when=2)
    watching.step(0, logged_as=0)
    watching.step(4, logged_as=2)
    assert [record.step for record in watching.history] == [0, 0, 2, 2]


def test_state_goes_on_where_it_was() -> None:
    first = monitor(when=3)
    for step in range(5):
        first.step(step)
    second = monitor(when=3)
    second.load_state_dict(first.state_dict())
    for step in range(5, 8):
        second.step(step)
    assert probed_steps(second.history) == [6]


def test_state_is_plain_data() -> None:
    watching = monitor(measure=[Raising(error=RefusedError("x")), Remembering(), GradientNoise(), *cheap()])
    watching.step(0)
    state = watching.state_dict(tensors=False)
    assert type(state["states"]["gradient_noise"]["whole"]["weight"]) is float
    assert "remembering" not in state["states"]  # a tensor
    again = json.loads(json.dumps(state))
    assert again["states"]["gradient_noise"] == state["states"]["gradient_noise"]
    assert again["failures"] == state["failures"] == {"raising": 3} | dict.fromkeys(state["states"], 0) | {"remembering": 0}


def test_a_checkpoint_that_holds_tensors_has_them_all() -> None:
    watching = monitor(measure=[Remembering(), TopEigenpairs(k=2), GradientNoise()])
    watching.step(0)
    state = watching.state_dict()
    assert torch.equal(state["states"]["remembering"], torch.zeros(1))
    assert len(state["states"]["hessian"]["starts"][""]) == 21
    assert_equal(torch.load(io.BytesIO(saved(state)), weights_only=True), state)
    bare = json.loads(json.dumps(watching.state_dict(tensors=False)))
    assert bare["states"]["hessian"] == {"error": state["states"]["hessian"]["error"], "starts": {"": None}}


def test_eigenvectors_and_the_passed_self_check_go_on_after_a_checkpoint() -> None:
    model, measure = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), [TopEigenpairs(k=1, which="LA", tol=1e-3)]
    through, second, bare, cold = (monitor(model, measure=measure) for _ in range(4))
    through.step(0)
    second.load_state_dict(torch.load(io.BytesIO(saved(through.state_dict())), weights_only=True))
    bare.load_state_dict(json.loads(json.dumps(through.state_dict(tensors=False))))
    runs = {name: one.step(1)[1] for name, one in {"on": through, "resumed": second, "bare": bare, "cold": cold}.items()}
    assert runs["resumed"].scalars == runs["on"].scalars
    assert runs["resumed"].num_matvecs == runs["on"].num_matvecs < runs["bare"].num_matvecs
    assert runs["bare"].num_matvecs == runs["cold"].num_matvecs - 3  # the self-check
    assert runs["bare"].scalars == runs["cold"].scalars


def saved(state: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


def noise(watching: CurvatureMonitor) -> list[dict[str, float]]:
    return [dict(record.scalars) for record in watching.history if record.measurement == "gradient_noise"]


def test_averages_go_on_after_a_checkpoint() -> None:
    model, probes = nn.Linear(6, 3), loader()
    measure: list[Measurement] = [GradientNoise(), *cheap()]
    through, first, second = (monitor(model, probes=probes, measure=measure) for _ in range(3))
    for step in range(4):
        through.step(step)
    first.step(0)
    first.step(1)
    second.load_state_dict(json.loads(json.dumps(first.state_dict(tensors=False))))
    second.step(2)
    second.step(3)
    assert noise(first) + noise(second) == noise(through)


def test_a_checkpoint_without_states_begins_them_anew() -> None:
    model = nn.Linear(6, 3)
    watching, fresh = (monitor(model, measure=[GradientNoise()]) for _ in range(2))
    watching.load_state_dict({"previous": 0, "failures": {}})
    watching.step(1)
    fresh.step(1)
    assert noise(watching) == noise(fresh) != []


@dataclass(frozen=True)
class Telling:
    """Its states are those it is told."""

    states: tuple[Any, ...]
    name: str = "telling"

    def init(self, problem: Any) -> None:
        return None

    def measure(self, problem: Any, state: Any) -> Any:
        return [], self.states[problem.step]


def test_a_state_that_a_checkpoint_can_no_longer_hold_is_not_saved_as_it_was() -> None:
    watching = monitor(measure=[Telling(({"seen": 1}, {"seen": object()}))])
    watching.step(0)
    assert watching.state_dict()["states"] == {"telling": {"seen": 1}}
    watching.step(1)
    for tensors in (True, False):
        assert watching.state_dict(tensors=tensors)["states"] == {}


def test_a_state_with_keys_that_json_would_turn_into_strings_is_not_saved() -> None:
    watching = monitor(measure=[Telling(({3: 1.0},))])
    watching.step(0)
    assert watching.state_dict(tensors=False)["states"] == {}


def test_loading_a_checkpoint_forgets_what_it_does_not_hold() -> None:
    watching = monitor(measure=[Telling(({"seen": 1},))])
    watching.step(0)
    watching.load_state_dict({"previous": 0, "failures": {}, "states": {}})
    assert watching.state_dict()["states"] == {}


def test_an_optimizer_of_none_of_the_filtered_parameters_stops_the_run() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    options: dict[str, Any] = {
        "measure": [EdgeRatio()],
        "optimizer": torch.optim.SGD(model[1].parameters(), lr=0.1),
    }
    monitor(model, **options).check()
    with pytest.raises(ConfigurationError, match="none of the parameters that are measured"):
        monitor(model, params_filter=lambda name, parameter: name.startswith("0."), **options).check()


@dataclass(frozen=True)
class Remembering:
    """Its state is a tensor."""

    name: str = "remembering"

    def init(self, problem: Any) -> torch.Tensor:
        return torch.zeros(1)

    def measure(self, problem: Any, state: torch.Tensor) -> Any:
        return [Record(step=problem.step, measurement=self.name, scalars={"one": 1.0})], state


# ----------------------------------------------------------------------------------------------------------------- draws


class Seeds(Probes):
    """Notes the seeds it is asked for."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def draw(self, seed: int) -> Sequence[Any]:
        self.seeds.append(seed)
        return [batch()]


def test_fresh_draws_differ_from_step_to_step_and_fixed_ones_do_not() -> None:
    drawn = {}
    for draw in ("fresh", "fixed"):
        probes = Seeds()
        watching = monitor(probes=probes, draw=draw)
        for step in range(3):
            watching.step(step)
        drawn[draw] = probes.seeds[1:]  # the first is of the check
    assert len(set(drawn["fresh"])) == 3
    assert len(set(drawn["fixed"])) == 1


def test_the_seed_changes_the_draws() -> None:
    seeds = []
    for seed in (0, 1):
        probes = Seeds()
        monitor(probes=probes, seed=seed).step(0)
        seeds.append(probes.seeds)
    assert seeds[0] != seeds[1]


def test_two_monitors_of_one_model_find_the_same_numbers() -> None:
    model = nn.Linear(6, 3)
    found = []
    for _ in range(2):
        watching = monitor(model, probes=loader(), measure=cheap(), num_microbatches=2, microbatch_size=3)
        torch.rand(5)  # the state of the generators does not matter
        watching.step(4)
        found.append([(dict(r.scalars), dict(r.arrays)) for r in watching.history if r.measurement != "probe"])
    assert_equal(found[0], found[1])


def test_nothing_happens_before_a_stream_has_brought_data() -> None:
    captured = CapturedProbes(num_microbatches=1, microbatch_size=3)
    watching = monitor(probes=captured, when=10)
    assert watching.step(0) == []
    captured.offer(batch())
    assert {record.step for record in watching.step(1)} == {1}
    assert watching.step(2) == []


def test_the_probe_tells_about_itself() -> None:
    watching = monitor(probes=[batch(6), batch(4)], measure=[*cheap(), Raising(error=RuntimeError("x"))])
    summary = watching.step(0)[0]
    hessian = next(record for record in watching.history if record.measurement == "hessian")
    assert summary.scalars["rows"] == 10
    assert summary.scalars["failed"] == 1
    assert summary.scalars["matvecs"] == hessian.num_matvecs
    assert summary.scalars["gradient_equivalents"] > 0
    assert summary.scalars["probe_seconds"] >= hessian.seconds > 0
    assert summary.metadata["blocks"] == ["weight", "bias"] or summary.metadata["blocks"]


def test_metadata_is_json_able() -> None:
    watching = monitor(measure=cheap())
    watching.step(0)
    assert [Record.from_json(record.to_json()).to_json() for record in watching.history] == [
        record.to_json() for record in watching.history
    ]


# ------------------------------------------------------------------------------------------------- what measurements share


class Counter:
    """Counts the forward passes of a model and the backward passes that reach its output."""

    def __init__(self, model: nn.Module) -> None:
        self.forwards = self.backwards = 0
        model.register_forward_hook(self._forward)

    def _forward(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self.forwards += 1
        if output.requires_grad:
            output.register_hook(self._backward)

    def _backward(self, gradient: torch.Tensor) -> None:
        self.backwards += 1


def passes(*measure: Measurement) -> tuple[int, int]:
    """Forward and backward passes of the second probe, whose layout is certified, but for the gradient it compares with."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    watching, counter = monitor(model, measure=measure), Counter(model)
    watching.step(0)
    counter.forwards = counter.backwards = 0
    records = watching.step(1)
    assert not any(record.failed for record in records)
    assert {record.measurement for record in records} == {"probe", *(one.name for one in measure)}
    return counter.forwards - 1, counter.backwards - 1


OF_ONE_PASS = {
    "empirical": [FisherSpectrum(), KFACQuality()],
    "reduce": [FisherSpectrum(center_gradients=True), KFACQuality(sharing="reduce")],
    "all": [FisherSpectrum(), GradientNoise(), KFACQuality()],
    "sampled": [FisherSpectrum(fisher="sampled"), KFACQuality(fisher="sampled")],
    "deterministic": [FisherSpectrum(deterministic=True), KFACQuality()],
}


@pytest.mark.parametrize("name", OF_ONE_PASS)
def test_fisher_and_kronecker_factors_come_from_one_pass(name: str) -> None:
    assert passes(*OF_ONE_PASS[name]) == (1, 1)


def test_layers_come_in_the_order_of_the_model() -> None:
    watching = monitor(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), measure=[KFACQuality()])
    assert [record.block for record in watching.step(0)] == [None, None, "0", "2"]


@pytest.mark.parametrize("name", sorted(OF_ONE_PASS.keys() - {"deterministic"}))
def test_in_either_order(name: str) -> None:
    assert passes(*reversed(OF_ONE_PASS[name])) == (1, 1)


def test_other_numbers_take_another_pass() -> None:
    assert passes(FisherSpectrum(), KFACQuality(fisher="sampled")) == (2, 2)
    assert passes(KFACQuality(), FisherSpectrum(deterministic=True)) == (2, 2)
    assert passes(FisherSpectrum(), KFACQuality(), KFACQuality(sharing="reduce")) == (2, 2)
    assert passes(FisherSpectrum(max_params_per_block=4), KFACQuality()) == (2, 2)


def test_what_is_switched_off_asks_for_no_factors(monkeypatch: Any) -> None:
    asked: list[Any] = []

    def noted(context: GramContext, microbatches: Any, blocks: Any, options: GramOptions) -> Any:
        asked.append(options.sharing)
        return block_grams(context, microbatches, blocks, options)

    monkeypatch.setattr(shared, "block_grams", noted)
    watching = monitor(measure=[FisherSpectrum(), KFACQuality()])
    watching.load_state_dict({"previous": None, "failures": {"kfac_empirical_expand": 3}})
    watching.step(0)
    assert asked == [None]


def test_factors_that_do_not_fit_leave_the_grams(monkeypatch: Any) -> None:
    def out_of_memory(context: GramContext, microbatches: Any, blocks: Any, options: GramOptions) -> Any:
        if options.sharing is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return block_grams(context, microbatches, blocks, options)

    monkeypatch.setattr(shared, "block_grams", out_of_memory)
    for measure in ([FisherSpectrum(), KFACQuality()], [KFACQuality(), FisherSpectrum()]):
        watching = monitor(measure=measure)
        watching.step(0)
        assert set(outcomes(watching, "empirical_fisher")) == {(0, None)}
        assert outcomes(watching, "kfac_empirical_expand") == [(0, "OutOfMemoryError: CUDA out of memory")]


# ------------------------------------------------------------------------------------------------------- misconfiguration


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"when": 0}, "`every_n_steps` must be an integer of at least 1"),
        ({"draw": "x"}, "`draw` must be one of 'fresh', 'fixed', got 'x'"),
        ({"block_structure": "x"}, "`block_structure` must be one of"),
        ({"num_microbatches": 0}, "`num_microbatches`"),
        ({"microbatch_size": 0}, "`microbatch_size`"),
        ({"measure": [FisherSpectrum]}, "`measure` must hold measurements.*pass an instance"),
        ({"measure": [TopEigenpairs(), TopEigenpairs()]}, "different names"),
        ({"measure": ["hessian"]}, "`measure` must hold measurements.*got 'hessian'"),
        ({"probes": DataLoader(Stream(Rows()))}, "`probes` must be a DataLoader over a map-style dataset.*CapturedProbes"),
        ({"probes": 3}, "`probes` must be.*got int"),
    ],
)
def test_a_bad_argument_is_refused_at_construction(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        monitor(**changes)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: TopEigenpairs(operator="hesian"), "one of 'hessian', 'ggn', .*, got 'hesian'"),  # type: ignore[arg-type]
        (lambda: TopEigenpairs(which="XX"), "`which` must be one of .*'BE'.*got 'XX'"),  # type: ignore[arg-type]
        (lambda: TopEigenpairs(k=0), "`k` must be an integer of at least 1"),
        (lambda: TopEigenpairs(k=4, max_matvecs=3), "`max_matvecs` must be at least `k`=4, got 3"),
        (lambda: TopEigenpairs(tol=0.0), "`tol` must be positive"),
        (lambda: FisherSpectrum(damping=0.0), "`damping` must be positive"),
        (lambda: FisherSpectrum(eigensolve_device="tpu"), "`eigensolve_device` must be one of"),  # type: ignore[arg-type]
    ],
)
def test_a_bad_option_of_a_measurement_is_refused(build: Any, match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        build()


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 3, max_norm=1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.embedding(x)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model": nn.Linear(6, 3).requires_grad_(False)}, "no trainable parameter"),
        ({"params_filter": lambda name, parameter: False}, "`params_filter`.*nothing to measure"),
        ({"probes": [(torch.randn(4, 6), torch.full((4,), -100))]}, "every label of the drawn microbatches is ignored"),
        ({"probes": []}, "at least one microbatch"),
        ({"loss": "cross_entropie"}, "`loss` must be one of 'cross_entropy', 'mse', 'bce'"),
        ({"loss": None}, "the loss of a tuple batch cannot be determined"),
        ({"probes": [batch()[0]]}, r"needs `\(inputs, targets\)` batches"),
        ({"loss": row_losses, "measure": [FisherSpectrum(fisher="sampled")]}, "labels can only be drawn where the likelihood"),
        ({"loss": row_losses, "measure": [KFACQuality(sample_unit="token")]}, "single targets"),
        ({"model": nn.Linear(5, 3)}, "the loss of a first probe could not be computed.*RuntimeError"),
        ({"model": Normed(), "probes": [(torch.tensor([0, 1]), torch.tensor([0, 1]))]}, "`embedding` has `max_norm`"),
    ],
    ids=[
        "frozen",
        "filtered",
        "ignored",
        "no batch",
        "loss name",
        "no loss",
        "no targets",
        "likelihood",
        "single targets",
        "shapes",
        "max_norm",
    ],
)
def test_what_cannot_be_measured_is_refused_by_check_and_by_the_first_step(changes: dict[str, Any], match: str) -> None:
    for first in (CurvatureMonitor.check, lambda watching: watching.step(0)):
        with pytest.raises(ConfigurationError, match=match):
            first(monitor(**changes))


# ------------------------------------------------------------------------------------------------------------- failures


def test_an_exception_is_recorded_said_once_and_switched_off_after_three(caplog: Any) -> None:
    caplog.set_level(logging.WARNING)
    watching = monitor(measure=[Raising(error=ValueError("x")), Checksum()])
    for step in range(6):
        watching.step(step)
    assert outcomes(watching, "raising") == [(step, "ValueError: x") for step in range(3)]
    assert outcomes(watching, "checksum") == [(step, None) for step in range(6)]
    assert len(reports(caplog)) == 1
    assert all(part in reports(caplog)[0] for part in ("`raising`", "step 0", "ValueError: x", "Training is not affected"))


@pytest.mark.parametrize("error", [ProbeError("later"), torch.OutOfMemoryError("CUDA out of memory")])
def test_only_failures_in_a_row_count(error: Exception) -> None:
    watching = monitor(measure=[Raising(error=error, at=(0, 1, 3, 4, 6))])
    for step in range(8):
        watching.step(step)
    assert [step for step, cause in outcomes(watching, "raising") if cause is None] == [2, 5, 7]


def test_a_refusal_is_final(caplog: Any) -> None:
    watching = monitor(measure=[Raising(error=RefusedError("silently wrong"))])
    for step in range(3):
        watching.step(step)
    assert outcomes(watching, "raising") == [(0, "RefusedError: silently wrong")]
    assert "switched off" in reports(caplog)[0]


def test_a_measurement_that_is_switched_off_is_still_counted_as_failing() -> None:
    """Otherwise `curvature/failed` falls back to zero just when there is nothing left to see."""
    watching = monitor(measure=[Raising(error=RefusedError("x"))])
    failed = [watching.step(step)[0].scalars["failed"] for step in range(3)]
    assert failed == [1.0, 1.0, 1.0]


class Dying(Rows):
    """Rows that cannot be read after a while."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = iter(range(12))  # a draw puts attributes back, but no iterators

    def __getitem__(self, index: int) -> Any:
        if next(self.reads, None) is None:
            raise OSError("disk")
        return super().__getitem__(index)


def test_data_that_cannot_be_drawn_fails_the_probe_and_nothing_else(caplog: Any) -> None:
    watching = monitor(probes=DataLoader(Dying(), batch_size=2), num_microbatches=2, microbatch_size=3)
    for step in range(3):
        watching.step(step)
    assert outcomes(watching, "probe") == [(0, None), (1, "OSError: disk"), (2, "OSError: disk")]
    assert [record.scalars["failed"] for record in watching.history if record.measurement == "probe"] == [0, 1, 1]
    assert len(reports(caplog)) == 1


def test_an_interrupt_passes_through_and_finds_everything_restored() -> None:
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3))
    model[0].eval()
    before = torch.get_rng_state()
    watching = monitor(model, measure=[Raising(error=KeyboardInterrupt())])
    with pytest.raises(KeyboardInterrupt):
        watching.step(0)
    assert [module.training for module in model.modules()] == [True, False, True]
    assert model[0].running_var.min() == 1
    assert torch.equal(before, torch.get_rng_state())


def test_out_of_memory_while_checking_is_left_to_the_probe(caplog: Any) -> None:
    def exhausting(model: nn.Module, rows: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    watching = monitor(loss=exhausting, measure=cheap())
    watching.check()
    records = watching.step(0)
    assert records[0].scalars["failed"] == 3
    assert all("OutOfMemoryError" in (record.error or "") for record in records[1:])


class Failing:
    """A sink that cannot write."""

    def write(self, records: Sequence[Record]) -> None:
        raise OSError("no space left on device")


def test_a_failing_sink_is_reported_once_and_the_others_get_everything(caplog: Any, tmp_path: Any) -> None:
    memory = MemorySink()
    watching = monitor(sinks=[Failing(), memory, JSONLinesSink(tmp_path / "a.jsonl")])
    for step in range(4):
        watching.step(step)
    assert memory.records == watching.history
    assert probed_steps(memory.records) == [0, 1, 2, 3]
    assert len(reports(caplog)) == 1
    assert all(part in reports(caplog)[0] for part in ("Failing", "no space left on device", "Training is not affected"))


# ------------------------------------------------------------------------------------------------------ state of measurements


class Counting(Checksum):
    """Counts its probes in its state and fails at one of them."""

    def init(self, problem: Any) -> int:
        return 0

    def measure(self, problem: Any, state: int) -> Any:
        if problem.step == 2:
            raise RuntimeError("x")
        return [Record(step=problem.step, measurement=self.name, scalars={"count": float(state)})], state + 1


def test_the_state_of_a_measurement_is_handed_back_and_survives_a_failure() -> None:
    watching = monitor(measure=[Counting()])
    for step in range(5):
        watching.step(step)
    counts = [record.scalars.get("count") for record in watching.history if record.measurement == "checksum"]
    assert counts == [0.0, 1.0, None, 2.0, 3.0]


def test_nothing_of_the_model_changes() -> None:
    model = nn.Sequential(nn.Linear(6, 3))
    F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    kept = [(id(p), id(p.grad), p._version, p.grad._version) for p in model.parameters()]  # type: ignore[union-attr]
    monitor(model, measure=cheap()).step(0)
    assert [(id(p), id(p.grad), p._version, p.grad._version) for p in model.parameters()] == kept  # type: ignore[union-attr]
