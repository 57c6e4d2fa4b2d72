"""The measured loss of a LightningModule against its `training_step`."""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.nn import functional as F

from curvature_callbacks import KFACCoverage
from tests.lightning.callback_cases import CountingNet, new_callback
from tests.lightning.test_refusals import assert_refused
from tests.lightning_runs import LIGHTNING_WARNINGS, ManualNet, Net, lightning_trainer
from tests.training_cases import loader, probed_steps

pytestmark = LIGHTNING_WARNINGS


class Halved(CountingNet):
    """Divides its loss by two steps of accumulation."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) / 2


def whole(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def objectives(tmp_path: Path, net: Any, **changes: Any) -> list[Any]:
    """What the probes of a run say of its objective."""
    probing = new_callback(measure=[KFACCoverage()], **changes)
    lightning_trainer(tmp_path, [probing], max_steps=3).fit(net, loader())
    assert probed_steps(probing.history) == [0, 2]
    return [record.metadata["objective"] for record in probing.history if record.measurement == "probe"]


def test_a_named_loss_that_is_not_the_steps_is_refused(tmp_path: Path) -> None:
    match = "2 times that of the other. Leave `loss_fn` out to measure what `training_step` returns"
    assert_refused(tmp_path, Halved(), new_callback(loss_fn="cross_entropy"), match)


def test_a_function_that_is_not_is_a_choice(tmp_path: Path, caplog: Any) -> None:
    for told in objectives(tmp_path, Halved(), loss_fn=whole):
        assert told["by the training loop"] == pytest.approx({"value": 0.5, "gradient": 0.5}, rel=1e-5)
    assert caplog.text.count("that of `training_step`") == 1


def test_the_same_loss_by_name_is_proved_with_dropout_and_batch_norm(tmp_path: Path) -> None:
    for told in objectives(tmp_path, Net(), loss_fn="cross_entropy"):
        assert max(told["by the training loop"].values()) <= 1e-5
        assert max(told["by live parameters"].values()) <= 1e-5


def test_the_step_itself_and_steps_that_would_train_are_not_compared(tmp_path: Path) -> None:
    assert "by the training loop" not in objectives(tmp_path, Net())[0]
    probing = new_callback(measure=[KFACCoverage()], loss_fn=whole)
    lightning_trainer(tmp_path, [probing], max_steps=4).fit(ManualNet(), loader())
    assert "by the training loop" not in probing.history[0].metadata["objective"]
