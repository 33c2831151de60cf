"""The text of a plan: memory, time, advice, and the layouts that fit."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_embed.models.families import ModelShape
    from megatron_embed.planning.hardware import GPU
    from megatron_embed.planning.layouts import Plan
    from megatron_embed.planning.parameters import Parts


def report(plan: "Plan", shape: "ModelShape", gpus: int, gpu: "GPU", parts: "Parts | None", rows: str) -> str:
    """The given layout, in words. `rows`: what is known of the data."""
    from megatron_embed.planning.flops import forward_passes, model_flops, step_tokens
    from megatron_embed.planning.layouts import describe
    from megatron_embed.planning.memory import GIB, grid_of
    from megatron_embed.planning.parameters import active_matrix_parameters, held_parameters, total_parameters

    config, memory, time = plan.config, plan.memory, plan.time
    grid = grid_of(config, gpus)
    active = f", {active_matrix_parameters(shape) / 1e9:.2f} billion at work per token" if shape.num_experts else ""
    forwards, flops = forward_passes(config, grid), model_flops(config, shape, parts)
    trained = held_parameters(config, shape, plan.stage, parts).trained.total
    adapters = "" if parts is None else f", adapters of rank {config.lora.rank}: {trained / 1e6:.1f} million on a rank"
    utilization = flops / gpus / time.total / (gpu.peak_tflops * 1e12)
    parts = {"parameters": memory.parameters, "gradients (float32)": memory.gradients,
             "optimizer": memory.optimizer, "activations (estimate)": memory.activations,
             "embeddings and loss": memory.loss, "reserve": memory.reserve, "together": memory.total}
    lines = [
        f"{config.model.path}: {total_parameters(shape) / 1e9:.2f} billion parameters{active}{adapters}",
        f"{gpus} x {gpu.name}, {describe(config.parallel)}: {grid.dp} data-parallel ranks, {grid.num_microbatches} "
        f"micro-batches of up to {grid.micro_batch_tokens:,} tokens on each, recompute {config.training.recompute}",
        rows, "", f"Memory of a GPU of pipeline stage {plan.stage}, which needs most, in GiB",
        *(f"  {name:<22} {size / GIB:7.1f}" for name, size in parts.items()),
        f"  {'of':<22} {gpu.memory_gib:7.1f}   {'it fits' if plan.fits else 'IT DOES NOT FIT'}",
        *([f"  {'host, per GPU':<22} {memory.host / GIB:7.1f}   the optimizer's share"] if memory.host else []),
        "  (counted, but for activations: compared with what CPU ranks allocate, not measured on a GPU)", "",
        f"One step: {config.training.global_batch_size:,} queries, at most {step_tokens(config):,} tokens, "
        f"{flops / 1e15:.3g} PFLOP of the model, forward passes: {forwards}; expected seconds"]
    lines += [f"  {name:<22} {seconds:7.2f}" for name, seconds in {
        "compute": time.compute, "tensor-parallel": time.tensor, "context-parallel": time.context,
        "expert-parallel": time.expert, "pipeline bubble": time.bubble, "data-parallel": time.data,
        "optimizer": time.optimizer, "together": time.total}.items() if seconds >= 0.005]
    lines.append(f"  that is {utilization:.0%} of the peak (model FLOPs; an estimate to compare layouts with, no "
                 "measurement)")
    if not plan.fits:
        lines += ["", advice(plan)]
    return "\n".join(lines)


def advice(plan: "Plan") -> str:
    """What to change where a layout does not fit."""
    memory = plan.memory
    fixed = memory.parameters + memory.gradients + memory.optimizer
    if memory.activations > fixed:
        return ("Most of it are activations: lower training.micro_batch_size (the gradient cache keeps the batch), "
                "then set training.recompute: full, then raise parallel.tensor_model_parallel_size.")
    if memory.loss > fixed:
        return "Most of it are the gathered documents: lower training.global_batch_size or data.num_negatives."
    return ("Most of it is the model: raise parallel.tensor_model_parallel_size up to 8, then "
            "parallel.pipeline_model_parallel_size; more data-parallel ranks share only the optimizer's part.")


def proposals(plans: "list[Plan]", gpus: int) -> str:
    """A table of the layouts that fit, best first."""
    from megatron_embed.planning.layouts import describe
    from megatron_embed.planning.memory import GIB, grid_of

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
