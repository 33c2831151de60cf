"""Estimated time of an optimizer step: floating-point operations, communication, the pipeline's bubble.

A model of the step, not a measurement: it has not been compared with a GPU. It serves to rank layouts.
"""

from dataclasses import dataclass

from megatron_embed.config.schema import RunConfig
from megatron_embed.models.families import ModelShape, layers_by_stage
from megatron_embed.planning.hardware import GPU, GPUS_PER_NODE
from megatron_embed.planning.memory import DTYPE_BYTES, PIPELINE_FILL, Grid, first_pass_micro_batches
from megatron_embed.planning.parameters import AdaptedLinears, active_matrix_parameters, held_parameters

EFFICIENCY = 0.55
"""Share of the peak that large matrix products reach, without communication (Megatron-LM reports 41-48 % with
communication for GPT on H100 in bfloat16)."""
TOKENS_FOR_HALF = 512
"""Tokens of a micro-batch at which products reach half of that, since smaller ones do not fill a GPU. Multiplied by
the root of the tensor-parallel size, which makes the matrices narrower."""
EXPERT_EFFICIENCY = 0.35
"""The same for experts, whose matrices are narrow; estimated with one product after the other, not measured."""

HOST_GB_PER_SECOND = 25
"""Bandwidth per GPU, of eight per node, between GPU and host memory, and of host memory itself."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step, by activity."""

    compute: float
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
        return (self.compute + self.tensor + self.context + self.expert + self.bubble + self.data + self.optimizer)


def forward_flops(shape: ModelShape, tokens: float, squared_lengths: float, *, causal: bool) -> float:
    """FLOPs of one forward pass through all layers over texts of `tokens` tokens, whose squared lengths sum to
    `squared_lengths`.

    Two per token and parameter of a matrix, and attention's two products of every query with every key, half of them if
    it is causal. Norms, rotations and pooling are not counted, nor the word embedding.
    """
    pairs = squared_lengths / 2 if causal else squared_lengths
    return 2.0 * active_matrix_parameters(shape) * tokens + 4.0 * shape.num_layers * shape.num_attention_heads * \
        shape.head_dim * pairs


def forward_passes(config: RunConfig, grid: Grid) -> int:
    """Forward passes per step: two over several micro-batches if the loss couples them; recomputation adds one."""
    return 1 + has_first_pass(config, grid) + (config.training.recompute == "full")


def has_first_pass(config: RunConfig, grid: Grid) -> bool:
    """Whether a step embeds all texts before the pass that has gradients."""
    return grid.num_microbatches > 1 and config.objective.couples_batch


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
    return config.training.global_batch_size * forward * (1.0 + backward_cost(adapted))


def step_time(config: RunConfig, shape: ModelShape, grid: Grid, gpu: GPU,
              adapted: AdaptedLinears | None = None) -> StepTime:
    """Seconds of one optimizer step on `grid.gpus` GPUs, eight per node."""
    sizes = config.parallel
    tp, pp, cp = (sizes.tensor_model_parallel_size, sizes.pipeline_model_parallel_size, sizes.context_parallel_size)
    forwards, backward = forward_passes(config, grid), backward_cost(adapted)
    rank_tokens = grid.micro_batch_tokens / cp
    merged = first_pass_micro_batches(config, shape, grid) if has_first_pass(config, grid) else 1
    one_pass = model_flops(config, shape, adapted) / (1 + backward) / grid.gpus / (gpu.peak_tflops * 1e12)
    compute = one_pass / _efficiency(shape, merged * rank_tokens, tp) + one_pass * (forwards + backward - 1) / \
        _efficiency(shape, rank_tokens, tp)
    # Bytes that a rank sends per layer, micro-batch and pass of the hidden states of its tokens.
    state = rank_tokens * shape.hidden_size * DTYPE_BYTES[config.model.dtype]
    # Stages, including virtual ones, take turns: all wait for the one with most layers.
    virtual = sizes.virtual_pipeline_model_parallel_size or 1
    most = max(layers_by_stage(shape.num_layers, pp * virtual)) * virtual
    compute *= most * pp / shape.num_layers
    rounds = grid.num_microbatches * most
    tensor = rounds * (4 * forwards + 6) * state * (tp - 1) / tp / _bandwidth(gpu, tp)
    keys = state / shape.hidden_size * 2 * shape.num_query_groups * shape.head_dim / tp
    context = rounds * (forwards + 2) * keys * (cp - 1) / _bandwidth(gpu, tp * cp)
    ep = sizes.expert_model_parallel_size
    expert = rounds * 2 * (forwards + 1) * state / tp * shape.experts_per_token * (ep - 1) / ep / _bandwidth(
        gpu, ep * sizes.expert_tensor_parallel_size)
    first_share, count = 1 / (forwards + backward), grid.num_microbatches
    first_count = max(-(-count // merged), min(count, PIPELINE_FILL * pp))
    bubble = (compute + tensor + context + expert) * (pp - 1) / virtual * (
        first_share / first_count + (1 - first_share) / count)
    held = held_parameters(config, shape, 0, adapted).trained.total
    moved = held * (4 + DTYPE_BYTES[config.model.dtype]) * (grid.dp * cp - 1) / (grid.dp * cp)
    data = (moved + config.workload.gathered_documents * shape.hidden_size * 4 * 2) / _bandwidth(gpu, grid.gpus)
    # An update reads gradient, main parameter and moments and writes the latter; offloaded, six more bytes are copied.
    share = held / (grid.dp * cp if config.optimizer.distributed else 1)
    optimizer = (share * 30 / (HOST_GB_PER_SECOND * 1e9) if config.optimizer.cpu_offload
                 else share * 24 / (gpu.memory_gb_per_second * 1e9))
    return StepTime(compute=compute, tensor=tensor, context=context, expert=expert, bubble=bubble, data=data,
                    optimizer=optimizer)


def _efficiency(shape: ModelShape, tokens: float, tp: int) -> float:
    """Share of the peak that the products over so many tokens of a rank reach."""
    return (EXPERT_EFFICIENCY if shape.num_experts else EFFICIENCY) * tokens / (tokens + TOKENS_FOR_HALF * tp**0.5)


def _bandwidth(gpu: GPU, span: int) -> float:
    """Bytes per second between `span` neighbouring ranks, as large messages get them."""
    return 0.7e9 * (gpu.nvlink_gb_per_second if span <= GPUS_PER_NODE else gpu.network_gb_per_second)
