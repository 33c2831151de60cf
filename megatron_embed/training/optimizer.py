"""AdamW over Megatron's DistributedDataParallel buffers, and the learning-rate schedule."""

import importlib.util
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_embed.checkpoint.optimizer_slices import owned_slices
from megatron_embed.config.optimizer import OWN_READERS
from megatron_embed.config.optimizer import OptimizerConfig as OptimizerSettings
from megatron_embed.config.schema import RunConfig, TrainingConfig
from megatron_embed.errors import ConfigError
from megatron_embed.models.encoder import DTYPES, EmbeddingModel
from megatron_embed.models.heads import return_tied_gradients
from megatron_embed.models.lora import Lora
from megatron_embed.models.matrices import layer_matrices
from megatron_embed.models.passes import tied_parts, tied_vocabulary
from megatron_embed.models.relative_bias import sum_over_copies
from megatron_embed.models.vocabulary_head import return_tied_gradient
from megatron_embed.parallel.collectives import sum_over
from megatron_embed.parallel.topology import Topology
from megatron_embed.platform.adamw_8bit import AdamW8bit, SlicePosition
from megatron_embed.platform.compat import (
    HAS_CUDA,
    HAS_TRANSFORMER_ENGINE,
    DistributedDataParallel,
    DistributedDataParallelConfig,
    DistributedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    OptimizerParamScheduler,
    finalize_model_grads,
    get_megatron_optimizer,
    gradients_of_norm,
    use_adam,
)
from megatron_embed.platform.muon import Matrix, Muon
from megatron_embed.training.overlap import assert_gathered, no_sync_until_last_microbatch


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) with one `step` per parameter group.

    Takes Apex's arguments, so that Megatron can build it where neither Transformer Engine nor Apex is installed.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float, betas: tuple[float, float], eps: float,
                 adam_w_mode: bool = True, capturable: bool = False) -> None:
        assert adam_w_mode and not capturable, "neither L2 regularization nor CUDA graphs are ever asked for"
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                    state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            updated = [parameter for parameter in group["params"] if parameter.grad is not None]
            if updated:
                self._update(updated, group)

    def _update(self, parameters: list[torch.nn.Parameter], group: dict[str, Any]) -> None:
        """torch's kernel on parameters of one dtype and device. `step` is filled in there: a copy of it for each
        parameter, as torch's own `step` needs, would be waited for."""
        step = torch.full((), float(group["step"]), device=parameters[0].device)
        states = [self.state[parameter] for parameter in parameters]
        beta1, beta2 = group["betas"]
        torch._fused_adamw_(
            parameters, [parameter.grad for parameter in parameters],  # type: ignore[arg-type]
            [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states], [],
            [step] * len(parameters), lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"],
            eps=group["eps"], amsgrad=False, maximize=False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called when state is loaded; torch then insists on a `step` per parameter, of which we keep none."""
        held = [values for values in state["state"].values() if values]
        for values in held:
            values["step"] = torch.tensor(0.0)
        super().__setstate__(state)
        for values in held:
            del values["step"]


def check_optimizer(config: RunConfig, *, has_adapters: bool, has_tied_head: bool, has_bias: bool = False) -> None:
    """Raise ConfigError if this machine or model does not support section `optimizer`. No communication."""
    asked = config.optimizer
    if asked.name == "muon" and has_adapters:
        raise ConfigError("optimizer.name = 'muon': model.path holds adapters, which are no matrices of the model; set "
                          "it to adamw", key="optimizer.name")
    if asked.name == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("optimizer.name = 'adamw_8bit' needs the package bitsandbytes: pip install "
                          "'megatron_embed[quantization]', or set it to adamw", key="optimizer.name")
    if asked.cpu_offload and not HAS_CUDA:
        raise ConfigError("optimizer.cpu_offload = True: this machine has no GPU to offload from; set it to false",
                          key="optimizer.cpu_offload")
    if asked.precision_aware and not (HAS_CUDA and HAS_TRANSFORMER_ENGINE):
        raise ConfigError("optimizer.precision_aware = True needs a GPU and Transformer Engine, whose FusedAdam it is; "
                          "pip install 'megatron_embed[gpu]' on a GPU's machine, or set it to false",
                          key="optimizer.precision_aware")
    if asked.overlap_grad_reduce is True and has_tied_head:
        raise ConfigError("optimizer.overlap_grad_reduce = True: the head's weights are rows of the word "
                          "embeddings, whose gradient is whole only after the backward passes; set it to false",
                          key="optimizer.overlap_grad_reduce")
    if has_bias and asked.overlap_grad_reduce is True:
        raise ConfigError("optimizer.overlap_grad_reduce = True: all layers share the relative position bias, whose "
                          "gradient is whole only after the backward passes; set it to false",
                          key="optimizer.overlap_grad_reduce")
    if asked.overlap_param_gather is True and has_adapters:
        raise ConfigError(f"optimizer.overlap_param_gather = True: {OWN_READERS}", key="optimizer.overlap_param_gather")


def overlaps(asked: OptimizerSettings, *, has_adapters: bool, has_head: bool, has_tied_head: bool) -> tuple[bool, bool]:
    """(optimizer.overlap_grad_reduce, optimizer.overlap_param_gather) with `auto` resolved, see their docs."""
    reduce = HAS_CUDA and not has_tied_head if asked.overlap_grad_reduce == "auto" else asked.overlap_grad_reduce
    gather = asked.overlap_param_gather
    if gather == "auto":
        gather = HAS_CUDA and reduce and asked.distributed and not (has_adapters or has_head)
    return reduce, gather


def wrap_in_ddp(chunks: Sequence[EmbeddingModel], config: RunConfig, topology: Topology,
                bucket_size: int | None = None) -> list[torch.nn.Module]:
    """The chunks in Megatron's DistributedDataParallel, gradients in float32, and the schedule's hooks set.

    `bucket_size`: parameters of a bucket, if communication overlaps computation; None: see the settings.
    """
    tied, vocabulary = tied_parts(chunks), tied_vocabulary(chunks)
    biases = [chunk.position_bias for chunk in chunks if chunk.position_bias is not None
              and chunk.position_bias.weight.requires_grad]
    overlap_reduce, overlap_gather = overlaps(
        config.optimizer, has_adapters=any(isinstance(module, Lora) for module in chunks[0].modules()),
        has_head=chunks[0].head_spec is not None or chunks[0].pooling == "splade" or bool(biases),
        has_tied_head=tied is not None or vocabulary is not None or bool(biases))
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=config.optimizer.distributed, check_for_nan_in_grad=False,
        overlap_grad_reduce=overlap_reduce, overlap_param_gather=overlap_gather, bucket_size=bucket_size)
    wrapped = [DistributedDataParallel(config=chunk.config, ddp_config=ddp_config, module=chunk,
                                       disable_bucketing=index > 0, pg_collection=topology.groups)
               for index, chunk in enumerate(chunks)]
    if overlap_reduce:
        no_sync_until_last_microbatch(wrapped)

    def finalize(*arguments: Any, **options: Any) -> None:
        if overlap_gather:
            assert_gathered(wrapped)
        if tied is not None:
            assert not overlap_reduce, "some gradients may be reduced already"
            return_tied_gradients(*tied, topology)
        if vocabulary is not None:
            assert not overlap_reduce, "some gradients may be reduced already"
            return_tied_gradient(*vocabulary, topology)
        if biases:
            assert not overlap_reduce, "some gradients may be reduced already"
            sum_over_copies(biases, topology.groups.pp)
        finalize_model_grads(*arguments, **options)

    chunks[0].config.finalize_model_grads_func = finalize
    return wrapped


def optimizer_settings(config: RunConfig) -> OptimizerConfig:
    """Megatron's settings of AdamW for a run."""
    training, asked = config.training, config.optimizer
    settings = OptimizerConfig(
        optimizer="adam", lr=training.learning_rate, min_lr=training.min_learning_rate,
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1, adam_beta2=training.adam_beta2, adam_eps=training.adam_eps,
        bf16=config.model.dtype == "bfloat16", params_dtype=DTYPES[config.model.dtype],
        # Infinity instead of Megatron's 0: the norm is still computed, for the log, and nothing is clipped.
        clip_grad=training.clip_grad or float("inf"), use_distributed_optimizer=asked.distributed,
        use_precision_aware_optimizer=asked.precision_aware,
        exp_avg_dtype=torch.bfloat16 if asked.precision_aware else torch.float32,
        # The other half of a float32 main parameter alone would save two bytes more, but Megatron 0.16.1 writes it into
        # checkpoints as if it were the parameter.
        store_param_remainders=False,
        optimizer_cpu_offload=asked.cpu_offload, optimizer_offload_fraction=1.0 if asked.cpu_offload else 0.0)
    if asked.cpu_offload:
        # By this flag the distributed optimizer hands its share of the model's own parameters over instead of float32
        # copies on the GPU. Set from the start, it asks for Transformer Engine, which offloading does not use.
        settings.use_precision_aware_optimizer = settings.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
    return settings


def main_matrices(chunks: Sequence[EmbeddingModel], topology: Topology) -> dict[Tensor, Matrix]:
    """The main parameter of every matrix of the layers, and how it is made of the Hugging Face model's."""
    groups = topology.groups
    return {vars(matrix.parameter).get("main_param", matrix.parameter): Matrix(
                parts=matrix.parts, split_dim=matrix.split_dim, group=groups.expt_tp if matrix.is_expert else groups.tp)
            for chunk in chunks for matrix in layer_matrices(chunk, chunk.shape)}


def slice_positions(optimizer: DistributedOptimizer) -> dict[Tensor, SlicePosition]:
    """The elements of the model's parameter that each main parameter of this rank holds."""
    positions = {}
    for owned in owned_slices(optimizer):
        group, index = optimizer.model_param_group_index_map[owned.parameter]
        main = optimizer.optimizer.param_groups[group]["params"][index]
        positions[main] = SlicePosition(start=owned.start, total=owned.parameter.numel())
    return positions


def build_optimizer(config: RunConfig, wrapped: Sequence[torch.nn.Module], topology: Topology) -> MegatronOptimizer:
    """`optimizer.name` with float32 main parameters; no weight decay on biases and norms.

    With `optimizer.distributed` its state is sharded over the data-parallel ranks.
    """
    name = config.optimizer.name
    use_adam({"adamw": AdamW, "adamw_8bit": AdamW8bit, "muon": Muon}[name], always=name != "adamw")
    optimizer = get_megatron_optimizer(optimizer_settings(config), list(wrapped), use_gloo_process_groups=True,
                                       pg_collection=None)
    # Where experts alone are trained (by their adapters) and are divided otherwise than the rest, Megatron makes an
    # optimizer of nothing for the rest, on every rank, which ends in an AttributeError at the first save.
    parts = [part for part in optimizer.chained_optimizers if part.optimizer is not None]
    for part in parts:
        if isinstance(part.optimizer, Muon):
            part.optimizer.matrices = main_matrices([chunk.module for chunk in wrapped], topology)
        if isinstance(part.optimizer, AdamW8bit):
            part.optimizer.positions = slice_positions(part)
    return optimizer if len(parts) == len(optimizer.chained_optimizers) else type(optimizer)(parts)


@torch.no_grad()
def squared_norms(optimizer: MegatronOptimizer) -> list[Tensor]:
    """Squares, scalars float32 on the device, whose sum is that of the norm of the whole model's gradient.

    One; or one per part of the optimizer, if the parts are divided over different ranks (experts). Call it after the
    backward passes, on all ranks: one all-reduce of a number each. Megatron's own norm reads every tensor's back.
    """
    optimizer.prepare_grads()
    parts = [(gradients_of_norm(part), part.get_grad_stats_parallel_group())
             for part in optimizer.chained_optimizers]
    if optimizer.grads_states_parallel_group_is_shared():
        parts = [([gradient for gradients, _ in parts for gradient in gradients], parts[0][1])]
    squares = []
    for gradients, group in parts:
        if gradients:
            square = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))) ** 2
        else:
            square = torch.zeros((), device="cuda" if HAS_CUDA else "cpu")
        squares.append(sum_over(square, group))
    return squares


