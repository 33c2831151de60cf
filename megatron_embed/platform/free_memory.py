"""Memory that a process could still take: of its GPU, or of its host within the limits of its control groups."""

from pathlib import Path

import torch

_MEMINFO, _GROUPS, _MOUNT = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60
"""Without a limit, version 1 of the control groups writes more than this."""


def gpu_bytes(device: torch.device) -> tuple[int, int]:
    """(bytes of the GPU, bytes that this process has of it or could still get)."""
    free, total = torch.cuda.mem_get_info(device)
    return total, free + torch.cuda.memory_reserved(device)


def host_bytes() -> int:
    """Available bytes of the host, or of the tightest memory limit of the process if that is less; 0 if unknown."""
    lines = _MEMINFO.read_text(encoding="ascii").splitlines() if _MEMINFO.is_file() else []
    available = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    return max(0, min([*available, *_limits()])) if available else 0


def _limits() -> list[int]:
    """The bytes that each memory limit of the process leaves, by the control groups it is in."""
    lines = _GROUPS.read_text(encoding="utf-8").splitlines() if _GROUPS.is_file() else []
    left = []
    for _, controllers, name in (line.split(":", 2) for line in lines):
        if controllers in ("", "memory"):
            mount = _MOUNT / controllers
            limit, used, cache = (("memory.max", "memory.current", "inactive_file") if not controllers else
                                  ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))
            folder = mount / name.lstrip("/")
            for group in (folder, *folder.parents):
                if group.is_relative_to(mount):
                    left += _left(group / limit, group / used, group / "memory.stat", cache)
    return left


def _left(limit: Path, used: Path, statistics: Path, cache: str) -> list[int]:
    """[bytes below a limit, files in the cache not counted], or nothing without a limit."""
    try:
        most = limit.read_text(encoding="ascii").strip()
        if most == "max" or int(most) >= _UNLIMITED:
            return []
        lines = statistics.read_text(encoding="ascii").splitlines()
        cached = sum(int(line.split()[1]) for line in lines if line.split()[0] == cache)
        return [int(most) - int(used.read_text(encoding="ascii")) + cached]
    except OSError:
        return []  # a root group has no limit, and a container may not see the groups around it
