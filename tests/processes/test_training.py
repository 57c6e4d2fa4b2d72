"""On several processes: training the same bits with and without, records the same on all, numbers those of all rows."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy

from curvature_callbacks import CurvatureMonitor, EdgeRatio, FisherSpectrum, GradientNoise, TopEigenpairs
from curvature_callbacks.errors import ConfigurationError
from curvature_callbacks.isolation.model import isolated
from curvature_callbacks.processes.group import current_world
from curvature_callbacks.record import Record
from tests.processes import training
from tests.processes.cases import CASES, assert_same_bits, assert_same_records, in_a_framework
from tests.processes.ranks import Ranks

SMOKE = ("loop_ddp", "loop_fsdp2")


@pytest.mark.parametrize("name", [pytest.param("loop_ddp", marks=pytest.mark.slow), "loop_fsdp2"])
def test_training_of_two_processes_is_bit_identical(name: str, two_processes: Ranks, tmp_path: Path) -> None:
    assert_same_bits(CASES[name], two_processes, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in SMOKE])
def test_every_configuration_of_two_processes_is_bit_identical(name: str, two_processes: Ranks, tmp_path: Path) -> None:
    assert_same_bits(CASES[name], two_processes, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_configuration_of_four_processes_is_bit_identical(name: str, four_processes: Ranks, tmp_path: Path) -> None:
    assert_same_bits(CASES[name], four_processes, tmp_path)


def union(size: int) -> list[Any]:
    """Microbatches of different sizes, one for each process."""
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(3 + rank, 6, generator=generator), torch.randint(3, (3 + rank,), generator=generator))
        for rank in range(size)
    ]


def measured(wrap: str | None, batches: list[Any]) -> list[Record]:
    """The records of one probe of `batches`, the model sharded or not."""
    torch.manual_seed(0)
    model: nn.Module = training.Net()
    if wrap is not None:
        model = getattr(training, wrap)(model)
    measure = [FisherSpectrum(), TopEigenpairs(k=3, tol=1e-6, max_matvecs=200), TopEigenpairs(operator="ggn", k=2, tol=1e-6)]
    bare = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    return CurvatureMonitor(bare, probes=batches, loss="cross_entropy", measure=measure).step(0)


def measured_here(wrap: str, size: int) -> list[Record]:
    return measured(wrap, [union(size)[current_world().rank]])


@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_two_processes_measure_what_one_does_on_all_rows(wrap: str, two_processes: Ranks) -> None:
    assert_same_numbers(two_processes, wrap)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["ddp", "fsdp2"])
def test_four_processes_measure_what_one_does_on_all_rows(wrap: str, four_processes: Ranks) -> None:
    assert_same_numbers(four_processes, wrap)


def assert_same_numbers(ranks: Ranks, wrap: str) -> None:
    expected = {(record.measurement, record.block): record for record in measured(None, union(ranks.size))}
    for records in ranks(measured_here, wrap, ranks.size):
        assert {(record.measurement, record.block) for record in records} == expected.keys()
        for record in records:
            alone = expected[record.measurement, record.block]
            rtol = 1e-5 if record.measurement == "empirical_fisher" else 1e-6
            for name, values in alone.arrays.items():
                if name == "eigenvalues":
                    found, right = torch.tensor(record.arrays[name]), torch.tensor(values)
                    assert (found - right).abs().max() <= rtol * right.abs().max(), (record.measurement, record.block)


def measured_with_own_statistics(shared: bool) -> list[Record]:
    """Of a replica whose running means differ from those of the first process, or (alone) with these."""
    world = current_world()
    torch.manual_seed(0)
    model = training.Net()
    assert model.norm.running_mean is not None
    model.norm.running_mean += world.rank
    before = model.norm.running_mean.clone()
    batch = union(2)
    own = [batch[world.rank]] if shared else batch
    monitor = CurvatureMonitor(model, probes=own, loss="cross_entropy", measure=[FisherSpectrum()])
    records = monitor.step(0)
    assert torch.equal(model.norm.running_mean, before)
    return records


def test_running_statistics_are_those_of_the_first_process(two_processes: Ranks) -> None:
    expected = [record.scalars["trace"] for record in measured_with_own_statistics(False) if record.block is not None]
    for records in two_processes(measured_with_own_statistics, True):
        assert [record.scalars["trace"] for record in records if record.block is not None] == pytest.approx(expected, rel=1e-5)


def edge_after_validation(validates: bool) -> list[float]:
    """The edge's ratio, learning rate and number of parameters of a sharded model, whose root validation leaves whole."""
    torch.manual_seed(0)
    model = training.fsdp2(training.Net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if validates:
        with torch.no_grad():
            model.eval()(torch.randn(4, 6))
            model.train()
    batch = union(2)[current_world().rank]
    monitor = CurvatureMonitor(model, probes=[batch], loss="cross_entropy", measure=[EdgeRatio()], optimizer=optimizer)
    (record,) = [record for record in monitor.step(0) if record.measurement == "edge"]
    return [record.scalars["ratio"], record.scalars["learning_rate"], record.metadata["num_params"]]


def test_validation_before_a_probe_changes_nothing(two_processes: Ranks) -> None:
    plain, validated = two_processes(edge_after_validation, False)[0], two_processes(edge_after_validation, True)[0]
    assert validated == pytest.approx(plain, rel=1e-5)
    assert plain[2] == sum(parameter.numel() for parameter in training.Net().parameters())


class Shifted(nn.Module):
    """Adds a buffer to its inputs."""

    def __init__(self, buffer: str, value: float) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)
        shift = torch.full((6,), value)
        if buffer == "made in inference mode":
            with torch.inference_mode():
                shift = torch.full((6,), value)
        elif buffer == "expanded":
            shift = torch.tensor([value]).expand(6)
        elif buffer in ("int16", "float8_e4m3fn"):
            shift = shift.to(getattr(torch, buffer))
        self.register_buffer("shift", shift)
        self.register_buffer("last", torch.ones(2))  # one more to send after it
        if buffer == "sparse":
            self.register_buffer("graph", torch.eye(3).to_sparse())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.shift.to(x.dtype))


