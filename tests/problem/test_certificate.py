"""What is measured is what trains: a mismatch is refused before a number, what cannot be compared is said."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvature_callbacks import ConfigurationError, FisherSpectrum, TopEigenpairs, compute_spectrum
from tests.problem.certificate_cases import (
    Function,
    Net,
    by_autograd,
    contrastive,
    first_rows,
    found,
    halved,
    microbatches,
    monitor,
    noisy,
    of_other_labels,
    of_the_head,
    plain,
    with_penalty,
)


@pytest.mark.parametrize(
    ("measured", "trained", "how"),
    [
        ("cross_entropy", halved, "the gradient of the first is 2 times that of the other"),
        ("cross_entropy", with_penalty, "their gradients differ by"),
        ("cross_entropy", of_other_labels, "their gradients differ by"),
        (of_the_head, plain, "`first.weight` has a gradient in the latter only"),
    ],
)
def test_another_loss_than_the_loops_is_refused_before_a_number(measured: Any, trained: Function, how: str) -> None:
    watching, batch = monitor(measured, trained), first_rows()
    ours = plain if measured == "cross_entropy" else measured
    (one, _), (other, _) = by_autograd(ours, Net(), batch), by_autograd(trained, Net(), batch)
    with pytest.raises(ConfigurationError, match=how) as refused:
        watching.step(0)
    text = str(refused.value)
    assert f"it is {one:.6g}, that of `training_step` {other:.6g}" in text
    assert text.endswith("Leave it out.")
    assert not watching.history


@pytest.mark.parametrize("trained", [with_penalty, of_other_labels])
def test_how_far_apart_they_are_is_what_autograd_says(trained: Function, caplog: Any) -> None:
    """A function of the user's is a choice: said once, with the numbers, and kept in every record."""
    watching, batch = monitor(plain, trained, is_by_choice=True), first_rows()
    (value, gradient), (other, others) = by_autograd(plain, Net(), batch), by_autograd(trained, Net(), batch)
    size = max(abs(value), abs(other))
    with caplog.at_level(logging.WARNING):
        told = found(watching)["by the training loop"]
        again = watching.step(1)[0].metadata["objective"]["by the training loop"]
    assert told == again
    assert told["value"] == pytest.approx(abs(value - other) / size, rel=1e-4)
    norm = max(gradient.norm(), others.norm())
    assert told["gradient"] == pytest.approx(float((gradient - others).norm() / norm), rel=1e-4)
    assert caplog.text.count("another loss than the one that trains") == 1


