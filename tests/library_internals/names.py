"""Every name that the package uses and that a library does not promise to keep, and what stops working without it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any, Final

import torch
import torch.distributed as dist
import torch.utils._python_dispatch
import torch.utils.checkpoint
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.autograd.function import Function
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import RandomSampler
from transformers import GPT2Config, PreTrainedModel, Trainer, activations, trainer_pt_utils
from transformers.integrations import integration_utils
from transformers.models.auto import modeling_auto

from tests.lightning_runs import lightning_trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class Internal:
    """A name that a library may drop in any release.

    Attributes:
        name: as the package writes it.
        holder: makes the object that must have it as an attribute.
        without: what stops working; ends the sentence "`name` is gone: ...".
    """

    name: str
    holder: Callable[[], Any]
    without: str

    def complaint(self, holder: Any) -> str | None:
        """The sentence to read where `holder` has no such attribute, None where it has."""
        return None if hasattr(holder, self.name) else f"`{self.name}` is gone: {self.without}."


def rows(holder: Callable[[], Any], **without: str) -> list[Internal]:
    return [Internal(name=name, holder=holder, without=sentence) for name, sentence in without.items()]


class Squared(Function):
    """A custom operation."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


def custom_node() -> Any:
    return Squared.apply(torch.ones(1, requires_grad=True)).grad_fn


def layer_norm_node() -> Any:
    return nn.LayerNorm(3)(torch.randn(2, 3, requires_grad=True)).grad_fn


@cache
def sharded_module() -> Any:
    """A layer under FSDP2, sharded over this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return fully_shard(nn.Linear(2, 2), mesh=init_device_mesh("cpu", (1,)))
    finally:
        dist.destroy_process_group()


def fsdp_groups() -> list[Any]:
    """The groups of parameters of a sharded module; their name has changed between releases."""
    state = sharded_module()._get_fsdp_state()
    return list(getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group])


def fsdp_parameter() -> Any:
    return fsdp_groups()[0].fsdp_params[0]


def sharded_dataset() -> Any:
    return DistributedSamplerWrapper(RandomSampler(range(4)), num_replicas=2, rank=0).dataset


@cache
def prepared_by_accelerate() -> Any:
    AcceleratorState._reset_state(reset_partial_state=True)  # which another test may have left in another precision
    try:
        return Accelerator(mixed_precision="bf16", cpu=True).prepare_model(nn.Linear(2, 2))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def hyperparameters() -> Any:
    class Module(LightningModule):
        def __init__(self, scale: float = 1.0) -> None:
            super().__init__()
            self.save_hyperparameters()

    return Module()


def locals_of_training() -> Any:
    """What has to be a local variable in a frame that calls a Trainer's callback."""
    return SimpleNamespace(**dict.fromkeys(Trainer.train.__code__.co_varnames))


