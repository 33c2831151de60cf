"""Layouts of a run on a number of GPUs: which are possible, which fit, and which should be fastest."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_embed.config.schema import ParallelConfig, RunConfig
from megatron_embed.errors import ConfigError
from megatron_embed.models.families import ModelShape
from megatron_embed.planning.flops import StepTime, step_time
from megatron_embed.planning.hardware import GPU, GPUS_PER_NODE
from megatron_embed.planning.memory import Memory, grid_of, worst_stage
from megatron_embed.planning.parameters import AdaptedLinears
from megatron_embed.rounding import round_up

MOST_PROPOSED = 5
"""Layouts that a plan proposes."""
LONG_TEXT = 4096
"""Tokens of the longest text from which on context parallelism is tried; below, it only adds communication."""
TOKEN_BUDGETS = (2048, 4096, 8192, 16384)
"""Tokens of a micro-batch in proposals for a run without `training.micro_batch_tokens`."""
BUDGET_STEP = 1024
"""Proposed and advised budgets are multiples of it, so that the eighths, the sizes of micro-batches, are multiples of
128."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A layout with its memory and step time."""

    config: RunConfig
    stage: int
    """The pipeline stage that needs most memory."""
    memory: Memory
    time: StepTime
    fits: bool


def plan_layout(config: RunConfig, shape: ModelShape, gpus: int, gpu: GPU,
                adapted: AdaptedLinears | None = None) -> Plan:
    """Memory and step time of a possible layout. `adapted`: linear layers whose adapters are trained."""
    grid = grid_of(config, gpus)
    stage, memory = worst_stage(config, shape, grid, adapted)
    return Plan(config=config, stage=stage, memory=memory, time=step_time(config, shape, grid, gpu, adapted),
                fits=memory.total <= gpu.memory_gib * 2**30)


def is_possible(config: RunConfig, shape: ModelShape | None, gpus: int) -> bool:
    """Whether training would start with this layout; planning.advice.explain_impossible raises the reason if not.

    Args:
        shape: None if the model is not known; then only the sizes are compared with each other.
    """
    sizes, training = config.parallel, config.training
    tp, pp, cp = (sizes.tensor_model_parallel_size, sizes.pipeline_model_parallel_size, sizes.context_parallel_size)
    virtual = sizes.virtual_pipeline_model_parallel_size or 1
    if gpus % (tp * pp * cp) or gpus % (sizes.expert_model_parallel_size * sizes.expert_tensor_parallel_size * pp):
        return False
    if (virtual > 1 and pp == 1) or (shape is not None and not divides(sizes, shape)):
        return False
    dp = gpus // (tp * pp * cp)
    if training.micro_batch_tokens is not None:
        return training.global_batch_size % dp == 0
    if training.global_batch_size % (training.micro_batch_size * dp):
        return False
    return virtual == 1 or training.global_batch_size // (training.micro_batch_size * dp) % pp == 0


