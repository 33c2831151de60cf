"""Process groups of a layout. The only module that uses Megatron's `parallel_state`."""

import datetime
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_embed.config.require import micro_batches_per_step
from megatron_embed.config.schema import ParallelConfig, RunConfig
from megatron_embed.errors import ConfigError, LostRankError
from megatron_embed.parallel.connections import prepare, shared_groups
from megatron_embed.parallel.rendezvous import Rendezvous, report_to_other_store
from megatron_embed.platform import cuda_environment
from megatron_embed.platform.compat import HAS_CUDA, ProcessGroupCollection, parallel_state
from megatron_embed.platform.launcher import knows_local_rank, launched_rank, rendezvous_address, source_of_world_size
from megatron_embed.rounding import round_up


@dataclass(frozen=True, kw_only=True)
class ModelParallelGroups:
    """The ranks of one pipeline stage that share a replica's rows, and those of all replicas."""

    tp_cp: dist.ProcessGroup
    """Tensor- and context-parallel ranks of one replica: each ends the model with the embeddings of all its rows."""
    tp_dp_cp: dist.ProcessGroup
    """The same ranks of all replicas."""
    tp: dist.ProcessGroup
    """Tensor-parallel ranks: those of a sparse model have different shares of the vocabulary."""


@dataclass(frozen=True, kw_only=True)
class Topology:
    """This rank's position in the process grid, and its groups. A group of one rank is the identity."""

    rank: int
    world_size: int
    groups: ProcessGroupCollection
    device: torch.device
    sizes: ParallelConfig
    rendezvous: tuple[str, int] | None = None
    """Host and port of the run's key-value store; None for one rank, or if the process group was started elsewhere."""

    @property
    def dp_group(self) -> dist.ProcessGroup:
        """Replicas that hold different rows; without context parallelism, so no row is counted twice."""
        return self.groups.dp

    @property
    def model_parallel_groups(self) -> ModelParallelGroups:
        return ModelParallelGroups(tp_cp=self.groups.tp_cp, tp_dp_cp=self.groups.tp_dp_cp, tp=self.groups.tp)

    @property
    def dp_rank(self) -> int:
        return self.groups.dp.rank()

    @property
    def dp_size(self) -> int:
        return self.groups.dp.size()

    @property
    def tp_rank(self) -> int:
        return self.groups.tp.rank()

    @property
    def tp_size(self) -> int:
        return self.groups.tp.size()

    @property
    def cp_rank(self) -> int:
        return self.groups.cp.rank()

    @property
    def cp_size(self) -> int:
        return self.groups.cp.size()

    @property
    def pp_rank(self) -> int:
        return self.groups.pp.rank()

    @property
    def pp_size(self) -> int:
        return self.groups.pp.size()

    @property
    def num_model_chunks(self) -> int:
        """Model chunks on this rank (virtual pipeline size, 1 without interleaving)."""
        return virtual_size(self.sizes) or 1

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the pooling and the heads, and so the embeddings."""
        return self.pp_rank == self.pp_size - 1

    @property
    def sequence_parallel(self) -> bool:
        return uses_sequence_parallel(self.sizes)


def uses_sequence_parallel(sizes: ParallelConfig) -> bool:
    if sizes.sequence_parallel == "auto":
        return sizes.tensor_model_parallel_size > 1
    return sizes.sequence_parallel and sizes.tensor_model_parallel_size > 1


def virtual_size(sizes: ParallelConfig) -> int | None:
    """Virtual pipeline size, or None if the pipeline is not interleaved."""
    virtual = sizes.virtual_pipeline_model_parallel_size
    return virtual if virtual is not None and virtual > 1 else None


def token_alignment(sizes: ParallelConfig) -> int:
    """The multiple to which a micro-batch's token count is padded so that every rank gets an equal share."""
    shares = sizes.tensor_model_parallel_size if uses_sequence_parallel(sizes) else 1
    return shares * (2 * sizes.context_parallel_size if sizes.context_parallel_size > 1 else 1)


