"""Numbers of parameters on a rank."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_embed.config.schema import ParallelConfig, RunConfig
from megatron_embed.config.vector_format import JointFormat
from megatron_embed.models.dense_settings import DenseSettings, dense_of_run, embedding_width, joint_projection
from megatron_embed.models.families import ModelShape, layers_by_stage
from megatron_embed.models.head_shapes import reranker_head_shapes
from megatron_embed.models.saved_settings import default_pooling
from megatron_embed.models.vocabulary_shape import vocabulary_head_parameters
from megatron_embed.names import HeadKind, ModelPooling
from megatron_embed.planning.shapes import joint_heads_at_hand, modules_at_hand

AdaptedLinears = Mapping[str, tuple[str | None, ...]]
"""Linear layers with adapters, by their names in one layer, as `Adapters.parts` of models/lora_settings.py."""


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Parameters of some layers, split by the ranks that hold copies of them."""

    dense: int = 0
    """Parameters copied over data- and context-parallel ranks."""
    expert: int = 0
    """Parameters of experts, copied over fewer ranks: the expert-data-parallel ones."""

    def __add__(self, other: "Parameters") -> "Parameters":
        return Parameters(dense=self.dense + other.dense, expert=self.expert + other.expert)

    def __mul__(self, times: int) -> "Parameters":
        return Parameters(dense=self.dense * times, expert=self.expert * times)

    @property
    def total(self) -> int:
        return self.dense + self.expert


def norm_parameters(shape: ModelShape, width: int) -> int:
    """Parameters of a norm: the weight, and the bias of a LayerNorm that has one."""
    return width * (2 if shape.norm == "LayerNorm" and shape.norm_bias else 1)


def layer_parameters(shape: ModelShape, sizes: ParallelConfig) -> Parameters:
    """Parameters of one layer on one rank, including those that tensor parallelism does not split (norms, routers)."""
    tp, hidden = sizes.tensor_model_parallel_size, shape.hidden_size
    query, key = shape.num_attention_heads * shape.head_dim, shape.num_query_groups * shape.head_dim
    dense = hidden * (query + 2 * key) // tp + query // tp * hidden \
        + (4 if shape.sublayer_norms else 2) * norm_parameters(shape, hidden)
    if shape.add_qkv_bias or shape.add_bias_linear:
        dense += (query + 2 * key) // tp
    if shape.add_bias_linear:
        dense += hidden
    if shape.qk_layernorm:
        dense += 2 * norm_parameters(shape, shape.head_dim)
    first = shape.ffn_hidden_size * (2 if shape.gated else 1)
    if shape.num_experts:
        etp = sizes.expert_tensor_parallel_size
        each = (first * hidden + shape.ffn_hidden_size * hidden) // etp
        experts = shape.num_experts // sizes.expert_model_parallel_size
        return Parameters(dense=dense + hidden * shape.num_experts, expert=each * experts)
    dense += (first * hidden + shape.ffn_hidden_size * hidden) // tp
    if shape.add_bias_linear:
        dense += first // tp + hidden
    return Parameters(dense=dense)


