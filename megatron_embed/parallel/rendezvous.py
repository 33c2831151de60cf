"""Before there is a process group the ranks meet: an error that one of them met on its way is told to all."""

import contextlib
import datetime
import ipaddress
import os
import socket
import time

import torch.distributed as dist

from megatron_embed.errors import ConfigError, LostRankError, PreemptedError, UserError
from megatron_embed.parallel.signing import SECRET_VARIABLE, Seal
from megatron_embed.platform.launcher import (
    all_ranks_on_this_node,
    launched_rank,
    launcher_names_runs,
    rendezvous_address,
    source_of_world_size,
)

ALL_HERE = "all here"
STOPPED = "asked to stop"
"""The verdict of a rank that got a signal on its way: nobody need come."""
CONNECT_SECONDS = 20.0
"""How long a rank with an error waits for rank 0's store, which is there as soon as rank 0 has loaded its libraries."""
SPEAK_SECONDS = 5.0
"""How long it then waits for rank 0 to print the error, before it does so itself."""
POLL_SECONDS = 0.05
LONGEST_QUEUE = 4096
LINGER_SECONDS = 10.0
"""How long rank 0 leaves its store open after an error, for ranks that come later with the same one."""
LEAVE_SECONDS = 1.5
"""The same where it was asked to stop."""


