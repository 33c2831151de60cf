"""Backbone, pooling and head, by pipeline stage: a micro-batch of token ids -> `[rows, dim]` embeddings."""

import dataclasses
import functools
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as functional
from torch import Tensor

from megatron_embed.batch import MicroBatch
from megatron_embed.config.schema import RunConfig
from megatron_embed.errors import ConfigError
from megatron_embed.kernels.operators import why_no_kernels
from megatron_embed.models.attention import PackedAttention, PackedSequences
from megatron_embed.models.backbone import (
    EncoderEmbedding,
    LayerClasses,
    ScaledEmbedding,
    block_spec,
    mark_expert_copies,
    mark_tensor_parallel,
    megatron_config,
    torch_layer_classes,
)
from megatron_embed.models.dense import DenseModules
from megatron_embed.models.dense_settings import DenseSettings
from megatron_embed.models.disentangled import RelativeEmbeddings
from megatron_embed.models.families import ModelShape
from megatron_embed.models.heads import HeadSpec, RerankerHead
from megatron_embed.models.joint_rows import joint_rows, weight_ids
from megatron_embed.models.layer import fuse_activations
from megatron_embed.models.layer_backend import layer_backend
from megatron_embed.models.lora import add_adapters
from megatron_embed.models.lora_settings import Adapters
from megatron_embed.models.packed_bins import packed_sequences, text_positions
from megatron_embed.models.pooling import PoolingPlan, local_plan, pool, pooling_plan, text_plan
from megatron_embed.models.relative_bias import RelativeBias
from megatron_embed.models.rope import rotary_cos_sin, rotary_factors, rotary_frequencies
from megatron_embed.models.segments import context_chunks
from megatron_embed.models.te_attention import TransformerEngineAttention
from megatron_embed.models.te_layers import PassSettings, configure, start_overlap, te_layer_classes
from megatron_embed.models.vocabulary_head import VocabularyHead
from megatron_embed.models.vocabulary_shape import padded_vocabulary
from megatron_embed.names import ModelPooling
from megatron_embed.parallel.device_copy import copy_to_device
from megatron_embed.parallel.topology import Topology
from megatron_embed.platform.compat import (
    HAS_CUDA,
    HAS_TRANSFORMER_ENGINE,
    LanguageModelEmbedding,
    LanguageModule,
    MegatronModule,
    ModelType,
    TransformerBlock,
    TransformerConfig,
)
from megatron_embed.platform.flash_attention import HEAD_DIM_UNIT, MAX_HEAD_DIM, choose_version, why_no_flash

logger = logging.getLogger(__name__)
AttentionKernel = Literal["flash", "sdpa", "te"]
CORE_ATTENTION: dict[AttentionKernel, type[MegatronModule]] = {
    "flash": PackedAttention, "sdpa": PackedAttention, "te": TransformerEngineAttention}
FUSED_NORMS = {".self_attention.linear_qkv.layer_norm_": ".input_layernorm.",
               ".mlp.linear_fc1.layer_norm_": ".pre_mlp_layernorm."}
"""Names of Transformer Engine's norms that are part of a linear, and those of separate ones."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class DeviceMicroBatch:
    """A micro-batch on the device, with everything derived from its sequence bounds; made once per step, on the CPU."""

    token_ids: Tensor
    """[1, tokens/cp] int64."""
    position_ids: Tensor
    """[1, tokens/cp] int64, with the model's first position."""
    token_types: Tensor | None
    """[1, tokens/cp] int64; None: all 0."""
    num_tokens: int
    """Length of the bin over all context-parallel ranks, padding included."""
    packed: PackedSequences
    padding: Tensor
    """[1, tokens/(cp*tp)] bool, true at padding; the share of a sequence-parallel rank. Routers skip padding."""
    plan: PoolingPlan
    """Plan over the tokens that this rank holds after the last layer."""
    first_position: int
    """Position id of a text's first token."""
    text_plan: PoolingPlan | None
    """Plan of a joint model's vectors of whole texts, over the same tokens; None: another model."""
    weight_ids: Tensor | None
    """See joint_rows.py."""
    valid_rows: Tensor
    """[outputs] int64, where the model's outputs belong: local row ids, or indices of the rows' vectors; empty if the
    micro-batch repeats another one."""
    num_rows: int
    """One more than the largest of `valid_rows`; 0 if there are none."""


