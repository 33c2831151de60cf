"""Processes that prepare batches ahead of the steps; each batch is prepared once for all ranks of a replica on a node.

A fork server is made before there is a device, a process group or a model: nothing of these is copied, and no library
that dislikes forks has started. When the layout is known it forks the workers. A worker puts each of its batches into
memory without a name and sends every rank a descriptor of it, so that the ranks map one copy, and nothing is left
behind whenever and however a process ends.
"""

import contextlib
import ctypes
import functools
import logging
import mmap
import os
import pickle
import select
import signal
import socket
import stat
import struct
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from itertools import count
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from megatron_embed.errors import ConfigError, UserError

AHEAD = 2
"""Batches of a worker that a rank has not taken yet, at most."""
HELLO_BYTES = 8
_ALIGNMENT = 64
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals that a launcher sends to every process: a rank that finishes its step needs its workers until it has."""
_PARENT_DEATH_SIGNAL = 1
_READY = b"."
_ORDER = "5q"
"""Data-parallel rank and size, first step, steps between two of them, and number of a worker."""
_MOST_DESCRIPTORS = 253
"""Linux sends so many at once."""

Build = Callable[[int], Any]
"""Step, from 0 -> the batch of the replica."""


class ForkServer:
    """A process that forks workers once it is told for which rank; made by the constructor.

    Args:
        build_for: (data-parallel rank, data-parallel size) -> the function that builds that rank's batches. Called in
            the workers.
    """

    def __init__(self, build_for: Callable[[int, int], Build]) -> None:
        self._connection, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        self._process = _fork()
        if self._process == 0:
            _end_with(parent)
            _run(lambda: _serve_forks(other, build_for))
        other.close()

    def start(self, *, dp_rank: int, dp_size: int, first_step: int,
              connections: Sequence[Sequence[socket.socket]]) -> None:
        """Fork one worker for each list of connections, which are the worker's ends; they are closed here.

        Of n workers, worker w prepares the steps first_step + w, + n, + 2n, ... The first connection of a worker is
        that of the rank without which it ends.
        """
        for worker, own in enumerate(connections):
            order = struct.pack(_ORDER, dp_rank, dp_size, first_step + worker, len(connections), worker)
            socket.send_fds(self._connection, [order], [connection.fileno() for connection in own])
            for connection in own:
                connection.close()

    def close(self) -> None:
        """End the process and its workers."""
        self._connection.close()
        if self._process:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._process, 0)
            self._process = 0

    def __enter__(self) -> "ForkServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class BatchReceiver:
    """The batches of consecutive steps, from the workers of this rank's replica.

    Args:
        connections: to each worker, in order.
        first_step: the step of the first batch.

    Attributes:
        next_step: the step of the next batch.
    """

    def __init__(self, connections: Sequence[socket.socket], first_step: int) -> None:
        self.next_step = self._first_step = first_step
        self._connections = connections

    def take(self) -> Any:
        """The batch of `next_step`; waits for it.

        Raises:
            UserError: the worker's, equal on all ranks of the replica, or one that says that the worker is gone.
        """
        connection = self._connections[(self.next_step - self._first_step) % len(self._connections)]
        descriptors: list[int] = []
        with contextlib.suppress(ConnectionError):
            _, descriptors, _, _ = socket.recv_fds(connection, len(_READY), 1)
        if not descriptors:
            raise ConfigError(f"data.workers: a process that prepares batches is gone before that of step "
                              f"{self.next_step + 1}, as if killed for want of memory; start the run again, with fewer "
                              "of them", key="data.workers")
        with contextlib.suppress(ConnectionError):
            connection.send(_READY)
        self.next_step += 1
        with os.fdopen(descriptors[0], "rb") as file:
            value = _loaded(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        if isinstance(value, BaseException):
            raise value
        return value

    def close(self) -> None:
        """Let the workers know that no more is taken."""
        for connection in self._connections:
            connection.close()


def listen() -> socket.socket:
    """A socket for ranks on this node, without a file: it is gone with its process. Its name is that of `connect`."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind("")  # Linux gives it a name that no other socket of this network namespace has
    listener.listen(1024)
    return listener


def connect(name: bytes, worker: int, timeout_seconds: float) -> socket.socket:
    """This rank's connection to a worker of another rank. Raises OSError."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.settimeout(timeout_seconds)
        connection.connect(name)
        _require_own_user(connection)
        connection.send(worker.to_bytes(HELLO_BYTES, "little"))
        connection.settimeout(None)
    except OSError:
        connection.close()
        raise
    return connection


def accept(listener: socket.socket, workers: int, ranks: int, timeout_seconds: float) -> list[list[socket.socket]]:
    """For each worker, the connections of so many other ranks. Raises OSError."""
    accepted: list[list[socket.socket]] = [[] for _ in range(workers)]
    listener.settimeout(timeout_seconds)
    for _ in range(workers * ranks):
        connection, _ = listener.accept()
        connection.settimeout(timeout_seconds)
        _require_own_user(connection)
        accepted[int.from_bytes(connection.recv(HELLO_BYTES), "little")].append(connection)
    return accepted


def _require_own_user(connection: socket.socket) -> None:
    """Raises PermissionError if another user is at the other end: anybody may connect, and batches are unpickled."""
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if user != os.getuid():
        raise PermissionError(f"a process of user {user} answers")


def _fork() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads; the child uses none
        return os.fork()


def _run(work: Callable[[], None]) -> NoReturn:
    """The whole life of a forked process."""
    status = 1
    try:
        work()
        status = 0
    finally:
        if status:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(status)


def _end_with(parent: int) -> None:
    """Make the kernel kill this process with its parent, and leave the signals of a launcher to that."""
    for signum in _SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _drop_sockets(kept: set[int]) -> None:
    """Let go of inherited connections, whose other ends would not notice that this process's parent is gone."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if int(name) not in kept and stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                os.dup2(nowhere, int(name))


