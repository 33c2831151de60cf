"""Files to which a run appends a line of JSON after another, and which a resumed run continues."""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

_BLOCK = 1 << 16


def move_aside(path: Path) -> None:
    """Keep an earlier run's file as NAME.1.jsonl, NAME.2.jsonl, ... when a new run starts in its directory."""
    if path.exists() and path.stat().st_size:
        suffix = 1
        while (kept := path.with_name(f"{path.stem}.{suffix}{path.suffix}")).exists():
            suffix += 1
        path.rename(kept)
        logger.info("kept the %s of an earlier run as %s", path.stem, kept)


def cut_after(path: Path, step: int) -> None:
    """Drop the lines of a file after optimizer step `step`, which a resumed run writes again, and a last line that a
    kill cut short. Reads from the end, only what is dropped: a run of a million steps resumes at once."""
    if not path.exists():
        return
    end = path.stat().st_size
    for start, line in _lines_from_end(path):
        if line.endswith(b"\n") and _step_of(line) <= step:
            break
        end = start
    if end < path.stat().st_size:
        os.truncate(path, end)


def _step_of(line: bytes) -> float:
    """The step of a line; more than any for one that is none."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _lines_from_end(path: Path) -> Iterator[tuple[int, bytes]]:
    """(offset, line with its end) of every line, the last first."""
    with path.open("rb") as file:
        position, rest = file.seek(0, os.SEEK_END), b""
        while position:
            size = min(_BLOCK, position)
            position -= size
            file.seek(position)
            rest = file.read(size) + rest
            lines = rest.splitlines(keepends=True)
            rest, offset = lines[0], position + len(rest)
            for line in reversed(lines[1:]):
                offset -= len(line)
                yield offset, line
        if rest:
            yield 0, rest