class EmbeddingModel(LanguageModule):
    """One pipeline stage (or chunk) of an embedding model, with the parameter names of Megatron's GPTModel and without
    an output layer."""

    def __init__(self, config: TransformerConfig, shape: ModelShape, topology: Topology, *, pooling: ModelPooling,
                 normalize: bool, bidirectional: bool, vp_stage: int | None = None,
                 head_spec: HeadSpec | None = None, kernel: AttentionKernel = "sdpa",
                 layers: LayerClasses | None = None, passes: PassSettings | None = None,
                 dense: Sequence[DenseSettings] = ()) -> None:
        super().__init__(config=config, pg_collection=topology.groups)
        self.shape = shape
        self.topology = topology
        self.pooling = pooling
        self.normalize = normalize
        self.head_spec = head_spec
        self.passes = passes
        self.causal = not bidirectional
        self.vp_stage = vp_stage
        self.is_quantized = layers is not None and layers.is_quantized
        self.share_embeddings_and_output_weights = False
        self.model_type = ModelType.encoder_or_decoder  # read by the pipeline schedules
        first_chunk, last_chunk = vp_stage in (None, 0), vp_stage in (None, topology.num_model_chunks - 1)
        self.pre_process = topology.is_first_stage and first_chunk
        self.post_process = topology.is_last_stage and last_chunk
        if self.pre_process:
            self.embedding = self._embedding()
        # Not a buffer, so that it stays float32 whatever the model's dtype.
        copy = topology.pp_rank + topology.pp_size * (vp_stage or 0)
        self.relative_bias = None if shape.relative_positions is None else RelativeBias(shape, topology, copy=copy)
        self.relative_embeddings = (None if shape.disentangled_positions is None
                                    else RelativeEmbeddings(config, shape, topology, copy=copy))
        self.rotary_frequencies = None if shape.rotary_base is None else rotary_frequencies(shape).to(topology.device)
        self.decoder = TransformerBlock(
            config=config, spec=block_spec(config, shape, bidirectional, topology.pp_rank, vp_stage,
                                           core_attention=CORE_ATTENTION[kernel],
                                           layers=layers or torch_layer_classes(shape)),
            post_layer_norm=not shape.post_norm, pre_process=self.pre_process, post_process=self.post_process,
            pg_collection=topology.groups, vp_stage=vp_stage)
        self.head: RerankerHead | VocabularyHead | None = None
        if self.post_process and head_spec is not None:
            self.head = RerankerHead(head_spec, shape, topology.cp_size)
        elif self.post_process and pooling == "splade":
            self.head = VocabularyHead(shape, topology)
        self.dense = DenseModules(dense, topology) if self.post_process and dense else None

    def _embedding(self) -> LanguageModelEmbedding:
        vocabulary = padded_vocabulary(self.shape.vocab_size, self.topology.tp_size)
        if self.shape.embedding_norm:
            return EncoderEmbedding(self.config, vocabulary, self.shape, tp_group=self.topology.groups.tp)
        arguments = (self.config, vocabulary, self.shape.max_position_embeddings, "rope")
        if self.shape.embedding_scale is not None:
            return ScaledEmbedding(*arguments, scale=self.shape.embedding_scale, tp_group=self.topology.groups.tp)
        return LanguageModelEmbedding(*arguments, tp_group=self.topology.groups.tp)

    @property
    def position_bias(self) -> RelativeBias | RelativeEmbeddings | None:
        """This chunk's copy of the module from which positions are added to attention scores; None without one."""
        return self.relative_bias or self.relative_embeddings

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Receive the previous stage's output; called by the pipeline schedule."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(self, batch: DeviceMicroBatch) -> Tensor:
        """On the last stage the bin's embeddings, [sequences, dim] float32, [vectors, dim] of a multi-vector model,
        [sequences, vocabulary/tp] of a sparse one, [rows, width] of a joint one, or a reranker's scores, [sequences,
        1]; on other stages the token states for the next one."""
        hidden = self.token_states(batch)
        if not self.post_process:
            return hidden
        if isinstance(self.head, VocabularyHead):
            tied = self.embedding.word_embeddings.weight if self.pre_process else None
            return self.head(hidden.squeeze(1), batch.plan, tied)
        groups = [self.topology.groups.tp] if self.topology.sequence_parallel else []
        groups += [self.topology.groups.cp] if self.topology.cp_size > 1 else []
        rows = pool(hidden.squeeze(1), batch.plan, tuple(groups))
        if batch.text_plan is not None:
            assert self.dense is not None and batch.weight_ids is not None
            texts = pool(hidden.squeeze(1), batch.text_plan, tuple(groups))
            return joint_rows(texts, self.dense(rows), batch.weight_ids)
        if self.head is not None:
            return self.head(rows)
        rows = rows if self.dense is None else self.dense(rows)
        return functional.normalize(rows, dim=-1) if self.normalize else rows

    def token_states(self, batch: DeviceMicroBatch) -> Tensor:
        """[tokens/(cp*tp), 1, hidden] after this chunk's layers (tokens/cp without sequence parallelism)."""
        assert batch.first_position == self.shape.position_offset, "to_device needs the model's shape"
        if self.passes is not None:
            self.passes.prepare(self, self.config)
        hidden, packed = None, batch.packed
        if self.position_bias is not None:
            packed = dataclasses.replace(packed, bias=self.position_bias)
        if self.pre_process:
            hidden = self.embedding(batch.token_ids, batch.position_ids, batch.token_types)
        if hidden is not None and self.config.recompute_granularity == "full" and torch.is_grad_enabled():
            # Frozen embeddings need no gradient, and recomputation gives no gradient to a layer whose input needs none,
            # nor to the adapters in that layer.
            hidden = hidden if hidden.requires_grad else hidden.requires_grad_()
        return self.decoder(hidden_states=hidden, attention_mask=None, rotary_pos_emb=self._rotary_cos_sin(batch),
                            packed_seq_params=packed,
                            padding_mask=batch.padding if self.shape.num_experts else None)

    def _rotary_cos_sin(self, batch: DeviceMicroBatch) -> Tensor | None:
        """Cosines and sines of each token's own position, for all layers; None with learned positions."""
        if self.rotary_frequencies is None:
            return None
        return rotary_cos_sin(self.rotary_frequencies, batch.position_ids, self.config.params_dtype,
                              rotary_factors(self.shape))

    def global_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Parameters of this rank by name; layers and experts are counted over the whole model, not from this rank's
        first."""
        return {self.global_name(name): parameter for name, parameter in self.named_parameters()}

    def global_name(self, name: str) -> str:
        """Name of a parameter of this rank, with layers and experts counted over the whole model, and norms named as
        in layers of torch."""
        first = self.decoder.layers[0].layer_number - 1 if len(self.decoder.layers) else 0
        experts = self.shape.num_experts // self.topology.sizes.expert_model_parallel_size
        first_expert = experts * self.topology.groups.ep.rank() if self.shape.num_experts else 0
        for fused, separate in FUSED_NORMS.items():
            name = name.replace(fused, separate)
        name = re.sub(r"^decoder\.layers\.(\d+)", lambda match: f"decoder.layers.{int(match[1]) + first}", name)
        return re.sub(r"local_experts\.(\d+)", lambda match: f"local_experts.{int(match[1]) + first_expert}", name)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Megatron's sharded state under the layers' global indices; LanguageModule's own method needs logits."""
        metadata = {**(metadata or {}), "non_homogeneous_layers": True, "dp_cp_group": self.topology.groups.dp_cp}
        return MegatronModule.sharded_state_dict(self, prefix, sharded_offsets, metadata)


