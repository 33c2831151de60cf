"""Texts for terminals: numbers of things, and texts from files, arguments and other processes, escaped, so that
terminals show but never execute them."""

import json
import logging
import re
import sys
from typing import Any

# Control characters (with ESC, and C1, which terminals read as ESC and a letter), marks of text direction, line ends
# that only some programs know, unpaired surrogates, and invisible tags. Joiners stay: some scripts need them.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb"
                     "\ud800-\udfff\U000e0000-\U000e007f]")


_LONGEST_END = 4000
"""Characters of a message's beginning and of its end that are shown."""


def printable(text: str) -> str:
    """The text with control and invisible characters as JSON escapes (`\\u001b`), so that JSON keeps its value.

    Letters of every script, tabs and line feeds stay."""
    return _HIDDEN.sub(lambda match: json.dumps(match[0])[1:-1], text)


def counted(count: float, noun: str, plural: str | None = None) -> str:
    """A number of things: `1 rank`, `2 ranks`, `1,200 queries`.

    Args:
        plural: of a noun that takes more than an s.
    """
    number = f"{int(count) if count == int(count) else count:,}"
    return f"{number} {noun if count == 1 else plural or noun + 's'}"


def one_line(text: str) -> str:
    """`printable` text on one line, without its middle if it is very long: a file's name or key in it may be."""
    if len(text) > 2 * _LONGEST_END:
        text = f"{text[:_LONGEST_END]} ... {text[-_LONGEST_END:]}"
    return printable(" ".join(text.split()))


def continued(text: str) -> str:
    """`printable` text with every line after the first indented, so that none looks like another message."""
    return printable(text).replace("\n", "\n    ")


class LogFormatter(logging.Formatter):
    """Formatter whose messages and tracebacks are made printable."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  logging's name
        record.message = continued(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:  # noqa: N802  logging's name
        return printable(super().formatException(ei))


def setup_logging(rank: int) -> None:
    """Log to stderr: messages of this package from INFO at rank 0, warnings of other ranks and all libraries, also of
    those that ask for more themselves."""
    logging.basicConfig(level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler:
            handler.setFormatter(LogFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
            if is_for_users not in handler.filters:
                handler.addFilter(is_for_users)
    guard_records()
    logging.getLogger(_UNUSED_KERNEL).setLevel(logging.ERROR)
    logging.getLogger("megatron_embed").setLevel(logging.INFO if rank == 0 else logging.WARNING)


_UNUSED_KERNEL = "bitsandbytes.backends.cpu.ops"
"""Warns at its import of an optional kernel, for 4-bit products that nothing here computes; Sentence Transformers
imports it wherever it is installed."""


def is_for_users(record: logging.LogRecord) -> bool:
    """Whether a message is of this package, or at least a warning (bm25s logs its steps whatever the root's level)."""
    return record.levelno >= logging.WARNING or record.name.partition(".")[0] == "megatron_embed"


def guard_records() -> None:
    """Make the messages of libraries with their own log handlers printable, too."""
    logging.setLogRecordFactory(_record)


def _record(*args: Any, **kwargs: Any) -> logging.LogRecord:
    record = logging.LogRecord(*args, **kwargs)
    try:
        text = record.getMessage()
    except Exception:  # noqa: BLE001  arguments that do not fit their message: logging says so when it is printed
        return record
    if printable(text) != text:
        record.msg, record.args = printable(text), ()
    return record


def write_error(message: str) -> None:
    """Write one line to stderr, at once."""
    sys.stderr.write(f"megatron-embed: error: {one_line(message)}\n")
    sys.stderr.flush()
