"""One relay per node to the run's key-value store, where its host may not open two connections per rank.

The first rank of a node, local rank 0, has a thread that listens on a Unix-domain socket and passes the requests of the
node's other ranks on, all over one connection. The host of the store then has connections per node. Each node decides
for itself: the store cannot tell a relay from a rank.
"""

import atexit
import contextlib
import datetime
import hashlib
import json
import os
import resource
import socket
import struct
import sys
import threading
import time
from multiprocessing.connection import Client, Connection
from typing import Any

import torch.distributed as dist

from megatron_embed.parallel.open_files import files_of_store_process
from megatron_embed.parallel.signing import Signer
from megatron_embed.platform.launcher import all_ranks_on_this_node, hosted_by_agent, knows_local_rank, launched_rank

ANSWER_SECONDS = 30.0
"""How long a relay may take for an answer. Less than heartbeat.LONGEST_SILENCE_SECONDS: of a node whose local rank 0
hangs, the other ranks still send heartbeats."""
LINGER_SECONDS = 10.0
"""How long a relay's process, at its end, waits for the other ranks of its node to end."""
SHORTEST_PAUSE, LONGEST_PAUSE = 0.005, 0.2
"""Seconds between two questions whether a key exists."""
_SOFT_LIMIT, _HARD_LIMIT = resource.getrlimit(resource.RLIMIT_NOFILE)
"""When this module was loaded, before connections.prepare() raises the first: torchrun's agent still has it."""


def is_needed(world_size: int) -> bool:
    """Whether the ranks of this node use a relay: the host of the store, where limits are as here, may not open enough
    files, and there is another node."""
    limit = _SOFT_LIMIT if hosted_by_agent() else _HARD_LIMIT
    return (sys.platform == "linux" and limit != resource.RLIM_INFINITY and limit < files_of_store_process(world_size)
            and knows_local_rank() and not all_ranks_on_this_node())


def connect(address: tuple[str, int], timeout_seconds: float) -> dist.Store:
    """A connection to the store at an address, through this node's relay if it has one and this is not its process.

    Raises:
        DistError: the store cannot be reached within the time.
    """
    _, world_size, local_rank = launched_rank()
    if local_rank == 0 or not is_needed(world_size):
        return _connect_directly(address, timeout_seconds)
    return RelayedStore(address, timeout_seconds)


def serve(address: tuple[str, int]) -> None:
    """Start this node's relay if this process has its local rank 0 and the node needs one; once in a process."""
    _, world_size, local_rank = launched_rank()
    if local_rank == 0 and address not in _relays and is_needed(world_size):
        with contextlib.suppress(OSError):  # a second launcher's local rank 0 on this machine: the first one's serves
            _relays[address] = Relay(address)


