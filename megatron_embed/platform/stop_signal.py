"""Requests to stop by SIGTERM and SIGUSR1, handled from before any library is loaded.

A process that has nothing to save ends at once, with exit code 75. Within `finishing` it completes its work first; long
work there calls `asked()` now and then, and the ranks agree on the answer by themselves.
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
EXIT_ACTION_SECONDS = 2.0
"""How long a process that ends may take to tell the other ranks."""
_CONSIDER = 0
"""Byte for the listening thread, besides signal numbers: check whether to end the process."""


class _Listener:
    """State of a request to stop, and the thread that handles it.

    Signals are handled in a separate thread, because no Python handler runs while the main thread waits in a collective
    or loads a library.
    """

    def __init__(self) -> None:
        self.reason = ""
        """Reason for the request, for messages; empty: no request."""
        self.holds = 0
        """Number of `finishing` blocks that the main thread is in."""
        self.decided = False
        """The main thread ends the process with its own exit code."""
        self.leaving = False
        self.exit_actions: list[Callable[[], None]] = []
        self.on_request: Callable[[], None] | None = None
        """Called in place of ending the process."""
        self.lock = threading.Lock()
        reader, self.writer = socket.socketpair()
        self.writer.setblocking(False)
        self._before = {signum: signal.signal(signum, _do_nothing) for signum in SIGNALS}
        self._descriptor = signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, args=(reader,), name="stop-request", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Restore the handlers. A process that was asked to stop ignores further signals: torchrun sends SIGTERM to the
        remaining ranks when the first one ends, and they end by themselves."""
        signal.set_wakeup_fd(self._descriptor)
        for signum, handler in self._before.items():
            signal.signal(signum, signal.SIG_IGN if self.reason else handler)
        self.writer.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self.writer.close()

    def consider(self) -> None:
        """Make the listening thread check whether to end the process."""
        with contextlib.suppress(OSError):  # full: it checks anyway; closed: the command has ended
            self.writer.send(bytes([_CONSIDER]))

    def _listen(self, reader: socket.socket) -> None:
        with reader:
            while received := reader.recv(64):
                for signum in received:
                    if signum in SIGNALS and not self.reason:
                        self.reason = signal.Signals(signum).name
                if self.reason:
                    self._consider()

    def _consider(self) -> None:
        with self.lock:
            if self.decided:
                return
            if self.holds:
                self._write_unfinished_status()
                return
            on_request = self.on_request
            self.leaving = on_request is None
        if on_request is None:
            self.leave()
        on_request()

    def _write_unfinished_status(self) -> None:
        """Write a failure to the status file, for the case that the process is killed before it has finished."""
        from megatron_embed.platform.status import leaves_status, write_status

        if leaves_status():
            write_status(1, f"asked to stop ({self.reason}), and did not come to its end")

    def leave(self) -> NoReturn:
        """End the process, whatever the main thread does."""
        from megatron_embed.platform.status import PREEMPTED, leaves_status, write_status

        if leaves_status():
            write_status(PREEMPTED, f"stopped ({self.reason}) before there was anything to save")
        threads = [threading.Thread(target=action, daemon=True) for action in list(self.exit_actions)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(EXIT_ACTION_SECONDS)
        os._exit(PREEMPTED)


_listener: _Listener | None = None


def _do_nothing(signum: int, frame: FrameType | None) -> None:
    """Python handler of the signals; the interpreter itself notifies the listening thread."""


def _forget_in_child() -> None:
    """Drop the listener in a fork, which shares the socket: a signal to the fork (multiprocessing ends workers by
    SIGTERM) must not stop its parent."""
    global _listener
    if _listener is not None:
        _listener = None
        signal.set_wakeup_fd(-1)
        for signum in SIGNALS:
            signal.signal(signum, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget_in_child)


def start() -> None:
    """Handle the signals from now on, until the process ends. Main thread only."""
    global _listener
    if _listener is None:
        _listener = _Listener()


def ignore() -> None:
    """Ignore the signals: the exit code is decided, and the interpreter only has to end."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Handle the signals within the block, if the process does not already; only in the main thread."""
    global _listener
    if _listener is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    _listener = own = _Listener()
    try:
        yield
    finally:
        own.close()
        _listener = None


def asked() -> bool:
    """Whether this process was asked to stop: it got a signal, or another rank did."""
    return _listener is not None and bool(_listener.reason)


def reason() -> str:
    """Reason for the request to stop, for messages; empty without one."""
    return _listener.reason if _listener is not None else ""


def request(why: str) -> None:
    """Ask this process to stop, because another rank was asked to."""
    if _listener is not None and not _listener.reason:
        _listener.reason = why
        _listener.consider()


def decided() -> None:
    """Mark the exit code as decided; signals no longer change it."""
    if _listener is not None:
        with _listener.lock:
            _listener.decided = True


def leave_now() -> None:
    """End this process as after a request to stop; for a thread whose main thread waits for a rank that has ended."""
    if _listener is not None:
        _listener.leave()


def held() -> bool:
    """Whether the process is within `finishing`, so that a request waits."""
    return _listener is not None and _listener.holds > 0


@contextlib.contextmanager
def finishing() -> Iterator[None]:
    """Complete the block before a request to stop takes effect. Main thread only.

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
    if leaving:  # the listening thread is about to end the process: start nothing
        threading.Event().wait()
    try:
        yield
    except BaseException:
        _release(listener, ends=True)
        raise
    if _release(listener, ends=bool(listener.reason)):
        raise PreemptedError(f"stopped ({listener.reason}); start the command again")


@contextlib.contextmanager
def stopping_by(on_request: Callable[[], None]) -> Iterator[None]:
    """Within the block every request to stop calls this function, in the listening thread: for a server, which then
    completes its answers, leaves the block and ends with its own exit code. Main thread only."""
    listener = _listener
    if listener is None:
        yield
        return
    with listener.lock:
        before, listener.on_request = listener.on_request, on_request
        leaving = listener.leaving
    if leaving:
        threading.Event().wait()
    try:
        yield
    finally:
        with listener.lock:
            listener.on_request = before
            listener.decided = listener.decided or bool(listener.reason)


def _release(listener: _Listener, *, ends: bool) -> bool:
    """Leave a `finishing` block. Returns whether it was the outermost one and the command ends here."""
    with listener.lock:
        listener.holds -= 1
        last = listener.holds == 0
        if last and ends and listener.reason:
            listener.decided = True
        return last and listener.decided


def add_exit_action(action: Callable[[], None]) -> None:
    """Call the action before the process ends on a request to stop; in another thread, for EXIT_ACTION_SECONDS."""
    if _listener is not None:
        _listener.exit_actions.append(action)


def remove_exit_action(action: Callable[[], None]) -> None:
    """Undo `add_exit_action`."""
    if _listener is not None and action in _listener.exit_actions:
        _listener.exit_actions.remove(action)
