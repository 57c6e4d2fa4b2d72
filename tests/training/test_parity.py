"""Lightning, the Hugging Face Trainer and a plain loop: same model, data and seed, equal records."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler
from transformers import BertConfig, BertForSequenceClassification, Trainer

from curvature_callbacks import CurvatureMonitor, Record
from curvature_callbacks.lightning.callback import CurvatureCallback as LightningCallback
from curvature_callbacks.transformers.callback import CurvatureCallback as TransformersCallback
from tests.lightning_runs import LIGHTNING_WARNINGS, lightning_trainer
from tests.training_cases import Checksum, assert_probed, callback_options
from tests.transformers_runs import training_arguments

pytestmark = LIGHTNING_WARNINGS
NUM_STEPS, LR = 5, 0.05


class Titles(Dataset[Any]):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(1, 20, (20, 5), generator=generator)
        self.labels = torch.randint(3, (20,), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


def classifier() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(num_labels=3, max_position_embeddings=8, **sizes, **dropout))


def row_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The same loss for every loop, whatever holds the classifier."""
    inner = model.model if isinstance(model, pl.LightningModule) else model
    return F.cross_entropy(inner(input_ids=batch["input_ids"]).logits, batch["labels"], reduction="none")


def arguments(**changes: Any) -> dict[str, Any]:
    usual = callback_options(seed=3, loss_fn=row_losses)
    return usual | {"measure": [*usual["measure"], Checksum()]} | changes


def in_lightning(tmp_path: Path, **changes: Any) -> list[Record]:
    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = classifier()

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=LR)

    callback = LightningCallback(**arguments(**changes))
    loader = DataLoader(Titles(), batch_size=4)
    lightning_trainer(tmp_path, [callback], max_steps=NUM_STEPS).fit(Module(), loader)
    return callback.history


def in_transformers(tmp_path: Path, **changes: Any) -> list[Record]:
    class Ordered(Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[Any]:
            return SequentialSampler(Titles())

    model, callback = classifier(), TransformersCallback(**arguments(**changes))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    args = training_arguments(tmp_path, max_steps=NUM_STEPS, max_grad_norm=0.0)
    trainer = Ordered(model=model, args=args, train_dataset=Titles(), callbacks=[callback], optimizers=(optimizer, constant))
    trainer.train()
    return callback.history


def in_a_plain_loop(tmp_path: Path, **changes: Any) -> list[Record]:
    chosen = arguments(**changes)
    when, loss = chosen.pop("every_n_steps"), chosen.pop("loss_fn")
    model, loader = classifier(), DataLoader(Titles(), batch_size=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    monitor = CurvatureMonitor(model, probes=loader, when=when, loss=loss, **chosen)
    for step, batch in enumerate(loader):
        monitor.step(step)
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return monitor.history


LOOPS = {"lightning": in_lightning, "transformers": in_transformers, "plain loop": in_a_plain_loop}
TIMES = ("probe_seconds", "gradient_equivalents", "sink_seconds", "overhead")


def content(records: Sequence[Record]) -> list[tuple[Any, ...]]:
    """Records without clocks, what the loop told of its loss, and the prefix that Lightning puts before parameter names."""
    return [
        (
            record.step,
            record.measurement,
            record.block,
            {name: value for name, value in record.scalars.items() if name not in (*TIMES, "training_loss")},
            dict(record.arrays),
            record.num_matvecs,
            record.metadata.get("seed"),
            record.error,
        )
        for record in records
    ]


@pytest.mark.parametrize("draw", ["fresh", pytest.param("fixed", marks=pytest.mark.slow)])
def test_records_are_equal_in_every_loop(draw: str, tmp_path: Path) -> None:
    found = {name: loop(tmp_path / name, draw=draw) for name, loop in LOOPS.items()}
    for records in found.values():
        assert_probed(records, [0, 2, 4], {"probe", "empirical_fisher", "hessian", "kfac_coverage", "checksum"})
    for name in ("lightning", "transformers"):
        assert repr(content(found[name])) == repr(content(found["plain loop"])), name  # repr: NaN equals NaN, floats exact


def test_the_loss_is_found_without_being_told(tmp_path: Path) -> None:
    """The model's own `.loss`, `training_step` and a function by rows are one objective for one target a row."""
    told = in_a_plain_loop(tmp_path / "plain")
    for name in ("lightning", "transformers"):
        records = LOOPS[name](tmp_path / name, loss_fn=None)
        for mine, other in zip(records, told, strict=True):
            shared = [metric for metric in other.scalars if metric not in TIMES and "rank" not in metric]
            assert mine.measurement == other.measurement
            if mine.measurement in ("hessian", "empirical_fisher") and mine.block is None:
                largest = [metric for metric in shared if metric.endswith(("lambda_max", "trace"))]
                assert largest
                ours, theirs = ([record.scalars[metric] for metric in largest] for record in (mine, other))
                assert ours == pytest.approx(theirs, rel=1e-4)
