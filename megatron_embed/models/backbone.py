"""Transformer layers without a language-model head, from Megatron-Core's blocks: [tokens] ids -> [tokens, hidden]."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

from megatron_embed.config.schema import ParallelConfig, TrainingConfig
from megatron_embed.errors import ConfigError
from megatron_embed.kernels.reference import ACTIVATIONS
from megatron_embed.models.disentangled import DisentangledSelfAttention
from megatron_embed.models.experts import GroupedExperts
from megatron_embed.models.families import ModelShape, layers_by_stage
from megatron_embed.models.layer import BackboneConfig, PackedSelfAttention, PreNormLayer, RMSNorm, SandwichLayer
from megatron_embed.models.quantized_linear import QuantizedColumnParallelLinear, QuantizedRowParallelLinear
from megatron_embed.models.segments import attention_window
from megatron_embed.parallel.topology import uses_sequence_parallel, virtual_size
from megatron_embed.platform.compat import (
    MLP,
    AttnMaskType,
    ColumnParallelLinear,
    IdentityOp,
    LanguageModelEmbedding,
    MegatronModule,
    MLPSubmodules,
    ModuleSpec,
    MoELayer,
    MoESubmodules,
    ProcessGroupCollection,
    RowParallelLinear,
    SelfAttentionSubmodules,
    SequentialMLP,
    TransformerBlockSubmodules,
    TransformerConfig,
    TransformerLayer,
    TransformerLayerSubmodules,
    get_bias_dropout_add,
    get_cuda_rng_tracker,
    make_viewless_tensor,
    tensor_parallel,
)
from megatron_embed.platform.weight_gradient import products_can_accumulate


class LayerNorm(torch.nn.Module):
    """LayerNorm over the last dim whose weights are marked for sequence parallelism, like RMSNorm's.

    Its bias is None if the configuration's norms have none.
    """

    def __init__(self, config: BackboneConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = (torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype)) if config.norm_bias
                     else None)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


class PostNormLayer(TransformerLayer):
    """Transformer layer in the original order (Vaswani et al. 2017): norm(x + sublayer(x)). BERT and XLM-RoBERTa."""

    def __init__(self, config: TransformerConfig, submodules: TransformerLayerSubmodules, layer_number: int = 1,
                 hidden_dropout: float | None = None, pg_collection: ProcessGroupCollection | None = None,
                 vp_stage: int | None = None, norm: type[torch.nn.Module] = LayerNorm) -> None:
        super().__init__(config, submodules, layer_number, hidden_dropout, pg_collection, vp_stage)
        self.post_attention_layernorm = norm(config, config.hidden_size, config.layernorm_epsilon)
        self.post_mlp_layernorm = norm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, *args: object, **kwargs: object) -> tuple[Tensor, Tensor | None]:
        """[tokens/tp, 1, hidden] -> ([tokens/tp, 1, hidden], context as it came)."""
        hidden, context = self._forward_attention(*args, **kwargs)
        hidden = self.post_attention_layernorm(hidden)
        hidden = self._forward_mlp(hidden, padding_mask=kwargs.get("padding_mask"))
        hidden = self.post_mlp_layernorm(hidden)
        # Transformer Engine's norm gives a view, which the pipeline schedule refuses to send.
        return make_viewless_tensor(hidden, requires_grad=hidden.requires_grad, keep_graph=True), context


class EncoderEmbedding(LanguageModelEmbedding):
    """Word embeddings, those of positions and token types if the model has them, and then BERT's norm and dropout."""

    def __init__(self, config: BackboneConfig, vocab_size: int, shape: ModelShape,
                 tp_group: torch.distributed.ProcessGroup) -> None:
        super().__init__(config, vocab_size, shape.max_position_embeddings,
                         "learned_absolute" if shape.learned_positions else "rope", shape.type_vocab_size,
                         # The norm comes before the dropout and needs the whole sum.
                         scatter_to_sequence_parallel=False, tp_group=tp_group)
        self.layer_norm = LayerNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, input_ids: Tensor, position_ids: Tensor, tokentype_ids: Tensor | None = None) -> Tensor:
        """[1, tokens] ids and positions -> [tokens/tp, 1, hidden] (all tokens without sequence parallelism)."""
        embeddings = self.word_embeddings(input_ids)
        if self.add_position_embedding:
            embeddings = embeddings + self.position_embeddings(position_ids)
        if self.tokentype_embeddings is not None:
            types = torch.zeros_like(input_ids) if tokentype_ids is None else tokentype_ids
            embeddings = embeddings + self.tokentype_embeddings(types)
        embeddings = embeddings.transpose(0, 1)
        if not self.config.sequence_parallel:
            return self.embedding_dropout(self.layer_norm(embeddings))
        embeddings = tensor_parallel.scatter_to_sequence_parallel_region(embeddings, group=self.tp_group)
        with get_cuda_rng_tracker().fork():
            return self.embedding_dropout(self.layer_norm(embeddings))


