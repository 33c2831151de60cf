"""Session-wide fixtures: the worker processes end with the session; tests for absent hardware skip themselves."""

import gc
import os
import sys
from collections.abc import Iterator

import pytest

from tests.helpers.fixed_libraries import fix_libraries
from tests.helpers.ranks import shutdown_ranks

# torch asks the name server about every address that it connects to, 127.0.0.1 as well; one lost answer takes 5 s.
os.environ.setdefault("RES_OPTIONS", "attempts:0")

fix_libraries()

gc.disable()  # until all tests are imported, which takes a seventh less time so


def pytest_collection_finish() -> None:
    gc.freeze()  # no collection walks through all of torch
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _end_workers() -> Iterator[None]:
    yield
    shutdown_ranks()


@pytest.fixture(scope="module", autouse=True)
def _leave_process_group() -> Iterator[None]:
    """A model that a test opened in this process has started a process group, which the next file must not meet."""
    yield
    if (distributed := sys.modules.get("torch.distributed")) and distributed.is_initialized():
        from megatron_embed.parallel.topology import shutdown

        shutdown()


def pytest_runtest_setup(item: pytest.Item) -> None:
    needed = 2 if item.get_closest_marker("multi_gpu") else 1 if item.get_closest_marker("gpu") else 0
    if needed:
        import torch

        available = torch.cuda.device_count()
        if available < needed:
            pytest.skip(f"needs {needed} CUDA device(s), this machine has {available}")
