"""Compile the pretend device against the installed torch: 20 s on one core, once for each torch and source."""

import ctypes
import fcntl
import hashlib
import platform
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / "build" / "pretend_cuda"
"""Ignored by git; `make clean` removes it."""
SOURCE = HERE / "pretend_cuda.cpp"
TORCH_VERSIONS = ("2.13.",)
"""Beginnings of the versions that it is written for: torch changes the headers that it uses from release to release."""
MODULE = "pretend_cuda_device"
FLAGS = ("-O0", "-std=c++20", "-fPIC", "-shared", "-w", "-DUSE_DISTRIBUTED", f"-DTORCH_EXTENSION_NAME={MODULE}")


class CannotBuildError(Exception):
    """Why the pretend device cannot be built here."""


def torch_folder() -> Path:
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise CannotBuildError("torch is not installed")
    return Path(spec.origin).parent


def reason_against() -> str | None:
    """Why the device cannot be built here; None if it can. Does not import torch."""
    try:
        installed = version("torch")
    except PackageNotFoundError:
        return "torch is not installed"
    if sys.platform != "linux":
        return f"written for Linux, this is {sys.platform}"
    if not installed.startswith(TORCH_VERSIONS):
        return f"written for torch {', '.join(TORCH_VERSIONS)}x, this is {installed}"
    if (torch_folder() / "lib" / "libtorch_cuda.so").exists():
        return f"torch {installed} is a CUDA build; a CPU build is needed"
    if not (torch_folder() / "include" / "ATen" / "ATen.h").is_file():
        return f"torch {installed} came without its C++ headers"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return "Python's C headers are missing (Debian: python3-dev)"
    if library().exists():
        return None
    return None if shutil.which("g++") else "no g++ (Debian: apt-get install g++)"


def library() -> Path:
    """Path of the compiled device: a name for every torch, Python, machine and source."""
    key = hashlib.sha256("\n".join((version("torch"), sys.version, platform.machine(), *FLAGS)).encode())
    for source in (SOURCE, *sorted(HERE.glob("*.h"))):
        key.update(source.read_bytes())
    return CACHE / key.hexdigest()[:16] / f"{MODULE}.so"


def build() -> Path:
    """The compiled device, from the cache or by g++. Raises CannotBuildError."""
    reason = reason_against()
    if reason is not None:
        raise CannotBuildError(reason)
    target = library()
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be compiling the same
        if not target.exists():
            _compile(target)
    return target


def _compile(target: Path) -> None:
    torch, unfinished = torch_folder(), target.with_suffix(".unfinished")
    includes = (torch / "include", torch / "include" / "torch" / "csrc" / "api" / "include",
                sysconfig.get_paths()["include"])
    done = subprocess.run(
        ["g++", *FLAGS, *(f"-I{folder}" for folder in includes), str(SOURCE), "-o", str(unfinished),
         f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", "-ltorch_python", f"-Wl,-rpath,{torch / 'lib'}"],
        capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotBuildError(f"g++ failed:\n{done.stderr[-4000:]}")
    unfinished.replace(target)


def load(library: Path) -> None:
    """Load the device before torch, which looks once, early, for what knows CUDA."""
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