TENSORS: Final = [
    *rows(
        lambda: torch.ones(1),
        _version="what a data set writes to its own tensors is not put back (isolation/snapshot)",
        _is_view="outputs that are views cannot be hooked (gram/capture/hooks)",
        _base="outputs that are views cannot be hooked (gram/capture/hooks)",
        _indices="graphs that keep sparse tensors cannot be measured (operators/graphs)",
        _values="graphs that keep sparse tensors cannot be measured (operators/graphs)",
        _backward_hooks="losses whose gradient a hook makes are not refused (problem/reach)",
    ),
    *rows(lambda: torch.ones(1).untyped_storage(), _cdata="writes of a loss are not seen (isolation/writes)"),
    *rows(
        lambda: torch.multiprocessing.reductions,
        StorageWeakRef="parameters cannot be gathered on use (processes/gathering)",
    ),
    *rows(
        lambda: torch.multiprocessing.reductions.StorageWeakRef(torch.ones(1).untyped_storage()),
        expired="parameters cannot be gathered on use (processes/gathering)",
        cdata="parameters cannot be gathered on use (processes/gathering)",
    ),
    *rows(
        lambda: torch._C,
        _are_functorch_transforms_active="no pass can tell that it runs inside torch.func, and every probe fails",
        DisableTorchFunction="activations are not fused and parameters not gathered on use",
    ),
    *rows(
        lambda: torch.utils._python_dispatch,
        TorchDispatchMode="what a loss writes in place is not seen (isolation/writes)",
    ),
    *rows(lambda: torch.ops.aten.add_.Tensor, _schema="it is not known what an operation writes to (isolation/writes)"),
    *rows(lambda: torch.ops.aten.add_.Tensor._schema, is_mutable="it is not known what an operation writes to"),
    *rows(lambda: torch.ops.aten.add_.Tensor._schema.arguments[0], alias_info="it is not known what an operation writes to"),
    *rows(
        layer_norm_node,
        _saved_result1="layer norms are normalised anew in Grams, which takes three times as long",
        _saved_result2="layer norms are normalised anew in Grams, which takes three times as long",
        _saved_input="nodes do not tell what they save, and more graphs are kept than fit the memory (operators/graphs)",
    ),
    *rows(
        lambda: SimpleNamespace(**dict.fromkeys(nn.functional.multi_head_attention_forward.__code__.co_names)),
        has_torch_function="gradients of nn.MultiheadAttention are taken row by row (gram/capture/arguments)",
    ),
    *rows(custom_node, saved_tensors="the memory of graphs with custom operations is misjudged"),
    *rows(lambda: torch.autograd.function, BackwardCFunction="custom operations without a second derivative are not named"),
    *rows(lambda: type(custom_node()), _forward_cls="the package's own operations are taken for the user's"),
    *rows(
        lambda: torch.ops.aten,
        _unsafe_view="linear layers cannot have derivatives of a few kernels (operators/fused)",
        native_layer_norm_backward="layer norms cannot have derivatives of a few kernels (operators/fused)",
        convolution_backward="gradients of convolutions cannot be taken sample by sample (gram/uses/convolution)",
    ),
]
MODULES: Final = [
    *rows(
        lambda: nn.Linear(1, 1),
        _parameters="parameters cannot be gathered on use (processes/gathering)",
        _buffers="buffers are not put back (isolation/model)",
        _forward_pre_hooks="FSDP2's hooks run inside a probe (isolation/model)",
        _forward_hooks="FSDP2's hooks run inside a probe (isolation/model)",
    ),
    *rows(lambda: nn.modules.module, _global_forward_hooks="no graph of an operator can be built (operators/fused)"),
    *rows(lambda: nn.modules.batchnorm, _BatchNorm="batch norms are not known as such (model/batch_norm)"),
    *rows(lambda: nn.modules.conv, _ConvNd="convolutions are not told from other matrices (model/components)"),
    *rows(lambda: nn.modules.loss, _Loss="criterions such as nn.CrossEntropyLoss cannot be passed as `loss`"),
    *rows(
        lambda: torch.utils.checkpoint,
        CheckpointFunction="checkpointed layers are recomputed inside probes, or cannot be differentiated",
        _checkpoint_without_reentrant_generator="checkpointed layers are recomputed inside probes",
    ),
    *rows(lambda: torch.compile(nn.Linear(1, 1)), _orig_mod="layers of a compiled module carry another name"),
    *rows(
        lambda: checkpoint_wrapper(nn.Linear(1, 1)),
        _checkpoint_wrapped_module="layers with activation checkpointing carry another name",
    ),
]
FSDP: Final = [
    *rows(
        sharded_module,
        _get_fsdp_state="sharded parameters are taken for those of tensor parallelism, and the run is refused",
        reshard="parameters that FSDP2 keeps gathered are measured in place of its shards",
    ),
    *rows(lambda: fsdp_groups()[0], fsdp_params="a model under FSDP2 cannot be measured"),
    *rows(
        fsdp_parameter,
        is_dtensor="parameters that are sharded otherwise too are not refused",
        offload_to_cpu="parameters that are offloaded to the host are not refused",
        sharded_param="a model under FSDP2 cannot be measured",
        _module_info="a model under FSDP2 cannot be measured",
    ),
    *rows(
        lambda: fsdp_parameter()._module_info,
        module="parameters cannot be gathered on use",
        param_name="parameters cannot be gathered on use",
        shared_modules="tied parameters cannot be gathered on use",
        shared_param_names="tied parameters cannot be gathered on use",
    ),
]
FRAMEWORKS: Final = [
    *rows(prepared_by_accelerate, _original_forward="mixed precision of accelerate is not switched off inside probes"),
    *rows(
        GPT2Config,
        _experts_implementation="mixtures of experts run as grouped products, which keep no sample apart",
        _attn_implementation="attention without a second derivative is not refused",
    ),
    *rows(lambda: PreTrainedModel, _no_split_modules="layers of Hugging Face models are found by their structure only"),
    *rows(
        lambda: activations,  # by whose name `is_activation` goes
        NewGELUActivation="activations of Transformers have no derivatives of a few kernels (operators/fused)",
    ),
    *rows(sharded_dataset, _sampler="rows are drawn from all processes' where Lightning shards a sampler (probes)"),
]
LIGHTNING: Final = [
    *rows(
        LightningModule,
        _on_before_batch_transfer="batches of probes are not made as those of training, and every probe fails",
        _trainer="logging inside probes is not muted, and what a step writes to the Trainer is not put back",
    ),
    *rows(hyperparameters, _hparams="hyperparameters that a step changes are not put back after a probe"),
    *rows(lambda: Callback, _generate_state_key="the callback's state has no key in checkpoints"),
    *rows(
        lambda: lightning_trainer(".", []).fit_loop.epoch_loop,
        _batches_that_stepped="curvature is logged on another axis than the loss, silently",
    ),
    *rows(
        lambda: lightning_trainer(".", []),
        lr_scheduler_configs="schedulers that a step moves are not put back after a probe",
        callbacks="a state of other arguments is not warned of",
    ),
    *rows(
        lambda: lightning_trainer(".", []).precision_plugin,
        convert_input="batches of probes are not made as those of training",
        forward_context="steps in double precision make tensors of float32",
    ),
]
TRAINER: Final = [
    *rows(
        locals_of_training,
        self="the Trainer is not found in the calling frames: no TensorBoard, no loss of the Trainer's",
        resume_from_checkpoint="vectors begin anew when a run is resumed",
    ),
    *rows(integration_utils.TensorBoardCallback, tb_writer="curvature does not go to the Trainer's TensorBoard"),
    *rows(lambda: trainer_pt_utils, LabelSmoother="the adapter cannot be imported"),
    *rows(lambda: modeling_auto, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES="the adapter cannot be imported"),
    *rows(
        lambda: Trainer(nn.Linear(1, 1)),
        callback_handler="the Trainer is not found, and curvature goes to its log twice",
        compute_loss="the Trainer's loss cannot be measured",
        compute_loss_func="the Trainer's loss cannot be measured",
        label_smoother="label smoothing is not part of the loss that is measured",
        control="the Trainer's own loss is not logged at steps with a probe",
    ),
]
INTERNALS: Final = [*TENSORS, *MODULES, *FSDP, *FRAMEWORKS, *LIGHTNING, *TRAINER]
