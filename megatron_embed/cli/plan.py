"""`plan CONFIG.yaml --gpus N [--gpu h100]`"""

import argparse
import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_embed.cli.common import add_overrides, positive_int, write_output
from megatron_embed.errors import ConfigError

if TYPE_CHECKING:
    from megatron_embed.config.schema import RunConfig
    from megatron_embed.models.families import ModelShape
    from megatron_embed.planning.hardware import GPU
    from megatron_embed.planning.layouts import Plan
    from megatron_embed.planning.parameters import Parts

HELP = "memory per GPU and step time of a layout, and the layouts that fit; exit code 2 if the given one does not"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from megatron_embed.planning.hardware import GPUS

    parser.add_argument("config", metavar="CONFIG.yaml", help="the run's configuration")
    parser.add_argument("--gpus", required=True, type=positive_int, metavar="N", help="GPUs, eight to a node")
    parser.add_argument("--gpu", choices=tuple(GPUS), default="h100", help="default: h100")
    add_overrides(parser, "", "section.key=value")


def run(args: argparse.Namespace) -> int:
    """Print what the layout needs and which others fit; 0 if it fits, else 2. Needs no hub and no weights."""
    from megatron_embed.config.load import load_config
    from megatron_embed.parallel.topology import check_token_budget
    from megatron_embed.planning.hardware import GPUS
    from megatron_embed.planning.layouts import check_possible, is_possible, plan_layout, propose
    from megatron_embed.planning.shapes import shape_of

    config, gpu = load_config(args.config, args.overrides), GPUS[args.gpu]
    shape = shape_of(config.model.path)
    config = with_adapters_of_model(with_lengths_at_hand(config, shape), shape)
    config, rows = with_rows_at_hand(config)
    if not is_possible(config, shape, args.gpus):
        explain_impossible(config, shape, args.gpus)
        check_possible(config, shape, args.gpus)
    check_token_budget(config)
    parts = adapted_parts(config, shape)
    given = plan_layout(config, shape, args.gpus, gpu, parts)
    write_output(report(given, shape, args.gpus, gpu, parts, rows))
    write_output(proposals(propose(config, shape, args.gpus, gpu, parts, accepts=budget_holds), args.gpus))
    return 0 if given.fits else 2


def budget_holds(config: "RunConfig") -> bool:
    """Whether training would take the layout's token budget, if there is one."""
    from megatron_embed.parallel.topology import check_token_budget

    try:
        check_token_budget(config)
    except ConfigError:
        return False
    return True


def with_lengths_at_hand(config: "RunConfig", shape: "ModelShape") -> "RunConfig":
    """The configuration with the lengths of its model's directory where it has null for them and that is here."""
    folder = os.path.expanduser(config.model.path)
    if config.task == "reranker" or not os.path.isfile(os.path.join(folder, "config.json")):
        return config
    from megatron_embed.models.saved_settings import read_saved_settings, trained_lengths

    lengths = trained_lengths(read_saved_settings(folder), shape.longest_text, {})
    return dataclasses.replace(config, data=dataclasses.replace(
        config.data, query_max_length=config.data.query_max_length or lengths["query"],
        document_max_length=config.data.document_max_length or lengths["document"]))


def with_rows_at_hand(config: "RunConfig") -> "tuple[RunConfig, str]":
    """The configuration with no more documents per query than its rows have, and a line that says how many.

    Unchanged where an entry of `data.train` is not a file or folder of this machine: nothing is fetched.

    Raises:
        DataError: a row cannot be used.
    """
    data = config.data
    if not data.train or not all(os.path.exists(os.path.expanduser(file.path)) for file in data.train):
        documents = f"{data.num_positives} positive and {data.num_negatives} negative documents"
        if config.task == "reranker" and not data.num_negatives:
            documents = "1 document, since data.num_negatives = 0 takes what a row has: set it to that"
        return config, f"The rows of data.train are not here: each query is taken to have {documents}."
    from megatron_embed.data.records import open_records

    if config.task == "reranker":
        records = open_records(data.train, "rerank")
        documents = records.most_in_list(data.num_negatives)
        found = dataclasses.replace(data, num_negatives=documents - 1)
        return dataclasses.replace(config, data=found), (
            f"{len(records):,} rows of data.train, with up to {documents} documents each in use.")
    records = open_records(data.train, config.objective.rows)
    needed = config.objective.needs_own_negatives or not all(file.in_batch_negatives for file in data.train)
    found = dataclasses.replace(data, num_positives=min(data.num_positives, records.most_positives),
                                num_negatives=max(int(needed), min(data.num_negatives, records.most_negatives)))
    return dataclasses.replace(config, data=found), (
        f"{len(records):,} rows of data.train, with up to {found.num_positives} positive and {found.num_negatives} "
        "negative documents each in use.")


def with_adapters_of_model(config: "RunConfig", shape: "ModelShape") -> "RunConfig":
    """The configuration with section `lora` as training takes it from a PEFT directory, or a checkpoint of adapters.

    Raises:
        CheckpointError: adapters that training would refuse.
    """
    from megatron_embed.planning.shapes import checkpoint_at, has_adapters

    if config.lora.rank or not has_adapters(config.model.path):
        return config
    checkpoint = checkpoint_at(config.model.path)
    from megatron_embed.convert.layout import open_checkpoint
    from megatron_embed.convert.peft import PeftAdapter
    from megatron_embed.convert.rules.lookup import rules_for

    if checkpoint is None:
        with PeftAdapter(Path(config.model.path).expanduser(), rules_for(shape.family), shape) as adapter:
            found = adapter.settings
    else:
        saved = open_checkpoint(checkpoint).info.adapters
        if saved is None:
            return config
        found = saved
    lora = dataclasses.replace(config.lora, rank=found.rank, alpha=found.alpha, use_rslora=found.use_rslora,
                               target_modules=found.modules)
    return dataclasses.replace(config, lora=lora)


def adapted_parts(config: "RunConfig", shape: "ModelShape") -> "Parts | None":
    """Linear layers that get adapters by section `lora`; null: every parameter is trained."""
    if config.lora.rank == 0:
        return None
    from megatron_embed.convert.adapters import parts_by_linear, resolve_modules
    from megatron_embed.convert.rules.lookup import rules_for

    family = rules_for(shape.family)
    return parts_by_linear(family, resolve_modules(family, config.lora.target_modules, "lora.target_modules"))


def explain_impossible(config: "RunConfig", shape: "ModelShape | None", gpus: int,
                       documents: int | None = None) -> None:
    """Raises the error that training would raise. `documents`: as in check_token_budget."""
    from megatron_embed.models.backbone import check_divisible
    from megatron_embed.parallel.topology import check_batch_sizes, check_token_budget, check_world_size

    check_batch_sizes(config, check_world_size(config.parallel, gpus))
    if shape is not None:
        check_divisible(shape, config.parallel)
    check_token_budget(config, documents)


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
