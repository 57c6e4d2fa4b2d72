"""Factors against loops over samples, passes and positions."""

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from curvature_callbacks.gram.capture.rules import LINEAR, TRANSPOSED_LINEAR
from curvature_callbacks.gram.kronecker.factors import kronecker_factors
from curvature_callbacks.gram.kronecker.positions import MicrobatchUses
from curvature_callbacks.gram.uses.operation import Operation
from curvature_callbacks.gram.uses.uses import OuterProduct
from curvature_callbacks.model.loss.sharing import Sharing
from curvature_callbacks.statistics.kronecker_quality import kronecker_metrics
from tests.gram.kronecker.factor_cases import (
    SHARINGS,
    D,
    Data,
    as_matrix,
    assert_correct,
    dense_fisher_of,
    found_of,
    quality_of,
    random_data,
    uses_of,
    with_ones,
)
from tests.reference import dense_fisher


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes", [((3, 4), (2, 5)), ((6, 1),), ((1, 1),), ((1, 2), (1, 1))])
def test_factors_are_those_of_the_loops(sizes: Sequence[tuple[int, int]], transposed: bool, bias: bool, sharing: Sharing):
    data = random_data(sizes)
    found = found_of(data, sharing, bias=bias, transposed=transposed)
    assert_correct(found, with_ones(data) if bias else data, sharing)


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize(("d_in", "d_out"), [(30, 2), (2, 30), (40, 40)])
def test_a_factor_of_few_vectors(d_in: int, d_out: int, sharing: Sharing):
    data = random_data(d_in=d_in, d_out=d_out)
    assert_correct(found_of(data, sharing), data, sharing)


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize(("d_in", "d_out"), [(10**6, 2), (2, 10**6)])
def test_a_factor_of_few_vectors_is_never_formed(d_in: int, d_out: int, sharing: Sharing):
    """Formed it would take eight terabytes."""
    a, b = torch.zeros(2, 3, d_in, dtype=D), torch.zeros(2, 3, d_out, dtype=D)
    a[..., -2:], b[..., :2] = torch.randn(2, 3, 2, dtype=D), torch.randn(2, 3, 2, dtype=D)
    counts = torch.ones(2)
    found = found_of([(a, [b], counts)], sharing)
    expected = found_of([(a[..., -2:], [b[..., :2]], counts)], sharing)
    assert torch.allclose(found.A.eigenvalues, expected.A.eigenvalues)
    assert torch.allclose(found.G.eigenvalues, expected.G.eigenvalues)


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("sizes", [((5, 4), (4, 6)), ((9, 1),)])
@pytest.mark.parametrize("chunk_bytes", [1, 200, 400, 1 << 26])
def test_pieces_change_nothing(chunk_bytes: int, sizes: Sequence[tuple[int, int]], sharing: Sharing):
    data = random_data(sizes, passes=2)
    assert_correct(found_of(data, sharing, bias=True, chunk_bytes=chunk_bytes), with_ones(data), sharing)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_inputs_count_once_whatever_the_number_of_passes(sharing: Sharing):
    """An exact Fisher: three passes over the same inputs, in one of which a position has no gradient."""
    data = random_data(passes=3)
    data[0][1][1][1, 2] = 0.0
    assert_correct(found_of(data, sharing, bias=True), with_ones(data), sharing)
    alone = [(a, [sum(b)], counts) for a, b, counts in data]
    assert torch.allclose(as_matrix(found_of(data, sharing).A), as_matrix(found_of(alone, sharing).A))


@pytest.mark.parametrize("sharing", SHARINGS)
def test_draws_of_labels_are_averaged(sharing: Sharing):
    """The same draw three times is one draw: F, A and G stay."""
    once = random_data()
    thrice = [(a, b * 3, 3 * counts) for a, b, counts in once]
    one, three = found_of(once, sharing), found_of(thrice, sharing)
    assert_correct(three, thrice, sharing)
    assert torch.allclose(as_matrix(one.A), as_matrix(three.A))
    assert torch.allclose(as_matrix(one.G), as_matrix(three.G))
    assert torch.allclose(dense_fisher_of(once), dense_fisher_of(thrice))


