"""Rows draw alone what they have in the draw of their batch, whatever operation draws."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvature_callbacks.errors import RefusedError
from curvature_callbacks.isolation.row_draws import DrawsOfBatch

ROWS = [[0], [3], [2, 5, 7], [1, 0]]

DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "like": torch.randn_like,
    "dropout": lambda x: F.dropout(x, 0.3),
    "features": lambda x: F.dropout1d(x[:, :, None].expand(-1, -1, 3), 0.4),
    "alpha": lambda x: F.alpha_dropout(x, 0.3, training=True),
    "steps": lambda x: torch.randint(0, 1000, (len(x),)),
    "one a row": lambda x: torch.rand(len(x), 1),
    "in place": lambda x: torch.empty(len(x), 1, 1).bernoulli_(0.5),
    "probabilities": lambda x: torch.bernoulli(x.sigmoid()),
    "choices": lambda x: torch.multinomial(x.softmax(1), 2),
    "gumbel": F.gumbel_softmax,
    "means": lambda x: torch.normal(x, 1.0),
    "flattened": lambda x: torch.randn(x.numel()).reshape(x.shape),
    "distributions": lambda x: torch.distributions.Normal(x, 1.0).rsample() + torch.distributions.Exponential(x.exp()).sample(),
    "two draws": lambda x: torch.randn_like(x) * torch.rand(len(x), 1),
    "of the batch": lambda x: x * torch.rand(()) + torch.randperm(x.shape[1]),
    "attention": lambda x: F.scaled_dot_product_attention(*([x[:, None, :, None].expand(-1, 2, -1, 4)] * 3), dropout_p=0.3),
    "nothing": torch.tanh,
}


def noted(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[DrawsOfBatch, Tensor]:
    draws = DrawsOfBatch(len(x))
    torch.manual_seed(5)
    with draws.noted():
        return draws, function(x)


def alone(draws: DrawsOfBatch, function: Callable[[Tensor], Tensor], x: Tensor, rows: Tensor) -> Tensor:
    torch.manual_seed(5)
    with draws.of_rows(rows):
        return function(x[rows])


@pytest.fixture
def x() -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", DRAWS)
def test_rows_draw_what_they_have_in_the_batch(name: str, x: Tensor) -> None:
    function = DRAWS[name]
    draws, of_batch = noted(function, x)
    torch.manual_seed(5)
    assert torch.equal(function(x), of_batch)  # to note changes nothing
    for rows in map(torch.tensor, ROWS):
        assert torch.equal(alone(draws, function, x, rows), of_batch[rows])


def attended(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*([x[:, None, :, None].repeat(1, 2, 1, 4)] * 3)) * torch.rand(len(x), 1, 1, 1)


def test_attention_that_drops_nothing_is_no_draw(x: Tensor) -> None:
    """Batch and rows may be computed by different kernels, of which PyTorch tags some as random."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        draws, of_batch = noted(attended, x)
    assert len(draws.draws) == 1
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.allclose(alone(draws, attended, x, torch.tensor([3])), of_batch[3:4], atol=1e-6)


def test_rows_may_lie_on_another_axis(x: Tensor) -> None:
    def sequence_first(x: Tensor) -> Tensor:
        return torch.randn(3, len(x), 2)

    draws, of_batch = noted(sequence_first, x)
    assert torch.equal(alone(draws, sequence_first, x, torch.tensor([6, 1])), of_batch[:, [6, 1]])


def test_dropout_can_be_differentiated(x: Tensor) -> None:
    def slopes(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(F.dropout(x, 0.5).square().sum(), x)
        return slope

    draws, of_batch = noted(slopes, x)
    assert torch.equal(alone(draws, slopes, x, torch.tensor([4])), of_batch[[4]])
    assert of_batch.count_nonzero() < x.numel()


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[torch.randperm(len(x))],
        lambda x: torch.randn(len(x) - 1 if len(x) > 1 else 1),
        lambda x: torch.randn(len(x), len(x)),
        lambda x: F.rrelu(x, training=True),
        lambda x: torch.rand(2) if len(x) == 8 else torch.randn(2),
        lambda x: torch.rand(2) if len(x) == 8 else torch.rand(2) + torch.rand(2),
    ],
    ids=["permutation", "not a multiple", "two axes", "two written", "another operation", "one more"],
)
def test_numbers_that_belong_to_no_row_are_refused(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    draws, _ = noted(function, x)
    with pytest.raises(RefusedError, match=r"draws random numbers for its batch \(`aten.*Draw as many for each row"):
        alone(draws, function, x, torch.tensor([3]))