def _serve_forks(orders: socket.socket, build_for: Callable[[int, int], Build]) -> None:
    """Fork a worker for each order; when the rank is gone or done, end them."""
    _drop_sockets({orders.fileno()})
    workers: list[int] = []
    try:
        while True:
            order, descriptors, _, _ = socket.recv_fds(orders, struct.calcsize(_ORDER), _MOST_DESCRIPTORS)
            if not order:
                return
            parent = os.getpid()
            process = _fork()
            if process == 0:
                _end_with(parent)
                orders.close()
                _run(functools.partial(_work, build_for, order, descriptors))
            workers.append(process)
            for descriptor in descriptors:
                os.close(descriptor)
    finally:
        for process in workers:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)


def _work(build_for: Callable[[int, int], Build], order: bytes, descriptors: Sequence[int]) -> None:
    """Prepare the batches that the order asks for, and send each to every rank; the first rank's end is this
    process's."""
    dp_rank, dp_size, first_step, stride, worker = struct.unpack(_ORDER, order)
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    logging.disable(logging.WARNING)  # the rank has said so itself
    build = build_for(dp_rank, dp_size)
    logging.disable(logging.NOTSET if worker == 0 else logging.WARNING)
    ranks = [socket.socket(fileno=descriptor) for descriptor in descriptors]
    unread = dict.fromkeys(ranks, 0)
    for step in count(first_step, stride):
        _wait_for_room(unread, ranks[0])
        if ranks[0] not in unread:
            return
        value = _built(build, step)
        with _memory_of(value) as file:
            for rank in list(unread):
                try:
                    socket.send_fds(rank, [_READY], [file.fileno()])
                    unread[rank] += 1
                except OSError:
                    del unread[rank]
        if isinstance(value, Exception) and not isinstance(value, UserError):
            raise value


def _wait_for_room(unread: dict[socket.socket, int], first: socket.socket) -> None:
    """Until every rank that is there has taken enough, or the first rank is gone."""
    while first in unread and any(number >= AHEAD for number in unread.values()):
        poll = select.poll()
        for rank in unread:
            poll.register(rank, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll()}
        for rank in [rank for rank in unread if rank.fileno() in ready]:
            taken = b""
            with contextlib.suppress(OSError):
                taken = rank.recv(len(_READY))
            if taken:
                unread[rank] -= 1
            else:
                del unread[rank]


def _built(build: Build, step: int) -> Any:
    """The batch, or the error that building it raised."""
    try:
        return build(step)
    except UserError as error:
        return error
    except Exception as error:
        logging.getLogger(__name__).debug("step %d", step + 1, exc_info=True)
        return RuntimeError(f"the batch of step {step + 1} cannot be prepared:\n"
                            f"{''.join(traceback.format_exception(error))}")


class _Pickler(pickle.Pickler):
    """Pickles tensors as arrays, whose memory is left out."""

    def reducer_override(self, value: object) -> Any:
        if isinstance(value, Tensor):
            return torch.from_numpy, (np.ascontiguousarray(value.numpy()),)
        return NotImplemented


@contextlib.contextmanager
def _memory_of(value: Any) -> "Iterator[tempfile._TemporaryFileWrapper[bytes]]":
    """The value in memory without a name."""
    arrays: list[pickle.PickleBuffer] = []
    structure = BytesIO()
    _Pickler(structure, protocol=5, buffer_callback=arrays.append).dump(value)
    pieces = [structure.getbuffer(), *(array.raw() for array in arrays)]
    with _anonymous_file() as file:
        file.write(struct.pack(f"{len(pieces) + 1}q", len(pieces), *(piece.nbytes for piece in pieces)))
        for piece in pieces:
            file.write(bytes(-file.tell() % _ALIGNMENT))
            file.write(piece)
        file.flush()
        yield file


def _anonymous_file() -> Any:
    try:
        return os.fdopen(os.memfd_create("batch"), "w+b")
    except OSError:  # a kernel or sandbox without it
        return tempfile.TemporaryFile()


def _loaded(memory: mmap.mmap) -> Any:
    """The value of `_memory_of`; its tensors lie in the mapped memory."""
    (number,) = struct.unpack_from("q", memory)
    sizes = struct.unpack_from(f"{number}q", memory, 8)
    view, pieces, end = memoryview(memory), [], 8 * (number + 1)
    for size in sizes:
        begin = end + -end % _ALIGNMENT
        end = begin + size
        pieces.append(view[begin:end])
    return pickle.loads(pieces[0], buffers=pieces[1:])
