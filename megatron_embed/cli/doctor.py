"""`doctor`, and `doctor --config CONFIG.yaml --ranks N`"""

import argparse
import dataclasses
import os
import re
import shutil
import subprocess
from typing import TYPE_CHECKING

from megatron_embed.cli.common import add_overrides, add_subdirectory, in_subdirectory, positive_int, write_output
from megatron_embed.errors import ConfigError, UserError

if TYPE_CHECKING:
    from megatron_embed.config.schema import RunConfig
    from megatron_embed.platform.doctor import Check

HELP = "versions and backends of this machine, what is missing and how to get it; with --config: can a run start here"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="CONFIG.yaml",
                        help="check instead what this run needs: layout, GPUs, model, tokenizer, data, evaluation "
                             "sets, packages, output directories, free disk")
    parser.add_argument("--ranks", type=positive_int, metavar="N", default=1, help="ranks of the run; default: 1")
    parser.add_argument("--ranks-per-node", type=ranks_of_node, metavar="N",
                        help="also as Slurm lists it where nodes differ, 8(x2),4; default: --ranks")
    parser.add_argument("--min-free-gib", type=positive_int, metavar="GIB", default=1,
                        help="free space that the disks of the output directories must have, however little the run "
                             "writes; default: 1")
    add_subdirectory(parser)
    add_overrides(parser, "", "section.key=value")


def ranks_of_node(text: str) -> int:
    """The ranks of this node: a number, or this node's of a list such as `8(x2),4` (SLURM_TASKS_PER_NODE)."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([1-9][0-9]{0,5})(?:\(x([1-9][0-9]{0,5})\))?", part)
        if match is None:
            raise argparse.ArgumentTypeError(f"{text!r} is no number above 0, and no list such as 8(x2),4")
        counts += [int(match.group(1))] * int(match.group(2) or 1)
    node = os.environ.get("SLURM_NODEID", "")
    return counts[int(node)] if node.isdecimal() and int(node) < len(counts) else max(counts)


def run(args: argparse.Namespace) -> int:
    """Print what was found; 0 if training can run here, else 1."""
    from megatron_embed.platform.doctor import report, run_checks

    if args.config is None:
        given = args.overrides[0] if args.overrides else args.subdirectory and f"--subdirectory {args.subdirectory}"
        if given:
            raise UserError(f"{given} is a setting of a configuration; name one with --config")
        findings = run_checks()
    else:
        from megatron_embed.config.load import load_config

        config = in_subdirectory(load_config(args.config, args.overrides), args.subdirectory)
        findings = examine_run(config, args)
    write_output(report(findings))
    return 1 if any(finding.remedy for finding in findings) else 0


def examine_run(config: "RunConfig", args: argparse.Namespace) -> "list[Check]":
    """Whether this run can start here. Quick: every node of a job asks it, and no library is loaded if all is well."""
    from megatron_embed.run.disk_check import examine_outputs
    from megatron_embed.run.input_checks import examine_inputs

    config = _with_local_dtype(config)
    return [_layout(config, args.ranks), _devices(config, args.ranks_per_node or args.ranks), *examine_inputs(config),
            *examine_outputs(config, args.min_free_gib)]


def _with_local_dtype(config: "RunConfig") -> "RunConfig":
    """The same with what `model.dtype: auto` is where all nodes are like this one."""
    from megatron_embed.platform.bf16_support import processor_has_bf16

    if config.model.dtype != "auto":
        return config
    has_bf16 = visible_gpus() > 0 or processor_has_bf16()
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, dtype="bfloat16" if has_bf16 else "float32"))


def _layout(config: "RunConfig", ranks: int) -> "Check":
    from megatron_embed.planning.layouts import check_possible, describe
    from megatron_embed.planning.memory import grid_of
    from megatron_embed.platform.doctor import Check
    from megatron_embed.run.input_checks import readable_shape

    shape = readable_shape(config.model.path)
    try:
        check_possible(config, shape, ranks)
        if config.training.micro_batch_tokens is not None:
            from megatron_embed.parallel.topology import check_token_budget

            check_token_budget(config, documents=1)
    except ConfigError:
        from megatron_embed.planning.advice import explain_impossible

        try:
            explain_impossible(config, shape, ranks, documents=1)
        except ConfigError as better:
            error = better
        return Check(name="layout", value=f"does not fit {ranks} ranks", remedy=str(error))
    return Check(name="layout", value=f"{ranks} ranks, {describe(config.parallel)}; {grid_of(config, ranks).dp} of "
                   "them data-parallel", note="" if shape else "the model is not here: not compared with its shape")


def _devices(config: "RunConfig", ranks_per_node: int) -> "Check":
    from megatron_embed.platform.doctor import Check

    there, promised = visible_gpus(), int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)
    if there and "SLURM_GPUS_PER_TASK" in os.environ:  # this task sees its own alone, as every other one
        return Check(name="devices", value=f"{there} GPUs for each rank (--gpus-per-task)")
    value = f"{there} GPUs for {ranks_per_node} ranks on this node"
    if there and there < ranks_per_node:
        return Check(name="devices", value=value, remedy=f"start {there} ranks per node, one per GPU, or ask for "
                       f"{ranks_per_node} GPUs")
    if promised > there:
        return Check(name="devices", value=value, remedy=f"Slurm gave this node {promised} GPUs and the driver lists "
                       f"{there}: look at nvidia-smi")
    asks = {"model.attention": config.model.attention in ("flash", "te"),
            "optimizer.cpu_offload": config.optimizer.cpu_offload,
            "optimizer.precision_aware": config.optimizer.precision_aware}
    if not there and any(asks.values()):
        keys = " and ".join(key for key, asked in asks.items() if asked)
        return Check(name="devices", value=value, remedy=f"{keys} needs GPUs: start where there "
                       "are some, or leave it out")
    return Check(name="devices", value=value, note="" if there else "CPU ranks")


def visible_gpus() -> int:
    """GPUs that CUDA gives one process: those of CUDA_VISIBLE_DEVICES up to the first name that is no device, and one
    alone where a MIG device is among them. As count_gpus in launch/functions.sh."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    listed = subprocess.run([program, "--list-gpus"], capture_output=True, text=True, check=False).stdout
    uuids: list[str] = []
    divided: set[int] = set()
    for line in listed.splitlines():
        if re.match(r"GPU \d+:", line):
            uuids.append(line.partition("(UUID: ")[2].rstrip().removesuffix(")"))
        elif re.match(r" +MIG ", line) and uuids:
            divided.add(len(uuids) - 1)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return 1 if divided else len(uuids)
    count = 0
    for name in (name.strip() for name in visible.split(",")):
        found = [number for number, uuid in enumerate(uuids)
                 if name == str(number) or (name.startswith("GPU-") and uuid.startswith(name))]
        if name.startswith("MIG-") or (found and found[0] in divided):
            return max(count, 1)
        if not found:
            break
        count += 1
    return count
