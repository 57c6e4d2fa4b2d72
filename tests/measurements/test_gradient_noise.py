"""Gradient noise: its numbers against gradients taken one by one, its averages, its state, its failures, its tags."""

import copy
import io
import json
import math
import pickle
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from curvature_callbacks import ConfigurationError, CurvatureMonitor, FisherSpectrum, GradientNoise, ProbeError, Record
from curvature_callbacks.compute.offline import offline_problem
from curvature_callbacks.record import headline, scalar_tags
from tests.cases import CASES
from tests.measurements.gradient_noise_cases import CASE, descend, digits, measured, model_record, network
from tests.reference import sample_gradients, stacked


def moments(G: Tensor) -> tuple[float, float]:
    """`tr Sigma` and `|G|^2` without their bias: scatter about the mean, and the products of all ordered pairs."""
    N = len(G)
    products = [float(G[i] @ G[j]) for i in range(N) for j in range(N) if i != j]
    return float((G - G.mean(0)).square().sum()) / (N - 1), sum(products) / len(products)


def mean_cosine(G: Tensor) -> float:
    cosines = [float(F.cosine_similarity(G[i], G[j], dim=0)) for i in range(len(G)) for j in range(i)]
    return sum(cosines) / len(cosines)


@pytest.mark.parametrize("name", ["mlp", "gpt2", "bert", "convnet"])
def test_records_agree_with_gradients_taken_one_by_one(name: str) -> None:
    case = CASES[name]
    gradients = sample_gradients(case.model(), case.microbatches(), case.kind)
    with offline_problem(case.model(), case.microbatches(), loss=case.loss, params_filter=None) as problem:
        records, _ = GradientNoise().measure(problem, GradientNoise().init(problem))
        blocks = dict(problem.blocks)
    assert [record.block for record in records] == [None, *blocks]
    for record in records:
        G = stacked(gradients, blocks.get(record.block) if record.block else None)
        noise, signal = moments(G)
        assert record.scalars["covariance_trace"] == pytest.approx(noise, rel=1e-6)
        assert record.scalars["mean_gradient_norm_squared"] == pytest.approx(signal, abs=1e-6 * noise)  # a difference
        assert record.scalars["mean_cosine"] == pytest.approx(mean_cosine(G), abs=1e-6)
        assert record.scalars.get("scale") == (pytest.approx(noise / signal, rel=1e-5) if signal > 0 else None)
    assert records[0].arrays["norms"] == pytest.approx(stacked(gradients).norm(dim=1).tolist(), rel=1e-6)


def test_scale_of_the_digits_is_that_of_all_of_them() -> None:
    """60 fresh draws of 32 rows, averaged evenly, against the 1 797 rows; the mean of the probes' own ratios is far off."""
    model, (x, y) = network(), digits()
    for _ in range(30):
        descend(model, (x, y))
    noise, signal = population_moments(sample_gradients(model, [(x, y)], "pair"))
    loader = DataLoader(TensorDataset(x, y), batch_size=32)
    watching = CurvatureMonitor(
        model, probes=loader, loss="cross_entropy", measure=[GradientNoise(decay=0.9999)], when=1, num_microbatches=1,
        microbatch_size=32, block_structure="none",
    )  # fmt: skip
    for index in range(60):
        watching.step(index)
    found = [record for record in watching.history if record.measurement == "gradient_noise" and record.block is None]
    assert all(not record.failed for record in watching.history)
    errors = [record.scalars["mean_gradient_norm_squared_standard_error"] ** 2 for record in found]
    last = found[-1].scalars
    assert abs(last["mean_gradient_norm_squared_average"] - signal) < 4 * math.sqrt(sum(errors)) / len(found)
    assert last["covariance_trace_average"] == pytest.approx(noise, rel=0.05)
    assert last["scale"] == pytest.approx(noise / signal, rel=0.3)


def population_moments(gradients: dict[str, Tensor]) -> tuple[float, float]:
    G = stacked(gradients)
    return float((G - G.mean(0)).square().sum()) / len(G), float(G.mean(0).square().sum())


def draws(count: int) -> list[list[Any]]:
    """Some with a positive estimate of `|G|^2`, some with a negative one."""
    return [CASE.microbatches((5,), seed=5 + index) for index in range(count)]


