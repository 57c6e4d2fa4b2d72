"""Factors against loops over samples, passes and positions."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from curvature_callbacks.gram.capture.rules import LINEAR, TRANSPOSED_LINEAR
from curvature_callbacks.gram.kronecker import factors as kronecker_module
from curvature_callbacks.gram.kronecker import positions as positions_module
from curvature_callbacks.gram.kronecker.factors import kronecker_factors
from curvature_callbacks.gram.kronecker.positions import MicrobatchUses
from curvature_callbacks.gram.uses.operation import Operation
from curvature_callbacks.gram.uses.uses import Lookup, OuterProduct
from curvature_callbacks.linalg.kronecker import Factor, KroneckerFactors
from curvature_callbacks.model.loss.sharing import Sharing
from curvature_callbacks.statistics.kronecker_quality import Approximation, approximation, kronecker_metrics
from tests.reference import dense_fisher

D = torch.float64
SHARINGS: tuple[Sharing, ...] = ("expand", "reduce")

# What a test gives: for each microbatch the inputs (N, T, d_in), for each pass the output gradients (N, T, d_out), and counts.
Data = list[tuple[Tensor, list[Tensor], Tensor]]


def random_data(
    sizes: Sequence[tuple[int, int]] = ((3, 4), (2, 5)), d_in: int = 4, d_out: int = 3, passes: int = 1, *, seed: int = 0
) -> Data:
    """Microbatches (N, T) of correlated inputs and gradients; the last position of the first row has no gradient."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=D)

    data = []
    for N, T in sizes:
        a = randn(N, T, d_in) + 0.5
        b = [randn(N, T, d_out) + a[..., :1] for _ in range(passes)]
        for one in b:
            one[0, T - 1 :] = 0.0 if T > 1 else one[0, T - 1 :]
        data.append((a, b, torch.ones(N)))
    return data


def uses_of(data: Data, *, transposed: bool = False) -> list[MicrobatchUses]:
    operation = TRANSPOSED_LINEAR if transposed else LINEAR
    return [
        MicrobatchUses(passes=[[OuterProduct(operation, len(a), a).completed(one)] for one in b], counts=counts)
        for a, b, counts in data
    ]


def with_ones(data: Data) -> Data:
    return [(torch.cat([a, torch.ones_like(a[..., :1])], -1), b, counts) for a, b, counts in data]


def gradients(data: Data) -> Tensor:
    """(S, P) of row-major (d_out, d_in) matrices, one position at a time."""
    found = []
    for a, b, counts in data:
        used = [i for i in range(len(a)) if counts[i] > 0]
        found += [sum(torch.outer(one[i, t], a[i, t]) for t in range(a.shape[1])).flatten() for one in b for i in used]
    return torch.stack(found)


def total(data: Data) -> float:
    return float(sum(counts.sum() for _, _, counts in data))


def fisher(data: Data) -> Tensor:
    g = gradients(data)
    return dense_fisher(g) * len(g) / total(data)


def loop_factors(data: Data, sharing: Sharing) -> tuple[Tensor, Tensor]:
    """A and G by their definition."""
    A = torch.zeros(data[0][0].shape[2], data[0][0].shape[2], dtype=D)
    G = torch.zeros(data[0][1][0].shape[2], data[0][1][0].shape[2], dtype=D)
    positions = 0.0
    for a, b, counts in data:
        for i in range(len(a)):
            c = float(counts[i])
            live = [t for t in range(a.shape[1]) if any(one[i, t].abs().max() > 0 for one in b)]
            if c == 0 or not live:
                continue
            if sharing == "reduce":
                mean = sum(a[i, t] for t in live) / len(live)
                A += c * torch.outer(mean, mean)
                positions += c
                for one in b:
                    summed = sum(one[i, t] for t in live)
                    G += torch.outer(summed, summed)
                continue
            positions += c * len(live)
            for t in live:
                A += c * torch.outer(a[i, t], a[i, t])
                for one in b:
                    G += torch.outer(one[i, t], one[i, t])
    return A / total(data), G / positions


