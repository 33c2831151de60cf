"""The other side of ranks.py: forks workers, which serve calls one after another, each in a clean world."""

import contextlib
import ctypes
import datetime
import faulthandler
import gc
import importlib
import os
import pickle
import signal
import sys
import time
import traceback
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import Any

import torch
import torch.distributed as dist

from tests.helpers.fixed_libraries import fix_libraries
from tests.helpers.ranks import CONNECT_SECONDS, STACK_SIGNAL, Call, Report

IMPORTED = ("megatron_embed.run.assemble", "torch.distributed.checkpoint", "transformers.models.bert.modeling_bert",
            "transformers.models.qwen3.modeling_qwen3")
"""Import the modules that most calls need; all workers share them."""


def nurse(descriptor: int, parent: int, libraries: list[str]) -> None:
    """Forks workers until the other end of the pipe is closed.

    `parent` is the process to die with, `libraries` what the workers need besides IMPORTED.

    Nothing here may start a thread: a fork takes only the one that forks along.
    """
    _die_with(parent)
    gc.disable()  # A seventh of the imports' time.
    fix_libraries()
    for module in (*IMPORTED, *libraries):
        importlib.import_module(module)
    torch.set_num_threads(1)
    gc.freeze()  # Else every call's collection walks through all of torch: 90 ms instead of 5.
    gc.enable()
    assert len(os.listdir("/proc/self/task")) == 1 if sys.platform == "linux" else True, "a thread was started"
    connection, codes = Connection(descriptor), dict[int, int]()
    while True:
        try:
            request, *arguments = connection.recv()
        except EOFError:
            return
        if request == "fork":
            started = _fork(connection, *arguments)
            codes.pop(started, None)  # of an earlier worker: the system gives process numbers again
            connection.send(started)
            continue
        (worker,) = arguments
        if worker not in codes:
            process, status = os.waitpid(worker, 0 if request == "wait" else os.WNOHANG)
            if process:
                codes[worker] = os.waitstatus_to_exitcode(status)
        connection.send(codes[worker] if request == "wait" else int(worker in codes))


def _fork(nursery: Connection, output: str, stacks_file: str) -> int:
    """Starts a worker in a session of its own, which is there when this returns. Returns its process number."""
    descriptor, parent, (ready, tell) = recv_handle(nursery), os.getpid(), os.pipe()
    worker = os.fork()
    if worker:
        os.close(descriptor)
        os.close(tell)
        os.read(ready, 1)
        os.close(ready)
        return worker
    try:
        os.setsid()
        nursery.close()
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for standard in (1, 2):
            os.dup2(file, standard)
        os.write(tell, b"1")
        for opened in (file, ready, tell):
            os.close(opened)
        _serve(descriptor, parent, stacks_file)
    except BaseException:  # noqa: BLE001  a fork must not run what its parent has still to do
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _serve(descriptor: int, parent: int, stacks_file: str) -> None:
    """Answers calls until the other end of the pipe is closed."""
    _die_with(parent)
    connection, imported = Connection(descriptor), len(sys.modules)
    with open(stacks_file, "w", encoding="utf-8") as stacks:
        faulthandler.register(STACK_SIGNAL, file=stacks, all_threads=True)
        while True:
            try:
                message = connection.recv_bytes()
            except EOFError:
                os._exit(0)
            _answer(connection, message)
            if len(sys.modules) > imported + 100:  # as at the nursery's end: a library stays
                gc.freeze()
                imported = len(sys.modules)


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when pytest dies, however it dies and whatever hangs here."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _answer(connection: Connection, message: bytes) -> None:
    """Run one call, report, then undo what it left; a failure is reported before the group is torn down."""
    environment, directory, is_connected = dict(os.environ), os.getcwd(), True
    try:
        call = pickle.loads(message)
        assert isinstance(call, Call)
        is_connected = False
        _enter_world(call)
        is_connected = True
        report = Report(value=call.function(*call.args, **call.kwargs), finished=time.monotonic())
        payload = pickle.dumps(report)
    except BaseException as error:  # noqa: BLE001  SystemExit and KeyboardInterrupt are results too
        payload = _failure(error, is_connected)
        # Sent before the clean-up: that breaks the connections of the other ranks, whose errors then come second.
        connection.send_bytes(payload)
        _leave_world(environment, directory, synchronize=False)
        return
    # Sent after it: the next call must not meet what this one left.
    _leave_world(environment, directory, synchronize=True)
    connection.send_bytes(payload)


def _failure(error: BaseException, is_connected: bool) -> bytes:
    text = "".join(traceback.format_exception(error))
    finished = time.monotonic()
    try:
        payload = pickle.dumps(Report(error=error, text=text, finished=finished, is_connected=is_connected))
        pickle.loads(payload)  # Some exceptions can be written but not read back.
        return payload
    except Exception:  # noqa: BLE001  whatever a foreign exception's __reduce__ raises
        return pickle.dumps(Report(error=RuntimeError(text), text=text, finished=finished, is_connected=is_connected))


def _enter_world(call: Call) -> None:
    os.environ |= {
        "RANK": str(call.rank),
        "WORLD_SIZE": str(call.world_size),
        "LOCAL_RANK": str(call.rank),
        "LOCAL_WORLD_SIZE": str(call.world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(call.master_port),
    }
    torch.manual_seed(0)
    # Longer than the pool waits, so that a hang is found by the pool, which shows every rank's stack.
    timeout = datetime.timedelta(seconds=call.timeout_seconds + 60)
    store = dist.FileStore(call.store_file, call.world_size)
    # As parallel/topology.py does.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=call.rank, world_size=call.world_size,
                            timeout=datetime.timedelta(seconds=CONNECT_SECONDS))
    dist.distributed_c10d._set_pg_timeout(timeout)


def _leave_world(environment: dict[str, str], directory: str, synchronize: bool) -> None:
    os.environ.clear()
    os.environ |= environment
    os.chdir(directory)
    for signum in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(signum, signal.SIG_DFL)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    if dist.is_initialized() and synchronize:
        # A rank that is done must not break the connections of one that is not; one that failed does so by intent.
        with contextlib.suppress(RuntimeError):
            dist.barrier()
    _forget_megatron()
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # Eight workers that keep the largest step they ever ran fill the machine.


def _forget_megatron() -> None:
    """Reset Megatron-Core's globals, those of its modules that were imported."""
    modules: dict[str, Any] = sys.modules
    prefix = "megatron.core."
    if parallel_state := modules.get(prefix + "parallel_state"):
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_global_memory_buffer()
    if calculator := modules.get(prefix + "num_microbatches_calculator"):
        calculator.destroy_num_microbatches_calculator()
    if machine := modules.get(prefix + "rerun_state_machine"):
        machine.destroy_rerun_state_machine()
    if random := modules.get(prefix + "tensor_parallel.random"):
        # The tracker is created again, empty, by the next seeding.
        random._CUDA_RNG_STATE_TRACKER = None
        random._CUDA_RNG_STATE_TRACKER_INITIALIZED = False
