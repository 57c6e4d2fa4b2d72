"""Both forms of the product, chunking and lookups on bare uses."""

import pytest
import torch
from torch import Tensor, nn

from curvature_callbacks import compute_fisher_spectrum
from curvature_callbacks.gram.capture.derived import Placed, View
from curvature_callbacks.gram.capture.rules import LINEAR, TRANSPOSED_LINEAR
from curvature_callbacks.gram.products.factored import factored_gram
from curvature_callbacks.gram.products.limits import PRODUCT_LIMITS, ProductLimits
from curvature_callbacks.gram.products.parameter_gram import parameter_gram
from curvature_callbacks.gram.products.scratch import Scratch
from curvature_callbacks.gram.uses.elementwise import SCALE, Elementwise
from curvature_callbacks.gram.uses.uses import Dense, Lookup, OuterProduct, Use


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram_of(
    passes: list[list[Use]],
    sizes: list[int],
    shape: tuple[int, ...],
    *,
    chosen: Tensor | None = None,
    chunk: int = PRODUCT_LIMITS.chunk_bytes,
) -> Tensor:
    """Of uses of the parameter itself."""
    view = View("weight", 0, ((torch.Size(shape).numel(), 1),), shape, True)
    placed = [[Placed(view, use) for use in uses] for uses in passes]
    found = parameter_gram(placed, sizes, Scratch(), chosen=chosen, limits=ProductLimits(chunk_bytes=chunk))
    assert found is not None
    return found


def product_use(N: int, T: int, d_in: int, d_out: int, *, transposed: bool = False, seed: int = 0) -> OuterProduct:
    use = OuterProduct(TRANSPOSED_LINEAR if transposed else LINEAR, N, random_tensor(N, T, d_in, seed=seed))
    use.complete(random_tensor(N, T, d_out, seed=seed + 1))
    return use


def product_gradients(N: int, T: int, d_in: int, d_out: int, *, transposed: bool = False, seed: int = 0) -> Tensor:
    a, b = random_tensor(N, T, d_in, seed=seed), random_tensor(N, T, d_out, seed=seed + 1)
    weights = [sum(torch.outer(b[i, t], a[i, t]) for t in range(T)) for i in range(N)]
    return torch.stack([(weight.T if transposed else weight).flatten() for weight in weights])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(3, 1, 20, 30), (3, 2, 20, 30), (4, 9, 3, 2)], ids=["T=1", "factored", "materialised"])
def test_one_product(shape: tuple[int, int, int, int], transposed: bool):
    N, _, d_in, d_out = shape
    size = (d_in, d_out) if transposed else (d_out, d_in)
    G = product_gradients(*shape, transposed=transposed)
    found = gram_of([[product_use(*shape, transposed=transposed)]], [N], size)
    assert torch.allclose(found, G @ G.T)


def test_both_forms_are_taken_and_agree():
    uses, fewer = [[product_use(3, 2, 20, 30)]], ProductLimits(position_pairs=35)
    factored = factored_gram(uses, [3], Scratch())
    assert factored is not None
    assert factored_gram(uses, [3], Scratch(), ProductLimits(position_pairs=36)) is not None
    assert factored_gram(uses, [3], Scratch(), fewer) is None
    placed = [[part_of(uses[0][0], 0, 30, 20)]]
    assert torch.equal(parameter_gram(placed, [3], Scratch()), factored)
    assert torch.allclose(parameter_gram(placed, [3], Scratch(), limits=fewer), factored)


def test_microbatches_of_different_length_have_cross_terms():
    parts = [(2, 1, 20, 30), (3, 2, 20, 30)]
    G = torch.cat([product_gradients(*shape, seed=10 * i) for i, shape in enumerate(parts)])
    uses = [[product_use(*shape, seed=10 * i)] for i, shape in enumerate(parts)]
    assert torch.allclose(gram_of(uses, [2, 3], (30, 20)), G @ G.T)


@pytest.mark.parametrize("chunk", [1, 200, 1 << 26])
def test_chunks_of_slices_add_up(chunk: int):
    G = product_gradients(4, 9, 3, 7)
    assert torch.allclose(gram_of([[product_use(4, 9, 3, 7)]], [4], (7, 3), chunk=chunk), G @ G.T)


