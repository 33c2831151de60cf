"""Where files are few, the ranks of a node reach the run's store through the relay of their local rank 0."""

import contextlib
import datetime
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_embed.config.schema import ParallelConfig
from megatron_embed.errors import LostRankError, UserError
from megatron_embed.parallel import heartbeat, relay
from megatron_embed.parallel.rendezvous import Rendezvous
from tests.helpers.ranks import run_on_ranks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sockets in Linux' abstract namespace")
PER_NODE = 2


@pytest.fixture
def store():
    """An agent's store."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@contextlib.contextmanager
def nodes(port):
    """Make this worker a rank of a run on nodes of two ranks, whose store is at the port."""
    rank, name = dist.get_rank(), relay._socket_name
    dist.destroy_process_group()
    os.environ |= {"LOCAL_RANK": str(rank % PER_NODE), "LOCAL_WORLD_SIZE": str(PER_NODE), "MASTER_PORT": str(port),
                   "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with mock.patch.object(relay, "_SOFT_LIMIT", 100), mock.patch.object(
            relay, "_socket_name", lambda address: f"{name(address)}-{rank // PER_NODE}"):
        yield


def connections_to(port):
    """Connections of this process to a port of this machine."""
    count = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as opened:
            count += opened.getpeername()[1:2] == (port,)
    return count


def sums_and_connections(port):
    """(sums of rank + 1 over each group of a layout, this process' connections to the store)."""
    from megatron_embed.parallel.topology import initialize, shutdown

    rank = dist.get_rank()
    with nodes(port):
        topology = initialize(ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2,
                                             timeout_seconds=60))
        sums = []
        for group in (topology.groups.tp, topology.groups.pp, topology.dp_group, dist.new_group([1, 6]), None):
            if group is None or dist.get_rank(group) >= 0:
                sums.append(torch.tensor(rank + 1.0))
                dist.all_reduce(sums[-1], group=group)
        with heartbeat.monitor_ranks(topology, lambda message, is_reporting_rank: None):
            time.sleep(0.3)
            dist.barrier()
            opened = connections_to(port)
            dist.barrier()
        shutdown()
    return [value.item() for value in sums], opened


def test_ranks_of_a_node_have_one_process_connected_to_the_store(store):
    """Eight ranks as four nodes: the sums of every group, with connections of local ranks 0 only."""
    results = run_on_ranks(sums_and_connections, 8, store.port)
    assert [sums for sums, _ in results] == [
        [3, 6, 4, 36], [3, 8, 6, 9, 36], [7, 10, 4, 36], [7, 12, 6, 36],
        [11, 6, 12, 36], [11, 8, 14, 36], [15, 10, 12, 9, 36], [15, 12, 14, 36]]
    assert [opened for _, opened in results] == [3, 0] * 4