def divides(sizes: ParallelConfig, shape: ModelShape) -> bool:
    """Whether a layout can split the model; the number of layers need not be divisible by the stages."""
    tp, ep, etp = (sizes.tensor_model_parallel_size, sizes.expert_model_parallel_size,
                   sizes.expert_tensor_parallel_size)
    stages = sizes.pipeline_model_parallel_size * (sizes.virtual_pipeline_model_parallel_size or 1)
    if shape.num_layers < stages or shape.num_attention_heads % tp or shape.num_query_groups % tp:
        return False
    if shape.hidden_size % tp and sizes.sequence_parallel:
        return False
    if sizes.cp_comm_type == "a2a" and (shape.num_query_groups // tp) % sizes.context_parallel_size:
        return False
    if shape.num_experts:
        return shape.num_experts % ep == 0 and shape.ffn_hidden_size % etp == 0 and (
            tp == 1 or bool(sizes.sequence_parallel))
    return shape.ffn_hidden_size % tp == 0 and ep == 1 and etp == 1


def propose(config: RunConfig, shape: ModelShape, gpus: int, gpu: GPU, adapted: AdaptedLinears | None = None,
            accepts: Callable[[RunConfig], bool] = lambda candidate: True) -> list[Plan]:
    """The MOST_PROPOSED fastest layouts that fit, one per set of parallel sizes, with the same global batch.

    Args:
        adapted: linear layers whose adapters are trained; None: every parameter is.
        accepts: a further check that training makes of a configuration.
    """
    best: dict[ParallelConfig, Plan] = {}
    for candidate in candidates(config, shape, gpus):
        plan = plan_layout(candidate, shape, gpus, gpu, adapted)
        sizes = candidate.parallel
        if not plan.fits or not accepts(candidate):
            continue
        if sizes not in best or plan.time.total < best[sizes].time.total:
            best[sizes] = plan
    return sorted(best.values(), key=lambda plan: plan.time.total)[:MOST_PROPOSED]


def candidates(config: RunConfig, shape: ModelShape, gpus: int) -> Iterator[RunConfig]:
    """Every possible combination of tensor, pipeline, context and expert parallelism, micro-batch and recomputation.

    The number of layers need not be divisible by the stages. Context parallelism is varied for long texts, see
    LONG_TEXT, within a node.
    """
    powers = [2**power for power in range(gpus.bit_length()) if 2**power <= gpus]
    tensor = [size for size in powers if size <= GPUS_PER_NODE]
    pipeline = [size for size in range(1, min(gpus, shape.num_layers, 16) + 1) if gpus % size == 0]
    expert = [size for size in powers if shape.num_experts and shape.num_experts % size == 0] or [1]
    longest = max(tokens for _, tokens in config.workload.texts_per_query)
    context = tensor if longest >= LONG_TEXT else [config.parallel.context_parallel_size]
    for tp, pp, cp, ep, recompute in itertools.product(tensor, pipeline, context, expert, ("none", "full")):
        if longest >= LONG_TEXT and tp * cp > GPUS_PER_NODE:
            continue
        for virtual in (None, *(size for size in (2, 4, 5) if pp > 1 and pp * size <= shape.num_layers)):
            sizes = dataclasses.replace(
                config.parallel, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp,
                context_parallel_size=cp,
                expert_model_parallel_size=ep, virtual_pipeline_model_parallel_size=virtual)
            for micro in micro_batches(config, gpus // (tp * pp * cp)):
                training = dataclasses.replace(config.training, recompute=recompute, **micro)
                candidate = dataclasses.replace(config, parallel=sizes, training=training)
                if is_possible(candidate, shape, gpus):
                    yield candidate


def micro_batches(config: RunConfig, dp: int) -> list[dict[str, int]]:
    """Micro-batches to compare: the given token budget and ones of about a quarter to twice of it, large ones multiples
    of BUDGET_STEP; without one, TOKEN_BUDGETS that a data-parallel rank can fill, and if it can fill none, numbers of
    queries by powers of two."""
    tokens, size = config.training.micro_batch_tokens, config.training.micro_batch_size
    least = least_budget(config)
    if tokens is not None:
        others = [tokens * factor // 4 for factor in (1, 2, 8) if tokens * factor % 4 == 0]
        rounded = [budget if budget < BUDGET_STEP else round_up(budget, BUDGET_STEP) for budget in others]
        return [{"micro_batch_tokens": budget} for budget in sorted({tokens, *rounded}) if budget >= least]
    share = config.training.global_batch_size * config.workload.tokens_per_query // max(dp, 1)
    budgets = [{"micro_batch_tokens": budget} for budget in TOKEN_BUDGETS if least <= budget <= share]
    return budgets or [{"micro_batch_size": 2**power} for power in range(8) if 2**power <= max(16 * size, 1)]


def least_budget(config: RunConfig) -> int:
    """Tokens that a micro-batch must hold if every text has its maximum length: the longest text, or a query with all
    of its documents where these stay together."""
    return config.workload.least_tokens(None)[0] if config.workload.couples_batch else config.workload.tokens_per_query


def describe(sizes: ParallelConfig) -> str:
    """The sizes above 1, abbreviated; the remaining ranks are data-parallel."""
    values = {"tp": sizes.tensor_model_parallel_size, "pp": sizes.pipeline_model_parallel_size,
              "vpp": sizes.virtual_pipeline_model_parallel_size or 1, "cp": sizes.context_parallel_size,
              "ep": sizes.expert_model_parallel_size, "etp": sizes.expert_tensor_parallel_size}
    return " ".join(f"{name}{value}" for name, value in values.items() if value > 1) or "data-parallel only"


def check_possible(config: RunConfig, shape: ModelShape | None, gpus: int) -> None:
    """Raises ConfigError if the layout is not possible and no other check has raised the reason."""
    if not is_possible(config, shape, gpus):
        raise ConfigError(f"parallel: {describe(config.parallel)} is not possible for this model on {gpus} GPUs; see "
                          "the layouts that `plan` proposes")
