"""Keeps the C heap of a CPU run from growing: freed memory is kept for the next step, but not without bound."""

import ctypes
import os
import platform
from pathlib import Path

GROWTH = 1.25
"""Times the resident memory of a run's first steps, above which its free memory goes back to the kernel."""
ALLOWANCE = 256 << 20
"""Bytes of growth that are never worth it."""
_STATM = Path("/proc/self/statm")


class HeapWatch:
    """Gives free memory back when the process has grown well beyond what one step needs.

    platform/cpu.py has glibc keep what tensors free, which saves a fifth of a step. Bins of ever new sizes do not fit
    into the holes that others left, and the heap grows: 2.8 GB in a process whose steps need 0.4. Every page
    given back must be zeroed again, so that is done seldom: what a step needs is measured anew after each time.
    Does nothing without glibc and /proc.
    """

    def __init__(self) -> None:
        self._trim = None
        if platform.libc_ver()[0] == "glibc" and _STATM.is_file():
            self._trim = ctypes.CDLL(None).malloc_trim
        self._needed: int | None = None

    def after_step(self) -> bool:
        """Call after each step, when its activations are freed. Returns whether memory was given back."""
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
    """Memory of this process that lies in RAM, of the kernel's own figures."""
    return int(_STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