def dense(factor: Factor) -> Tensor:
    assert factor.basis is not None
    basis = factor.basis.double()
    return basis @ torch.diag(factor.eigenvalues) @ basis.T


def found_of(data: Data, sharing: Sharing = "expand", *, bias: bool = False, transposed: bool = False) -> KroneckerFactors:
    found = kronecker_factors(uses_of(data, transposed=transposed), bias=bias, sharing=sharing)
    assert found is not None
    return found


def quality(found: KroneckerFactors, data: Data) -> Approximation:
    g = gradients(data)
    return approximation(found, g @ g.T, normaliser=total(data))


def assert_correct(found: KroneckerFactors, data: Data, sharing: Sharing) -> None:
    """Factors, corrected eigenvalues and quality against dense matrices."""
    A, G = loop_factors(data, sharing)
    F = fisher(data)
    assert torch.allclose(dense(found.A), A)
    assert torch.allclose(dense(found.G), G)
    assert found.A.basis is not None
    assert found.G.basis is not None
    assert found.corrected is not None
    U = torch.kron(found.G.basis, found.A.basis)
    diagonal = torch.stack([u @ F @ u for u in U.T])
    assert torch.allclose(found.corrected.flatten(), diagonal)
    K, E = torch.kron(G, A), U @ torch.diag(diagonal) @ U.T
    judged = quality(found, data)
    assert judged.kfac_cosine == pytest.approx(float((F * K).sum() / (F.norm() * K.norm())))
    assert judged.kfac_relative_error == pytest.approx(float((F - K).norm() / F.norm()))
    assert judged.ekfac_relative_error == pytest.approx(float((F - E).norm() / F.norm()), abs=1e-7)
    assert judged.ekfac_relative_error <= judged.kfac_relative_error + 1e-12
    assert 0 <= judged.kfac_cosine <= judged.ekfac_cosine <= 1 + 1e-12


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
def test_a_factor_of_few_rows_is_never_formed(d_in: int, d_out: int, sharing: Sharing, monkeypatch: pytest.MonkeyPatch):
    data = random_data(d_in=d_in, d_out=d_out)
    sizes: list[int] = []
    real = positions_module.factor_of_matrix
    monkeypatch.setattr(positions_module, "factor_of_matrix", lambda m, dtype: sizes.append(len(m)) or real(m, dtype=dtype))
    assert_correct(found_of(data, sharing), data, sharing)
    assert all(size < 30 for size in sizes)


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("sizes", [((5, 4), (4, 6)), ((9, 1),)])
@pytest.mark.parametrize("gradients_smaller", [False, True])
@pytest.mark.parametrize("budget", [1, 200, 400, 1 << 26])
def test_pieces_and_forms_change_nothing(
    budget: int, gradients_smaller: bool, sizes: Sequence[tuple[int, int]], sharing: Sharing, monkeypatch: pytest.MonkeyPatch
):
    for module in (positions_module, kronecker_module):
        monkeypatch.setattr(module, "CHUNK_BYTES", budget)
    monkeypatch.setattr(kronecker_module, "_gradients_are_smaller", lambda a, b: gradients_smaller)
    data = random_data(sizes, passes=2)
    assert_correct(found_of(data, sharing, bias=True), with_ones(data), sharing)


def test_the_cheaper_rotation_is_taken():
    few, many = torch.zeros(1, 8, 64), torch.zeros(1, 1024, 64)
    assert not kronecker_module._gradients_are_smaller(few, few)
    assert kronecker_module._gradients_are_smaller(many, many)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_inputs_count_once_whatever_the_number_of_passes(sharing: Sharing):
    """An exact Fisher: three passes over the same inputs, in one of which a position has no gradient."""
    data = random_data(passes=3)
    data[0][1][1][1, 2] = 0.0
    assert_correct(found_of(data, sharing, bias=True), with_ones(data), sharing)
    alone = [(a, [sum(b)], counts) for a, b, counts in data]
    assert torch.allclose(dense(found_of(data, sharing).A), dense(found_of(alone, sharing).A))


