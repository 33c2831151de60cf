"""The pool of gloo workers itself: results, failures, hangs, and nothing left over from one call to the next."""

import os
import pickle
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from megatron_embed.errors import ConfigError
from megatron_embed.platform.compat import parallel_state  # before any module of Megatron's
from tests.helpers import ranks
from tests.helpers.ranks import REPOSITORY, RankPool, Report, run_on_ranks


def sum_of_ranks(offset, scale=1.0):
    value = torch.tensor([offset + dist.get_rank() * scale])
    dist.all_reduce(value)
    return dist.get_rank(), dist.get_world_size(), value.item()


def describe_world():
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
    return os.getpid(), {name: os.environ[name] for name in names}, torch.get_num_threads(), torch.rand(()).item()


def leave_traces():
    os.environ["LEFT_BEHIND"] = "1"
    os.environ["RANK"] = "99"
    torch.set_default_dtype(torch.float64)
    torch.rand(3)
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    init_num_microbatches_calculator(0, None, 4, 2, 1)
    return parallel_state.get_tensor_model_parallel_world_size()


def find_traces():
    from megatron.core import num_microbatches_calculator

    calculator = num_microbatches_calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR
    initialized = parallel_state.model_parallel_is_initialized()
    return "LEFT_BEHIND" in os.environ, initialized, calculator, torch.get_default_dtype()


def fail_on(rank):
    if dist.get_rank() == rank:
        raise ConfigError(f"rank {rank} does not like its key")
    dist.barrier()


def fail_beside_a_stuck_rank():
    dist.barrier()
    if dist.get_rank() == 1:
        time.sleep(1.0)  # else it may break the other's connection while that is still being made
        raise ConfigError("the other rank never looks")
    time.sleep(60)


def fail_after_the_other_is_done():
    dist.barrier()  # gloo connects at the first use: a rank that is done would wait in vain for one that is gone
    if dist.get_rank() == 1:
        time.sleep(0.3)
        raise ConfigError("too late")


def exit_with(code):
    sys.exit(code)


def die():
    os.write(1, b"last words of the worker\n")
    os._exit(7)


def wait_for_each_other():
    if dist.get_rank() == 0:
        dist.recv(torch.zeros(1), src=1)
    else:
        dist.recv(torch.zeros(1), src=0)


def test_results_come_by_rank_for_every_world_size():
    assert run_on_ranks(sum_of_ranks, 2, 10.0) == [(0, 2, 21.0), (1, 2, 21.0)]
    assert run_on_ranks(sum_of_ranks, 3, 0.0, scale=2.0) == [(0, 3, 6.0), (1, 3, 6.0), (2, 3, 6.0)]
    assert run_on_ranks(sum_of_ranks, 1, 5.0) == [(0, 1, 5.0)]


def test_workers_are_reused_and_each_call_sees_a_fresh_world():
    first, second = run_on_ranks(describe_world, 2), run_on_ranks(describe_world, 2)
    assert first == second  # the same processes, and the same random number from the same seed
    assert first[0][0] != first[1][0]
    assert first[1][1] == {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}
    assert first[0][2] == 1


def test_nothing_is_left_over_from_the_call_before():
    assert run_on_ranks(leave_traces, 2) == [2, 2]
    assert run_on_ranks(find_traces, 2) == [(False, False, None, torch.float32)] * 2


def test_first_failing_rank_is_raised_with_its_type_and_traceback():
    with pytest.raises(ConfigError, match="rank 1 does not like its key") as caught:
        run_on_ranks(fail_on, 2, 1)
    assert "rank 1 of 2 failed first" in caught.value.__notes__[0]
    assert "in fail_on" in caught.value.__notes__[0]
    assert run_on_ranks(sum_of_ranks, 2, 0.0)[0] == (0, 2, 1.0)


def test_rank_that_is_done_survives_the_failure_of_another():
    before = [process for process, *_ in run_on_ranks(describe_world, 2)]
    with pytest.raises(ConfigError, match="too late"):
        run_on_ranks(fail_after_the_other_is_done, 2)
    assert [process for process, *_ in run_on_ranks(describe_world, 2)] == before