class Rendezvous:
    """The run's key-value store, and who has arrived there. Rank 0 hosts it, unless torchrun's agent does.

    The first rank with an error decides, or else rank 0 once all have arrived: one value, which all ranks wait for.
    Small messages to one process, three per rank; no collective. What is not signed by a rank of this run is ignored,
    where the launcher gave the ranks a secret.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        """Starts the store if this rank hosts it. Any number of times in a process.

        Raises:
            ConfigError: its port is another process's.
            DistError: it cannot, for another reason.
        """
        self._rank, self._world_size = rank, world_size
        self._address, self._seal = rendezvous_address(), Seal()
        self._hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:
            listener = listening_socket(*self._address) if self._hosts else None
            self._store = self._open(CONNECT_SECONDS, listener) if self._hosts else None
        except dist.DistError as error:
            if "EADDRINUSE" not in str(error):
                raise
            host, port = self._address
            raise ConfigError(f"MASTER_PORT = {port}: another process of {host} listens there, perhaps another run's; "
                              "choose another port for this run, or wait for the end of the other") from error

    def arrive(self, timeout_seconds: int) -> None:
        """Returns once every rank has arrived.

        Raises:
            UserError: the error of a rank that will not come, on every rank that did.
            PreemptedError: a rank was asked to stop and has left, on every rank that came.
            LostRankError: not all came in time.
        """
        host, port = self._address
        store = None
        try:
            store = self._open(timeout_seconds)
            store.set(f"here/{self._rank}", self._seal.close(f"here/{self._rank}", "here"))
            verdict = self._verdict(store, time.monotonic() + timeout_seconds)
        except dist.DistError as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise LostRankError(
                f"not all of {self._world_size} ranks ({source_of_world_size()}) met at {host}:{port} within "
                f"parallel.timeout_seconds = {timeout_seconds} ({self._absent(store) or reason}); look at the logs of "
                "the ranks that did not start", speaker=self._rank == 0) from error
        if verdict == STOPPED:
            with contextlib.suppress(dist.DistError):
                store.add("heard", 1)
            raise PreemptedError("stopped (another rank was asked to) before there was anything to save")
        if verdict != ALL_HERE:
            raise UserError(verdict)

    def group_store(self, timeout_seconds: int) -> dist.Store:
        """Where the process group of those who have arrived finds its addresses; no other run looks there."""
        return dist.PrefixStore("group", self._open(timeout_seconds))

    def refuse(self, message: str) -> bool:
        """Tells all ranks the error because of which this one does not come. Rank 0 has printed its own by then.

        Returns whether this rank shall print it, since rank 0 cannot be reached or does not know it yet.
        """
        if dist.is_initialized():  # then every rank has the error alike
            return False
        if not self._hosts and not _answers(*self._address):
            return self._rank != 0
        try:
            store = self._open(CONNECT_SECONDS)
            mine = f"rank {self._rank}: {message}"
            is_first = _decide(store, self._seal, mine) == mine
            if self._rank == 0:
                store.set("printed", self._seal.close("printed", ""))
                self._linger(store)
                return False
            return not self._is_printed(store) and is_first
        except dist.DistError:
            return self._rank != 0

    def leave(self) -> None:
        """Tells all ranks that this one was asked to stop, unless they have met: then it is HeartbeatMonitor's task.

        Rank 0 waits a little until they have heard it, if the store ends with it.
        """
        with contextlib.suppress(dist.DistError, OSError):
            if dist.is_initialized():
                return
            if not self._hosts:  # torch's own attempts would go on too long
                socket.create_connection(self._address, timeout=LEAVE_SECONDS).close()
            store = self._open(LEAVE_SECONDS)
            _decide(store, self._seal, STOPPED)
            if self._rank:
                store.add("heard", 1)
            else:
                self._linger(store, LEAVE_SECONDS)

    def _open(self, timeout_seconds: float, listener: int | None = None) -> dist.Store:
        return _store_at(self._address, self._hosts, timeout_seconds, listener)

    def _verdict(self, store: dist.Store, deadline: float) -> str:
        """What was decided. Raises DistError if nothing is until then."""
        names = [f"here/{rank}" for rank in range(self._world_size)]
        while True:
            if self._rank == 0 and not store.check(["verdict"]):
                if store.check(names) and all(self._seal.open(name, raw) == "here"
                                              for name, raw in zip(names, store.multi_get(names), strict=True)):
                    return _decide(store, self._seal, ALL_HERE)
            elif (word := self._seal.open("verdict", store.get("verdict"))) is not None:
                return word
            elif self._rank == 0:  # somebody else's; it is written over
                store.delete_key("verdict")
            if time.monotonic() > deadline:
                raise dist.DistError("no answer")
            time.sleep(POLL_SECONDS)

    def _absent(self, store: dist.Store | None) -> str:
        """Who has not arrived, in words; empty if the store does not say."""
        if store is None:
            return ""
        try:
            names = [f"here/{rank}" for rank in range(self._world_size)]
            absent = [rank for rank, name in enumerate(names) if not store.check([name])]
            strange = [rank for rank, name in enumerate(names)
                       if rank not in absent and self._seal.open(name, store.get(name)) is None]
        except dist.DistError:
            return ""
        if strange and not absent:
            return (f"what is said in the name of rank {strange[0]} is not signed with this run's "
                    f"{SECRET_VARIABLE}; who else reaches the port?")
        if self._seal.is_used and len(absent) == self._world_size - 1:
            return f"without all others; is {SECRET_VARIABLE} the same on every rank?"
        numbers = ", ".join(map(str, absent[:8])) + (f" and {len(absent) - 8} more" if absent[8:] else "")
        return f"without rank{'s' if absent[1:] else ''} {numbers}" if absent else ""

    def _is_printed(self, store: dist.Store) -> bool:
        try:
            store.wait(["printed"], datetime.timedelta(seconds=SPEAK_SECONDS))
            return self._seal.open("printed", store.get("printed")) is not None
        except dist.DistError:
            return False
        finally:
            with contextlib.suppress(dist.DistError):
                store.add("heard", 1)

    def _linger(self, store: dist.Store, seconds: float = LINGER_SECONDS) -> None:
        """Until the other ranks have read what they need, if the store ends with this process."""
        deadline = time.monotonic() + seconds
        while self._hosts and store.add("heard", 0) < self._world_size - 1 and time.monotonic() < deadline:
            time.sleep(0.05)


def open_rendezvous() -> Rendezvous | None:
    """The meeting of this process's run; null for one rank, or where the process group is there already.

    Opened early, so that ranks that fail early can tell.
    """
    rank, world_size, _ = launched_rank()
    if world_size == 1 or dist.is_initialized():
        return None
    try:
        return Rendezvous(rank, world_size)
    except (dist.DistError, UserError):  # a port that is taken, a host without a name: the start tells, and how
        return None


def tell_through_another_store(message: str) -> None:
    """Tells the other ranks, who wait in the store of the run that has the port, why rank 0 cannot open one.

    Nothing where runs have no names: the word would be the other run's.
    """
    if not launcher_names_runs():
        return
    with contextlib.suppress(dist.DistError):  # what listens there is no store
        store, seal = _store_at(rendezvous_address(), False, SPEAK_SECONDS), Seal()
        _decide(store, seal, message)
        store.set("printed", seal.close("printed", ""))


def listening_socket(host: str, port: int) -> int | None:
    """The descriptor of a socket that listens at MASTER_ADDR and on no other interface.

    None, and torch listens on all of them, where other nodes may find another address behind its name: a name, and
    ranks on several nodes; where it is no address of this node (a service of a cluster); and where the port is taken
    (a store of this process is shared, another's is refused by torch).
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
    """Whether it is a number, not a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _decide(store: dist.Store, seal: Seal, word: str) -> str:
    """Makes a word the verdict if there is none; gives the verdict. What no rank of this run signed is written over."""
    mine, expected = seal.close("verdict", word), b""
    for _ in range(10):
        found = store.compare_set("verdict", expected, mine)  # type: ignore[arg-type]  # bytes are taken
        known = seal.open("verdict", found)
        if known is not None:
            return known
        expected = b"" if found == expected else found  # gone in the meantime, or somebody else's
    raise dist.DistError("somebody else writes this run's verdict again and again")


def _store_at(address: tuple[str, int], hosts: bool, timeout_seconds: float, listener: int | None = None) -> dist.Store:
    """This run's part of the key-value store at an address; `listener`: the socket of the one that is hosted here."""
    store = dist.TCPStore(*address, None, hosts, wait_for_workers=False, multi_tenant=True,
                          timeout=datetime.timedelta(seconds=timeout_seconds), master_listen_fd=listener)
    return dist.PrefixStore(Seal().room("meeting"), store)


def _answers(host: str, port: int) -> bool:
    """Whether something listens there within CONNECT_SECONDS. Quieter than torch's own attempts."""
    deadline = time.monotonic() + CONNECT_SECONDS
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host, port), timeout=2.0).close()
            return True
        except OSError:
            time.sleep(0.2)
    return False