@pytest.mark.parametrize("sharing", SHARINGS)
def test_draws_of_labels_are_averaged(sharing: Sharing):
    """The same draw three times is one draw: F, A and G stay."""
    once = random_data()
    thrice = [(a, b * 3, 3 * counts) for a, b, counts in once]
    one, three = found_of(once, sharing), found_of(thrice, sharing)
    assert_correct(three, thrice, sharing)
    assert torch.allclose(dense(one.A), dense(three.A))
    assert torch.allclose(dense(one.G), dense(three.G))
    assert torch.allclose(fisher(once), fisher(thrice))


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
    assert torch.allclose(dense(one.A), dense(other.A))
    assert torch.allclose(dense(one.G), dense(other.G))
    assert torch.allclose(one.corrected, other.corrected)


def test_expand_and_reduce_agree_for_one_position():
    data = random_data(((5, 1), (3, 1)))
    data[0][1][0][2] = 0.0  # a row without gradient
    one, other = (found_of(data, sharing, bias=True) for sharing in SHARINGS)
    assert torch.allclose(dense(one.A), dense(other.A))
    assert torch.allclose(dense(one.G), dense(other.G))
    assert torch.allclose(one.corrected, other.corrected)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_one_row_with_one_position_is_exact(sharing: Sharing):
    data = random_data(((1, 1),), passes=3)
    found = found_of(data, sharing, bias=True)
    assert torch.allclose(torch.kron(dense(found.G), dense(found.A)), fisher(with_ones(data)))
    judged = quality(found, with_ones(data))
    assert judged.kfac_cosine == pytest.approx(1)
    assert judged.kfac_relative_error < 1e-6


@pytest.mark.parametrize("shared", ["inputs", "gradients"])
def test_reduce_is_exact_for_one_row_whose_positions_share_a_factor(shared: str):
    (a, (b,), counts) = random_data(((1, 4),))[0]
    b = b + 1.0  # every position has a gradient
    same: Data = [(a[:, :1].expand_as(a), [b], counts) if shared == "inputs" else (a, [b[:, :1].expand_as(b)], counts)]
    assert quality(found_of(same, "reduce"), same).kfac_relative_error < 1e-6
    assert quality(found_of(same, "expand"), same).kfac_relative_error > 1e-2
    assert quality(found_of([(a, [b], counts)], "reduce"), [(a, [b], counts)]).kfac_cosine < 1 - 1e-3


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
    assert quality(found_of(data, "expand"), data).kfac_relative_error < 1e-6
    assert quality(found_of(data, "reduce"), data).kfac_relative_error > 1e-2


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
    assert torch.allclose(torch.kron(dense(found.G), dense(found.A)), exact)
    assert quality(found, with_ones(data)).kfac_cosine == pytest.approx(1)


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
    assert torch.allclose(dense(found.A), dense(plain.A) * 5 / 10)
    assert torch.allclose(dense(found.G), dense(plain.G))
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


# Embeddings: the input is the unit vector of the index.

VOCABULARY = 6
PADDING = 2


def lookup_data(
    sizes: Sequence[tuple[int, int]], passes: int = 1, *, padding: bool = False
) -> tuple[list[MicrobatchUses], Data]:
    """The uses and the same data with dense unit vectors."""
    generator = torch.Generator().manual_seed(0)
    uses, data = [], []
    for N, T in sizes:
        indices = torch.randint(VOCABULARY - 1, (N, T), generator=generator)
        indices[0, 0] = PADDING if padding else 0
        b = [torch.randn(N, T, 3, generator=generator, dtype=D) for _ in range(passes)]
        counts = torch.arange(1.0, N + 1)
        lookup = Lookup(N, indices, PADDING if padding else None)
        uses.append(MicrobatchUses(passes=[[lookup.completed(one)] for one in b], counts=counts))
        seen = (indices != PADDING) | (not padding)
        data.append(
            (nn.functional.one_hot(indices, VOCABULARY).double(), [one * seen[..., None] for one in b], counts),
        )
    return uses, data


