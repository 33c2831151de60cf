"""Why a run should stop before its last step: a signal, or its time is up."""

import time

from megatron_embed.platform import stop_signal as stop


class StopRequest:
    """Whether this rank was asked to stop. One rank that was is enough; the loop agrees on it.

    Args:
        minutes: the run stops at the first step that ends later than this from now; None: no limit.
    """

    def __init__(self, minutes: float | None) -> None:
        self._minutes = minutes
        self._deadline = None if minutes is None else time.monotonic() + 60.0 * minutes

    @property
    def signalled(self) -> bool:
        """Whether a signal came, here or at a rank that has said so."""
        return stop.asked()

    @property
    def time_is_up(self) -> bool:
        """Whether the time budget is spent."""
        return self._deadline is not None and time.monotonic() > self._deadline

    def reason(self) -> str:
        """Why to stop, in words."""
        if stop.asked():
            return stop.reason()
        return f"training.exit_duration_minutes = {self._minutes:g}" if self.time_is_up else "another rank was asked to"
