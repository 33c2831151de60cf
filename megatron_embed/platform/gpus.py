"""The GPUs that a process of this machine can use, without starting CUDA."""

import os
import re
import shutil
import subprocess


def visible_gpus() -> int:
    """Number of GPUs that CUDA gives one process, as count_gpus in launch/functions.sh counts them.

    CUDA takes the entries of CUDA_VISIBLE_DEVICES up to the first that is not a device, and a single device where one
    of them is a MIG device.
    """
    uuids, divided = _listed_gpus()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return 1 if divided else len(uuids)
    count = 0
    for name in (name.strip() for name in visible.split(",")):
        gpus = [gpu for gpu, uuid in enumerate(uuids)
                if name == str(gpu) or (name.startswith("GPU-") and uuid.startswith(name))]
        if name.startswith("MIG-") or (gpus and gpus[0] in divided):
            return max(count, 1)
        if not gpus:
            break
        count += 1
    return count


def _listed_gpus() -> tuple[list[str], set[int]]:
    """(UUIDs of the GPUs that nvidia-smi lists, indices of those that MIG divides)."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return [], set()
    listed = subprocess.run([program, "--list-gpus"], capture_output=True, text=True, check=False).stdout
    uuids: list[str] = []
    divided: set[int] = set()
    for line in listed.splitlines():
        if re.match(r"GPU \d+:", line):
            uuids.append(line.partition("(UUID: ")[2].rstrip().removesuffix(")"))
        elif re.match(r" +MIG ", line) and uuids:
            divided.add(len(uuids) - 1)
    return uuids, divided


def compute_capability() -> tuple[int, int] | None:
    """(major, minor) of the first GPU by the driver's management library, which does not start CUDA; None: unknown."""
    import ctypes

    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)):
        return None
    failed = library.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor))
    library.nvmlShutdown()
    return None if failed else (major.value, minor.value)
