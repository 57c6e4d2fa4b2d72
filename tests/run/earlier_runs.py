"""Short runs whose files an earlier release wrote, in `tests/data/earlier_runs`; `test_earlier_runs.py` goes on from them.

To write the files of a release, with its package first on the path: `python tests/run/earlier_runs.py FOLDER`.
"""

import json
import os.path
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from curvature_callbacks import (
    AtSteps,
    CurvatureMonitor,
    EdgeRatio,
    FisherSpectrum,
    GradientNoise,
    JSONLinesSink,
    KFACCoverage,
    KFACQuality,
    LogSpaced,
    LossSpike,
    Measurement,
    SpectralDensity,
    TopEigenpairs,
)
from curvature_callbacks.lightning import CurvatureCallback as LightningCallback
from curvature_callbacks.transformers import CurvatureCallback as TransformersCallback

SAVED_AT = 6
NUM_STEPS = 10
CHECKPOINT = f"checkpoint-{SAVED_AT}"


def measurements() -> list[Measurement]:
    """All that carry something from probe to probe, among others."""
    return [
        FisherSpectrum(damping=1e-2),
        TopEigenpairs(k=1, which="LA", max_matvecs=20, tol=1e-3),
        TopEigenpairs(operator="ggn", k=1, max_matvecs=20, tol=1e-3),
        EdgeRatio(),
        GradientNoise(),
        KFACQuality(),
        KFACCoverage(),
    ]


def callback_arguments(**changes: Any) -> dict[str, Any]:
    usual = {
        "every_n_steps": 3,
        "measure": measurements(),
        "num_microbatches": 2,
        "microbatch_size": 3,
        "seed": 3,
        "spike": LossSpike(),
    }
    return usual | changes


KEYED: dict[str, dict[str, Any]] = {  # arguments whose keys in checkpoints are held
    "nothing": {},
    "the runs": callback_arguments(),
    "every default": {
        "measure": [
            FisherSpectrum(),
            TopEigenpairs(),
            EdgeRatio(),
            SpectralDensity(),
            GradientNoise(),
            KFACQuality(),
            KFACCoverage(),
        ]
    },
    "operators": {
        "measure": [
            TopEigenpairs(operator="kfac", sharing="reduce", fisher="sampled", num_draws=2, per_block=True),
            TopEigenpairs(operator="empirical_fisher", sample_unit="token", k=2, reorth_mode="full", max_seconds=1.5),
            SpectralDensity(operator="preconditioned_hessian", num_probes=2, num_steps=7, deflate=0),
        ]
    },
    "Fisher": {
        "measure": [
            FisherSpectrum(
                fisher="sampled", num_draws=2, center_gradients=True, max_params_per_block=7, max_sample_grad_norm=1.0
            ),
            FisherSpectrum(fisher="exact", num_targets=3, eigensolve_device="cpu"),
        ]
    },
    "functions": {"loss_fn": os.path.join, "params_filter": os.path.join, "block_structure": os.path.join},
    "blocks": {"block_structure": {"a": ["x", "y"], "b": []}, "draw": "fixed", "max_sequence_length": 4},
    "schedule": {"schedule": AtSteps(steps=[0, 5]), "max_overhead": 0.1},
    "another schedule": {"schedule": LogSpaced(per_decade=2), "max_seconds": 3.0, "spike": LossSpike(window=3)},
    "data": {"probe_dataset": [1, 2]},
}


class Classifier(pl.LightningModule):
    """Small and smooth."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.02)


class ClassifierWithLoss(nn.Module):
    """The same, as the Hugging Face Trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x: Tensor, labels: Tensor) -> SequenceClassifierOutput:
        logits = self.layers(x)
        return SequenceClassifierOutput(loss=F.cross_entropy(logits, labels), logits=logits)


