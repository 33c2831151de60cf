"""What starting the process groups of a layout costs: open files and CPU seconds per rank, and how they grow.

    python tools/bench_groups.py [--ranks 16 32 64] [--fake 64 256 1024] [--layout tp2 pp2]
    python tools/bench_groups.py --ranks --fake --store 1024 --ranks-per-node 8 --open-files 1024

Real ranks are forks on this machine that talk over gloo, each group once; then the same as it would be without
parallel/connections.py (every group connects fully, none is shared). The fake world calls the same code without
connections, as rank 0 of that many: its time is Python's alone, its groups are those of a rank.

`--store`: ranks go through the rendezvous, exchange the addresses of 2 log2(ranks) peers in the group's store and send
heartbeats, without a process group. Local rank 0 of a node is a process, its other ranks are threads of another one.
Printed are the open files of rank 0, which hosts the store.
"""

import argparse
import contextlib
import gc
import json
import math
import os
import resource
import signal
import socket
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from children import die_with_parent

from megatron_embed.config.schema import ParallelConfig
from megatron_embed.parallel import connections, heartbeat, relay, topology
from megatron_embed.parallel.rendezvous import Rendezvous

PLAIN = {"TORCH_GLOO_LAZY_INIT": "0"}
MEETING_SECONDS = 150
"""How long a rank waits for the others."""


def sizes_of(layout: list[str]) -> ParallelConfig:
    names = {"tp": "tensor_model_parallel_size", "pp": "pipeline_model_parallel_size", "cp": "context_parallel_size"}
    return ParallelConfig(**{names[text[:2]]: int(text[2:]) for text in layout})


def measured(sizes: ParallelConfig, *, plain: bool, talk: bool) -> dict[str, float]:
    """CPU seconds of `initialize`, groups with gloo, and open files after it and after one message in every group."""
    start = time.process_time()
    shared = contextlib.nullcontext if plain else connections.shared_groups
    with mock.patch.object(topology, "shared_groups", shared):
        topology.initialize(sizes)
    seconds = time.process_time() - start
    groups = [group for group in dist.distributed_c10d._world.pg_map if group.size() > 1]
    if talk:
        for group in groups:
            dist.all_reduce(torch.ones(1), group=group)
        dist.barrier()
    return {"cpu": seconds, "files": len(os.listdir("/proc/self/fd")), "groups": len(groups),
            "peers": sum(group.size() - 1 for group in groups)}


def join_node(rank: int, ranks: int, ranks_per_node: int, port: int) -> None:
    """Make this process a rank of a run with so many ranks on a node, whose store is at the port."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank % ranks_per_node),
                   "LOCAL_WORLD_SIZE": str(ranks_per_node), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    name = relay._socket_name
    relay._socket_name = lambda address: f"{name(address)}-{rank // ranks_per_node}"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def all_succeed(children: list[int]) -> bool:
    """Wait for forks; the first that fails ends the others, which may wait for it."""
    running, succeeded = set(children), True
    while running:
        child, status = os.wait()
        running.discard(child)
        if status and succeeded:
            succeeded = False
            for other in running:
                os.kill(other, signal.SIGKILL)
    return succeeded


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Print what ends a fork, which must not run what its parent has still to do."""
    try:
        yield
    except BaseException:  # noqa: BLE001
        traceback.print_exc()


