"""Which ranks take their batches from which worker processes: those of a replica on one node from the same ones."""

import contextlib
import os
import socket
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_embed.config.schema import RunConfig
from megatron_embed.data.batch_workers import BatchReceiver, Build, ForkServer, accept, connect, listen
from megatron_embed.data.loader import StepLoader
from megatron_embed.errors import ConfigError
from megatron_embed.parallel.collectives import gather_objects, raise_on_all_ranks
from megatron_embed.parallel.topology import Topology
from megatron_embed.run.task import Inputs


def fork_server(inputs: Inputs | None) -> AbstractContextManager[ForkServer | None]:
    """The process that forks this rank's workers, if it may need some. Call it before there are process groups."""
    if inputs is None or not may_need_workers(inputs.config):
        return contextlib.nullcontext()

    def build_for(dp_rank: int, dp_size: int) -> Build:
        return inputs.task.build_loader(inputs, dp_rank, dp_size).prepare

    for file in inputs.records.files:
        file[0]  # a compressed file is unpacked here, once for all workers
    return ForkServer(build_for)


def may_need_workers(config: RunConfig) -> bool:
    """Whether data.workers asks for processes, or leaves it open and a replica has several ranks; on Linux alone, whose
    kernel hands memory to other processes and ends a process with its parent."""
    sizes = config.parallel
    if not sys.platform.startswith("linux"):
        return False
    replica = (sizes.tensor_model_parallel_size * sizes.pipeline_model_parallel_size * sizes.context_parallel_size)
    return replica > 1 if config.data.workers is None else config.data.workers > 0


def receive_batches(loader: StepLoader[Any], inputs: Inputs, topology: Topology, server: ForkServer | None) -> None:
    """Let the loader take its batches from worker processes, if there are to be some. Called by all ranks; gathers of
    small objects over the world.

    Raises:
        ConfigError: on all ranks, if the processes cannot be started.
    """
    config, first_step = inputs.config, inputs.resume_state.steps
    if not may_need_workers(config):
        return
    place = (node_name(), topology.dp_rank, server is not None)
    places = gather_objects(place, dist.group.WORLD)
    ranks = [rank for rank, (node, dp_rank, _) in enumerate(places) if (node, dp_rank) == place[:2]]
    is_first = topology.rank == ranks[0]
    count = int(len(ranks) > 1) if config.data.workers is None else config.data.workers
    if not places[ranks[0]][2]:
        count = 0
    error, connections = None, []
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(listen()) if is_first and count and len(ranks) > 1 else None
        names = gather_objects(None if listener is None else listener.getsockname(), dist.group.WORLD)
        try:
            if is_first and count:
                assert server is not None
                connections = start_workers(server, topology, first_step, count, len(ranks) - 1, listener)
            elif count:
                name, timeout = names[ranks[0]], config.parallel.timeout_seconds
                connections = [connect(name, worker, timeout) for worker in range(count)]
        except OSError as os_error:
            error = ConfigError(f"data.workers = {config.data.workers}: the processes that prepare batches cannot be "
                                f"started ({os_error.strerror or os_error}); set it to 0", key="data.workers")
        raise_on_all_ranks(error)
    if connections:
        loader.receive_from(BatchReceiver(connections, first_step))


def start_workers(server: ForkServer, topology: Topology, first_step: int, count: int, others: int,
                  listener: socket.socket | None) -> list[socket.socket]:
    """Start the workers for this rank and so many others; this rank's connections to them. Raises OSError."""
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(count)]
    accepted: list[list[socket.socket]] = [[] for _ in pairs]
    if listener is not None:
        accepted = accept(listener, count, others, topology.sizes.timeout_seconds)
    server.start(dp_rank=topology.dp_rank, dp_size=topology.dp_size, first_step=first_step,
                 connections=[[theirs, *more] for (_, theirs), more in zip(pairs, accepted, strict=True)])
    return [own for own, _ in pairs]


def node_name() -> tuple[str, ...]:
    """Equal for processes that can connect to each other by sockets without an address: one kernel, one network."""
    try:
        return (Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/net"))
    except OSError:
        return (socket.gethostname(), str(os.getpid()))
