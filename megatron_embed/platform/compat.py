"""The one door to Megatron-Core: every other module imports Megatron's names from here.

Importing it installs the CPU adapter where CUDA is absent, before any Megatron module is loaded, and settles the
differences between the supported versions (0.16.1 on Python 3.11 to 0.19.x on 3.12). `parallel/topology.py` alone may
use `parallel_state`.
"""

# ruff: noqa: E402, F401
import importlib
import importlib.metadata
import inspect
import io
import logging
import os
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_embed.platform import cuda_environment

cuda_environment.set_defaults()

import torch

# What `doctor` says once, Megatron would say per module, rank and call.
for _message in ("Transformer Engine and Apex are not installed", "Apex is not installed",
                 "When using sequence parallelism", "full scope is deprecated",
                 "`load_state_dict` is deprecated",
                 "The .grad attribute of a Tensor that is not a leaf",
                 "MimoModelConfig is experimental",
                 "`is_gradient_checkpointing` is deprecated",  # Transformers of PEFT
                 "The argument order of load has been changed", "Please use DTensor instead",
                 "torch.distributed is disabled, unavailable or uninitialized",
                 "`torch.distributed.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated"):
    warnings.filterwarnings("ignore", message=_message)

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    from megatron_embed.platform import cpu

    cpu.install()
    from megatron_embed.platform.cpu_linear import linear as plain_linear
else:
    from torch.nn.functional import linear as plain_linear

    from megatron_embed.platform import private_folder

    private_folder.keep_kernels_private()
    # NVIDIA's containers switch TF32 on (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1). Float32 products are those of the loss,
    # whose similarities are divided by a temperature of 0.02, and of models in float32: errors of 1e-3 there.
    torch.set_float32_matmul_precision("highest")

# Without it Megatron logs an INFO line per module from every rank.
os.environ.setdefault("MEGATRON_LOGGING_LEVEL", "30")

import megatron.core.optimizer as megatron_optimizer
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.extensions.transformer_engine import HAVE_TE as HAS_TRANSFORMER_ENGINE
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, distrib_optimizer, get_megatron_optimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel import layers as linear_layers
from megatron.core.tensor_parallel.random import _get_all_rng_states as get_all_rng_states
from megatron.core.tensor_parallel.random import _set_all_rng_states as set_all_rng_states
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter

try:
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker  # 0.17 and later
except ImportError:
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker, track_moe_metrics
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import (
    get_te_version,
    is_te_min_version,
    make_sharded_tensor_for_checkpoint,
    make_tp_sharded_tensor_for_checkpoint,
    make_viewless_tensor,
)

from megatron_embed.platform import expert_permutation
from megatron_embed.platform import threaded_checkpoint_writer as writer
from megatron_embed.platform.adamw_8bit import AdamW8bit
from megatron_embed.platform.muon import Muon

writer.install()
expert_permutation.install(token_dispatcher)
# 0.16.1 leaves the name undefined without Transformer Engine, and the router of a mixture of experts reads it.
vars(moe_utils).setdefault("te_general_gemm", None)
for _name, _method in list(vars(TopKRouter).items()):
    if callable(_method) and "_torchdynamo_orig_callable" in vars(_method):
        # Compiled per layer, up to torch's limit of eight; none of these methods has anything to fuse.
        setattr(TopKRouter, _name, inspect.unwrap(_method))

# Messages of 0.19 on every rank about its own plans, and of either version on a CPU, which has one random stream.
for _name, _message in (("distributed.distributed_data_parallel", "full_param_layout not provided"),
                        ("dist_checkpointing.strategies.torch", "async save is deprecated"),
                        ("dist_checkpointing.strategies.common", "load_common is deprecated"),
                        ("transformer.transformer_layer", "Rewrapping ModuleSpec"),
                        *([] if HAS_CUDA else [("tensor_parallel.random", "CPU RNG state changed within GPU RNG")])):
    logging.getLogger(f"megatron.core.{_name}").addFilter(
        lambda record, message=_message: message not in record.getMessage())  # type: ignore[misc]

MEGATRON_VERSION = importlib.metadata.version("megatron-core")
MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's state of a parameter."""
ASYNC_SAVE: dict[str, Any] = {"async_sharded_save": True}
"""Arguments of `dist_checkpointing.save` with which the caller runs the save."""
if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
    ASYNC_SAVE["async_strategy"] = "mcore"  # the other one needs nvidia-resiliency-ext


def transformer_engine_layers() -> ModuleType:
    """The module of Megatron's wrappers of Transformer Engine's layers (TENorm, TELinear, ...), as it is now: their
    base classes are chosen when it is imported."""
    return importlib.import_module("megatron.core.extensions.transformer_engine")


def parallel_save() -> FullyParallelSaveStrategyWrapper:
    """Argument `sharded_strategy` of `dist_checkpointing.save` with which the ranks that hold the same tensors divide
    the writing of them. It communicates over the world: names and sizes of all tensors."""
    return FullyParallelSaveStrategyWrapper(TorchDistSaveShardedStrategy("torch_dist", 1))


_OWN_ADAM = (megatron_optimizer.Adam, megatron_optimizer.USING_PYTORCH_OPTIMIZER, distrib_optimizer.HAVE_APEX_OR_TE,
             distrib_optimizer.USING_APEX_OPTIMIZER)
