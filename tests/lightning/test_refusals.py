"""What the Lightning callback refuses before step 1."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from curvature_callbacks import ConfigurationError, FisherSpectrum, TopEigenpairs
from curvature_callbacks.lightning.callback import CurvatureCallback
from tests.lightning.callback_cases import CountingNet, new_callback
from tests.lightning_runs import LIGHTNING_WARNINGS, lightning_trainer
from tests.training_cases import loader

pytestmark = LIGHTNING_WARNINGS


def assert_refused(tmp_path: Path, net: CountingNet, probing: CurvatureCallback, match: str, data: Any = None) -> None:
    """A ConfigurationError, before any optimizer step."""
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ConfigurationError, match=match):
        lightning_trainer(tmp_path, [probing], max_epochs=1).fit(net, loader() if data is None else data)
    assert net.num_updates == 0
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"every_n_steps": 0}, "`every_n_steps` must be an integer of at least 1, got 0"),
        ({"every_n_steps": 2.5}, "`every_n_steps`"),
        ({"every_n_steps": True}, "`every_n_steps`"),
        ({"num_microbatches": -1}, "`num_microbatches`"),
        ({"microbatch_size": "8"}, "`microbatch_size`"),
        ({"draw": "sometimes"}, "`draw` must be one of 'fresh', 'fixed', got 'sometimes'"),
        (
            {"block_structure": "layers"},
            "`block_structure` must be one of 'layer', 'component', 'module', 'parameter', 'none', a mapping",
        ),
        ({"block_structure": {"head": "fc"}}, "`block_structure` must map block 'head' to a list"),
        ({"measure": [FisherSpectrum]}, "`measure` must hold measurements.*pass an instance"),
        ({"measure": [TopEigenpairs(), TopEigenpairs(k=2)]}, "`measure` must hold measurements of different names"),
        ({"loss_fn": "l2"}, "`loss_fn` must be a function .* or one of 'cross_entropy', 'mse', 'bce', got 'l2'"),
    ],
)
def test_a_bad_argument_is_refused_at_construction(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match) as caught:
        new_callback(**changes)
    assert isinstance(caught.value, ValueError)


@pytest.mark.filterwarnings("ignore:.*dataloader_iter")  # so we are
def test_a_training_step_that_fetches_its_own_batches(tmp_path: Path) -> None:
    class Fetching(CountingNet):
        def training_step(self, dataloader_iter: Any) -> torch.Tensor:  # type: ignore[override]
            batch, *_ = next(dataloader_iter)
            return F.cross_entropy(self(batch[0]), batch[1])

    assert_refused(tmp_path, Fetching(), new_callback(), r"no `training_step\(batch, ...\)`.*`loss_fn")


def test_training_step_that_returns_none(tmp_path: Path) -> None:
    class Skipping(CountingNet):
        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            return None

    assert_refused(tmp_path, Skipping(), new_callback(), "returned NoneType without a loss.*`loss_fn=.*curvature_loss")


def test_manual_optimization_without_a_loss(tmp_path: Path) -> None:
    class Manual(CountingNet):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    assert_refused(tmp_path, Manual(), new_callback(), "optimizes manually.*`loss_fn=lambda.*curvature_loss")


def test_no_trainable_parameter(tmp_path: Path) -> None:
    assert_refused(tmp_path, CountingNet().requires_grad_(False), new_callback(), "no trainable parameter")


def test_params_filter_that_leaves_nothing(tmp_path: Path) -> None:
    assert_refused(tmp_path, CountingNet(), new_callback(params_filter=lambda name, parameter: False), "`params_filter`")


@pytest.mark.parametrize(
    ("loss_fn", "match"),
    [
        (lambda module, batch: 1.0, "returned float instead of a tensor"),
        (lambda module, batch: module(batch[0]), r"returned shape \(3, 3\).*return a scalar mean or \(3,\) losses"),
        (lambda module, batch: module(batch["x"]), "the loss of a first probe could not be computed.*TypeError"),
    ],
    ids=["float", "matrix", "raises"],
)
def test_a_bad_loss_function(loss_fn: Any, match: str, tmp_path: Path) -> None:
    assert_refused(tmp_path, CountingNet(), new_callback(loss_fn=loss_fn), match)


def test_a_training_step_whose_loss_has_no_gradient(tmp_path: Path) -> None:
    class Detached(CountingNet):
        def curvature_loss(self, batch: Any) -> torch.Tensor:
            return F.cross_entropy(self(batch[0]), batch[1]).detach()

    assert_refused(tmp_path, Detached(), new_callback(loss_fn=None), "depends on no trainable parameter")