class ScaledEmbedding(LanguageModelEmbedding):
    """Word embeddings times a factor, which is rounded to their dtype first."""

    def __init__(self, *arguments: Any, scale: float, **others: Any) -> None:
        super().__init__(*arguments, **others)
        self.scale = float(torch.tensor(scale).to(self.config.params_dtype))

    def forward(self, input_ids: Tensor, position_ids: Tensor, tokentype_ids: Tensor | None = None) -> Tensor:
        """[1, tokens] ids -> [tokens/tp, 1, hidden] (all tokens without sequence parallelism)."""
        embeddings: Tensor = super().forward(input_ids, position_ids)
        return embeddings * self.scale


def mark_tensor_parallel(model: torch.nn.Module) -> None:
    """Set the attributes by which Megatron tells a shard from a copy.

    Megatron before 0.19 sets them while it initializes weights, which we skip because all are loaded; without them the
    gradient norm counts only rank 0's shards (measured at TP=2: 24.3 for a true 29.4).
    """
    dims = {ColumnParallelLinear: 0, RowParallelLinear: 1, tensor_parallel.VocabParallelEmbedding: 0}
    for module in model.modules():
        for kind, dim in dims.items():
            if (isinstance(module, kind) and isinstance(module.weight, torch.nn.Parameter)
                    and "tensor_model_parallel" not in vars(module.weight)):
                tensor_parallel.set_tensor_model_parallel_attributes(module.weight, True, dim, 1)


def mark_expert_copies(model: torch.nn.Module, sizes: ParallelConfig) -> None:
    """Make tensor-parallel ranks that hold copies of an expert sum its gradients.

    Each of them computes the expert on its share of the tokens. Megatron hands an expert to the expert-data-parallel
    group only if there is expert parallelism; else every copy keeps its own part (measured at TP=2: off by 100 %).
    """
    if sizes.tensor_model_parallel_size == sizes.expert_tensor_parallel_size:
        return
    for module in model.modules():
        if isinstance(module, SequentialMLP):
            for parameter in module.parameters():
                parameter.allreduce = False  # type: ignore[attr-defined]


