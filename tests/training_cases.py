"""Small training runs for both frameworks and a plain loop, and what is compared between a run with and one without probes."""

import hashlib
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassPrecision, MulticlassRecall
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from curvature_callbacks import FisherSpectrum, KFACCoverage, KFACQuality, Measurement, Problem, Record, TopEigenpairs

# Both frameworks say things about tiny CPU runs that are true and beside the point.
LIGHTNING_WARNINGS = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # the data is 24 rows
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),  # lightning's own _pytree.py on a newer torch
    pytest.mark.filterwarnings("ignore:.*number of training batches"),  # fewer batches than log_every_n_steps
    pytest.mark.filterwarnings("ignore:.*ambiguous collection"),  # the case with two loaders
    pytest.mark.filterwarnings("ignore:.*ended before the epoch ended"),  # resuming within an epoch is what is tested
]

NAMES = {"probe", "empirical_fisher", "hessian", "kfac_coverage"}
ROWS = 24


def cheap() -> list[Measurement]:
    """The default measurements, small."""
    return [FisherSpectrum(), TopEigenpairs(k=2, max_matvecs=4), KFACCoverage()]


def wide() -> list[Measurement]:
    """More of the measurements, those of the likelihood among them."""
    eigenpairs = [TopEigenpairs(k=2, max_matvecs=8), TopEigenpairs(operator="ggn", k=2, max_matvecs=8)]
    return [FisherSpectrum(), *eigenpairs, KFACQuality(), KFACCoverage()]


def options(**changes: Any) -> dict[str, Any]:
    """Arguments of either callback for runs of a few steps."""
    return {"every_n_steps": 2, "measure": cheap(), "num_microbatches": 2, "microbatch_size": 3} | changes


@dataclass(frozen=True)
class Checksum:
    """A measurement that says which parameters it saw, and consumes every global generator on the way."""

    name: str = "checksum"

    def init(self, problem: Problem) -> None:
        return None

    def measure(self, problem: Problem, state: None) -> tuple[list[Record], None]:
        torch.rand(1), np.random.rand(), random.random()
        value = checksum(problem.model)
        return [Record(step=problem.step, measurement=self.name, scalars={"value": value})], None


@dataclass(frozen=True)
class Contents:
    """A measurement that says what is in the microbatches."""

    name: str = "contents"

    def init(self, problem: Problem) -> None:
        return None

    def measure(self, problem: Problem, state: None) -> tuple[list[Record], None]:
        batch = problem.microbatches[-1]
        found = {"keys": sorted(batch), "largest": max(int(batch["input_ids"].max()) for batch in problem.microbatches)}
        return [Record(step=problem.step, measurement=self.name, scalars={"num": 1.0}, metadata=found)], None


@dataclass(frozen=True)
class Raising:
    """A measurement that raises at some probes (counted from 0; None: at all)."""

    error: BaseException
    at: tuple[int, ...] | None = None
    name: str = "raising"

    def init(self, problem: Problem) -> int:
        return 0

    def measure(self, problem: Problem, state: int) -> tuple[list[Record], int]:
        torch.rand(1), np.random.rand(), random.random()
        problem.model.train()
        for buffer in problem.model.buffers():
            buffer.zero_()
        if self.at is None or problem.step in self.at:
            raise self.error
        return [Record(step=problem.step, measurement=self.name, scalars={"one": 1.0})], state + 1


def checksum(model: nn.Module) -> float:
    """Sum of all parameters, in their order: equal for equal parameters, different after a step."""
    with torch.no_grad():
        return torch.stack([parameter.double().sum() for parameter in model.parameters()]).sum().float().item()


def digest(model: nn.Module) -> str:
    """SHA-1 of every parameter."""
    content = b"".join(_bytes(parameter).numpy().tobytes() for parameter in model.parameters())
    return hashlib.sha1(content).hexdigest()


def reports(caplog: Any) -> list[str]:
    """What the package said through logging."""
    return [record.getMessage() for record in caplog.records if record.name == "curvature_callbacks"]


