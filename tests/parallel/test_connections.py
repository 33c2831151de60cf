"""Process groups connect and share what they can, and a process may open as many files as the system lets it."""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.utils import _DistWrapper

from megatron_embed.config.schema import ParallelConfig
from megatron_embed.parallel import connections
from megatron_embed.parallel.collectives import gather_to_first
from megatron_embed.parallel.topology import initialize
from tests.helpers.ranks import run_on_ranks


def sums_and_sockets():
    """(sums of 1 over each group of a layout, size of each, whether equal groups are one, sockets of all of them)."""
    before = sockets()
    groups = initialize(ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)).groups
    named = {name: getattr(groups, name) for name in ("tp", "pp", "mp", "dp", "dp_cp", "tp_dp_cp", "tp_cp")}
    sums = {name: torch.ones(1) for name in named}
    for name, group in named.items():
        dist.all_reduce(sums[name], group=group)
    return ({name: int(total) for name, total in sums.items()}, {name: group.size() for name, group in named.items()},
            groups.dp is groups.dp_cp and groups.tp is groups.tp_cp, sockets() - before)


def sockets():
    return sum(os.readlink(f"/proc/self/fd/{name}").startswith("socket:") for name in os.listdir("/proc/self/fd")
               if os.path.lexists(f"/proc/self/fd/{name}"))


def test_eight_ranks_need_few_sockets():
    """With all groups connected, WORLD and nine. Connected fully and not shared it would be one to each of 38 peers or
    more, and a listening one for each of 16 groups."""
    for sums, sizes, shared, opened in run_on_ranks(sums_and_sockets, 8):
        assert sums == sizes == {"tp": 2, "pp": 2, "mp": 4, "dp": 2, "dp_cp": 2, "tp_dp_cp": 4, "tp_cp": 2}
        assert shared
        assert opened <= 26


def gathered_and_scattered():
    """What a checkpoint's plans become: (this rank's answer, where a rank fails, sockets that it all opened)."""
    import megatron_embed.checkpoint.load  # noqa: F401  its plans go along a tree

    initialize(ParallelConfig())
    before, rank, size = sockets(), dist.get_rank(), dist.get_world_size()
    wrapper = _DistWrapper(None, True, 0)
    answer = wrapper.reduce_scatter("plan", lambda: {"rank": rank}, lambda plans: [
        (plan["rank"], [other["rank"] for other in plans]) for plan in plans])
    failures = []
    for failing in (0, size - 1):  # torch passes the error of one rank to all

        def fail(failing=failing):
            if rank == failing:
                raise ValueError(f"rank {failing} cannot")

        for step in (wrapper.reduce_scatter, wrapper.all_reduce):
            with pytest.raises(CheckpointException) as caught:
                step("plan", fail, lambda plans: plans)
            failures.append({failed: str(error[0]) for failed, error in caught.value.failures.items()})
    opened = sockets() - before
    group = dist.new_group(list(range(1, size)))  # its first rank is not the world's
    return answer, failures, opened, rank and gather_to_first(rank, group)


@pytest.mark.parametrize("ranks", [2, 5, 8])
def test_ranks_of_a_save_are_connected_along_a_tree(ranks):
    """All values arrive in order, and errors everywhere; by gloo's own gather the first rank is connected to all."""
    all_ranks = list(range(ranks))
    results = run_on_ranks(gathered_and_scattered, ranks)
    for rank, (answer, failures, opened, of_group) in enumerate(results):
        assert answer == (rank, all_ranks)
        assert failures == [{failing: f"rank {failing} cannot"} for failing in (0, 0, ranks - 1, ranks - 1)]
        assert opened <= 3, "log2(8); some are open already"
        assert of_group == {0: 0, 1: all_ranks[1:]}.get(rank)


def test_a_process_may_open_what_the_system_allows():
    code = ("import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 1000))\n"
            "from megatron_embed.parallel.connections import prepare\nprepare()\n"
            "import os; print(resource.getrlimit(resource.RLIMIT_NOFILE), os.environ['TORCH_GLOO_LAZY_INIT'])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=os.environ | {"TORCH_GLOO_LAZY_INIT": "0"})
    assert done.stdout.strip() == "(1000, 1000) 0", done.stderr


def test_groups_stay_apart_on_gpus(monkeypatch):
    monkeypatch.setattr(connections, "HAS_CUDA", True)
    create = connections.parallel_state.create_group
    with connections.shared_groups():
        assert connections.parallel_state.create_group is create