_ADAM_OF_DISTRIBUTED = vars(distrib_optimizer)["Adam"]


def use_adam(adam_class: type[torch.optim.Optimizer], *, always: bool = False) -> None:
    """Make Megatron build `adam_class` if neither Transformer Engine nor Apex provides a fused Adam, or without CUDA,
    which those need; with `always` in any case.

    `adam_class` takes Apex's arguments (`adam_w_mode`) and keeps `step` in its parameter groups, as they do: Megatron's
    fully reshardable optimizer checkpoints look for it there (torch's AdamW keeps one per parameter).
    """
    own, uses_torch, has_fused, is_apex = _OWN_ADAM
    megatron_optimizer.Adam, megatron_optimizer.USING_PYTORCH_OPTIMIZER = own, uses_torch
    distrib_optimizer.HAVE_APEX_OR_TE, distrib_optimizer.USING_APEX_OPTIMIZER = has_fused, is_apex
    vars(distrib_optimizer)["Adam"] = _ADAM_OF_DISTRIBUTED
    if always or uses_torch or not HAS_CUDA:
        megatron_optimizer.USING_PYTORCH_OPTIMIZER = False
        megatron_optimizer.Adam = adam_class
        # The distributed optimizer then reads `step` from the groups, as from Apex's.
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
        vars(distrib_optimizer)["Adam"] = adam_class  # it asks for an instance of this


def gradients_of_norm(part: MegatronOptimizer) -> list[torch.Tensor]:
    """The gradients of one of the chained optimizers that count in the norm; over all ranks each is counted once."""
    name = "get_grads_for_grad_norm"  # 0.17 and later
    name = name if name in vars(MegatronOptimizer) else "get_main_grads_for_grad_norm"
    gradients: list[torch.Tensor] = vars(MegatronOptimizer)[name](part)
    return gradients


def initialize_optimizer_state(optimizer: MegatronOptimizer) -> None:
    """Set the state of an optimizer that has none yet to that before the first step: moments of zero, `step` 0.

    Adam creates it in its first step, and a checkpoint needs it. No communication.
    """
    for part in optimizer.chained_optimizers:
        inner = part.optimizer
        if len(inner.state):
            continue
        if isinstance(inner, HybridDeviceOptimizer):
            _initialize_offloaded(inner)
            continue
        if isinstance(inner, (AdamW8bit, Muon)):
            inner.initialize()
            continue
        for group in inner.param_groups:
            group.setdefault("step", 0)
            for parameter in group["params"]:
                if part.config.use_precision_aware_optimizer:
                    inner.initialize_state(parameter, False)  # no remainders in place of main parameters
                else:
                    inner.state[parameter] = {name: torch.zeros_like(parameter) for name in MOMENTS}


def _initialize_offloaded(optimizer: HybridDeviceOptimizer) -> None:
    for inner in optimizer.sub_optimizers:
        for group in inner.param_groups:
            for parameter in group["params"]:
                inner.state[parameter] = {name: torch.zeros_like(parameter) for name in MOMENTS}
                if isinstance(inner, torch.optim.AdamW):  # one step per parameter, as it would make it itself
                    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
                    inner.state[parameter] = {"step": step, **inner.state[parameter]}
    optimizer._sync_sub_optimizers_state_to_hdo()


def write_common_file(folder: Path) -> None:
    """Write the file from which 0.16 reads all that is not a tensor; `folder` holds a checkpoint's metadata.json.

    0.19 keeps that among the tensors, and reads the file if there is one. With it, a run of either version can resume
    with the other. No communication.
    """
    file = folder / "common.pt"
    if not file.exists():
        content = io.BytesIO()
        torch.save(dist_checkpointing.load_common_state_dict(str(folder)), content)
        file.write_bytes(content.getvalue())  # its error on a full disk is an OSError; torch.save has a RuntimeError


def forget_router_losses() -> None:
    """Clear the losses that routers of mixtures of experts have recorded in this process.

    Megatron sums them in one table per process, as long as the first model has layers: without this, a second model
    with more layers would raise an IndexError.
    """
    _router_losses().clear()


def router_losses(num_layers: int, micro_batches: int) -> dict[str, torch.Tensor]:
    """Auxiliary losses that the routers recorded since the last call of `forget_router_losses`, without coefficient.

    Args:
        num_layers: layers of the whole model, all of them with experts.
        micro_batches: micro-batches of this rank, over which the mean is taken.
    Returns:
        Megatron's name of each (`load_balancing_loss`: Fedus et al. 2021, arXiv:2101.03961, equation 4; 1 where all
        experts get as many tokens) -> its mean over layers, micro-batches and data-parallel ranks, a scalar on the
        device; empty if none was recorded. Communicates over the pipeline, tensor- and context-parallel and
        data-parallel groups.
    """
    losses: dict[str, torch.Tensor] = {}
    if _router_losses():
        report = {"loss_scale": 1 / micro_batches, "iteration": 0, "total_loss_dict": losses, "num_layers": num_layers}
        if "get_moe_metrics_tracker" in globals():
            get_moe_metrics_tracker().report(**report)
        else:
            track_moe_metrics(**report)
    return losses


def _router_losses() -> dict[str, Any]:
    if "get_moe_metrics_tracker" in globals():
        return get_moe_metrics_tracker().metrics
    return get_moe_layer_wise_logging_tracker()
