"""The text of a plan: memory, time, advice, and the layouts that fit."""

from megatron_embed.config.schema import RunConfig
from megatron_embed.models.families import ModelShape
from megatron_embed.parallel.open_files import files_of_store_process, files_with_relays
from megatron_embed.planning.flops import StepTime, forward_passes, has_first_pass, model_flops, step_tokens
from megatron_embed.planning.hardware import GPU, GPUS_PER_NODE
from megatron_embed.planning.layouts import BUDGET_STEP, Plan, describe
from megatron_embed.planning.memory import GIB, Grid, first_pass_micro_batches, grid_of
from megatron_embed.planning.parameters import (
    AdaptedLinears,
    active_matrix_parameters,
    held_parameters,
    total_parameters,
)
from megatron_embed.planning.token_budget import MEMORY_SHARE, MOST_TOKENS

COPY_GB_PER_SECOND = 3
"""Bandwidth per GPU of a copy to memory of the host that is neither pinned nor yet in use; not measured."""
SHORTEST_SHOWN = 0.005
"""Seconds of a step below which a line of its time is omitted."""
USUAL_LIMIT = 1024
"""Open files that systems usually allow a process before it asks for more."""


def report(plan: Plan, shape: ModelShape, gpus: int, gpu: GPU, adapted: AdaptedLinears | None, rows: str) -> str:
    """The given layout in words.

    Args:
        adapted: linear layers with adapters; None: every parameter is trained.
        rows: a sentence about the data.
    """
    config, grid = plan.config, grid_of(plan.config, gpus)
    forwards, flops = forward_passes(config, grid), model_flops(config, shape, adapted)
    utilization = flops / gpus / plan.time.total / (gpu.peak_tflops * 1e12)
    lines = [
        _model_line(plan, shape, adapted),
        f"{gpus} x {gpu.name}, {describe(config.parallel)}: {grid.dp} data-parallel ranks, {grid.num_microbatches} "
        f"micro-batches of up to {grid.micro_batch_tokens:,} tokens on each, recompute {config.training.recompute}",
        *_first_pass_line(config, shape, grid),
        rows, "", *_memory_lines(plan, gpu), "",
        f"One step: {config.training.global_batch_size:,} queries, at most {step_tokens(config):,} tokens, "
        f"{flops / 1e15:.3g} PFLOP of the model, forward passes: {forwards}; expected seconds",
        *_time_lines(plan.time),
        f"  that is {utilization:.0%} of the peak (model FLOPs; an estimate to compare layouts, not a measurement)"]
    if (files := files_of_store_process(gpus)) > USUAL_LIMIT:
        lines.append(f"Open files of the process that hosts the run's store: {files:,}; where the hard limit "
                     f"(`ulimit -Hn`) is lower, {files_with_relays(gpus, GPUS_PER_NODE):,}, through one rank of each "
                     "node")
    if not plan.fits:
        lines += ["", advice(plan)]
    return "\n".join(lines)


def _first_pass_line(config: RunConfig, shape: ModelShape, grid: Grid) -> list[str]:
    """The micro-batches of the first pass, if they are larger."""
    merged = first_pass_micro_batches(config, shape, grid) if has_first_pass(config, grid) else 1
    return [] if merged == 1 else [f"The first pass, which keeps no activations, embeds up to {merged} micro-batches "
                                   "as one (training.first_pass_micro_batches)"]


def budget_advice(given: Plan, advised: Plan | None, gpu: GPU) -> str:
    """Lines with the token budget that this layout should have."""
    rule = f"multiple of {BUDGET_STEP:,} up to {MOST_TOKENS:,} in {MEMORY_SHARE:.0%} of the memory (docs/planning.md)"
    if advised is None:
        return f"\nToken budget of a micro-batch: no {rule}"
    lines = [f"\nToken budget of a micro-batch: training.micro_batch_tokens = "
             f"{advised.config.training.micro_batch_tokens} ({advised.memory.total / GIB:.1f} of {gpu.memory_gib:.0f} "
             f"GiB, {advised.time.total:.2f} s/step), the fastest {rule}"]
    if given.config.training.micro_batch_tokens is None:
        lines.append("  training.micro_batch_size counts queries: texts shorter than their maximum leave its "
                     "micro-batches as empty; a token budget fills them")
    return "\n".join(lines)


