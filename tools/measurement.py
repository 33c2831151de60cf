"""Measurements that several benchmarks share: memory, ratios of times, a description of the machine."""

import os
import platform
import signal
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def exit_on_signals() -> None:
    """Let SIGTERM (of `timeout`, for one) and SIGHUP end this program as Ctrl-C does, so that `finally` blocks run."""
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda signum, frame: sys.exit(128 + signum))


def peak_memory_mib(pid: int | str = "self") -> float:
    """Peak resident memory of a process so far; 0 on systems without /proc.

    Unlike getrusage's value, it does not include what the parent process had in memory.
    """
    path = Path(f"/proc/{pid}/status")
    lines = path.read_text(encoding="ascii").splitlines() if path.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def speedup(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Median ratio of the times of neighbouring steps."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def available_cores() -> list[int]:
    """Numbers of the cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else list(range(os.cpu_count() or 1))


def describe_machine(threads: int) -> str:
    """One line: the CPU, its instructions for bf16, threads and cores."""
    import torch

    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in reversed(lines))}
    flags = set(fields.get("flags", "").split())
    can = ", ".join(f"{flag} {'yes' if flag in flags else 'no'}" for flag in CPU_FLAGS) if flags else "flags unknown"
    return (f"{fields.get('model name', platform.processor())}; {can}; torch {torch.__version__}; each side: "
            f"{threads} threads bound to {min(threads, len(available_cores()))} cores")
