"""Lightning and the Hugging Face Trainer on several processes, with and without the callback."""

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import Trainer

from curvature_callbacks import EdgeRatio, FisherSpectrum, KFACCoverage, TopEigenpairs
from curvature_callbacks.lightning.callback import CurvatureCallback as LightningCallback
from curvature_callbacks.record import Record
from curvature_callbacks.transformers.callback import CurvatureCallback as TransformersCallback
from tests.lightning_runs import ListLogger, Net, lightning_trainer
from tests.processes.training import local
from tests.training_cases import Rows, Stream, global_generators, loader, seed_everything
from tests.transformers_runs import Sentences, language_model, training_arguments, training_rows

MEASURE = [FisherSpectrum(), TopEigenpairs(k=2, max_matvecs=12), EdgeRatio(), KFACCoverage()]
SMALL: dict[str, Any] = {"every_n_steps": 3, "measure": MEASURE, "num_microbatches": 2, "microbatch_size": 3}


class ShardedNet(Net):
    """Sharded by FSDP2 where Lightning asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Dropout(0.3), nn.Linear(8, 3))

    def configure_model(self) -> None:
        assert self.device_mesh is not None
        for layer in (self.layers[0], self.layers[3]):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.layers, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss


class Quiet(Net):
    """Without dropout, whose generator Lightning does not save."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[3] = nn.Identity()


def lightning(strategy: str, probed: bool, directory: str, size: int) -> tuple[dict[str, Any], list[Record]]:
    seed_everything()
    sharded = strategy == "fsdp2"
    module = ShardedNet() if sharded else Net()
    callback = LightningCallback(**SMALL)
    logger = ListLogger()
    data = Stream(Rows()) if strategy == "stream" else Rows()
    strategies = {
        "ddp": lambda: DDPStrategy(),
        "stream": lambda: DDPStrategy(),
        "unused": lambda: DDPStrategy(find_unused_parameters=True),
        "static": lambda: DDPStrategy(static_graph=True),
        "fsdp2": lambda: ModelParallelStrategy(
            data_parallel_size=size, tensor_parallel_size=1, save_distributed_checkpoint=False
        ),
    }
    trainer = lightning_trainer(
        directory, [callback] if probed else [], logger=logger, strategy=strategies[strategy](), devices=size, max_steps=5
    )
    trainer.fit(module, loader(data, shuffle=strategy != "stream"))
    return _left(module, trainer.optimizers, logger.training), list(callback.history)


def transformers(setting: str, probed: bool, directory: str, size: int) -> tuple[dict[str, Any], list[Record]]:
    seed_everything()
    AcceleratorState._reset_state(reset_partial_state=True)  # or the wrapping of the run before stays
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    callback = TransformersCallback(**SMALL)
    more: dict[str, Any] = {}
    if setting == "accumulation":
        more = {"gradient_accumulation_steps": 2}
    trainer = Trainer(
        model=language_model(n_layer=2),
        args=training_arguments(Path(directory), per_device_train_batch_size=2, **more),
        train_dataset=Stream(Sentences()) if setting == "stream" else Sentences(),
        callbacks=[callback] if probed else [],
    )
    if setting == "fsdp2":
        _shard(trainer)
    trainer.train()
    assert (setting == "fsdp2") == all(isinstance(value, DTensor) for value in trainer.model.parameters())
    assert trainer.optimizer is not None
    return _left(trainer.model, [trainer.optimizer], training_rows(trainer.state.log_history)), list(callback.history)


def resumed_lightning(directory: str, way: str) -> list[Record]:
    """Seven steps, or the last four of them from a checkpoint."""
    seed_everything()

    def fit(steps: int, callback: LightningCallback, checkpoint: str | None) -> None:
        trainer = lightning_trainer(directory, [callback], strategy=DDPStrategy(), devices=2, max_steps=steps)
        trainer.fit(Quiet(), loader(Rows(), shuffle=False), ckpt_path=checkpoint)
        if checkpoint is None and way == "cut":
            trainer.save_checkpoint(f"{directory}/at_three.ckpt")

    callback = LightningCallback(**SMALL)
    if way == "at once":
        fit(7, callback, None)
    else:
        fit(3, LightningCallback(**SMALL), None)
        fit(7, callback, f"{directory}/at_three.ckpt")
    return list(callback.history)


def resumed_transformers(directory: str, way: str) -> list[Record]:
    """Seven steps, or the last four of them from a checkpoint."""
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_USE_FSDP", None)

    def train(steps: int, callback: TransformersCallback, checkpoint: str | None) -> None:
        seed_everything()
        saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": steps, "lr_scheduler_type": "constant"}
        args = training_arguments(Path(directory), per_device_train_batch_size=2, **saving)
        trainer = Trainer(model=language_model(), args=args, train_dataset=Sentences(), callbacks=[callback])
        trainer.train(resume_from_checkpoint=checkpoint)

    callback = TransformersCallback(**SMALL)
    if way == "at once":
        train(7, callback, None)
    else:
        train(3, TransformersCallback(**SMALL), None)
        train(7, callback, f"{directory}/checkpoint-3")
    return list(callback.history)


def _shard(trainer: Trainer) -> None:
    """As `fsdp_config={"version": 2}` does on GPUs: on a CPU accelerate does not look at it, though it works."""
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    state = trainer.accelerator.state
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["GPT2Block"],
        cpu_ram_efficient_loading=False,
    )
    trainer.is_fsdp_enabled = True


def _left(model: Any, optimizers: Any, logged: Any) -> dict[str, Any]:
    return {
        "parameters": {name: local(value) for name, value in model.state_dict().items()},
        "optimizer": [
            {key: local(value) for key, value in state.items()}
            for optimizer in optimizers
            for state in optimizer.state_dict()["state"].values()
        ],
        "logged": logged,
        "generators": global_generators(),
        "training": [child.training for child in model.modules()],
    }
