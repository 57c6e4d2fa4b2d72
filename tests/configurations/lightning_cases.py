"""Every configuration of Lightning in which training must be the same bits with and without the callback."""

from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch.callbacks import BatchSizeFinder, EMAWeightAveraging, GradientAccumulationScheduler, LearningRateFinder
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import Subset

from curvature_callbacks import LogSpaced, LossSpike
from tests.configurations.lightning_fits import (
    IN_YAML,
    SHARPNESS,
    averaged,
    by_another_trainer,
    by_command_line,
    by_the_module,
    checkpointed,
    compiled,
    learning_rate_found,
    lr_is_found,
    named_by_sharpness,
    nothing_is_written,
    on_after_an_epoch,
    own_is_measured,
    resumed,
    scaled,
    size_is_found,
    validated,
)
from tests.configurations.lightning_nets import (
    CollectingNet,
    CompiledNet,
    CurvatureLossNet,
    DirectlyLoggingNet,
    ExactNet,
    FirstLoaderNet,
    HalfFrozenNet,
    JitteredNet,
    LateNet,
    ManyHooksNet,
    NoisyNet,
    PlateauNet,
    RememberingNet,
    RowsModule,
    ScheduledNet,
    SearchingNet,
    SilentNet,
    SpikingNet,
    TransferringNet,
    TransformedRows,
    TunedNet,
    TwoLoadersNet,
    UnregisteredMetricNet,
    ValidatedNet,
    pair,
)
from tests.configurations.lightning_sessions import Case
from tests.lightning_runs import FrozenNet, ManualNet, MeteredNet, pair_loss
from tests.training_cases import ROWS, AugmentedRows, Stream, loader

BY_EPOCH = {"max_steps": 13}


BY_PAIR = {"loss_fn": pair_loss}


EVERY_SECOND = range(0, 13, 2)


IN_JSONARGPARSE = [r"(?s)\s*By default only one Jsonargparse", r"(?s).*was deprecated in v4"]  # what Lightning calls


IN_DYNAMO = "The .grad attribute of a Tensor that is not a leaf"


def in_place(backend: str) -> Case:
    net = partial(CompiledNet, backend)
    return Case(f"a submodule compiled in place ({backend})", net=net, tolerated=[IN_DYNAMO], is_slow=backend != "eager")


def as_a_whole(backend: str) -> Case:
    title = f"`torch.compile(module)` given to `fit` ({backend})"
    return Case(
        title, {"max_steps": 3}, net=SilentNet, fit=compiled(backend), steps=(0, 2), tolerated=[IN_DYNAMO], is_slow=True
    )


def several(title: str, make: Callable[[], Any]) -> Case:
    return Case(f"several loaders: {title}", net=TwoLoadersNet, data=make, has_likelihood=False)


