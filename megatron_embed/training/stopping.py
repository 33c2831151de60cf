"""Reasons to stop a run before its last step: a signal, or its time is up. loop.py acts on them and saves."""

import time

from megatron_embed.platform import stop_signal as stop


class StopRequest:
    """A request to this rank to stop. A request to one rank is enough; the loop makes all ranks agree.

    Args:
        minutes: the run stops at the first step that ends later than this from now; None: no limit.
    """

    def __init__(self, minutes: float | None) -> None:
        self._minutes = minutes
        self._deadline = None if minutes is None else time.monotonic() + 60.0 * minutes

    @property
    def signalled(self) -> bool:
        """True after a signal, to this rank or to one that has passed it on."""
        return stop.asked()

    @property
    def time_is_up(self) -> bool:
        """True once the time budget is spent."""
        return self._deadline is not None and time.monotonic() > self._deadline

    def reason(self) -> str:
        """The reason, for messages."""
        if stop.asked():
            return stop.reason()
        return f"training.exit_duration_minutes = {self._minutes:g}" if self.time_is_up else "another rank was asked to"
