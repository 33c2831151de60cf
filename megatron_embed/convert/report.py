"""Output of a conversion for the user: a progress bar, and one line at the end."""

import resource
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """Result of a conversion; `str()` is the line for the user."""

    destination: Path
    tensors: int
    """Number of Hugging Face tensors, passthrough ones included."""
    total_bytes: int
    dtype: str
    seconds: float
    """Duration, verification included."""
    peak_bytes: int
    """Largest resident memory of this process so far."""

    def __str__(self) -> str:
        return (f"{self.destination}: {self.tensors} tensors, {self.total_bytes / 1e9:.2f} GB, {self.dtype}, in "
                f"{self.seconds:.1f} s ({self.total_bytes / 1e9 / self.seconds:.2f} GB/s), peak memory "
                f"{self.peak_bytes / 1e9:.2f} GB; every tensor read back bit-equal")


def progress(items: list[Item], what: str) -> Iterable[Item]:
    """The items, one per tensor, with a progress bar if stderr is a terminal."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    bar: Iterable[Item] = tqdm(items, desc=what, unit="tensor", disable=not sys.stderr.isatty())
    return bar


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not getrusage: on Linux it includes what the parent held when it started this process.
        kib = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(kib) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
