"""Output files of commands: checked before the work begins, and written completely or not at all."""

import contextlib
import os
from collections.abc import Callable
from typing import Any

from megatron_embed.errors import ConfigError, UserError
from megatron_embed.platform.stop_signal import finishing


def check_jsonl(option: str, output: str) -> None:
    """Raises ConfigError, before the work begins, for a .jsonl file that could not be written after it."""
    folder = os.path.dirname(os.path.abspath(output))
    writable = os.path.isdir(folder) and os.access(folder, os.W_OK)
    if os.path.isdir(output) or not output.endswith(".jsonl") or not writable:
        raise ConfigError(f"{option} {output}: must be a .jsonl file, not a directory, in a directory that exists "
                          "and can be written")


def write_atomic(option: str, output: str, write: Callable[[Any], object], *, binary: bool = False) -> UserError | None:
    """Call `write` with an open temporary file and rename it to `output` once it is on the disk. Returns the error if
    that fails, after removing the temporary file.

    Raises:
        PreemptedError: afterwards, if the process was asked to stop meanwhile.
    """
    with finishing():
        return _write_and_rename(option, output, write, binary=binary)


def _write_and_rename(option: str, output: str, write: Callable[[Any], object], *, binary: bool) -> UserError | None:
    temporary = f"{output}.{os.getpid()}.tmp"
    try:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        with open(temporary, "xb" if binary else "x", encoding=None if binary else "utf-8") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, output)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        # numpy's own error about a short write has no strerror.
        return ConfigError(f"{option} {output}: could not be written ({error.strerror or error}); free some space or "
                           "name another disk")
    return None
