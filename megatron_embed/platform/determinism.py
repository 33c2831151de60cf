"""torch's deterministic algorithms for one run, not for the process that it runs in."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Context in which torch uses deterministic algorithms only, if `wanted`; torch's earlier setting comes back after
    it, also after an error. The environment variables are `cuda_environment.set_deterministic`'s."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
