"""Estimated time of an optimizer step: floating-point operations, memory traffic, launches, communication, the
pipeline's bubble.

A model of the step, not a measurement: it has not been compared with a GPU. It serves to rank layouts. Bytes and
launches besides matrix products are those that `tools/count_step.py` counts (docs/performance.md).
"""

from dataclasses import dataclass

from megatron_embed.config.schema import RunConfig
from megatron_embed.models.families import ModelShape, layers_by_stage
from megatron_embed.models.vocabulary_shape import MASKED_LM
from megatron_embed.planning.hardware import GPU, GPUS_PER_NODE
from megatron_embed.planning.memory import DTYPE_BYTES, PIPELINE_FILL, Grid, first_pass_micro_batches
from megatron_embed.planning.parameters import (
    AdaptedLinears,
    active_matrix_parameters,
    gives_sparse_vectors,
    held_parameters,
    vector_width,
)
from megatron_embed.planning.quantized import layer_linears, restoring_traffic

EFFICIENCY = 0.75
"""Share of the peak that large matrix products reach alone: with TOKENS_FOR_HALF, 650 TFLOP/s on an H100 in
micro-batches of 5,248 tokens at TP 2."""
TOKENS_FOR_HALF = 512
"""Tokens of a micro-batch at which products reach half of that, since smaller ones do not fill a GPU. Multiplied by
the root of the tensor-parallel size, which makes the matrices narrower."""
EXPERT_EFFICIENCY = 0.35
"""The same for experts, whose matrices are narrow; estimated with one product after the other, not measured."""

MEMORY_EFFICIENCY = 0.75
"""Share of the memory's bandwidth that element-wise kernels reach: 2.5 TB/s on an H100."""
SECONDS_PER_LAUNCH, SECONDS_PER_COLLECTIVE = 15e-6, 10e-6
"""Seconds of the host for a launch from Python, and of a collective besides its bytes."""
EXPOSED_WITH_BACKWARD = 2 / 3
"""Share of tensor parallelism's communication that no product hides, where Megatron's linears hide some of the backward
pass's. The first pass hides none."""
LAUNCHES = {"fused": (15, 34), "plain": (62, 104)}
"""Launches of a layer, forward and backward, collectives included, with and without fused kernels; counted for
qwen3_8b_embed_tp2_8xh100."""
EXPERT_LAUNCHES = (36, 47)
"""Launches that a layer of experts has besides those of a dense one, forward and backward: their products are grouped,
but for two for the gradients of each expert's weights; counted for qwen3_30b_a3b_embed_pp2_ep8_16xh100."""
PLAIN_TRAFFIC = (4.4, 8.0)
"""Bytes that plain operators move for each byte of the fused kernels, forward and backward; counted likewise."""

HOST_GB_PER_SECOND = 25
"""Bandwidth per GPU, of eight per node, between GPU and host memory, and of host memory itself."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step, by activity."""

    compute: float
    """Matrix products and attention."""
    elementwise: float
    """Everything else on the GPU: memory traffic of norms, activations, residuals, embeddings."""
    launches: float
    """Waiting time of a GPU for the host, where short micro-batches end before the host has launched the next ones."""
    tensor: float
    """All-gathers and reduce-scatters of tensor and sequence parallelism."""
    context: float
    expert: float
    """All-to-alls between expert-parallel ranks."""
    bubble: float
    """Waiting time of a pipeline's ranks while it fills and drains."""
    data: float
    """Reduce-scatter of gradients, all-gather of parameters, documents of the loss."""
    optimizer: float

    @property
    def total(self) -> float:
        return (self.compute + self.elementwise + self.launches + self.tensor + self.context + self.expert
                + self.bubble + self.data + self.optimizer)