def check_divisible(shape: ModelShape, sizes: ParallelConfig) -> None:
    """Raises ConfigError, naming rule and nearest valid values, if the model cannot be split as asked."""
    tp, pp = sizes.tensor_model_parallel_size, sizes.pipeline_model_parallel_size
    split = [("attention heads", shape.num_attention_heads), ("key/value heads", shape.num_query_groups)]
    for name, value in split if shape.num_experts else [*split, ("MLP width", shape.ffn_hidden_size)]:
        if value % tp:
            raise ConfigError(f"parallel.tensor_model_parallel_size = {tp} does not divide the model's {value} {name}; "
                              f"nearest valid: {_nearest_divisor(value, tp)}",
                              key="parallel.tensor_model_parallel_size")
    if sizes.cp_comm_type == "a2a":
        _check_head_exchange(shape, sizes)
    if shape.num_experts:
        _check_experts(shape, sizes)
    rows = 0 if shape.disentangled_positions is None else 2 * shape.disentangled_positions.span
    if rows % tp and uses_sequence_parallel(sizes):
        raise ConfigError(f"parallel.tensor_model_parallel_size = {tp} does not divide the model's {rows} relative "
                          f"positions; nearest valid: {_nearest_divisor(rows, tp)}",
                          key="parallel.tensor_model_parallel_size")
    if shape.hidden_size % tp and uses_sequence_parallel(sizes):
        raise ConfigError(f"parallel.tensor_model_parallel_size = {tp} does not divide the hidden size "
                          f"{shape.hidden_size}; nearest valid: {_nearest_divisor(shape.hidden_size, tp)}",
                          key="parallel.tensor_model_parallel_size")
    for name in ("expert_model", "expert_tensor"):
        size = sizes.expert_model_parallel_size if name == "expert_model" else sizes.expert_tensor_parallel_size
        if size > 1 and not shape.num_experts:
            raise ConfigError(f"parallel.{name}_parallel_size = {size}, but the model has dense layers (no experts); "
                              "set it to 1", key=f"parallel.{name}_parallel_size")
    stages = pp * (virtual_size(sizes) or 1)
    if shape.num_layers < stages:
        raise ConfigError(f"parallel.pipeline_model_parallel_size = {pp} (times virtual size "
                          f"{virtual_size(sizes) or 1}) makes {stages} stages, more than the model's "
                          f"{shape.num_layers} layers; largest valid total: {shape.num_layers}",
                          key="parallel.pipeline_model_parallel_size")


def _check_head_exchange(shape: ModelShape, sizes: ParallelConfig) -> None:
    """Raises ConfigError if context-parallel ranks cannot share the heads of a tensor-parallel rank."""
    cp, tp = sizes.context_parallel_size, sizes.tensor_model_parallel_size
    for name, value in (("attention heads", shape.num_attention_heads), ("key/value heads", shape.num_query_groups)):
        if value // tp % cp:
            raise ConfigError(f"parallel.cp_comm_type = 'a2a': parallel.context_parallel_size = {cp} does not divide "
                              f"the {value // tp} {name} of a tensor-parallel rank; nearest valid: "
                              f"{_nearest_divisor(value // tp, cp)}, or use all_gather", key="parallel.cp_comm_type")


def _check_experts(shape: ModelShape, sizes: ParallelConfig) -> None:
    """Raises ConfigError if the experts cannot be split as asked, or if Megatron cannot train them with this layout."""
    for name, size, value, what in (
            ("expert_model", sizes.expert_model_parallel_size, shape.num_experts, "experts"),
            ("expert_tensor", sizes.expert_tensor_parallel_size, shape.ffn_hidden_size, "columns of an expert")):
        if value % size:
            raise ConfigError(f"parallel.{name}_parallel_size = {size} does not divide the model's {value} {what}; "
                              f"nearest valid: {_nearest_divisor(value, size)}", key=f"parallel.{name}_parallel_size")
    if sizes.tensor_model_parallel_size > 1 and not uses_sequence_parallel(sizes):
        raise ConfigError("parallel.sequence_parallel = False: a mixture of experts under tensor parallelism "
                          f"(tensor_model_parallel_size = {sizes.tensor_model_parallel_size}) needs it; set it to auto",
                          key="parallel.sequence_parallel")


def _nearest_divisor(value: int, wanted: int) -> int:
    return min((d for d in range(1, value + 1) if value % d == 0), key=lambda d: (abs(d - wanted), d))


def pipeline_layout(num_layers: int, stages: int) -> list[list[str]] | None:
    """Megatron's `pipeline_model_parallel_layout` if the stages, virtual ones included, do not divide the layers; else
    None."""
    if num_layers % stages == 0:
        return None
    layout = [["decoder"] * layers for layers in layers_by_stage(num_layers, stages)]
    return [["embedding", *layout[0]], *layout[1:-1], [*layout[-1], "loss"]]


