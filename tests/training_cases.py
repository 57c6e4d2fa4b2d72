"""Data, measurements and comparisons of training runs, whatever the framework: a run with probes beside one without."""

import hashlib
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from curvature_callbacks import FisherSpectrum, KFACCoverage, KFACQuality, Measurement, Problem, Record, TopEigenpairs

NAMES = {"probe", "empirical_fisher", "hessian", "kfac_coverage"}
ROWS = 24


def cheap() -> list[Measurement]:
    """The default measurements, small."""
    return [FisherSpectrum(), TopEigenpairs(k=2, max_matvecs=4), KFACCoverage()]


def wide() -> list[Measurement]:
    """More of the measurements, those of the likelihood among them."""
    eigenpairs = [TopEigenpairs(k=2, max_matvecs=8), TopEigenpairs(operator="ggn", k=2, max_matvecs=8)]
    return [FisherSpectrum(), *eigenpairs, KFACQuality(), KFACCoverage()]


def callback_options(**changes: Any) -> dict[str, Any]:
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
