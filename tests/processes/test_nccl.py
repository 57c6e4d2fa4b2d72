"""Two GPUs: the same numbers as one process has of all rows."""

from typing import Any

import pytest
import torch

from curvature_callbacks import CurvatureMonitor, FisherSpectrum, KFACQuality, TopEigenpairs
from curvature_callbacks.processes.group import current_world
from curvature_callbacks.record import Record
from tests.processes import training
from tests.processes.ranks import Ranks
from tests.processes.test_training import union

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


def measured(wrap: str | None, batches: list[Any]) -> list[Record]:
    torch.manual_seed(0)
    model = training.Net().cuda()
    sharded = model if wrap is None else getattr(training, wrap)(model)
    bare = sharded.module if wrap == "ddp" else sharded
    moved = [tuple(tensor.cuda() for tensor in batch) for batch in batches]
    pairs: dict[str, Any] = {"k": 2, "tol": 1e-4, "max_matvecs": 120}
    measure = [FisherSpectrum(), KFACQuality(), TopEigenpairs(**pairs), TopEigenpairs(operator="ggn", which="LA", **pairs)]
    return CurvatureMonitor(bare, probes=moved, loss="cross_entropy", measure=measure).step(0)


def measured_here(wrap: str) -> list[Record]:
    return measured(wrap, [union(2)[current_world().rank]])


def measured_here_without_room(wrap: str) -> list[Record]:
    with training.nothing_fits():
        return measured_here(wrap)


@pytest.mark.parametrize(
    ("work", "wrap"), [(measured_here, "ddp"), (measured_here, "fsdp2"), (measured_here_without_room, "fsdp2")]
)
def test_two_gpus_measure_what_one_does_on_all_rows(work: Any, wrap: str) -> None:
    ranks = Ranks(2, "nccl")
    try:
        found = ranks(work, wrap)
    finally:
        ranks.close()
    expected = {(record.measurement, record.block): record for record in measured(None, union(2))}
    for records in found:
        assert not [record.error for record in records if record.failed]
        for record in [record for record in records if "eigenvalues" in record.arrays]:
            right = torch.tensor(expected[record.measurement, record.block].arrays["eigenvalues"])
            assert (torch.tensor(record.arrays["eigenvalues"]) - right).abs().max() <= 1e-3 * right.abs().max()
