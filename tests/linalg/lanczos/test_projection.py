"""The matrix of a Krylov basis, entry by entry as its picture shows it, and what is known beside it."""

import math

import pytest
import torch
from torch import Tensor

from curvature_callbacks.linalg.lanczos.projection import Projection

CPU = torch.device("cpu")
D = torch.float64


def filled(size: int, *, capacity: int = 8) -> Projection:
    """After `size` steps without a restart: alphas 1, 2, ..., betas 0.1, 0.2, ..."""
    projection = Projection(capacity, CPU)
    projection.alphas[:size] = torch.arange(1.0, size + 1, dtype=D)
    projection.betas[:size] = torch.arange(1.0, size + 1, dtype=D) / 10
    projection.size = size
    return projection


def restarted(*, locked: int) -> Projection:
    """Three kept vectors, of which some are locked, and three steps after them."""
    projection = filled(6)
    core = torch.tensor([[9.0, 0.0, 0.5], [0.0, 8.0, 0.25], [0.5, 0.25, 7.0]], dtype=D)
    spokes = torch.tensor([0.3, 0.2, 0.1], dtype=D)
    spokes[:locked] = 0.0
    projection.keep(torch.eye(6, dtype=D)[:, :3], spokes, core=core, locked=locked)
    projection.alphas[3:6] = torch.tensor([4.0, 5.0, 6.0], dtype=D)
    projection.betas[3:6] = torch.tensor([0.4, 0.5, 0.6], dtype=D)
    projection.corrections[0, 3:6] = torch.tensor([0.01, 0.02, 0.03], dtype=D)
    projection.corrections[2, 4] = 0.07
    projection.size = 6
    return projection


def test_it_is_tridiagonal_until_a_restart():
    expected = [[1.0, 0.1, 0.0], [0.1, 2.0, 0.2], [0.0, 0.2, 3.0]]
    assert torch.allclose(filled(3).matrix(), torch.tensor(expected, dtype=D))


@pytest.mark.parametrize("locked", [0, 1])
def test_after_a_restart_it_has_the_parts_of_the_picture(locked: int):
    projection = restarted(locked=locked)
    c = (0.01, 0.02, 0.03) if locked else (0.0, 0.0, 0.0)
    first = 0.0 if locked else 0.3
    upper = [
        [0.0, 0.0, 0.5, first + c[0], c[1], c[2]],
        [0.0, 0.0, 0.25, 0.2, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.1, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, 0.4, 0.0],
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.5],
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    ]
    half = torch.tensor(upper, dtype=D)
    expected = half + half.T + torch.diag(torch.tensor([9.0, 8.0, 7.0, 4.0, 5.0, 6.0], dtype=D))
    assert torch.allclose(projection.matrix(), expected)


def test_what_is_in_the_matrix_is_not_removed_as_well():
    """Couplings to locked vectors; else they would be counted twice."""
    removed = restarted(locked=1).removed()
    assert removed[0].abs().max() == 0
    assert removed[2, 4] == 0.07
    assert restarted(locked=0).removed()[0].tolist() == [0.0, 0.0, 0.0, 0.01, 0.02, 0.03]


def test_a_matrix_that_was_read_is_not_changed_by_later_steps():
    projection = filled(2)
    H, C = projection.matrix(), projection.removed()
    projection.alphas[0] = projection.corrections[0, 1] = 5.0
    assert H[0, 0] == 1.0
    assert C[0, 1] == 0.0


def test_what_a_segment_cuts_off_is_carried_over_restarts():
    """Norms of residuals of the kept vectors, by their share in a vector."""
    projection = restarted(locked=3)
    projection.cut(torch.tensor([0.6, 0.0, 0.8], dtype=D))
    half = math.sqrt(0.5)
    coordinates = torch.zeros(6, 2, dtype=D)
    coordinates[0, 0] = coordinates[2, 0] = half
    coordinates[4, 1] = 1.0  # a later vector has lost nothing
    assert torch.allclose(projection.cut_off(coordinates), torch.tensor([half, 0.0], dtype=D))
    projection.keep(coordinates, torch.zeros(2, dtype=D), core=torch.eye(2, dtype=D), locked=2)
    assert torch.allclose(projection.cut_off(torch.eye(2, dtype=D)), torch.tensor([half, 0.0], dtype=D))


def test_discarded_steps_leave_no_corrections():
    projection = restarted(locked=0)
    projection.discard(4)
    assert projection.size == 4
    assert projection.corrections[:, 4:].abs().max() == 0
    assert projection.corrections[0, 3] == 0.01


@pytest.mark.parametrize(("start", "floor", "expected"), [(0, 0.05, None), (0, 0.25, 0), (2, 0.35, 2), (3, 0.35, None)])
def test_the_first_vanished_beta(start: int, floor: float, expected: int | None):
    assert filled(5).first_vanished(start, floor) == expected


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["alphas", "betas"])
def test_only_the_steps_done_have_to_be_finite(name: str, value: float):
    projection = filled(4)
    entries: Tensor = getattr(projection, name)
    entries[4] = value
    assert projection.is_finite()
    entries[3] = value
    assert not projection.is_finite()


def test_the_recurrence_has_what_passes_found_but_along_locked_vectors():
    projection = restarted(locked=1)
    recurrence = projection.recurrence(5)
    assert len(recurrence) == 5
    assert recurrence.betas.tolist() == pytest.approx([0.0, 0.0, 0.0, 0.4, 0.5])
    assert recurrence.losses.tolist() == pytest.approx([0.0, 0.0, 0.0, 0.0, 0.07 / 0.5])


def test_the_largest_asymmetry_outlives_a_restart():
    projection = filled(4)
    projection.asymmetries[1:3] = torch.tensor([-0.2, 0.1], dtype=D)
    assert projection.largest_asymmetry(4) == pytest.approx(0.2)
    assert projection.largest_asymmetry(1) == 0.0
    projection.asymmetry = projection.largest_asymmetry(4)
    projection.keep(torch.eye(4, dtype=D), torch.zeros(4, dtype=D), core=torch.eye(4, dtype=D), locked=0)
    assert projection.largest_asymmetry(4) == pytest.approx(0.2)