@pytest.mark.parametrize("sharing", SHARINGS)
def test_rows_count_by_their_weight(sharing: Sharing):
    data = [(a, b, torch.arange(1.0, len(a) + 1)) for a, b, _ in random_data(passes=2)]
    assert_correct(found_of(data, sharing), data, sharing)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_a_row_without_count_is_left_out_even_when_not_finite(sharing: Sharing):
    data = random_data()
    kept = [(a[[0, 2]], [b[0][[0, 2]]], counts[[0, 2]]) if len(a) == 3 else (a, b, counts) for a, b, counts in data]
    data[0][0][1], data[0][1][0][1], data[0][2][1] = torch.nan, torch.inf, 0.0
    found = found_of(data, sharing)
    assert_correct(found, kept, sharing)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_padding_changes_nothing(sharing: Sharing):
    data = random_data()
    padded = []
    for a, b, counts in data:
        junk = torch.randn(len(a), 3, a.shape[2], dtype=D, generator=torch.Generator().manual_seed(9))
        padded.append((torch.cat([a, junk], 1), [torch.cat([one, one.new_zeros(len(a), 3, 3)], 1) for one in b], counts))
    one, other = found_of(data, sharing, bias=True), found_of(padded, sharing, bias=True)
    assert torch.allclose(as_matrix(one.A), as_matrix(other.A))
    assert torch.allclose(as_matrix(one.G), as_matrix(other.G))
    assert torch.allclose(one.corrected, other.corrected)


def test_expand_and_reduce_agree_for_one_position():
    data = random_data(((5, 1), (3, 1)))
    data[0][1][0][2] = 0.0  # a row without gradient
    one, other = (found_of(data, sharing, bias=True) for sharing in SHARINGS)
    assert torch.allclose(as_matrix(one.A), as_matrix(other.A))
    assert torch.allclose(as_matrix(one.G), as_matrix(other.G))
    assert torch.allclose(one.corrected, other.corrected)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_one_row_with_one_position_is_exact(sharing: Sharing):
    data = random_data(((1, 1),), passes=3)
    found = found_of(data, sharing, bias=True)
    assert torch.allclose(torch.kron(as_matrix(found.G), as_matrix(found.A)), dense_fisher_of(with_ones(data)))
    judged = quality_of(found, with_ones(data))
    assert judged.kfac_cosine == pytest.approx(1)
    assert judged.kfac_relative_error < 1e-6


@pytest.mark.parametrize("shared", ["inputs", "gradients"])
def test_reduce_is_exact_for_one_row_whose_positions_share_a_factor(shared: str):
    (a, (b,), counts) = random_data(((1, 4),))[0]
    b = b + 1.0  # every position has a gradient
    same: Data = [(a[:, :1].expand_as(a), [b], counts) if shared == "inputs" else (a, [b[:, :1].expand_as(b)], counts)]
    assert quality_of(found_of(same, "reduce"), same).kfac_relative_error < 1e-6
    assert quality_of(found_of(same, "expand"), same).kfac_relative_error > 1e-2
    assert quality_of(found_of([(a, [b], counts)], "reduce"), [(a, [b], counts)]).kfac_cosine < 1 - 1e-3


