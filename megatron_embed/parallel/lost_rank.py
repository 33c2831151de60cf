"""Reaction of the commands to a lost rank: the other ranks end, and one of them names it.

Apart from heartbeat.py, which does the monitoring, so that the command line starts without loading torch.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from megatron_embed.platform.status import leaves_status, write_status
from megatron_embed.platform.terminal_text import write_error

if TYPE_CHECKING:
    from megatron_embed.config.schema import ParallelConfig
    from megatron_embed.parallel.topology import Topology

Start = Callable[["ParallelConfig"], "Topology"]
"""Makes the process groups; called by all ranks."""

ADVICE = "; the others stop. Look at its log, then start the command again"


@contextlib.contextmanager
def monitored_ranks() -> Iterator[Start]:
    """Yield the function that makes the process groups; once called, a lost rank raises a LostRankError that names it.

    For commands that save nothing on the way; the timeouts are those of training (`parallel.timeout_seconds`).
    """
    with contextlib.ExitStack() as monitors:

        def start(sizes: "ParallelConfig") -> "Topology":
            from megatron_embed.parallel.heartbeat import monitor_ranks
            from megatron_embed.parallel.topology import initialize

            topology = initialize(sizes)
            monitors.enter_context(monitor_ranks(topology, abort, ADVICE))
            return topology

        yield start


def abort(message: str, is_reporting_rank: bool) -> None:
    """End a process whose main thread waits for a lost rank."""
    if is_reporting_rank:
        report_lost_rank(message)
    if leaves_status():
        write_status(1, message)
    os._exit(1)


def report_lost_rank(message: str) -> None:
    """Print one line to stderr, on the reporting rank; write the status file too if that is the task of another rank,
    which may be lost."""
    write_error(message)
    if not leaves_status():
        write_status(1, message)
