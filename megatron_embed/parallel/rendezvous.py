"""Rendezvous barrier before there is a process group: an error of any rank on its way there is reported to all."""

import contextlib
import datetime
import ipaddress
import socket
import time

import torch.distributed as dist

from megatron_embed.errors import ConfigError, LostRankError, PreemptedError, UserError
from megatron_embed.parallel.relay import connect, serve
from megatron_embed.parallel.signing import SECRET_VARIABLE, Signer
from megatron_embed.platform.launcher import (
    all_ranks_on_this_node,
    hosted_by_agent,
    launched_rank,
    launcher_names_runs,
    rendezvous_address,
    source_of_world_size,
)

ALL_ARRIVED = "all arrived"
STOPPED = "asked to stop"
"""The outcome if a rank was asked to stop on its way: no rank needs to arrive."""
CONNECT_SECONDS = 20.0
"""How long a rank with an error waits for rank 0's store, which exists once rank 0 has loaded its libraries."""
PRINT_SECONDS = 5.0
"""How long it then waits for rank 0 to print the error, before it does so itself."""
POLL_SECONDS = 0.05
LONGEST_QUEUE = 4096
LINGER_SECONDS = 10.0
"""How long rank 0 keeps its store open after an error, for ranks that arrive later with the same one."""
LEAVE_SECONDS = 1.5
"""The same after a request to stop."""


class Rendezvous:
    """A barrier in the run's key-value store. Rank 0 hosts the store, unless torchrun's agent does.

    All ranks wait for one value, the outcome: the error of the first rank that reports one, or "all arrived", which
    rank 0 sets. Small messages to one process, three per rank; no collective. If the launcher gave the ranks a secret,
    texts that no rank of this run signed are ignored.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        """Start the store if this rank hosts it; may be repeated in one process.

        Raises:
            ConfigError: another process uses its port.
            DistError: it cannot be started for another reason.
        """
        self._rank, self._world_size = rank, world_size
        self._address, self._signer = rendezvous_address(), Signer()
        self._hosts_store = rank == 0 and not hosted_by_agent()
        try:
            listener = listening_socket(*self._address) if self._hosts_store else None
            self._store = self._open(CONNECT_SECONDS, listener) if self._hosts_store else None
        except dist.DistError as error:
            if "EADDRINUSE" not in str(error):
                raise
            host, port = self._address
            raise ConfigError(f"MASTER_PORT = {port}: another process of {host} listens there, perhaps another run's; "
                              "choose another port for this run, or wait for the end of the other") from error
        serve(self._address)

    def wait_for_all(self, timeout_seconds: int) -> None:
        """Wait until every rank has arrived.

        Raises:
            UserError: the error of a rank that does not arrive, on every rank that did.
            PreemptedError: a rank was asked to stop and has left; raised on every rank that arrived.
            LostRankError: not all ranks arrived in time.
        """
        host, port = self._address
        store = None
        try:
            store = self._open(timeout_seconds)
            store.set(f"arrived/{self._rank}", self._signer.sign(f"arrived/{self._rank}", "arrived"))
            outcome = self._wait_for_outcome(store, time.monotonic() + timeout_seconds)
        except dist.DistError as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise LostRankError(
                f"not all of {self._world_size} ranks ({source_of_world_size()}) met at {host}:{port} within "
                f"parallel.timeout_seconds = {timeout_seconds} ({self._missing_ranks(store) or reason}); look at the "
                "logs of the ranks that did not start", is_reporting_rank=self._rank == 0) from error
        if outcome == STOPPED:
            with contextlib.suppress(dist.DistError):
                store.add("read", 1)
            raise PreemptedError("stopped (another rank was asked to) before there was anything to save")
        if outcome != ALL_ARRIVED:
            raise UserError(outcome)

    def group_store(self, timeout_seconds: int) -> dist.Store:
        """The part of the store in which the process group of this run's ranks exchanges addresses."""
        return dist.PrefixStore("group", self._open(timeout_seconds))

    def report_error(self, message: str) -> bool:
        """Report to all ranks the error that keeps this one from arriving. Rank 0 has printed its own before the call.

        Returns whether this rank must print it, because rank 0 cannot be reached or has not read it yet.
        """
        if dist.is_initialized():  # then every rank has the same error
            return False
        if not self._hosts_store and not _answers(*self._address):
            return self._rank != 0
        try:
            store = self._open(CONNECT_SECONDS)
            outcome = f"rank {self._rank}: {message}"
            is_first = _set_outcome(store, self._signer, outcome) == outcome
            if self._rank == 0:
                store.set("printed", self._signer.sign("printed", ""))
                self._wait_for_readers(store)
                return False
            return not self._is_printed(store) and is_first
        except dist.DistError:
            return self._rank != 0

    def report_stop(self) -> None:
        """Report to all ranks that this one was asked to stop, unless all have arrived: then HeartbeatMonitor does it.

        Rank 0 waits a little until they have read it, if the store ends with its process.
        """
        with contextlib.suppress(dist.DistError, OSError):
            if dist.is_initialized():
                return
            if not self._hosts_store:  # torch's own attempts would take too long
                socket.create_connection(self._address, timeout=LEAVE_SECONDS).close()
            store = self._open(LEAVE_SECONDS)
            _set_outcome(store, self._signer, STOPPED)
            if self._rank:
                store.add("read", 1)
            else:
                self._wait_for_readers(store, LEAVE_SECONDS)

    def _open(self, timeout_seconds: float, listener: int | None = None) -> dist.Store:
        return _store_at(self._address, self._hosts_store, timeout_seconds, listener)

    def _wait_for_outcome(self, store: dist.Store, deadline: float) -> str:
        """The outcome. Raises DistError if there is none by the deadline."""
        names = [f"arrived/{rank}" for rank in range(self._world_size)]
        while True:
            if self._rank == 0 and not store.check(["outcome"]):
                if store.check(names) and all(self._signer.verify(name, raw) == "arrived"
                                              for name, raw in zip(names, store.multi_get(names), strict=True)):
                    return _set_outcome(store, self._signer, ALL_ARRIVED)
            elif (outcome := self._signer.verify("outcome", store.get("outcome"))) is not None:
                return outcome
            elif self._rank == 0:  # not signed by a rank of this run: removed
                store.delete_key("outcome")
            if time.monotonic() > deadline:
                raise dist.DistError("no answer")
            time.sleep(POLL_SECONDS)

    def _missing_ranks(self, store: dist.Store | None) -> str:
        """The ranks that have not arrived, as words for a message; empty if the store cannot be read."""
        if store is None:
            return ""
        try:
            names = [f"arrived/{rank}" for rank in range(self._world_size)]
            missing = [rank for rank, name in enumerate(names) if not store.check([name])]
            unsigned = [rank for rank, name in enumerate(names)
                       if rank not in missing and self._signer.verify(name, store.get(name)) is None]
        except dist.DistError:
            return ""
        if unsigned and not missing:
            return (f"a message in the name of rank {unsigned[0]} is not signed with this run's "
                    f"{SECRET_VARIABLE}; who else reaches the port?")
        if self._signer.has_secret and len(missing) == self._world_size - 1:
            return f"without all others; is {SECRET_VARIABLE} the same on every rank?"
        numbers = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if missing[8:] else "")
        return f"without rank{'s' if missing[1:] else ''} {numbers}" if missing else ""

    def _is_printed(self, store: dist.Store) -> bool:
        try:
            store.wait(["printed"], datetime.timedelta(seconds=PRINT_SECONDS))
            return self._signer.verify("printed", store.get("printed")) is not None
        except dist.DistError:
            return False
        finally:
            with contextlib.suppress(dist.DistError):
                store.add("read", 1)

    def _wait_for_readers(self, store: dist.Store, seconds: float = LINGER_SECONDS) -> None:
        """Wait until the other ranks have read the outcome, if the store ends with this process."""
        deadline = time.monotonic() + seconds
        while self._hosts_store and store.add("read", 0) < self._world_size - 1 and time.monotonic() < deadline:
            time.sleep(0.05)