def forward_flops(shape: ModelShape, tokens: float, squared_lengths: float, *, causal: bool) -> float:
    """FLOPs of one forward pass through all layers over texts of `tokens` tokens, whose squared lengths sum to
    `squared_lengths`.

    Two per token and parameter of a matrix, and attention's two products of every query with every key, half of them if
    it is causal, none outside the attention window. Norms, rotations and pooling are not counted, nor the word
    embedding.
    """
    pairs = squared_lengths / 2 if causal else squared_lengths
    local = pairs
    if shape.sliding_window is not None:
        local = min(pairs, tokens * (shape.sliding_window if causal else 2 * shape.sliding_window + 1))
    all_pairs = (shape.num_layers - shape.local_layers) * pairs + shape.local_layers * local
    return 2.0 * active_matrix_parameters(shape) * tokens + 4.0 * shape.num_attention_heads * shape.head_dim * all_pairs


def forward_passes(config: RunConfig, grid: Grid) -> int:
    """Forward passes per step: two over several micro-batches if the loss couples them; recomputation adds one."""
    return 1 + has_first_pass(config, grid) + (config.training.recompute == "full")


def has_first_pass(config: RunConfig, grid: Grid) -> bool:
    """Whether a step embeds all texts before the pass that has gradients."""
    return grid.num_microbatches > 1 and config.workload.couples_batch


BACKWARD_COST, BACKWARD_COST_FROZEN = 2, 1
"""Cost of a backward pass in forward passes: gradients of inputs and weights; with frozen weights, only of inputs."""


def backward_cost(adapted: AdaptedLinears | None) -> int:
    """Cost for a run that trains all parameters, or adapters on the linear layers `adapted`."""
    return BACKWARD_COST if adapted is None else BACKWARD_COST_FROZEN


def step_tokens(config: RunConfig) -> int:
    """Tokens of the global batch if every text has its maximum length."""
    return config.training.global_batch_size * config.workload.tokens_per_query


def model_flops(config: RunConfig, shape: ModelShape, adapted: AdaptedLinears | None = None) -> float:
    """FLOPs of one optimizer step with one forward and one backward pass, as MFU counts them."""
    causal = not (shape.bidirectional or config.model.bidirectional)
    forward = sum(texts * forward_flops(shape, tokens, tokens**2, causal=causal)
                  for texts, tokens in config.workload.texts_per_query)
    if gives_sparse_vectors(config):  # the vocabulary head, and the square layer before it in encoders
        head = shape.vocab_size * shape.hidden_size + shape.hidden_size**2 * (shape.family in MASKED_LM)
        forward += 2.0 * head * config.workload.tokens_per_query
    return config.training.global_batch_size * forward * (1.0 + backward_cost(adapted))


