"""Weights whose memory is laid out by columns: nothing that is measured depends on it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_callbacks import compute_fisher_spectrum
from curvature_callbacks.compute.offline import offline_problem
from curvature_callbacks.model.loss.fisher_type import FisherType
from curvature_callbacks.model.loss.sharing import Sharing


class Layered(nn.Module):
    """A table, a layer and a head, the weights of which `stored` lays out in memory."""

    def __init__(self, stored: Callable[[Tensor], Tensor], *, tied: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(stored(torch.randn(shape, generator=generator, dtype=torch.float64)))

        self.table, self.layer = weight(9, 4), weight(4, 4)
        self.head = self.table if tied else weight(9, 4)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = torch.tanh(F.linear(F.embedding(ids, self.table), self.layer))
        return F.linear(hidden, self.head).sum(1)


def by_columns(weight: Tensor) -> Tensor:
    return weight.t().contiguous().t()


def both(*, tied: bool) -> tuple[Layered, Layered]:
    return Layered(torch.clone, tied=tied), Layered(by_columns, tied=tied)


def random_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(9, (5, 3), generator=generator), torch.randint(9, (5,), generator=generator)


@pytest.mark.parametrize("max_params_per_block", [None, 12])
@pytest.mark.parametrize("tied", [False, True])
def test_spectra_are_the_same(tied: bool, max_params_per_block: int | None):
    expected, found = (
        compute_fisher_spectrum(
            model,
            random_batch(),
            loss="cross_entropy",
            block_structure="parameter",
            max_params_per_block=max_params_per_block,
        )
        for model in both(tied=tied)
    )
    assert found.metadata["fallback"] == expected.metadata["fallback"] == {}
    assert found.blocks.keys() == expected.blocks.keys()
    for block, spectrum in found.blocks.items():
        assert torch.allclose(spectrum.eigenvalues, expected.blocks[block].eigenvalues, rtol=1e-10)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_kronecker_factors_are_the_same(sharing: Sharing):
    layers = []
    for model in both(tied=False):
        with offline_problem(model, random_batch(), loss="cross_entropy", params_filter=None) as problem:
            layers.append(problem.grams.kronecker(FisherType(), sharing=sharing))
    expected, found = layers
    assert found.keys() == expected.keys() == {"table", "layer", "head"}
    for name, layer in found.items():
        assert layer.transposed == expected[name].transposed == (name == "table")
        for own, other in zip(
            (layer.factors.A.eigenvalues, layer.factors.G.eigenvalues, layer.factors.corrected),
            (expected[name].factors.A.eigenvalues, expected[name].factors.G.eigenvalues, expected[name].factors.corrected),
            strict=True,
        ):
            assert torch.allclose(own, other, rtol=1e-8)