class RelayedStore(dist.Store):
    """The run's store as a rank sees it that uses the relay of its node; without one, it connects directly.

    `wait` and `get` ask again and again, so that no request blocks those of other ranks.
    """

    def __init__(self, address: tuple[str, int], timeout_seconds: float) -> None:
        super().__init__()
        self.set_timeout(datetime.timedelta(seconds=timeout_seconds))
        self._address, self._lock, self._direct = address, threading.Lock(), None
        # The C++ side of a process group calls these methods as long as it lives, but does not keep the object.
        _relayed_stores.append(self)
        # Else NCCL's monitor asks for a key every second from a thread that Python cannot end with the process.
        os.environ.setdefault("TORCH_NCCL_COORD_CHECK_MILSEC", "86400000")
        self._relay = _connect_to_relay(address, timeout_seconds / 2)
        if self._relay is None:
            self._direct = _connect_directly(address, timeout_seconds / 2)
        else:
            self._request("open", timeout_seconds)

    def set(self, key: str, value: str | bytes) -> None:
        self._request("set", key, _text(value))

    def get(self, key: str) -> bytes:
        return self._poll(self.timeout, [key], "get", key).encode("latin-1")

    def add(self, key: str, amount: int) -> int:
        return int(self._request("add", key, amount))

    def check(self, keys: list[str]) -> bool:
        return bool(self._request("check", keys))

    def wait(self, keys: list[str], timeout: datetime.timedelta | None = None) -> None:  # type: ignore[override]
        self._poll(timeout or self.timeout, keys, "check", keys)

    def compare_set(self, key: str, expected: str | bytes, desired: str | bytes) -> bytes:
        return self._request("compare_set", key, _text(expected), _text(desired)).encode("latin-1")

    def delete_key(self, key: str) -> bool:
        return bool(self._request("delete_key", key))

    deleteKey = delete_key  # noqa: N815  the name by which C++ calls it

    def append(self, key: str, value: str | bytes) -> None:
        self._request("append", key, _text(value))

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.wait(keys)
        return [value.encode("latin-1") for value in self._request("multi_get", keys)]

    def multi_set(self, keys: list[str], values: list[str | bytes]) -> None:  # type: ignore[override]
        self._request("multi_set", keys, [_text(value) for value in values])

    def has_extended_api(self) -> bool:
        return True

    def clone(self) -> "RelayedStore":
        return self

    def _poll(self, timeout: datetime.timedelta, keys: list[str], *request: Any) -> Any:
        """The answer once the keys exist. Raises DistStoreError if they do not in time."""
        deadline, pause = time.monotonic() + timeout.total_seconds(), SHORTEST_PAUSE
        while (answer := self._request(*request)) is None or answer is False:
            if time.monotonic() > deadline:
                raise dist.DistStoreError(f"wait timeout after {timeout.total_seconds():g} s, keys: {', '.join(keys)}")
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_PAUSE)
        return answer

    def _request(self, operation: str, *arguments: Any) -> Any:
        """The answer to a request. Raises DistNetworkError if the store cannot be reached, by the relay or directly."""
        with self._lock:
            if self._relay is not None:
                try:
                    self._relay.send_bytes(json.dumps([operation, *arguments]).encode())
                    seconds = ANSWER_SECONDS + (arguments[0] if operation == "open" else 0.0)
                    if not self._relay.poll(seconds):
                        raise EOFError("no answer")
                    error, answer = json.loads(self._relay.recv_bytes())
                except (OSError, EOFError):  # its process has ended or hangs
                    self._relay.close()
                    self._relay = None
                else:
                    if error:
                        raise dist.DistNetworkError(error)
                    return answer
            if self._direct is None:
                self._direct = _connect_directly(self._address, self.timeout.total_seconds())
            return _perform(self._direct, operation, *arguments)


