"""Bound on the C heap of a CPU run: freed memory is kept for the next step, but only up to a limit."""

import ctypes
import os
import platform
from pathlib import Path

GROWTH = 1.25
"""Factor of the resident memory of the first steps, above which free memory is returned to the kernel."""
ALLOWANCE = 256 << 20
"""Bytes of growth for which it is never done."""
_STATM = Path("/proc/self/statm")


class HeapWatch:
    """Returns free memory to the kernel when the process has grown well beyond the needs of one step.

    platform/cpu.py makes glibc keep memory that tensors free, which saves a fifth of a step. Bins of ever new sizes do
    not fit into the freed blocks, and the heap grows: 2.8 GB in a process whose steps need 0.4. Returned pages must be
    zeroed again when they are used, so this is done rarely: the needs of a step are measured again after each time.
    Does nothing without glibc and /proc.
    """

    def __init__(self) -> None:
        self._trim = None
        if platform.libc_ver()[0] == "glibc" and _STATM.is_file():
            self._trim = ctypes.CDLL(None).malloc_trim
        self._needed: int | None = None

    def after_step(self) -> bool:
        """Call after each step, when its activations are freed. Returns whether memory was returned to the kernel."""
        if self._trim is None:
            return False
        resident = resident_bytes()
        if self._needed is None:
            self._needed = resident
        if resident <= GROWTH * self._needed + ALLOWANCE:
            return False
        self._trim(0)
        self._needed = None
        return True


def resident_bytes() -> int:
    """Resident memory of this process, as the kernel reports it."""
    return int(_STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