def on_ranks(ranks: int, ranks_per_node: int, sizes: ParallelConfig, *, plain: bool) -> dict[str, float]:
    """Medians over real ranks, the largest number of open files, and that of rank 0, which hosts the store."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(ranks):
            child = os.fork()
            if child == 0:
                die_with_parent()
                code = 1
                with reported():
                    connections.prepare()
                    os.environ |= PLAIN if plain else {}
                    join_node(rank, ranks, ranks_per_node, port)
                    torch.set_num_threads(1)
                    barrier = Rendezvous(rank, ranks)
                    barrier.wait_for_all(MEETING_SECONDS)
                    dist.init_process_group("gloo", store=barrier.group_store(MEETING_SECONDS), rank=rank,
                                            world_size=ranks)
                    result = measured(sizes, plain=plain, talk=True)
                    with open(f"{folder}/{rank}.json", "w", encoding="ascii") as file:
                        json.dump(result, file)
                    dist.barrier()
                    code = 0
                os._exit(code)
            children.append(child)
        if not all_succeed(children):
            return {}
        results = []
        for rank in range(ranks):
            with open(f"{folder}/{rank}.json", encoding="ascii") as file:
                results.append(json.load(file))
    return {name: statistics.median(result[name] for result in results) for name in results[0]} | {
        "files": max(result["files"] for result in results[1:]), "host": results[0]["files"]}


def in_fake_world(ranks: int, sizes: ParallelConfig) -> dict[str, float]:
    """Rank 0 of a world without connections, in a process of its own."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    reader, writer = os.pipe()
    if os.fork() == 0:
        die_with_parent()
        try:
            os.environ |= {"RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0"}
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
            new_group = dist.new_group
            with mock.patch.object(dist, "new_group", lambda backend=None, **rest: new_group(**rest)), \
                    mock.patch.object(dist, "get_backend", return_value="gloo"):
                os.write(writer, json.dumps(measured(sizes, plain=False, talk=False)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        result: dict[str, float] = json.loads(pipe.read())
    os.wait()
    return result


def files_of_host(ranks: int, ranks_per_node: int, *, relays: bool) -> tuple[int, float]:
    """(open files of rank 0 while all ranks are connected to its store, seconds from the first fork to then); (0, 0.0)
    if a rank failed."""
    gc.collect()
    gc.freeze()  # so that forks share the memory
    port, (reader, writer) = free_port(), os.pipe()
    children, start = [], time.perf_counter()
    for first in range(0, ranks, ranks_per_node):
        for own in (range(first, first + 1), range(first + 1, first + ranks_per_node)):
            child = os.fork()
            if child == 0:
                die_with_parent()
                code = 1
                with reported():
                    files = meet(own, ranks, ranks_per_node, port, relays=relays)
                    if own[0] == 0:
                        os.write(writer, str(files).encode())
                    code = 0
                os._exit(code)
            children.append(child)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        files, seconds = int(pipe.read() or 0), time.perf_counter() - start
    return (files, seconds) if all_succeed(children) else (0, 0.0)


def meet(own: range, ranks: int, ranks_per_node: int, port: int, *, relays: bool) -> int:
    """Open files of this process, which has some ranks of a node, while all ranks are connected to the store."""
    join_node(own[0], ranks, ranks_per_node, port)
    relay._HARD_LIMIT = 2 * ranks if relays else resource.RLIM_INFINITY
    with ThreadPoolExecutor(len(own)) as threads:
        files = next(iter(threads.map(lambda rank: meet_as(rank, ranks, port), own)))
    for other in relay._relays.values():
        other._linger()
    return files


def meet_as(rank: int, ranks: int, port: int) -> int:
    """What a rank writes into the store at its start and reads from it, and its heartbeats."""
    barrier = Rendezvous(rank, ranks)
    barrier.wait_for_all(MEETING_SECONDS)
    monitor = heartbeat.HeartbeatMonitor("127.0.0.1", port, rank=rank, world_size=ranks, silence_seconds=300.0,
                                         on_loss=lambda message, is_reporting_rank: os._exit(1))
    store = barrier.group_store(MEETING_SECONDS)
    store.set(f"address/{rank}", bytes(200))  # type: ignore[arg-type]  # bytes are taken
    for power in range(ranks.bit_length() - 1):
        for peer in (rank + 2**power, rank - 2**power):
            store.get(f"address/{peer % ranks}")
    store.add("ready", 1)
    while rank == 0 and store.add("ready", 0) < ranks:
        time.sleep(0.2)
    files = len(os.listdir("/proc/self/fd"))
    if rank == 0:
        store.set("end", "")
    store.wait(["end"])
    monitor.close(heartbeat.DONE)
    store.add("left", 1)
    while rank == 0 and store.add("left", 0) < ranks:
        time.sleep(0.2)
    return files


def exponent(small: tuple[int, float], large: tuple[int, float]) -> float:
    return math.log(large[1] / small[1]) / math.log(large[0] / small[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[16, 32, 64])
    parser.add_argument("--fake", type=int, nargs="*", default=[64, 256, 1024])
    parser.add_argument("--layout", nargs="*", default=["tp2", "pp2"], help="tp, pp and cp sizes; none: data parallel")
    parser.add_argument("--store", type=int, nargs="*", default=[], help="ranks whose connections to a store to count")
    parser.add_argument("--ranks-per-node", type=int, default=8)
    parser.add_argument("--open-files", type=int, help="RLIMIT_NOFILE of the ranks, both limits")
    args = parser.parse_args()
    if args.open_files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (args.open_files, args.open_files))
        relay._HARD_LIMIT = args.open_files
    sizes = sizes_of(args.layout)
    columns = "| groups | open files | of rank 0 | CPU s "
    print(f"torch {torch.__version__}, {' '.join(args.layout) or 'data parallel'}\n\n| ranks {columns}"
          f"{columns.replace('groups', 'before: groups')}|\n|{'---|' * 9}")
    for ranks in args.ranks:
        cells: list[Any] = [ranks]
        for plain in (False, True):
            result = on_ranks(ranks, args.ranks_per_node, sizes, plain=plain)
            cells += [f"{result['groups']:.0f}", f"{result['files']:.0f}", f"{result['host']:.0f}",
                      f"{result['cpu']:.3f}"] if result else ["fails", "", "", ""]
        print("|", " | ".join(map(str, cells)), "|", flush=True)
    for ranks in args.store:
        for relays in (True, False):
            files, seconds = files_of_host(ranks, args.ranks_per_node, relays=relays)
            how = f"through a relay on each of {ranks // args.ranks_per_node} nodes" if relays else "directly"
            print(f"store of {ranks} ranks, {how}: " + (f"{files:,} open files of its host, {seconds:.0f} s" if files
                                                       else "fails"), flush=True)
    fakes = {ranks: in_fake_world(ranks, sizes) for ranks in args.fake}
    for ranks, result in fakes.items():
        print(f"fake world of {ranks}: {result['groups']:.0f} groups with {result['peers']:.0f} peers, "
              f"{result['cpu']:.3f} s of Python")
    if len(fakes) > 1:
        first, last = min(fakes), max(fakes)
        print(f"exponent of the time {exponent((first, fakes[first]['cpu']), (last, fakes[last]['cpu'])):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
