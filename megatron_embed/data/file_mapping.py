"""Memory maps of files that keep no file open."""

import ctypes
import mmap
import os
import weakref
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_MAP_FAILED = ctypes.c_void_p(-1).value


def map_file(file: BinaryIO, dtype: "np.dtype[Any]") -> NDArray[Any]:
    """The whole file as a read-only array, mapped until no array of it is left; the file may be closed and deleted.

    np.memmap and Python's mmap (before 3.13) keep a descriptor open for each map: the index of 250 GB of rows, of
    16,000 files, would need as many of every rank.

    Raises:
        OSError: it cannot be mapped.
        ValueError: its size is not a multiple of the dtype's.
    """
    size = os.fstat(file.fileno()).st_size
    count, rest = divmod(size, dtype.itemsize)
    if rest:
        raise ValueError(f"{file.name}: {size} bytes are no whole number of {dtype} values")
    if not size:
        return np.zeros(0, dtype)
    address = _LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address == _MAP_FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), file.name)
    return np.asarray(_Mapping(address, size, dtype, count))


class _Mapping:
    """What an array keeps of the map, which ends with it."""

    def __init__(self, address: int, size: int, dtype: "np.dtype[Any]", count: int) -> None:
        self.__array_interface__ = {"shape": (count,), "typestr": dtype.str, "data": (address, True), "version": 3}
        # Not when the interpreter ends: a thread may still read.
        weakref.finalize(self, _LIBC.munmap, address, size).atexit = False