@pytest.mark.parametrize("budget", [1, 1 << 26])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("sizes", [((4, 5), (2, 3)), ((6, 1),)])
@pytest.mark.parametrize("sharing", SHARINGS)
def test_embeddings_are_linear_layers_of_unit_vectors(
    sharing: Sharing, sizes: Sequence[tuple[int, int]], padding: bool, budget: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(positions_module, "CHUNK_BYTES", budget)
    uses, data = lookup_data(sizes, passes=2, padding=padding)
    found = kronecker_factors(uses, bias=False, sharing=sharing)
    assert found is not None
    A, G = loop_factors(data, sharing)
    axes = found.A.axes
    assert axes is not None
    assert found.A.basis is None
    assert torch.allclose(found.A.eigenvalues, A.diagonal()[axes])
    assert set(axes.tolist()) == set(A.diagonal().nonzero()[:, 0].tolist())
    assert sharing == "reduce" or torch.equal(A, torch.diag(A.diagonal()))
    assert torch.allclose(dense(found.G), G)
    F, K = fisher(data), torch.kron(G, torch.diag(A.diagonal()))
    assert found.G.basis is not None
    U = torch.kron(found.G.basis, torch.eye(VOCABULARY, dtype=D)[:, axes])
    assert found.corrected is not None
    assert torch.allclose(found.corrected.flatten(), torch.stack([u @ F @ u for u in U.T]))
    judged = quality(found, data)
    assert judged.kfac_cosine == pytest.approx(float((F * K).sum() / (F.norm() * K.norm())))
    assert judged.kfac_relative_error == pytest.approx(float((F - K).norm() / F.norm()))
    assert judged.ekfac_relative_error <= judged.kfac_relative_error


def test_an_embedding_of_a_large_vocabulary_sees_its_rows_only():
    indices = torch.tensor([[10**12, 7, 7]])
    lookup = Lookup(1, indices, None).completed(torch.ones(1, 3, 2, dtype=D))
    found = kronecker_factors([MicrobatchUses(passes=[[lookup]], counts=torch.ones(1))], bias=False, sharing="expand")
    assert found is not None
    assert found.A.axes is not None
    assert found.A.axes.tolist() == [7, 10**12]
    assert found.A.eigenvalues.tolist() == [2.0, 1.0]
    assert found.corrected is not None
    assert found.corrected[0].tolist() == pytest.approx([8.0, 2.0])


def test_an_embedding_used_twice():
    uses, _ = lookup_data(((3, 6),))
    (use,) = uses[0].passes[0]
    assert isinstance(use, Lookup)
    assert use.gradient is not None
    halves = [Lookup(3, use.indices[:, part], None).completed(use.gradient[:, part]) for part in (slice(2), slice(2, 6))]
    whole = kronecker_factors(uses, bias=False, sharing="expand")
    twice = kronecker_factors([MicrobatchUses(passes=[halves], counts=uses[0].counts)], bias=False, sharing="expand")
    assert whole is not None
    assert twice is not None
    assert torch.equal(whole.A.eigenvalues, twice.A.eigenvalues)
    assert torch.allclose(whole.corrected, twice.corrected)


@pytest.mark.parametrize("operation", [LINEAR, TRANSPOSED_LINEAR])
def test_inputs_and_output_gradients_are_those_of_the_layer_however_its_weight_lies_in_memory(operation: Operation):
    (a, (b,), _) = random_data()[0]
    use = OuterProduct(operation, len(a), a).completed(b)
    for inputs, outputs in (use.layer_vectors(), use.transposed().layer_vectors()):
        assert torch.equal(inputs, a)
        assert torch.equal(outputs, b)
