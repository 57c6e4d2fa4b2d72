"""What changes no Fisher of any type: padding, microbatches, order, units; rows that are left out."""

import math

import pytest
import torch
from torch import Tensor, nn

from curvature_callbacks import FisherSpectra, FisherSpectrum, Problem, compute_fisher_spectrum
from curvature_callbacks.isolation.model import isolated
from curvature_callbacks.problem.memory import ProbeMemory
from tests.cases import CASES
from tests.measurements.fisher_type_cases import ALL, TYPES, WITHOUT_DRAWS, assert_same, padded, spelled, valid_positions
from tests.reference import relative_error, rows

RATIOS = ("rank", "condition_number", "effective_rank", "stable_rank", "participation_ratio", "top_share")


@pytest.mark.parametrize(("fisher", "unit"), TYPES)
def test_padding_changes_nothing(fisher: str, unit: str):
    """Nor the labels and targets drawn."""
    model, batch = spelled(4)
    microbatches = [{name: values[part] for name, values in batch.items()} for part in (slice(3), slice(3, 4))]
    options = {"fisher": fisher, "sample_unit": unit, "num_targets": 2, "seed": 3}
    wide = [padded(batch, extra) for extra, batch in enumerate(microbatches, start=1)]
    assert_same(compute_fisher_spectrum(model, wide, **options), compute_fisher_spectrum(model, microbatches, **options))


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (3, 1)])
@pytest.mark.parametrize(("fisher", "unit"), WITHOUT_DRAWS)
def test_microbatch_size_changes_nothing(fisher: str, unit: str, sizes: tuple[int, ...]):
    model, batch = spelled(4)
    pieces = [dict(zip(batch, part, strict=True)) for part in zip(*(v.split(sizes) for v in batch.values()), strict=True)]
    options = {"fisher": fisher, "sample_unit": unit, "num_targets": ALL}
    assert_same(compute_fisher_spectrum(model, pieces, **options), compute_fisher_spectrum(model, batch, **options))


@pytest.mark.parametrize(("fisher", "unit"), WITHOUT_DRAWS)
def test_row_order_changes_nothing(fisher: str, unit: str):
    model, batch = spelled(4)
    shuffled = {name: values[torch.tensor([2, 0, 3, 1])] for name, values in batch.items()}
    options = {"fisher": fisher, "sample_unit": unit, "num_targets": ALL}
    assert_same(compute_fisher_spectrum(model, shuffled, **options), compute_fisher_spectrum(model, batch, **options))


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


@pytest.mark.parametrize("scale", [1e-3, 1e3])
@pytest.mark.parametrize(("fisher", "unit"), TYPES)
def test_the_unit_of_the_outputs_changes_no_rank_and_no_ratio(fisher: str, unit: str, scale: float):
    """Outputs and targets times 1e-3 and 1e3: the squared error, and where it counts its gradient, by 1e-6 and 1e6."""
    x, y = CASES["mlp"].microbatches((5,))[0][0], torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double()

    def spectra(factor: float) -> FisherSpectra:
        model = nn.Sequential(CASES["mlp"].model(), Times(factor))
        return compute_fisher_spectrum(model, (x, factor * y), loss="mse", fisher=fisher, sample_unit=unit)

    unscaled, scaled = spectra(1.0), spectra(scale)
    eigenvalue_scale = scale**4 if fisher == "empirical" else scale**2  # of a gradient or of a Jacobian, squared
    for block in unscaled.blocks:
        metrics, others = unscaled.blocks[block].metrics(), scaled.blocks[block].metrics()
        assert {name: others[name] for name in RATIOS} == pytest.approx({name: metrics[name] for name in RATIOS}, rel=1e-6)
        assert others["lambda_max"] == pytest.approx(eigenvalue_scale * metrics["lambda_max"], rel=1e-9)


@pytest.mark.parametrize("row", [0, 2])
@pytest.mark.parametrize(("fisher", "unit"), TYPES)
def test_a_row_without_valid_target_is_left_out(fisher: str, unit: str, row: int):
    model, batch = spelled()
    rest = {name: values[torch.arange(3) != row] for name, values in batch.items()}
    batch["labels"][row] = -100
    options = {"fisher": fisher, "sample_unit": unit, "num_targets": ALL, "seed": 1}
    with pytest.warns(UserWarning, match="1 of 3 samples were left out"):
        found = compute_fisher_spectrum(model, batch, **options)
    assert found.metadata["num_targets"] == sum(len(valid_positions(r)) for r in rows([rest]))
    assert_same(found, compute_fisher_spectrum(model, rest, **options))  # the row uses no draw either


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("fisher", "unit"), TYPES)
def test_a_row_that_is_not_finite_is_left_out_with_all_its_gradients(fisher: str, unit: str, bad: float):
    model, (x, y) = CASES["mlp"].model(), CASES["mlp"].microbatches((5,))[0]
    keep = torch.tensor([0, 1, 2, 4])
    options = {"loss": "cross_entropy", "fisher": fisher, "sample_unit": unit}
    expected = compute_fisher_spectrum(model, (x[keep], y[keep]), **options)
    x[3, 1] = bad
    with pytest.warns(UserWarning, match="1 of 5 samples were left out"):
        found = compute_fisher_spectrum(model, (x, y), **options)
    assert (found.metadata["num_samples_requested"], found.metadata["num_samples"], found.metadata["num_targets"]) == (5, 4, 4)
    assert found.full.num_samples == expected.full.num_samples
    if fisher == "sampled":  # other draws
        assert found.full.eigenvalues.isfinite().all()
    else:
        assert_same(found, expected)


@pytest.mark.parametrize(("fisher", "unit"), TYPES)
def test_a_row_that_is_not_finite_at_a_later_probe(fisher: str, unit: str):
    """Then the layout is certified and its Gram is taken as it comes."""
    model, (x, y) = CASES["mlp"].model(), CASES["mlp"].microbatches((5,))[0]
    keep, bad, memory = torch.tensor([0, 1, 2, 4]), x.clone(), ProbeMemory()
    bad[3, 1] = math.nan
    measurement, found = FisherSpectrum(fisher=fisher, sample_unit=unit), []
    for inputs, labels in ((x, y), (x[keep], y[keep]), (bad, y)):
        with isolated(model, seed=0):
            problem = Problem(model, [(inputs, labels)], loss="cross_entropy", memory=memory)
            found.append(measurement.measure(problem, ())[0][0])
    _, expected, last = found
    assert (last.metadata["num_samples_requested"], last.metadata["num_samples"], last.metadata["num_targets"]) == (5, 4, 4)
    assert last.metadata["certificate_error"] is None
    assert last.scalars["full_num_samples"] == expected.scalars["full_num_samples"]
    if fisher == "sampled":
        assert all(math.isfinite(value) for value in last.scalars.values())
    else:
        values = [torch.tensor(record.arrays["full_eigenvalues"]) for record in (last, expected)]
        assert relative_error(*values) < 1e-6
