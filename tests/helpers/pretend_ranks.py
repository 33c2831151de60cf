"""Ranks on the pretend device, for tests and tools whose own process has none."""

import atexit
import os
from collections.abc import Callable
from typing import Any
from unittest import mock

from tests.helpers.ranks import RankPool
from tests.pretend_cuda.environment import environment

_POOL: RankPool | None = None


def run_on_pretend_ranks(function: Callable[..., Any], world_size: int, *args: Any,
                         timeout_seconds: float) -> list[Any]:
    """`run_on_ranks` on pretended GPUs. Raises build.CannotBuildError, see build.reason_against."""
    global _POOL
    if _POOL is None:
        _POOL = RankPool()
        atexit.register(shutdown_pretend_ranks)
    with mock.patch.dict(os.environ, environment()):  # the workers' process starts with the first call
        return _POOL.run(function, world_size, args, {}, timeout_seconds)


def shutdown_pretend_ranks() -> None:
    """End the workers; the next call starts new ones."""
    global _POOL
    if _POOL is not None:
        _POOL.shutdown()
        _POOL = None
