"""How long an optimizer step should take: floating-point operations, what is communicated, the pipeline's bubble.

A model of the step, not a measurement: nothing here has been compared with a GPU. Its use is to order layouts.
"""

from dataclasses import dataclass

from megatron_embed.config.schema import RunConfig
from megatron_embed.models.families import ModelShape
from megatron_embed.planning.hardware import GPU, GPUS_PER_NODE
from megatron_embed.planning.memory import DTYPE_BYTES, Grid
from megatron_embed.planning.parameters import active_matrix_parameters, stage_parameters

EFFICIENCY = 0.55
"""Part of the peak that large matrix products reach, communication not counted (41-48 % all in is what Megatron-LM
reports for GPT on H100 in bfloat16)."""
TOKENS_FOR_HALF = 512
"""Tokens of a micro-batch at which products reach half of that: smaller ones do not fill a GPU. Times the root of
the tensor-parallel size, which makes the matrices narrower."""
EXPERT_EFFICIENCY = 0.35
"""The same for experts, whose products are small, one after the other."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step, by what they are spent on."""

    compute: float
    tensor: float
    """All-gathers and reduce-scatters of tensor and sequence parallelism."""
    context: float
    expert: float
    """All-to-alls between expert-parallel ranks."""
    bubble: float
    """What a pipeline's ranks wait while it fills and drains."""
    data: float
    """Reduce-scatter of gradients, all-gather of parameters, documents of the loss."""
    optimizer: float

    @property
    def total(self) -> float:
        return (self.compute + self.tensor + self.context + self.expert + self.bubble + self.data + self.optimizer)


def forward_flops_per_token(shape: ModelShape, length: int) -> float:
    """Of one forward pass through all layers, for a token of a text of `length` tokens.

    Two per parameter of a matrix; attention's two products with `length` keys, half of them where it is causal.
    """
    keys = length if shape.bidirectional else length / 2
    return 2.0 * active_matrix_parameters(shape) + 4.0 * shape.num_layers * shape.num_attention_heads * \
        shape.head_dim * keys


def passes(config: RunConfig, grid: Grid) -> tuple[int, int]:
    """(forward passes, backward passes, each twice a forward) of a step: two passes read every micro-batch twice."""
    forwards = 2 if grid.num_microbatches > 1 and config.objective.couples_batch else 1
    return forwards + (config.training.recompute == "full"), 1


def step_tokens(config: RunConfig) -> int:
    """Tokens of the global batch where no text is shorter than allowed."""
    per_query = config.data.query_max_length + (1 + config.data.num_negatives) * config.data.document_max_length
    return config.training.global_batch_size * per_query


def model_flops(config: RunConfig, shape: ModelShape) -> float:
    """Of one optimizer step with one forward and one backward pass: what a model FLOP utilization counts."""
    queries = config.training.global_batch_size
    flops = queries * config.data.query_max_length * forward_flops_per_token(shape, config.data.query_max_length)
    documents = queries * (1 + config.data.num_negatives) * config.data.document_max_length
    return 3.0 * (flops + documents * forward_flops_per_token(shape, config.data.document_max_length))


def step_time(config: RunConfig, shape: ModelShape, grid: Grid, gpu: GPU) -> StepTime:
    """Seconds of one optimizer step on `grid.gpus` GPUs of eight to a node."""
    sizes = config.parallel
    tp, pp, cp = (sizes.tensor_model_parallel_size, sizes.pipeline_model_parallel_size, sizes.context_parallel_size)
    forwards, backwards = passes(config, grid)
    rank_tokens = grid.micro_batch_tokens / cp
    efficiency = (EXPERT_EFFICIENCY if shape.num_experts else EFFICIENCY) * \
        rank_tokens / (rank_tokens + TOKENS_FOR_HALF * tp**0.5)
    compute = model_flops(config, shape) / 3.0 * (forwards + 2 * backwards) / grid.gpus / (
        gpu.peak_tflops * 1e12 * efficiency)
    # Bytes that a rank sends per layer, micro-batch and pass of the hidden states of its tokens.
    state = rank_tokens * shape.hidden_size * DTYPE_BYTES[config.model.dtype]
    rounds = grid.num_microbatches * shape.num_layers / pp
    tensor = rounds * (4 * forwards + 6 * backwards) * state * (tp - 1) / tp / _bandwidth(gpu, tp)
    keys = state / shape.hidden_size * 2 * shape.num_query_groups * shape.head_dim / tp
    context = rounds * (forwards + 2 * backwards) * keys * (cp - 1) / _bandwidth(gpu, tp * cp)
    ep = sizes.expert_model_parallel_size
    expert = rounds * 2 * (forwards + backwards) * state / tp * shape.experts_per_token * (ep - 1) / ep / _bandwidth(
        gpu, ep * sizes.expert_tensor_parallel_size)
    virtual = sizes.virtual_pipeline_model_parallel_size or 1
    bubble = (compute + tensor + context + expert) * (pp - 1) / (virtual * grid.num_microbatches)
    held = stage_parameters(shape, sizes, 0).total
    moved = held * (4 + DTYPE_BYTES[config.model.dtype]) * (grid.dp * cp - 1) / (grid.dp * cp)
    documents = config.training.global_batch_size * (1 + config.data.num_negatives) * shape.hidden_size * 4 * 2
    data = (moved + documents) / _bandwidth(gpu, grid.gpus)
    optimizer = held * 24 / (grid.dp * cp if config.optimizer.distributed else 1) / (gpu.memory_gb_per_second * 1e9)
    return StepTime(compute=compute, tensor=tensor, context=context, expert=expert, bubble=bubble, data=data,
                    optimizer=optimizer)


def _bandwidth(gpu: GPU, span: int) -> float:
    """Bytes per second between `span` neighbouring ranks, as large messages get them."""
    return 0.7e9 * (gpu.nvlink_gb_per_second if span <= GPUS_PER_NODE else gpu.network_gb_per_second)
