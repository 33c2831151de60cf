"""A chat template of a model directory is a program: it is tried within limits before it is used."""

import gc
import os
import resource
import signal
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from megatron_embed.errors import CheckpointError

SECONDS = 2
"""Seconds of processor time for all trials of a template."""
_WAITED_SECONDS = 120
"""Seconds of wall-clock time, on a machine that is busy."""
_MEMORY = 1 << 30
_LONGEST, _PER_CHARACTER = 1 << 20, 16
"""Characters that a template may give, and how many more for each character of the messages."""
_TOO_MUCH_MEMORY, _TOO_LONG = 3, 4
Render = Callable[[str], str]
"""A text, in messages, to what the template makes of it."""


def try_template(renderings: Iterable[Render], directory: str) -> None:
    """Render a short and a long text in a forked process, whose time and memory are limited. What a template raises
    by itself is left to the caller's own call.

    Raises:
        CheckpointError: it goes on for too long, takes too much memory, or gives too long a text.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which the child does not have or need
        child = os.fork()
    if child == 0:
        gc.freeze()  # a collection must not end the parent's process groups here, where their threads are not: an abort
        code = 0
        try:
            _limit()
            code = _try(renderings)
        except MemoryError:
            code = _TOO_MUCH_MEMORY
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        what = {_TOO_MUCH_MEMORY: f"takes more than {_MEMORY >> 30} GiB", _TOO_LONG: "makes a text far too long"}.get(
            code, f"does not end within {SECONDS} s")
        raise CheckpointError(f"{directory}: its chat template {what} for one message; take a chat_template.jinja from "
                              "a source that you trust")


def refuse_long(rendered: str, given: int, directory: str) -> str:
    """`rendered`, which a template made of messages of `given` characters. Raises CheckpointError if it is far too
    long."""
    if len(rendered) > _LONGEST + _PER_CHARACTER * given:
        raise CheckpointError(f"{directory}: its chat template makes {len(rendered):,} characters of {given:,}; take a "
                              "chat_template.jinja from a source that you trust")
    return rendered


def _try(renderings: Iterable[Render]) -> int:
    """Exit code of the child."""
    for render in renderings:
        for text in ("0", "word " * 4096):
            try:
                rendered = render(text)
            except MemoryError:
                return _TOO_MUCH_MEMORY
            except Exception:  # noqa: BLE001  whatever a template raises; the caller sees it again
                continue
            if len(rendered) > _LONGEST + _PER_CHARACTER * len(text):
                return _TOO_LONG
    return 0


def _limit() -> None:
    """Limit this process, which is a child, and silence it."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    for name in (signal.SIGALRM, signal.SIGXCPU, signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_DFL)
    signal.alarm(_WAITED_SECONDS)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    size = pages * resource.getpagesize() + _MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