def embedding_parameters(shape: ModelShape, tp_size: int) -> int:
    """Word embedding, its vocabulary padded to a multiple of `tp_size`, and the other embeddings of encoders."""
    rows = -(-shape.vocab_size // tp_size) + shape.type_vocab_size
    if shape.learned_positions:
        rows += shape.max_position_embeddings
    norm = norm_parameters(shape, shape.hidden_size) if shape.embedding_norm else 0
    return rows * shape.hidden_size + norm


def stage_layers(shape: ModelShape, sizes: ParallelConfig, stage: int) -> int:
    """Layers on pipeline stage `stage` (from 0), over all its virtual stages."""
    stages, virtual = sizes.pipeline_model_parallel_size, sizes.virtual_pipeline_model_parallel_size or 1
    return sum(layers_by_stage(shape.num_layers, stages * virtual)[stage::stages])


def stage_parameters(shape: ModelShape, sizes: ParallelConfig, stage: int) -> Parameters:
    """Parameters of one rank of pipeline stage `stage` (from 0), without a reranker's head and adapters."""
    stages = sizes.pipeline_model_parallel_size
    result = layer_parameters(shape, sizes) * stage_layers(shape, sizes, stage)
    if shape.relative_positions is not None:  # every chunk of the model has a copy
        copies = sizes.virtual_pipeline_model_parallel_size or 1
        heads = shape.num_attention_heads // sizes.tensor_model_parallel_size
        result += Parameters(dense=copies * shape.relative_positions.num_buckets * heads)
    if shape.disentangled_positions is not None:  # the same
        copies = sizes.virtual_pipeline_model_parallel_size or 1
        result += Parameters(dense=copies * (2 * shape.disentangled_positions.span + 2) * shape.hidden_size)
    if stage == 0:
        result += Parameters(dense=embedding_parameters(shape, sizes.tensor_model_parallel_size))
        if not shape.first_attention_norm:
            result += Parameters(dense=-norm_parameters(shape, shape.hidden_size))
    if stage == stages - 1 and not shape.post_norm:
        result += Parameters(dense=norm_parameters(shape, shape.hidden_size))
    return result


@dataclass(frozen=True, kw_only=True)
class Held:
    """Parameters of one rank."""

    frozen: Parameters
    trained: Parameters
    """Parameters with gradient and optimizer state."""

    @property
    def total(self) -> int:
        return self.frozen.total + self.trained.total

    def saved_by(self, config: RunConfig) -> Parameters:
        """Those that a checkpoint holds; over quantized weights it holds no frozen ones."""
        return self.trained if config.model.quantization != "none" else self.frozen + self.trained


def held_parameters(config: RunConfig, shape: ModelShape, stage: int, adapted: AdaptedLinears | None = None) -> Held:
    """Parameters of a rank of pipeline stage `stage` (from 0). `adapted`: linear layers whose adapters are trained."""
    sizes = config.parallel
    whole, head, projection = stage_parameters(shape, sizes, stage), Parameters(), Parameters()
    if stage == sizes.pipeline_model_parallel_size - 1:
        head = Parameters(dense=head_parameters(config, shape))
        projection = Parameters(dense=dense_parameters(config, shape))
        if gives_sparse_vectors(config):
            head = Parameters(dense=vocabulary_head_parameters(shape, sizes.tensor_model_parallel_size))
    if adapted is None:
        return Held(frozen=Parameters(), trained=whole + head + projection)
    adapters = adapter_parameters(shape, sizes, config.lora.rank, adapted) * stage_layers(shape, sizes, stage)
    adapters += projection
    if head_kind(config, shape) == "score":
        return Held(frozen=whole, trained=adapters + head)
    return Held(frozen=whole + head, trained=adapters)  # a trained head's rows for yes and no stay


def head_kind(config: RunConfig, shape: ModelShape) -> HeadKind:
    """Head of a reranker: the configured one, else the family's; another one in the directory differs by a row."""
    return config.reranker.head or ("yes_no" if shape.classifier is None else "score")


def head_parameters(config: RunConfig, shape: ModelShape) -> int:
    """Parameters of a reranker's head, complete on every tensor-parallel rank of the last stage; 0 without one."""
    if not config.workload.has_head:
        return 0
    return sum(map(math.prod, reranker_head_shapes(head_kind(config, shape), shape).values()))


def dense_parameters(config: RunConfig, shape: ModelShape) -> int:
    """Parameters of Dense modules on a rank of the last stage; 0 for a reranker."""
    if config.workload.has_head:
        return 0
    tp_size = config.parallel.tensor_model_parallel_size
    return sum(math.prod(size) // settings.shards(tp_size) for settings in _dense(config, shape)[0]
               for size in settings.shapes.values())


def vector_width(config: RunConfig, shape: ModelShape) -> int:
    """Numbers of an embedding; 1 for a reranker."""
    return 1 if config.workload.has_head else embedding_width(*_dense(config, shape))


def gives_token_vectors(config: RunConfig) -> bool:
    """Whether a run's model gives a vector for every token, as joint models do besides."""
    head = config.embedding.head
    return not config.workload.has_head and (
        head in ("multi_vector", "joint") or (head is None and modules_at_hand(config.model.path)[1] == "tokens"))


def gives_sparse_vectors(config: RunConfig) -> bool:
    """Whether a run's model gives a weight for every token of the vocabulary."""
    head = config.embedding.head
    return not config.workload.has_head and (
        head == "sparse" or (head is None and modules_at_hand(config.model.path)[1] == "splade"))


def dense_rows(config: RunConfig, shape: ModelShape) -> int:
    """Rows of a joint model's text besides those of its tokens; 0 of another model."""
    if config.embedding.head != "joint" or config.workload.has_head:
        return 0
    return -(-shape.hidden_size // vector_width(config, shape))


def _dense(config: RunConfig, shape: ModelShape) -> tuple[tuple[DenseSettings, ...], ModelShape, ModelPooling]:
    """(Dense modules of an embedding run: a new one, or those of a model that is here; the shape; the pooling)."""
    own, own_pooling = modules_at_hand(config.model.path)
    pooling = config.embedding.pooling or own_pooling or default_pooling(shape)
    if config.embedding.head is not None:
        pooling = config.embedding.pooling or (
            default_pooling(shape) if own_pooling in (None, "tokens", "splade") else own_pooling)
        special: dict[str, ModelPooling] = {"multi_vector": "tokens", "sparse": "splade"}
        pooling = special.get(config.embedding.head, pooling)
        if config.embedding.head == "joint":
            heads = joint_heads_at_hand(config.model.path)
            dim = config.embedding.embedding_dim or (shape.hidden_size if heads is None else heads.dim)
            joint = JointFormat(hidden_size=shape.hidden_size, token_dim=dim)
            return (joint_projection(joint),), shape, "mean+tokens"
    new_vectors = pooling == "tokens" and own_pooling != "tokens"
    return dense_of_run(config.embedding, own, shape, pooling, new_vectors=new_vectors), shape, pooling


def adapter_parameters(shape: ModelShape, sizes: ParallelConfig, rank: int, adapted: AdaptedLinears) -> Parameters:
    """Parameters of the adapters of one layer on one rank, split like their linear layers (models/lora.py)."""
    result = Parameters()
    query, key = shape.num_attention_heads * shape.head_dim, shape.num_query_groups * shape.head_dim
    for name, modules in adapted.items():
        is_expert, hidden, width = ".experts." in name, shape.hidden_size, shape.ffn_hidden_size
        split = sizes.expert_tensor_parallel_size if is_expert else sizes.tensor_model_parallel_size
        if name.endswith(("linear_proj", "linear_fc2")):
            inputs = query if name.endswith("linear_proj") else width
            count = rank * (inputs // split + hidden)
        else:
            outputs = (width,) * len(modules)
            if name.endswith("linear_qkv"):
                outputs = (query, key, key) if len(modules) == 3 else (query + 2 * key,)
            # One A for each module; a module that stands for several outputs has a share of B for each.
            count = rank * hidden * len({module for module in modules if module is not None})
            count += sum(rank * (size // split)
                         for module, size in zip(modules, outputs, strict=True) if module is not None)
        if is_expert:
            result += Parameters(expert=count * (shape.num_experts // sizes.expert_model_parallel_size))
        else:
            result += Parameters(dense=count)
    return result


def total_parameters(shape: ModelShape) -> int:
    """Parameters of the backbone: the Hugging Face model without language-model head and pooler."""
    return stage_parameters(shape, ParallelConfig(), 0).total


def active_matrix_parameters(shape: ModelShape) -> int:
    """Parameters of the matrices that a token is multiplied with: layers with only the chosen experts, no embedding."""
    hidden, heads = shape.hidden_size, shape.num_attention_heads
    attention = hidden * shape.head_dim * (heads + 2 * shape.num_query_groups) + heads * shape.head_dim * hidden
    mlp = (3 if shape.gated else 2) * hidden * shape.ffn_hidden_size
    if shape.num_experts:
        mlp = mlp * shape.experts_per_token + hidden * shape.num_experts
    return shape.num_layers * (attention + mlp)
