"""Many ranks on one machine: gloo worker processes that are started once and serve the whole test session.

A first process imports torch and the rest, which takes seconds; the workers are forks of it and cost milliseconds, and
so does a call to them. Every call sees a world of exactly `world_size` ranks: a process group of its own, torchrun's
variables, seeded torch; all is undone afterwards.
"""

import atexit
import contextlib
import itertools
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from multiprocessing.reduction import send_handle
from pathlib import Path
from typing import Any

from tests.helpers.ports import free_port

REPOSITORY = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = 300.0
"""Counts a worker's start, which took two minutes where the libraries had to come from a cold disk."""
CONNECT_SECONDS = 90.0
"""Within which the ranks of a call must have connected to each other."""
GRACE_SECONDS = 5.0
"""After the first failure the other ranks get this long to notice it; those still stuck are killed and replaced."""
MOST_THREADS = 64
"""A worker with more is replaced: gloo's threads of groups that something still holds wake up all the time."""
LIBRARIES = ("pytest", "sentence_transformers", "peft")
"""Those of them that the tests of this session import are imported once, and not by every worker."""
STACK_SIGNAL = signal.SIGUSR2
"""Makes a worker write its Python stacks to a file. Not SIGUSR1: that asks a training run to save and stop."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call for one rank."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rank: int
    world_size: int
    store_file: str
    master_port: int
    timeout_seconds: float


@dataclass(frozen=True, kw_only=True)
class Report:
    """One rank's result. `finished` is the monotonic clock, common to all processes of the machine.

    `is_connected`: whether the rank had its process group, so that the function was called.
    """

    value: Any = None
    error: BaseException | None = None
    text: str = ""
    finished: float = 0.0
    is_connected: bool = True


class _Nursery:
    """The process whose forks the workers are; it has imported what they need and never computes itself."""

    def __init__(self) -> None:
        self.connection, remote = Pipe()
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TORCH_GLOO_LAZY_INIT": "1",  # as parallel/connections.py sets it
            # pyarrow's allocator otherwise starts a thread, and a fork takes only the one that forks.
            "JE_ARROW_MALLOC_CONF": "background_thread:false",
            # Otherwise torch initializes CUDA when it counts devices, and the forks could not use them.
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH"), *sys.path])),
        }
        if sys.platform == "linux":
            # Gloo otherwise asks for the address of the host name, which some sandboxes cannot resolve.
            environment["GLOO_SOCKET_IFNAME"] = "lo"
        libraries = [name for name in LIBRARIES if name in sys.modules]
        command = f"from tests.helpers.rank_worker import nurse; nurse({remote.fileno()}, {os.getpid()}, {libraries})"
        # A session of its own, so that Ctrl-C reaches pytest alone.
        self.process = subprocess.Popen([sys.executable, "-c", command], pass_fds=[remote.fileno()], env=environment,
                                        stdin=subprocess.DEVNULL, start_new_session=True)
        remote.close()

    def fork(self, remote: Connection, output: Path, stacks: Path) -> int:
        """Starts a worker at the other end of `remote`. Returns its process number."""
        self.connection.send(("fork", str(output), str(stacks)))
        send_handle(self.connection, remote.fileno(), self.process.pid)
        return self._answer()

    def exit_code(self, worker: int) -> int:
        """Waits for the end of a worker."""
        self.connection.send(("wait", worker))
        return self._answer()

    def has_ended(self, worker: int) -> bool:
        self.connection.send(("ended", worker))
        return bool(self._answer())

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()

    def _answer(self) -> int:
        answer = self.connection.recv()
        assert isinstance(answer, int)
        return answer


class _Worker:
    """One process, its pipe, and the files that it writes."""

    def __init__(self, folder: Path, nursery: _Nursery) -> None:
        folder.mkdir()
        self.output, self.stacks, self.nursery = folder / "output", folder / "stacks", nursery
        self.connection, remote = Pipe()
        self.process = nursery.fork(remote, self.output, self.stacks)
        remote.close()

    def receive(self) -> Report:
        try:
            report = pickle.loads(self.connection.recv_bytes())
            assert isinstance(report, Report)
            return report
        except (EOFError, ConnectionResetError):
            code = self.nursery.exit_code(self.process)
            text = f"the worker process died with exit code {code}; the end of its output:\n{self._end_of_output()}"
            # gloo's own thread aborts the process if a peer closes a connection that is just being made.
            is_connected = "gloo::EnforceNotMet" not in text
            return Report(error=RuntimeError(text), text=text, finished=time.monotonic(), is_connected=is_connected)

    def stack(self) -> str:
        """Ask for the Python stacks and return them."""
        os.kill(self.process, STACK_SIGNAL)
        deadline, size = time.monotonic() + 2.0, -1
        while time.monotonic() < deadline:
            time.sleep(0.1)
            previous, size = size, self.stacks.stat().st_size if self.stacks.exists() else 0
            if 0 < size == previous:
                break
        text = self.stacks.read_text(encoding="utf-8", errors="replace") if size > 0 else ""
        return text or f"(no stack: not in Python)\n{self._end_of_output()}"

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            # The whole session: a checkpoint's writer has started a process of its own, which would live on.
            os.killpg(self.process, signal.SIGKILL)
        self.nursery.exit_code(self.process)
        self.connection.close()

    def has_ended(self) -> bool:
        return self.nursery.has_ended(self.process)

    def threads(self) -> int:
        """Number of threads of the process; 0 on systems without /proc."""
        with contextlib.suppress(OSError):
            return len(os.listdir(f"/proc/{self.process}/task"))
        return 0

    def _end_of_output(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")[-4000:]


class RankPool:
    """Workers that are started when first needed; worker i serves as rank i."""

    def __init__(self) -> None:
        self._workers: dict[int, _Worker] = {}
        self._nursery: _Nursery | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="ranks_"))
        self._numbers = itertools.count()

    def run(
        self, function: Callable[..., Any], world_size: int, args: tuple[Any, ...], kwargs: dict[str, Any],
        timeout_seconds: float,
    ) -> list[Any]:  # fmt: skip
        """See `run_on_ranks`.

        On a busy machine gloo's ranks sometimes fail to connect to each other (a connection that is closed, or that is
        waited for in vain). The function has not been called then, and new workers try once more, with a warning.
        """
        reports = self._call(function, world_size, args, kwargs, timeout_seconds)
        failed = [report for report in reports.values() if report.error is not None]
        if failed and not min(failed, key=lambda report: report.finished).is_connected:
            warnings.warn("gloo's ranks did not connect; new workers try once more", stacklevel=3)
            self._kill(list(self._workers))
            reports = self._call(function, world_size, args, kwargs, timeout_seconds)
        failed_ranks = [rank for rank, report in reports.items() if report.error is not None]
        if failed_ranks:
            rank = min(failed_ranks, key=lambda rank: reports[rank].finished)
            error = reports[rank].error
            assert error is not None
            error.add_note(f"rank {rank} of {world_size} failed first:\n{reports[rank].text}")
            raise error
        self._kill([rank for rank in range(world_size) if self._workers[rank].threads() > MOST_THREADS])
        return [reports[rank].value for rank in range(world_size)]

    def _call(
        self, function: Callable[..., Any], world_size: int, args: tuple[Any, ...], kwargs: dict[str, Any],
        timeout_seconds: float,
    ) -> dict[int, Report]:  # fmt: skip
        """Reports by rank, of all ranks or, after a failure, of those that ended within the grace time."""
        store_file, master_port = str(self._folder / f"store{next(self._numbers)}"), free_port()
        messages = [
            pickle.dumps(Call(function=function, args=args, kwargs=kwargs, rank=rank, world_size=world_size,
                              store_file=store_file, master_port=master_port, timeout_seconds=timeout_seconds))
            for rank in range(world_size)
        ]  # fmt: skip
        for rank in range(world_size):
            if rank not in self._workers:
                self._nursery = self._nursery or _Nursery()
                self._workers[rank] = _Worker(self._folder / f"worker{next(self._numbers)}", self._nursery)
        for rank, message in enumerate(messages):
            with contextlib.suppress(BrokenPipeError):  # It died between two calls: receive() says how.
                self._workers[rank].connection.send_bytes(message)
        return self._collect(world_size, time.monotonic() + timeout_seconds, timeout_seconds)

    def _collect(self, world_size: int, deadline: float, timeout_seconds: float) -> dict[int, Report]:
        """Reports by rank, of all ranks or, after a failure, of those that ended within the grace time."""
        reports: dict[int, Report] = {}
        failed = False
        while len(reports) < world_size:
            pending = {self._workers[rank].connection: rank for rank in range(world_size) if rank not in reports}
            ready = wait(list(pending), max(0.0, deadline - time.monotonic()))
            if not ready and failed:
                self._kill(pending.values())
                break
            if not ready:
                raise TimeoutError(self._describe_hang(world_size, reports, timeout_seconds))
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = pending[connection]
                reports[rank] = self._workers[rank].receive()
                if self._workers[rank].has_ended():
                    self._kill([rank])
            if not failed and any(report.error is not None for report in reports.values()):
                failed, deadline = True, min(deadline, time.monotonic() + GRACE_SECONDS)
        return reports

    def _describe_hang(self, world_size: int, reports: dict[int, Report], timeout_seconds: float) -> str:
        """Every rank's stack, for the text of TimeoutError; ends the pool."""
        lines = [f"{world_size - len(reports)} of {world_size} ranks still ran after {timeout_seconds:g} s"]
        for rank in range(world_size):
            lines.append(f"--- rank {rank}: " + ("had finished" if rank in reports else self._workers[rank].stack()))
        self._kill(list(self._workers))
        return "\n".join(lines)

    def _kill(self, ranks: Any) -> None:
        for rank in list(ranks):
            self._workers.pop(rank).kill()

    def shutdown(self) -> None:
        """End every worker and delete their files; the pool starts new ones if it is used again."""
        self._kill(self._workers)
        if self._nursery is not None:
            self._nursery.end()
            self._nursery = None
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True, exist_ok=True)


_POOL: RankPool | None = None


def run_on_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = TIMEOUT_SECONDS, **kwargs: Any
) -> list[Any]:
    """Results, by rank, of `function(*args, **kwargs)` on `world_size` gloo ranks, each a process of its own.

    The function must be defined at the top level of a module; arguments and results travel by pickle. In it,
    `torch.distributed` is initialized and RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set.

    Raises:
        the first failing rank's exception, its traceback in a note;
        TimeoutError: after `timeout_seconds`, with the Python stack of every rank that still ran.
    """
    global _POOL
    if _POOL is None:
        _POOL = RankPool()
        atexit.register(shutdown_ranks)
    return _POOL.run(function, world_size, args, kwargs, timeout_seconds)


def shutdown_ranks() -> None:
    """End the session's workers; conftest.py calls it, and so does the end of the process."""
    global _POOL
    if _POOL is not None:
        _POOL.shutdown()
        shutil.rmtree(_POOL._folder, ignore_errors=True)
        _POOL = None