@torch.no_grad()
def update(optimizer: MegatronOptimizer, squares: Sequence[Tensor], loss: float) -> tuple[float, bool]:
    """One optimizer step, unless the loss or the gradient is not finite: then parameters and moments stay as they are.

    Args:
        squares: the return value of `squared_norms`, on the CPU.
    Returns:
        (norm of the whole model's gradient before clipping, whether there was a step). Equal on all ranks.
    """
    if not math.isfinite(loss):
        return math.nan, False
    norms = [float(square) ** 0.5 for square in squares]
    norm = norms[0] if len(norms) == 1 else math.sqrt(sum(norm**2 for norm in norms))
    if not math.isfinite(norm):
        return math.inf, False
    factor = optimizer.config.clip_grad / (norm + 1e-6)
    if factor < 1.0:
        for part in optimizer.chained_optimizers:
            decoupled = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
            gradients = [vars(parameter).get("decoupled_grad") if decoupled else parameter.grad
                         for parameter in part.get_parameters()]
            gradients = [gradient for gradient in gradients if gradient is not None]
            if gradients:  # a rank of many may own no element of a few small adapters
                torch._foreach_mul_(gradients, factor)
    optimizer.step_with_ready_grads()
    return norm, True


def build_scheduler(optimizer: MegatronOptimizer, training: TrainingConfig,
                    train_steps: int) -> OptimizerParamScheduler:
    """Linear warm-up from 0, then `lr_decay_style`; one unit per optimizer step."""
    return OptimizerParamScheduler(
        optimizer, init_lr=0.0, max_lr=training.learning_rate, min_lr=training.min_learning_rate,
        lr_warmup_steps=training.warmup(train_steps), lr_decay_steps=train_steps,
        lr_decay_style="WSD" if training.lr_decay_style == "wsd" else training.lr_decay_style,
        wsd_decay_steps=training.final_decay(train_steps), lr_wsd_decay_style="linear",
        start_wd=training.weight_decay, end_wd=training.weight_decay, wd_incr_steps=train_steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False, override_opt_param_scheduler=True)
