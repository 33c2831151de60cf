"""The token budget that a plan advises for `training.micro_batch_tokens`."""

import dataclasses
import math
from collections.abc import Callable

from megatron_embed.config.schema import RunConfig
from megatron_embed.models.families import ModelShape
from megatron_embed.planning.hardware import GPU
from megatron_embed.planning.layouts import BUDGET_STEP, Plan, is_possible, least_budget, plan_layout
from megatron_embed.planning.memory import grid_of
from megatron_embed.planning.parameters import AdaptedLinears
from megatron_embed.rounding import round_up

MOST_TOKENS = 16384
"""Larger micro-batches fill a GPU no better, and fewer of them are less full and lengthen a pipeline's bubble."""
LEAST_COUNT = 48
"""Micro-batches that a rank's step has at least if all texts have their maximum length. If the texts are a third as
long there are 16, and the last one, half empty on average, wastes 3 % of the step. Not for losses that keep queries
whole, whose micro-batches end where the next query does not fit."""
MEMORY_SHARE = 0.9
"""Share of the GPU's memory that an advised budget may need, since activations are an estimate."""


def advised_budget(config: RunConfig, shape: ModelShape, gpus: int, gpu: GPU, adapted: AdaptedLinears | None = None,
                   accepts: Callable[[RunConfig], bool] = lambda candidate: True) -> Plan | None:
    """The layout with the token budget that should be fastest; None: no budget leaves enough memory.

    Args:
        adapted: linear layers whose adapters are trained; None: every parameter is.
        accepts: a further check that training makes of a configuration.
    """
    from megatron_embed.parallel.topology import token_alignment

    step = math.lcm(BUDGET_STEP, token_alignment(config.parallel))
    least = round_up(least_budget(config), step)
    most = MOST_TOKENS
    whole = config.training.global_batch_size // grid_of(config, gpus).dp * config.workload.tokens_per_query
    if config.workload.couples_batch:
        most = min(most, whole // LEAST_COUNT)
    budgets = list(range(least, max(least, most) + 1, step))
    if most < whole <= MOST_TOKENS:
        budgets.append(round_up(whole, step))  # one micro-batch: no second pass, and none is half empty
    plans = []
    for tokens in budgets:
        candidate = with_budget(config, tokens)
        if is_possible(candidate, shape, gpus) and accepts(candidate):
            plan = plan_layout(candidate, shape, gpus, gpu, adapted)
            if plan.memory.total <= MEMORY_SHARE * gpu.memory_gib * 2**30:
                plans.append(plan)
    return min(plans, key=lambda plan: plan.time.total, default=None)


def with_budget(config: RunConfig, tokens: int) -> RunConfig:
    """The configuration with micro-batches of at most `tokens`."""
    return dataclasses.replace(config, training=dataclasses.replace(config.training, micro_batch_tokens=tokens))
