"""What a conversion says when it is done."""

import resource
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What a conversion did; `str()` is the line for the user."""

    destination: Path
    tensors: int
    """Hugging Face tensors, carried ones included."""
    total_bytes: int
    dtype: str
    seconds: float
    """Verification included."""
    peak_bytes: int
    """Largest resident memory of this process so far."""

    def __str__(self) -> str:
        return (f"{self.destination}: {self.tensors} tensors, {self.total_bytes / 1e9:.2f} GB, {self.dtype}, in "
                f"{self.seconds:.1f} s ({self.total_bytes / 1e9 / self.seconds:.2f} GB/s), peak memory "
                f"{self.peak_bytes / 1e9:.2f} GB; every tensor read back bit-equal")


def peak_memory() -> int:
    """Bytes of memory that this process held at most."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not getrusage: Linux counts there what the parent held when it started this process.
        kib = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(kib) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