def _init_process_group(rank: int, world_size: int, timeout_seconds: int,
                        device: torch.device) -> tuple[str, int] | None:
    """Start the process group once every rank has arrived. Returns host and port of its store, None for one rank.

    On GPUs NCCL connects all ranks at once, on the device given, so that a broken network is an error here.

    Raises:
        ConfigError: another process uses the port; raised on every rank.
        LostRankError: not all ranks arrived, or they cannot reach each other.
    """
    prepare()
    backend, timeout = "cpu:gloo,cuda:nccl" if HAS_CUDA else "gloo", datetime.timedelta(seconds=timeout_seconds)
    if world_size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return None
    host, port = rendezvous_address()
    try:
        barrier = Rendezvous(rank, world_size)
        barrier.wait_for_all(timeout_seconds)
        dist.init_process_group(backend, store=barrier.group_store(timeout_seconds), rank=rank, world_size=world_size,
                                timeout=timeout, device_id=device if HAS_CUDA else None)
    except ConfigError as error:
        report_to_other_store(str(error))
        raise
    except dist.DistError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise LostRankError(f"{world_size} ranks ({source_of_world_size()}) cannot start a process group at "
                            f"{host}:{port} within parallel.timeout_seconds = {timeout_seconds} ({reason}); look at "
                            "the logs of the other ranks", is_reporting_rank=rank == 0) from error
    # While a device is bound, torch splits the NCCL communicator for every new group, also on the ranks outside a gloo
    # group, whose members do not split: Megatron's gloo groups would hang (pytorch/pytorch#145376).
    dist.group.WORLD.bound_device_id = None  # type: ignore[union-attr]
    return host, port


def check_world_size(sizes: ParallelConfig, world_size: int) -> int:
    """Data-parallel size of a layout. Raises ConfigError if the world size does not fit it."""
    tp, pp, cp = (sizes.tensor_model_parallel_size, sizes.pipeline_model_parallel_size, sizes.context_parallel_size)
    model = tp * pp * cp
    if world_size % model:
        key, value = max((("tensor_model", tp), ("pipeline_model", pp), ("context", cp)), key=lambda item: item[1])
        raise ConfigError(f"parallel.{key}_parallel_size = {value}: world size = {world_size} is not a multiple of "
                          f"tensor * pipeline * context parallel size = {tp} * {pp} * {cp} = {model}; start "
                          f"{round_up(world_size, model)} ranks or lower one of the parallel.* sizes",
                          key=f"parallel.{key}_parallel_size")
    ep, etp = sizes.expert_model_parallel_size, sizes.expert_tensor_parallel_size
    if world_size % (ep * etp * pp):
        key, value = ("expert_model", ep) if ep > 1 else ("expert_tensor", etp)
        others = (etp if ep > 1 else ep) * pp
        fitting = [size for size in range(1, world_size + 1) if world_size % (size * others) == 0]
        way_out = (f"nearest valid: {min(fitting, key=lambda size: (abs(size - value), size))}" if fitting
                   else f"start a multiple of {ep * etp * pp} ranks")
        raise ConfigError(f"parallel.{key}_parallel_size = {value}: world size = {world_size} is not a multiple of "
                          f"expert_model * expert_tensor * pipeline = {ep} * {etp} * {pp} = {ep * etp * pp}; {way_out}",
                          key=f"parallel.{key}_parallel_size")
    virtual = virtual_size(sizes)
    if virtual is not None and pp == 1:
        raise ConfigError(f"parallel.virtual_pipeline_model_parallel_size = {virtual} needs "
                          "pipeline_model_parallel_size >= 2; remove it or raise that",
                          key="parallel.virtual_pipeline_model_parallel_size")
    return world_size // model


def check_batch_sizes(config: RunConfig, dp_size: int) -> int | None:
    """Micro-batches per optimizer step on each rank, None if a token budget decides. Raises ConfigError if the batch
    sizes do not divide."""
    size, micro = config.training.global_batch_size, config.training.micro_batch_size
    if config.training.micro_batch_tokens is not None:
        if size % dp_size:
            raise ConfigError(f"training.global_batch_size = {size} is not a multiple of data_parallel_size = "
                              f"{dp_size}; next valid: {round_up(size, dp_size)}",
                              key="training.global_batch_size")
        return None
    num_microbatches = micro_batches_per_step(size, micro, dp_size)
    pp, virtual = config.parallel.pipeline_model_parallel_size, virtual_size(config.parallel)
    if virtual is not None and num_microbatches % pp:
        share = size // dp_size
        valid = [count for count in range(pp, share + 1, pp) if share % count == 0]
        near = min(valid, key=lambda count: (abs(count - num_microbatches), count), default=None)
        way_out = (f"raise global_batch_size to a multiple of {pp * dp_size}" if near is None
                   else f"nearest valid: {share // near}")
        raise ConfigError(f"training.micro_batch_size = {micro} gives {num_microbatches} micro-batches per step and "
                          f"rank; the interleaved pipeline needs a multiple of pipeline_model_parallel_size = {pp}; "
                          f"{way_out}", key="training.micro_batch_size")
    return num_microbatches