def step_time(config: RunConfig, shape: ModelShape, grid: Grid, gpu: GPU,
              adapted: AdaptedLinears | None = None) -> StepTime:
    """Seconds of one optimizer step on `grid.gpus` GPUs, eight per node."""
    sizes, count = config.parallel, grid.num_microbatches
    pp, cp = sizes.pipeline_model_parallel_size, sizes.context_parallel_size
    first_count, first = count, PassTime()
    if has_first_pass(config, grid):
        first_count = max(-(-count // first_pass_micro_batches(config, shape, grid)), min(count, PIPELINE_FILL * pp))
        first = pass_time(config, shape, grid, gpu, adapted, merged=count / first_count) * first_count
    second = pass_time(config, shape, grid, gpu, adapted, with_backward=True) * count
    both = first + second
    virtual = sizes.virtual_pipeline_model_parallel_size or 1
    bubble = (pp - 1) / virtual * (first.total / first_count + second.total / count)
    held = held_parameters(config, shape, 0, adapted).trained.total
    moved = held * (4 + DTYPE_BYTES[config.model.dtype]) * (grid.dp * cp - 1) / (grid.dp * cp)
    documents = config.workload.gathered_documents * vector_width(config, shape)
    data = (moved + documents * 4 * 2) / _bandwidth(gpu, grid.gpus)
    # An update reads gradient, main parameter and moments and writes the latter; offloaded, six more bytes are copied.
    share = held / (grid.dp * cp if config.optimizer.distributed else 1)
    optimizer = (share * 30 / (HOST_GB_PER_SECOND * 1e9) if config.optimizer.cpu_offload
                 else share * 24 / (gpu.memory_gb_per_second * 1e9))
    return StepTime(**vars(both), bubble=bubble, data=data, optimizer=optimizer)


@dataclass(frozen=True, kw_only=True)
class PassTime:
    """Seconds of one pass on a rank, by activity; see StepTime."""

    compute: float = 0.0
    elementwise: float = 0.0
    launches: float = 0.0
    tensor: float = 0.0
    context: float = 0.0
    expert: float = 0.0

    @property
    def total(self) -> float:
        return sum(vars(self).values())

    def __add__(self, other: "PassTime") -> "PassTime":
        return PassTime(**{name: value + vars(other)[name] for name, value in vars(self).items()})

    def __mul__(self, times: int) -> "PassTime":
        return PassTime(**{name: value * times for name, value in vars(self).items()})


def pass_time(config: RunConfig, shape: ModelShape, grid: Grid, gpu: GPU, adapted: AdaptedLinears | None, *,
              merged: float = 1.0, with_backward: bool = False) -> PassTime:
    """Seconds of a pass over `merged` micro-batches as one on a rank, forward or both, recomputation included.

    Stages, including virtual ones, take turns: all wait for the one with most layers.
    """
    sizes = config.parallel
    tp, pp, cp = (sizes.tensor_model_parallel_size, sizes.pipeline_model_parallel_size, sizes.context_parallel_size)
    ep, virtual = sizes.expert_model_parallel_size, sizes.virtual_pipeline_model_parallel_size or 1
    layers = max(layers_by_stage(shape.num_layers, pp * virtual)) * virtual
    tokens, backward = merged * grid.micro_batch_tokens / cp, backward_cost(adapted)
    forwards = 1 + (with_backward and config.training.recompute == "full")
    forward = model_flops(config, shape, adapted) / (1 + backward) / grid.num_microbatches / grid.gpus * merged
    compute = (forward * (forwards + backward * with_backward) * layers * pp / shape.num_layers
               / (gpu.peak_tflops * 1e12) / _efficiency(shape, tokens, tp))
    forward_bytes, backward_bytes = elementwise_bytes(config, shape)
    launches = layer_launches(config, shape)
    traffic = layers * tokens * (forwards * forward_bytes + with_backward * backward_bytes)
    traffic += vocabulary_bytes(config, shape, adapted) * with_backward
    traffic += layers * restoring_traffic(config, shape, DTYPE_BYTES[config.model.dtype]) * (forwards + with_backward)
    traffic += layers * expert_copies(config, shape) * (forwards + with_backward)
    elementwise = traffic / (MEMORY_EFFICIENCY * gpu.memory_gb_per_second * 1e9)
    # Bytes that a rank sends per layer and pass of the hidden states of its tokens.
    state = tokens * shape.hidden_size * DTYPE_BYTES[config.model.dtype]
    exchanges = 4 * forwards + 6 * with_backward
    exposed = EXPOSED_WITH_BACKWARD if with_backward else 1.0
    tensor = layers * exchanges * (tp > 1) * exposed * (
        state * (tp - 1) / tp / _bandwidth(gpu, tp) + SECONDS_PER_COLLECTIVE)
    keys, sent = 2 * shape.num_query_groups * shape.head_dim / tp, cp - 1.0
    if sizes.cp_comm_type == "a2a":  # queries, keys, values and the result, of which a rank keeps its share
        keys, sent = keys + 2 * shape.num_attention_heads * shape.head_dim / tp, (cp - 1) / cp
    context = layers * (forwards + (1 if sizes.cp_comm_type == "a2a" else 2) * with_backward) * sent * keys * (
        state / shape.hidden_size / _bandwidth(gpu, tp * cp))
    expert = layers * 2 * (forwards + with_backward) * state / tp * shape.experts_per_token * (ep - 1) / ep / \
        _bandwidth(gpu, ep * sizes.expert_tensor_parallel_size)
    device = compute + elementwise + tensor + context + expert
    host = layers * SECONDS_PER_LAUNCH * (forwards * launches[0] + with_backward * launches[1])
    return PassTime(compute=compute, elementwise=elementwise, launches=max(0.0, host - device), tensor=tensor,
                    context=context, expert=expert)


def elementwise_bytes(config: RunConfig, shape: ModelShape) -> tuple[float, float]:
    """Bytes that a layer moves per token besides matrix products, attention and communication, forward and backward, on
    a tensor-parallel rank."""
    element, tp = DTYPE_BYTES[config.model.dtype], config.parallel.tensor_model_parallel_size
    hidden, ffn, key = shape.hidden_size, shape.ffn_hidden_size, shape.num_query_groups * shape.head_dim
    query = shape.num_attention_heads * shape.head_dim
    mixed = query + 2 * key
    if shape.norm == "RMSNorm":
        # A norm and a sum; the next norm with its sum. Backward, each with the residual's gradient.
        forward, backward = 9.0 * hidden, 8.0 * hidden
    else:
        forward, backward = 14.0 * hidden, 14.0 * hidden
    if shape.rotary_base is not None:
        forward += mixed + query + key
        backward += (3 if shape.qk_layernorm else 2) * mixed
    else:
        backward += 2 * mixed
    if shape.num_experts:
        # Tokens sorted to their experts and back, and weighted.
        chosen = shape.experts_per_token * tp / config.parallel.expert_tensor_parallel_size
        forward, backward = forward + chosen * (6 * hidden + 6 * ffn), backward + chosen * (6 * hidden + 10 * ffn)
    else:
        forward, backward = forward + (3 if shape.gated else 2) * ffn, backward + (5 if shape.gated else 4) * ffn
    plain = PLAIN_TRAFFIC if config.model.fused_kernels == "off" else (1.0, 1.0)
    return element * forward / tp * plain[0], element * backward / tp * plain[1]


def expert_copies(config: RunConfig, shape: ModelShape) -> float:
    """Bytes that a layer moves, in each direction and however few tokens there are, to copy its experts' weights side
    by side for a grouped product; Transformer Engine's and a rank's only expert need no copy."""
    if not shape.num_experts or config.model.backend == "te":
        return 0.0
    weights = [linear.weights for linear in layer_linears(config, shape)[2:]]
    return 2.0 * DTYPE_BYTES[config.model.dtype] * sum(weights) * (len(weights) > 2)


def vocabulary_bytes(config: RunConfig, shape: ModelShape, adapted: AdaptedLinears | None) -> float:
    """Bytes that the gradient of the word embedding moves per micro-batch: written, and added to the float32 buffer."""
    if adapted is not None:
        return 0.0
    element = DTYPE_BYTES[config.model.dtype]
    return (2 * element + 4) * shape.vocab_size * shape.hidden_size / config.parallel.tensor_model_parallel_size


def layer_launches(config: RunConfig, shape: ModelShape) -> tuple[float, float]:
    """Launches of a layer on a rank, forward and backward."""
    forward, backward = LAUNCHES["plain" if config.model.fused_kernels == "off" else "fused"]
    if not shape.num_experts:
        return forward, backward
    experts = shape.num_experts / config.parallel.expert_model_parallel_size
    return forward + EXPERT_LAUNCHES[0], backward + EXPERT_LAUNCHES[1] + 2 * experts


def _efficiency(shape: ModelShape, tokens: float, tp: int) -> float:
    """Share of the peak that the products over so many tokens of a rank reach."""
    return (EXPERT_EFFICIENCY if shape.num_experts else EFFICIENCY) * tokens / (tokens + TOKENS_FOR_HALF * tp**0.5)


def _bandwidth(gpu: GPU, span: int) -> float:
    """Bytes per second between `span` neighbouring ranks, as large messages get them."""
    return 0.7e9 * (gpu.nvlink_gb_per_second if span <= GPUS_PER_NODE else gpu.network_gb_per_second)
