"""Waits of the host for the device, counted by the line of the package that asked for it."""

import atexit
import collections
import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType


@dataclass(frozen=True, order=True, kw_only=True)
class Wait:
    """One kind of wait at one line. `caller`: the innermost line of megatron_embed below a line of Megatron-Core."""

    function: str
    """Module, function and line."""
    caller: str
    kind: str
    """`read back`, `copy to device`, `copy to host`, the two with `async` before them, or `synchronize`."""

    @property
    def blocks(self) -> bool:
        """Whether the host waits, which it does not for a copy between page-locked memory and the device."""
        return not self.kind.startswith("async")


counts: collections.Counter[Wait] = collections.Counter()


def record(kind: str, name: str) -> None:
    """Called by the device for every event; `name` is the operator's."""
    own, megatron = "", ""
    frame: FrameType | None = sys._getframe()
    while frame is not None and not own:
        module = frame.f_globals.get("__name__", "")
        here = f"{module}:{frame.f_code.co_name}:{frame.f_lineno}"
        if module.startswith("megatron_embed."):
            own = here.removeprefix("megatron_embed.")
        elif not megatron and module.startswith("megatron.core."):
            megatron = here
        frame = frame.f_back
    counts[Wait(function=megatron or own or "elsewhere", caller=own if megatron else "", kind=kind)] += 1


@contextlib.contextmanager
def recorded() -> Iterator[collections.Counter[Wait]]:
    """The waits within the block, complete at its end."""
    before, inside = counts.copy(), collections.Counter[Wait]()
    yield inside
    inside.update(counts - before)


def table(events: collections.Counter[Wait]) -> str:
    """One line per kind and source line, most frequent first."""
    return "\n".join(f"{count:6d}  {wait.kind:22s}  {wait.function}" + (f"  < {wait.caller}" if wait.caller else "")
                     for wait, count in sorted(events.items(), key=lambda item: (-item[1], item[0])))


def _write(file: Path) -> None:
    if counts:
        file.write_text(table(counts) + "\n", encoding="utf-8")


def write_at_exit() -> None:
    """If PRETEND_LOG is set, write the table of this process to that file, with its rank appended."""
    if os.environ.get("PRETEND_LOG"):
        atexit.register(_write, Path(f"{os.environ['PRETEND_LOG']}.{os.environ.get('RANK', '0')}"))