def attention_kernel(config: RunConfig, shape: ModelShape | None = None) -> AttentionKernel:
    """The attention kernel: torch's variable-length flash kernels, its general attention (SDPA), or, if requested,
    Transformer Engine. SDPA alone adds a bias to attention scores, or bounds them, takes heads of any size, and leaves
    out mask tokens that are to be hidden.

    Args:
        shape: the model's; None: one that every kernel takes.
    Raises:
        ConfigError: flash or te is requested but cannot run here; the same on every rank with the same packages.
    """
    half, wanted = config.model.dtype != "float32", config.model.attention
    unfit = None if shape is None else _unfit_for_flash(shape)
    if config.embedding.hides_expansion:
        unfit = unfit or "no tokens that attention does not see, as with embedding.attend_to_expansion = False"
    if unfit is not None:
        if wanted in ("flash", "te"):
            raise ConfigError(f"model.attention = {wanted!r}: its kernels take {unfit}; use 'auto' or 'sdpa'",
                              key="model.attention")
        if wanted == "auto" and half and HAS_CUDA:
            _say_once(f"model.attention = auto is sdpa: flash kernels take {unfit}")
        return "sdpa"
    if wanted in ("flash", "te"):
        if not (HAS_CUDA and half):
            raise ConfigError(f"model.attention = {wanted!r} needs a GPU and model.dtype = bfloat16; use 'auto' or "
                              "'sdpa' here", key="model.attention")
        if wanted == "te" and not HAS_TRANSFORMER_ENGINE:
            raise ConfigError("model.attention = 'te': Transformer Engine is not installed; pip install "
                              "'megatron_embed[gpu]', or use 'auto'", key="model.attention")
        if wanted == "te" and (other := _refused_by_te(config)) is not None:
            raise ConfigError(f"model.attention = 'te' does not go with {other}; use 'auto', 'flash' or 'sdpa'",
                              key="model.attention")
    missing = why_no_flash()
    if wanted == "flash" and missing is not None:
        raise ConfigError(f"model.attention = 'flash': {missing}; use 'auto' or 'sdpa', or a torch of 2.6 to 2.14, "
                          "whose operators are known to fit", key="model.attention")
    if wanted == "te" or (wanted == "auto" and _refused_by_te(config) is None and layer_backend(config) == "te"):
        return "te"
    if wanted == "sdpa" or not (half and HAS_CUDA):
        return "sdpa"
    if missing is not None:
        _say_once(f"model.attention = auto is sdpa: {missing}")
        return "sdpa"
    return "flash"