def test_exit_codes_are_failures():
    with pytest.raises(SystemExit) as caught:
        run_on_ranks(exit_with, 2, 75)
    assert caught.value.code == 75


def test_only_module_level_functions_can_be_sent():
    with pytest.raises((AttributeError, pickle.PicklingError), match=r"(?i)local|lambda"):
        run_on_ranks(lambda: None, 1)


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.setattr("tests.helpers.ranks.GRACE_SECONDS", 0.5)
    pool = RankPool()
    yield pool
    pool.shutdown()
    pool._folder.rmdir()


@pytest.mark.slow
def test_hang_ends_by_timeout_with_every_stack_and_the_pool_recovers(pool):
    pool.run(sum_of_ranks, 2, (0.0,), {}, 60.0)
    started = time.monotonic()
    with pytest.raises(TimeoutError) as caught:
        pool.run(wait_for_each_other, 2, (), {}, 1.0)
    text = str(caught.value)
    assert text.startswith("2 of 2 ranks still ran after 1 s")
    for rank in (0, 1):
        assert "in wait_for_each_other" in text.split(f"--- rank {rank}:")[1].split("--- rank")[0]
    assert time.monotonic() - started < 10
    assert not pool._workers

    assert pool.run(sum_of_ranks, 1, (3.0,), {}, 60.0) == [(0, 1, 3.0)]
    with pytest.raises(RuntimeError, match=r"exit code 7[\s\S]*last words of the worker"):
        pool.run(die, 1, (), {}, 60.0)
    assert not pool._workers


@pytest.mark.slow
def test_stuck_rank_beside_a_failed_one_is_killed_after_the_grace_time(pool):
    pool.run(sum_of_ranks, 2, (0.0,), {}, 60.0)
    started = time.monotonic()
    with pytest.raises(ConfigError, match="the other rank never looks"):
        pool.run(fail_beside_a_stuck_rank, 2, (), {}, 60.0)
    assert time.monotonic() - started < 30
    assert list(pool._workers) == [1]


def start_a_child():
    return subprocess.Popen(["sleep", "600"]).pid


@pytest.mark.slow
def test_what_a_worker_started_ends_with_it(pool):
    (child,) = pool.run(start_a_child, 1, (), {}, 60.0)
    assert state_of(child) != "Z"
    pool.shutdown()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and state_of(child) != "Z":
        time.sleep(0.05)
    assert state_of(child) == "Z"


@pytest.mark.slow
def test_workers_die_with_their_parent(tmp_path):
    script = (
        "import os, signal, threading, time; from tests.helpers.ranks import run_on_ranks\n"
        "print(run_on_ranks(os.getpid, 1)[0], flush=True)\n"
        "threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()\n"
        "run_on_ranks(time.sleep, 1, 60)  # It hangs, and so does not see that the pipe is closed."
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "TMPDIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    worker = int(result.stdout)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and os.path.exists(f"/proc/{worker}") and "Z" not in state_of(worker):
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{worker}") or "Z" in state_of(worker)


def state_of(process):
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8") as file:
            return file.read().split(") ")[1][0]
    except FileNotFoundError:
        return "Z"


def test_ranks_that_do_not_connect_are_started_once_more(monkeypatch):
    run_on_ranks(sum_of_ranks, 1, 0.0)
    pool, calls = RankPool(), []
    pool._nursery = ranks._POOL._nursery  # whose libraries are there already
    original = pool._call

    def call(*arguments):
        calls.append(arguments)
        return original(*arguments) if len(calls) > 1 else {
            rank: Report(error=RuntimeError("closed by peer"), is_connected=False) for rank in range(2)}

    monkeypatch.setattr(pool, "_call", call)
    try:
        with pytest.warns(UserWarning, match="did not connect"):
            assert pool.run(sum_of_ranks, 2, (1.0,), {}, 100.0) == [(0, 2, 3.0), (1, 2, 3.0)]
    finally:
        pool._nursery = None
        pool.shutdown()
