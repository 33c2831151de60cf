"""A folder that only this user can access, for compiled kernels: others could replace those in a shared /tmp."""

import os
import stat
import tempfile
from pathlib import Path


def private_folder() -> Path:
    """A folder in the temporary directory that this user owns and nobody else may enter, the same at each call; a new
    one with a random name if another user has taken that name."""
    folder = Path(tempfile.gettempdir()) / f"megatron-embed-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077:
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="megatron-embed-"))


def keep_kernels_private() -> None:
    """Make Triton keep its compiled kernels in `private_folder`, on this machine's own disk, because home directories
    are often slow and shared; an existing TRITON_CACHE_DIR takes precedence."""
    if "TRITON_CACHE_DIR" not in os.environ:
        os.environ["TRITON_CACHE_DIR"] = str(private_folder() / "triton")