class Relay:
    """The thread that accepts connections of a node's ranks, and one for each of them."""

    def __init__(self, address: tuple[str, int]) -> None:
        """Start to listen. Raises OSError if another process of this machine does so for this run."""
        self._address, self._lock = address, threading.Lock()
        self._store: dist.Store | None = None
        self._listener, self._ends = socket.socket(socket.AF_UNIX), False
        try:
            self._listener.bind(_socket_name(address))
            self._listener.listen(128)
        except OSError:
            self._listener.close()
            raise
        self._clients = set[Connection]()
        atexit.register(self._linger)
        os.register_at_fork(after_in_child=self._close)
        threading.Thread(target=self._accept, name="store-relay", daemon=True).start()

    def _accept(self) -> None:
        while not self._ends:
            try:
                client = Connection(self._listener.accept()[0].detach())
            except OSError:  # too many open files, or `_linger`
                time.sleep(LONGEST_PAUSE)
                continue
            if not _is_of_this_user(client):
                client.close()
                continue
            self._clients.add(client)
            threading.Thread(target=self._answer, args=(client,), name="store-relay", daemon=True).start()

    def _answer(self, client: Connection) -> None:
        """Answer requests until the client closes its end."""
        try:
            while True:
                operation, *arguments = json.loads(client.recv_bytes())
                error, answer = "", None
                try:
                    if operation == "open":
                        self._open(*arguments)
                    elif self._store is not None:
                        answer = _perform(self._store, operation, *arguments)
                except RuntimeError as failure:  # the base of torch.distributed's errors
                    error = str(failure) or type(failure).__name__
                client.send_bytes(json.dumps([error, answer]).encode())
        except (EOFError, OSError):
            pass
        finally:
            self._clients.discard(client)
            client.close()

    def _open(self, timeout_seconds: float) -> None:
        """Connect to the store unless that is done. Raises DistError."""
        if not self._lock.acquire(timeout=timeout_seconds):
            raise dist.DistNetworkError("the relay of this node waits for the store")
        try:
            self._store = self._store or _connect_directly(self._address, timeout_seconds)
        finally:
            self._lock.release()

    def _linger(self) -> None:
        """Wait until the node's other ranks have ended: they need the store as long as they run. Leave the name to the
        next run."""
        self._ends = True
        with contextlib.suppress(OSError):  # a fork has closed it
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes `_accept`
        self._listener.close()
        deadline = time.monotonic() + LINGER_SECONDS
        while self._clients and time.monotonic() < deadline:
            time.sleep(0.05)

    def _close(self) -> None:
        """In a fork, which would keep the connections open after this process has died."""
        self._listener.close()
        for client in self._clients:
            client.close()
        self._clients.clear()


_relays: dict[tuple[str, int], Relay] = {}
_relayed_stores: list[RelayedStore] = []


def _connect_directly(address: tuple[str, int], timeout_seconds: float) -> dist.Store:
    return dist.TCPStore(*address, None, False, wait_for_workers=False, multi_tenant=True,
                         timeout=datetime.timedelta(seconds=timeout_seconds))


def _connect_to_relay(address: tuple[str, int], timeout_seconds: float) -> Connection | None:
    """A connection to this node's relay; None if it does not listen within the time."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        with contextlib.suppress(OSError):
            relay = Client(_socket_name(address), "AF_UNIX")
            if _is_of_this_user(relay):
                return relay
            relay.close()
        if time.monotonic() > deadline:
            return None
        time.sleep(LONGEST_PAUSE)


def _socket_name(address: tuple[str, int]) -> str:
    """Name of a node's socket for this run, in Linux' abstract namespace: no file that a killed process leaves."""
    host, port = address
    text = f"{Signer().key_prefix('relay')} {host} {port} {os.getuid()}"
    return f"\0megatron-embed-{hashlib.sha256(text.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}"


def _is_of_this_user(connection: Connection) -> bool:
    """Whether the process at the other end has this process' user."""
    with socket.fromfd(connection.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as other:
        credentials = other.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return bool(struct.unpack("3i", credentials)[1] == os.getuid())


def _perform(store: dist.Store, operation: str, *arguments: Any) -> Any:
    """The answer of a store, as JSON can hold it: bytes as latin-1. Blocks for no key that does not exist."""
    match operation, *arguments:
        case "set" | "append", key, value:
            (store.set if operation == "set" else store.append)(key, value.encode("latin-1"))
        case "get", key:
            return _text(store.get(key)) if store.check([key]) else None
        case "add", key, amount:
            return store.add(key, amount)
        case "check", keys:
            return store.check(keys)
        case "compare_set", key, expected, desired:
            return _text(store.compare_set(key, expected.encode("latin-1"), desired.encode("latin-1")))
        case "delete_key", key:
            return store.delete_key(key)
        case "multi_get", keys:
            return [_text(value) for value in store.multi_get(keys)]
        case "multi_set", keys, values:
            store.multi_set(keys, [value.encode("latin-1") for value in values])
    return None


def _text(value: str | bytes) -> str:
    """Bytes as text that JSON can hold."""
    return (value.encode() if isinstance(value, str) else value).decode("latin-1")