def measured_with_a_buffer(buffer: str, shared: bool) -> tuple[list[float], bool]:
    """Traces of a model whose buffer differs by process, or (alone) is that of the first; whether it is there as before."""
    world = current_world()
    torch.manual_seed(0)
    model = Shifted(buffer, 1.0 + world.rank)
    shift, batches = model.shift, union(2)
    own = [batches[world.rank]] if shared else batches
    records = CurvatureMonitor(model, probes=own, loss="cross_entropy", measure=[FisherSpectrum()]).step(0)
    unchanged = model.shift is shift and torch.equal(shift.float(), torch.full((6,), 1.0 + world.rank))
    return [record.scalars["trace"] for record in records if record.block is not None], unchanged


@pytest.mark.parametrize("buffer", ["made in inference mode", "expanded", "int16", "float8_e4m3fn", "sparse"])
def test_buffers_that_cannot_be_written_to_or_sent_as_they_are(buffer: str, two_processes: Ranks) -> None:
    expected, _ = measured_with_a_buffer(buffer, False)
    assert expected
    for traces, unchanged in two_processes(measured_with_a_buffer, buffer, True):
        assert traces == pytest.approx(expected, rel=1e-5)
        assert unchanged


class Sentences(nn.Module):
    """A head over tokens with ignored labels."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x).mT  # (rows, classes, positions)


def with_labels_on_one_process_only(shared: bool) -> list[list[float]]:
    """Eigenvalues where the second process's labels are all ignored; alone, of the rows of both."""
    torch.manual_seed(0)
    model, generator = Sentences(), torch.Generator().manual_seed(1)
    x, y = torch.randn(6, 3, 4, generator=generator), torch.randint(5, (6, 3), generator=generator)
    y[3:] = -100
    own = [(x[:3], y[:3]), (x[3:], y[3:])]
    measure = [
        TopEigenpairs(operator=operator, k=3, tol=1e-6, max_matvecs=60) for operator in ("hessian", "ggn", "empirical_fisher")
    ]
    probes = [own[current_world().rank]] if shared else own
    records = CurvatureMonitor(model, probes=probes, loss="cross_entropy", measure=measure).step(0)
    assert not [record.error for record in records if record.failed]
    return [record.arrays["eigenvalues"] for record in records if record.arrays]