def check_token_budget(config: RunConfig, documents: int | None = None) -> None:
    """Raises ConfigError, naming the nearest valid value, if `training.micro_batch_tokens` cannot hold what it must.

    `documents`: the most that a query of the data has; None if not known: the most that the settings allow.
    """
    budget, alignment = config.training.micro_batch_tokens, token_alignment(config.parallel)
    if budget is None:
        return
    least, what = config.workload.least_tokens(documents)
    least = round_up(least, alignment)
    if budget < least:
        raise ConfigError(f"training.micro_batch_tokens = {budget} is less than {what}, what must fit into one "
                          f"micro-batch; nearest valid: {least}", key="training.micro_batch_tokens")
    if budget % alignment:
        nearest = max(least, round(budget / alignment) * alignment)
        raise ConfigError(f"training.micro_batch_tokens = {budget} is not a multiple of {alignment}, which the tensor- "
                          f"and context-parallel ranks need for equal shares; nearest valid: {nearest}",
                          key="training.micro_batch_tokens")


def device_of(local_rank: int, visible: int, *, is_known: bool) -> int:
    """The index of a rank's GPU among those it sees: its local rank, or 0 if it sees one only (`--gpus-per-task=1`).

    `is_known`: whether the launcher sets the local rank; if not, nodes are taken to have equal numbers of ranks. Two
    ranks on one GPU are refused by NCCL. Raises ConfigError for a rank without a GPU.
    """
    if visible == 1:
        return 0
    if not is_known:
        return local_rank % visible
    if local_rank >= visible:
        raise ConfigError(f"LOCAL_RANK = {local_rank}, counted from 0, and {visible} GPUs are visible on its node "
                          "(CUDA_VISIBLE_DEVICES); start one rank per GPU")
    return local_rank


_latest: Topology | None = None


def _has_its_groups(topology: Topology, sizes: ParallelConfig) -> bool:
    """Whether the groups of this process are those of `topology`, of the same layout and process group."""
    if virtual_size(sizes) is not None:
        return False  # parallel_state also counts the model chunks that were built
    return (topology.sizes == sizes and parallel_state.model_parallel_is_initialized()
            and parallel_state.get_tensor_model_parallel_group() is topology.groups.tp
            and dist.is_initialized() and parallel_state.get_model_parallel_group() is topology.groups.mp)


def initialize(sizes: ParallelConfig) -> Topology:
    """Start the process group unless there is one, then build every group of the layout, or take those of the latest
    call if it had the same layout: torch keeps groups until the process group ends.

    Communicates over the world. Raises ConfigError, before the first collective, if the world size does not fit, and
    the error of another rank that failed before this point.
    """
    rank, world_size, local_rank = launched_rank()
    if dist.is_initialized():
        rank, world_size = dist.get_rank(), dist.get_world_size()
    check_world_size(sizes, world_size)
    global _latest
    if _latest is not None and _has_its_groups(_latest, sizes):
        return _latest
    # For every command and the Python API; `train` does so before torch is loaded.
    cuda_environment.set_for_layout(sizes.tensor_model_parallel_size, sizes.context_parallel_size)
    device = torch.device("cpu")
    if HAS_CUDA:
        device = torch.device("cuda", device_of(local_rank, torch.cuda.device_count(), is_known=knows_local_rank()))
        torch.cuda.set_device(device)
    rendezvous = None
    if not dist.is_initialized():
        rendezvous = _init_process_group(rank, world_size, sizes.timeout_seconds, device)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    with shared_groups():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=sizes.tensor_model_parallel_size,
            pipeline_model_parallel_size=sizes.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=virtual_size(sizes),
            context_parallel_size=sizes.context_parallel_size,
            expert_model_parallel_size=sizes.expert_model_parallel_size,
            expert_tensor_parallel_size=sizes.expert_tensor_parallel_size,
            distributed_timeout_minutes=max(1, sizes.timeout_seconds // 60),
        )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    _latest = Topology(rank=rank, world_size=world_size, groups=groups, device=device, sizes=sizes,
                       rendezvous=rendezvous)
    return _latest


def shutdown() -> None:
    """Free every group, so that a later `initialize` in the same process starts clean."""
    global _latest
    _latest = None
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
