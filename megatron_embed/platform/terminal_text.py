"""Texts from files, arguments and other processes on their way to a terminal or a log: shown, never obeyed."""

import json
import logging
import re
import sys
from typing import Any

# Control characters (ESC among them; C1, which terminals take for ESC and a letter), marks that turn the direction of
# what follows, line ends that only some programs know, halves of characters, and invisible tags. Joiners stay: scripts
# are written with them.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb"
                     "\ud800-\udfff\U000e0000-\U000e007f]")


def printable(text: str) -> str:
    """The text with what a terminal would obey, or hide, as JSON's escapes (`\\u001b`): JSON stays JSON, with the same
    value. Letters of every script stay, and so do tabs and line feeds."""
    return _HIDDEN.sub(lambda match: json.dumps(match[0])[1:-1], text)


def one_line(text: str) -> str:
    """The same on one line."""
    return printable(" ".join(text.split()))


def continued(text: str) -> str:
    """The same, every line after the first indented: none of them looks like a message of its own."""
    return printable(text).replace("\n", "\n    ")


class LogFormatter(logging.Formatter):
    """Log lines whose messages and tracebacks are only shown."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  logging's name
        record.message = continued(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:  # noqa: N802  logging's name
        return printable(super().formatException(ei))


def guard_records() -> None:
    """Messages of libraries that print them by handlers of their own are only shown, too."""
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
