"""The environment in which Python processes, and those that they start, see the pretend device."""

import os
import sys
from pathlib import Path

from tests.pretend_cuda import build

HERE = Path(__file__).resolve().parent


def is_pretended() -> bool:
    """Whether this process's CUDA is the pretend device."""
    return "tests.pretend_cuda.device" in sys.modules


def environment(**changes: str) -> dict[str, str]:
    """os.environ with the device. Builds it first. Raises build.CannotBuildError."""
    build.build()
    paths = [str(HERE / "site"), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PRETEND_CUDA": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))} | changes