def points() -> tuple[Tensor, Tensor]:
    """24 points of three classes."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(24, 6, generator=generator), torch.randint(3, (24,), generator=generator)


def ordered_loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*points()), batch_size=4)


class SaveCheckpoint(pl.Callback):
    def __init__(self, path: Path) -> None:
        self._path = path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == SAVED_AT:
            trainer.save_checkpoint(self._path)


def lightning_training(folder: Path, callback: Any, *, checkpoint: Path | None = None, save_to: Path | None = None) -> None:
    torch.manual_seed(0)
    trainer = pl.Trainer(
        default_root_dir=folder,
        callbacks=[callback, *([SaveCheckpoint(save_to)] if save_to else [])],
        accelerator="cpu",
        devices=1,
        max_epochs=-1,
        max_steps=NUM_STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), ordered_loader(), ckpt_path=checkpoint)


def transformers_training(folder: Path, callback: Any, *, checkpoint: Path | None = None) -> None:
    torch.manual_seed(0)
    inputs, labels = points()
    trainer = Trainer(
        model=ClassifierWithLoss(),
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=NUM_STEPS,
            per_device_train_batch_size=4,
            learning_rate=0.02,
            logging_steps=1,
            save_strategy="steps",
            save_steps=SAVED_AT,
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
        ),
        train_dataset=[{"x": x, "labels": label} for x, label in zip(inputs, labels, strict=True)],  # type: ignore[arg-type]
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def plain_monitor(model: nn.Module, optimizer: torch.optim.Optimizer, **changes: Any) -> CurvatureMonitor:
    usual: dict[str, Any] = {"probes": ordered_loader(), "loss": "cross_entropy", "measure": measurements(), "when": 3}
    sizes: dict[str, Any] = {"num_microbatches": 2, "microbatch_size": 3, "seed": 3}
    return CurvatureMonitor(model, optimizer=optimizer, **(usual | sizes | changes))


def plain_parts() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    return model, torch.optim.Adam(model.parameters(), lr=0.02)


def plain_training(
    model: nn.Module, optimizer: torch.optim.Optimizer, monitor: CurvatureMonitor, *, first: int, last: int
) -> None:
    """Steps `first` to `last`, a probe before each where one is due."""
    inputs, labels = points()
    for step in range(first, last):
        monitor.step(step)
        start = 4 * step % len(inputs)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs[start : start + 4]), labels[start : start + 4]).backward()
        optimizer.step()


def keys() -> dict[str, list[str]]:
    """The keys of both callbacks in checkpoints."""
    kinds = (LightningCallback, TransformersCallback)
    return {name: [_key(kind(**arguments)) for kind in kinds] for name, arguments in KEYED.items()}


def _key(callback: Any) -> str:
    return str(callback.state_key if isinstance(callback, LightningCallback) else callback._state_key)


def _write_lightning(folder: Path, scratch: Path) -> None:
    lightning_training(
        scratch, LightningCallback(**callback_arguments(loss_fn="cross_entropy")), save_to=folder / "lightning.ckpt"
    )
    shutil.copy(scratch / "curvature.jsonl", folder / "lightning.jsonl")


def _write_transformers(folder: Path, scratch: Path) -> None:
    transformers_training(scratch, TransformersCallback(**callback_arguments()))
    shutil.copy(scratch / "curvature.jsonl", folder / "transformers.jsonl")
    shutil.copytree(scratch / CHECKPOINT, folder / CHECKPOINT)
    (folder / CHECKPOINT / "training_args.bin").unlink()  # which no resume reads, and which holds paths


def _write_plain(folder: Path, scratch: Path) -> None:
    model, optimizer = plain_parts()
    monitor = plain_monitor(model, optimizer, sinks=[JSONLinesSink(folder / "plain.jsonl")])
    plain_training(model, optimizer, monitor, first=0, last=SAVED_AT)
    parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "monitor": monitor.state_dict()}
    torch.save(parts, folder / "plain.pt")
    (folder / "plain.json").write_text(json.dumps(monitor.state_dict(tensors=False)))
    plain_training(model, optimizer, monitor, first=SAVED_AT, last=NUM_STEPS)


def _write_keys(folder: Path, scratch: Path) -> None:
    (folder / "keys.json").write_text(json.dumps(keys(), indent=1) + "\n")


_WRITERS: tuple[Callable[[Path, Path], None], ...] = (_write_lightning, _write_transformers, _write_plain, _write_keys)


def main(folder: Path) -> None:
    folder.mkdir(parents=True)
    for write in _WRITERS:
        with tempfile.TemporaryDirectory() as scratch:
            write(folder, Path(scratch))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