def _unfit_for_flash(shape: ModelShape) -> str | None:
    """The feature of this model that flash kernels do not support; None: they support it."""
    for what, needed in (("bias", shape.has_position_bias), ("bound", shape.attention_softcap is not None)):
        if needed:
            return f"no {what} of attention scores, which a {shape.family} model has"
    if shape.head_dim % HEAD_DIM_UNIT or shape.head_dim > MAX_HEAD_DIM:
        return (f"heads of a multiple of {HEAD_DIM_UNIT} dimensions, at most {MAX_HEAD_DIM}, and the model's have "
                f"{shape.head_dim}")
    return None


def _refused_by_te(config: RunConfig) -> str | None:
    """The setting that our use of Transformer Engine's attention lacks."""
    dropout, cp_size = config.training.attention_dropout, config.parallel.context_parallel_size
    return (f"training.attention_dropout = {dropout}" if dropout
            else f"parallel.context_parallel_size = {cp_size}" if cp_size > 1 else None)


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)


def uses_fused_kernels(config: RunConfig) -> bool:
    """Whether norms, rotary positions and activations are fused kernels, by `model.fused_kernels`. The same on every
    rank with the same packages."""
    if config.model.fused_kernels == "off" or not HAS_CUDA:
        return False
    missing = why_no_kernels()
    if missing is not None:
        _say_once(f"model.fused_kernels = auto: plain operators, which take a third longer: {missing}")
    return missing is None