def probed(model: nn.Module, microbatches: Sequence[Any], measurement: GradientNoise) -> list[Record]:
    state, records = None, []
    for batches in microbatches:
        found, state = measured(model, batches, state, measurement=measurement)
        records.append(found[0])
    return records


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_scale_is_the_ratio_of_weighted_means_of_all_probes(decay: float) -> None:
    model = CASE.model()
    own = [moments(stacked(sample_gradients(model, batches, CASE.kind))) for batches in draws(8)]
    records = probed(model, draws(8), GradientNoise(decay=decay))
    seen = set()
    for last, record in enumerate(records):
        weights = [decay ** (last - i) for i in range(last + 1)]
        noise, signal = (sum(w * o[part] for w, o in zip(weights, own, strict=False)) / sum(weights) for part in (0, 1))
        assert record.scalars["covariance_trace_average"] == pytest.approx(noise, rel=1e-9)
        assert record.scalars["mean_gradient_norm_squared_average"] == pytest.approx(signal, rel=1e-9)
        assert record.scalars.get("scale") == (pytest.approx(noise / signal, rel=1e-9) if signal > 0 else None)
        seen.add(signal > 0)
    assert any(signal < 0 for _, signal in own)
    assert seen == {True, False}


def test_blocks_have_averages_of_their_own() -> None:
    model, state, records = CASE.model(), None, []
    for batches in draws(8):
        records, state = measured(model, batches, state, measurement=GradientNoise(decay=0.5))
    gradients = [sample_gradients(model, batches, CASE.kind) for batches in draws(8)]
    with offline_problem(model, draws(1)[0], loss=CASE.loss, params_filter=None) as problem:
        blocks = dict(problem.blocks)
    for record in records[1:]:
        own = [moments(stacked(found, blocks[record.block or ""])) for found in gradients]
        noise, signal = (sum(0.5 ** (7 - i) * own[i][part] for i in range(8)) for part in (0, 1))
        assert record.scalars.get("scale") == (pytest.approx(noise / signal, rel=1e-9) if signal > 0 else None)
    assert sum("scale" in record.scalars for record in records[1:]) > 1


