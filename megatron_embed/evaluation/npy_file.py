"""Opening .npy files of other people."""

from typing import Any

import numpy as np

from megatron_embed.config.json_file import open_ordinary

_MAGIC = b"\x93NUMPY"
_LONGEST_HEADER = 10_000
"""Bytes; numpy's own limit, which it compares only after reading a header of any length."""


def map_npy(file: str) -> Any:
    """What `numpy.load` gives for a memory-mapped .npy file.

    Raises:
        OSError: it cannot be read, or is not a regular file.
        ValueError, EOFError, TypeError, OverflowError: it is no .npy file.
    """
    with open_ordinary(file) as opened:
        start = opened.read(12)
    # Version 1 has two bytes for the length of the header, and no limit is needed; later ones have four.
    if not start.startswith(_MAGIC) or (
            start[6:7] != b"\x01" and int.from_bytes(start[8:], "little") > _LONGEST_HEADER):
        raise ValueError("no .npy file, or one with a header that is too long")
    return np.load(file, mmap_mode="r", allow_pickle=False)