def num_hooks(model: nn.Module) -> int:
    """Hooks of every kind on the modules and parameters of `model`."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    on_modules = sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)
    return on_modules + sum(len(parameter._backward_hooks or {}) for parameter in model.parameters())


def probed_steps(records: Sequence[Record]) -> list[int]:
    """The steps at which a probe was tried."""
    return [record.step for record in records if record.measurement == "probe"]


def seed_everything(seed: int = 1) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@dataclass
class Run:
    """What a training run left behind. Fields compared: all but `records`."""

    state: dict[str, Any]
    optimizers: list[Any]
    logged: list[Any]
    generators: list[Any]
    records: list[Record] = field(default_factory=list)


def assert_same_training(plain: Run, probed: Run) -> None:
    """Bit-identical parameters, buffers, optimizer state, logged values and generators."""
    for part in ("state", "optimizers", "logged", "generators"):
        assert_equal(getattr(plain, part), getattr(probed, part), part)


def assert_probed(records: Sequence[Record], steps: Iterable[int], names: set[str] = NAMES) -> None:
    """Every measurement succeeded at exactly these steps."""
    assert not [record.error for record in records if record.failed]
    assert [record.step for record in records if record.measurement == "probe"] == list(steps)
    for name in names:
        assert {record.step for record in records if record.measurement == name} == set(steps), name


def assert_equal(left: Any, right: Any, where: str = "") -> None:
    """Bitwise equality of nested containers of tensors, arrays and plain values; NaN equals NaN."""
    assert type(left) is type(right), f"{where}: {type(left)} and {type(right)}"
    if isinstance(left, Tensor):
        assert left.dtype == right.dtype, where
        assert left.shape == right.shape, where
        assert torch.equal(_bytes(left), _bytes(right)), where
    elif isinstance(left, np.ndarray):
        assert left.tobytes() == right.tobytes(), where
    elif isinstance(left, Mapping):
        assert list(left) == list(right), f"{where}: {list(left)} and {list(right)}"
        for key in left:
            assert_equal(left[key], right[key], f"{where}[{key!r}]")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), f"{where}: {left} and {right}"
        for i, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_equal(one, other, f"{where}[{i}]")
    else:
        both_nan = isinstance(left, float) and math.isnan(left) and math.isnan(right)
        assert both_nan or left == right, f"{where}: {left!r} and {right!r}"


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8)


def global_generators() -> list[Any]:
    return [torch.get_rng_state(), np.random.get_state(), random.getstate()]


class Rows(Dataset[Any]):
    """Three classes of points. Rows are fixed unless a subclass disturbs them."""

    def __init__(self, num_rows: int = ROWS) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(num_rows, 6, generator=generator)
        self.y = torch.randint(3, (num_rows,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return self.x[index], self.y[index]


class AugmentedRows(Rows):
    """Noise from every global generator and from generators of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)
        self.numpy = np.random.default_rng(3)
        self.nested = {"python": random.Random(3), "legacy": np.random.RandomState(3)}

    def __getitem__(self, index: int) -> Any:
        own = torch.rand(1, generator=self.generator) + self.numpy.random() + self.nested["python"].random()
        noise = torch.rand(6) + np.random.rand() + random.random() + own + self.nested["legacy"].rand()
        return self.x[index] + 0.1 * noise.float(), self.y[index]


