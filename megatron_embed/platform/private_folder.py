"""Folders of this user alone, for files that are run: compiled kernels in a shared /tmp could be somebody else's."""

import os
import stat
import tempfile
from pathlib import Path


def private_folder() -> Path:
    """A folder below the machine's temporary one that this user owns and nobody else may enter, the same at each call;
    a new one of an unknown name where somebody else holds that."""
    folder = Path(tempfile.gettempdir()) / f"megatron-embed-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="megatron-embed-"))


def keep_kernels_private() -> None:
    """Lets Triton keep its compiled kernels on this machine's own disk, where a home directory is often slow and
    shared, below `private_folder`; TRITON_CACHE_DIR says otherwise."""
    if "TRITON_CACHE_DIR" not in os.environ:
        os.environ["TRITON_CACHE_DIR"] = str(private_folder() / "triton")
