"""The checks of `doctor --config`: whether this run can start on this machine, with this number of ranks."""

import dataclasses
import os
import resource
from typing import TYPE_CHECKING

from megatron_embed.errors import ConfigError
from megatron_embed.parallel.open_files import files_of_store_process, files_with_relays
from megatron_embed.platform.bf16_support import processor_has_bf16
from megatron_embed.platform.doctor import Check
from megatron_embed.platform.gpus import visible_gpus
from megatron_embed.run.disk_check import check_output_directories
from megatron_embed.run.input_checks import check_inputs, readable_shape

if TYPE_CHECKING:
    from megatron_embed.config.schema import RunConfig


def examine_run(config: "RunConfig", *, ranks: int, ranks_per_node: int, min_free_gib: int) -> list[Check]:
    """Whether this run can start here. Quick: every node of a job asks it, and no library is loaded if all is well.

    Args:
        ranks: ranks of the whole run.
        ranks_per_node: those on this node.
        min_free_gib: least free space on the disks of the output directories, however little the run writes.
    """
    config = _with_local_dtype(config)
    return [_layout(config, ranks), _devices(config, ranks_per_node), _open_files(ranks, ranks_per_node),
            *check_inputs(config), *check_output_directories(config, min_free_gib)]


def _open_files(ranks: int, ranks_per_node: int) -> Check:
    """Whether the process that hosts the run's store may have the connections of every rank, or of every node."""
    needed, least = files_of_store_process(ranks), files_with_relays(ranks, ranks_per_node)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = hard == resource.RLIM_INFINITY
    uses_relays = not unlimited and hard < needed and ranks_per_node < ranks
    where = "where the store is" + (f", through one rank of each node (without: {needed:,})" if uses_relays else "")
    needed = least if uses_relays else needed
    return Check(name="open files", value=f"up to {'any number' if unlimited else f'{hard:,}'} (now {soft:,}); "
                 f"{needed:,} {where}",
                 remedy="" if unlimited or hard >= needed else f"ask for a hard limit of {needed:,} (`ulimit -Hn`, "
                 "/etc/security/limits.conf, LimitNOFILE of slurmd): the process that hosts the store needs as many")


def _with_local_dtype(config: "RunConfig") -> "RunConfig":
    """The configuration with `model.dtype: auto` resolved for this node, or for GPUs if it can only run on some."""
    if config.model.dtype != "auto":
        return config
    has_bf16 = visible_gpus() > 0 or bool(_keys_for_gpus(config)) or processor_has_bf16()
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, dtype="bfloat16" if has_bf16 else "float32"))


def _layout(config: "RunConfig", ranks: int) -> Check:
    from megatron_embed.planning.layouts import check_possible, describe
    from megatron_embed.planning.memory import grid_of

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


def _devices(config: "RunConfig", ranks_per_node: int) -> Check:
    gpus, promised = visible_gpus(), int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)
    if gpus and "SLURM_GPUS_PER_TASK" in os.environ:  # Each task sees only its own GPUs.
        return Check(name="devices", value=f"{gpus} GPUs for each rank (--gpus-per-task)")
    value = f"{gpus} GPUs for {ranks_per_node} ranks on this node"
    if gpus and gpus < ranks_per_node:
        return Check(name="devices", value=value, remedy=f"start {gpus} ranks per node, one per GPU, or ask for "
                     f"{ranks_per_node} GPUs")
    if promised > gpus:
        return Check(name="devices", value=value, remedy=f"Slurm gave this node {promised} GPUs and the driver lists "
                     f"{gpus}: look at nvidia-smi")
    if not gpus and (keys := _keys_for_gpus(config)):
        return Check(name="devices", value=value, remedy=f"{' and '.join(keys)} needs GPUs: start where there "
                     "are some, or leave it out")
    return Check(name="devices", value=value, note="" if gpus else "CPU ranks")


def _keys_for_gpus(config: "RunConfig") -> list[str]:
    """Keys of the configuration with values that only GPUs can do."""
    asks = {"model.attention": config.model.attention in ("flash", "te"),
            "model.backend": config.model.backend == "te",
            "model.fp8": config.model.fp8 != "none",
            "optimizer.cpu_offload": config.optimizer.cpu_offload,
            "optimizer.precision_aware": config.optimizer.precision_aware}
    return [key for key, asked in asks.items() if asked]