def megatron_config(shape: ModelShape, sizes: ParallelConfig, training: TrainingConfig,
                    dtype: torch.dtype, *, fused_kernels: bool = False) -> BackboneConfig:
    """Megatron's configuration of this model under this layout. Raises ConfigError if the layout does not divide it."""
    check_divisible(shape, sizes)
    virtual = virtual_size(sizes)
    on_gpu = torch.cuda.is_available()
    return BackboneConfig(
        fused_kernels=fused_kernels, norm_bias=shape.norm_bias, rotary_dim=shape.rotary_dim,
        rotary_interleaved=shape.interleaved_rotary,
        num_layers=shape.num_layers, hidden_size=shape.hidden_size, num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups, kv_channels=shape.head_dim, ffn_hidden_size=shape.ffn_hidden_size,
        normalization=shape.norm, layernorm_epsilon=shape.norm_eps,
        layernorm_zero_centered_gamma=shape.zero_centered_norm, softmax_scale=shape.attention_scale,
        activation_func=ACTIVATIONS[shape.activation],
        gated_linear_unit=shape.gated, add_bias_linear=shape.add_bias_linear, add_qkv_bias=shape.add_qkv_bias,
        qk_layernorm=shape.qk_layernorm, init_method_std=shape.initializer_range,
        hidden_dropout=training.hidden_dropout, attention_dropout=training.attention_dropout,
        tensor_model_parallel_size=sizes.tensor_model_parallel_size,
        pipeline_model_parallel_size=sizes.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual,
        pipeline_model_parallel_layout=pipeline_layout(
            shape.num_layers, sizes.pipeline_model_parallel_size * (virtual or 1)),
        context_parallel_size=sizes.context_parallel_size, cp_comm_type=sizes.cp_comm_type,
        expert_model_parallel_size=sizes.expert_model_parallel_size,
        expert_tensor_parallel_size=sizes.expert_tensor_parallel_size, sequence_parallel=uses_sequence_parallel(sizes),
        params_dtype=dtype, pipeline_dtype=dtype, bf16=dtype == torch.bfloat16, use_cpu_initialization=not on_gpu,
        perform_initialization=False, bias_activation_fusion=False, bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False, persist_layer_norm=False,
        gradient_accumulation_fusion=fused_kernels and products_can_accumulate(),
        # Interleaved schedules give wrong gradients on gloo unless sends and receives are separate and outputs stay
        # allocated (33 of 60 steps wrong with a step's deallocated outputs, 0 without).
        overlap_p2p_comm=virtual is not None, batch_p2p_comm=virtual is None, deallocate_pipeline_outputs=on_gpu,
        deterministic_mode=training.deterministic, **_expert_settings(shape, training),
        recompute_granularity=None if training.recompute == "none" else training.recompute,
        recompute_method="uniform" if training.recompute == "full" else None,
        recompute_num_layers=1 if training.recompute == "full" else None,
        recompute_modules=["core_attn"] if training.recompute == "selective" else None,
    )


def _expert_settings(shape: ModelShape, training: TrainingConfig) -> dict[str, object]:
    """Megatron's settings for a mixture of experts; empty for a dense model."""
    if not shape.num_experts:
        return {}
    return {
        "num_moe_experts": shape.num_experts, "moe_router_topk": shape.experts_per_token,
        "moe_ffn_hidden_size": shape.ffn_hidden_size, "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": False,
        "moe_router_dtype": "fp32", "moe_router_pre_softmax": not shape.normalize_expert_weights,
        "moe_router_load_balancing_type": "aux_loss" if training.moe_aux_loss_coefficient else "none",
        "moe_aux_loss_coeff": training.moe_aux_loss_coefficient}


@dataclass(frozen=True, kw_only=True)
class LayerClasses:
    """Classes of the parts of a layer, with the signatures of Megatron's."""

    norm: type[Any]
    column_linear: type[Any]
    row_linear: type[Any]
    norm_linear: type[Any] | None = None
    """A norm and the column-parallel linear behind it in one; None: they are separate."""
    activation: type[Any] | None = None
    """The activation of a dense MLP, made from the configuration; None: the configuration's function."""
    expert_column_linear: type[Any] = ColumnParallelLinear
    expert_row_linear: type[Any] = RowParallelLinear
    experts: type[GroupedExperts] | None = None
    """None: GroupedExperts."""
    is_quantized: bool = False
    """Whether the linears' weights are quantized, and so neither trained nor in checkpoints."""