def test_a_process_without_a_valid_label_counts_for_nothing(two_processes: Ranks) -> None:
    expected = torch.tensor(with_labels_on_one_process_only(False))
    for found in two_processes(with_labels_on_one_process_only, True):
        assert torch.allclose(torch.tensor(found), expected, rtol=1e-5, atol=1e-6)


class Scaled(nn.Module):
    """With a parameter of no axis."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.scale = nn.Linear(6, 3), nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.head(x)


def with_a_scalar() -> list[str | None]:
    torch.manual_seed(0)
    batch = union(2)[current_world().rank]
    monitor = CurvatureMonitor(Scaled(), probes=[batch], loss="cross_entropy", measure=[FisherSpectrum(), TopEigenpairs(k=1)])
    return [record.error for record in monitor.step(0)]


def test_a_parameter_of_no_axis(two_processes: Ranks) -> None:
    for errors in two_processes(with_a_scalar):
        assert len(errors) >= 4
        assert not any(errors)


def offloaded() -> str:
    model = training.fsdp2(training.Net(), offload_policy=CPUOffloadPolicy(pin_memory=False))
    try:
        CurvatureMonitor(model, probes=union(1), loss="cross_entropy").check()
    except ConfigurationError as error:
        return str(error)
    return ""


def test_offloaded_parameters_are_refused(two_processes: Ranks) -> None:
    assert all("`CPUOffloadPolicy`" in message for message in two_processes(offloaded))


def refused(sharding: str) -> str:
    """The message of the refusal."""
    model: nn.Module = training.Net()
    if sharding == "FSDP1":
        from torch.distributed.fsdp import FullyShardedDataParallel

        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    elif sharding == "tensor parallel":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        mesh = init_device_mesh("cpu", (current_world().size,))
        model = parallelize_module(model, mesh, {"first": ColwiseParallel()})
    elif sharding == "ZeRO-3":
        model.first.weight.ds_id = 0  # how DeepSpeed marks a parameter that it has partitioned
    elif sharding == "other models":
        with torch.no_grad():
            model.first.weight += current_world().rank
    monitor = CurvatureMonitor(model, probes=union(1), loss="cross_entropy")
    try:
        monitor.check()
    except ConfigurationError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("sharding", ["FSDP1", "tensor parallel", "ZeRO-3"])
def test_other_ways_of_sharding_are_refused_with_what_is_supported(sharding: str, two_processes: Ranks) -> None:
    for message in two_processes(refused, sharding):
        assert sharding.split()[0].lower() in message.lower()
        assert "DDP and FSDP2" in message


def test_processes_that_train_different_models_are_told_so(two_processes: Ranks) -> None:
    for message in two_processes(refused, "other models"):
        assert "processes 0 and 1 train different models" in message
        assert "`first.weight`" in message


def shards_in_a_probe() -> tuple[list[int], list[int]]:
    """Hooks and local sizes of a sharded model, before and inside the isolation."""
    model = training.fsdp2(training.Net())
    before = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    with isolated(model, seed=0):
        inside = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
        assert all(hasattr(parameter, "full_tensor") for parameter in model.parameters()), "shards stay shards"
    after = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]
    assert before == after
    return before, inside


def test_sharding_hooks_do_not_run_inside_a_probe(two_processes: Ranks) -> None:
    for before, inside in two_processes(shards_in_a_probe):
        assert sum(before) > 0
        assert sum(inside) == 0


@pytest.mark.slow
@pytest.mark.parametrize(("framework", "steps"), [("lightning", [3, 6]), ("transformers", [6])])
def test_a_resumed_run_of_two_processes_measures_as_the_uninterrupted_one(
    framework: str, steps: list[int], two_processes: Ranks, tmp_path: Path
) -> None:
    at_once, resumed = (
        two_processes(in_a_framework, f"resumed_{framework}", str(tmp_path / way), way) for way in ("at once", "cut")
    )
    for alone, again in zip(at_once, resumed, strict=True):
        assert [record.step for record in again if record.measurement == "probe"] == steps
        later = [record for record in alone if record.step in steps]
        assert [(one.measurement, one.block) for one in later] == [(one.measurement, one.block) for one in again]
        for one, other in zip(later, again, strict=True):
            if one.step > steps[0]:
                continue  # Lightning begins the epoch again: other batches have trained the parameters since
            if one.measurement == "empirical_fisher":
                assert one.scalars == other.scalars
            elif one.measurement == "hessian":
                assert other.scalars["lambda_max"] == pytest.approx(one.scalars["lambda_max"], rel=1e-2)
                assert other.num_matvecs <= one.num_matvecs, "the eigenvectors of the checkpoint are where it starts"
    assert_same_records([list(records) for records in resumed])


def resumed(tensors: tuple[bool, bool], fits: bool) -> list[Record]:
    """The second probe of a run whose first process has the vectors of the first one again, or has not, and the second too."""
    torch.manual_seed(0)
    model = training.fsdp2(training.Net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = union(2)[current_world().rank]

    def monitor() -> CurvatureMonitor:
        measure = [EdgeRatio(max_matvecs=4), TopEigenpairs(k=1, which="LA", max_matvecs=4)]
        return CurvatureMonitor(model, probes=[batch], loss="cross_entropy", measure=measure, when=1, optimizer=optimizer)

    with nullcontext() if fits else training.nothing_fits():
        first, second = monitor(), monitor()
        first.step(0)
        second.load_state_dict(first.state_dict(tensors=tensors[current_world().rank]))
        return second.step(1)


@pytest.mark.parametrize("fits", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_vectors_that_one_process_has_not_are_those_of_none(fits: bool, two_processes: Ranks) -> None:
    some, none = two_processes(resumed, (True, False), fits), two_processes(resumed, (False, False), fits)
    for records, cold in zip(some, none, strict=True):
        assert not [record.error for record in records if record.failed]
        assert [one.num_matvecs for one in records] == [one.num_matvecs for one in cold]
    assert_same_records([[one for one in records if one.measurement != "probe"] for records in some])


def drift_after_a_checkpoint() -> list[float | None]:
    """What gradient noise says of its kernel before and after all continue from the checkpoint of the first process."""
    torch.manual_seed(0)
    model, found = training.Net(), []
    own = [union(2)[current_world().rank]]

    def monitor() -> CurvatureMonitor:
        return CurvatureMonitor(model, probes=own, loss="cross_entropy", measure=[GradientNoise()], when=1)

    watching = monitor()
    watching.step(0)
    state = current_world().gathered(watching.state_dict())[0]
    with torch.no_grad():
        model.head.weight *= 1.5
    again = monitor()
    again.load_state_dict(state)
    for one in (watching, again):
        (record,) = [record for record in one.step(1) if record.measurement == "gradient_noise" and record.block is None]
        found.append(record.scalars.get("kernel_drift"))
    return found


def test_the_kernel_of_a_checkpoint_is_of_the_rows_of_all(two_processes: Ranks) -> None:
    first, second = two_processes(drift_after_a_checkpoint)
    assert first == second
    before, after = first
    assert before is not None
    assert before > 0
    assert after == before