def open_rendezvous() -> Rendezvous | None:
    """The rendezvous of this process's run; None for one rank, or if the process group exists already.

    Opened early, so that ranks that fail early can report it.
    """
    rank, world_size, _ = launched_rank()
    if world_size == 1 or dist.is_initialized():
        return None
    try:
        return Rendezvous(rank, world_size)
    except (dist.DistError, UserError):  # a port in use or an unknown host: initialize() reports it
        return None


def report_to_other_store(message: str) -> None:
    """Report why rank 0 cannot open a store to this run's other ranks, which wait in the store of the run that uses the
    port.

    Does nothing if runs have no names: the other run would read it.
    """
    if not launcher_names_runs():
        return
    with contextlib.suppress(dist.DistError):  # the process that listens there has no store
        store, signer = _store_at(rendezvous_address(), False, PRINT_SECONDS), Signer()
        _set_outcome(store, signer, message)
        store.set("printed", signer.sign("printed", ""))


def listening_socket(host: str, port: int) -> int | None:
    """The descriptor of a socket that listens at MASTER_ADDR and on no other interface.

    None, so that torch listens on all interfaces, if MASTER_ADDR is a name and ranks run on several nodes, where it may
    have another address; if it is not an address of this node (a service of a cluster); and if the port is in use (a
    store of this process is shared; torch refuses another process's).
    """
    if not (_is_address(host) or all_ranks_on_this_node()):
        return None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(LONGEST_QUEUE)
            return listener.detach()
    except OSError:
        return None


def _is_address(host: str) -> bool:
    """Whether it is an IP address, not a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _set_outcome(store: dist.Store, signer: Signer, outcome: str) -> str:
    """Set the outcome unless there is one, and return it. A value that no rank of this run signed is overwritten."""
    signed, expected = signer.sign("outcome", outcome), b""
    for _ in range(10):
        stored = store.compare_set("outcome", expected, signed)  # type: ignore[arg-type]  # bytes are taken
        known = signer.verify("outcome", stored)
        if known is not None:
            return known
        expected = b"" if stored == expected else stored  # removed in the meantime, or written by a stranger
    raise dist.DistError("a stranger keeps overwriting this run's outcome")


def _store_at(address: tuple[str, int], hosts_store: bool, timeout_seconds: float,
              listener: int | None = None) -> dist.Store:
    """This run's part of the key-value store at an address; `listener`: the socket of a store that is hosted here."""
    store = dist.TCPStore(*address, None, True, wait_for_workers=False, multi_tenant=True,
                          timeout=datetime.timedelta(seconds=timeout_seconds),
                          master_listen_fd=listener) if hosts_store else connect(address, timeout_seconds)
    return dist.PrefixStore(Signer().key_prefix("rendezvous"), store)


def _answers(host: str, port: int) -> bool:
    """Whether something listens there within CONNECT_SECONDS. Logs less than torch's own attempts."""
    deadline = time.monotonic() + CONNECT_SECONDS
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host, port), timeout=2.0).close()
            return True
        except OSError:
            time.sleep(0.2)
    return False
