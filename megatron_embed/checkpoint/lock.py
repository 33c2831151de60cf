"""One run at a time writes a checkpoint directory."""

import contextlib
import errno
import fcntl
import logging
import os
import socket
import stat
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path

import torch.distributed as dist

from megatron_embed.errors import ConfigError, UserError
from megatron_embed.parallel.collectives import raise_on_all_ranks

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"
_LONGEST_NOTE = 500


@contextlib.contextmanager
def directory_lock(key: str, directory: str) -> Iterator[None]:
    """Context in which rank 0 holds DIRECTORY/.lock. Called by all ranks; one all-gather over the world.

    `key` names the directory in messages, e.g. "checkpoint.directory".

    The kernel releases the lock when the process ends, however it ends, so a lock is never stale.

    Raises:
        ConfigError: on every rank, if another run holds it; the text names its host and process.
    """
    file, error = None, None
    if dist.get_rank() == 0:
        try:
            file = _acquire(key, Path(directory) / LOCK_FILE)
        except UserError as lock_error:
            error = lock_error
    try:
        raise_on_all_ranks(error)
        yield
    finally:
        if file is not None:
            file.close()


def _acquire(key: str, path: Path) -> TextIOWrapper:
    # A POSIX lock: unlike flock's it is not inherited by the processes that a checkpoint's writer forks.
    try:
        # A link or a pipe of that name is not ours: it is not followed, waited for or written to.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        file = os.fdopen(descriptor, "r+", encoding="utf-8")
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            file.close()
            raise OSError(errno.EINVAL, "it is not an ordinary file")
    except OSError as error:
        raise ConfigError(f"{key} = {str(path.parent)!r}: {path} cannot be opened ({error.strerror}); "
                          "remove it if no run uses the directory, or choose another directory", key=key) from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.read(_LONGEST_NOTE).strip() or "an unknown process"
        file.close()
        raise ConfigError(f"{key} = {str(path.parent)!r}: another run writes there ({holder}); wait "
                          "until it ends, or choose another directory", key=key) from None
    except OSError as error:
        logger.warning("%s: this file system has no locks (%s); take care that no other run writes there", path,
                       error.strerror)
    try:
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), f"host {socket.gethostname()}, process {os.getpid()}\n".encode())
    except OSError as error:
        file.close()
        raise ConfigError(f"{key} = {str(path.parent)!r}: {path} cannot be written ({error.strerror}); free disk "
                          "space, or choose another directory", key=key) from error
    return file