CASES: dict[str, Case] = {
    "plain": Case("AdamW in float32"),
    "accumulation": Case("gradient accumulation", {"accumulate_grad_batches": 3}),
    "16-mixed": Case(
        "`16-mixed` on a CPU, which Lightning makes `bf16-mixed`", {"precision": "16-mixed"}, tolerated=["You passed"]
    ),
    "16-mixed, scaler": Case("`16-mixed` with a gradient scaler, by a plugin", arguments=scaled),
    "16-true": Case("`16-true` (SGD)", {"precision": "16-true"}, net=ScheduledNet),
    "bf16-mixed": Case("`bf16-mixed`", {"precision": "bf16-mixed"}),
    "bf16-true": Case("`bf16-true`", {"precision": "bf16-true"}),
    "64-true": Case("`64-true`", {"precision": "64-true"}),
    "clipping": Case("gradient clipping by norm", {"gradient_clip_val": 0.1}),
    "clipping by value": Case("gradient clipping by value", {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
    "one cycle": Case("a one-cycle schedule of learning rate and momentum", net=ScheduledNet),
    "weight averaging": Case(
        "`StochasticWeightAveraging`, with its last epoch for BatchNorm",
        {"max_epochs": 3, "max_steps": -1},
        arguments=averaged,
        steps=range(0, 19, 2),
    ),
    "exponential averaging": Case(
        "`EMAWeightAveraging`, with validation of the average",
        {"val_check_interval": 2},
        net=ValidatedNet,
        arguments=lambda: {"callbacks": [EMAWeightAveraging(decay=0.9)]},
        fit=validated,
    ),
    "accumulation by epoch": Case(
        "`GradientAccumulationScheduler`",
        arguments=lambda: {"callbacks": [GradientAccumulationScheduler({0: 2, 1: 3})]},
    ),
    "LBFGS": Case("LBFGS, which evaluates the loss several times a step", net=SearchingNet),
    "plateau": Case("`ReduceLROnPlateau`", BY_EPOCH, net=PlateauNet, steps=EVERY_SECOND),
    "gradients in hooks": Case("gradients logged and clipped in hooks of the module", net=ManyHooksNet),
    "late layers": Case("`configure_model` and `configure_callbacks`", net=LateNet),
    "noise": Case("`training_step` draws, counts and reads the Trainer and its hyperparameters", net=NoisyNet),
    "noisy layer": Case("a layer with a generator of its own", net=JitteredNet, callback={"loss_fn": "cross_entropy"}),
    "anomalies": Case("`detect_anomaly`", {"detect_anomaly": True}),
    "deterministic": Case("`deterministic`", {"deterministic": True}),
    "reloaded": Case(
        "loaders made anew every epoch by a data module",
        {"max_steps": 13, "reload_dataloaders_every_n_epochs": 1},
        data=partial(RowsModule, batch_size=4),
        steps=EVERY_SECOND,
    ),
    "manual optimization": Case(
        "manual optimization of two optimizers, `loss_fn`", {"max_steps": 14}, net=ManualNet, callback=BY_PAIR, steps=range(7)
    ),
    "curvature_loss": Case(
        "manual optimization of two optimizers, `curvature_loss`", {"max_steps": 14}, net=CurvatureLossNet, steps=range(7)
    ),
    "compiled, eager": as_a_whole("eager"),
    "compiled, aot_eager": as_a_whole("aot_eager"),
    "compiled in place, eager": in_place("eager"),
    "compiled in place, aot_eager": in_place("aot_eager"),
    "frozen at every epoch": Case(
        "a BatchNorm put in evaluation mode at every epoch", BY_EPOCH, net=FrozenNet, steps=EVERY_SECOND
    ),
    "frozen": Case("frozen layers in evaluation mode", net=HalfFrozenNet, tolerated=["Found 2 module"]),
    "metrics": Case("torchmetrics in `training_step`", BY_EPOCH, net=MeteredNet, steps=EVERY_SECOND),
    "unregistered metric": Case("a torchmetric in a dictionary", BY_EPOCH, net=UnregisteredMetricNet, steps=EVERY_SECOND),
    "collecting": Case("outputs collected in a list", BY_EPOCH, net=CollectingNet, steps=EVERY_SECOND),
    "remembering": Case("losses kept in containers and submodules", BY_EPOCH, net=RememberingNet, steps=EVERY_SECOND),
    "logging directly": Case("`training_step` writes to the logger itself", net=DirectlyLoggingNet),
    "augmentation": Case("data augmented from all generators", data=lambda: loader(AugmentedRows())),
    "transform": Case("a transform with a generator of its own", data=lambda: loader(TransformedRows())),
    "transform of a subset": Case(
        "a subset of rows with such a transform", data=lambda: loader(Subset(TransformedRows(), range(20)))
    ),
    "transfer hooks": Case("batches changed by the hooks of the transfer", net=TransferringNet, has_likelihood=False),
    "workers": Case(
        "a persistent worker",
        {"max_steps": 8},
        data=lambda: loader(AugmentedRows(), num_workers=1, persistent_workers=True),
        is_slow=True,
    ),
    "stream": Case("an `IterableDataset`", data=lambda: loader(Stream(AugmentedRows()), shuffle=False)),
    "dict of loaders": several("a dictionary", pair),
    "batches of two sizes": Case(
        "several loaders of different batch size, one of which has the loss",
        net=FirstLoaderNet,
        data=lambda: {"a": loader(), "b": loader(batch_size=8)},
        has_likelihood=False,
        has_rows=False,
    ),
    "list of loaders": several("a list", lambda: list(pair().values())),
    "min_size": several('`CombinedLoader(..., "min_size")`', lambda: CombinedLoader(pair(), "min_size")),
    "max_size": several('`CombinedLoader(..., "max_size")`', lambda: CombinedLoader(pair(), "max_size")),
    "max_size_cycle": several('`CombinedLoader(..., "max_size_cycle")`', lambda: CombinedLoader(pair(), "max_size_cycle")),
    "list, max_size_cycle": several(
        'a list in `CombinedLoader(..., "max_size_cycle")`', lambda: CombinedLoader(list(pair().values()), "max_size_cycle")
    ),
    "overfit_batches": Case("`overfit_batches`", {"overfit_batches": 2}, tolerated=["You requested to overfit"]),
    "limit_train_batches": Case("`limit_train_batches`", {"limit_train_batches": 2}),
    "fast_dev_run": Case(
        "`fast_dev_run`",
        {"fast_dev_run": 3, "max_steps": -1, "max_epochs": 1},
        steps=(0, 2),
        verified=nothing_is_written,
    ),
    "validation": Case("validation several times an epoch", {"val_check_interval": 2}, net=ValidatedNet, fit=validated),
    "checkpoints": Case(
        f"`ModelCheckpoint` that monitors `{SHARPNESS}` and has it in its file names",
        fit=checkpointed,
        verified=named_by_sharpness,
    ),
    "lr_find": Case("`Tuner.lr_find` before `fit`", net=TunedNet, fit=learning_rate_found, verified=lr_is_found),
    "learning rate finder": Case(
        "`LearningRateFinder`",
        net=TunedNet,
        arguments=lambda: {"callbacks": [LearningRateFinder(min_lr=1e-4, max_lr=1e-1, num_training_steps=30)]},
        fit=by_the_module,
        verified=lr_is_found,
    ),
    "batch size finder": Case(
        "`BatchSizeFinder`",
        net=TunedNet,
        arguments=lambda: {"callbacks": [BatchSizeFinder(steps_per_trial=2, init_val=4, max_trials=2)]},
        fit=by_the_module,
        verified=size_is_found,
    ),
    "command line": Case(
        "`LightningCLI` with callback and measurements in YAML",
        fit=partial(by_command_line, block_structure={"first": ["layers.0"]}, seed=3),
        tolerated=IN_JSONARGPARSE,
    ),
    "command line, more": Case(
        "`LightningCLI` with a schedule, other data, limits and a measurement of one's own in YAML",
        fit=partial(
            by_command_line,
            **IN_YAML,
        ),
        steps=(0, 3, 5),
        verified=own_is_measured,
        tolerated=IN_JSONARGPARSE,
    ),
    "schedule": Case(
        "a schedule", callback={"every_n_steps": 200, "schedule": LogSpaced(per_decade=4, first=2)}, steps=(0, 2, 4)
    ),
    "spike": Case(
        "a probe when the loss leaves its range",
        net=SpikingNet,
        callback={"every_n_steps": 200, "spike": LossSpike(num_std=20.0, window=2)},
        steps=(0, 4),
    ),
    "probe dataset": Case(
        "other data to measure on, with generators of its own",
        data=lambda: loader(AugmentedRows()),
        callback={"probe_dataset": AugmentedRows()},
    ),
    "probe dataloader": Case(
        "a loader of other data to measure on",
        data=lambda: loader(Stream(AugmentedRows()), shuffle=False),
        callback={"probe_dataloader": loader(AugmentedRows())},
    ),
    "limits": Case("a share of wall time and seconds of a probe", callback={"max_overhead": 0.99, "max_seconds": 100.0}),
    "twice": Case("`fit` called again to go on", fit=on_after_an_epoch, steps=range(0, 12, 2)),
    "another trainer": Case(
        "another Trainer for the same module, with the same callback", fit=by_another_trainer, steps=(0, 2, 4, 6, 0, 2, 4, 6)
    ),
    "resumed": Case(
        "resuming from a checkpoint, the same as the training not interrupted",
        {"max_steps": 11},
        net=ExactNet,
        data=lambda: loader(batch_size=ROWS, shuffle=False),  # a single batch: Lightning resumes with the first of an epoch
        fit=partial(resumed, step=5),
        otherwise=lambda session: session.fitted(),
        steps=range(0, 11, 2),
    ),
    "resumed within an epoch": Case(
        "resuming from a checkpoint within an epoch", {"max_steps": 9}, fit=partial(resumed, step=4), steps=range(0, 9, 2)
    ),
}
