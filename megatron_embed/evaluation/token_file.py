"""The vectors of a multi-vector model in two .npy files, written block by block.

FILE.npy holds all vectors, [vectors, dim] float32, text after text; FILE.offsets.npy, [texts + 1] int64, where each
text's begin: text i has rows offsets[i] to offsets[i + 1] - 1.
"""

import contextlib
import os
from collections.abc import Iterable, Mapping
from typing import BinaryIO

import numpy as np

from megatron_embed.batch import TextVectors
from megatron_embed.errors import ConfigError, UserError

HEADER_BYTES = 128
"""Length of the vectors' header, which is written again once their number is known."""


def offsets_name(output: str) -> str:
    """The file of the offsets beside a file of vectors."""
    return f"{output.removesuffix('.npy')}.offsets.npy"


def write_token_file(output: str, blocks: Iterable[TextVectors], dim: int) -> UserError | None:
    """Write both files, complete or not at all; memory is that of a block. The error if they cannot be written.

    All blocks are taken even if the disk fails, because other ranks compute their share of each. Errors of the blocks
    themselves are raised as they are, and nothing is left behind.
    """
    names = {output: f"{output}.{os.getpid()}.tmp", offsets_name(output): f"{offsets_name(output)}.{os.getpid()}.tmp"}
    counts, failure = [np.zeros(1, dtype=np.int64)], None
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(_remove, names.values())
        file = None
        try:
            file = cleanup.enter_context(open(names[output], "xb"))
            file.write(_header(0, dim))
        except OSError as error:
            failure = error
        for block in blocks:
            counts.append(block.counts.numpy())
            if file is None or failure is not None:
                continue
            try:
                file.write(np.ascontiguousarray(block.vectors.numpy(), dtype="<f4").tobytes())
            except OSError as error:
                failure = error
        if file is not None and failure is None:
            failure = _finish(file, np.concatenate(counts).cumsum(), dim, names)
    if failure is None:
        return None
    return ConfigError(f"--output {output}: could not be written ({failure.strerror or failure}); free some space or "
                       "name another disk")


def _finish(file: BinaryIO, offsets: np.ndarray, dim: int, names: Mapping[str, str]) -> OSError | None:
    """Complete both files and give them their names; the error if that fails."""
    try:
        file.seek(0)
        file.write(_header(int(offsets[-1]), dim))
        file.flush()
        os.fsync(file.fileno())
        offsets_file = list(names.values())[1]
        with open(offsets_file, "xb") as other:
            np.save(other, offsets)
        for name, temporary in names.items():
            os.replace(temporary, name)
    except OSError as error:
        return error
    return None


def _remove(files: Iterable[str]) -> None:
    for file in files:
        with contextlib.suppress(OSError):
            os.remove(file)


def _header(vectors: int, dim: int) -> bytes:
    """The header of a .npy file (version 1.0), always HEADER_BYTES long."""
    described = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({vectors}, {dim}), }}"
    start = b"\x93NUMPY\x01\x00" + (HEADER_BYTES - 10).to_bytes(2, "little")
    return start + described.ljust(HEADER_BYTES - len(start) - 1).encode("ascii") + b"\n"
