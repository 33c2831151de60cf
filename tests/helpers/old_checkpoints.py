"""Checkpoints as versions before 2026-12 wrote them: Megatron gathers the distributed optimizer's state."""

import contextlib
from unittest import mock

GATHERED = {"distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": False}


def gathered_optimizer_state(optimizer, model, *, numbered=False):
    """The optimizer's part of such a checkpoint; `numbered`: with `chained_N.` before the keys if N optimizers are."""
    from megatron_embed.checkpoint.optimizer_state import OFFLOADING, _groups
    from megatron_embed.platform.compat import initialize_optimizer_state

    initialize_optimizer_state(optimizer)
    state = optimizer.sharded_state_dict(model, is_loading=False,
                                         metadata={**GATHERED, "chained_optim_avoid_prefix": not numbered})
    for group in _groups(state):
        for key in OFFLOADING:
            group.pop(key, None)
    return state


@contextlib.contextmanager
def written_as_before(*, numbered=False):
    """Within it this rank saves so."""
    from megatron_embed.checkpoint import save

    def gathered(optimizer, model):
        return gathered_optimizer_state(optimizer, model, numbered=numbered)

    with mock.patch.object(save, "optimizer_to_save", gathered), mock.patch.object(
            save, "parallel_save", return_value=None):
        yield