def in_autocast(model: nn.Module, batch: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return plain(model, batch)


@pytest.mark.parametrize(
    ("dtype", "trained", "value", "gradient"),
    [
        (torch.float32, plain, 1e-6, 1e-6),  # with dropout, which is off
        (torch.float64, plain, 1e-12, 1e-12),
        (torch.float32, in_autocast, 2e-2, 1e-1),
        (torch.bfloat16, plain, 1e-6, 1e-6),  # both widened
    ],
)
def test_the_same_loss_is_proved(dtype: torch.dtype, trained: Function, value: float, gradient: float) -> None:
    told = found(monitor("cross_entropy", trained, model=Net().to(dtype), batches=microbatches(dtype)))
    assert told["rows"] == 4
    for route in ("by live parameters", "by the training loop"):
        exact = trained is not in_autocast and (dtype != torch.bfloat16 or route == "by the training loop")
        assert told[route]["value"] <= (value if exact else 2e-2)
        assert told[route]["gradient"] <= (gradient if exact else 1e-1)
    assert (told["by live parameters"]["value"] > 1e-4) == (dtype == torch.bfloat16)


class Halving(Net):
    """Computes with another tensor where its weight is no parameter."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.second.weight
        hidden = torch.tanh(self.first(x))
        return F.linear(hidden, weight / 2 if isinstance(weight, nn.Parameter) else weight, self.second.bias)


def test_a_model_that_computes_with_other_tensors_than_its_parameters_is_refused() -> None:
    value, _ = by_autograd(plain, Halving(), first_rows())
    other, _ = by_autograd(plain, Net(), first_rows())
    with pytest.raises(ConfigurationError, match="something else than the parameters registered in it") as refused:
        monitor("cross_entropy", model=Halving()).check()
    assert f"it is {other:.6g}, that of the model's own evaluation {value:.6g}" in str(refused.value)
    with pytest.raises(ConfigurationError, match="on the same 2 rows"):
        compute_spectrum(Halving(), microbatches(), loss="cross_entropy", k=1)


def raising(model: nn.Module, batch: Any) -> Tensor:
    raise KeyError("only in training")


def not_finite(model: nn.Module, batch: Any) -> Tensor:
    return plain(model, batch) / 0


def test_what_cannot_be_compared_stops_nothing_and_is_said() -> None:
    hooked = Net()
    seen: list[Any] = []
    hooked.first.weight.register_hook(seen.append)
    for watching, route, why in (
        (monitor("cross_entropy", raising), "by the training loop", "not compared, KeyError: 'only in training'"),
        (monitor("cross_entropy", not_finite), "by the training loop", "not finite"),
        (monitor("cross_entropy", noisy), "by the training loop", "it draws at random"),
        (monitor("cross_entropy", model=hooked), "by live parameters", "parameters have hooks that see their gradients"),
    ):
        told = found(watching)
        assert told[route] == why
        assert not any(record.failed for record in watching.history)
    assert not seen


class Teaching(Net):
    """Moves a teacher after its student at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(6, 3).requires_grad_(False)


SEEN = torch.zeros(1)  # outside of model and module


def teaching(model: Any, batch: Any) -> Tensor:
    model.teacher.weight.data.mul_(0.5).add_(model.first.weight.data[:3])
    SEEN.add_(1)
    return plain(model, batch)


def test_what_the_loops_loss_changes_in_place_is_put_back() -> None:
    model = Teaching()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    told = found(monitor("cross_entropy", teaching, model=model))
    assert told["by the training loop"]["gradient"] <= 1e-6
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert SEEN.item() == 0


def test_it_costs_at_most_a_gradient_of_the_probe_and_nothing_later() -> None:
    forwards: list[int] = []
    backwards: list[int] = []
    model = Net()
    model.second.register_forward_hook(lambda module, args, output: forwards.append(len(output)))
    model.second.register_full_backward_hook(lambda module, given, output: backwards.append(len(output[0])))
    watching = monitor("cross_entropy", plain, model=model)
    watching.check()
    first, rows = sum(forwards), sum(backwards)
    forwards.clear()
    watching.check()
    assert rows == 3 * 4  # ours, by live parameters, by the loop
    # What is reached, each of these three, writes of the loop's, four exchanges of four rows; two rows in
    # either mode.
    assert first - sum(forwards) == 8 + 4 * 4 + 4 * 4 + 2 * 2
    assert (first - sum(forwards)) / 3 + rows * 2 / 3 <= 32
    forwards.clear()
    compute_spectrum(model, microbatches(), loss="cross_entropy", k=1, which="LA", max_matvecs=1)
    assert forwards.count(2) == 2


def coupling(loss: Any, batches: Any = None) -> tuple[str | None, Any]:
    """What a run knows of the coupling of its rows, and its records."""
    watching = monitor(loss, batches=batches, measure=[FisherSpectrum(), TopEigenpairs(k=1, which="LA", max_matvecs=8)])
    watching.step(0)
    return watching.history[0].metadata["objective"]["coupled"], watching.history


def test_rows_that_change_places_show_a_contrastive_loss() -> None:
    reason, records = coupling(contrastive)
    model, (x, y) = Net().eval(), microbatches()[0]
    with torch.no_grad():
        a, b, c, d = ([0, 4], [2, 6], [1, 5], [3, 7])
        sums = [4 * contrastive(model, (x[rows], y[rows])).item() for rows in (a + b, c + d, a + d, c + b)]
    assert reason is not None
    assert reason.endswith(f"make {sums[2] + sums[3]:.6g} of {sums[0] + sums[1]:.6g}")
    errors = {record.measurement: record.error for record in records if record.block is None}
    assert errors["hessian"] is None
    assert "samples are coupled" in str(errors["empirical_fisher"])
    assert reason in str(errors["empirical_fisher"])


def ragged(model: nn.Module, batch: Any) -> Tensor:
    """A mean over labels that are not ignored, of rows that have some more and some less."""
    logits = model(batch["x"])
    return F.cross_entropy(logits[:, None].expand(-1, 4, -1).flatten(0, 1), batch["labels"].flatten())


def test_noise_and_means_over_ragged_rows_are_no_coupling() -> None:
    labels = torch.randint(3, (8, 4), generator=torch.Generator().manual_seed(2))
    labels[::2, 1:] = -100
    batches = [{"x": x, "labels": labels} for x, _ in microbatches()]
    for loss, given in ((plain, None), (noisy, None), (ragged, batches), ("cross_entropy", None)):
        reason, _ = coupling(loss, given)
        assert reason is None