def build_model(config: RunConfig, shape: ModelShape, topology: Topology, pooling: ModelPooling,
                head_spec: HeadSpec | None = None, adapters: Adapters | None = None,
                dense: Sequence[DenseSettings] = ()) -> list[EmbeddingModel]:
    """This rank's model chunks (one without interleaving), uninitialized, in `model.dtype`, on the device; the last one
    with a reranker's head if `head_spec` is given, or with the Dense modules.

    With `adapters`, these are initialized and everything else but a reranker's classifier and Dense modules is frozen.

    Raises:
        ConfigError: the layout does not divide the model, or `model.attention` cannot run here.
    """
    dtype = DTYPES[config.model.dtype]
    fused = uses_fused_kernels(config)
    if fused and (shape.zero_centered_norm or shape.rotary_dim is not None or shape.interleaved_rotary):
        _say_once(f"model.fused_kernels: {'norms' if shape.zero_centered_norm else 'rotary positions'} of a "
                  f"{shape.family} model are plain operators, and its activations are fused")
    transformer = megatron_config(shape, config.parallel, config.training, dtype, fused_kernels=fused)
    bidirectional, kernel = shape.bidirectional or config.model.bidirectional, attention_kernel(config, shape)
    if kernel == "flash":
        choose_version(dropout=config.training.attention_dropout)
    layers, passes = None, None
    if config.model.quantization != "none":
        layers = torch_layer_classes(shape, quantized=True)
    elif layer_backend(config) == "te":
        configure(transformer, config, shape)
        if config.parallel.tp_comm_overlap:
            start_overlap(config, transformer)
        layers, passes = te_layer_classes(shape, with_adapters=adapters is not None), PassSettings.of_run(config)
    stages: list[int | None] = [None] if topology.num_model_chunks == 1 else list(range(topology.num_model_chunks))
    chunks = []
    for stage in stages:
        chunk = EmbeddingModel(transformer, shape, topology, pooling=pooling, normalize=config.embedding.unit_length,
                               bidirectional=bidirectional, vp_stage=stage, head_spec=head_spec, kernel=kernel,
                               layers=layers, passes=passes, dense=dense)
        if adapters is not None:
            add_adapters(chunk, adapters, shape, chunk.global_name)
            if isinstance(chunk.head, RerankerHead) and chunk.head.spec.kind == "score":
                # Like PEFT's modules_to_save: a classifier may be new. The rows of a yes_no head are not: frozen.
                chunk.head.requires_grad_(True)
            if chunk.dense is not None:
                chunk.dense.requires_grad_(True)  # as in Sentence Transformers, whose adapters leave it trained
        mark_tensor_parallel(chunk)
        mark_expert_copies(chunk, config.parallel)
        fuse_activations(chunk)
        chunks.append(chunk.to(device=topology.device, dtype=dtype))
    return chunks


def to_device(micro_batch: MicroBatch, topology: Topology, pooling: ModelPooling, *, kernel: AttentionKernel,
              causal: bool, shape: ModelShape | None = None, passes: PassSettings | None = None) -> DeviceMicroBatch:
    """This rank's part of a micro-batch, with its attention groups and pooling plan, by one asynchronous copy. No
    communication.

    Args:
        shape: the model's shape, for its attention window and first position; None: no window, and positions from 0. A
            model of another shape stops at an assertion.
        passes: of a model in training, to which micro-batches are padded.
    """
    micro_batch = micro_batch if passes is None else passes.pad(micro_batch)
    tokens, valid_rows = micro_batch.token_ids.numel(), micro_batch.outputs
    chunks = context_chunks(tokens, topology.cp_rank, topology.cp_size)
    by_heads = topology.sizes.cp_comm_type == "a2a"  # then attention is over the whole bin
    packed = packed_sequences(micro_batch, context_chunks(tokens, 0, 1) if by_heads else chunks, kernel, causal, shape)
    first_position = 0 if shape is None else shape.position_offset
    plan = local_plan(pooling_plan(micro_batch, pooling), chunks)
    of_texts = text_plan(micro_batch, pooling)
    of_texts = None if of_texts is None else local_plan(of_texts, chunks)
    padding = _select(torch.arange(tokens) >= micro_batch.num_tokens, chunks)
    if topology.sequence_parallel:
        share = padding.numel() // topology.tp_size
        share_bounds = (topology.tp_rank * share, (topology.tp_rank + 1) * share)
        padding = padding[slice(*share_bounds)]
        # A sparse model's tensor-parallel ranks divide the vocabulary, and have all tokens.
        plan = plan if pooling == "splade" else local_plan(plan, (share_bounds,))
        of_texts = None if of_texts is None else local_plan(of_texts, (share_bounds,))
    types = micro_batch.token_types
    return copy_to_device(DeviceMicroBatch(
        token_types=None if types is None else _select(types, chunks)[None],
        token_ids=_select(micro_batch.token_ids, chunks)[None],
        position_ids=_select(text_positions(micro_batch, first_position), chunks)[None], num_tokens=tokens,
        packed=packed, first_position=first_position, padding=padding[None], plan=plan, valid_rows=valid_rows,
        text_plan=of_texts, weight_ids=weight_ids(micro_batch),
        num_rows=int(valid_rows.max()) + 1 if len(valid_rows) else 0), topology.device)


def _select(tokens: Tensor, chunks: tuple[tuple[int, int], ...]) -> Tensor:
    return torch.cat([tokens[start:stop] for start, stop in chunks])
