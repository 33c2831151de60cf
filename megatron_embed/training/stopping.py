"""Why a run should stop before its last step: a signal, or its time is up."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SAME_REQUEST_SECONDS = 0.5
"""Signals closer together are one request: srun signals every process of a step, and a launcher among them passes it
on to its workers."""


def _noted(number: int, frame: FrameType | None) -> None:
    """Python's part of the handler; the listening thread is told by the interpreter's own, whatever this one does."""


class StopRequest:
    """Whether this rank was asked to stop. One rank that was is enough; the loop agrees on it.

    Args:
        minutes: the run stops at the first step that ends later than this from now; null: no limit.
    """

    def __init__(self, minutes: float | None) -> None:
        self._minutes = minutes
        self._deadline = None if minutes is None else time.monotonic() + 60.0 * minutes
        self._signal: int | None = None
        self._signal_time = 0.0

    @property
    def signalled(self) -> bool:
        """Whether a signal came."""
        return self._signal is not None

    @property
    def time_is_up(self) -> bool:
        """Whether the time budget is spent."""
        return self._deadline is not None and time.monotonic() > self._deadline

    def reason(self) -> str:
        """Why to stop, in words."""
        if self._signal is not None:
            return signal.Signals(self._signal).name
        return f"training.exit_duration_minutes = {self._minutes:g}" if self.time_is_up else "another rank was asked to"

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Meanwhile SIGTERM and SIGUSR1 are requests; a second one ends the process at once. Main thread only.

        A thread of its own takes them: the main thread may be waiting in a collective, where no Python handler runs.
        """
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        before = {number: signal.signal(number, _noted) for number in SIGNALS}
        descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        thread = threading.Thread(target=self._listen, args=(reader,), name="stop-request", daemon=True)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(descriptor)
            for number, handler in before.items():
                # torchrun sends SIGTERM to the ranks that still run when the first one ends: they end by themselves.
                signal.signal(number, handler if self._signal is None else signal.SIG_IGN)
            writer.shutdown(socket.SHUT_RDWR)
            thread.join()
            writer.close()
            reader.close()

    def _listen(self, reader: socket.socket) -> None:
        while numbers := reader.recv(16):
            for number in numbers:
                if number in SIGNALS:
                    self._receive(number)

    def _receive(self, number: int) -> None:
        now = time.monotonic()
        if self._signal is None:
            self._signal, self._signal_time = number, now
        elif now - self._signal_time > SAME_REQUEST_SECONDS:
            os._exit(128 + number)
