"""Few connections between ranks: gloo connects only ranks that talk, equal groups are one, and files may be many."""

import contextlib
import os
import resource
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_embed.platform.compat import HAS_CUDA, parallel_state

LAZY = "TORCH_GLOO_LAZY_INIT"
"""Torch's variable: gloo connects two ranks at their first message, not each rank of a group with every other."""


def prepare() -> None:
    """Set gloo's mode and allow as many open files as the system lets this process have. Before the process group.

    What the user has set is kept.
    """
    os.environ.setdefault(LAZY, "1")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # some systems refuse what they report
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextlib.contextmanager
def shared_groups() -> Iterator[None]:
    """Within it, Megatron's groups of the same ranks and backend are one group on CPU ranks.

    A layout has 21 kinds of groups, most of them of the same few sets of ranks, and gloo has threads and a connection
    per group. NCCL's groups stay apart: collectives of one group run one after another, which would end the overlap of
    communication with computation, and they connect at their first use. All ranks create all groups in the same order,
    so that each rank takes the same decisions. At its end one number is summed over each group and
    over the world.
    """
    create, known = parallel_state.create_group, dict[tuple[Any, ...], Any]()

    def create_once(ranks: Sequence[int], *args: Any, backend: str | None = None, pg_options: Any = None,
                    **kwargs: Any) -> Any:
        # Those that name a backend apart: Megatron destroys them with the layout, and a model of it may still be used.
        key = (tuple(ranks), backend)
        if pg_options is not None or key not in known:
            known[key] = create(ranks, *args, backend=backend, pg_options=pg_options, **kwargs)
        return known[key]

    if not HAS_CUDA:
        parallel_state.create_group = create_once
    try:
        yield
    finally:
        parallel_state.create_group = create
    for group in (dist.group.WORLD, *known.values()):
        if isinstance(group, dist.ProcessGroup) and group.size() > 1:
            # Connects the ranks that collectives go between: a rank that dies later closes these connections, at which
            # the others' collectives fail at once, while gloo would try to connect to it for minutes.
            dist.all_reduce(torch.zeros(1), group=group)