@pytest.mark.parametrize("chunk", [1, 1 << 26])
def test_several_uses_are_added_before_the_product(chunk: int):
    G = product_gradients(3, 2, 4, 5) + product_gradients(3, 4, 4, 5, seed=20)
    uses = [[product_use(3, 2, 4, 5), product_use(3, 4, 4, 5, seed=20)]]
    assert torch.allclose(gram_of(uses, [3], (5, 4), chunk=chunk), G @ G.T)


def lookup_with_gradients(N: int, T: int, rows: int, d: int, padding: int | None, seed: int = 0) -> tuple[Lookup, Tensor]:
    indices = torch.randint(rows, (N, T), generator=torch.Generator().manual_seed(seed))
    outputs = random_tensor(N, T, d, seed=seed)
    use = Lookup(N, indices, padding)
    use.complete(outputs)
    G = torch.zeros(N, rows, d, dtype=torch.float64)
    for i in range(N):
        for t in range(T):
            if indices[i, t] != padding:
                G[i, indices[i, t]] += outputs[i, t]
    return use, G.flatten(1)


@pytest.mark.parametrize("chunk", [1, 1 << 26])
@pytest.mark.parametrize("padding", [None, 2])
def test_lookups_scatter(padding: int | None, chunk: int):
    use, G = lookup_with_gradients(3, 6, 5, 4, padding)
    assert (use.indices == 2).any()
    assert torch.allclose(gram_of([[use]], [3], (5, 4), chunk=chunk), G @ G.T)


@pytest.mark.parametrize("chunk", [1, 1 << 26])
def test_a_table_tied_to_a_head_adds_both(chunk: int):
    use, G = lookup_with_gradients(3, 6, 9, 4, None)
    G = G + product_gradients(3, 6, 4, 9, seed=5)
    uses = [[use, product_use(3, 6, 4, 9, seed=5)]]
    assert torch.allclose(gram_of(uses, [3], (9, 4), chunk=chunk), G @ G.T)
    swapped = [[product_use(3, 6, 4, 9, seed=5), use]]
    assert torch.allclose(gram_of(swapped, [3], (9, 4), chunk=chunk), G @ G.T)


def test_an_elementwise_use_is_reduced_to_the_parameter():
    factor, gradient = random_tensor(3, 4, 5), random_tensor(3, 4, 5, seed=1)
    use = Elementwise(SCALE, 3, torch.Size((5,)), lambda: factor).completed(gradient)
    assert torch.allclose(use.slices(1, 4), (factor * gradient).sum(1)[:, 1:4])


def test_a_microbatch_that_does_not_use_the_parameter_gives_zeros():
    G = torch.cat([torch.zeros(2, 12, dtype=torch.float64), product_gradients(3, 2, 3, 4)])
    found = gram_of([[], [product_use(3, 2, 3, 4)]], [2, 3], (4, 3))
    assert torch.allclose(found, G @ G.T)
    assert torch.equal(gram_of([[], []], [2, 3], (4, 3)), torch.zeros(5, 5, dtype=torch.float64))


def part_of(use: Use, start: int, rows: int, columns: int, *, transposed: bool = False) -> Placed:
    """The use of a matrix within a parameter, or of the transpose of one."""
    shape, layout = (rows, columns), ((rows, 1), (columns, rows)) if transposed else ((rows * columns, 1),)
    return Placed(View("weight", start, layout, shape, False), use)


def test_uses_of_parts_that_lie_apart_do_not_mix():
    """The experts of a fused weight: each sample's gradient is one vector with a piece for each part."""
    first, second = product_gradients(3, 2, 4, 5), product_gradients(3, 4, 4, 2, seed=20)
    G = torch.cat([first, second], 1)
    passes = [[part_of(product_use(3, 4, 4, 2, seed=20), 20, 2, 4), part_of(product_use(3, 2, 4, 5), 0, 5, 4)]]
    found = parameter_gram(passes, [3], Scratch())
    assert torch.allclose(found, G @ G.T)


def test_uses_of_parts_that_overlap_are_added_where_they_do():
    G = torch.zeros(3, 8, 4, dtype=torch.float64)
    G[:, :5] += product_gradients(3, 2, 4, 5).view(3, 5, 4)
    G[:, 3:] += product_gradients(3, 4, 4, 5, seed=20).view(3, 5, 4)
    passes = [[part_of(product_use(3, 2, 4, 5), 0, 5, 4), part_of(product_use(3, 4, 4, 5, seed=20), 12, 5, 4)]]
    found = parameter_gram(passes, [3], Scratch())
    assert torch.allclose(found, G.flatten(1) @ G.flatten(1).T)


