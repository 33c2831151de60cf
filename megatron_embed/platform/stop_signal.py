"""SIGTERM and SIGUSR1: this process's request to stop, listened to before any library is loaded.

A process that has nothing to lose ends at once, with exit code 75. One that is about to finish something (`finishing`)
finishes it first; long work inside asks `asked()` now and then, and the ranks agree on the answer by themselves.
"""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from megatron_embed.errors import PreemptedError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
FAREWELL_SECONDS = 2.0
"""How long a process that leaves may take to tell the other ranks."""
_CONSIDER = 0
"""Written to the listening thread, among numbers of signals: look whether to leave."""


class _Listener:
    """What is known of the request, and the thread that acts on it.

    A thread of its own takes the signals: the main thread may be waiting in a collective or loading a library, where no
    Python handler runs.
    """

    def __init__(self) -> None:
        self.reason = ""
        """Why to stop, in words; empty: nobody asked."""
        self.holds = 0
        self.decided = False
        """The main thread is on its way to the end with an exit code of its own."""
        self.leaving = False
        self.farewells: list[Callable[[], None]] = []
        self.lock = threading.Lock()
        reader, self.writer = socket.socketpair()
        self.writer.setblocking(False)
        self._before = {number: signal.signal(number, _noted) for number in SIGNALS}
        self._descriptor = signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, args=(reader,), name="stop-request", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Puts the handlers back. A process that was asked ignores further signals: torchrun sends SIGTERM to the ranks
        that still run when the first one ends, and they end by themselves."""
        signal.set_wakeup_fd(self._descriptor)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self.reason else handler)
        self.writer.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self.writer.close()

    def consider(self) -> None:
        """Lets the listening thread look whether to leave."""
        with contextlib.suppress(OSError):  # full: it looks anyway; closed: the command is over
            self.writer.send(bytes([_CONSIDER]))

    def _listen(self, reader: socket.socket) -> None:
        with reader:
            while numbers := reader.recv(64):
                for number in numbers:
                    if number in SIGNALS and not self.reason:
                        self.reason = signal.Signals(number).name
                if self.reason:
                    self._consider()

    def _consider(self) -> None:
        with self.lock:
            if self.decided:
                return
            if self.holds:
                self._expect_the_worst()
                return
            self.leaving = True
        self.leave()

    def _expect_the_worst(self) -> None:
        """A process that is killed while it finishes must not look like one that nobody had started yet."""
        from megatron_embed.platform.status import leaves_status, write_status

        if leaves_status():
            write_status(1, f"asked to stop ({self.reason}), and did not come to its end")

    def leave(self) -> NoReturn:
        """Ends the process, whatever the main thread does."""
        from megatron_embed.platform.status import PREEMPTED, leaves_status, write_status

        if leaves_status():
            write_status(PREEMPTED, f"stopped ({self.reason}) before there was anything to save")
        threads = [threading.Thread(target=tell_others, daemon=True) for tell_others in list(self.farewells)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(FAREWELL_SECONDS)
        os._exit(PREEMPTED)


_listener: _Listener | None = None


def _noted(number: int, frame: FrameType | None) -> None:
    """Python's part of the handler; the listening thread is told by the interpreter's own, whatever this one does."""


def _forget_in_child() -> None:
    """A fork shares the socket: what ends it (multiprocessing does so with SIGTERM) is no request to its parent."""
    global _listener
    if _listener is not None:
        _listener = None
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget_in_child)


def start() -> None:
    """Listens from now on, to the end of the process. Main thread only."""
    global _listener
    if _listener is None:
        _listener = _Listener()


def ignore() -> None:
    """Signals mean nothing any more: the exit code is decided, and the interpreter only has to come to its end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Listens meanwhile, unless the process does so already; outside the main thread it cannot."""
    global _listener
    if _listener is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    _listener = mine = _Listener()
    try:
        yield
    finally:
        mine.close()
        _listener = None


def asked() -> bool:
    """Whether this process shall stop: it got a signal, or another rank did."""
    return _listener is not None and bool(_listener.reason)


def reason() -> str:
    """Why to stop, in words; empty if nobody asked."""
    return _listener.reason if _listener is not None else ""


def tell(why: str) -> None:
    """Another rank was asked to stop."""
    if _listener is not None and not _listener.reason:
        _listener.reason = why
        _listener.consider()


def decided() -> None:
    """The command is over and its exit code known: no signal changes it any more."""
    if _listener is not None:
        with _listener.lock:
            _listener.decided = True


def leave_now() -> None:
    """Ends this process as one that was asked to stop; for a thread whose main thread waits for a rank that left."""
    if _listener is not None:
        _listener.leave()


def held() -> bool:
    """Whether something is being finished, so that a request waits."""
    return _listener is not None and _listener.holds > 0


@contextlib.contextmanager
def finishing() -> Iterator[None]:
    """What is done meanwhile is not broken off. Main thread only.

    Raises:
        PreemptedError: at the end, if the process was asked to stop and nothing else is raised.
    """
    listener = _listener
    if listener is None:
        yield
        return
    with listener.lock:
        listener.holds += 1
        leaving = listener.leaving
    if leaving:  # too late to begin anything: the other thread is about to end the process
        threading.Event().wait()
    try:
        yield
    except BaseException:
        _let_go(listener, ends=True)
        raise
    if _let_go(listener, ends=bool(listener.reason)):
        raise PreemptedError(f"stopped ({listener.reason}); start the command again")


def _let_go(listener: _Listener, *, ends: bool) -> bool:
    """One hold less. Whether that was the last and the command ends here, if it `ends`."""
    with listener.lock:
        listener.holds -= 1
        last = listener.holds == 0
        if last and ends and listener.reason:
            listener.decided = True
        return last and listener.decided


def add_farewell(action: Callable[[], None]) -> None:
    """A process that leaves does this first, if it listens; another thread calls it, and waits FAREWELL_SECONDS."""
    if _listener is not None:
        _listener.farewells.append(action)


def remove_farewell(action: Callable[[], None]) -> None:
    """Undoes `add_farewell`."""
    if _listener is not None and action in _listener.farewells:
        _listener.farewells.remove(action)
