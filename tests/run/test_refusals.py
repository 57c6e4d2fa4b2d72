"""What a monitor refuses, at construction or before step 1."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from curvature_callbacks import ConfigurationError, CurvatureMonitor, EdgeRatio, FisherSpectrum, KFACQuality, TopEigenpairs
from tests.run.monitor_cases import example_batch, new_monitor, row_losses
from tests.training_cases import Rows, Stream


def test_an_optimizer_of_none_of_the_filtered_parameters_stops_the_run() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    options: dict[str, Any] = {
        "measure": [EdgeRatio()],
        "optimizer": torch.optim.SGD(model[1].parameters(), lr=0.1),
    }
    new_monitor(model, **options).check()
    with pytest.raises(ConfigurationError, match="none of the parameters that are measured"):
        new_monitor(model, params_filter=lambda name, parameter: name.startswith("0."), **options).check()


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
        new_monitor(**changes)


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
        ({"probes": [example_batch()[0]]}, r"needs `\(inputs, targets\)` batches"),
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
            first(new_monitor(**changes))