class Stream(IterableDataset[Any]):
    """The rows as a stream that cannot be indexed."""

    def __init__(self, rows: Dataset[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return (self.rows[i] for i in range(len(self.rows)))  # type: ignore[arg-type]


def loader(dataset: Dataset[Any] | None = None, **changes: Any) -> DataLoader[Any]:
    return DataLoader(Rows() if dataset is None else dataset, **({"batch_size": 4, "shuffle": True} | changes))


class Net(pl.LightningModule):
    """Everything a probe could disturb: BatchNorm, dropout, an activation that works in place, logging, metrics."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log("checksum", checksum(self))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.02)


class MeteredNet(Net):
    """With a torchmetric, a collection of them (which share state after their first update) and a dict as output."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(3)
        members = {"precision": MulticlassPrecision(3), "recall": MulticlassRecall(3)}
        self.collection = MetricCollection(members)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:  # type: ignore[override]
        x, y = batch
        logits = self(x)
        self.accuracy(logits, y)
        self.collection.update(logits, y)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        loss = F.cross_entropy(logits, y)
        self.log_dict({"train_loss": loss, "checksum": checksum(self)})
        return {"loss": loss}

    def on_train_epoch_end(self) -> None:
        self.log_dict(self.collection.compute())
        self.collection.reset()


class FrozenNet(Net):
    """A BatchNorm the user keeps in evaluation mode while everything around it trains."""

    def on_train_epoch_start(self) -> None:
        self.layers[1].eval()
        self.layers[1].requires_grad_(False)


class ManualNet(Net):
    """Two optimizers, each stepping once a batch, so that `global_step` counts two a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        x, y = batch
        self.log("checksum", checksum(self))
        for optimizer in self.optimizers():
            loss = F.cross_entropy(self(x), y)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        self.log("train_loss", loss)

    def configure_optimizers(self) -> Any:
        first = torch.optim.SGD(self.layers[0].parameters(), lr=0.1, momentum=0.9)
        return [first, torch.optim.Adam(self.layers[4].parameters(), lr=0.01)]


def pair_loss(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy of each row, for `loss_fn`."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


class ListLogger(Logger):
    """Keeps `(step, metrics)` in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "list"

    @property
    def version(self) -> str:
        return "0"

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.rows.append((step or 0, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        return None

    @property
    def training(self) -> list[tuple[int, dict[str, float]]]:
        """The rows that are not the callback's."""
        return [row for row in self.rows if not any(key.startswith("curvature") for key in row[1])]


def lightning_trainer(directory: Any, callbacks: Sequence[Any] = (), **changes: Any) -> pl.Trainer:
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    fixed = {"accelerator": "cpu", "devices": 1, "log_every_n_steps": 1, "max_epochs": -1, "max_steps": 7}
    return pl.Trainer(default_root_dir=directory, callbacks=list(callbacks), **(quiet | fixed | changes))


def lightning_run(
    directory: Any,
    callback: Any = None,
    *,
    net: Callable[[], pl.LightningModule] = Net,
    data: Callable[[], Any] = loader,
    **changes: Any,
) -> Run:
    """Train from a fixed seed; with `callback`, its records are in the run."""
    seed_everything()
    module, logger, train = net(), ListLogger(), data()
    trainer = lightning_trainer(directory, [callback] if callback else [], logger=logger, **changes)
    trainer.fit(module, train)
    return Run(
        state=dict(module.state_dict()) | {"training": [child.training for child in module.modules()]},
        optimizers=[optimizer.state_dict() for optimizer in trainer.optimizers],
        logged=logger.training,
        generators=global_generators(),
        records=list(callback.history) if callback else [],
    )


VOCABULARY = 17


class Sentences(Dataset[Any]):
    """Token rows with padding ignored in the labels."""

    def __init__(self, num_rows: int = ROWS, *, labels: bool = True) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(1, VOCABULARY, (num_rows, 6), generator=generator)
        self.labels = self.tokens.clone()
        self.labels[::3, 4:] = -100
        self.with_labels = labels

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = {"input_ids": self.tokens[index]}
        return row | {"labels": self.labels[index]} if self.with_labels else row


class MaskingCollator:
    """Replaces tokens at random from generators of its own, as `DataCollatorForLanguageModeling(seed=...)` does."""

    def __init__(self) -> None:
        self.generator: torch.Generator | None = None
        self.numpy = np.random.default_rng(5)

    def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(5)
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        shape = batch["input_ids"].shape
        masked = torch.rand(shape, generator=self.generator) < 0.2
        masked |= torch.from_numpy(self.numpy.random(shape) < 0.2)
        return batch | {"input_ids": batch["input_ids"].masked_fill(masked, 0)}


def language_model(**changes: Any) -> GPT2LMHeadModel:
    sizes = {"vocab_size": VOCABULARY, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**(sizes | {"bos_token_id": 0, "eos_token_id": 0} | changes)))


def training_arguments(directory: Any, **changes: Any) -> TrainingArguments:
    fixed = {"max_steps": 5, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "seed": 7}
    quiet = {"use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "report_to": "none"}
    return TrainingArguments(output_dir=str(directory), **(fixed | quiet | changes))


class Log(TrainerCallback):
    """A small reporter: what `on_log` brings, and a digest of the parameters after every step."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.digests: dict[int, str] = {}
        self.checksums: dict[int, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_step_end(args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.digests[state.global_step] = digest(kwargs["model"])
        self.checksums[state.global_step] = checksum(kwargs["model"])

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rows.append((state.global_step, dict(kwargs["logs"])))


_CLOCK = ("runtime", "per_second")


def training_rows(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`log_history` without the callback's rows and without wall-clock values."""
    rows = [row for row in history if not any(key.startswith("curvature") for key in row)]
    return [{key: value for key, value in row.items() if not key.endswith(_CLOCK)} for row in rows]


def transformers_run(
    directory: Any,
    callback: Any = None,
    *,
    model: Callable[[], nn.Module] = language_model,
    data: Callable[[], Any] = Sentences,
    collator: Callable[[], Any] | None = None,
    resume: str | None = None,
    **changes: Any,
) -> Run:
    """Train from a fixed seed, or on from the checkpoint `resume`; with `callback`, its records are in the run."""
    seed_everything()
    trainer = Trainer(
        model=model(),
        args=training_arguments(directory, **changes),
        train_dataset=data(),
        data_collator=collator() if collator else None,
        callbacks=[callback] if callback else [],
    )
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.optimizer is not None
    return Run(
        state=dict(trainer.model.state_dict()) | {"training": [child.training for child in trainer.model.modules()]},
        optimizers=[trainer.optimizer.state_dict()],
        logged=training_rows(trainer.state.log_history),
        generators=global_generators(),
        records=list(callback.history) if callback else [],
    )