def test_expand_is_exact_for_independent_positions():
    """Every input meets every output gradient, each pair a position of a pass of its own: no cross terms."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(1, 4, 3, generator=generator, dtype=D)
    directions = torch.randn(2, 5, generator=generator, dtype=D)
    passes = []
    for t in range(4):
        for direction in directions:
            one = torch.zeros(1, 4, 5, dtype=D)
            one[0, t] = direction
            passes.append(one)
    data: Data = [(a, passes, torch.ones(1))]
    assert quality_of(found_of(data, "expand"), data).kfac_relative_error < 1e-6
    assert quality_of(found_of(data, "reduce"), data).kfac_relative_error > 1e-2


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("sharing", SHARINGS)
def test_deep_linear_networks_with_squared_loss_are_exact(sharing: Sharing, layer: int):
    """The exact Fisher of a Gaussian likelihood, one pass for each output: gradients from autograd, uses from its tensors."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 2)).double()
    x = torch.randn(7, 4, dtype=D)
    values = [x]
    for module in network:
        values.append(module(values[-1]))
    passes = [torch.autograd.grad(values[-1][:, d].sum(), values[layer + 1], retain_graph=True)[0] for d in range(2)]
    data: Data = [(values[layer].detach()[:, None], [one[:, None] for one in passes], torch.ones(7))]
    oracle = []
    for i in range(7):
        for d in range(2):
            g = torch.autograd.grad(network(x[i])[d], list(network[layer].parameters()))
            oracle.append(torch.cat([g[0], g[1][:, None]], 1).flatten())
    exact = dense_fisher(torch.stack(oracle)) * 2
    found = found_of(data, sharing, bias=True)
    assert torch.allclose(torch.kron(as_matrix(found.G), as_matrix(found.A)), exact)
    assert quality_of(found, with_ones(data)).kfac_cosine == pytest.approx(1)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_a_layer_used_twice_has_the_positions_of_both(sharing: Sharing):
    data = random_data(((3, 6),))
    a, (b,), counts = data[0]
    halves = [OuterProduct(LINEAR, 3, a[:, part]).completed(b[:, part]) for part in (slice(2), slice(2, 6))]
    found = kronecker_factors([MicrobatchUses(passes=[halves], counts=counts)], bias=False, sharing=sharing)
    assert found is not None
    assert_correct(found, data, sharing)


def test_a_microbatch_or_pass_that_does_not_reach_the_weight_adds_zero_gradients():
    data = random_data()
    reached = uses_of(data)
    missing = MicrobatchUses(passes=[[]], counts=torch.ones(5))
    partly = MicrobatchUses(passes=[*reached[0].passes, []], counts=reached[0].counts)
    found = kronecker_factors([partly, missing, reached[1]], bias=False, sharing="expand")
    plain = found_of(data)
    assert found is not None
    assert found.corrected is not None
    assert plain.corrected is not None
    assert torch.allclose(found.corrected, plain.corrected * 5 / 10)
    assert torch.allclose(as_matrix(found.A), as_matrix(plain.A) * 5 / 10)
    assert torch.allclose(as_matrix(found.G), as_matrix(plain.G))
    assert kronecker_factors([missing], bias=False, sharing="expand") is None


def test_gradients_that_all_vanish_give_zero_factors():
    data = [(a, [torch.zeros_like(b[0])], counts) for a, b, counts in random_data()]
    found = found_of(data)
    assert len(found.A.eigenvalues) == len(found.G.eigenvalues) == 0
    assert kronecker_metrics(found, rank_cut=1e-6) == {}


def test_a_row_that_is_not_finite_gives_nan_and_does_not_raise():
    data = random_data()
    data[0][1][0][1, 0, 0] = torch.nan
    found = found_of(data)
    assert found.G.eigenvalues.isnan().all()
    assert found.corrected is not None
    assert found.corrected.isnan().all()


def test_single_precision_is_summed_in_double():
    data = random_data(((4, 3000),), d_in=6, d_out=5)
    single = [(a.float(), [one.float() for one in b], counts) for a, b, counts in data]
    exact = found_of([(a.double(), [one.double() for one in b], counts) for a, b, counts in single])
    found = found_of(single)
    assert found.A.eigenvalues.dtype == torch.float64
    assert found.A.basis is not None
    assert found.A.basis.dtype == torch.float32
    assert torch.allclose(found.A.eigenvalues, exact.A.eigenvalues, rtol=2e-6)
    assert found.corrected is not None
    assert exact.corrected is not None
    assert torch.allclose(found.corrected.sum(), exact.corrected.sum(), rtol=2e-6)


@pytest.mark.parametrize("operation", [LINEAR, TRANSPOSED_LINEAR])
def test_inputs_and_output_gradients_are_those_of_the_layer_however_its_weight_lies_in_memory(operation: Operation):
    (a, (b,), _) = random_data()[0]
    use = OuterProduct(operation, len(a), a).completed(b)
    for inputs, outputs in (use.layer_vectors(), use.transposed().layer_vectors()):
        assert torch.equal(inputs, a)
        assert torch.equal(outputs, b)
