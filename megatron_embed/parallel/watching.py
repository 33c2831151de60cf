"""Commands whose ranks notice that another one is gone, and say which."""

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
def ranks_watched() -> Iterator[Start]:
    """Gives what makes the process groups; from then on the end of a rank becomes a LostRankError that names it.

    For commands that save nothing on the way; silence counts as in training (`parallel.timeout_seconds`).
    """
    with contextlib.ExitStack() as watches:

        def start(sizes: "ParallelConfig") -> "Topology":
            from megatron_embed.parallel.heartbeat import watched
            from megatron_embed.parallel.topology import initialize

            topology = initialize(sizes)
            watches.enter_context(watched(topology, abort, ADVICE))
            return topology

        yield start


def abort(message: str, speaker: bool) -> None:
    """Ends a process whose main thread waits for a rank that is gone."""
    if speaker:
        report_lost_rank(message)
    if leaves_status():
        write_status(1, message)
    os._exit(1)


def report_lost_rank(message: str) -> None:
    """One line on stderr, from the rank that speaks for all; it leaves the status too where it is another's task,
    who may be gone."""
    write_error(message)
    if not leaves_status():
        write_status(1, message)