def torch_layer_classes(shape: ModelShape, *, quantized: bool = False) -> LayerClasses:
    """Our norms and Megatron's own linears, or with `quantized` those over quantized weights, for experts too."""
    column, row = ((QuantizedColumnParallelLinear, QuantizedRowParallelLinear) if quantized
                   else (ColumnParallelLinear, RowParallelLinear))
    return LayerClasses(norm=LayerNorm if shape.norm == "LayerNorm" else RMSNorm, column_linear=column, row_linear=row,
                        expert_column_linear=column, expert_row_linear=row, is_quantized=quantized)


def block_spec(config: TransformerConfig, shape: ModelShape, bidirectional: bool, pp_rank: int,
               vp_stage: int | None, core_attention: type[MegatronModule],
               layers: LayerClasses) -> TransformerBlockSubmodules:
    """Layer and norm classes of the backbone, one entry per layer of this pipeline stage."""
    virtual = config.virtual_pipeline_model_parallel_size or 1
    counts = layers_by_stage(shape.num_layers, config.pipeline_model_parallel_size * virtual)
    stage = (vp_stage or 0) * config.pipeline_model_parallel_size + pp_rank
    first = sum(counts[:stage])
    specs = [_layer_spec(shape, layer, bidirectional, core_attention, layers)
             for layer in range(first, first + counts[stage])]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=layers.norm)


def _layer_spec(shape: ModelShape, layer: int, bidirectional: bool, core_attention: type[MegatronModule],
                layers: LayerClasses) -> ModuleSpec:
    """Classes of a layer, counted from 0 over the whole model."""
    norm, fused = layers.norm, layers.norm_linear
    qk_norm = norm if shape.qk_layernorm else None
    mask = AttnMaskType.no_mask if bidirectional else AttnMaskType.causal
    is_local, has_input_norm = shape.is_local(layer), not shape.post_norm and (layer > 0 or shape.first_attention_norm)
    core = ModuleSpec(module=core_attention, params={
        "window": attention_window(shape.sliding_window, not bidirectional) if is_local else None,
        **({} if shape.attention_softcap is None else {"softcap": shape.attention_softcap})})
    attention = ModuleSpec(
        module=PackedSelfAttention if shape.disentangled_positions is None else DisentangledSelfAttention,
        params={"attn_mask_type": mask, "rotary": int(is_local and shape.local_rotary_base is not None)},
        submodules=SelfAttentionSubmodules(
            linear_qkv=(fused if has_input_norm else None) or layers.column_linear, core_attention=core,
            linear_proj=layers.row_linear,
            q_layernorm=qk_norm, k_layernorm=qk_norm))
    # Transformer Engine fuses these norms into the linears; storing them under its names keeps checkpoints
    # interchangeable with models built from its layers. A mixture of experts keeps the second one separate.
    stored_names = {} if shape.post_norm or fused else {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if shape.num_experts:
        linears = MLPSubmodules(linear_fc1=layers.expert_column_linear, linear_fc2=layers.expert_row_linear)
        experts = ModuleSpec(module=layers.experts or GroupedExperts, submodules=linears)
        mlp = ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=experts))
    else:
        mlp = ModuleSpec(module=MLP, submodules=MLPSubmodules(
            linear_fc1=fused or layers.column_linear, linear_fc2=layers.row_linear,
            activation_func=layers.activation))
        if not shape.post_norm and not fused:
            stored_names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    kind = (PostNormLayer if shape.post_norm else SandwichLayer if shape.sublayer_norms else
            PreNormLayer if norm is RMSNorm else TransformerLayer)
    return ModuleSpec(
        module=kind, params={"norm": norm} if shape.post_norm or shape.sublayer_norms else {},
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm if has_input_norm and not fused else IdentityOp, self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=IdentityOp if shape.post_norm or (fused and not shape.num_experts) else norm, mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=stored_names))