def test_overlaps_that_cannot_be_written_out_have_no_gram():
    passes = [[part_of(product_use(3, 2, 4, 5), 0, 5, 4), part_of(product_use(3, 4, 4, 5, seed=20), 12, 5, 4)]]
    assert parameter_gram(passes, [3], Scratch(), limits=ProductLimits(overlap_bytes=3 * 32 * 8 - 1)) is None
    assert parameter_gram(passes, [3], Scratch(), limits=ProductLimits(overlap_bytes=3 * 32 * 8)) is not None
    mixed = [
        part_of(product_use(3, 2, 4, 5), 0, 5, 4, transposed=True),
        part_of(product_use(3, 4, 4, 5, seed=20), 12, 5, 4),
    ]
    assert parameter_gram([mixed], [3], Scratch()) is None


@pytest.mark.parametrize("chunk", [1, 1 << 26])
@pytest.mark.parametrize("form", ["product", "factored", "lookup", "tied", "dense"])
def test_chosen_slices_are_those_of_the_gradient_scaled_up(form: str, chunk: int):
    shape = {"product": (4, 9, 3, 9), "factored": (4, 1, 30, 9)}.get(form, (4, 6, 4, 9))
    d_in, d_out = shape[2:]
    G = product_gradients(*shape)
    uses: list[Use] = [product_use(*shape)]
    if form in ("lookup", "tied"):
        use, looked_up = lookup_with_gradients(4, 6, 9, 4, 2)
        uses, G = ([use], looked_up) if form == "lookup" else ([use, *uses], G + looked_up)
    if form == "dense":
        uses = [Dense(SCALE, G.view(4, 9, 4))]
    chosen = torch.tensor([0, 3, 4, 8])
    kept = G.view(4, d_out, d_in)[:, chosen].flatten(1)
    assert torch.allclose(gram_of([uses], [4], (d_out, d_in), chosen=chosen, chunk=chunk), kept @ kept.T * 9 / 4)


def test_one_buffer_serves_all_dtypes_and_sizes():
    scratch = Scratch()
    large = scratch.take(10, torch.zeros(1))
    assert scratch.take(4, torch.zeros(1)).data_ptr() == large.data_ptr()
    assert scratch.take(4, torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
    assert scratch.take(40, torch.zeros(1)).shape == (40,)


@pytest.mark.parametrize("passes", [1, 2])
def test_a_vector_used_twice_has_both_gradients(passes: int):
    """A norm or a bias that is called again."""
    draw = torch.Generator().manual_seed(0)
    pairs = [[torch.randn(3, 5, generator=draw, dtype=torch.float64) for _ in range(2)] for _ in range(passes)]
    G = torch.cat([first + second for first, second in pairs])
    uses: list[list[Use]] = [[Dense(SCALE, first), Dense(SCALE, second)] for first, second in pairs]
    assert torch.allclose(gram_of(uses, [3] * passes, (5,)), G @ G.T)


def test_products_are_remembered_for_the_very_same_rows_only():
    scratch, x, y = Scratch(), torch.randn(3, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    both = scratch.gram([x, y])
    assert torch.allclose(both, torch.cat([x, y]) @ torch.cat([x, y]).T)
    assert scratch.gram([x, y]) is both
    for rows in (x, x.T, x[:2], y):
        assert torch.allclose(scratch.gram([rows]), rows @ rows.T)
    scratch.gram([x])
    scratch.gram([x, y])
    assert scratch.gram([x]).shape == (3, 3)


class OnePlus(nn.Module):
    """Gemma's norm: the scale is `1 + weight`, cast before it is used."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, generator=torch.Generator().manual_seed(0)) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:]) * (1.0 + self.weight.to(x.dtype))


def test_a_scale_of_one_plus_weight_needs_no_fallback():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), OnePlus(5), nn.Linear(5, 3)).double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    spectra = compute_fisher_spectrum(model, (x, y), loss="cross_entropy")
    rows = [
        torch.autograd.grad(nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), model[1].weight)[0]
        for i in range(6)
    ]
    dense = sum(torch.outer(g, g) for g in rows) / 6
    assert spectra.metadata["fallback"] == {}
    assert torch.allclose(spectra.blocks["1"].eigenvalues, torch.linalg.eigvalsh(dense).flip(0)[: spectra.blocks["1"].rank])