def test_without_a_signal_there_is_no_scale_and_the_record_says_why() -> None:
    model = nn.Linear(2, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    opposed = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    record = model_record(model, [opposed], loss="mse")
    assert record.scalars["mean_gradient_norm_squared_average"] == pytest.approx(-4.0)
    assert "scale" not in record.scalars
    assert "not positive" in record.metadata["absent"]["scale"]
    assert {"diversity", "mean_gradient_norm_squared_standard_error"} <= set(record.metadata["absent"])
    assert not any(tag.endswith("_scale") for tag in scalar_tags([record]) | headline([record]))


def test_zero_gradients_are_left_out_of_the_cosines_and_counted() -> None:
    model = nn.Linear(2, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    x = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    record = model_record(model, [(x, torch.ones(4, 1, dtype=torch.float64))], loss="mse")
    assert record.scalars["mean_cosine"] == pytest.approx(1 / math.sqrt(2))
    assert record.scalars["num_undefined_pairs"] == 5
    assert record.scalars["num_samples"] == 4

    nothing, state = measured(model, [(torch.zeros_like(x), torch.ones(4, 1, dtype=torch.float64))], loss="mse")
    assert all(math.isfinite(value) for record in nothing for value in record.scalars.values())
    assert {"scale", "mean_cosine", "conflict_share", "diversity", "kernel_drift"} <= set(nothing[0].metadata["absent"])
    assert json.loads(json.dumps(state)) == state


def through_torch(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize(
    "through",
    [lambda s: pickle.loads(pickle.dumps(s)), lambda s: json.loads(json.dumps(s)), through_torch],
    ids=["pickle", "json", "torch"],
)
def test_state_survives_a_checkpoint(through: Callable[[Any], Any]) -> None:
    model, data = network(5, 3), CASE.microbatches((6,))
    _, state = measured(model, data)
    descend(model, data[0])
    restored = through(state)
    assert restored == state
    expected, expected_state = measured(model, data, state)
    found, found_state = measured(model, data, restored)
    assert [record.to_json() for record in found] == [record.to_json() for record in expected]
    assert found[0].scalars["kernel_drift"] > 0
    assert found_state == expected_state


def test_the_state_given_is_not_changed() -> None:
    model = CASE.model()
    _, state = measured(model, CASE.microbatches((4,)))
    kept = copy.deepcopy(state)
    _, after = measured(model, CASE.microbatches((4,), seed=1), state)
    assert state == kept != after


def test_a_block_that_turns_up_later_starts_its_own_average() -> None:
    model, batches = CASE.model(), CASE.microbatches()
    _, state = measured(model, batches, params_filter=lambda name, _: name.startswith("0"), block_structure="parameter")
    records, _ = measured(model, batches, state, block_structure="parameter")
    fresh, _ = measured(model, batches, block_structure="parameter")
    assert len(records) == 7
    for found, expected in zip(records[1:], fresh[1:], strict=True):
        assert found.scalars == pytest.approx(expected.scalars)


def test_it_costs_no_pass_of_its_own() -> None:
    model, batches = CASE.model(), CASE.microbatches()
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    with offline_problem(model, batches, loss=CASE.loss, params_filter=None) as problem:
        FisherSpectrum().measure(problem, FisherSpectrum().init(problem))
        before = len(passes)
        GradientNoise().measure(problem, GradientNoise().init(problem))
    assert len(passes) == before > 0


@pytest.mark.parametrize("decay", [-0.1, 1.0, math.nan, math.inf])
def test_a_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(ConfigurationError, match=r"`decay` must be at least 0 and below 1, got"):
        GradientNoise(decay=decay)


def test_one_sample_has_no_noise() -> None:
    with pytest.raises(ProbeError, match="1 of 1 samples"):
        measured(CASE.model(), CASE.microbatches((1,)))


def test_two_samples_are_enough() -> None:
    record = model_record(CASE.model(), CASE.microbatches((2,)))
    G = stacked(sample_gradients(CASE.model(), CASE.microbatches((2,)), CASE.kind))
    assert record.scalars["mean_gradient_norm_squared"] == pytest.approx(float(G[0] @ G[1]))
    assert set(record.metadata["absent"]) <= {"mean_gradient_norm_squared_standard_error", "scale"}


@pytest.mark.parametrize("spoil", ["nan", "ignored"])
def test_unusable_rows_change_nothing_and_are_counted(spoil: str) -> None:
    model, (x, y) = CASE.model(), CASE.microbatches((6,))[0]
    kept = torch.tensor([0, 1, 3, 4, 5])
    expected = model_record(model, [(x[kept], y[kept])])
    x, y = x.clone(), y.clone()
    if spoil == "nan":
        x[2, 0] = math.nan
    else:
        y[2] = -100
    found = model_record(model, [(x, y)])
    assert found.scalars == pytest.approx(expected.scalars, rel=1e-9)
    assert (found.metadata["num_samples_requested"], found.metadata["num_samples"]) == (6, 5)
    assert found.metadata["num_targets"] == 5


def test_a_probe_without_an_answer_leaves_the_averages_alone() -> None:
    x, y = CASE.microbatches((5,))[0]
    batch = [(x.clone(), y)]
    monitor = CurvatureMonitor(CASE.model(), probes=batch, loss="cross_entropy", measure=[GradientNoise()], when=1)
    before = monitor.step(0)[1]
    batch[0][0].fill_(math.nan)
    failed = monitor.step(1)[1]
    batch[0][0].copy_(x)
    after = monitor.step(2)[1]
    assert failed.failed
    assert "0 of 5 samples" in (failed.error or "")
    assert not failed.scalars
    assert after.scalars == pytest.approx(before.scalars)


def test_padding_and_loss_scale_leave_the_scale_alone() -> None:
    case = CASES["gpt2"]
    batch = case.microbatches((5,))[0]
    expected = model_record(case.model(), [batch], loss=None)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    padded = {name: F.pad(values, (0, 3), value=fill[name]) for name, values in batch.items()}
    assert model_record(case.model(), [padded], loss=None).scalars == pytest.approx(expected.scalars, rel=1e-6)

    x, y = CASE.microbatches((5,), seed=1)[0]
    ratios = [
        model_record(
            CASE.model(), [(x, y)], loss=lambda m, b, c=c: c * F.cross_entropy(m(b[0]), b[1], reduction="none")
        ).scalars
        for c in (1e-6, 1.0, 1e6)
    ]
    for name in ("scale", "mean_cosine", "conflict_share", "diversity"):
        assert ratios[0].get(name) == pytest.approx(ratios[1].get(name)) == pytest.approx(ratios[2].get(name)), name


def documented() -> set[str]:
    """Every tag of the docstring's table, its braces written out."""
    five = ("scale", "covariance_trace", "mean_gradient_norm_squared", "mean_cosine", "conflict_share")
    tags: set[str] = set()
    for row in re.findall(r"^ *\| `(curvature[^`]*)`", GradientNoise.__doc__ or "", flags=re.MULTILINE):
        stem, _, ends = row.rstrip("}").partition("{")
        tags |= {(stem + end).replace("<metric>", metric) for end in ends.split(",") for metric in five}
    return tags


def test_the_tags_written_are_those_documented() -> None:
    for seed in range(20):  # all of them at once need a probe with a signal
        records, _ = measured(CASE.model(), CASE.microbatches((6,), seed=seed), block_structure="parameter")
        if "scale" in records[0].scalars:
            break
    assert set(scalar_tags(records)) == documented()
    assert set(headline(records)) == {tag for tag in documented() if tag.startswith("curvature/")}