def _model_line(plan: Plan, shape: ModelShape, adapted: AdaptedLinears | None) -> str:
    """The model and its numbers of parameters."""
    active = f", {active_matrix_parameters(shape) / 1e9:.2f} billion active per token" if shape.num_experts else ""
    trained = held_parameters(plan.config, shape, plan.stage, adapted).trained.total
    adapters = "" if adapted is None else (
        f", adapters of rank {plan.config.lora.rank}: {trained / 1e6:.1f} million on a rank")
    return f"{plan.config.model.path}: {total_parameters(shape) / 1e9:.2f} billion parameters{active}{adapters}"


def _memory_lines(plan: Plan, gpu: GPU) -> list[str]:
    """A table of the memory of one GPU."""
    memory = plan.memory
    sizes = {"parameters": memory.parameters, "gradients (float32)": memory.gradients,
             "optimizer": memory.optimizer, "activations (estimate)": memory.activations,
             "embeddings and loss": memory.loss, "reserve": memory.reserve, "total": memory.total}
    return [
        f"Memory per GPU of pipeline stage {plan.stage}, which needs most, in GiB",
        *(f"  {name:<22} {size / GIB:7.1f}" for name, size in sizes.items()),
        f"  {'of':<22} {gpu.memory_gib:7.1f}   {'it fits' if plan.fits else 'IT DOES NOT FIT'}",
        *([f"  {'host, per GPU':<22} {memory.host / GIB:7.1f}   the optimizer's share"] if memory.host else []),
        f"  {'host, during a save':<22} {memory.save / GIB:7.1f}   per GPU; training waits about "
        f"{memory.save / (COPY_GB_PER_SECOND * 1e9):.1f} s for the copy, {_and_for_the_disk(plan)}",
        "  (exact except for activations: compared with allocations of CPU ranks, not measured on a GPU)"]


def _and_for_the_disk(plan: Plan) -> str:
    """Whether training waits until a checkpoint is written, too."""
    return "not for the disk" if plan.config.checkpoint.async_save else "and until it is on the disk"


def _time_lines(time: StepTime) -> list[str]:
    """A table of the seconds of one step."""
    seconds = {"matrix products": time.compute, "other kernels": time.elementwise,
               "waiting for the host": time.launches, "tensor-parallel": time.tensor, "context-parallel": time.context,
               "expert-parallel": time.expert, "pipeline bubble": time.bubble, "data-parallel": time.data,
               "optimizer": time.optimizer, "total": time.total}
    return [f"  {name:<22} {value:7.2f}" for name, value in seconds.items() if value >= SHORTEST_SHOWN]


def advice(plan: Plan) -> str:
    """The settings to change if a layout does not fit."""
    memory = plan.memory
    fixed = memory.parameters + memory.gradients + memory.optimizer
    if memory.activations > fixed:
        key = "micro_batch_size" if plan.config.training.micro_batch_tokens is None else "micro_batch_tokens"
        return (f"Activations need most of it: lower training.{key} (the gradient cache keeps the batch), "
                "then set training.recompute: full, then raise parallel.tensor_model_parallel_size.")
    if memory.loss > fixed:
        return ("The gathered documents need most of it: lower training.global_batch_size or data.num_negatives.")
    return ("The model needs most of it: raise parallel.tensor_model_parallel_size up to 8, then "
            "parallel.pipeline_model_parallel_size; more data-parallel ranks share only the optimizer's part.")


def proposals(plans: list[Plan], gpus: int) -> str:
    """A table of the layouts that fit, fastest first."""
    if not plans:
        return "\nNo layout fits: more GPUs, GPUs with more memory, or shorter texts are needed."
    rows = [("layout", "micro-batch", "recompute", "GiB", "s/step")]
    for plan in plans:
        training = plan.config.training
        micro = (f"{training.micro_batch_size} queries" if training.micro_batch_tokens is None
                 else f"{training.micro_batch_tokens} tokens")
        sizes = f"{describe(plan.config.parallel)} dp{grid_of(plan.config, gpus).dp}"
        rows.append((sizes.removeprefix("data-parallel only "), micro, training.recompute,
                     f"{plan.memory.total / GIB:.1f}", f"{plan.time.total:.2f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    table = ["  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
             for row in rows]
    return "\nLayouts that fit, fastest first\n" + "\n".join(table)
